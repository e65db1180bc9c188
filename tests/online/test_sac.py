"""SAC against an implementation of its own with torch's optimiser and distributions, and against Stable-Baselines3."""

import copy

import gymnasium as gym
import pytest
import torch
from helpers.off_policy import (
    ACTIONS,
    OBS,
    Double,
    PlainGaussian,
    adam,
    assert_like,
    drawn,
    learner,
    plain,
    polyak,
    transitions,
)  # fmt: skip

from ctrlrl.engine.learner import part

GAMMA, TAU, RATE, B = 0.95, 0.1, 1e-2, 12


@pytest.fixture
def double():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def train(count=3, **settings):
    """The learner before and after ``count`` updates, what it logged, and what it learnt from."""
    settings = {"gamma": GAMMA, "tau": TAU, "learning_rate": RATE} | settings
    mine = learner("sac", Double, **settings)
    before = copy.deepcopy(mine.modules)
    batch, noise = transitions(count * B), drawn(mine, count, B)
    found = [
        mine.run(part(batch, slice(i * B, (i + 1) * B)), {k: v[i : i + 1] for k, v in noise.items()}, 1)
        for i in range(count)
    ]
    return mine, before, found, batch, noise


class PlainSAC:
    """Haarnoja et al. (2018b) with the minimum of two critics, row by row where that is clearer."""

    def __init__(self, modules, alpha=None, target_entropy=-2.0, critic_rate=RATE):
        self.actor = PlainGaussian(modules["actor"])
        self.critics = [plain(modules["critic"].body, i) for i in (0, 1)]
        self.targets = [plain(modules["critic_target"].body, i) for i in (0, 1)]
        self.fixed, self.target_entropy = alpha, target_entropy
        self.log_alpha = torch.zeros((), requires_grad=True)
        self.optimisers = [adam(self.actor, lr=RATE), adam(*self.critics, lr=critic_rate)]
        self.temperature = adam(self.log_alpha, lr=RATE)

    def update(self, batch, action_noise, next_noise):
        alpha = self.log_alpha.exp().item() if self.fixed is None else self.fixed
        obs, next_obs = batch.obs.double(), batch.next_obs.double()
        with torch.no_grad():
            action, logp, _ = self.actor.sample(next_obs, next_noise)
            values = [q(torch.cat([next_obs, action], 1))[:, 0] for q in self.targets]
            wanted = []
            for i, reward in enumerate(batch.reward_t):
                soft = min(values[0][i], values[1][i]) - alpha * logp[i].sum()
                wanted.append(reward if batch.terminated_t[i] else reward + GAMMA * soft)
            wanted = torch.stack(wanted)
        pairs = torch.cat([obs, batch.action], 1)
        critic_loss = sum(0.5 * torch.nn.functional.mse_loss(q(pairs)[:, 0], wanted) for q in self.critics)
        self.step(self.optimisers[1], critic_loss)
        action, logp, _ = self.actor.sample(obs, action_noise)
        q = torch.minimum(*[q(torch.cat([obs, action], 1))[:, 0] for q in self.critics])
        actor_loss = (alpha * logp.sum(1) - q).mean()
        self.step(self.optimisers[0], actor_loss)
        found = {"critic_loss": critic_loss, "actor_loss": actor_loss, "entropy": -logp.sum(1).mean()}
        if self.fixed is None:
            found["ent_coef_loss"] = -(self.log_alpha * (logp.detach().sum(1) + self.target_entropy)).mean()
            self.step(self.temperature, found["ent_coef_loss"])
        for target, critic in zip(self.targets, self.critics, strict=True):
            polyak(target, critic, TAU)
        return found | {"ent_coef": torch.tensor(alpha)}

    @staticmethod
    def step(optimiser, loss):
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()


