"""Unfolding environment steps into denoising steps, and learning from them."""

import gymnasium as gym
import numpy as np
import pytest
import torch
from helpers.policies import gen

from ctrlrl.data.rows import rows, split
from ctrlrl.engine.config import build as build_config
from ctrlrl.engine.denoise import unfold
from ctrlrl.engine.environments import torch_threads
from ctrlrl.engine.update import Updater
from ctrlrl.losses.awm import AWM
from ctrlrl.losses.base import PolicyLoss
from ctrlrl.losses.flow_grpo import FlowGRPO
from ctrlrl.nets.actor_critic import NetworkConfig
from ctrlrl.nets.flow_policy import FlowPolicy
from ctrlrl.types import SequenceBatch

BOX = gym.spaces.Box(-np.inf, np.inf, (3,), np.float32)
ACT = gym.spaces.Box(-1.0, 1.0, (2,), np.float32)
SMALL = NetworkConfig(actor_hidden=(8,), critic_hidden=(6,))
MASK = torch.tensor([[True, True, False], [True, False, True]])


def build(obs=BOX, action=ACT, config=SMALL, seed=0, **settings):
    torch.manual_seed(seed)
    return FlowPolicy(obs, action, config, **{"denoising_steps": 4} | settings)


def steps(obs=None, **settings):
    """Two episodes of three positions, four of them valid; chains count up."""
    number = torch.arange(6.0).reshape(2, 3)
    chain = torch.randn(2, 3, 5, 2, generator=gen())
    return SequenceBatch(
        obs=torch.randn(2, 3, 3, generator=gen(1)) if obs is None else obs,
        action=chain,
        mask=MASK,
        logp_old=torch.full((2, 3), 7.0),
        advantage=number,
        value_target=10 + number,
        value_old=20 + number,
        sequence_return=torch.tensor([0.5, 1.5]),
        group=torch.tensor([4, 9]),
        success=torch.tensor([True, False]),
        rewards=torch.tensor([[1.0, 2.0], [3.0, 4.0]]),
        **settings,
    )


def test_one_row_per_valid_step_and_one_position_per_denoising_step():
    batch, policy = steps(), build()
    flat = unfold(batch, policy, gen())
    chain = batch.action[MASK]
    assert flat.mask.shape == (4, 4) and flat.mask.all()
    assert torch.equal(flat.obs["obs"], batch.obs[MASK])
    assert torch.equal(flat.obs["x"], chain[:, :4]) and torch.equal(flat.action, chain[:, 1:])
    assert torch.equal(flat.obs["time"], torch.tensor([1.0, 0.75, 0.5, 0.25]).repeat(4, 1))
    number = torch.tensor([0.0, 1.0, 3.0, 5.0]).unsqueeze(1).repeat(1, 4)
    assert torch.equal(flat.advantage, number) and torch.equal(flat.value_target, 10 + number)
    assert torch.equal(flat.value_old, 20 + number)
    assert flat.group.tolist() == [4, 4, 9, 9] and flat.sequence_return.tolist() == [0.5, 0.5, 1.5, 1.5]
    assert flat.success.tolist() == [True, True, False, False] and flat.rewards[2].tolist() == [3.0, 4.0]
    assert flat.task is None and flat.preference is None
    torch.testing.assert_close(flat.coef["velocity_gain"], policy.velocity_gain(flat.obs["time"]))
    # what is not asked for yet cannot pass for an answer
    assert flat.logp_old.isnan().all() and flat.dist_old is None


def test_coefficients_of_steps_and_of_episodes_come_along():
    batch = steps(coef={"a": torch.arange(6.0).reshape(2, 3), "b": torch.tensor([1.0, 2.0])}, weight=MASK.float())
    flat = unfold(batch, build(), gen())
    assert flat.coef["a"][:, 3].tolist() == [0.0, 1.0, 3.0, 5.0] and flat.coef["b"].tolist() == [1.0, 1.0, 2.0, 2.0]
    assert torch.equal(flat.weight, torch.ones(4, 4))


def test_a_dictionary_of_observations():
    space = gym.spaces.Dict({"x": BOX, "mode": gym.spaces.Discrete(3)})
    obs = {"x": torch.randn(2, 3, 3, generator=gen(1)), "mode": torch.arange(6).reshape(2, 3) % 3}
    policy = build(space)
    flat = unfold(steps(obs), policy, gen())
    # the environment's x is not the flow's
    assert set(flat.obs) == {"obs/x", "obs/mode", "x", "time"} and torch.equal(flat.obs["obs/x"], obs["x"][MASK])
    out = policy(flat.obs, flat.action)
    values = policy.values({k: v[MASK] for k, v in obs.items()})["value"]
    torch.testing.assert_close(out.values["value"][:, 2], values)


