"""Off-policy evaluation of policies on data: densities, intervals, what is refused, and what is said of a number."""

import dataclasses
import math

import gymnasium as gym
import numpy as np
import pytest
import torch
from helpers.agents import make as make_ppo
from helpers.envs import env_id
from helpers.off_policy import make

from ctrlrl.core.off_policy_estimate import Estimate as CoreEstimate
from ctrlrl.data.dataset import Dataset, DatasetInfo
from ctrlrl.engine import bootstrap
from ctrlrl.engine import off_policy_evaluation as module
from ctrlrl.engine.bootstrap import Bounds
from ctrlrl.engine.fitted_q import FittedQConfig
from ctrlrl.engine.off_policy_evaluation import METHODS, estimate
from ctrlrl.engine.policy_density import (
    AgentPolicy,
    Density,
    NoDensityError,
    clipped_density,
    density_of,
    squashed_density,
)
from ctrlrl.engine.roll_out import roll_out
from ctrlrl.nets.actors import GaussianActor, QNetworkConfig, SquashedGaussian
from ctrlrl.nets.heads import DiagonalGaussian
from ctrlrl.types import EnvSpec

LINE = gym.spaces.Box(-np.inf, np.inf, (1,), np.float32)
ONE = gym.spaces.Box(-1.0, 1.0, (1,), np.float32)
WEIGHTED = ("is", "pdis", "wis", "pdwis")
QUICK = FittedQConfig(updates=20, batch_size=16, resamples=2)
F64 = torch.float64


class Chooser:
    """Takes action 1 with probability ``p``, whatever it sees."""

    stochastic, device = True, torch.device("cpu")

    def __init__(self, p):
        self.p = p

    def check(self, dataset):
        pass

    def act(self, obs, generator):
        return (torch.rand(len(obs), generator=generator) < self.p).long()

    def log_prob(self, obs, action):
        return torch.where(action == 1, self.p, 1.0 - self.p).double().log()


def episodes(lengths, actions, rewards, cut=(), log_probs=None, known=None, obs=None):
    """A dataset with Discrete actions; episodes in ``cut`` time out, the others terminate."""
    n = sum(lengths)
    last = np.zeros(n, bool)
    last[np.cumsum(lengths) - 1] = True
    number = np.repeat(np.arange(len(lengths)), lengths)
    timeout = last & np.isin(number, cut)
    obs = np.arange(n, dtype=np.float32)[:, None] if obs is None else obs
    return Dataset(
        obs, np.asarray(actions), np.asarray(rewards, np.float32), last & ~timeout, timeout, obs + np.float32(0.5),
        np.ones(n, bool) if known is None else np.asarray(known), LINE, gym.spaces.Discrete(2), DatasetInfo("made"),
        infos={} if log_probs is None else {"action_log_probs": np.asarray(log_probs)},
    )  # fmt: skip


def bandit(n, p, seed):
    """One-step episodes of a policy that takes action 1 with probability ``p``; it pays 1 more, with noise."""
    rng = np.random.default_rng(seed)
    action = (rng.random(n) < p).astype(np.int64)
    return episodes([1] * n, action, action + rng.normal(size=n), log_probs=np.log(np.where(action == 1, p, 1 - p)))


# -- estimates ----------------------------------------------------------------------------------------


def test_two_episodes_by_hand():
    # ratios with p = 0.8 against 0.5: 1.6 for action 1, 0.4 for action 0
    data = episodes([2, 1], [1, 0, 1], [1.0, 2.0, 10.0], log_probs=np.log([0.5, 0.5, 0.5]))
    found = estimate(Chooser(0.8), data, gamma=0.5, methods=WEIGHTED)
    a, b = 1.6 * 0.4, 1.6
    assert found["is"].value == pytest.approx((a * 2.0 + b * 10.0) / 2, rel=1e-6)
    assert found["wis"].value == pytest.approx((a * 2.0 + b * 10.0) / (a + b), rel=1e-6)
    assert found["pdis"].value == pytest.approx((1.6 * 1 + a * 0.5 * 2 + 1.6 * 10) / 2, rel=1e-6)
    assert found["pdwis"].value == pytest.approx(11 / 2 + 0.5 * 2.0 * a / (a + b), rel=1e-6)
    size = (a + b) ** 2 / (a * a + b * b)
    assert found["is"].effective_sample_size == pytest.approx(size, rel=1e-6)
    # first step: two equal weights; then the products, at half the weight
    assert found["pdis"].effective_sample_size == pytest.approx((2.0 + 0.5 * size) / 1.5, rel=1e-6)
    assert list(found) == list(WEIGHTED) and all(one.n_episodes == 2 for one in found.values())


