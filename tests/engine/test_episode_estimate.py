"""From whole episodes to a batch: what counts as success, who is preferred, advantages along a row."""

from __future__ import annotations

import json

import ctrlrl_envs  # noqa: F401 - registers the tasks
import pytest
import torch
from engine.test_episode_feed import VERDICT, Along, Outcome, build, disturb, episodes, gather
from helpers.agents import NOISY
from helpers.envs import env_id

from ctrlrl.engine.episode_estimate import estimate_episodes, preference_of, success_of
from ctrlrl.nets.heads import DiagonalGaussian
from ctrlrl.types import ON_POLICY, TEMPERED, PolicyOutput

# -- outcomes -------------------------------------------------------------------------------------


def test_scores_lie_between_the_extremes_so_far_which_are_saved():
    agent, low, high = build(Outcome), float("inf"), -float("inf")
    assert agent.feed.counters() == {"bounds": None}
    for iteration in range(4):
        gathered, (e,) = gather(agent, iteration)
        returns = e.returns()
        low, high = min(low, float(returns.min())), max(high, float(returns.max()))
        score = gathered.batch.score
        torch.testing.assert_close(score, (returns - low) / (high - low))
        assert score.min() >= 0 and score.max() <= 1
    assert agent.feed.counters() == {"bounds": [low, high]}
    again = build(Outcome)
    again.feed.restore(agent.feed.tensors(), json.loads(json.dumps(agent.feed.counters())))
    assert torch.equal(gather(again, 9)[0].batch.score, gather(agent, 9)[0].batch.score)
    assert not torch.equal(gather(build(Outcome), 9)[0].batch.score, gather(agent, 9)[0].batch.score)


def test_where_all_returns_agree_the_score_is_a_half():
    batch = gather(build(Outcome, env_id("OnlyTruncates"), env_kwargs={"length": 3}))[0].batch
    assert batch.score.tolist() == [0.5] * 12 and batch.sequence_return.tolist() == [6.0] * 12
    assert not batch.success.any(), "none is above the mean"


def test_scores_of_token_tasks_are_their_rewards():
    batch = gather(build(Outcome, "ctrlrl/TokenSort-v0"))[0].batch
    assert torch.equal(batch.score, batch.sequence_return) and batch.score.unique().numel() > 1


def test_success_is_the_environments_word():
    gathered, (e,) = gather(build(Outcome, VERDICT, success_return=-100.0, horizon=30))
    batch = gathered.batch
    assert batch.success.tolist() == (e.action[:, 0, 0] > 0).tolist() and batch.success.unique().numel() == 2


def test_an_environment_that_is_silent_means_no():
    """Also in an iteration in which all episodes fail, before and after a restart."""
    agent = build(Outcome, VERDICT, env_kwargs={"shy": True}, horizon=30, success_return=-100.0)
    batch = gather(agent)[0].batch
    assert batch.success.tolist() == (batch.action[:, 0, 0] > 0).tolist() and batch.success.unique().numel() == 2
    with torch.no_grad():
        agent.policy.head.linear.bias.fill_(-50.0)
    again = build(Outcome, VERDICT, env_kwargs={"shy": True}, horizon=30, success_return=-100.0)
    again.restore(agent.tensors(), agent.counters())
    for each in (agent, again):
        batch = gather(each, 1)[0].batch
        assert (batch.action[:, 0] < 0).all() and not batch.success.any()


def test_success_by_a_given_return_else_above_the_groups_mean():
    reward = torch.tensor([[1.0, 1.0], [1.0, 3.0], [0.0, 0.0], [9.0, 0.0], [9.0, 0.0]])
    e = episodes(reward, group=torch.tensor([0, 0, 0, 1, 1]))
    assert success_of(e, 2.0).tolist() == [True, True, False, True, True]
    assert success_of(e, 4.0).tolist() == [False, True, False, True, True]
    # the mean of group 0 is 2, and group 1 agrees
    assert success_of(e, None).tolist() == [False, True, False, False, False]
    said = torch.tensor([False, False, True, False, True])
    assert torch.equal(success_of(e._replace(success=said), 2.0), said)
    batch = gather(build(Outcome, success_return=0.0))[0].batch
    assert torch.equal(batch.success, batch.sequence_return >= 0.0) and batch.success.unique().numel() == 2


