"""TD3+BC against an implementation of its own, and its two limits: cloning and TD3."""

import copy

import numpy as np
import pytest
import torch
from helpers import off_policy
from helpers.off_policy import Double, adam, assert_like, drawn, plain, polyak, transitions
from helpers.offline import learner, squashed
from torch import nn

from ctrlrl import api
from ctrlrl.engine.learner import part

GAMMA, TAU, RATE, B = 0.95, 0.1, 1e-2, 12


@pytest.fixture
def double():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


class PlainTD3BC:
    """Fujimoto and Gu (2021) for actions in [-1, 1]: eq. 3 with the weight of the released code."""

    def __init__(self, modules, alpha=2.5, delay=2, sigma=0.2, clip=0.5):
        self.alpha, self.delay, self.sigma, self.clip, self.updates = alpha, delay, sigma, clip, 0
        self.actor, self.actor_target = squashed(modules["actor"]), squashed(modules["actor_target"])
        self.critics = [plain(modules["critic"].body, i) for i in (0, 1)]
        self.targets = [plain(modules["critic_target"].body, i) for i in (0, 1)]
        self.optimisers = [adam(self.actor, lr=RATE), adam(*self.critics, lr=RATE)]

    def update(self, batch, noise):
        obs, next_obs = batch.obs.double(), batch.next_obs.double()
        with torch.no_grad():
            shift = torch.from_numpy(np.clip(self.sigma * noise.numpy(), -self.clip, self.clip))
            action = torch.clip(self.actor_target(next_obs) + shift, -1, 1)
            both = torch.cat([q(torch.cat([next_obs, action], 1)) for q in self.targets], 1)
            wanted = torch.where(batch.terminated_t > 0.5, batch.reward_t, batch.reward_t + GAMMA * both.min(1).values)
        pairs = torch.cat([obs, batch.action], 1)
        found = {"critic_loss": sum(nn.functional.mse_loss(q(pairs)[:, 0], wanted) for q in self.critics)}
        self.step(self.optimisers[1], found["critic_loss"])
        self.updates += 1
        if self.updates % self.delay == 0:
            chosen = self.actor(obs)
            q = self.critics[0](torch.cat([obs, chosen], 1))[:, 0]
            weight = self.alpha / q.abs().mean().item()
            found["bc_loss"] = nn.functional.mse_loss(chosen, batch.action)
            found["actor_loss"] = -weight * q.mean() + found["bc_loss"]
            self.step(self.optimisers[0], found["actor_loss"])
            polyak(self.actor_target, self.actor, TAU)
            for target, critic in zip(self.targets, self.critics, strict=True):
                polyak(target, critic, TAU)
        return found

    @staticmethod
    def step(optimiser, loss):
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()


def td3_bc(**settings):
    base = {"gamma": GAMMA, "tau": TAU, "learning_rate": RATE, "normalize_obs": False, "encoder": Double}
    return learner("td3_bc", **base | settings)


@pytest.mark.parametrize(
    "settings,reference",
    [
        ({}, {}),
        ({"alpha": 0.4, "policy_delay": 1}, {"alpha": 0.4, "delay": 1}),
        ({"policy_delay": 3, "target_noise": 0.6, "target_noise_clip": 0.3}, {"delay": 3, "sigma": 0.6, "clip": 0.3}),
    ],
    ids=["default", "alpha 0.4, delay 1", "delay 3, loud"],
)
def test_seven_updates_equal_an_independent_implementation(settings, reference, double):
    mine = td3_bc(**settings)
    theirs = PlainTD3BC(copy.deepcopy(mine.modules), **reference)
    batch, noise = transitions(7 * B), drawn(mine, 7, B)
    for i in range(7):
        rows = part(batch, slice(i * B, (i + 1) * B))
        expected = theirs.update(rows, noise["next_action"][i])
        found = mine.run(rows, {k: v[i : i + 1] for k, v in noise.items()}, 1)
        assert expected.keys() | {"q"} == found.keys()
        for name, value in expected.items():
            torch.testing.assert_close(found[name][0], value.detach(), rtol=0, atol=1e-6, msg=f"{name} {i}")
        for name in ("actor", "actor_target"):
            net = getattr(theirs, name)
            assert_like(net, [*mine.modules[name].body, mine.modules[name].out], tolerance=1e-6)
        for k in (0, 1):
            assert_like(theirs.critics[k], mine.modules["critic"].body, k, tolerance=1e-6)
            assert_like(theirs.targets[k], mine.modules["critic_target"].body, k, tolerance=1e-6)


