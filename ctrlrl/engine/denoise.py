"""From environment steps to denoising steps: the rows that losses on a flow policy see."""

from __future__ import annotations

import torch
from torch import Tensor

from ctrlrl.nets.flow_policy import OBS, TIME, FlowPolicy, X
from ctrlrl.types import Obs, SequenceBatch


@torch.no_grad()
def unfold(batch: SequenceBatch, policy: FlowPolicy, generator: torch.Generator) -> SequenceBatch:
    """One row [K] per valid environment step of ``batch`` [B, T], whose actions are chains [B, T, K + 1, D].

    What a position is, the policy's likelihood says. ``denoising``: the K steps that the sampler took. ``matching``:
    noised copies of the action, at times drawn from as many even slices of [0, 1]. Times and noise stay in the batch,
    so that every policy is asked about the same ones.

    Numbers of an environment step are repeated at its K positions, those of an episode in each of its rows.
    ``coef["velocity_gain"]`` is added for denoising. What only the policies can tell is left open: ``logp_old`` is
    NaN and ``dist_old``, ``entropy_old``, ``logp_ref``, ``dist_ref`` are None until the caller has asked them::

        out = policy(batch.obs, batch.action)
        batch = batch._replace(logp_old=out.logp, dist_old=out.dist.params(), entropy_old=out.entropy)

    Args:
        batch: Of environment steps.
        policy: Its schedule and likelihood are looked at, not its parameters.
        generator: Of times and noise, on the CPU; denoising draws nothing.

    Raises:
        ValueError: No valid position, or chains of another length than the policy's.
    """
    mask, action = batch.mask, batch.action
    if action.shape[2:] != policy.action_shape:
        raise ValueError(f"actions of shape {tuple(action.shape[2:])}, expected chains {policy.action_shape}")
    if not bool(mask.any()):
        raise ValueError("this batch holds no valid position, so there is nothing to unfold")
    episode = mask.nonzero()[:, 0]
    chain = action[mask]
    denoising = policy.likelihood == "denoising"
    if denoising:
        x, target = chain[:, :-1], chain[:, 1:]
        time = policy.times.to(chain).repeat(len(chain), 1)
    else:
        x, time, target = _noised(chain[:, -1], policy.matching_times, generator)

    def position(value: Tensor) -> Tensor:
        return value[mask].unsqueeze(1).repeat(1, time.shape[1])

    def row(value: Tensor | None) -> Tensor | None:
        return None if value is None else value[episode]

    coef = {k: position(v) if v.shape == mask.shape else v[episode] for k, v in (batch.coef or {}).items()}
    if denoising:
        coef["velocity_gain"] = policy.velocity_gain(time)
    return SequenceBatch(
        obs={**_flat(batch.obs, mask), X: x, TIME: time},
        action=target,
        mask=torch.ones_like(time, dtype=torch.bool),
        logp_old=torch.full_like(time, torch.nan),
        advantage=position(batch.advantage),
        value_target=position(batch.value_target),
        value_old=position(batch.value_old),
        weight=None if batch.weight is None else position(batch.weight),
        coef=coef,
        sequence_return=row(batch.sequence_return),
        group=row(batch.group),
        task=row(batch.task),
        score=row(batch.score),
        success=row(batch.success),
        rewards=row(batch.rewards),
        answer=row(batch.answer),
        preference=row(batch.preference),
        source=row(batch.source),
    )


def _noised(x0: Tensor, times: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Noised copies [R, K, D] of actions [R, D], their times [R, K] and the velocities [R, K, D] that lead there."""
    rows, size = x0.shape
    time = (torch.arange(times) + torch.rand(rows, times, generator=generator)) / times
    time, eps = time.to(x0), torch.randn(rows, times, size, generator=generator).to(x0)
    x0, t = x0.unsqueeze(1), time.unsqueeze(-1)
    return (1.0 - t) * x0 + t * eps, time, eps - x0


def _flat(obs: Obs, mask: Tensor) -> dict[str, Tensor]:
    """The environment's observations [R, ...], a dictionary spread over keys of its own."""
    if isinstance(obs, dict):
        return {f"{OBS}/{k}": v[mask] for k, v in obs.items()}
    return {OBS: obs[mask]}
