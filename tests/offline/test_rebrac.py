"""ReBRAC against an implementation of its own, its limit TD3, what comes next in the data, and layer normalisation."""

import copy
import math

import gymnasium as gym
import numpy as np
import pytest
import torch
from helpers.agents import quiet
from helpers.off_policy import OBS, Double, adam, drawn, polyak, transitions
from helpers.offline import learner, plain_normed, recorded, squashed, tiny, trace, watch
from torch import nn

from ctrlrl import api
from ctrlrl.engine.learner import part
from ctrlrl.nets.actors import DeterministicActor, QNetworkConfig
from ctrlrl.nets.q_ensemble import QEnsemble
from ctrlrl.offline.rebrac import ReBRAC

GAMMA, TAU, RATE, B = 0.95, 0.1, 1e-2, 12


@pytest.fixture
def double():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def batches(n, seed=0):
    """Rows with what the data did next."""
    g = torch.Generator().manual_seed(seed + 100)
    return transitions(n, seed)._replace(extras={"next_action": torch.rand(n, 2, generator=g) * 2 - 1})


def rebrac(**settings):
    base = {"gamma": GAMMA, "tau": TAU, "learning_rate": RATE, "encoder": Double}
    return learner("rebrac", **base | settings)


class PlainReBRAC:
    """Tarasov et al. (2023) for actions in [-1, 1]."""

    def __init__(self, modules, actor_bc=0.01, critic_bc=0.01, delay=2, sigma=0.2, clip=0.5):
        self.actor_bc, self.critic_bc, self.delay, self.updates = actor_bc, critic_bc, delay, 0
        self.sigma, self.clip = sigma, clip
        self.actor, self.actor_target = squashed(modules["actor"]), squashed(modules["actor_target"])
        self.critics = [plain_normed(modules["critic"].body, i) for i in (0, 1)]
        self.targets = [plain_normed(modules["critic_target"].body, i) for i in (0, 1)]
        self.optimisers = [adam(self.actor, lr=RATE), adam(*self.critics, lr=RATE)]

    def update(self, batch, noise):
        obs, next_obs = batch.obs.double(), batch.next_obs.double()
        with torch.no_grad():
            shift = torch.from_numpy(np.clip(self.sigma * noise.numpy(), -self.clip, self.clip))
            action = torch.clip(self.actor_target(next_obs) + shift, -1, 1)
            both = torch.cat([q(torch.cat([next_obs, action], 1)) for q in self.targets], 1)
            penalty = torch.linalg.vector_norm(action - batch.extras["next_action"], dim=1) ** 2
            later = GAMMA * (both.min(1).values - self.critic_bc * penalty)
            wanted = torch.where(batch.terminated_t > 0.5, batch.reward_t, batch.reward_t + later)
        pairs = torch.cat([obs, batch.action], 1)
        found = {"critic_loss": sum(nn.functional.mse_loss(q(pairs)[:, 0], wanted) for q in self.critics)}
        self.step(self.optimisers[1], found["critic_loss"])
        self.updates += 1
        if self.updates % self.delay == 0:
            chosen = self.actor(obs)
            q = torch.cat([critic(torch.cat([obs, chosen], 1)) for critic in self.critics], 1).min(1).values
            found["bc_loss"] = (torch.linalg.vector_norm(chosen - batch.action, dim=1) ** 2).mean()
            found["actor_loss"] = self.actor_bc * found["bc_loss"] - q.mean() / q.abs().mean().item()
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


