"""Putting together the feed and the reference policy that a loss asks for."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gymnasium as gym
import torch

from ctrlrl.engine import checkpoint, runfolder
from ctrlrl.engine.agent import load_module
from ctrlrl.engine.collector import Collector
from ctrlrl.engine.config import OnPolicyConfig
from ctrlrl.engine.episode_feed import EpisodeFeed
from ctrlrl.engine.feed import Feed, TransitionFeed
from ctrlrl.engine.player import ControlPlayer, TokenPlayer
from ctrlrl.engine.world import Policy, whole_episodes
from ctrlrl.losses.base import PolicyLoss
from ctrlrl.nets.normalizer import RewardNormalizer
from ctrlrl.types import EnvSpec, World


def make_reference(policy: Policy, loss: PolicyLoss, config: OnPolicyConfig, restoring: bool = False) -> Policy | None:
    """The frozen reference policy, where the loss or a setting asks for one: a copy, or a run's policy.

    With ``restoring`` a checkpoint will fill it, and the run it came from is not looked for.

    Raises:
        CheckpointError: The run's network is not of this shape.
    """
    settings, wanted = config.episodes, loss.required() | loss.uses
    if not wanted & {"logp_ref", "teacher"} and settings.kl_reward_coef == 0:
        return None
    reference = copy.deepcopy(policy).requires_grad_(False)
    if settings.reference is not None and not restoring:
        path = Path(settings.reference) / runfolder.CHECKPOINTS / "last.safetensors"
        # its critics are not asked, so the run may have been of a method with others
        own = {f"policy/{k}": v for k, v in reference.state_dict().items() if k.startswith("critics.")}
        found = {k: v for k, v in checkpoint.read(path)[0].items() if not k.startswith("policy/critics.")}
        load_module(reference, found | own, "policy/")
    return reference


def make_feed(
    env: EnvSpec | gym.Env | gym.vector.VectorEnv,
    tokens: Mapping[str, Any] | None,
    world: World,
    policy: Policy,
    reference: Policy | None,
    loss: PolicyLoss,
    config: OnPolicyConfig,
    normalizer: RewardNormalizer,
    seed: int,
    device: torch.device,
) -> tuple[Collector, Feed]:
    """The collector, and on it the feed of transitions or whole episodes, of control or tokens, that ``loss`` needs.

    Raises:
        ValueError: Token sequences from a live environment, which has no form for any number of episodes.
    """
    spec = env if isinstance(env, EnvSpec) else None
    actor: Any = policy
    collector = Collector(env, actor, config.n_steps, device=device, seed=seed)
    if not whole_episodes(world, loss.needs):
        feed = TransitionFeed(collector, policy, loss, config, normalizer, seed, world)
    else:
        if tokens is None:
            player = ControlPlayer(collector, policy, loss, config, seed, collector.device)
        elif spec is None:
            raise ValueError("token sequences need an environment that can be built again: give an id or an EnvSpec")
        else:
            player = TokenPlayer(spec, tokens, policy, loss, config, seed, collector.device)
        feed = EpisodeFeed(player, policy, loss, config, seed, world, spec)
    feed.reference = reference
    return collector, feed
