"""Behaviour cloning against known policies and an implementation of its own; which episodes are the best."""

import math

import numpy as np
import pytest
import torch
from helpers.agents import quiet
from helpers.off_policy import Double, adam, assert_like, drawn, transitions
from helpers.offline import learner, recorded, squashed, tiny
from torch.distributions import Normal

from ctrlrl import api
from ctrlrl.data.dataset import Dataset, DatasetInfo
from ctrlrl.engine.learner import part
from ctrlrl.offline.bc import BC

B, RATE = 12, 1e-2


@pytest.fixture
def double():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def data_of(rewards_by_episode):
    """Episodes with these rewards; the observation is the number of the row."""
    rewards = np.concatenate(rewards_by_episode).astype(np.float32)
    n = len(rewards)
    terminals = np.zeros(n, bool)
    terminals[np.cumsum([len(r) for r in rewards_by_episode]) - 1] = True
    rows = np.arange(n, dtype=np.float32)[:, None]
    like = recorded()
    return Dataset(
        rows, np.zeros((n, 1), np.float32), rewards, terminals, np.zeros(n, bool), rows + 1, ~terminals,
        like.observation_space, like.action_space, DatasetInfo("returns"),
    )  # fmt: skip


def kept(data, **settings):
    """Numbers of the episodes that are selected, by the first row of each."""
    chosen = BC(**settings).select(data)
    first = [e.start for e in data]
    return [first.index(int(chosen.observations[e.start, 0])) for e in chosen]


# -- the update -----------------------------------------------------------------------------------


def test_five_updates_equal_an_independent_implementation(double):
    mine = learner("bc", Double, learning_rate=RATE, normalize_obs=False)
    actor = squashed(mine.modules["actor"])
    optimiser, batch = adam(actor, lr=RATE), transitions(5 * B)
    for i in range(5):
        rows = part(batch, slice(i * B, (i + 1) * B))
        loss = torch.nn.functional.mse_loss(actor(rows.obs.double()), rows.action)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        found = mine.run(rows, {}, 1)
        assert found.keys() == {"actor_loss"}
        torch.testing.assert_close(found["actor_loss"][0], loss.detach(), rtol=0, atol=1e-7)
        assert_like(actor, [*mine.modules["actor"].body, mine.modules["actor"].out])


def test_five_updates_of_the_likelihood_equal_an_independent_implementation(double):
    mine = learner("bc", Double, learning_rate=RATE, normalize_obs=False, fit="likelihood")
    mean, log_std = squashed(mine.modules["actor"], "mean"), torch.nn.Parameter(torch.zeros(2))
    optimiser, batch = adam(mean, log_std, lr=RATE), transitions(5 * B)
    for i in range(5):
        rows = part(batch, slice(i * B, (i + 1) * B))
        loss = -Normal(mean(rows.obs.double()), log_std.exp()).log_prob(rows.action).sum(1).mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        std = mine.modules["actor"].log_std.exp().mean()
        found = mine.run(rows, {}, 1)
        torch.testing.assert_close(found["actor_loss"][0], loss.detach(), rtol=0, atol=1e-7)
        torch.testing.assert_close(found["std"][0], std, rtol=0, atol=1e-7)
        assert_like(mean, [*mine.modules["actor"].body, mine.modules["actor"].mean])
        torch.testing.assert_close(mine.modules["actor"].log_std, log_std.detach(), rtol=0, atol=1e-7)


@pytest.mark.parametrize("fit", ["squared_error", "likelihood"])
def test_a_linear_normal_demonstrator_is_recovered(fit):
    """Actions tanh(W s + b) + 0.1 noise: the network without hidden layers holds W and b, up to 4 standard errors."""
    g = torch.Generator().manual_seed(0)
    weight, bias = torch.tensor([[0.5, -0.3, 0.0], [0.1, 0.2, -0.4]]), torch.tensor([0.2, -0.1])
    n, noise = 8192, 0.1
    batch = transitions(n)
    mean = torch.tanh(batch.obs.float() @ weight.T + bias)
    batch = batch._replace(action=mean + noise * torch.randn(n, 2, generator=g))
    mine = learner("bc", learning_rate=2e-2, actor_hidden=(), normalize_obs=False, fit=fit)
    for rate in (2e-2, 2e-3):
        mine.knobs["lr/actor"].fill_(rate)
        for _ in range(200):
            mine.run(batch, {}, 1)
    error = 4 * noise / math.sqrt(n) / 0.6  # tanh's slope is above 0.6 for most of these states
    layer = mine.modules["actor"].get_submodule({"squared_error": "out", "likelihood": "mean"}[fit])
    torch.testing.assert_close(layer.weight, weight, rtol=0, atol=error)
    torch.testing.assert_close(layer.bias, bias, rtol=0, atol=error)
    if fit == "likelihood":
        found, error = mine.modules["actor"].log_std.exp(), 4 * noise / math.sqrt(2 * n)
        torch.testing.assert_close(found, torch.full((2,), noise), rtol=0, atol=error)


