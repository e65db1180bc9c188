"""Token sequences, all of them one token further with every step."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import gymnasium as gym
import numpy as np
import torch
from gymnasium.vector import AutoresetMode
from torch import Tensor

from ctrlrl.data.episodes import Episodes, pad
from ctrlrl.engine.errors import NonFiniteError
from ctrlrl.nets.heads import Categorical
from ctrlrl.nets.token_policy import TokenPolicy

Support: TypeAlias = tuple[TokenPolicy, Callable[[Tensor], Tensor]]
"""A policy, and what makes of its logits [N, V] the tokens [N, V] bool that may be drawn."""


def run_sequences(
    env: gym.vector.VectorEnv,
    policy: TokenPolicy,
    seeds: Sequence[int],
    group: Tensor,
    generator: torch.Generator,
    device: torch.device | str = "cpu",
    *,
    temperature: float = 1.0,
    forced: Tensor | None = None,
    support: Support | None = None,
    behaviour_dtype: torch.dtype | None = None,
) -> Episodes:
    """One episode per seed, in as many rounds as ``env`` has too few places.

    The noise belongs to (episode, step), so an episode does not depend on the place it ran in, up to the rounding of
    the policy's batched arithmetic. The policy's cache takes in what stands in the context: its own tokens and the
    environment's.

    Args:
        env: Native vector environment of a token task: ``metadata["tokens"]``, autoreset disabled, infos as arrays.
        policy: Draws the tokens.
        seeds: Reset seeds, ``B``.
        group: [B] int64 group of each episode, handed through.
        generator: Of the policy's noise.
        device: Where the policy lives and where the episodes go.
        temperature: Divides the logits.
        forced: [B, F] int64 tokens that are written in place of the policy's, -1 where it is free, as it is from
            position F on. Positions of the environment remain its own.
        support: Restricts the draw, whose probabilities are renormalised.
        behaviour_dtype: Sample with the parameters rounded to this type, as inference engines do. Log-probabilities
            are still formed in float32.

    Returns:
        Episodes with ``T = length - prompt`` positions, whatever the longest of them is. At forced positions ``turn``
        and the (unrestricted) ``logp_behaviour`` are those of the policy; where it is not its turn they are -1 and 0.
        ``support`` is all true wherever the mask is not.

    Raises:
        ValueError: An environment of another kind, or settings that contradict it.
        NonFiniteError: The policy's logits are NaN or infinite.
    """
    sizes = env.metadata.get("tokens")
    if sizes is None or env.metadata.get("autoreset_mode") != AutoresetMode.DISABLED:
        raise ValueError(
            f"{type(env).__name__} is no native vector environment of a token task: metadata['tokens'] and autoreset "
            f"DISABLED expected, found {env.metadata}. Make it with "
            "gymnasium.make_vec(id, num_envs=..., vectorization_mode='vector_entry_point')"
        )
    total, steps, vocabulary = len(seeds), sizes["length"] - sizes["prompt"], sizes["vocabulary"]
    if total < 1 or tuple(group.shape) != (total,):
        raise ValueError(f"found {total} seeds and groups of shape {tuple(group.shape)}; every episode needs one each")
    if not temperature > 0:
        raise ValueError(f"temperature={temperature} must be positive")
    device = torch.device(device)
    if forced is not None:
        if forced.dim() != 2 or len(forced) != total or forced.shape[1] > steps or bool((forced >= vocabulary).any()):
            raise ValueError(
                f"forced must be tokens below {vocabulary}, or -1, for {total} episodes and at most {steps} positions; "
                f"found shape {tuple(forced.shape)}"
            )
        forced = pad(forced.to(device), steps, -1)
    if behaviour_dtype is not None:
        policy = copy.deepcopy(policy).to(behaviour_dtype)
    store = _Store(total, steps, sizes["length"], device, None if support is None else vocabulary)
    noise = policy.noise(steps, total, generator).to(device)
    places = np.arange(env.num_envs)
    for first in range(0, total, env.num_envs):
        # places beyond the last episode repeat it and are dropped
        episodes = np.minimum(first + places, total - 1)
        at = torch.from_numpy(episodes).to(device)
        _round(
            env, policy, [int(seeds[e]) for e in episodes], noise[:, at], None if forced is None else forced[at],
            temperature, support, store, first, min(env.num_envs, total - first),
        )  # fmt: skip
    return store.episodes(group)


def _round(
    env: gym.vector.VectorEnv,
    policy: TokenPolicy,
    seeds: list[int],
    noise: Tensor,
    forced: Tensor | None,
    temperature: float,
    support: Support | None,
    store: _Store,
    first: int,
    rows: int,
) -> None:
    """One episode in every place, of which the first ``rows`` go to the store from row ``first`` on."""
    prompt, device = env.metadata["tokens"]["prompt"], noise.device
    steps, here = len(noise), slice(first, first + rows)
    began = time.perf_counter()
    obs, infos = env.reset(seed=seeds)  # type: ignore[arg-type]
    store.simulation += time.perf_counter() - began
    store.solution[here], store.task[here] = infos["solution"][:rows], infos["task"][:rows]
    alive = np.ones(env.num_envs, dtype=np.bool_)
    with torch.inference_mode():
        context = torch.from_numpy(obs).to(device)
        state = policy.prefill(context)
        masking = None if support is None else support[0].prefill(context)
        for t in range(steps):
            turn = np.where(alive, infos["turn"], -1)
            mine = torch.from_numpy(turn >= 0).to(device)
            given = None if forced is None else forced[:, t] >= 0
            free = mine if given is None else mine & ~given
            whole = _distribution(state.logits, temperature, t, first)
            dist = whole
            if support is not None and masking is not None:
                allowed = support[1](masking.logits.float()) | ~free.unsqueeze(1)
                if not bool(allowed.any(-1).all()):
                    raise ValueError(f"support leaves no token to draw at position {t}; at least one must be allowed")
                dist = Categorical(whole.logits.masked_fill(~allowed, -torch.inf))
                store.support[here, t] = allowed[:rows]
            action = dist.sample(noise[t])
            if forced is not None and given is not None:
                action = torch.where(given, forced[:, t], action)
            # where nothing is free all is allowed, so this is the unrestricted one there
            store.logp[here, t] = torch.where(mine, dist.log_prob(action), 0.0)[:rows]
            store.mask[here, t], store.turn[here, t] = free.cpu().numpy()[:rows], turn[:rows]
            store.obs[here, t] = np.where(alive[:, None], obs, 0)[:rows]
            began = time.perf_counter()
            obs, reward, terminated, _, infos = env.step(action.cpu().numpy())
            store.simulation += time.perf_counter() - began
            token = np.where(alive, obs[:, prompt + t] - 1, -1)
            store.action[here, t] = np.maximum(token, 0)[:rows]
            store.reward[here, t], store.terminated[here, t] = reward[:rows], (terminated & alive)[:rows]
            store.length[here] += alive[:rows]
            alive &= ~terminated
            if not alive.any():
                break
            written = torch.from_numpy(token).to(device)
            state = policy.extend(state, written)
            if support is not None and masking is not None:
                masking = support[0].extend(masking, written)
    store.finish(here, rows, obs, infos)


def _distribution(logits: Tensor, temperature: float, t: int, first: int) -> Categorical:
    """What the next tokens are drawn from."""
    finite = torch.isfinite(logits).all(-1)
    if not bool(finite.all()):
        raise NonFiniteError("action", first + int(finite.long().argmin()), t, detail="the policy's logits")
    if logits.dtype in (torch.float16, torch.bfloat16):
        logits = logits.float()
    return Categorical(logits if temperature == 1.0 else logits / temperature)


class _Store:
    """The episodes as they are written; what the environment says in numpy, what the policy says on its device."""

    def __init__(self, total: int, steps: int, length: int, device: torch.device, vocabulary: int | None) -> None:
        self.device, self.simulation = device, 0.0
        self.obs = np.zeros((total, steps, length), dtype=np.int64)
        self.last_obs = np.zeros((total, length), dtype=np.int64)
        self.action = np.zeros((total, steps), dtype=np.int64)
        self.turn = np.full((total, steps), -1, dtype=np.int64)
        self.solution = np.full((total, steps), -1, dtype=np.int64)
        self.mask = np.zeros((total, steps), dtype=np.bool_)
        self.terminated = np.zeros((total, steps), dtype=np.bool_)
        self.reward = np.zeros((total, steps), dtype=np.float32)
        self.length, self.task = np.zeros(total, dtype=np.int64), np.zeros(total, dtype=np.int64)
        self.answer, self.success = np.zeros(total, dtype=np.int64), np.zeros(total, dtype=np.bool_)
        self.rewards: list[np.ndarray] = []
        self.void: list[np.ndarray] = []
        self.logp = torch.zeros(total, steps, device=device)
        self.restricted = vocabulary is not None
        self.support = torch.ones(total, steps, vocabulary or 0, dtype=torch.bool, device=device)

    def finish(self, here: slice, rows: int, obs: np.ndarray, infos: dict[str, Any]) -> None:
        """Note how the episodes of a round ended."""
        self.last_obs[here], self.answer[here] = obs[:rows], infos["answer"][:rows]
        self.success[here] = infos["success"][:rows]
        self.rewards.append(infos["rewards"][:rows])
        if "void" in infos:
            self.void.append(infos["void"][:rows])

    def episodes(self, group: Tensor) -> Episodes:
        """Everything as tensors on the policy's device."""

        def tensor(x: np.ndarray) -> Tensor:
            return torch.from_numpy(x).to(self.device)

        return Episodes(
            obs=tensor(self.obs),
            action=tensor(self.action),
            mask=tensor(self.mask),
            reward_t=tensor(self.reward),
            terminated_t=tensor(self.terminated),
            truncated_t=tensor(np.zeros_like(self.terminated)),
            last_obs=tensor(self.last_obs),
            length=tensor(self.length),
            group=group.to(self.device),
            simulation_s=self.simulation,
            logp_behaviour=self.logp,
            turn=tensor(self.turn),
            task=tensor(self.task),
            success=tensor(self.success),
            rewards=tensor(np.concatenate(self.rewards).astype(np.float32)),
            answer=tensor(self.answer),
            void=tensor(np.concatenate(self.void)) if self.void else None,
            solution=tensor(self.solution),
            support=self.support if self.restricted else None,
        )