def assert_same_weights(expected, found):
    """``found`` (a plain copy of ours) has the weights of ``expected``."""
    for (name, a), (other, b) in zip(expected.named_parameters(), found.named_parameters(), strict=True):
        assert name == other
        torch.testing.assert_close(b, a, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    "settings,reference",
    [
        ({}, {}),
        (
            {"actor_bc_coef": 0.7, "critic_bc_coef": 1.3, "policy_delay": 1, "layer_norm": "both"},
            {"actor_bc": 0.7, "critic_bc": 1.3, "delay": 1},
        ),
        (
            {"target_noise": 0.6, "target_noise_clip": 0.3, "policy_delay": 3, "layer_norm": "none"},
            {"sigma": 0.6, "clip": 0.3, "delay": 3},
        ),
    ],
    ids=["default", "penalties, norms", "loud"],
)
def test_seven_updates_equal_an_independent_implementation(settings, reference, double):
    mine = rebrac(**settings)
    theirs = PlainReBRAC(copy.deepcopy(mine.modules), **reference)
    batch, noise = batches(7 * B), drawn(mine, 7, B)
    for i in range(7):
        rows = part(batch, slice(i * B, (i + 1) * B))
        expected = theirs.update(rows, noise["next_action"][i])
        found = mine.run(rows, {k: v[i : i + 1] for k, v in noise.items()}, 1)
        assert expected.keys() | {"q"} == found.keys()
        for name, value in expected.items():
            torch.testing.assert_close(found[name][0], value.detach(), rtol=0, atol=1e-6, msg=f"{name} {i}")
        for name in ("actor", "actor_target"):
            assert_same_weights(getattr(theirs, name), squashed(mine.modules[name]))
        for k in (0, 1):
            assert_same_weights(theirs.critics[k], plain_normed(mine.modules["critic"].body, k))
            assert_same_weights(theirs.targets[k], plain_normed(mine.modules["critic_target"].body, k))


def test_without_penalties_it_is_td3_with_the_values_brought_to_size_one(double):
    """TD3+BC with a huge alpha takes the same steps up to the scale of its loss, where one critic is the smaller."""
    mine = rebrac(actor_bc_coef=0.0, critic_bc_coef=0.0, layer_norm="none", policy_delay=1, adam_eps=1e-20)
    theirs = learner("td3_bc", Double, gamma=GAMMA, tau=TAU, learning_rate=RATE, normalize_obs=False,
                     policy_delay=1, alpha=1e8, adam_eps=1e-20)  # fmt: skip
    with torch.no_grad():  # the first critic is the smaller one everywhere, before and after the steps
        for name in ("critic", "critic_target"):
            mine.modules[name].body[-1].bias[1] += 100.0
    for name in mine.modules:
        theirs.state[name].copy_(mine.state[name])
    before = mine.state["actor"].clone()
    for i in range(5):
        rows, noise = batches(B, seed=i), drawn(mine, 1, B, seed=i)
        mine.run(rows, noise, 1)
        theirs.run(rows._replace(extras={}), noise, 1)
        for name in mine.modules:
            torch.testing.assert_close(mine.state[name], theirs.state[name], rtol=0, atol=1e-5, msg=name)
    assert (mine.state["actor"] - before).abs().median() > RATE


def test_the_policy_climbs_the_smaller_critic(double):
    """Where the second is smaller everywhere, the first is of no account; TD3 takes the first whatever it says."""
    mine = rebrac(policy_delay=1, critic_learning_rate=0.0)
    other = rebrac(policy_delay=1, critic_learning_rate=0.0)
    for each, factor in ((mine, 1.0), (other, -5.0)):
        with torch.no_grad():
            each.modules["critic"].body[-1].bias[0] += 100.0
            each.modules["critic"].body[-1].weight[0] *= factor
        each.run(batches(B), drawn(each, 1, B), 1)
    assert torch.equal(mine.state["actor"], other.state["actor"])


def test_the_penalty_is_of_no_account_where_the_episode_ended(double):
    a, b = rebrac(critic_bc_coef=2.0), rebrac(critic_bc_coef=2.0)
    batch, noise = batches(B), drawn(a, 1, B)
    ended = batch.terminated_t[:, None] > 0.5
    moved = {"next_action": torch.where(ended, 77.0, batch.extras["next_action"])}
    a.run(batch, noise, 1)
    b.run(batch._replace(extras=moved), noise, 1)
    assert torch.equal(a.state["critic"], b.state["critic"])
    c = rebrac(critic_bc_coef=2.0)
    c.run(batch._replace(extras={"next_action": batch.extras["next_action"] * ended}), noise, 1)
    assert not torch.equal(a.state["critic"], c.state["critic"])


