"""Fitted Q evaluation against linear solves, sums by hand, and itself."""

import gymnasium as gym
import numpy as np
import pytest
import torch

from ctrlrl.data.dataset import Dataset, DatasetError, DatasetInfo
from ctrlrl.engine import fitted_q as module
from ctrlrl.engine.fitted_q import FittedQConfig, fitted_q, steps_of
from ctrlrl.engine.linear_fitted_q import linear_fitted_q, tabular_fitted_q
from ctrlrl.nets.actors import QNetworkConfig

LINE = gym.spaces.Box(-np.inf, np.inf, (1,), np.float32)
SHIFTED = gym.spaces.Box(np.float32([-1.0]), np.float32([3.0]))
SMALL = QNetworkConfig(critic_hidden=(32,), normalize_obs=True)


def dataset(obs, actions, rewards, terminals, timeouts, following=None, known=None, spaces=(LINE, SHIFTED)):
    obs, rewards = np.asarray(obs), np.asarray(rewards, np.float32)
    return Dataset(
        obs, np.asarray(actions), rewards, np.asarray(terminals, bool), np.asarray(timeouts, bool),
        obs if following is None else np.asarray(following),
        np.ones(len(rewards), bool) if known is None else np.asarray(known, bool), *spaces, DatasetInfo("made"),
    )  # fmt: skip


# -- tables -------------------------------------------------------------------------------------------


class Table:
    """Four states, three actions, every pair eight times, its next states in eighths; state 3 often ends."""

    def __init__(self, seed=0):
        rng = np.random.default_rng(seed)
        self.count = rng.multinomial(8, [0.3, 0.3, 0.2, 0.1, 0.1], size=(4, 3))  # the last: the episode ends
        self.reward = rng.normal(size=(4, 3, 5))
        self.policy = rng.dirichlet(np.ones(3), size=4)
        rows = [
            (s, a, after, self.reward[s, a, after])
            for s in range(4) for a in range(3) for after in range(5) for _ in range(self.count[s, a, after])
        ]  # fmt: skip
        rng.shuffle(rows)
        s, a, after, r = (np.array(x) for x in zip(*rows, strict=True))
        s, a, after = s.astype(int), a.astype(int), after.astype(int)
        ended = after == 4
        spaces = gym.spaces.Discrete(4, start=10), gym.spaces.Discrete(3, start=-1)
        following = np.where(ended, 0, after) + 10  # what follows an end is not looked at
        # each row is an episode of its own: an end, or a cut
        self.data = dataset(s + 10, a - 1, r, ended, ~ended, following, spaces=spaces)
        # float32 as the dataset holds them
        mean = np.zeros((4, 3))
        np.add.at(mean, (s, a), self.data.rewards.astype(np.float64) / 8)
        self.mean, self.chance = mean, self.count[:, :, :4] / 8

    def solve(self, gamma):
        """Q from the Bellman equation, as one linear system."""
        p = np.einsum("sax,xb->saxb", self.chance, self.policy).reshape(12, 12)
        return np.linalg.solve(np.eye(12) - gamma * p, self.mean.ravel()).reshape(4, 3)

    def within(self, gamma, steps):
        """Q of the first ``steps`` steps, from the last one backwards."""
        q = np.zeros((4, 3))
        for _ in range(steps):
            q = self.mean + gamma * self.chance @ (self.policy * q).sum(1)
        return q


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("gamma", [0.0, 0.9, 0.999])
def test_a_table_with_full_coverage_has_the_exact_values(seed, gamma):
    table = Table(seed)
    assert np.allclose(tabular_fitted_q(table.data, table.policy, gamma), table.solve(gamma), atol=1e-8)


@pytest.mark.parametrize("steps", [1, 2, 7])
def test_a_table_with_a_horizon_has_the_values_of_that_many_steps(steps):
    table = Table()
    found = tabular_fitted_q(table.data, table.policy, 1.0, steps)
    assert np.allclose(found, table.within(1.0, steps), atol=1e-9)


def test_steps_of_which_nothing_follows_are_left_out_of_a_table():
    table = Table()
    n = len(table.data)
    more = dataset(
        *(np.concatenate([x, x[:5]]) for x in (table.data.observations, table.data.actions)),
        np.r_[table.data.rewards, np.full(5, 1e6)], np.r_[table.data.terminals, np.zeros(5)],
        np.r_[table.data.timeouts, np.ones(5)], np.concatenate([table.data.next_observations] * 2)[: n + 5],
        np.arange(n + 5) < n, (table.data.observation_space, table.data.action_space),
    )  # fmt: skip
    assert np.allclose(tabular_fitted_q(more, table.policy, 0.9), table.solve(0.9), atol=1e-8)