def test_preferences_take_the_first_of_equals_and_nothing_where_all_agree():
    returns = torch.tensor([1.0, 5.0, 0.0, 5.0, 0.0, 2.0, 2.0, 7.0, 3.0])
    group = torch.tensor([4, 4, 4, 4, 4, 1, 1, 0, 2])
    assert preference_of(returns, group).tolist() == [0, 1, -1, 0, 0, 0, 0, 0, 0]
    mixed = torch.tensor([6, 7, 8, 0, 5, 1, 2, 3, 4])
    assert preference_of(returns[mixed], group[mixed]).tolist() == [0, 0, 0, 0, 0, 1, -1, 0, 0]


def test_tempered_episodes_are_ranked_among_themselves():
    agent = build("aepo", success_return=None)
    reward = torch.tensor([[1.0], [3.0], [9.0], [11.0]])
    made = episodes(reward)
    source = torch.tensor([ON_POLICY, ON_POLICY, TEMPERED, TEMPERED])
    batch = estimate_episodes(
        agent.policy, None, frozenset({"preferences"}), agent.config, made, source, source * 0, reward[:, 0] / 11, None
    )  # fmt: skip
    assert batch.success.tolist() == [False, True, False, True] and batch.preference.tolist() == [-1, 1, -1, 1]
    assert batch.group.tolist() == [0] * 4


# -- advantages along time ------------------------------------------------------------------------


def recurrence(rewards, values, after, ends, gamma, lam):
    """Advantages of one episode from its last step to its first; ``after`` is the final observation's value."""
    found, running = [], 0.0
    for t in reversed(range(len(rewards))):
        last = t == len(rewards) - 1
        ahead = (0.0 if ends else after) if last else values[t + 1]
        delta = rewards[t] + gamma * ahead - values[t]
        running = delta + (0.0 if last else gamma * lam * running)
        found.insert(0, running)
    return found


def test_advantages_of_whole_episodes_are_the_flat_recurrence():
    agent = build(Along, gamma=0.9, gae_lambda=0.8, n_groups=16, group_size=1, horizon=6)
    disturb(agent.policy)
    gathered, (e,) = gather(agent)
    batch = gathered.batch
    with torch.no_grad():
        after, values = agent.policy.values(e.last_obs)["value"], agent.policy(e.obs, e.action).values["value"]
    ends = e.terminated_t.any(1)
    assert 2 < int(ends.sum()) < len(ends) - 2 and len(e.length.unique()) > 3
    for k, n in enumerate(e.length.tolist()):
        expected = recurrence(
            e.reward_t[k, :n].tolist(), values[k, :n].tolist(), float(after[k]), bool(ends[k]), 0.9, 0.8
        )  # fmt: skip
        assert batch.advantage[k, :n].tolist() == pytest.approx(expected, abs=1e-5)
        target = (batch.advantage + values)[k, :n].tolist()
        assert batch.value_target[k, :n].tolist() == pytest.approx(target, abs=1e-5)
        assert not batch.advantage[k, n:].any() and not batch.value_target[k, n:].any()
    torch.testing.assert_close(batch.value_old[batch.mask], values[batch.mask])


def ruler(obs, action):
    """A policy whose value is the observation."""
    dist = DiagonalGaussian(torch.zeros_like(action), torch.zeros_like(action))
    return PolicyOutput(dist.log_prob(action), dist.entropy(), {"value": obs[..., 0]}, dist)


