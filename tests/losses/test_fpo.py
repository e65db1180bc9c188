"""FPO's golden table: one ratio per action, from its matching losses; and the policy that it acts with."""

import math

import numpy as np
import pytest
import torch
from helpers.agents import NOISY, tiny
from helpers.policies import gen
from losses.flows import acted, flow, learn
from losses.golden import batch_of, objective, weights

from ctrlrl import api
from ctrlrl.engine.config import ConfigError, build
from ctrlrl.engine.graphs import compiler_available
from ctrlrl.engine.update import Updater
from ctrlrl.losses import base
from ctrlrl.losses.fpo import FPO
from ctrlrl.nets.flow_policy import Matching

F64 = torch.float64
RAW = {"standardize_advantage": False}


def rows(log_ratios, advantages, mask=None):
    """Actions [B] with the given log-ratios of their pairs [B, K]."""
    log_ratios = torch.tensor(log_ratios, dtype=F64)
    advantage = torch.tensor(advantages, dtype=F64).unsqueeze(-1).expand_as(log_ratios)
    return batch_of(log_ratios.exp(), advantage, mask)


# -- golden numbers -------------------------------------------------------------------------------


def test_golden_table():
    """r = exp of the mean log-ratio of a row, against 0.95 and 1.05; each pair gets A r, or nothing."""
    batch, out = rows(
        [[0.02, 0.06], [0.04, 0.08], [0.04, 0.08], [-0.04, -0.08], [-0.04, -0.08], [0.5, -0.5]],
        [2.0, 1.0, -1.0, 1.0, -1.0, 3.0],
    )
    up, over, under = math.exp(0.04), math.exp(0.06), math.exp(-0.06)
    # in the second and fourth pairs of rows the first pair's own ratio, 1.041 and 0.961, is within the band
    expected = torch.tensor([2 * up, 0.0, -over, under, 0.0, 3.0], dtype=F64).unsqueeze(-1).expand(6, 2)
    torch.testing.assert_close(weights(FPO(**RAW), batch, out), expected)


def test_golden_table_of_samples():
    """Each pair by itself; beyond exp(3) and exp(-3) the ratio stands still."""
    batch, out = rows([[0.02, 0.06], [2.5, 3.5], [-2.5, -3.5], [2.5, -2.5]], [2.0, -1.0, 1.0, 1.0])
    loss = FPO(ratio_of="sample", **RAW)
    expected = [[2 * math.exp(0.02), 0.0], [-math.exp(2.5), 0.0], [math.exp(-2.5), 0.0], [0.0, math.exp(-2.5)]]
    torch.testing.assert_close(weights(loss, batch, out), torch.tensor(expected, dtype=F64))
    batch, out = rows([[3.5, 9.0]], [-1.0])
    assert objective(loss, batch, out).item() == pytest.approx(math.exp(3.0))
    assert objective(FPO(ratio_of="sample", difference_max=0.5, **RAW), batch, out).item() == pytest.approx(1.6487213)


def test_the_objective_is_the_mean_over_actions():
    batch, out = rows([[0.02, 0.06], [0.04, 0.08], [-0.04, -0.08]], [2.0, 1.0, -1.0])
    assert objective(FPO(**RAW), batch, out).item() == pytest.approx(-(2 * math.exp(0.04) + 1.05 - 0.95) / 3)


def test_masked_pairs_are_no_part_of_the_mean():
    mask = torch.tensor([[True, True, False], [False, False, False]])
    batch, out = rows([[0.02, 0.06, 5.0], [1.0, 1.0, 1.0]], [2.0, 1.0], mask)
    out = out._replace(logp=torch.where(mask, out.logp, torch.nan).detach().requires_grad_())
    expected = torch.tensor([[1.0, 1.0, 0.0], [0.0, 0.0, 0.0]], dtype=F64) * 2 * math.exp(0.04)
    # the objective of a row stands at each of its valid positions
    torch.testing.assert_close(weights(FPO(**RAW), batch, out), expected)


def test_what_is_logged_is_about_the_ratio_that_is_clipped():
    batch, out = rows([[0.5, -0.5], [0.04, 0.08]], [1.0, 1.0])
    found = FPO().metrics(batch, out, {})
    assert found["clip_fraction"].tolist() == [[0.0, 0.0], [1.0, 1.0]]
    torch.testing.assert_close(found["approx_kl"][1], torch.full((2,), math.exp(0.06) - 1 - 0.06, dtype=F64))
    assert FPO(ratio_of="sample").metrics(batch, out, {})["clip_fraction"].tolist() == [[1.0, 1.0], [0.0, 1.0]]


