"""Rollouts as the batches the losses see."""

from __future__ import annotations

import gymnasium as gym
import numpy as np
import pytest
import torch

from ctrlrl.data.rollout import Rollout, RolloutStorage, torch_dtype


def rollout(**changes) -> Rollout:
    """T = 5, N = 2. Column 0 ends (truncated) at 1, has a reset step at 2; column 1 terminates at 3."""
    steps, n = 5, 2
    base = torch.arange(10.0).reshape(steps, n)
    terminated, truncated = torch.zeros(2, steps, n, dtype=torch.bool)
    valid = torch.ones(steps, n, dtype=torch.bool)
    truncated[1, 0], terminated[3, 1], valid[2, 0] = True, True, False
    fields = {
        "obs": base.unsqueeze(-1), "action": base.unsqueeze(-1) + 100, "reward_t": base + 200,
        "terminated_t": terminated, "truncated_t": truncated, "valid_t": valid, "logp_old": base + 300,
        "value": base + 400, "value_t": base + 500, "advantage": base + 600, "value_target": base + 700,
        "dist_old": {"mean": base.unsqueeze(-1) + 800},
    }  # fmt: skip
    return Rollout(**{**fields, **changes})


def test_flat():
    b = rollout().flat()
    assert b.obs.shape == (10, 1, 1) and b.obs[:, 0, 0].tolist() == list(range(10))
    assert b.action[:, 0, 0].tolist() == list(range(100, 110)) and b.mask.shape == (10, 1)
    assert (~b.mask).nonzero()[:, 0].tolist() == [4]
    assert b.advantage[:, 0].tolist() == list(range(600, 610)) and b.value_old[3, 0] == 403
    assert b.dist_old["mean"].shape == (10, 1, 1)


def test_episodes():
    b = rollout().episodes(group=torch.tensor([7, 8]), task=torch.tensor([1, 2]))
    # column 0: steps 0-1, then 3-4; column 1: steps 0-3, then 4
    assert b.mask.tolist() == [
        [True, True, False, False], [True, True, False, False], [True] * 4, [True, False, False, False],
    ]  # fmt: skip
    assert b.obs[..., 0].tolist() == [[0, 2, 2, 2], [6, 8, 8, 8], [1, 3, 5, 7], [9, 9, 9, 9]]
    assert b.logp_old.tolist() == [[300, 302, 0, 0], [306, 308, 0, 0], [301, 303, 305, 307], [309, 0, 0, 0]]
    assert b.sequence_return.tolist() == [402, 414, 816, 209]
    assert b.group.tolist() == [7, 7, 8, 8] and b.task.tolist() == [1, 1, 2, 2]
    assert b.dist_old["mean"].shape == (4, 4, 1)


def test_the_two_views_hold_the_same_positions():
    torch.manual_seed(0)
    steps, n = 40, 3
    ended = torch.rand(2, steps, n) < 0.1
    valid = torch.rand(steps, n) < 0.9
    r = rollout(
        **{k: torch.randn(steps, n) for k in ("reward_t", "logp_old", "value", "value_t", "advantage", "value_target")},
        obs=torch.randn(steps, n, 1), action=torch.randn(steps, n, 1), dist_old=None,
        terminated_t=ended[0], truncated_t=ended[1] & ~ended[0], valid_t=valid,
    )  # fmt: skip
    flat, rows = r.flat(), r.episodes()
    assert rows.mask.sum() == flat.mask.sum()
    assert torch.equal(rows.advantage[rows.mask].sort()[0], flat.advantage[flat.mask].sort()[0])
    torch.testing.assert_close(rows.sequence_return.sum(), r.reward_t[valid].sum())


def test_padding_is_never_an_invalid_position_and_nan_there_stays_out():
    r = rollout()
    r.obs[2, 0] = float("nan")
    r.logp_old[2, 0] = float("nan")
    b = r.episodes()
    assert torch.isfinite(b.obs).all() and torch.isfinite(b.logp_old).all()


def test_missing_estimates_are_zero_and_dicts_pass():
    r = rollout(value=None, advantage=None, value_target=None, logp_old=None, obs={"a": torch.ones(5, 2, 3)})
    assert r.flat().value_old.eq(0).all() and r.flat().obs["a"].shape == (10, 1, 3)
    assert r.episodes().obs["a"].shape == (4, 4, 3)


def test_nothing_valid():
    with pytest.raises(ValueError, match="no valid transition"):
        rollout(valid_t=torch.zeros(5, 2, dtype=torch.bool)).episodes()


def test_storage():
    space = gym.spaces.Dict({"a": gym.spaces.Box(-1, 1, (2,), np.float64), "i": gym.spaces.Box(0, 255, (3,), np.uint8)})
    s = RolloutStorage(space, (1,), torch.float32, 2, 3)
    rows = [{"a": np.full((3, 2), k + 0.1), "i": np.full((3, 3), k, np.uint8)} for k in range(3)]
    for t in range(2):
        s.write_obs(t, rows[t])
        s.write_action(t, torch.full((3, 1), float(t)))
        s.reward[t], s.truncated[t] = t, True
    s.write_obs(2, rows[2])
    assert s.obs(0, 2)["a"].dtype == torch.float32 and s.obs(0, 2)["a"].shape == (2, 3, 2)
    assert s.obs()["i"][2].eq(2).all() and s.action[1].eq(1).all() and s.truncated.all()
    assert s.reward.dtype == np.float64


def test_storage_refuses_what_tensors_cannot_hold():
    with pytest.raises(TypeError, match="Tuple"):
        RolloutStorage(gym.spaces.Tuple([gym.spaces.Discrete(2)]), (), torch.int64, 2, 2)


def test_dtypes():
    kinds = {
        np.float64: torch.float32,
        np.uint8: torch.uint8,
        np.uint16: torch.int64,
        np.int64: torch.int64,
        bool: torch.bool,
    }
    assert {k: torch_dtype(k) for k in kinds} == kinds
