"""TD3 against an implementation of its own with torch's optimiser."""

import copy

import pytest
import torch
from helpers.off_policy import Double, adam, assert_like, drawn, learner, plain, polyak, transitions
from torch import nn

from ctrlrl.engine.learner import part

GAMMA, TAU, RATE, B = 0.95, 0.1, 1e-2, 12
LOUD = {"target_noise": 0.6, "target_noise_clip": 0.5}
"""Noise that its bound cuts off often."""


@pytest.fixture(autouse=True)
def double():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def between(x, bound):
    """``x`` brought into [-bound, bound]."""
    return torch.where(x > bound, bound, torch.where(x < -bound, -bound, x))


class PlainTD3:
    """Fujimoto et al. (2018), algorithm 1, for actions in [-1, 1]."""

    def __init__(self, modules, delay=2, sigma=0.2, clip=0.5, critic_rate=RATE):
        self.delay, self.sigma, self.clip, self.updates = delay, sigma, clip, 0
        actor, target = modules["actor"], modules["actor_target"]
        self.actor = nn.Sequential(plain(actor.body), *plain([actor.out]), nn.Tanh())
        self.actor_target = nn.Sequential(plain(target.body), *plain([target.out]), nn.Tanh())
        self.critics = [plain(modules["critic"].body, i) for i in (0, 1)]
        self.targets = [plain(modules["critic_target"].body, i) for i in (0, 1)]
        self.optimisers = [adam(self.actor, lr=RATE), adam(*self.critics, lr=critic_rate)]

    def update(self, batch, noise):
        obs, next_obs = batch.obs.double(), batch.next_obs.double()
        with torch.no_grad():
            epsilon = between(self.sigma * noise, self.clip)
            action = between(self.actor_target(next_obs) + epsilon, 1.0)
            first, second = (q(torch.cat([next_obs, action], 1))[:, 0] for q in self.targets)
            rows = zip(batch.reward_t, batch.terminated_t, first, second, strict=True)
            wanted = torch.stack([r if end else r + GAMMA * min(a, b) for r, end, a, b in rows])
        pairs = torch.cat([obs, batch.action], 1)
        critic_loss = sum(nn.functional.mse_loss(q(pairs)[:, 0], wanted) for q in self.critics)
        self.step(self.optimisers[1], critic_loss)
        self.updates += 1
        found = {"critic_loss": critic_loss}
        if self.updates % self.delay == 0:
            found["actor_loss"] = -self.critics[0](torch.cat([obs, self.actor(obs)], 1)).mean()
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


def td3(**settings):
    return learner("td3", Double, **{"gamma": GAMMA, "tau": TAU, "learning_rate": RATE} | settings)


@pytest.mark.parametrize(
    "settings,reference",
    [
        ({}, {}),
        (LOUD, {"sigma": 0.6, "clip": 0.5}),
        ({"policy_delay": 3, "critic_learning_rate": 3e-3}, {"delay": 3, "critic_rate": 3e-3}),
        ({"policy_delay": 1, "target_noise": 0.0}, {"delay": 1, "sigma": 0.0}),
    ],
    ids=["default", "loud", "delay 3", "delay 1"],
)
def test_seven_updates_equal_an_independent_implementation(settings, reference):
    mine = td3(**settings)
    theirs = PlainTD3(copy.deepcopy(mine.modules), **reference)
    batch, noise = transitions(7 * B), drawn(mine, 7, B)
    for i in range(7):
        rows = slice(i * B, (i + 1) * B)
        expected = theirs.update(part(batch, rows), noise["next_action"][i])
        found = mine.run(part(batch, rows), {k: v[i : i + 1] for k, v in noise.items()}, 1)
        assert expected.keys() | {"q"} == found.keys()
        for name, value in expected.items():
            torch.testing.assert_close(found[name][0], value.detach(), rtol=0, atol=1e-7, msg=f"{name} {i}")
        for name, ours in (("actor", "actor"), ("actor_target", "actor_target")):
            assert_like(getattr(theirs, name), [*mine.modules[ours].body, mine.modules[ours].out])
        for k in (0, 1):
            assert_like(theirs.critics[k], mine.modules["critic"].body, k)
            assert_like(theirs.targets[k], mine.modules["critic_target"].body, k)


def test_policy_and_targets_move_at_every_second_update_only():
    mine = td3()
    batch, noise = transitions(B), drawn(mine, 1, B)
    for update in range(1, 6):
        before = {k: mine.state[k].clone() for k in ("actor", "critic", "actor_target", "critic_target")}
        mine.run(batch, noise, 1)
        moved = {k for k, v in before.items() if not torch.equal(v, mine.state[k])}
        assert moved == ({"critic"} if update % 2 else before.keys())


def test_smoothing_noise_is_cut_at_its_bound_and_the_action_at_its_own():
    """What the slow critics are asked: target policy at tanh(bias), noise of some size."""
    mine = td3(**LOUD, learning_rate=0.0, tau=0.0)
    with torch.no_grad():
        mine.modules["actor_target"].out.weight.zero_()
    seen = []
    critic = mine.modules["critic_target"]
    critic.register_forward_hook(lambda module, inputs, output: seen.append(inputs[1]))
    for size, bias, expected in ((100.0, 0.0, 0.5), (-100.0, 0.0, -0.5), (100.0, 3.0, 1.0), (0.1, 0.0, 0.06)):
        with torch.no_grad():
            mine.modules["actor_target"].out.bias.fill_(bias)
        mine.run(transitions(B), {"next_action": torch.full((1, B, 2), size)}, 1)
        torch.testing.assert_close(seen[-1], torch.full((B, 2), expected))


def test_the_policy_climbs_the_first_critic_even_where_the_second_is_smaller():
    mine = td3(policy_delay=1, critic_learning_rate=0.0)
    other = td3(policy_delay=1, critic_learning_rate=0.0)
    with torch.no_grad():
        other.modules["critic"].body[-1].bias[1] -= 100.0
        other.modules["critic"].body[-1].weight[1] *= -2.0
    losses = [x.run(transitions(B), drawn(x, 1, B), 1)["actor_loss"].item() for x in (mine, other)]
    assert losses[0] == losses[1] and torch.equal(mine.state["actor"], other.state["actor"])


@pytest.mark.parametrize(
    "settings", [{"policy_delay": 0}, {"exploration_noise": -0.1}, {"target_noise": -1.0}, {"target_noise_clip": -1.0}]
)
def test_impossible_settings_are_refused(settings):
    (name,) = settings
    with pytest.raises(ValueError, match=name):
        learner("td3", **settings)