def test_a_horizon_cuts_episodes_there():
    data = episodes([3, 1], [1, 1, 1, 1], [1.0, 2.0, 100.0, 4.0], log_probs=np.log([0.5] * 4))
    found = estimate(Chooser(0.8), data, gamma=1.0, horizon=2, methods=("is", "pdis"))
    assert found["is"].value == pytest.approx((1.6**2 * 3 + 1.6 * 4) / 2, rel=1e-6)
    assert found["pdis"].value == pytest.approx((1.6 * 1 + 1.6**2 * 2 + 1.6 * 4) / 2, rel=1e-6)
    assert "return, first 2 steps" in found["is"].note


class Model:
    """Stands for fitted values: Q = obs + 10 action + 100 time, V = obs + 100 time."""

    def __init__(self, gamma, horizon):
        self.gamma, self.horizon = gamma, horizon
        self.initial, self.by_episode, self.unusable = np.array([3.0, 2.0, 4.0]), np.zeros(1), 7
        self.converged = False

    def q(self, obs, action, time, members=1):
        return (obs[:, 0] + 10.0 * action + 100.0 * time)[None]

    def value(self, obs, time, generator, samples, members=1):
        return (obs[:, 0] + 100.0 * time)[None]


@pytest.mark.parametrize("horizon", [None, 2])
def test_doubly_robust_meets_the_model_at_the_right_steps(monkeypatch, horizon):
    gamma, p = 0.5, 0.8
    lengths, cut = [3, 1, 2, 2], [1, 2, 3]
    action = np.array([1, 0, 1, 1, 0, 1, 1, 1])
    reward = np.array([1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0])
    known = np.array([1, 1, 1, 1, 1, 1, 1, 0], bool)  # nothing is known of what follows the last episode
    data = episodes(lengths, action, reward, cut, np.log(np.full(8, 0.5)), known)
    monkeypatch.setattr(module, "fitted_q", lambda *a, gamma, horizon, **k: Model(gamma, horizon))
    found = estimate(Chooser(p), data, gamma=gamma, horizon=horizon, methods=("dr",))["dr"]
    parts = []
    for start, length, ended in zip([0, 3, 4, 6], lengths, [True, False, False, False], strict=True):
        total, weight = float(start), 1.0  # V at the first step is the row's number
        for t in range(min(length, horizon or length)):
            row = start + t
            weight *= (p if action[row] else 1 - p) / 0.5
            if t + 1 == horizon or (ended and t + 1 == length):
                following = 0.0
            elif t + 1 < length:
                following = row + 1 + 100.0 * (t + 1)
            elif known[row]:
                following = row + 0.5 + 100.0 * (t + 1)
            else:
                continue
            surprise = reward[row] + gamma * following - (row + 10.0 * action[row] + 100.0 * t)
            total += gamma**t * weight * surprise
        parts.append(total)
    assert found.value == pytest.approx(np.mean(parts), rel=1e-6)


def test_fitted_q_has_students_interval_of_its_resampled_fits(monkeypatch):
    monkeypatch.setattr(module, "fitted_q", lambda *a, gamma, horizon, **k: Model(gamma, horizon))
    found = estimate(Chooser(0.5), bandit(5, 0.5, 0), methods=("fqe",))["fqe"]
    # resampled values 2 and 4: deviation sqrt 2, and t(0.975; 1) = 12.706
    assert found.value == 3.0
    assert found.high - 3.0 == pytest.approx(12.7062 * 2**0.5, rel=1e-4)
    assert found.low + found.high == pytest.approx(6.0)
    assert found.effective_sample_size is None and "2 fits" in found.note
    assert "not converged" in found.note and "7 steps without a known next observation" in found.note


