"""The episodes of one iteration: the groups, and what a loss asks for beside them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ctrlrl.data.episodes import Episodes, concatenate, pad, take
from ctrlrl.engine.config import EpisodesConfig
from ctrlrl.engine.player import Player
from ctrlrl.losses.needs import Need
from ctrlrl.types import DEMONSTRATION, HINTED, ON_POLICY, RETRIED, TEMPERED


class Drawn(NamedTuple):
    """Episodes and where each comes from."""

    parts: list[Episodes]
    source: Tensor
    """[B] see ``SequenceBatch.source``."""
    pivot: Tensor
    """[B] see ``SequenceBatch.pivot``."""
    own: Episodes
    """What the policy did by itself, from the start, to be reported."""
    discarded: int
    """Environment steps of episodes that were replaced by others."""


def draw_all(
    player: Player,
    loss: Any,
    wanted: frozenset[Need],
    seeds: Sequence[int],
    group: Tensor,
    settings: EpisodesConfig,
    temperature: float,
    noise: torch.Generator,
) -> Drawn:
    """Play one episode from each of ``seeds``, and the others that ``wanted`` asks for.

    Raises:
        ValueError: Retries together with other kinds of episodes.
    """
    if "retries" in wanted:
        others = sorted(wanted & {"hints", "tempered", "demonstrations"})
        if others:
            raise ValueError(f"retries cannot be combined with {', '.join(others)}")
        return with_retries(player, seeds, group, noise)
    main = own = player.play(seeds, group)
    discarded = 0
    source = _like(main, ON_POLICY)
    if "hints" in wanted:
        main, hinted, discarded = with_hints(player, loss, main, seeds)
        source = torch.where(hinted, HINTED, source)
    parts, sources = [main], [source]
    if "tempered" in wanted:
        chosen = tempered_groups(group, settings.tempered_share, noise)
        part = player.play([seeds[k] for k in chosen.tolist()], group[chosen], temperature=temperature)
        parts.append(part)
        sources.append(_like(part, TEMPERED))
    if "demonstrations" in wanted and main.solution is not None:
        part = demonstrations(player, main, seeds)
        parts.append(part)
        sources.append(_like(part, DEMONSTRATION))
    source = torch.cat(sources)
    return Drawn(parts, source, torch.zeros_like(source), own, discarded)


def _like(episodes: Episodes, value: int) -> Tensor:
    return torch.full_like(episodes.group, value)


def tempered_groups(group: Tensor, share: float, noise: torch.Generator) -> Tensor:
    """[M] rows of a random ``share`` of the groups, at least one."""
    ids = group.unique()
    count = max(1, round(share * len(ids)))
    picked = ids[torch.randperm(len(ids), generator=noise)[:count]]
    return torch.isin(group, picked).nonzero().flatten()


def demonstrations(player: Player, main: Episodes, seeds: Sequence[int]) -> Episodes:
    """One episode per group that plays its solution; its positions count as if the policy had chosen them."""
    first = first_rows(main.group)
    assert main.solution is not None
    solution = main.solution[first]
    steps = solution.shape[1]
    length = torch.full((len(first),), steps, device=solution.device)
    part = player.play([seeds[k] for k in first.tolist()], main.group[first], forced=solution, forced_length=length)
    mask = pad(solution, part.mask.shape[1], -1)[:, : part.mask.shape[1]] >= 0
    exists = torch.arange(part.mask.shape[1], device=mask.device) < part.length.unsqueeze(1)
    return part._replace(mask=mask & exists)


def with_hints(player: Player, loss: Any, main: Episodes, seeds: Sequence[int]) -> tuple[Episodes, Tensor, int]:
    """Play groups that fail again, in their place, after ever longer parts of their solution (GHPO).

    Returns the episodes, which of them were hinted [B], and the steps of those that were replaced.
    """
    discarded = 0
    replaced = torch.zeros_like(main.group, dtype=torch.bool)
    for ratio in loss.hint_ratios:
        hard = loss.hard(main.returns().clamp(0.0, 1.0), main.group)
        rows = hard.nonzero().flatten()
        if not len(rows) or main.solution is None:
            break
        solution = main.solution[rows]
        count = (solution >= 0).long().cumsum(1)
        hinted = (count <= torch.ceil(ratio * count[:, -1:].float())) & (solution >= 0)
        forced = torch.where(hinted, solution, -1)
        steps = torch.full((len(rows),), forced.shape[1], device=forced.device)
        discarded += int(main.length[rows].sum())
        again = player.play([seeds[k] for k in rows.tolist()], main.group[rows], forced=forced, forced_length=steps)
        kept = (~hard).nonzero().flatten()
        joined = concatenate([take(main, kept), again._replace(solution=solution)])
        main = take(joined, torch.argsort(torch.cat([kept, rows])))
        replaced |= hard
    return main, replaced, discarded


def with_retries(player: Player, seeds: Sequence[int], group: Tensor, noise: torch.Generator) -> Drawn:
    """Half of each group from the start, the other half as retries of these from a random one of their positions.

    A retry takes over its base's actions before the pivot; both count from there on.

    Raises:
        ValueError: A group of odd size.
    """
    sizes = group.bincount()
    if (sizes % 2).any():
        raise ValueError(f"retries pair the episodes of a group, so their number must be even; found {sizes.tolist()}")
    rank = torch.arange(len(group)) - _first(group)
    half = (rank < sizes[group] // 2).nonzero().flatten()
    chosen = [seeds[k] for k in half.tolist()]
    base = player.play(chosen, group[half])
    pivot = _pivots(base, noise)
    again = player.play(chosen, group[half], forced=base.action, forced_length=pivot)
    source = torch.cat([_like(base, ON_POLICY), _like(again, RETRIED)])
    own = base
    before = torch.arange(base.mask.shape[1], device=pivot.device) < pivot.unsqueeze(1)
    base = base._replace(mask=base.mask & ~before)
    return Drawn([base, again], source, torch.cat([pivot, pivot]), own, 0)


def _pivots(base: Episodes, noise: torch.Generator) -> Tensor:
    """[B] a random free position of each episode; with turns, the first position of a random turn."""
    free = base.mask
    if base.turn is not None:
        before = torch.cat([torch.full_like(base.turn[:, :1], -1), base.turn[:, :-1]], 1)
        border = free & (base.turn != before)
        # an episode of one turn has no border but its start, from where a retry would be just another episode
        free = torch.where(border.sum(1, keepdim=True) > 1, border, free)
    draw = torch.rand(free.shape, generator=noise).to(free.device).masked_fill(~free, -1.0)
    return draw.argmax(1)


def _first(group: Tensor) -> Tensor:
    """[B] index of the first row of each row's group."""
    return first_rows(group)[torch.searchsorted(group.unique(), group)]


def first_rows(group: Tensor) -> Tensor:
    """[G] index of the first row of each group, in the order of their ids."""
    ids, inverse = group.unique(return_inverse=True)
    index = torch.full((len(ids),), len(group), device=group.device)
    return index.scatter_reduce(0, inverse, torch.arange(len(group), device=group.device), "amin")
