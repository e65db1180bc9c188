"""DPPO's golden table: PPO at every denoising step, discounted by the steps to come; and steps of a fixed deviation."""

import math

import numpy as np
import pytest
import torch
from helpers.agents import NOISY, tiny
from helpers.policies import gen
from losses.flows import acted, flow, learn
from losses.golden import batch_of, objective, weights

from ctrlrl import api
from ctrlrl.engine.config import ConfigError
from ctrlrl.losses.dppo import DPPO
from ctrlrl.nets.actor_critic import NetworkConfig

F64 = torch.float64
RAW = {"standardize_advantage": False}


def chains(ratios, advantages):
    """Actions [B] with the given ratios of their denoising steps [B, K]."""
    ratios = torch.tensor(ratios, dtype=F64)
    return batch_of(ratios, torch.tensor(advantages, dtype=F64).unsqueeze(-1).expand_as(ratios))


def table(loss, ratios, advantages):
    return weights(loss, *chains(ratios, advantages))


# -- golden numbers -------------------------------------------------------------------------------


def test_golden_table():
    """g = 1/2: the advantages of three steps are A / 4, A / 2 and A; each is clipped by itself at 0.9 and 1.1."""
    loss = DPPO(denoising_gamma=0.5, **RAW)
    got = table(loss, [[1.05, 1.2, 0.8], [1.05, 1.2, 0.8], [1.0, 1.0, 1.0]], [8.0, -8.0, 4.0])
    expected = [[2 * 1.05, 0.0, 8 * 0.8], [-2 * 1.05, -4 * 1.2, 0.0], [1.0, 2.0, 4.0]]
    torch.testing.assert_close(got, torch.tensor(expected, dtype=F64))


def test_noisier_steps_count_less():
    """0.99 by default: of ten steps the first has 0.99^9 = 0.9135 of the last one's advantage."""
    got = table(DPPO(**RAW), [[1.0] * 10], [1.0])[0]
    assert got[-1].item() == 1.0 and got[0].item() == pytest.approx(0.913517) and (got.diff() > 0).all()
    assert (table(DPPO(denoising_gamma=1.0, **RAW), [[1.0] * 10], [1.0]) == 1.0).all()


def test_advantages_are_standardised_before_they_are_discounted():
    """-1 and 1, twice each: mean 0 and deviation sqrt(4 / 3), as each stands for two steps."""
    batch, _ = chains([[1.0, 1.0], [1.0, 1.0]], [3.0, 5.0])
    got = DPPO(denoising_gamma=0.5).prepare(batch, {}).coef["advantage"]
    unit = math.sqrt(3 / 4)
    torch.testing.assert_close(got, torch.tensor([[-unit / 2, -unit], [unit / 2, unit]], dtype=F64))


def test_the_clip_grows_exponentially_towards_the_action():
    """From 0.01 to 0.1 with c = 3, half-way 0.01 + 0.09 / (exp(1.5) + 1) = 0.0264183."""
    loss = DPPO(eps_first=0.01, denoising_gamma=1.0, **RAW)
    middle = 0.01 + 0.09 / (math.exp(1.5) + 1.0)
    inside, outside = 1e-6, -1e-6
    width = [0.01, middle, 0.1]
    got = table(loss, [[1.0 + w - inside for w in width], [1.0 + w - outside for w in width]], [1.0, 1.0])
    assert (got[0] > 0).all() and (got[1] == 0).all()
    got = table(loss, [[1.0 - w + inside for w in width], [1.0 - w + outside for w in width]], [-1.0, -1.0])
    assert (got[0] < 0).all() and (got[1] == 0).all()
    assert loss.width(chains([[1.0] * 3], [1.0])[0])[1].item() == pytest.approx(0.0264183, abs=1e-7)
    # what is logged knows it too
    batch, out = chains([[1.02, 1.02, 1.02]], [1.0])
    assert loss.metrics(batch, out, {})["clip_fraction"].tolist() == [[1.0, 0.0, 0.0]]
    assert DPPO(eps=0.01).metrics(batch, out, {})["clip_fraction"].tolist() == [[1.0, 1.0, 1.0]]