# -- what the data did next -----------------------------------------------------------------------


def test_the_next_action_is_that_of_the_same_episode():
    """By hand: three episodes, the first ends, the second is cut with its next observation known, the third both."""
    like = recorded()
    data = like.take([0, 1, 3])
    (first, cut, both) = data.episodes
    method = ReBRAC()
    chosen = method.select(data)
    following = method.columns(chosen, 0.99)["next_action"]
    assert following.shape == (len(data), 1) and following.dtype == np.float32
    inner = [r for e in data for r in range(e.start, e.stop - 1)]
    np.testing.assert_array_equal(following[inner], data.actions[np.array(inner) + 1])
    np.testing.assert_array_equal(following[[e.stop - 1 for e in data]], 0.0)
    # of the three last rows those that ended are learned from
    expected = np.ones(len(data), bool)
    expected[cut.stop - 1] = False
    np.testing.assert_array_equal(chosen.usable, expected)
    assert data.usable[cut.stop - 1] and data.terminals[[first.stop - 1, both.stop - 1]].all()


def test_the_datas_own_action_is_left_as_it_was():
    data = recorded()
    before = data.actions.copy(), data.next_known.copy()
    method = ReBRAC()
    method.columns(method.select(data), 0.99)
    np.testing.assert_array_equal(before[0], data.actions)
    np.testing.assert_array_equal(before[1], data.next_known)


@pytest.mark.parametrize(
    "space",
    [gym.spaces.Box(np.float32([-0.1, -2.0]), np.float32([0.3, 7.0])), gym.spaces.Box(-3, 5, (2, 2), np.float64)],
    ids=["lopsided", "matrix"],
)
def test_batches_hold_the_next_action_in_the_units_of_the_action(space):
    data = recorded(action=space, env=None, episodes=24)
    agent = api.make("rebrac", dataset=data, **tiny("rebrac", batch_size=64))
    seen = watch(agent)
    quiet(agent, 6)
    low, high = (np.broadcast_to(b, data.actions.shape[1:]) for b in (space.low, space.high))
    unit = ((2 * (data.actions.astype(float) - low)) / (high - low) - 1).reshape(len(data), -1)
    for batch in seen:
        rows = trace(data, batch.obs)
        np.testing.assert_allclose(batch.action, unit[rows], atol=1e-6)
        goes_on = ~data.ends[rows]
        np.testing.assert_allclose(batch.extras["next_action"][goes_on], unit[rows[goes_on] + 1], atol=1e-6)
        assert batch.terminated_t[~torch.from_numpy(goes_on)].all()


def test_the_environments_bounds_say_what_an_action_means():
    """Pendulum takes torques in [-2, 2]; the data's own space is wider."""
    data = recorded(action=gym.spaces.Box(-4.0, 4.0, (1,)), env="Pendulum-v1")
    object.__setattr__(data, "actions", data.actions / 4)
    agent = quiet(api.make("rebrac", dataset=data, **tiny("rebrac")), 3)
    rows = agent.replay.sample(torch.arange(len(agent.replay)))
    index = trace(data, rows.obs)
    inner = ~data.ends[index]
    np.testing.assert_allclose(rows.action, data.actions[index] / 2, atol=1e-6)
    np.testing.assert_allclose(rows.extras["next_action"][inner], data.actions[index[inner] + 1] / 2, atol=1e-6)


# -- networks -------------------------------------------------------------------------------------