@pytest.mark.parametrize(("method", "student"), [("is", False), ("is", True), ("wis", False)])
def test_intervals_cover_the_value_about_as_often_as_they_say(method, student):
    covered = 0
    for seed in range(150):
        found = estimate(
            Chooser(0.7), bandit(60, 0.5, seed), methods=(method,), confidence=0.9, replications=200, seed=seed
        )[method]
        low, high = found.student if student else (found.low, found.high)
        covered += low <= 0.7 <= high
    assert 0.82 <= covered / 150 <= 0.97


def test_the_bootstrap_shifts_a_skewed_interval_to_the_side_of_the_tail():
    parts = torch.from_numpy(np.random.default_rng(0).exponential(size=40) ** 2)
    whole = CoreEstimate(parts.mean(), parts)
    low, high = Bounds(0.95, 4000, 0).bootstrap(lambda *_: whole, (parts,), whole)
    drawn = parts[torch.randint(40, (20000, 40), generator=torch.Generator().manual_seed(1))].mean(-1)
    plain = torch.quantile(drawn, torch.tensor([0.025, 0.975], dtype=F64)).tolist()
    assert low > plain[0] + 0.1 and high > plain[1] + 0.4
    # a symmetric one stays where the percentiles are
    parts = torch.linspace(-1, 1, 40, dtype=F64)
    whole = CoreEstimate(parts.mean(), parts)
    low, high = Bounds(0.95, 4000, 0).bootstrap(lambda *_: whole, (parts,), whole)
    assert low == pytest.approx(-0.181, abs=0.02) and high == pytest.approx(0.181, abs=0.02)


def test_levels_of_the_bias_corrected_interval_are_efrons():
    drawn = torch.arange(1000, dtype=F64)
    even = torch.tensor(499.5, dtype=F64)
    assert bootstrap._bias_corrected(drawn, even, 0.0, 0.95) == pytest.approx([0.025, 0.975], abs=1e-9)
    # 60 % below: z0 = 0.2533, ends at z0 + (z0 -+ 1.96) / (1 - a (z0 -+ 1.96))
    more = torch.tensor(599.5, dtype=F64)
    assert bootstrap._bias_corrected(drawn, more, 0.0, 0.95) == pytest.approx([0.07307, 0.99318], abs=2e-5)
    assert bootstrap._bias_corrected(drawn, more, 0.05, 0.95) == pytest.approx([0.09355, 0.99695], abs=2e-5)
    # -1, -1, 2: 6 / (6 x 6^1.5)
    assert bootstrap._skew(torch.tensor([0.0, 0.0, 3.0], dtype=F64)) == pytest.approx(6**-1.5)
    assert bootstrap._skew(torch.ones(3, dtype=F64)) == 0.0


def test_a_ratio_is_formed_again_in_every_resample():
    # resamples of two episodes are worth 0, (0 + 6) / 4 or 2: the mean of resampled parts would reach 3
    weight, x = torch.tensor([1.0, 3.0], dtype=F64), torch.tensor([0.0, 2.0], dtype=F64)

    def value(w, y):
        return CoreEstimate((w * y).sum(-1) / w.sum(-1), None)

    assert Bounds(0.9, 2000, 0).bootstrap(value, (weight, x), value(weight, x)) == (0.0, 2.0)


def test_one_episode_has_no_interval():
    found = estimate(Chooser(0.7), bandit(1, 0.5, 0), methods=("is", "wis"))
    assert all(one.low is None and one.high is None and one.student is None for one in found.values())


def test_the_same_seed_gives_the_same_numbers():
    data = bandit(20, 0.5, 0)
    a, b = (estimate(Chooser(0.7), data, fqe=QUICK, seed=3) for _ in range(2))
    assert a == b and list(a) == list(METHODS) and all(one.value is not None for one in a.values())


# -- what is said, and refused ------------------------------------------------------------------------