@pytest.mark.parametrize(
    "settings,reference",
    [
        ({}, {}),
        ({"target_entropy": -0.7, "critic_learning_rate": 3e-3}, {"target_entropy": -0.7, "critic_rate": 3e-3}),
        ({"entropy_temp": 0.3}, {"alpha": 0.3}),
    ],
    ids=["learned", "own target and rates", "fixed"],
)
def test_three_updates_equal_an_independent_implementation(settings, reference, double):
    mine, before, found, batch, noise = train(3, **settings)
    theirs = PlainSAC(before, **reference)
    for i in range(3):
        expected = theirs.update(part(batch, slice(i * B, (i + 1) * B)), noise["action"][i], noise["next_action"][i])
        for name, value in expected.items():
            torch.testing.assert_close(found[i][name][0], value.detach(), rtol=0, atol=1e-7, msg=f"{name} {i}")
        assert expected.keys() | {"q"} == found[i].keys()
    actor = mine.modules["actor"]
    assert_like(theirs.actor, [*actor.body, actor.mean, actor.log_std])
    for k in (0, 1):
        assert_like(theirs.critics[k], mine.modules["critic"].body, k)
        assert_like(theirs.targets[k], mine.modules["critic_target"].body, k)
    if "entropy_temp" not in settings:
        assert mine.modules["temperature"]().item() == pytest.approx(theirs.log_alpha.item(), abs=1e-7)
        assert abs(theirs.log_alpha.item()) > 5e-3


# -- the pieces, one by one -----------------------------------------------------------------------


def constant(module, value):
    """Make a network's output ``value`` (by member), whatever its input."""
    with torch.no_grad():
        module.body[-1].weight.zero_()
        module.body[-1].bias.copy_(torch.as_tensor(value).view(-1, 1, 1))


def test_termination_drops_the_bootstrap_and_truncation_keeps_it(double):
    """Critics at 0, target critics at 5 and 3: the target is r where the episode ended and r + gamma 3 elsewhere.

    A truncated row is one with terminated = 0 and its true final observation, like any other that goes on.
    """
    mine = learner("sac", Double, gamma=0.9, entropy_temp=0.0, learning_rate=0.0, critic_learning_rate=0.0)
    constant(mine.modules["critic"], [0.0, 0.0])
    constant(mine.modules["critic_target"], [5.0, 3.0])
    batch = transitions(2)._replace(reward_t=torch.tensor([1.0, 1.0]), terminated_t=torch.tensor([0.0, 1.0]))
    found = mine.run(batch, drawn(mine, 1, 2), 1)
    # two critics, half the mean of (3.7^2, 1^2) each
    assert found["critic_loss"].item() == pytest.approx((3.7**2 + 1.0) / 2, abs=1e-7)


def test_the_entropy_belongs_to_the_target_only_where_the_episode_goes_on(double):
    batch = transitions(2)._replace(reward_t=torch.zeros(2), terminated_t=torch.ones(2))
    for alpha in (0.0, 7.0):
        mine = learner("sac", Double, entropy_temp=alpha, learning_rate=0.0, critic_learning_rate=0.0)
        constant(mine.modules["critic"], [0.0, 0.0])
        assert mine.run(batch, drawn(mine, 1, 2), 1)["critic_loss"].item() == 0.0


def test_target_critics_lag_behind_by_tau(double):
    mine, before, *_ = train(1)
    for name, start in before["critic_target"].named_parameters():
        target, critic = (dict(mine.modules[k].named_parameters())[name] for k in ("critic_target", "critic"))
        assert not torch.equal(critic, start)
        torch.testing.assert_close(target, (1 - TAU) * start + TAU * critic, rtol=0, atol=1e-12)


def test_the_actors_loss_does_not_move_the_critic_nor_the_critics_the_actor(double):
    """With one of the two learning rates at zero, that network stays; the other is as with both."""
    both, before, *_ = train(1, entropy_temp=0.1)
    only_actor, *_ = train(1, entropy_temp=0.1, critic_learning_rate=0.0)
    assert torch.equal(only_actor.state["critic"], torch.cat([p.flatten() for p in before["critic"].parameters()]))
    only_critic, *_ = train(1, entropy_temp=0.1, learning_rate=0.0, critic_learning_rate=RATE)
    assert torch.equal(only_critic.state["critic"], both.state["critic"])
    # Adam's first moment is a tenth of the gradient: the critic's is that of its own loss alone
    assert torch.equal(only_critic.state["critic/m"], both.state["critic/m"])
    assert torch.equal(only_actor.state["critic/m"], both.state["critic/m"])


