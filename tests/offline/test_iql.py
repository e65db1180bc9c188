"""IQL on a chain whose values and policy are known in closed form, and against an implementation of its own."""

import copy
import functools
import math

import gymnasium as gym
import numpy as np
import pytest
import torch
from helpers.off_policy import (
    ACTIONS,
    OBS,
    Double,
    Told,
    adam,
    assert_like,
    drawn,
    learner,
    plain,
    polyak,
    transitions,
)  # fmt: skip
from torch.distributions import Normal

from ctrlrl.data.transitions import Transitions
from ctrlrl.engine import algorithm as algorithms
from ctrlrl.engine.config import build
from ctrlrl.engine.learner import part
from ctrlrl.engine.offline_config import OfflineConfig
from ctrlrl.nets.actors import GaussianActor, QNetworkConfig
from ctrlrl.offline.iql import expectile_loss

GAMMA, TAU, RATE, B = 0.95, 0.1, 1e-2, 12


@pytest.fixture
def double():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


# -- a chain ------------------------------------------------------------------------------------------

LEVEL, SLOPE, DISCOUNT, SHARE = (0.5, -1.0, 2.0), 0.4, 0.9, 0.25
"""Reward LEVEL[s] + SLOPE a in the states 0, 1, 2, each after the other; a is +1 in SHARE of the rows, else -1."""


def chain():
    """Every state and action as often as the behaviour policy takes it: a tabular problem in the features."""
    rows = [(s, a) for s in range(3) for a in (1.0, -1.0, -1.0, -1.0)]
    state = torch.tensor([s for s, _ in rows])
    action = torch.tensor([[a, 0.0] for _, a in rows])
    reward = torch.tensor(LEVEL)[state] + SLOPE * action[:, 0]
    one_hot = torch.eye(3)
    return Transitions(one_hot[state], action, reward, (state == 2).float(), one_hot[(state + 1) % 3])


@functools.cache
def solved(**settings):
    """IQL without hidden layers, from zero, after it came to rest on the chain, and what it logged last."""
    tabular = {"actor_hidden": (), "critic_hidden": (), "gamma": DISCOUNT, "tau": 1.0}
    mine, batch = learner("iql", **tabular, **settings), chain()
    for name in mine.modules:
        mine.state[name].zero_()
    for rate, count in ((0.02, 300), (5e-3, 200)):
        for name in mine.trained:
            mine.knobs[f"lr/{name}"].fill_(rate)
        for _ in range(count):
            found = mine.run(batch, {}, 1)
    return mine, {k: v.item() for k, v in found.items()}


def known(expectile):
    """The expectile of the actions, and the values of the states with it.

    It is the e of expectile SHARE (1 - e) = (1 - expectile) (1 - SHARE) (1 + e): at one half the mean action.
    """
    up, down = expectile * SHARE, (1 - expectile) * (1 - SHARE)
    e = (up - down) / (up + down)
    values, following = [], 0.0
    for level in reversed(LEVEL):
        following = level + SLOPE * e + DISCOUNT * following
        values.insert(0, following)
    return e, values


@pytest.mark.parametrize("expectile", [0.5, 0.9])
def test_on_a_chain_the_values_are_the_expectiles_and_at_one_half_those_of_the_behaviour_policy(expectile):
    mine, _ = solved(expectile=expectile)
    e, values = known(expectile)
    assert e == pytest.approx({0.5: 2 * SHARE - 1, 0.9: 0.5}[expectile])
    found = mine.modules["value"](torch.eye(3))[0]
    torch.testing.assert_close(found, torch.tensor(values), rtol=0, atol=2e-3)
    for state, following in enumerate([*values[1:], 0.0]):
        for action in (-1.0, 1.0):
            q = mine.modules["critic"](torch.eye(3)[[state]], torch.tensor([[action, 0.0]]))[:, 0]
            wanted = LEVEL[state] + SLOPE * action + DISCOUNT * following
            assert q.tolist() == pytest.approx([wanted, wanted], abs=2e-3)