def test_the_normal_policy_explores_and_the_deterministic_one_does_not():
    obs = np.zeros((50, 3), np.float32)
    normal, plain = (
        quiet(api.make("bc", dataset=recorded(), **tiny("bc", fit=fit)), 6) for fit in ("likelihood", "squared_error")
    )
    assert np.ptp(normal.predict(obs)[0]) > 0.1
    assert np.ptp(normal.predict(obs, deterministic=True)[0]) < 1e-6 > np.ptp(plain.predict(obs)[0])


def test_nothing_but_observation_and_action_enters(double):
    a, b = learner("bc"), learner("bc")
    batch = transitions(B)
    a.run(batch, drawn(a, 1, B), 1)
    b.run(batch._replace(reward_t=batch.reward_t + 9, next_obs=batch.next_obs - 9, terminated_t=batch.reward_t), {}, 1)
    assert torch.equal(a.state["actor"], b.state["actor"])


# -- the best episodes ----------------------------------------------------------------------------

RETURNS = [[1, 1], [5], [0, 0, 3], [-2, 9], [5, 0], [4]]
"""Returns 2, 5, 3, 7, 5, 4."""


@pytest.mark.parametrize(
    "share,expected",
    [
        (1.0, [0, 1, 2, 3, 4, 5]),
        (0.5, [1, 3, 4]),
        (0.34, [1, 3]),  # of the two with return 5 the earlier
        (0.3, [3]),  # 1.8 episodes: whole ones, rounded down
        (1e-6, [3]),  # never none
        (0.999, [1, 2, 3, 4, 5]),
    ],
)
def test_the_best_share_of_the_episodes_is_kept_in_the_datas_order(share, expected):
    assert kept(data_of(RETURNS), best_share=share) == expected


def test_a_share_that_is_a_whole_number_of_episodes_keeps_them_all():
    """0.29 x 100 is 28.999999999999996 in floating point."""
    data = data_of([[k % 10] for k in range(100)])
    for share, count in ((0.29, 29), (0.1, 10), (0.07, 7), (0.58, 58)):
        assert len(kept(data, best_share=share)) == count
    assert kept(data, best_share=0.1) == [9, 19, 29, 39, 49, 59, 69, 79, 89, 99]


def test_episodes_may_be_ranked_by_discounted_returns():
    """Discounted at 0.5: 1.5, 5, 0.75, 2.5, 5, 4. At 0 the first reward counts: 1, 5, 0, -2, 5, 4."""
    data = data_of(RETURNS)
    assert kept(data, best_share=0.5, rank_discount=0.5) == [1, 4, 5]
    assert kept(data, best_share=0.84, rank_discount=0.5) == [0, 1, 3, 4, 5]
    assert kept(data, best_share=0.84, rank_discount=0.0) == [0, 1, 2, 4, 5]


def test_rewards_beyond_an_episode_do_not_count_to_it():
    data = data_of([[1, 1, 1], [2], [100], [0, 0, 0, 0, 0, 90]])
    assert kept(data, best_share=0.25, rank_discount=0.99) == [2]
    assert kept(data, best_share=0.5, rank_discount=0.99) == [2, 3]
    assert kept(data, best_share=0.75, rank_discount=0.5) == [1, 2, 3]  # 1.75, 2, 100, 2.8125


def test_a_selection_has_whole_episodes_with_all_their_columns():
    data = recorded()
    best = BC(best_share=0.25).select(data)
    numbers = np.sort(np.argsort(-data.returns)[:4])
    rows = np.concatenate([np.arange(*data.episodes[k]) for k in numbers])
    assert [e.stop - e.start for e in best] == [data.episodes[k].stop - data.episodes[k].start for k in numbers]
    for name, column in best.columns().items():
        assert np.array_equal(column, data.columns()[name][rows]), name


def test_an_agent_learns_from_the_selection_alone_and_scales_by_it():
    data = recorded(mean=3.0)
    agent = quiet(api.make("bc", dataset=data, **tiny("bc", best_share=0.25, normalize_obs=True)), 3)
    best = BC(best_share=0.25).select(data)
    assert len(agent.replay) == best.usable.sum() < data.usable.sum()
    seen = best.observations[best.usable]
    scale = agent.policy.features.preprocess.normalizer.scale
    torch.testing.assert_close(scale, torch.from_numpy(1 / (seen.std(0) + 1e-3)), rtol=1e-5, atol=0)


def test_the_preset_is_corls_ten_percent():
    agent = api.make("bc", dataset=recorded(), preset="top10", **tiny("bc"))
    assert (agent.algorithm.best_share, agent.algorithm.rank_discount) == (0.1, 0.99)
    config, own = api.get_method("bc").blueprint()
    assert (own.fit, own.best_share, config.learning_rate, config.batch_size) == ("squared_error", 1.0, 3e-4, 256)
    assert config.network.actor_hidden == (256, 256) and config.network.normalize_obs


@pytest.mark.parametrize(
    "settings", [{"best_share": 0.0}, {"best_share": 1.1}, {"rank_discount": -0.1}, {"rank_discount": 1.01}]
)
def test_impossible_settings_are_refused(settings):
    (name,) = settings
    with pytest.raises(ValueError, match=name):
        BC(**settings)
