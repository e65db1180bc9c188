"""Running statistics against NumPy, and reward scaling against Stable-Baselines3's VecNormalize."""

import numpy as np
import pytest
import torch

from ctrlrl.nets.normalizer import ObsNormalizer, RewardNormalizer, RunningMoments


@pytest.mark.parametrize("offset,spread", [(0.0, 1.0), (1e6, 1.0), (-3e4, 1e-2), (5.0, 1e4)])
def test_moments_are_those_of_everything_seen_so_far(offset, spread):
    rng = np.random.default_rng(0)
    # float32 data: at offset 1e6 its own spacing is 0.06, and sums of squares in float32 would be noise
    batches = [(offset + spread * rng.normal(size=(n, 3))).astype(np.float32) for n in (1, 7, 100, 2, 1000)]
    moments = RunningMoments((3,))
    for k, batch in enumerate(batches):
        moments.update(torch.from_numpy(batch))
        seen = np.concatenate(batches[: k + 1]).astype(np.float64)
        np.testing.assert_allclose(moments.mean.numpy(), seen.mean(0), rtol=1e-12, atol=1e-12 * spread)
        np.testing.assert_allclose(moments.var.numpy(), seen.var(0), rtol=1e-7, atol=1e-12 * spread**2)
        assert moments.count == len(seen)


def test_an_empty_batch_changes_nothing():
    moments = RunningMoments((2,))
    moments.update(torch.zeros(0, 2))
    assert moments.count == 0 and (moments.mean == 0).all() and (moments.var == 1).all()
    moments.update(torch.tensor([[1.0, 2.0], [3.0, 6.0]]))
    before = {k: v.clone() for k, v in moments.state_dict().items()}
    moments.update(torch.zeros(0, 2))
    assert all(torch.equal(before[k], v) for k, v in moments.state_dict().items())


def test_the_order_of_batches_does_not_matter_beyond_rounding():
    x = torch.randn(60, 2, generator=torch.Generator().manual_seed(0)) * 3 + 100
    whole, parts = RunningMoments((2,)), RunningMoments((2,))
    whole.update(x)
    for part in reversed(x.split([10, 20, 5, 25])):
        parts.update(part)
    torch.testing.assert_close(whole.mean, parts.mean, atol=1e-10, rtol=0)
    torch.testing.assert_close(whole.var, parts.var, atol=1e-10, rtol=0)


def test_observations_are_untouched_before_data_and_standard_after():
    normalizer = ObsNormalizer(3, clip=10.0)
    x = torch.randn(500, 3, generator=torch.Generator().manual_seed(0)) * torch.tensor([1.0, 20.0, 0.1]) + 5.0
    assert torch.equal(normalizer(x), x.clamp(-10, 10))
    normalizer.update(x)
    out = normalizer(x)
    assert out.dtype == torch.float32
    torch.testing.assert_close(out.mean(0), torch.zeros(3), atol=1e-4, rtol=0)
    torch.testing.assert_close(out.std(0, correction=0), torch.ones(3), atol=1e-4, rtol=0)


def test_observations_are_clipped_after_scaling():
    normalizer = ObsNormalizer(1, clip=2.0)
    normalizer.update(torch.tensor([[-1.0], [1.0]]))
    assert normalizer(torch.tensor([[100.0], [-100.0]])).tolist() == [[2.0], [-2.0]]
    torch.testing.assert_close(normalizer(torch.tensor([[1.0]])), torch.tensor([[1.0]]))


def test_a_large_offset_keeps_its_digits():
    """shift + x * scale in float32 cancels: what is lost must stay below the resolution of the data itself."""
    rng = np.random.default_rng(1)
    x = (1000.0 + rng.normal(size=(400, 1))).astype(np.float32)
    normalizer = ObsNormalizer(1, clip=10.0)
    normalizer.update(torch.from_numpy(x))
    exact = (x.astype(np.float64) - x.astype(np.float64).mean()) / x.astype(np.float64).std()
    np.testing.assert_allclose(normalizer(torch.from_numpy(x)).numpy(), exact, atol=5e-4)


