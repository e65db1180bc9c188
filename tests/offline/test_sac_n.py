"""SAC-N against an implementation of its own, critic by critic."""

import copy

import pytest
import torch
from helpers.off_policy import Double, PlainGaussian, adam, assert_like, drawn, learner, plain, polyak, transitions

from ctrlrl.engine import algorithm as algorithms
from ctrlrl.engine.config import build
from ctrlrl.engine.learner import part
from ctrlrl.engine.offline_config import OfflineConfig

GAMMA, TAU, RATE, CRITIC_RATE, B, N = 0.95, 0.1, 1e-2, 3e-3, 12, 4


@pytest.fixture
def double():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


class PlainSACN:
    """Soft actor-critic on the smallest of all critics; all steps are from the networks before the update."""

    def __init__(self, modules, temperature=None):
        self.actor = PlainGaussian(modules["actor"])
        self.critics = [plain(modules["critic"].body, k) for k in range(N)]
        self.targets = [plain(modules["critic_target"].body, k) for k in range(N)]
        self.fixed, self.log_temperature = temperature, torch.zeros((), requires_grad=True)
        self.of_actor, self.of_critics = adam(self.actor, lr=RATE), adam(*self.critics, lr=CRITIC_RATE)
        self.of_temperature = adam(self.log_temperature, lr=RATE)

    def update(self, batch, action_noise, next_noise):
        obs, following = batch.obs.double(), batch.next_obs.double()
        alpha = self.log_temperature.exp().item() if self.fixed is None else self.fixed
        action, logp, _ = self.actor.sample(obs, action_noise)
        values = torch.stack([q(torch.cat([obs, action], 1))[:, 0] for q in self.critics])
        actor_loss = (alpha * logp.sum(1) - values.min(0).values).mean()
        with torch.no_grad():
            there, there_logp, _ = self.actor.sample(following, next_noise)
            after = torch.stack([q(torch.cat([following, there], 1))[:, 0] for q in self.targets]).min(0).values
            goes_on = GAMMA * (batch.terminated_t == 0)
            wanted = batch.reward_t + goes_on * (after - alpha * there_logp.sum(1))
        pairs = torch.cat([obs, batch.action], 1)
        q = torch.stack([critic(pairs)[:, 0] for critic in self.critics])
        critic_loss = sum(((row - wanted) ** 2).mean() for row in q)
        found = {"actor_loss": actor_loss, "critic_loss": critic_loss, "ent_coef": torch.tensor(alpha)}
        gradients = torch.autograd.grad(actor_loss, list(self.actor.parameters()))
        self.of_critics.zero_grad()
        critic_loss.backward()
        self.of_critics.step()
        for p, gradient in zip(self.actor.parameters(), gradients, strict=True):
            p.grad = gradient
        self.of_actor.step()
        if self.fixed is None:
            self.of_temperature.zero_grad()
            found["ent_coef_loss"] = -(self.log_temperature * (logp.detach().sum(1) - 2)).mean()
            found["ent_coef_loss"].backward()
            self.of_temperature.step()
        for target, critic in zip(self.targets, self.critics, strict=True):
            polyak(target, critic, TAU)
        return found | {
            "entropy": -logp.sum(1).mean(), "q": q.mean(), "q_spread": q.var(0, correction=0).sqrt().mean()
        }  # fmt: skip


@pytest.mark.parametrize("temperature", [None, 0.3])
def test_three_updates_equal_an_independent_implementation(temperature, double):
    rates = {"learning_rate": RATE, "critic_learning_rate": CRITIC_RATE}
    mine = learner("sac_n", Double, gamma=GAMMA, tau=TAU, n_critics=N, entropy_temp=temperature, **rates)
    theirs = PlainSACN(copy.deepcopy(mine.modules), temperature)
    batch, noise = transitions(3 * B), drawn(mine, 3, B)
    for i in range(3):
        rows = part(batch, slice(i * B, (i + 1) * B))
        found = mine.run(rows, {k: v[i : i + 1] for k, v in noise.items()}, 1)
        expected = theirs.update(rows, noise["action"][i], noise["next_action"][i])
        assert found.keys() == expected.keys()
        for name, wanted in expected.items():
            torch.testing.assert_close(found[name][0], wanted.detach(), rtol=0, atol=1e-7, msg=f"{name} {i}")
    actor = mine.modules["actor"]
    assert_like(theirs.actor, [*actor.body, actor.mean, actor.log_std])
    for k in range(N):
        assert_like(theirs.critics[k], mine.modules["critic"].body, k)
        assert_like(theirs.targets[k], mine.modules["critic_target"].body, k)
    if temperature is None:
        assert mine.modules["temperature"]().item() == pytest.approx(theirs.log_temperature.item(), abs=1e-7)


def test_the_target_is_the_smallest_of_all_critics_and_nothing_after_an_end(double):
    """Critics at 0, targets at 5, 3, 4, 1: half a batch ends with reward 1, the other goes on to 1 + 0.9 x 1."""
    mine = learner("sac_n", Double, gamma=0.9, entropy_temp=0.0, n_critics=N, learning_rate=0.0)
    for name, levels in (("critic", [0.0] * N), ("critic_target", [5.0, 3.0, 4.0, 1.0])):
        with torch.no_grad():
            mine.modules[name].body[-1].weight.zero_()
            mine.modules[name].body[-1].bias.copy_(torch.tensor(levels).view(-1, 1, 1))
    batch = transitions(2)._replace(reward_t=torch.tensor([1.0, 1.0]), terminated_t=torch.tensor([0.0, 1.0]))
    found = mine.run(batch, drawn(mine, 1, 2), 1)
    assert found["critic_loss"].item() == pytest.approx(N * (1.9**2 + 1.0) / 2, abs=1e-9)


def test_networks_start_nearly_constant_as_in_the_released_code():
    mine = learner("sac_n", n_critics=N)
    actor, critic = mine.modules["actor"], mine.modules["critic"]
    for layer in (actor.body[0], actor.body[2], critic.body[0], critic.body[2]):
        assert layer.bias.eq(0.1).all() and layer.weight.abs().max() > 0.1
    for layer, bound in ((actor.mean, 1e-3), (actor.log_std, 1e-3), (critic.body[-1], 3e-3)):
        for parameter in layer.parameters():
            assert 0 < parameter.abs().max() <= bound
    assert torch.equal(mine.modules["critic_target"].body[-1].weight, critic.body[-1].weight)
    assert not torch.equal(critic.body[-1].weight[0], critic.body[-1].weight[1])


def test_deviations_lie_in_the_published_bounds():
    mine = learner("sac_n")
    actor = mine.modules["actor"]
    for level, bound in ((-50.0, -5.0), (50.0, 2.0)):
        with torch.no_grad():
            actor.log_std.bias.fill_(level)
        assert actor(torch.zeros(1, 3)).log_std.tolist() == [[bound, bound]]


def test_defaults_are_the_published_ones():
    config, _ = build(algorithms.get("sac_n"), {}, loop=OfflineConfig)
    assert (config.learning_rate, config.batch_size, config.tau) == (3e-4, 256, 0.005)
    assert config.network.n_critics == 10 and config.network.critic_hidden == (256, 256, 256)


def test_one_critic_is_allowed():
    mine = learner("sac_n", n_critics=1)
    assert all(v.isfinite().all() for v in mine.run(transitions(B), drawn(mine, 1, B), 1).values())