def test_normalisation_is_behind_the_activation_in_every_hidden_layer():
    config = QNetworkConfig(actor_hidden=(6, 5), critic_hidden=(7, 4), layer_norm="both", n_critics=3)
    g = torch.Generator().manual_seed(0)
    obs, action = torch.randn(9, 3, generator=g), torch.randn(9, 2, generator=g)
    critic = QEnsemble(OBS, 2, config)
    actor = DeterministicActor(OBS, gym.spaces.Box(-1, 1, (2,)), config)
    with torch.no_grad():
        for parameter in (*critic.parameters(), *actor.parameters()):
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=g))  # no two members, no two scales alike

    def normed(x, weight, bias):
        x = x.clamp(min=0.0)
        x = (x - x.mean(-1, keepdim=True)) / (x.var(-1, correction=0, keepdim=True) + 1e-6).sqrt()
        return x * weight + bias

    whole = critic(obs, action)
    for k in range(3):
        x = torch.cat([obs, action], 1)
        for layer, norm in ((critic.body[0], critic.body[2]), (critic.body[3], critic.body[5])):
            x = normed(x @ layer.weight[k] + layer.bias[k], norm.weight[k], norm.bias[k])
        last = critic.body[6]
        torch.testing.assert_close(whole[k], (x @ last.weight[k] + last.bias[k])[:, 0], rtol=1e-4, atol=1e-5)
    assert len(critic.body) == 7
    for count in (1, 2):
        torch.testing.assert_close(critic(obs, action, members=count), whole[:count])
    x = obs
    for layer, norm in ((actor.body[0], actor.body[2]), (actor.body[3], actor.body[5])):
        x = normed(x @ layer.weight.T + layer.bias, norm.weight, norm.bias)
    torch.testing.assert_close(actor(obs), torch.tanh(actor.out(x)), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("where,critic,actor", [("none", 0, 0), ("critic", 2, 0), ("both", 2, 2)])
def test_the_setting_says_which_networks_are_normalised(where, critic, actor):
    modules = learner("rebrac", layer_norm=where).modules
    counts = [sum("Norm" in type(m).__name__ for m in modules[k].modules()) for k in ("critic", "actor")]
    assert counts == [critic, actor]


def test_networks_start_flat_as_in_the_released_code():
    modules = learner("rebrac", actor_hidden=(64, 64), critic_hidden=(64, 64)).modules
    actor, critic = modules["actor"], modules["critic"]
    for layer in (actor.body[0], actor.body[2], critic.body[0], critic.body[3]):
        assert (layer.bias == 0.1).all()
        inputs = layer.weight.shape[1]
        assert 0.9 / math.sqrt(inputs) < layer.weight.abs().max() <= 1 / math.sqrt(inputs)
    for layer, bound in ((actor.out, 1e-3), (critic.body[-1], 3e-3)):
        assert 0.8 * bound < layer.weight.abs().max() <= bound and layer.bias.abs().max() <= bound
        assert layer.bias.abs().max() > 0
    for name in ("actor", "critic"):
        assert torch.equal(modules[name].state_dict()["body.0.weight"], modules[f"{name}_target"].body[0].weight)


def test_the_settings_are_those_of_the_released_code():
    config, own = api.get_method("rebrac").blueprint()
    assert (config.batch_size, config.learning_rate, config.gamma, config.tau) == (1024, 1e-3, 0.99, 0.005)
    assert config.network.actor_hidden == config.network.critic_hidden == (256, 256, 256)
    assert config.network.layer_norm == "critic" and not config.network.normalize_obs
    assert (own.policy_delay, own.target_noise, own.target_noise_clip) == (2, 0.2, 0.5)
    assert config.network.n_critics == 2 and config.critic_learning_rate is None


@pytest.mark.parametrize(
    "settings",
    [
        {"policy_delay": 0}, {"actor_bc_coef": -0.1}, {"critic_bc_coef": -0.1}, {"target_noise": -1.0},
        {"target_noise_clip": -1.0}, {"critic_bc_coef": float("nan")},
    ],
)  # fmt: skip
def test_impossible_settings_are_refused(settings):
    (name,) = settings
    with pytest.raises(ValueError, match=name):
        learner("rebrac", **settings)