def test_matching_draws_stratified_times_and_fresh_noise():
    batch, policy = steps(), build(likelihood="matching", matching_times=6)
    flat = unfold(batch, policy, gen(3))
    x0, t = batch.action[MASK][:, -1].unsqueeze(1), flat.obs["time"].unsqueeze(-1)
    assert flat.mask.shape == (4, 6) and flat.action.shape == (4, 6, 2)
    assert torch.equal((flat.obs["time"] * 6).floor(), torch.arange(6.0).repeat(4, 1))
    eps = flat.action + x0
    torch.testing.assert_close(flat.obs["x"], (1 - t) * x0 + t * eps)
    assert eps.flatten().unique().numel() == 48  # one draw for each row, time and dimension
    assert torch.equal(unfold(batch, policy, gen(3)).action, flat.action)
    assert not torch.equal(unfold(batch, policy, gen(4)).action, flat.action)


def test_noise_and_times_of_matching_are_standard_normal_and_uniform():
    batch = SequenceBatch(
        torch.zeros(4000, 1, 3), torch.zeros(4000, 1, 5, 2), torch.ones(4000, 1, dtype=torch.bool),
        *[torch.zeros(4000, 1)] * 4,
    )  # fmt: skip
    flat = unfold(batch, build(likelihood="matching"), gen())
    assert abs(flat.action.mean()) < 0.01 and abs(flat.action.std() - 1) < 0.01
    within = (flat.obs["time"] * 6) % 1
    assert abs(within.mean() - 0.5) < 0.01 and abs(within.var() - 1 / 12) < 0.01


def test_rows_stay_whole_when_they_are_picked_or_split():
    policy = build()
    flat = filled(policy, unfold(steps(), policy, gen()))
    part = rows(flat, torch.tensor([2, 0]))
    out = policy(part.obs, part.action)
    torch.testing.assert_close(out.logp, flat.logp_old[[2, 0]])
    assert [len(p.mask) for p in split(flat, 2, None)] == [2, 2]


def test_errors():
    batch, policy = steps(), build()
    with pytest.raises(ValueError, match="no valid position"):
        unfold(batch._replace(mask=torch.zeros_like(MASK)), policy, gen())
    with pytest.raises(ValueError, match=r"chains \(5, 2\)"):
        unfold(batch._replace(action=batch.action[:, :, :4]), policy, gen())


# -- updates --------------------------------------------------------------------------------------


def filled(policy, batch):
    """``batch`` with what the collecting policy says about it."""
    with torch.no_grad():
        out = policy(batch.obs, batch.action)
    dist = {k: v.clone() for k, v in out.dist.params().items()}
    return batch._replace(logp_old=out.logp, dist_old=dist, entropy_old=out.entropy, dist_ref=dist)


def two_modes(action):
    """Reward of a one-step environment: 1 at +0.6, 1/2 at -0.6, little elsewhere."""
    a = action[..., 0]
    return torch.exp(-(((a - 0.6) / 0.2) ** 2)) + 0.5 * torch.exp(-(((a + 0.6) / 0.2) ** 2))


def play(policy, iteration, n=256):
    """One group of ``n`` episodes of one step."""
    obs = torch.zeros(n, 3)
    with torch.no_grad():
        chain = policy.act(obs, policy.noise(1, n, gen(iteration))[0])
    reward = two_modes(policy.to_env(obs, chain))
    zero = torch.zeros(n, 1)
    batch = SequenceBatch(
        obs.unsqueeze(1), chain.unsqueeze(1), torch.ones(n, 1, dtype=torch.bool), zero, zero, zero, zero,
        sequence_return=reward, group=torch.zeros(n, dtype=torch.long),
    )  # fmt: skip
    return batch, reward.mean().item()


def learn(loss: PolicyLoss, iterations, **settings):
    policy = build(
        action=gym.spaces.Box(-1.0, 1.0, (1,), np.float32),
        config=NetworkConfig(actor_hidden=(32, 32)),
        critics=loss.critics,
        denoising_steps=8,
        **settings,
    )
    config, _ = build_config(FlowGRPO, {"batch_size": 128, "epochs": 2, "learning_rate": 3e-3})
    updater = Updater(policy, loss, config, False)
    rate = {"learning_rate": torch.tensor(3e-3)}
    rewards = []
    for i in range(iterations):
        batch, mean = play(policy, i)
        rewards.append(mean)
        batch = loss.begin(filled(policy, unfold(batch, policy, gen(1000 + i))), rate, loss.memory()).batch
        metrics = updater.run(batch, rate, gen(i))
        assert all(v.isfinite().all() for v in metrics.values())
        updater.accept()
    return rewards


def test_flow_grpo_climbs_to_the_better_mode():
    with torch_threads(1):
        rewards = learn(FlowGRPO(ref_kl_coef=0.0), 30)
    assert np.mean(rewards[-3:]) > 0.75 > 0.4 > np.mean(rewards[:3])


def test_awm_moves_the_samples_to_the_rewarded_mode():
    with torch_threads(1):
        rewards = learn(AWM(ref_kl_coef=0.0), 30, likelihood="matching")
    assert np.mean(rewards[-3:]) > 0.7 > 0.4 > np.mean(rewards[:3])