def test_the_noise_weight_is_the_error_of_the_implied_noise():
    """v = 0, x0 = 2, eps = 0.5, t = 0.3: x_t = 1.55, so v says that eps is 1.55, and (1.55 - 0.5)^2 = 1.1025."""
    v = torch.zeros(1, 1, dtype=F64, requires_grad=True)
    logp = Matching(v, torch.tensor([0.3], dtype=F64), "noise").log_prob(torch.tensor([[0.5 - 2.0]], dtype=F64))
    logp.sum().backward()
    assert logp.item() == pytest.approx(-1.1025) and v.grad.item() == pytest.approx(-2 * 1.05 * 0.7)


def test_settings_are_checked():
    for wrong in ({"eps": 0.0}, {"difference_max": 0.0}, {"ratio_of": "row"}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            FPO(**wrong)


# -- with the policy ------------------------------------------------------------------------------


@pytest.mark.parametrize("ratio_of", ["action", "sample"])
def test_at_ratio_one_the_gradient_is_that_of_the_weighted_matching_loss(ratio_of):
    """The loss in its released form: of the noise that the velocity implies, (x_t + (1 - t) v - eps)^2."""
    policy = flow()
    batch, action, advantage = acted(policy)
    loss = FPO(ratio_of=ratio_of, **RAW)
    out = policy(batch.obs, batch.action)
    assert (loss.log_ratio(batch, out) == 0).all()
    got = torch.autograd.grad(objective(loss, batch, out), [policy.actor[0].weight, policy.head.linear.weight])
    x, t = batch.obs["x"], batch.obs["time"].unsqueeze(-1)
    eps = (x - (1 - t) * action.unsqueeze(1)) / t
    velocity = policy(batch.obs, batch.action).dist.params()["mean"]
    matching = (x + (1 - t) * velocity - eps).square().mean(-1).mean(-1)
    want = torch.autograd.grad((advantage * matching).mean(), [policy.actor[0].weight, policy.head.linear.weight])
    for ours, plain in zip(got, want, strict=True):
        assert plain.abs().max() > 1e-3
        torch.testing.assert_close(ours, plain, atol=1e-5, rtol=1e-3)


def test_it_runs_by_itself_on_a_flow_without_noise():
    agent = api.make("fpo", NOISY, seed=0, n_envs=2, **tiny("fpo"))
    policy = agent.policy
    assert agent.world == "flow" and policy.likelihood == "matching" and "value" in policy.critics
    assert (policy.denoising_steps, policy.flow_noise, policy.matching_times) == (10, 0.0, 8)
    obs, noise = torch.randn(5, 3, generator=gen()), policy.noise(1, 5, gen())[0]
    chain = policy.act(obs, noise)
    other = noise.clone()
    other[:, 1:] = 7.0  # noise of steps, which there is none of
    assert torch.equal(chain, policy.act(obs, other))
    agent.learn(64, root=None, progress=False)
    assert agent.steps == 64 and agent.steps // agent.iteration == 32  # transitions, not episodes


@pytest.mark.parametrize("name", ["dppo", "ppo", "flow_grpo"])
def test_steps_without_noise_are_for_the_matching_loss_alone(name):
    with pytest.raises(ConfigError, match=rf"without a density, which {name} needs"):
        api.make(name, NOISY, policy="flow", flow_noise=0.0, horizon=5, device="cpu")
    api.make(name, NOISY, policy="flow", flow_noise=0.0, step_std=0.1, horizon=5, device="cpu")


def test_the_preset_of_gorls_baseline():
    agent = api.make("fpo", NOISY, preset="gorl", device="cpu")
    assert agent.loss == FPO() and agent.config.network.action_map == "tanh" and agent.config.gamma == 0.995


# -- learning -------------------------------------------------------------------------------------


def test_it_learns_where_the_reward_is():
    rewards = learn("fpo", 25)
    assert np.mean(rewards[-3:]) > 0.7 > 0.4 > rewards[0], rewards


@pytest.mark.slow
@pytest.mark.skipif(not compiler_available(), reason="torch.compile needs a C++ compiler")
@pytest.mark.parametrize("name", ["fpo", "dppo"])
def test_the_compiled_update_of_a_flow_is_the_eager_one(name):
    settings = {"flow_noise": 0.7, "likelihood": "matching" if name == "fpo" else "denoising"}
    found = []
    for compile in (False, True):
        policy = flow(**settings)
        config, loss = build(base.get(name), {"batch_size": 20, "epochs": 2})
        updater = Updater(policy, loss, config, compile)
        start = updater.flat.flat.clone()
        updater.run(acted(policy)[0], {"learning_rate": torch.tensor(3e-3)}, gen(5))
        updater.accept()
        found.append(updater.flat.flat.clone())
        assert (found[-1] - start).abs().max() > 1e-3
    torch.testing.assert_close(found[0], found[1], atol=2e-6, rtol=0)