def test_a_constant_feature_stays_finite():
    normalizer = ObsNormalizer(2, clip=10.0)
    normalizer.update(torch.tensor([[7.0, 1.0], [7.0, -1.0]]))
    assert normalizer(torch.tensor([[7.0, 0.0], [8.0, 0.0]])).isfinite().all()
    assert normalizer(torch.tensor([[7.0, 0.0]])).abs().max() < 1e-2


def cut(*steps, length=6, n=2):
    out = torch.zeros(length, n, dtype=torch.bool)
    for t, env in steps:
        out[t, env] = True
    return out


def test_rewards_are_scaled_as_vecnormalize_scales_them_step_by_step():
    """VecNormalize updates at every step, this one at every rollout; with rollouts of one step the two do the same.

    VecNormalize starts its variance at 1 with a count of 1e-4, which is the only difference left.
    """
    pytest.importorskip("stable_baselines3")
    import gymnasium as gym
    from stable_baselines3.common.vec_env import DummyVecEnv, VecNormalize

    env = VecNormalize(DummyVecEnv([lambda: gym.make("CartPole-v1")] * 2), gamma=0.9, clip_reward=1.5)
    ours = RewardNormalizer(2, gamma=0.9, clip=1.5)
    rng = np.random.default_rng(0)
    rewards = 5.0 * rng.normal(size=(400, 2)) + 1.0
    ends = rng.random(size=(400, 2)) < 0.1
    clipped = 0
    for t in range(400):
        env._update_reward(rewards[t])
        theirs = env.normalize_reward(rewards[t].copy())
        env.returns[ends[t]] = 0.0
        row = torch.from_numpy(rewards[t : t + 1])
        got = ours(row, torch.from_numpy(ends[t : t + 1]), torch.ones(1, 2, dtype=torch.bool)).numpy()[0]
        if t > 50:
            np.testing.assert_allclose(got, theirs, rtol=1e-4, atol=1e-6)
            clipped += int((np.abs(got) == 1.5).any())
    assert clipped > 0, "the bound was never met, so it was not tested"


def test_the_running_sum_crosses_rollouts_but_not_ends():
    rewards = torch.arange(12.0).view(6, 2)
    ends = cut((1, 0), (2, 1), (5, 1))
    valid = torch.ones(6, 2, dtype=torch.bool)
    whole, parts = RewardNormalizer(2, 0.9, 10.0), RewardNormalizer(2, 0.9, 10.0)
    whole(rewards, ends, valid)
    for a, b in ((0, 2), (2, 3), (3, 6)):
        parts(rewards[a:b], ends[a:b], valid[a:b])
    torch.testing.assert_close(whole.running, parts.running)
    torch.testing.assert_close(whole.moments.var, parts.moments.var)
    assert whole.running[1] == 0 and whole.running[0] > 0


def test_invalid_steps_are_not_counted():
    rewards = torch.tensor([[1.0], [0.0], [2.0]])
    ends = torch.tensor([[True], [False], [False]])
    valid = torch.tensor([[True], [False], [True]])
    normalizer = RewardNormalizer(1, 0.9, 10.0)
    normalizer(rewards, ends, valid)
    assert normalizer.moments.count == 2
    torch.testing.assert_close(normalizer.moments.mean, torch.tensor(1.5, dtype=torch.float64))
    torch.testing.assert_close(normalizer.running, torch.tensor([2.0], dtype=torch.float64))


def test_restart_forgets_the_sums_and_keeps_the_moments():
    normalizer = RewardNormalizer(2, 0.9, 10.0)
    normalizer(torch.ones(6, 2), cut(), torch.ones(6, 2, dtype=torch.bool))
    var = normalizer.moments.var.clone()
    normalizer.restart()
    assert (normalizer.running == 0).all() and torch.equal(normalizer.moments.var, var)


def test_scaling_never_moves_or_flips_a_reward():
    normalizer = RewardNormalizer(1, 0.99, 10.0)
    reward = torch.tensor([[2.0], [-1.0], [0.0], [3.0]])
    out = normalizer(reward, cut(length=4, n=1), torch.ones(4, 1, dtype=torch.bool))
    assert (out.sign() == reward.sign()).all() and out.dtype == torch.float32
    torch.testing.assert_close(out[0] / out[3], torch.tensor([2 / 3]))