def test_few_effective_episodes_are_called_unreliable():
    data = bandit(400, 0.5, 0)
    far = estimate(Chooser(0.8), dataclasses.replace(data, infos={"action_log_probs": np.linspace(-9, 90, 400)}),
                   methods=("wis",))["wis"]  # fmt: skip
    assert far.effective_sample_size < 10 and "unreliable: 400 episodes are worth" in far.note
    near = estimate(Chooser(0.6), data, methods=("wis",))["wis"]
    assert near.effective_sample_size > 100 and "unreliable" not in near.note and "unit" not in near.note


def test_densities_in_two_units_are_suspected():
    data = bandit(400, 0.5, 0)
    moved = dataclasses.replace(data, infos={"action_log_probs": data.infos["action_log_probs"] + 1.0})
    assert "mean weight is 0.37" in estimate(Chooser(0.5), moved, methods=("wis",))["wis"].note


def test_what_a_cut_leaves_out_is_said():
    data = episodes([1, 1], [0, 1], [1, 2], cut=[1], log_probs=np.log([0.5, 0.5]))
    found = estimate(Chooser(0.5), data, fqe=QUICK)
    assert "1 episodes were cut" in found["pdis"].note and "cut" not in found["dr"].note
    assert "discounted by 0.99, to the end" in found["fqe"].note


def test_plain_returns_of_cut_episodes_get_the_longest_ones_length():
    data = episodes([2, 1], [0, 1, 1], [1, 2, 3], cut=[0], log_probs=np.log([0.5] * 3))
    found = estimate(Chooser(0.5), data, gamma=1.0, fqe=QUICK)
    assert all(one.note.startswith("return, first 2 steps") for one in found.values())
    ended = episodes([2, 1], [0, 1, 1], [1, 2, 3], log_probs=np.log([0.5] * 3))
    assert "return, to the end" in estimate(Chooser(0.5), ended, gamma=1.0, methods=("is",))["is"].note


def refused(policy, data, **settings):
    found = estimate(policy, data, methods=("is", "wdr"), fqe=QUICK, **settings)
    assert all(one.value is None and one.low is None for one in found.values())
    return found["is"].note


def test_what_has_no_density_is_refused_with_the_reason():
    plain = episodes([1], [0], [1.0])
    assert "does not say how likely" in refused(Chooser(0.5), plain)
    nan = episodes([1, 1], [0, 1], [1.0, 2.0], log_probs=[-0.7, np.nan])
    assert "row 1" in refused(Chooser(0.5), nan) and "not finite" in refused(Chooser(0.5), nan)
    never = episodes([1, 1], [0, 0], [1.0, 2.0], log_probs=[-0.7, -0.7])
    assert "every weight is zero" in refused(Chooser(1.0), never)
    td3 = make("td3", PAID)
    data = roll_out(td3, EnvSpec(PAID), 20)
    assert "deterministic policy has no density" in refused(td3, data)
    assert "deterministic policy has no density" in refused(make("sac", PAID), data, deterministic=True)
    found = estimate(td3, data, methods=("fqe", "is"), fqe=QUICK)
    assert found["fqe"].value is not None and found["is"].value is None


def test_a_behaviour_policy_takes_the_place_of_recorded_densities():
    data = bandit(50, 0.5, 0)
    recorded = estimate(Chooser(0.7), data, methods=WEIGHTED)
    bare = dataclasses.replace(data, infos={})
    known = estimate(Chooser(0.7), bare, methods=WEIGHTED, behaviour=Chooser(0.5))
    for name in WEIGHTED:
        assert known[name].value == pytest.approx(recorded[name].value, rel=1e-6)

    class Only:
        def log_prob(self, obs, action):
            return np.full(len(action), math.log(0.5))

    other = estimate(Chooser(0.7), bare, methods=("is",), behaviour=Only())
    assert other["is"].value == pytest.approx(recorded["is"].value, rel=1e-6)


def test_wrong_questions_are_errors():
    data = bandit(3, 0.5, 0)
    with pytest.raises(ValueError, match=r"no method 'wid'.*wis"):
        estimate(Chooser(0.5), data, methods=("wid",))
    with pytest.raises(ValueError, match="confidence=1"):
        estimate(Chooser(0.5), data, confidence=1.0)
    with pytest.raises(ValueError, match="observations are"):
        estimate(make("sac", PAID), data)