def actors_of(mine, count, noise=True):
    """The policy's parameters after each of ``count`` updates on the same batches."""
    batch, seen = transitions(count * B), []
    for i in range(count):
        rows = part(batch, slice(i * B, (i + 1) * B))
        mine.run(rows, drawn(mine, 1, B, seed=i) if noise else {}, 1)
        seen.append(mine.state["actor"].clone())
    return seen


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_at_alpha_zero_it_is_behaviour_cloning_bit_for_bit(dtype):
    torch.set_default_dtype(dtype)
    try:
        mine = learner("td3_bc", alpha=0.0, policy_delay=1, learning_rate=RATE)
        cloning = learner("bc", learning_rate=RATE)
        assert torch.equal(mine.state["actor"], cloning.state["actor"])
        pairs = list(zip(actors_of(mine, 20), actors_of(cloning, 20, noise=False), strict=True))
    finally:
        torch.set_default_dtype(torch.float32)
    assert all(torch.equal(a, b) for a, b in pairs) and not torch.equal(pairs[0][0], pairs[-1][0])


def test_with_a_delay_it_clones_every_second_batch_only():
    mine, cloning = learner("td3_bc", alpha=0.0), learner("bc")
    batch = transitions(8 * B)
    for i in range(8):
        rows = part(batch, slice(i * B, (i + 1) * B))
        mine.run(rows, drawn(mine, 1, B), 1)
        if i % 2:
            cloning.run(rows, {}, 1)
        assert torch.equal(mine.state["actor"], cloning.state["actor"])


def test_the_smaller_alpha_the_nearer_to_cloning(double):
    """To first order in alpha: a tenth of it, a tenth of the difference."""
    distance = []
    for alpha in (1e-4, 1e-5):
        mine = td3_bc(alpha=alpha, policy_delay=1, learning_rate=1e-3, adam_eps=1.0)
        plainly = learner("bc", Double, learning_rate=1e-3, normalize_obs=False, adam_eps=1.0)
        pair = actors_of(mine, 1)[0], actors_of(plainly, 1, noise=False)[0]
        distance.append((pair[0] - pair[1]).norm())
    assert distance[0] / distance[1] == pytest.approx(10, rel=1e-2)


def test_at_a_large_alpha_its_direction_is_that_of_td3(double):
    """The size of the gradient does not enter Adam's first step: what is left is TD3."""
    mine = td3_bc(alpha=1e9, policy_delay=1, adam_eps=1e-20)
    settings = {"gamma": GAMMA, "tau": TAU, "learning_rate": RATE, "policy_delay": 1, "adam_eps": 1e-20}
    theirs = off_policy.learner("td3", Double, **settings)
    for name in mine.modules:
        theirs.state[name].copy_(mine.state[name])
    before = mine.state["actor"].clone()
    torch.testing.assert_close(actors_of(mine, 1)[0], actors_of(theirs, 1)[0], rtol=0, atol=1e-5)
    assert (mine.state["actor"] - before).abs().median() > 0.9 * RATE
    for name in ("critic", "critic_target", "actor_target"):
        torch.testing.assert_close(mine.state[name], theirs.state[name], rtol=0, atol=1e-5)


def test_the_scale_of_the_values_does_not_matter(double):
    """Critics ten times as large: the policy takes the very same step."""
    steps = []
    for factor in (1.0, 10.0):
        mine = td3_bc(policy_delay=1, critic_learning_rate=0.0)
        with torch.no_grad():
            mine.modules["critic"].body[-1].weight.mul_(factor)
            mine.modules["critic"].body[-1].bias.mul_(factor)
        steps.append(actors_of(mine, 3)[-1])
    torch.testing.assert_close(steps[0], steps[1], rtol=0, atol=1e-7)


def test_the_settings_are_those_of_the_released_code():
    config, own = api.get_method("td3_bc").blueprint()
    assert (own.alpha, own.policy_delay, own.target_noise, own.target_noise_clip) == (2.5, 2, 0.2, 0.5)
    assert (config.batch_size, config.learning_rate, config.gamma, config.tau) == (256, 3e-4, 0.99, 0.005)
    assert config.network.actor_hidden == config.network.critic_hidden == (256, 256) and config.network.n_critics == 2
    assert config.network.normalize_obs and config.network.layer_norm == "none"


@pytest.mark.parametrize(
    "settings",
    [
        {"policy_delay": 0}, {"alpha": -0.1}, {"exploration_noise": -0.1}, {"target_noise": -1.0},
        {"target_noise_clip": -1.0}, {"alpha": float("nan")},
    ],
)  # fmt: skip
def test_impossible_settings_are_refused(settings):
    (name,) = settings
    with pytest.raises(ValueError, match=name):
        learner("td3_bc", **settings)