def test_advantages_by_hand_with_both_kinds_of_end():
    """V(s) is the first entry of s. gamma = lam = 1/2. A truncated row goes on with the final observation's value."""
    agent = build(Along, gamma=0.5, gae_lambda=0.5)
    obs = torch.tensor([[[2.0], [4.0], [99.0]], [[2.0], [4.0], [6.0]]])
    end = torch.tensor([[False, True, False], [False, False, True]])
    e = episodes(
        torch.tensor([[1.0, 1.0, 0.0], [1.0, 1.0, 1.0]]), obs=obs, last_obs=torch.tensor([[50.0], [8.0]]),
        length=torch.tensor([2, 3]), mask=torch.tensor([[True, True, False], [True, True, True]]),
        terminated_t=end & torch.tensor([[True], [False]]), truncated_t=end & torch.tensor([[False], [True]]),
    )  # fmt: skip
    rows, last_value = torch.zeros(2, dtype=torch.int64), torch.tensor([50.0, 8.0])
    batch = estimate_episodes(
        ruler, None, frozenset({"values"}), agent.config, e, rows, rows, rows.float(), last_value
    )  # fmt: skip
    # row 0: delta = 1 + 2 - 2, 1 - 4; row 1: 1 + 2 - 2, 1 + 3 - 4, 1 + 4 - 6
    assert batch.advantage.tolist() == [[1 - 3 / 4, -3, 0], [1 + (0 - 1 / 4) / 4, 0 - 1 / 4, -1]]
    assert batch.value_target.tolist() == [[2.25, 1, 0], [2.9375, 3.75, 5]]


def test_what_the_policy_did_not_choose_takes_no_time():
    """Advantages in a task of several turns are those of its decisions alone, put one behind the other."""
    agent = build(Along, "ctrlrl/TokenArithmetic-v0", gamma=0.9, gae_lambda=0.8)
    disturb(agent.policy)
    gathered, (e,) = gather(agent)
    batch = gathered.batch
    mine = e.mask[0]
    assert int(mine.sum()) == 6 and (e.mask == mine).all() and e.reward_t[:, -1].unique().numel() > 1
    with torch.no_grad():
        values = agent.policy(e.obs, e.action).values["value"]
    for k in range(len(e.length)):
        rewards, own = e.reward_t[k][mine].tolist(), values[k][mine].tolist()
        assert batch.advantage[k][mine].tolist() == pytest.approx(
            recurrence(rewards, own, 0.0, True, 0.9, 0.8), abs=1e-5
        )  # fmt: skip
    assert not batch.advantage[:, ~mine].any()


@pytest.mark.parametrize("env", [NOISY, "ctrlrl/TokenArithmetic-v0"])
def test_the_distance_to_the_reference_is_taken_off_the_reward(env):
    """The same episodes with and without; the recurrence is linear in the reward."""
    batches = []
    for coef in (0.0, 0.5):
        agent = build(Along, env, kl_reward_coef=coef, gamma=0.9, gae_lambda=0.8)
        disturb(agent.policy, 0.1)
        gathered, (e,) = gather(agent)
        batches.append(gathered.batch)
    plain, held = batches
    assert torch.equal(plain.action, held.action) and plain.logp_ref is None
    drift = torch.where(held.mask, held.logp_old - held.logp_ref, 0.0)
    assert drift.abs().max() > 0.01
    torch.testing.assert_close(held.sequence_return, plain.sequence_return - 0.5 * drift.sum(1), atol=1e-5, rtol=0)
    torch.testing.assert_close(held.score, plain.score)
    assert torch.equal(held.success, plain.success)
    for k in range(len(held.mask)):
        mine = held.mask[k]
        taken = recurrence((0.5 * drift[k][mine]).tolist(), [0.0] * int(mine.sum()), 0.0, True, 0.9, 0.8)
        change = (plain.advantage - held.advantage)[k][mine].tolist()
        assert change == pytest.approx(taken, abs=1e-4)