# -- densities ----------------------------------------------------------------------------------------


class Paid(gym.Env):
    """Five steps; the reward is the action, whose bounds are lopsided; ends or is cut by a coin."""

    observation_space = gym.spaces.Box(-np.inf, np.inf, (2,), np.float32)
    action_space = gym.spaces.Box(np.float32([-0.5]), np.float32([2.5]))

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.t = 0
        return self.np_random.normal(size=2).astype(np.float32), {}

    def step(self, action):
        self.t += 1
        last, coin = self.t == 5, self.np_random.random() < 0.5
        return self.np_random.normal(size=2).astype(np.float32), float(action[0]), last and coin, last and not coin, {}


gym.register("ope/Paid-v0", f"{__name__}:Paid")
PAID = f"{__name__}:ope/Paid-v0"


def integral(policy, low, high, n=200_001):
    """Of the density between the bounds, at one observation."""
    x = torch.linspace(low, high, n, dtype=F64)[1:-1]
    obs = torch.zeros(len(x), 2)
    return float(policy.log_prob(obs, x[:, None]).logp.exp().sum() * (x[1] - x[0]))


def test_densities_are_per_unit_of_the_environments_actions():
    assert integral(AgentPolicy(make("sac", PAID)), -0.5, 2.5) == pytest.approx(1.0, abs=1e-3)
    squashing = make_ppo(PAID, action_map="tanh")
    assert integral(AgentPolicy(squashing), -0.5, 2.5) == pytest.approx(1.0, abs=1e-3)


def test_a_clipped_policy_has_its_missing_probability_at_the_bounds():
    policy = AgentPolicy(make_ppo(PAID))
    inside = integral(policy, -0.5, 2.5)
    edges = policy.log_prob(torch.zeros(2, 2), torch.tensor([[-0.5], [2.5]])).logp.exp().sum()
    assert 0.1 < float(edges) < 0.9
    assert inside + float(edges) == pytest.approx(1.0, abs=1e-4)


def test_a_gaussian_actor_is_clipped_in_the_environments_units():
    agent = make("sac", PAID)
    agent.policy = GaussianActor(agent.observation_space, agent.action_space, QNetworkConfig(actor_hidden=(8,)))
    edges = AgentPolicy(agent).log_prob(torch.zeros(2, 2), torch.tensor([[-0.5], [2.5]])).logp.exp().sum()
    assert integral(AgentPolicy(agent), -0.5, 2.5) + float(edges) == pytest.approx(1.0, abs=1e-4)
    # a deviation of 1 in [-1, 1] is one of 1.5 in [-0.5, 2.5]
    obs = torch.zeros(1, 2)
    found = AgentPolicy(agent).log_prob(obs, agent.policy.deterministic(obs)).logp.exp().item()
    assert found == pytest.approx(1 / (1.5 * math.sqrt(2 * math.pi)), rel=1e-5)


def test_choices_have_probabilities():
    agent = make_ppo(env_id("Choice"))
    obs, action = torch.zeros(3, 1), torch.tensor([5, 6, 7])
    found = AgentPolicy(agent).log_prob(obs, action)
    assert found.exact.all() and found.logp.exp().sum().item() == pytest.approx(1.0, abs=1e-6)
    agent = make_ppo(env_id("Switches"))
    pairs = torch.cartesian_prod(torch.arange(2), torch.arange(3))
    found = AgentPolicy(agent).log_prob(torch.zeros(6, 3), pairs)
    assert found.logp.exp().sum().item() == pytest.approx(1.0, abs=1e-6)


def test_a_squashed_density_at_known_points():
    policy = SquashedGaussian(torch.tensor([[0.3]]), torch.tensor([[-0.5]]))
    low, high = torch.tensor([-1.0]), torch.tensor([3.0])
    u = 0.8
    action = torch.tensor([[1.0 + 2.0 * math.tanh(u)]], dtype=F64)
    expected = torch.distributions.Normal(0.3, math.exp(-0.5)).log_prob(torch.tensor(u)).item()
    expected -= math.log(2.0 * (1 - math.tanh(u) ** 2))
    found = squashed_density(policy, action, low, high)
    assert found.logp.item() == pytest.approx(expected, abs=1e-6) and found.exact.item()


