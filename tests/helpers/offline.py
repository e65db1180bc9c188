"""Small recorded datasets whose every row can be told from the others, and learners of offline methods."""

from __future__ import annotations

import gymnasium as gym
import numpy as np
import torch
from torch import nn

from ctrlrl.data.dataset import Dataset, DatasetInfo
from ctrlrl.engine import algorithm as algorithms
from ctrlrl.engine.algorithm import OfflineAlgorithm, Spaces
from ctrlrl.engine.config import build
from ctrlrl.engine.learner import Learner
from ctrlrl.engine.offline_config import OfflineConfig
from ctrlrl.nets.q_ensemble import EnsembleNorm
from ctrlrl.types import EnvSpec
from helpers.agents import NOISY
from helpers.envs import Noisy
from helpers.off_policy import ACTIONS, OBS, linear, plain

TINY = {
    "batch_size": 8, "iteration_steps": 3, "learning_rate": 1e-2, "critic_learning_rate": None, "actor_hidden": (8,),
    "critic_hidden": (8,), "image_features": 8, "device": "cpu", "threads": 1, "eval_every": None,
    "checkpoint_every": 1,
}  # fmt: skip
OWN: dict[str, dict] = {
    "cql": {"cql_actions": 2},
    "decision_transformer": {"context": 3, "width": 8, "layers": 1, "heads": 2, "warmup_updates": 5},
    "edac": {"n_critics": 3},
    "mopo": {
        "model_members": 3, "model_elites": 2, "model_hidden": (8,), "model_batch_size": 16, "model_max_epochs": 4,
        "model_patience": 4, "rollouts": 12, "rollout_length": 2, "rollouts_every": 6,
    },
    "policy_guided_diffusion": {
        "window_length": 3, "window_stride": 1, "denoiser_channels": (32,), "denoiser_width": 16, "denoiser_blocks": 1,
    },
    "sac_n": {"n_critics": 3},
}  # fmt: skip
"""Settings of a method's own with which it trains in milliseconds."""


def names():
    """Every registered offline method."""
    return [name for name in algorithms.names() if issubclass(algorithms.get(name), OfflineAlgorithm)]


def tiny(name, **settings):
    """Settings with which ``name`` trains in milliseconds."""
    return TINY | OWN.get(name, {}) | settings


def learner(name, encoder=None, seed=0, compile=False, **settings):
    """A learner of ``name`` for observations [3] and actions [2], as an agent would build it."""
    settings = {"actor_hidden": (8, 8), "critic_hidden": (8, 8)} | settings
    config, algorithm = build(algorithms.get(name), settings, loop=OfflineConfig)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        actor, trained, copies = algorithm.networks(Spaces(OBS, ACTIONS), config, encoder)
    return Learner(algorithm, {"actor": actor, **trained}, copies, config, torch.device("cpu"), compile)


def plain_normed(sequence, member=0):
    """As helpers.off_policy.plain, with torch's own layer normalisation where ``sequence`` has some."""
    layers = []
    for layer in sequence:
        if isinstance(layer, EnsembleNorm | nn.LayerNorm):
            alone = isinstance(layer, nn.LayerNorm)
            norm = nn.LayerNorm(layer.weight.shape[-1], eps=1e-6)
            with torch.no_grad():
                norm.weight.copy_(layer.weight if alone else layer.weight[member, 0])
                norm.bias.copy_(layer.bias if alone else layer.bias[member, 0])
            layers.append(norm)
        else:
            layers += plain([layer], member)
    return nn.Sequential(*layers)


def squashed(actor, last="out"):
    """The body, the layer ``last`` and the tanh of an actor in torch's own pieces."""
    layer = getattr(actor, last)
    return nn.Sequential(*plain_normed(actor.body), linear(layer.weight, layer.bias), nn.Tanh())


# -- data --------------------------------------------------------------------------------------------

KINDS = ("ends", "cut, next known", "cut, next unknown", "both")
"""How the episodes of :func:`recorded` end, one after the other."""


def recorded(
    observation=Noisy.observation_space, action=Noisy.action_space, env=NOISY, episodes=16, seed=0, mean=0.0, std=1.0
):
    """Episodes of three to six steps which end in each of the :data:`KINDS` in turn.

    No two observations are equal. Where the next one is not known, that of the next episode stands in its place.
    """
    rng = np.random.default_rng(seed)
    lengths = rng.integers(3, 7, episodes)
    stops = np.cumsum(lengths)
    n, last = int(stops[-1]), stops - 1
    kind = np.arange(episodes) % len(KINDS)
    terminals, timeouts, known = np.zeros(n, bool), np.zeros(n, bool), np.ones(n, bool)
    terminals[last[(kind == 0) | (kind == 3)]] = True
    timeouts[last[kind != 0]] = True
    known[last[kind == 2]] = False
    observations = samples(observation, n + episodes, rng, mean, std)
    # every episode has one observation more than steps
    rows = np.arange(n) + np.repeat(np.arange(episodes), lengths)
    following = rows + 1
    following[~known] += 1
    following[-1] = min(following[-1], n + episodes - 1)
    if isinstance(env, str):
        env = EnvSpec(env)
    return Dataset(
        observations=_at(observations, rows), actions=samples(action, n, rng, 0.0, 0.4),
        rewards=rng.normal(size=n).astype(np.float32), terminals=terminals, timeouts=timeouts,
        next_observations=_at(observations, following), next_known=known, observation_space=observation,
        action_space=action, info=DatasetInfo("toy", env, ref_min_score=-10.0, ref_max_score=10.0),
    )  # fmt: skip


def samples(space, n, rng, mean, std):
    """``n`` members of ``space``, Boxes without bounds normal with ``mean`` and ``std``; arrays by key of a Dict."""
    if isinstance(space, gym.spaces.Dict):
        return {k: samples(s, n, rng, mean, std) for k, s in space.spaces.items()}
    if isinstance(space, gym.spaces.Box) and space.dtype.kind == "f" and not space.is_bounded():
        return rng.normal(mean, std, size=(n, *space.shape)).astype(space.dtype)
    space.seed(int(rng.integers(2**31)))
    return np.stack([space.sample() for _ in range(n)])


def _at(value, rows):
    return {k: v[rows] for k, v in value.items()} if isinstance(value, dict) else value[rows]


def trace(data, obs):
    """Numbers of the rows of ``data`` that the observations [B, ...] are from."""
    where = {row.tobytes(): i for i, row in enumerate(np.asarray(data.observations, np.float32))}
    return np.array([where[row.tobytes()] for row in np.ascontiguousarray(obs.numpy())])


def watch(agent):
    """Keep every batch that ``agent`` learns from from now on."""
    seen, run = [], agent.learner.run

    def noted(batch, noise, count):
        seen.append(batch)
        return run(batch, noise, count)

    agent.learner.run = noted
    return seen