def test_an_action_that_the_data_never_has_is_refused_with_its_place():
    spaces = gym.spaces.Discrete(2, start=10), gym.spaces.Discrete(2, start=-1)
    data = dataset([10, 11], [-1, -1], [0, 0], [0, 1], [0, 0], [11, 10], spaces=spaces)
    with pytest.raises(DatasetError, match="action 0 in state 11"):
        tabular_fitted_q(data, np.array([[1.0, 0.0], [0.5, 0.5]]), 0.9)
    assert tabular_fitted_q(data, np.array([[1.0, 0.0], [1.0, 0.0]]), 0.9)[1, 0] == 0.0
    with pytest.raises(TypeError, match="Discrete"):
        tabular_fitted_q(dataset([[0.0]], [[0.0]], [0], [1], [0]), np.ones((1, 1)), 0.9)


def test_linear_features_find_a_linear_value():
    # s' = s / 2, reward s + a, policy a = -s / 4: Q = a + s + 0.9 (s/2)(3/4) / (1 - 0.45)
    g = torch.Generator().manual_seed(0)
    s, a = torch.randn(2, 200, generator=g, dtype=torch.float64)
    phi, phi_t = torch.stack([s, a], 1), torch.stack([s / 2, -s / 8], 1)
    theta = linear_fitted_q(phi, s + a, torch.full_like(s, 0.9), phi_t)
    assert theta.tolist() == pytest.approx([1 + 0.9 * 0.375 / (1 - 0.45), 1.0])
    theta = linear_fitted_q(phi, s + a, torch.full_like(s, 0.9), phi_t, horizon=2)
    assert theta.tolist() == pytest.approx([1 + 0.9 * 0.375, 1.0])


# -- networks -----------------------------------------------------------------------------------------


def config(**changes):
    return FittedQConfig(**({"updates": 400, "batch_size": 64, "learning_rate": 1e-2, "tau": 0.05, "resamples": 0,
                             "network": SMALL} | changes))  # fmt: skip


def acting(value):
    """The policy that always takes ``value``."""
    return lambda obs, generator: torch.full((len(obs), 1), float(value))


def steady(lengths, ends, seed=0):
    """Episodes with random observations and actions in [-1, 3]; the reward is the action."""
    rng = np.random.default_rng(seed)
    n = sum(lengths)
    actions = rng.uniform(-1, 3, (n, 1)).astype(np.float32)
    obs = rng.normal(size=(n + 1, 1)).astype(np.float32)
    last = np.zeros(n, bool)
    last[np.cumsum(lengths) - 1] = True
    terminal = last & np.repeat(ends, lengths)
    return dataset(obs[:-1], actions, actions[:, 0], terminal, last & ~terminal, obs[1:])


@pytest.mark.parametrize(("ends", "value"), [(False, 2.0 / (1 - 0.5)), (True, 2.0)])
def test_a_cut_goes_on_and_an_end_does_not(ends, value):
    data = steady([1] * 200, [ends] * 200)
    found = fitted_q(acting(2.0), data, gamma=0.5, config=config())
    assert found.initial[0] == pytest.approx(value, abs=0.1)
    assert found.by_episode.shape == (200,) and found.unusable == 0
    # another action first, then the policy
    other = found.q(torch.zeros(1, 1), torch.zeros(1, 1), torch.zeros(1)).item()
    assert other == pytest.approx(0.0 if ends else 0.5 * value, abs=0.15)


def test_a_horizon_counts_its_steps_and_no_more():
    data = steady([6] * 60, [False] * 60)
    found = fitted_q(acting(2.0), data, gamma=1.0, horizon=4, config=config(updates=700))
    assert found.initial[0] == pytest.approx(8.0, abs=0.5)
    late = found.value(torch.zeros(1, 1), torch.tensor([3]), torch.Generator(), 1)
    assert late.item() == pytest.approx(2.0, abs=0.3)


def test_a_stochastic_policy_is_worth_its_mean():
    def act(obs, generator):
        return torch.where(torch.rand(len(obs), 1, generator=generator) < 0.25, 3.0, -1.0)

    data = steady([1] * 200, [True] * 200)
    found = fitted_q(act, data, gamma=0.9, config=config(), samples=64)
    assert found.initial[0] == pytest.approx(0.0, abs=0.15)


def test_discrete_actions_are_told_apart():
    rng = np.random.default_rng(0)
    action = rng.integers(5, 8, 300)
    obs = rng.normal(size=(300, 1)).astype(np.float32)
    ones = np.ones(300, bool)
    data = dataset(obs, action, (action == 6) * 4.0, ones, ~ones, spaces=(LINE, gym.spaces.Discrete(3, start=5)))
    for choice, value in ((5, 0.0), (6, 4.0)):
        found = fitted_q(lambda o, g, c=choice: torch.full((len(o),), c), data, gamma=0.9, config=config())
        assert found.initial[0] == pytest.approx(value, abs=0.15)