def test_actions_that_tanh_cannot_give_back_are_finite_and_reported():
    policy = SquashedGaussian(torch.zeros(4, 1), torch.zeros(4, 1))
    unit = torch.tensor([[1.0], [-1.0], [1.0 - 1e-7], [math.tanh(5.0)]])
    found = squashed_density(policy, unit, torch.tensor([-1.0]), torch.tensor([1.0]))
    assert found.logp.isfinite().all()
    assert found.exact.tolist() == [False, False, False, True]
    # far from zero float32 is coarser: the same relative place is no longer exact
    found = squashed_density(policy, unit + 1000.0, torch.tensor([999.0]), torch.tensor([1001.0]))
    assert found.exact.tolist() == [False] * 4


def test_a_clipped_density_at_known_points():
    policy = DiagonalGaussian(torch.zeros(3, 1), torch.zeros(3, 1))
    found = clipped_density(policy, torch.tensor([[-1.0], [0.5], [2.0]]), torch.tensor([-1.0]), torch.tensor([2.0]))
    normal = torch.distributions.Normal(0.0, 1.0)
    expected = [math.log(normal.cdf(torch.tensor(-1.0))), normal.log_prob(torch.tensor(0.5)).item(),
                math.log(1 - normal.cdf(torch.tensor(2.0)))]  # fmt: skip
    assert found.logp.tolist() == pytest.approx(expected, abs=1e-5)


def test_guesses_are_counted_in_the_note():
    class Guessing(Chooser):
        def log_prob(self, obs, action):
            return Density(super().log_prob(obs, action), obs[:, 0] > 1.5)

    data = bandit(5, 0.5, 0)
    assert "2 of 5 actions lie at a bound" in estimate(Guessing(0.5), data, methods=("is",))["is"].note
    assert density_of(np.zeros((3, 1))).logp.shape == (3,)


@pytest.mark.parametrize("kind", ["sac", "ppo", "squashed ppo"])
def test_a_policy_is_worth_what_it_earned_in_its_own_data(kind):
    agent = {
        "sac": lambda: make("sac", PAID),
        "ppo": lambda: make_ppo(PAID),
        "squashed ppo": lambda: make_ppo(PAID, action_map="tanh"),
    }[kind]()
    data = roll_out(agent, EnvSpec(PAID), 200, seed=1)
    found = estimate(agent, data, gamma=0.9, methods=("is", "pdis", "wis", "pdwis"))
    plain = np.mean([data.rewards[a:b] @ 0.9 ** np.arange(b - a) for a, b in data.episodes])
    for one in found.values():
        assert one.value == pytest.approx(plain, rel=1e-3)
        assert one.effective_sample_size == pytest.approx(len(data.episodes), rel=1e-3)
        assert "guess" not in one.note


def test_agents_act_as_they_do_in_their_environment():
    agent = make("sac", PAID)
    obs = torch.randn(7, 2)
    policy = AgentPolicy(agent, deterministic=True)
    expected, _ = agent.predict(obs.numpy(), deterministic=True)
    assert np.array_equal(policy.act(obs, torch.Generator()).numpy(), expected)
    sampled = AgentPolicy(agent)
    a, b = (sampled.act(obs, torch.Generator().manual_seed(s)) for s in (0, 1))
    assert a.shape == (7, 1) and not torch.equal(a, b)
    assert ((a >= -0.5) & (a <= 2.5)).all()


def test_policies_with_a_memory_and_without_a_density_are_refused():
    agent = make("sac", PAID)
    remembering = type("Remembering", (type(agent),), {"session": lambda self, noise=None: None})
    agent.__class__ = remembering
    with pytest.raises(ValueError, match="remembers"):
        AgentPolicy(agent)
    flow = make_ppo(PAID)
    flow.policy = torch.nn.Identity()
    with pytest.raises(NoDensityError, match="Identity"):
        AgentPolicy(flow).log_prob(torch.zeros(1, 2), torch.zeros(1, 1))