@pytest.mark.parametrize("max_weight", [100.0, 1.2])
def test_on_a_chain_the_policy_is_the_weighted_mean_and_deviation_of_the_actions(max_weight):
    beta = 3.0  # the default
    mine, found = solved(expectile=0.5) if max_weight == 100.0 else solved(expectile=0.5, max_weight=max_weight)
    e, _ = known(0.5)
    up, down = (min(math.exp(beta * SLOPE * (a - e)), max_weight) for a in (1.0, -1.0))
    mean = (SHARE * up - (1 - SHARE) * down) / (SHARE * up + (1 - SHARE) * down)
    policy = mine.modules["actor"](torch.eye(3))
    torch.testing.assert_close(policy.mean[:, 0], torch.full((3,), mean), rtol=0, atol=1e-2)
    assert policy.log_std[0, 0].exp().item() == pytest.approx(math.sqrt(1 - mean**2), rel=2e-2)
    assert found["weight"] == pytest.approx(SHARE * up + (1 - SHARE) * down, abs=2e-2)
    # the second dimension was always 0: as narrow as allowed
    assert policy.log_std[0, 1].item() <= -4.9 and policy.mean[:, 1].abs().max() < 0.05


# -- the pieces ---------------------------------------------------------------------------------------


def test_the_expectile_loss_and_its_gradient_by_hand():
    prediction = torch.tensor([0.0, 3.0, 5.0], requires_grad=True)
    loss = expectile_loss(torch.tensor([2.0, 2.0, 5.0]) - prediction, 0.7)
    assert loss.item() == pytest.approx((0.7 * 4 + 0.3 * 1 + 0) / 3)
    (gradient,) = torch.autograd.grad(loss, prediction)
    assert gradient.tolist() == pytest.approx([-2 * 0.7 * 2 / 3, 2 * 0.3 * 1 / 3, 0.0])


def actor(**options):
    return GaussianActor(OBS, ACTIONS, QNetworkConfig(actor_hidden=(8,)), **options)


def test_the_policy_is_a_normal_around_a_tanh_with_one_deviation_for_all_states():
    policy, obs, action = actor(), torch.randn(5, 3), torch.rand(5, 2) * 2 - 1
    with torch.no_grad():
        policy.log_std.copy_(torch.tensor([-0.3, 0.4]))
    mean = policy.mean(policy.body(obs)).tanh()
    expected = Normal(mean, torch.tensor([-0.3, 0.4]).exp())
    torch.testing.assert_close(policy(obs).log_prob(action), expected.log_prob(action).sum(1))
    assert torch.equal(policy.mode(obs), mean)
    noise = torch.randn(5, 2)
    torch.testing.assert_close(policy.act(obs, noise), (mean + expected.stddev * noise).clamp(-1, 1))
    assert policy.act(obs, 100 * noise.sign()).abs().eq(1).all()
    assert policy(obs).entropy().shape == (5,)


def test_the_policys_deviation_stays_within_bounds():
    policy, obs = actor(), torch.zeros(1, 3)
    assert policy(obs).log_std.tolist() == [[0.0, 0.0]]
    with torch.no_grad():
        policy.log_std.copy_(torch.tensor([-9.0, 9.0]))
    assert policy(obs).log_std.tolist() == [[-5.0, 2.0]]


def test_the_policy_acts_within_the_environments_own_bounds():
    space = Told.action_space
    policy = GaussianActor(gym.spaces.Box(-1, 1, (3,)), space, QNetworkConfig(actor_hidden=(8,)))
    obs = torch.randn(50, 3)
    for action in policy.to_env(obs, policy.act(obs, 3 * torch.randn(50, 2))).detach().numpy():
        assert space.contains(action)
    assert space.contains(policy.deterministic(obs)[0].detach().numpy())


def test_the_actors_learning_rate_falls_along_a_cosine_offline_and_rewards_stay_unless_asked_for():
    config, method = build(algorithms.get("iql"), {}, loop=OfflineConfig)
    assert config.actor_schedule == "cosine" and not config.scale_by_returns
    assert (method.expectile, method.beta, method.max_weight) == (0.7, 3.0, 100.0)


