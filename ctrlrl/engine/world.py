"""Which world an environment and a policy make, and the policy that acts in it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

import gymnasium as gym
from torch import nn

from ctrlrl.engine.config import EPISODE_DEFAULTS, TOKEN_DEFAULTS, ConfigError, OnPolicyConfig
from ctrlrl.losses.base import PolicyLoss
from ctrlrl.losses.needs import FLAT, NEEDS, WORLDS, Need, missing
from ctrlrl.nets.actor_critic import ActorCritic
from ctrlrl.nets.flow_policy import FlowPolicy
from ctrlrl.nets.token_policy import TabularPolicy, TransformerPolicy
from ctrlrl.types import World

Policy: TypeAlias = ActorCritic | FlowPolicy | TransformerPolicy | TabularPolicy

_DENOISING: frozenset[Need] = frozenset({"denoising", "matching"})
_SINGLE: frozenset[Need] = frozenset({"categorical", "support", "plain_action", "tempered"})
_CAPABILITY: dict[str, World] = {"tokens": "tokens", "discrete": "discrete", "box": "continuous", "flow": "flow"}


def world_of(action_space: gym.Space, tokens: Mapping[str, Any] | None, kind: str, needs: frozenset[Need]) -> World:
    """The world of an action space, given what the environment says of its tokens and the wanted kind of policy.

    Raises:
        ConfigError: A policy that does not fit the environment.
    """
    if tokens is not None:
        if kind in ("mlp", "flow"):
            raise ConfigError(f"policy={kind!r} does not act on token sequences; use transformer or tabular")
        return "tokens"
    if kind in ("transformer", "tabular"):
        raise ConfigError(f"policy={kind!r} needs an environment of tokens (metadata['tokens']); use mlp")
    if isinstance(action_space, gym.spaces.Box):
        return "flow" if kind == "flow" or (kind == "auto" and needs & _DENOISING) else "continuous"
    if kind == "flow":
        raise ConfigError(f"policy='flow' needs Box actions, found {action_space}")
    return "discrete"


def whole_episodes(world: World, needs: frozenset[Need]) -> bool:
    """Whether rows are whole episodes: always for tokens, in control where a loss looks at more than transitions."""
    return world == "tokens" or bool(
        needs - FLAT - _DENOISING - {"gaussian", "teacher", "categorical", "plain_action", "tree"}
    )


def defaults(world: World, needs: frozenset[Need]) -> dict[str, Any]:
    """Settings of the loop in which this kind of rows differs from the loop's own defaults."""
    if world == "tokens":
        return TOKEN_DEFAULTS
    return EPISODE_DEFAULTS if whole_episodes(world, needs) else {}


def lacking(action_space: gym.Space, needs: frozenset[Need]) -> frozenset[Need]:
    """Needs that this action space rules out within its world: several choices at once are not one categorical."""
    if isinstance(action_space, gym.spaces.MultiDiscrete):
        return needs & _SINGLE
    return frozenset()


def check_world(loss: PolicyLoss, world: World, action_space: gym.Space, config: OnPolicyConfig) -> None:
    """Raise ``ConfigError`` if the loop cannot run ``loss`` here, with each missing need, or with these settings."""
    required = loss.required()
    absent: list[Need] = missing(required, world, config.episodes.reference is not None)
    absent += sorted(lacking(action_space, required))
    if absent:
        what = "; ".join(f"{need} ({NEEDS[need]})" for need in absent)
        raise ConfigError(f"{loss.name} cannot run on {WORLDS[world]} here: it needs {what}")
    if config.moment_coef > 0 and world != "continuous":
        raise ConfigError(f"moment_coef is for Gaussian actions, not for {WORLDS[world]}: leave it at 0")
    network = config.network
    if world == "flow" and network.flow_noise == 0 and network.step_std is None and "matching" not in loss.needs:
        raise ConfigError(
            f"flow_noise=0 leaves the denoising steps without a density, which {loss.name} needs: set it above 0, or "
            "step_std"
        )
    if config.episodes.kl_reward_coef > 0 and (world == "flow" or not whole_episodes(world, loss.needs)):
        raise ConfigError(f"kl_reward_coef acts on whole episodes of actions; {loss.name} sees none: leave it at 0")
    if not whole_episodes(world, loss.needs):
        if "value" not in loss.critics and "values" in required:
            raise ConfigError(f"{loss.name} needs values but has no critic named 'value'")
        return
    for name, wrong in (("compile", True), ("cudagraphs", True), ("normalize_reward", True)):
        if getattr(config, name) == wrong:
            raise ConfigError(f"{name} is for single transitions; {loss.name} here sees whole episodes: leave it off")


def capabilities(loss: type[PolicyLoss]) -> frozenset[str]:
    """What agents of ``loss`` promise (see ``Agent.capabilities``), from what it needs."""
    # cudagraphs is not among them before a machine with a GPU has run its test
    found = {"resume", "gpu"}
    runs = {world: not missing(loss.needs, world, teacher=True) for world in WORLDS}
    found |= {name for name, world in _CAPABILITY.items() if runs[world]}
    if runs["discrete"] and not loss.needs & _SINGLE:
        found.add("multidiscrete")
    if runs["discrete"] or runs["continuous"] or runs["flow"]:
        found |= {"vector", "dict_obs", "image_obs"}
        if not whole_episodes("continuous", loss.needs):
            found.add("compile")
    return frozenset(found)


def build_policy(
    world: World,
    observation_space: gym.Space,
    action_space: gym.Space,
    tokens: Mapping[str, Any] | None,
    config: OnPolicyConfig,
    loss: PolicyLoss,
    encoder: Callable[..., nn.Module] | None,
) -> Policy:
    """The policy network of a world, with the critics of ``loss``."""
    network, normalize_obs, clip_obs = config.network, config.normalize_obs, config.clip_obs
    if world == "tokens":
        assert tokens is not None
        table = network.policy == "tabular"
        return (TabularPolicy if table else TransformerPolicy)(
            observation_space,
            action_space,
            dict(tokens),
            width=network.width,
            layers=network.layers,
            heads=network.heads,
            critics=loss.critics,
        )
    if world == "flow":
        return FlowPolicy(
            observation_space,
            action_space,
            network,
            loss.critics,
            normalize_obs,
            clip_obs,
            encoder,
            likelihood="matching" if "matching" in loss.needs else "denoising",
            denoising_steps=network.denoising_steps,
            flow_noise=network.flow_noise,
            step_std=network.step_std,
            logp_reduce=network.logp_reduce,
            matching_weight=network.matching_weight,
            matching_power=network.matching_power,
            matching_times=network.matching_times,
        )
    return ActorCritic(observation_space, action_space, network, loss.critics, normalize_obs, clip_obs, encoder)
