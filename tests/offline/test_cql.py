"""CQL: its penalty where it is known exactly, and its updates against an implementation of its own."""

import copy
import math

import gymnasium as gym
import numpy as np
import pytest
import torch
from helpers.off_policy import (
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

from ctrlrl.engine import algorithm as algorithms
from ctrlrl.engine.config import build
from ctrlrl.engine.learner import part
from ctrlrl.engine.offline_config import OfflineConfig
from ctrlrl.nets.actors import QNetworkConfig, SquashedGaussian
from ctrlrl.nets.q_ensemble import QEnsemble
from ctrlrl.offline.cql import several, soft_maximum

GAMMA, TAU, RATE, CRITIC_RATE, B = 0.95, 0.1, 1e-2, 3e-3, 12


@pytest.fixture
def double():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def run(mine, batch, noise):
    return {k: v.item() for k, v in mine.run(batch, noise, 1).items()}


# -- the penalty --------------------------------------------------------------------------------------


def value(a):
    """An action value over one dimension."""
    return np.sin(4 * a) + a**2 - 0.5 * a


def test_each_source_of_actions_and_all_together_estimate_the_log_integral_of_exp_q(double):
    """By quadrature over [-1, 1]: the correction by each source's own density is right."""
    grid = np.linspace(-1, 1, 20001)
    exact = math.log(np.trapezoid(np.exp(value(grid)), grid))
    g, n = torch.Generator().manual_seed(0), 60_000
    sources = []
    for mean, log_std in ((0.3, 0.0), (-0.7, 0.2)):
        policy = SquashedGaussian(torch.tensor([[mean]]), torch.tensor([[log_std]]))
        sources.append(several(policy, torch.randn(1, n, 1, generator=g)))
    sources.append((torch.rand(1, n, 1, generator=g) * 2 - 1, torch.full((1, n), -math.log(2.0))))
    for action, logp in [*sources, tuple(torch.cat(x, 1) for x in zip(*sources, strict=True))]:
        q = torch.from_numpy(value(action.numpy()))[None, :, :, 0]
        found = soft_maximum(q, logp).item() - math.log(logp.shape[1])
        assert found == pytest.approx(exact, abs=0.015)


def flat_critic(mine, weights, bias):
    """Critics of no hidden layer: w . action + bias, whatever the observation."""
    with torch.no_grad():
        layer = mine.modules["critic"].body[0]
        layer.weight.zero_()
        layer.weight[:, OBS.shape[0] :, 0] = torch.tensor(weights)
        layer.bias[:, 0, 0] = torch.tensor(bias)


def test_the_penalty_of_a_linear_critic_is_the_closed_form(double):
    """Over [-1, 1]^2 the integral of exp(w . a) is the product of 2 sinh(w_i) / w_i."""
    mine = learner("cql", Double, critic_hidden=(), cql_actions=20_000, learning_rate=0.0, cql_alpha=2.0)
    weights, batch = [[0.7, -1.3], [2.0, 0.4]], transitions(4)
    flat_critic(mine, weights, [3.0, -5.0])
    found = run(mine, batch, drawn(mine, 1, 4))
    expected = 0.0
    for w in weights:
        soft = math.log(3 * 20_000) + sum(math.log(2 * math.sinh(x) / x) for x in w)
        expected += (soft - (batch.action @ torch.tensor(w)).mean().item()) / 2
    assert found["cql_penalty"] == pytest.approx(expected, abs=0.01)


def on_policy(mine, shift=0.0):
    """One state; its actions are those that the policy draws, each row compared with all of them."""
    batch = transitions(B)
    obs = batch.obs[:1].expand(B, -1)
    noise = drawn(mine, 1, B)
    noise["here"] = (noise["action"] + shift).expand(B, -1, -1)[None].contiguous()
    action = torch.tanh(mine.modules["actor"](obs).pre_tanh(noise["action"][0]))
    return batch._replace(obs=obs, action=action.detach()), noise


def test_the_expectation_form_is_zero_and_has_no_gradient_where_the_policy_is_that_of_the_data(double):
    settings = {"penalty": "expectation", "cql_actions": B, "learning_rate": RATE}
    moments = []
    for alpha in (0.0, 7.0):
        mine = learner("cql", Double, cql_alpha=alpha, **settings)
        found = run(mine, *on_policy(mine))
        assert found["cql_penalty"] == pytest.approx(0.0, abs=1e-12)
        moments.append(mine.state["critic/m"].clone())
    torch.testing.assert_close(*moments, rtol=0, atol=1e-12)
    assert moments[0].abs().max() > 1e-3
    other = learner("cql", Double, cql_alpha=7.0, **settings)
    assert abs(run(other, *on_policy(other, shift=0.5))["cql_penalty"]) > 1e-3
    assert not torch.allclose(other.state["critic/m"], moments[0], atol=1e-4)


def test_the_soft_maximum_is_above_zero_even_there(double):
    mine = learner("cql", Double)
    batch, noise = on_policy(mine)
    assert run(mine, batch, drawn(mine, 1, B) | {"action": noise["action"]})["cql_penalty"] > 1.0


@pytest.mark.parametrize("gap,way", [(-100.0, 1), (100.0, -1)])
def test_the_factor_grows_where_the_penalty_is_above_its_aim_and_falls_below(gap, way, double):
    mine = learner("cql", Double, cql_gap=gap, critic_learning_rate=CRITIC_RATE)
    assert run(mine, transitions(B), drawn(mine, 1, B))["cql_factor"] == 1.0
    # Adam's first step
    assert mine.modules["cql_factor"]().item() == pytest.approx(way * CRITIC_RATE, rel=1e-4)


def test_the_penalty_pushes_values_of_other_actions_below_those_of_the_data():
    batch, gaps = transitions(B), []
    for alpha in (0.0, 10.0):
        mine = learner("cql", cql_alpha=alpha, learning_rate=RATE, critic_learning_rate=RATE)
        for seed in range(40):
            mine.run(batch, drawn(mine, 1, B, seed), 1)
        uniform = torch.rand(B, 50, 2, generator=torch.Generator().manual_seed(9)) * 2 - 1
        q = mine.modules["critic"]
        gaps.append((q(batch.obs, batch.action).mean() - q(batch.obs, uniform, many=True).mean()).item())
    assert gaps[1] > gaps[0] + 0.5


# -- many actions at once -----------------------------------------------------------------------------


@pytest.mark.parametrize("layer_norm", ["none", "critic"])
@pytest.mark.parametrize("batch,n", [(4, 3), (700, 5), (3000, 2)])
def test_many_actions_have_the_values_that_each_has_alone(batch, n, layer_norm):
    network = QNetworkConfig(critic_hidden=(8, 8), image_features=8, layer_norm=layer_norm)
    space = gym.spaces.Dict({"image": gym.spaces.Box(0, 255, (8, 8, 3), np.uint8), "vector": OBS})
    ensemble, actions = QEnsemble(space, 2, network), torch.randn(batch, n, 2)
    obs = {"image": torch.randint(0, 256, (batch, 8, 8, 3), dtype=torch.uint8), "vector": torch.randn(batch, 3)}
    found = ensemble(obs, actions, many=True)
    assert found.shape == (2, batch, n)
    for k in range(n):
        torch.testing.assert_close(found[:, :, k], ensemble(obs, actions[:, k]), rtol=1e-4, atol=1e-5)


# -- the whole update ---------------------------------------------------------------------------------


class PlainCQL:
    """CQL(H) with the released code's order, action by action and critic by critic."""

    def __init__(self, modules, alpha=10.0, gap=None, form="logsumexp", best=False, entropy=False, cloned=0):
        self.actor = PlainGaussian(modules["actor"])
        self.critics = [plain(modules["critic"].body, k) for k in (0, 1)]
        self.targets = [plain(modules["critic_target"].body, k) for k in (0, 1)]
        self.alpha, self.gap, self.form, self.best, self.entropy, self.cloned = alpha, gap, form, best, entropy, cloned
        self.log_temperature, self.log_factor = (torch.zeros((), requires_grad=True) for _ in range(2))
        self.done = 0
        self.steps = {
            "actor": adam(self.actor, lr=RATE), "critic": adam(*self.critics, lr=CRITIC_RATE),
            "temperature": adam(self.log_temperature, lr=RATE), "factor": adam(self.log_factor, lr=CRITIC_RATE),
        }  # fmt: skip

    def step(self, losses):
        """Gradients of all before any moves."""
        for optimiser in self.steps.values():
            optimiser.zero_grad()
        networks = {
            "actor": list(self.actor.parameters()), "critic": [p for q in self.critics for p in q.parameters()],
            "temperature": [self.log_temperature], "factor": [self.log_factor],
        }  # fmt: skip
        for name, loss in losses.items():
            for p, gradient in zip(networks[name], torch.autograd.grad(loss, networks[name]), strict=True):
                p.grad = gradient
        for name in losses:
            self.steps[name].step()

    def update(self, batch, noise):
        obs, following = batch.obs.double(), batch.next_obs.double()
        temperature, factor = self.log_temperature.exp().item(), self.log_factor.exp().item()
        goes_on = GAMMA * (batch.terminated_t == 0)

        def smallest(critics, state, action):
            return torch.minimum(*[q(torch.cat([state, action], 1))[:, 0] for q in critics])

        action, logp, _ = self.actor.sample(obs, noise["action"])
        good = smallest(self.critics, obs, action)
        if self.done < self.cloned:
            good = self.actor.log_density(obs, torch.atanh(batch.action)).sum(1)
        losses = {"actor": (temperature * logp.sum(1) - good).mean()}
        losses["temperature"] = -(self.log_temperature * (logp.detach().sum(1) - 2)).mean()

        with torch.no_grad():
            there, there_logp, _ = self.actor.sample(following, noise["next_action"])
            after = smallest(self.targets, following, there)
            if self.entropy:
                after = after - temperature * there_logp.sum(1)
            samples = [[], [], []]
            count = noise["here"].shape[1]
            for k in range(count):
                for place, state, name in ((0, obs, "here"), (1, following, "there")):
                    if name in noise:
                        drawn, density, _ = self.actor.sample(state, noise[name][:, k])
                        samples[place].append((drawn, density.sum(1)))
                if "random" in noise:
                    samples[2].append((noise["random"][:, k], math.log(0.25)))
            if self.best:
                after = torch.stack([smallest(self.targets, following, a) for a, _ in samples[1]]).max(0).values
            wanted = batch.reward_t + goes_on * after

        td, penalties = 0.0, []
        for critic in self.critics:
            q = critic(torch.cat([obs, batch.action], 1))[:, 0]
            td = td + ((q - wanted) ** 2).mean()
            if self.form == "expectation":
                over = sum(critic(torch.cat([obs, a], 1))[:, 0] for a, _ in samples[0]) / count
            else:
                every = [*samples[0], *samples[1], *samples[2]]
                densities = [torch.as_tensor(d).exp() for _, d in every]
                terms = [critic(torch.cat([obs, a], 1))[:, 0].exp() for a, _ in every]
                over = torch.log(sum(x / d for x, d in zip(terms, densities, strict=True)))
            penalties.append((over - q).mean())
        penalty = sum(penalties) / 2
        if self.gap is not None:
            losses["factor"] = -self.log_factor.exp() * self.alpha * (penalty.detach() - self.gap)
        losses["critic"] = td + self.alpha * factor * sum(penalties)
        self.step(losses)
        self.done += 1
        for target, critic in zip(self.targets, self.critics, strict=True):
            polyak(target, critic, TAU)
        found = {"critic_loss": td, "cql_penalty": penalty, "actor_loss": losses["actor"]}
        found |= {"ent_coef_loss": losses["temperature"], "ent_coef": torch.tensor(temperature)}
        if self.gap is not None:
            found |= {"cql_factor_loss": losses["factor"], "cql_factor": torch.tensor(factor)}
        return found | {"entropy": -logp.sum(1).mean()}


@pytest.mark.parametrize(
    "settings,reference",
    [
        ({}, {}),
        ({"cql_gap": 1.0, "cql_alpha": 2.0, "backup_entropy": True}, {"gap": 1.0, "alpha": 2.0, "entropy": True}),
        ({"penalty": "expectation", "max_backup": True}, {"form": "expectation", "best": True}),
        ({"max_backup": True}, {"best": True}),
        ({"bc_steps": 2}, {"cloned": 2}),
    ],
    ids=["default", "lagrange and entropy", "expectation and best", "best", "cloning at first"],
)
def test_three_updates_equal_an_independent_implementation(settings, reference, double):
    rates = {"learning_rate": RATE, "critic_learning_rate": CRITIC_RATE}
    mine = learner("cql", Double, gamma=GAMMA, tau=TAU, cql_actions=3, **rates, **settings)
    theirs = PlainCQL(copy.deepcopy(mine.modules), **reference)
    batch, noise = transitions(3 * B), drawn(mine, 3, B)
    for i in range(3):
        rows = part(batch, slice(i * B, (i + 1) * B))
        found = mine.run(rows, {k: v[i : i + 1] for k, v in noise.items()}, 1)
        expected = theirs.update(rows, {k: v[i] for k, v in noise.items()})
        assert found.keys() == expected.keys() | {"q"}
        for name, wanted in expected.items():
            torch.testing.assert_close(found[name][0], wanted.detach(), rtol=0, atol=1e-7, msg=f"{name} {i}")
    actor = mine.modules["actor"]
    assert_like(theirs.actor, [*actor.body, actor.mean, actor.log_std])
    for k in (0, 1):
        assert_like(theirs.critics[k], mine.modules["critic"].body, k)
        assert_like(theirs.targets[k], mine.modules["critic_target"].body, k)
    assert mine.modules["temperature"]().item() == pytest.approx(theirs.log_temperature.item(), abs=1e-7)
    if theirs.gap is not None:
        assert mine.modules["cql_factor"]().item() == pytest.approx(theirs.log_factor.item(), abs=1e-7)


def test_actions_at_the_bounds_can_be_cloned():
    mine = learner("cql", bc_steps=5)
    batch = transitions(B)
    found = run(mine, batch._replace(action=batch.action.sign()), drawn(mine, 1, B))
    assert all(map(math.isfinite, found.values()))
    assert mine.state["actor"].isfinite().all()


# -- settings -----------------------------------------------------------------------------------------


def test_defaults_are_those_published_for_locomotion():
    config, method = build(algorithms.get("cql"), {}, loop=OfflineConfig)
    assert (config.learning_rate, config.critic_learning_rate) == (3e-5, 3e-4)
    assert config.network.normalize_obs and config.network.critic_hidden == (256, 256, 256)
    assert (method.cql_alpha, method.cql_actions, method.cql_gap, method.bc_steps) == (10.0, 10, None, 0)
    # the multiplier learns as the critics do, the temperature as the policy
    rates = {name: method.learning_rate(name, config) for name in ("actor", "temperature", "critic", "cql_factor")}
    assert rates == {"actor": 3e-5, "temperature": 3e-5, "critic": 3e-4, "cql_factor": 3e-4}


@pytest.mark.parametrize(
    "settings",
    [
        {"cql_alpha": -1.0},
        {"cql_gap": math.inf},
        {"cql_actions": 0},
        {"bc_steps": -1},
        {"penalty": "rho"},
        {"max_backup": True, "backup_entropy": True},
        {"entropy_temp": -1.0},
    ],
)
def test_impossible_settings_are_refused(settings):
    with pytest.raises(ValueError, match=next(iter(settings))):
        learner("cql", **settings)