@pytest.mark.parametrize(
    "settings", [{"expectile": 0.0}, {"expectile": 1.0}, {"beta": -1.0}, {"max_weight": 0.0}, {"expectile": np.nan}]
)
def test_impossible_settings_are_refused(settings):
    with pytest.raises(ValueError, match=next(iter(settings))):
        learner("iql", **settings)


# -- the whole update ---------------------------------------------------------------------------------


class PlainIQL:
    """Kostrikov et al. (2021), eqs. 5 to 7, row by row where that is clearer."""

    def __init__(self, modules, expectile, beta, max_weight):
        self.expectile, self.beta, self.max_weight = expectile, beta, max_weight
        actor = modules["actor"]
        (self.mean,) = plain([actor.mean])
        self.body, self.log_std = plain(actor.body), actor.log_std.detach().clone().requires_grad_()
        self.critics = [plain(modules["critic"].body, k) for k in (0, 1)]
        self.targets = [plain(modules["critic_target"].body, k) for k in (0, 1)]
        self.value = plain(modules["value"].body)
        self.optimisers = {
            "value": adam(self.value, lr=RATE), "critic": adam(*self.critics, lr=RATE),
            "actor": adam(self.body, self.mean, self.log_std, lr=RATE),
        }  # fmt: skip

    def step(self, name, loss):
        self.optimisers[name].zero_grad()
        loss.backward()
        self.optimisers[name].step()

    def update(self, batch):
        obs, following, action = batch.obs.double(), batch.next_obs.double(), batch.action
        pairs = torch.cat([obs, action], 1)
        with torch.no_grad():
            q = torch.stack([target(pairs)[:, 0] for target in self.targets]).min(0).values
        v = self.value(obs)[:, 0]
        terms = []
        for wanted, guess in zip(q, v, strict=True):
            terms.append((self.expectile if wanted > guess else 1 - self.expectile) * (wanted - guess) ** 2)
        found = {"value_loss": sum(terms) / B, "v": v.mean()}
        self.step("value", found["value_loss"])
        with torch.no_grad():
            advantage = q - self.value(obs)[:, 0]  # by the new values
            weight = torch.exp(self.beta * advantage).minimum(torch.tensor(self.max_weight))
            goes_on = [0.0 if end else GAMMA for end in batch.terminated_t]
            wanted = batch.reward_t + torch.tensor(goes_on) * self.value(following)[:, 0]
        assert 0 < (weight == self.max_weight).sum() < B
        policy = Normal(self.mean(self.body(obs)).tanh(), self.log_std.exp())
        found["actor_loss"] = -(weight * policy.log_prob(action).sum(1)).mean()
        self.step("actor", found["actor_loss"])
        values = [critic(pairs)[:, 0] for critic in self.critics]
        found["critic_loss"] = sum(((q - wanted) ** 2).mean() for q in values)
        self.step("critic", found["critic_loss"])
        for target, critic in zip(self.targets, self.critics, strict=True):
            polyak(target, critic, TAU)
        return found | {"q": torch.stack(values).mean(), "advantage": advantage.mean(), "weight": weight.mean()}


def test_three_updates_equal_an_independent_implementation(double):
    method = {"expectile": 0.8, "beta": 4.0, "max_weight": 0.5}
    mine = learner("iql", Double, gamma=GAMMA, tau=TAU, learning_rate=RATE, **method)
    theirs, batch = PlainIQL(copy.deepcopy(mine.modules), **method), transitions(3 * B)
    assert drawn(mine, 1, B) == {}
    for i in range(3):
        rows = part(batch, slice(i * B, (i + 1) * B))
        found, expected = mine.run(rows, {}, 1), theirs.update(rows)
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            torch.testing.assert_close(found[name][0], value.detach(), rtol=0, atol=1e-7, msg=f"{name} {i}")
    actor = mine.modules["actor"]
    assert_like(torch.nn.Sequential(theirs.body, theirs.mean), [*actor.body, actor.mean])
    torch.testing.assert_close(actor.log_std, theirs.log_std.detach(), rtol=0, atol=1e-7)
    assert_like(theirs.value, mine.modules["value"].body)
    for k in (0, 1):
        assert_like(theirs.critics[k], mine.modules["critic"].body, k)
        assert_like(theirs.targets[k], mine.modules["critic_target"].body, k)