def test_the_coefficient_grows_where_the_entropy_is_below_the_target(double):
    low, *_ = train(1, target_entropy=50.0)
    high, *_ = train(1, target_entropy=-50.0)
    assert low.modules["temperature"]().item() == pytest.approx(RATE, rel=1e-4)
    assert high.modules["temperature"]().item() == pytest.approx(-RATE, rel=1e-4)


@pytest.mark.parametrize(
    "settings,message",
    [({"entropy_temp": -0.1}, "entropy_temp=-0.1"), ({"entropy_temp_init": 0.0}, "entropy_temp_init=0.0")],
)
def test_impossible_coefficients_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        learner("sac", **settings)


# -- Stable-Baselines3 ----------------------------------------------------------------------------


class Spaces(gym.Env):
    observation_space, action_space = OBS, ACTIONS


def test_losses_equal_those_of_stable_baselines3(monkeypatch):
    """Same weights, batch and noise, three gradient steps. SB3 adds 1e-6 within the logarithm of the squashing."""
    sb3 = pytest.importorskip("stable_baselines3")
    from stable_baselines3.common.distributions import DiagGaussianDistribution
    from stable_baselines3.common.logger import Logger
    from stable_baselines3.common.type_aliases import ReplayBufferSamples

    mine = learner("sac", actor_hidden=(16, 16), critic_hidden=(16, 16), gamma=GAMMA, tau=TAU, learning_rate=1e-3)
    theirs = sb3.SAC(
        "MlpPolicy", Spaces(), learning_rate=1e-3, gamma=GAMMA, tau=TAU, policy_kwargs={"net_arch": [16, 16]},
        device="cpu", ent_coef="auto", batch_size=B,
    )  # fmt: skip
    batch, noise = transitions(3 * B), drawn(mine, 3, B)
    actor = mine.modules["actor"]
    body = PlainGaussian(actor)
    theirs.actor.latent_pi.load_state_dict(body.body.state_dict())
    theirs.actor.mu.load_state_dict(body.mean.state_dict())
    theirs.actor.log_std.load_state_dict(body.log_std.state_dict())
    for critic in (theirs.critic, theirs.critic_target):
        for k, network in enumerate(critic.q_networks):
            network.load_state_dict(plain(mine.modules["critic"].body, k).state_dict())

    parts = [part(batch, slice(i * B, (i + 1) * B)) for i in range(3)]
    column = lambda x: x.unsqueeze(1)  # noqa: E731
    samples = iter(
        ReplayBufferSamples(b.obs, b.action, b.next_obs, column(b.terminated_t), column(b.reward_t)) for b in parts
    )
    monkeypatch.setattr(theirs.replay_buffer, "sample", lambda *_, **__: next(samples))
    # the policy's action comes first, the next one's second
    order = iter([noise[k][i] for i in range(3) for k in ("action", "next_action")])

    def rsample(self):
        return self.distribution.mean + self.distribution.stddev * next(order)

    monkeypatch.setattr(DiagGaussianDistribution, "sample", rsample)
    logged = {}
    theirs.set_logger(Logger(None, []))
    monkeypatch.setattr(theirs.logger, "record", lambda key, value, **_: logged.__setitem__(key, value))
    for i, b in enumerate(parts):
        theirs.train(gradient_steps=1, batch_size=B)
        found = mine.run(b, {k: v[i : i + 1] for k, v in noise.items()}, 1)
        for name in ("critic_loss", "actor_loss", "ent_coef_loss", "ent_coef"):
            assert found[name].item() == pytest.approx(logged[f"train/{name}"], rel=2e-4, abs=2e-5), (name, i)
    assert mine.modules["temperature"]().item() == pytest.approx(theirs.log_ent_coef.item(), abs=1e-6)
    assert_like(theirs.critic.q_networks[1], mine.modules["critic"].body, 1, tolerance=1e-4)