def test_only_the_last_steps_may_be_trained():
    loss = DPPO(tuned_steps=2, denoising_gamma=0.5, eps_first=0.01, **RAW)
    batch, out = chains([[1.005, 1.005, 1.05]], [4.0])
    torch.testing.assert_close(weights(loss, batch, out), torch.tensor([[0.0, 2 * 1.005, 4 * 1.05]], dtype=F64))
    # the mean is over them, and the narrowest band is the first one's
    assert objective(loss, batch, out).item() == pytest.approx(-(2 * 1.005 + 4 * 1.05) / 2)
    assert table(loss, [[1.0, 1.02, 1.0]], [4.0]).tolist() == [[0.0, 0.0, 4.0]]
    # one step has the last one's band; more than there are is all of them
    got = table(DPPO(tuned_steps=1, eps_first=0.01, **RAW), [[1.0, 1.05]], [4.0])
    torch.testing.assert_close(got, torch.tensor([[0.0, 4.2]], dtype=F64))
    assert torch.equal(
        table(DPPO(tuned_steps=9, **RAW), [[1.0, 1.05]], [4.0]), table(DPPO(**RAW), [[1.0, 1.05]], [4.0])
    )


def test_settings_are_checked():
    for wrong in ({"eps_first": 0.0}, {"eps_rate": 0.0}, {"denoising_gamma": 0.0}, {"denoising_gamma": 1.1},
                  {"tuned_steps": 0}):  # fmt: skip
        with pytest.raises(ValueError, match=next(iter(wrong))):
            DPPO(**wrong)
    with pytest.raises(ValueError, match="step_std"):
        NetworkConfig(step_std=0.0)
    with pytest.raises(ValueError, match="step_std"):
        flow(step_std=-0.1)


# -- with the policy ------------------------------------------------------------------------------


def test_steps_of_a_fixed_deviation_are_the_odes_with_noise_on_them():
    """x' = x - v / K + s z, with the density of z / s; the drift of the SDE is gone with its noise."""
    policy, plain = flow("denoising", step_std=0.05), flow("denoising")
    obs, noise = torch.randn(6, 3, generator=gen()), policy.noise(1, 6, gen(1))[0]
    chain = policy.act(obs, noise)
    for k in range(4):
        x, time = chain[:, k], torch.full((6,), 1.0 - k / 4)
        velocity = policy.velocity(policy._features(obs), x, time)
        torch.testing.assert_close(chain[:, k + 1], x - velocity / 4 + 0.05 * noise[:, k + 1])
    rows = {"obs": obs, "x": chain[:, :-1], "time": policy.times.repeat(6, 1)}
    out = policy(rows, chain[:, 1:])
    z = noise[:, 1:]
    want = (-0.5 * z.square() - math.log(0.05) - 0.5 * math.log(2 * math.pi)).sum(-1)
    torch.testing.assert_close(out.logp, want, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(policy.velocity_gain(policy.times), torch.full((4,), 0.25))
    # the same whatever flow_noise says, and the ODE without noise
    again = flow("denoising", step_std=0.05, flow_noise=0.7)
    assert torch.equal(again.act(obs, noise), chain)
    noise[:, 1:] = 0.0
    torch.testing.assert_close(policy.act(obs, noise), plain.act(obs, noise))


def test_before_the_first_step_every_ratio_is_one():
    policy = flow("denoising", flow_noise=0.7)
    batch, _, advantage = acted(policy)
    out = policy(batch.obs, batch.action)
    assert torch.equal(out.logp, batch.logp_old)
    loss = DPPO(denoising_gamma=0.5, **RAW)
    parameter = policy.head.linear.weight
    (got,) = torch.autograd.grad(objective(loss, batch, out), parameter)
    logp = policy(batch.obs, batch.action).logp
    score = (logp * torch.tensor([0.125, 0.25, 0.5, 1.0])).mean(-1)
    (want,) = torch.autograd.grad(-(advantage * score).mean(), parameter)
    assert want.abs().max() > 1e-3
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-3)


def test_it_runs_by_itself_on_a_flow_with_noise():
    agent = api.make("dppo", NOISY, seed=0, n_envs=2, **tiny("dppo"))
    assert agent.world == "flow" and agent.policy.likelihood == "denoising" and agent.policy.denoising_steps == 10
    agent.learn(64, root=None, progress=False)
    assert agent.steps == 64 and agent.steps // agent.iteration == 32  # transitions, not episodes
    with pytest.raises(ConfigError, match="needs denoising"):
        api.make("dppo", NOISY, policy="mlp", device="cpu")


def test_the_preset_of_gorls_baseline():
    agent = api.make("dppo", NOISY, preset="gorl", device="cpu")
    assert agent.policy.step_std == 0.05 and agent.loss == DPPO(eps=0.2, denoising_gamma=1.0)


# -- learning -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("goal", "settings"), [(0.7, {}), (0.6, {"step_std": 0.05, "eps": 0.2})])
def test_it_learns_where_the_reward_is(goal, settings):
    rewards = learn("dppo", 25, **settings)
    assert np.mean(rewards[-3:]) > goal > 0.4 > rewards[0], rewards