def test_steps_without_a_known_next_observation_are_left_out_and_counted():
    data = steady([1] * 200, [True] * 100 + [False] * 100)
    rewards = np.where(data.terminals, data.rewards, 1e4).astype(np.float32)
    known = data.terminals & False
    data = dataset(data.observations, data.actions, rewards, data.terminals, data.timeouts, known=known)
    found = fitted_q(acting(2.0), data, gamma=0.9, config=config())
    assert found.initial[0] == pytest.approx(2.0, abs=0.1)
    assert found.unusable == 100
    with pytest.raises(DatasetError, match="no step"):
        fitted_q(acting(2.0), data.take(range(100, 200)), gamma=0.9, config=config())


def test_the_seed_decides_everything():
    data = steady([3] * 20, [False] * 20)
    a, b, c = (
        fitted_q(acting(1.0), data, gamma=0.9, config=config(updates=30, resamples=2), seed=s).initial
        for s in (1, 1, 2)
    )
    assert np.array_equal(a, b) and not np.isclose(a, c).any()


@pytest.mark.parametrize("seen", [False, True])
def test_resampled_networks_see_resampled_episodes(seen):
    # one observation and one action: each network can only learn the mean reward of its own sample; and where the
    # observation tells the reward, they learn the same, but for their own first observations
    n = 100
    reward = (np.arange(n) < 30).astype(np.float32)
    ones = np.ones(n, bool)
    obs = (reward if seen else 0 * reward)[:, None]
    data = dataset(obs, np.zeros((n, 1), np.float32), reward, ones, ~ones)
    found = fitted_q(acting(0.0), data, gamma=0.9, config=config(updates=400, batch_size=256, resamples=12,
                                                                learning_rate=1e-2))  # fmt: skip
    counts = module._resampled(n, 12, 0)
    expected = (counts * torch.from_numpy(reward).unsqueeze(1)).sum(0) / counts.sum(0)
    assert counts[:, 0].eq(1).all() and counts.sum(0).eq(n).all()
    assert np.abs(found.initial - expected.numpy()).max() < 0.06
    assert found.initial[1:].std() == pytest.approx((0.3 * 0.7 / n) ** 0.5, rel=0.5)


def test_values_have_the_units_of_the_rewards():
    data = steady([1] * 100, [True] * 100)
    far = dataset(data.observations, data.actions, 1e4 + 100 * data.rewards, data.terminals, data.timeouts)
    found = fitted_q(acting(2.0), far, gamma=0.9, config=config())
    assert found.initial[0] == pytest.approx(1e4 + 200, abs=20)


def test_a_sum_without_end_is_refused():
    data = steady([3] * 4, [True, True, False, True])
    with pytest.raises(ValueError, match="1 of 4 episodes of made were only cut"):
        fitted_q(acting(1.0), data, gamma=1.0, config=config())
    with pytest.raises(ValueError, match=r"gamma=1\.5"):
        fitted_q(acting(1.0), data, gamma=1.5)
    with pytest.raises(ValueError, match="horizon=0"):
        fitted_q(acting(1.0), data, gamma=1.0, horizon=0)
    fitted_q(acting(1.0), data.take([0, 1]), gamma=1.0, config=config(updates=1))


def test_actions_that_no_critic_sees_are_refused():
    space = gym.spaces.MultiBinary(2)
    data = dataset(np.zeros((1, 1), np.float32), np.zeros((1, 2), np.int8), [0], [1], [0], spaces=(LINE, space))
    with pytest.raises(TypeError, match="MultiBinary"):
        fitted_q(acting(1.0), data, gamma=0.9, config=config())


def test_too_few_updates_for_the_steps_that_count_are_known_to_be_so():
    # values reach back tau x updates = 5 steps
    data, few = steady([9] * 2, [False] * 2), config(updates=50, tau=0.1)
    found = [fitted_q(acting(1.0), data, gamma=g, horizon=h, config=few).converged
             for g, h in ((0.3, None), (0.5, None), (1.0, 3), (1.0, 4))]  # fmt: skip
    assert found == [True, False, True, False]


@pytest.mark.parametrize("wrong", [{"updates": 0}, {"resamples": -1}, {"learning_rate": 0.0}, {"tau": 2.0}])
def test_settings_without_meaning_are_refused(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        FittedQConfig(**wrong)


def test_steps_are_counted_within_episodes():
    data = steady([2, 1, 3], [True, False, True])
    assert steps_of(data).tolist() == [0, 1, 0, 0, 1, 2]


def test_data_may_lie_in_a_file():
    data = steady([3] * 10, [False] * 10)
    settings = [config(updates=20, memory_map=mapped) for mapped in (False, True)]
    a, b = (fitted_q(acting(1.0), data, gamma=0.9, config=one).initial for one in settings)
    assert np.array_equal(a, b)
