"""What a loss asks for beside its groups: hints, demonstrations, retries, tempered episodes."""

from __future__ import annotations

import ctrlrl_envs  # noqa: F401 - registers the tasks
import gymnasium as gym
import pytest
import torch
from helpers.agents import EPISODES, NOISY, quiet
from helpers.envs import env_id
from helpers.policies import gen

from ctrlrl import api
from ctrlrl.data.episodes import Episodes
from ctrlrl.engine import extras
from ctrlrl.engine.config import EpisodesConfig, OnPolicyConfig
from ctrlrl.engine.player import Player
from ctrlrl.losses.ghpo import GHPO
from ctrlrl.types import DEMONSTRATION, HINTED, ON_POLICY, RETRIED, TEMPERED

SETTINGS = EpisodesConfig()
TASKS = ("Sort", "Copy", "Arithmetic", "Format", "Ladder", "Pattern")


def build(method, env, **settings):
    return api.make(method, env, seed=3, **EPISODES | settings)


def tokens(name, **kwargs):
    return gym.make(f"ctrlrl/Token{name}-v0", **kwargs).metadata["tokens"]


def draw(agent, wanted, seeds, group, settings=SETTINGS, temperature=1.0, seed=0):
    """All episodes and where they come from."""
    player = agent.feed.player
    player.new_iteration(0)
    return extras.draw_all(
        player, agent.loss, frozenset(wanted), seeds, group, settings, temperature, gen(seed)
    )  # fmt: skip


# -- hints ----------------------------------------------------------------------------------------


class Taught(Player):
    """Succeeds if it was shown the share of its solution that is its seed; remembers what it was asked."""

    def __init__(self, solutions):
        super().__init__(None, GHPO(), OnPolicyConfig(), 0, torch.device("cpu"))
        self.solutions, self.asked = solutions, []

    def _play(self, seeds, group, draw, noise):
        forced, forced_length = draw.forced, draw.forced_length
        self.asked.append((list(seeds), group.tolist(), forced))
        rows, steps = len(seeds), self.solutions.shape[1]
        solution = self.solutions[group]
        shown = torch.zeros_like(solution, dtype=torch.bool) if forced is None else forced >= 0
        assert forced is None or (forced_length >= shown.sum(1)).all()
        share = shown.sum(1) / (solution >= 0).sum(1)
        reward = torch.zeros(rows, steps)
        reward[:, -1] = (share >= torch.tensor(seeds)).float()
        return Episodes(
            obs=torch.zeros(rows, steps, 1), action=torch.full((rows, steps), len(self.asked)),
            mask=(solution >= 0) & ~shown, reward_t=reward, terminated_t=reward > 2, truncated_t=reward > 2,
            last_obs=torch.zeros(rows, 1), length=torch.full((rows,), steps), group=group, simulation_s=0.0,
            turn=torch.zeros(rows, steps, dtype=torch.int64), solution=solution,
        )  # fmt: skip


def taught(*seeds, solution=(3, 1, 2, 0)):
    """Two episodes of each seed."""
    group = torch.arange(len(seeds)).repeat_interleave(2)
    player = Taught(torch.tensor(solution).expand(len(seeds), -1))
    each = [s for s in seeds for _ in range(2)]
    drawn = extras.draw_all(player, player.loss, frozenset({"hints"}), each, group, SETTINGS, 1.0, gen())
    assert len(drawn.parts) == 1
    return player, drawn, drawn.parts[0]


def test_failed_groups_alone_are_asked_again_with_longer_hints():
    """Group 0 succeeds by itself, 1 from a half on, 2 from three quarters on: a share of 1/4 helps nobody."""
    player, drawn, e = taught(0.0, 0.5, 0.75)
    assert [groups for _, groups, _ in player.asked] == [[0, 0, 1, 1, 2, 2], [1, 1, 2, 2], [1, 1, 2, 2], [2, 2]]
    assert [seeds for seeds, _, _ in player.asked][1:] == [[0.5, 0.5, 0.75, 0.75]] * 2 + [[0.75, 0.75]]
    assert player.asked[0][2] is None
    assert [f[0].tolist() for _, _, f in player.asked[1:]] == [[3, -1, -1, -1], [3, 1, -1, -1], [3, 1, 2, -1]]
    assert e.group.tolist() == [0, 0, 1, 1, 2, 2] and e.returns().tolist() == [1.0] * 6
    assert e.action[:, 0].tolist() == [1, 1, 3, 3, 4, 4], "the last episodes take the place of the failed ones"
    assert e.mask.tolist() == [[True] * 4] * 2 + [[False, False, True, True]] * 2 + [[False] * 3 + [True]] * 2
    assert drawn.source.tolist() == [ON_POLICY] * 2 + [HINTED] * 4 and drawn.pivot.tolist() == [0] * 6
    assert drawn.discarded == 4 * (4 + 4 + 2)
    assert drawn.own.action.eq(1).all() and drawn.own.returns().tolist() == [1.0, 1.0, 0, 0, 0, 0]


def test_a_half_is_the_third_time_of_asking():
    player, _, e = taught(0.5)
    assert len(player.asked) == 3 and e.returns().tolist() == [1.0, 1.0]


def test_without_a_failed_group_nothing_more_is_played():
    player, drawn, e = taught(0.0, 0.0)
    assert len(player.asked) == 1 and drawn.discarded == 0 and e.mask.all()
    assert drawn.source.tolist() == [ON_POLICY] * 4


def test_a_hopeless_group_stays_failed_after_all_hints():
    player, _, e = taught(0.9, 0.0)
    assert len(player.asked) == 4 and e.returns().tolist() == [0.0, 0.0, 1.0, 1.0]


def test_one_success_spares_its_group():
    player = Taught(torch.tensor([[3, 1, 2, 0]] * 2))
    group = torch.tensor([0, 0, 1, 1])
    drawn = extras.draw_all(
        player, player.loss, frozenset({"hints"}), [0.9, 0.0, 0.9, 0.25], group, SETTINGS, 1.0, gen()
    )  # fmt: skip
    assert [groups for _, groups, _ in player.asked[1:]] == [[1, 1]]
    assert drawn.parts[0].returns().tolist() == [0.0, 1.0, 0.0, 1.0]


def test_the_share_is_of_positions_that_have_a_solution_and_rounded_up():
    player, _, e = taught(0.6, solution=(-1, 5, -1, -1, 6, 7, -1))
    shown = [f[0].tolist() for _, _, f in player.asked[1:]]
    assert shown == [[-1, 5, -1, -1, -1, -1, -1], [-1, 5, -1, -1, 6, -1, -1]]
    assert e.mask[0].tolist() == [False, False, False, False, False, True, False]


def test_hints_in_a_real_task():
    """A table that goes right only after two right tokens: half the solution is what it takes."""
    agent = build("ghpo", "ctrlrl/TokenPattern-v0", env_kwargs={"binary": True}, policy="tabular", n_groups=2)
    policy, pattern = agent.policy, [1, 2, 3, 0]
    with torch.no_grad():
        policy.table[:, 0] = 100.0
        row = policy.row(torch.tensor([[1, 2, 3, 0, 0], [1, 2, 3, 4, 0]]))
        policy.table[row[0], 3] = policy.table[row[1], 0] = 200.0
    gathered = agent.feed.gather(0, {}, 0.0)
    batch = gathered.batch
    assert batch.action.tolist() == [pattern] * 8 and batch.sequence_return.tolist() == [1.0] * 8
    assert batch.mask.tolist() == [[False, False, True, True]] * 8 and (batch.source == HINTED).all()
    assert gathered.steps == 3 * 8 * 4
    assert gathered.episodes == [(0.0, 4)] * 8, "what is reported is what the policy can do by itself"
    assert torch.equal(batch.logp_old == 0.0, ~batch.mask | (batch.logp_old > -1e-6))


# -- demonstrations -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TASKS)
def test_demonstrations_score_one_and_count_where_there_is_a_solution(name):
    agent = build("hpt", f"ctrlrl/Token{name}-v0")
    seeds, group = [5, 5, 9, 2, 2, 2], torch.tensor([0, 0, 1, 2, 2, 2])
    drawn = draw(agent, {"demonstrations"}, seeds, group)
    main, shown = drawn.parts
    assert drawn.source.tolist() == [ON_POLICY] * 6 + [DEMONSTRATION] * 3
    assert shown.group.tolist() == [0, 1, 2] and shown.returns().tolist() == [1.0] * 3 and shown.success.all()
    solution = main.solution[[0, 2, 3]]
    assert torch.equal(shown.mask, solution >= 0)
    assert torch.equal(shown.action[shown.mask], solution[shown.mask])
    assert torch.equal(shown.obs[:, 0], main.obs[[0, 2, 3], 0]), "of the same prompt"
    assert torch.equal(shown.turn >= 0, shown.mask)
    if name == "Arithmetic":
        assert shown.turn.tolist() == [[0, 0, -1, -1, -1, -1, 1, 1, -1, -1, -1, -1, 2, 2]] * 3
    else:
        assert (shown.turn[shown.mask] == 0).all()
    assert main.mask.any(), "the policy's own episodes are played freely"
    assert drawn.own is main


def test_demonstrations_reach_the_loss():
    agent = build("hpt", "ctrlrl/TokenArithmetic-v0")
    gathered = agent.feed.gather(0, {}, 0.0)
    batch = gathered.batch
    shown = batch.source == DEMONSTRATION
    assert shown.tolist() == [False] * 12 + [True] * 3 and batch.group[shown].tolist() == [0, 1, 2]
    assert (batch.score[shown] == 1).all() and batch.success[shown].all()
    out = agent.policy(batch.obs, batch.action)
    torch.testing.assert_close(batch.logp_old[batch.mask], out.logp.detach()[batch.mask], atol=1e-5, rtol=0)
    assert (batch.logp_old[shown][batch.mask[shown]] < 0).all()
    assert len(gathered.episodes) == 12 and gathered.steps == 15 * 14


def test_demonstrations_of_selected_groups_follow_their_ids():
    group = torch.tensor([3, 3, 0, 0, 0, 7])
    assert extras.first_rows(group).tolist() == [2, 0, 5]


# -- retries --------------------------------------------------------------------------------------


def pairs(drawn):
    base, again = drawn.parts
    half = len(base.length)
    assert torch.equal(drawn.pivot[:half], drawn.pivot[half:]) and torch.equal(base.group, again.group)
    assert drawn.source.tolist() == [ON_POLICY] * half + [RETRIED] * half
    pivot = drawn.pivot[:half]
    for k in range(half):
        p = int(pivot[k])
        assert p < int(base.length[k]) and p < int(again.length[k])
        assert torch.equal(base.action[k, :p], again.action[k, :p])
        assert torch.equal(base.obs[k, : p + 1], again.obs[k, : p + 1]), "the same up to where they part"
        assert not base.mask[k, :p].any() and not again.mask[k, :p].any()
    return base, again, pivot


def test_a_retry_shares_its_bases_prefix_and_both_count_from_the_pivot():
    agent = build("r3l", NOISY, horizon=8)
    group = torch.arange(4).repeat_interleave(4)
    drawn = draw(agent, {"retries"}, group.tolist(), group)
    base, again, pivot = pairs(drawn)
    assert base.group.tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
    for e in (base, again):
        exists = torch.arange(e.mask.shape[1]) < e.length.unsqueeze(1)
        assert torch.equal(e.mask, exists & (torch.arange(e.mask.shape[1]) >= pivot.unsqueeze(1)))
    own = drawn.own
    assert torch.equal(own.action, base.action) and own.mask.sum() == own.length.sum(), "reported as it was played"
    each = torch.arange(8)
    assert (base.action[each, pivot] != again.action[each, pivot]).all(), "they part at the pivot"
    assert torch.equal(base.obs[0, 0], base.obs[1, 0]) and not torch.equal(base.obs[1, 0], base.obs[2, 0])


def test_pivots_are_spread_over_an_episode():
    agent = build("r3l", env_id("OnlyTruncates"), horizon=4, env_kwargs={"length": 3})
    group = torch.zeros(600, dtype=torch.int64)
    pivot = draw(agent, {"retries"}, [1] * 600, group).pivot[:300]
    assert pivot.bincount(minlength=3).tolist() == pytest.approx([100, 100, 100], abs=35)


def test_with_turns_the_pivots_are_the_turns_borders():
    agent = build("r3l", "ctrlrl/TokenArithmetic-v0")
    group = torch.arange(6).repeat_interleave(20)
    drawn = draw(agent, {"retries"}, group.tolist(), group)
    base, again, pivot = pairs(drawn)
    assert pivot.bincount(minlength=13).nonzero().flatten().tolist() == [0, 6, 12]
    assert torch.equal(base.turn, again.turn) and torch.equal(again.mask, base.mask)
    place = torch.arange(14)
    assert torch.equal(base.mask, (base.turn >= 0) & (place >= pivot.unsqueeze(1)))
    assert (base.action[pivot == 0] != again.action[pivot == 0]).any()


def test_groups_of_different_even_sizes():
    agent = build("r3l", NOISY, horizon=4)
    group = torch.tensor([0, 0, 1, 1, 1, 1, 2, 2])
    drawn = draw(agent, {"retries"}, group.tolist(), group)
    base, again, _ = pairs(drawn)
    assert base.group.tolist() == again.group.tolist() == [0, 1, 1, 2]


def test_what_retries_refuse():
    agent = build("r3l", NOISY, horizon=4)
    with pytest.raises(ValueError, match=r"must be even; found \[2, 3\]"):
        draw(agent, {"retries"}, [0] * 5, torch.tensor([0, 0, 1, 1, 1]))
    with pytest.raises(ValueError, match="retries cannot be combined with tempered"):
        draw(agent, {"retries", "tempered"}, [0] * 2, torch.tensor([0, 0]))
    with pytest.raises(ValueError, match="must be even"):
        quiet(build("r3l", NOISY, horizon=4, group_size=3), 1)


def test_retries_reach_the_loss():
    agent = build("r3l", NOISY, horizon=8)
    gathered = agent.feed.gather(0, {}, 0.0)
    batch = gathered.batch
    assert batch.mask.shape[0] == 12 and len(gathered.episodes) == 6
    assert batch.group.tolist() == [0, 0, 1, 1, 2, 2] * 2
    assert batch.source.tolist() == [ON_POLICY] * 6 + [RETRIED] * 6
    place = torch.arange(batch.mask.shape[1])
    assert not batch.mask[place < batch.pivot.unsqueeze(1)].any() and batch.mask.any(1).all()
    assert gathered.steps == int(gathered.valid.sum()), "the prefix is simulated again"


# -- tempered -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("share", "groups"), [(0.25, 2), (0.5, 4), (1.0, 8), (0.01, 1)])
def test_a_share_of_the_groups_is_sampled_again(share, groups):
    group = torch.arange(8).repeat_interleave(3)
    rows = extras.tempered_groups(group, share, gen(1))
    assert len(rows) == 3 * groups and len(group[rows].unique()) == groups
    assert (group[rows].bincount()[group[rows].unique()] == 3).all(), "whole groups"
    others = [extras.tempered_groups(group, share, gen(k)).tolist() for k in range(5)]
    assert share == 1.0 or len({tuple(o) for o in others}) > 1, "not always the same ones"


def test_tempered_rows_come_behind_and_start_like_their_group():
    agent = build("aepo", "ctrlrl/TokenSort-v0")
    seeds, group = [4, 4, 7, 7, 8, 8, 9, 9], torch.arange(4).repeat_interleave(2)
    settings = EpisodesConfig(tempered_share=0.5)
    drawn = draw(agent, {"tempered"}, seeds, group, settings, 2.0)
    main, hot = drawn.parts
    assert drawn.source.tolist() == [ON_POLICY] * 8 + [TEMPERED] * 4 and drawn.own is main
    for k, g in enumerate(hot.group.tolist()):
        assert torch.equal(hot.obs[k, 0], main.obs[2 * g, 0])
        assert not torch.equal(hot.action[k], main.action[2 * g]), "drawn with noise of their own"


def agent_with_opinions(env, **settings):
    agent = build("aepo", env, **settings)
    with torch.no_grad():
        for p in agent.policy.parameters():
            p.add_(torch.randn(p.shape, generator=gen(5)))
    return agent


@pytest.mark.parametrize("env", ["ctrlrl/TokenPattern-v0", env_id("Choice")])
def test_the_temperature_moves_the_entropy_of_what_is_drawn(env):
    more = {"policy": "tabular"} if "Token" in env else {"horizon": 2}
    agent = agent_with_opinions(env, **more)
    group = torch.arange(2).repeat_interleave(250)
    settings = EpisodesConfig(tempered_share=1.0)
    spread = []
    for temperature in (0.4, 1.0, 3.0):
        main, hot = draw(agent, {"tempered"}, [0] * 500, group, settings, temperature).parts
        share = hot.action[:, 0].bincount(minlength=4) / 500
        logits = agent.policy(hot.obs, hot.action).dist.params()["logits"][0, 0].detach() / temperature
        torch.testing.assert_close(share[: len(logits)], logits.softmax(-1), atol=0.08, rtol=0)
        spread.append(float(torch.special.entr(share).sum()))
        plain = main.action[:, 0].bincount(minlength=4) / 500
        torch.testing.assert_close(plain[: len(logits)], (logits * temperature).softmax(-1), atol=0.08, rtol=0)
    assert spread[0] < spread[1] - 0.05 and spread[1] < spread[2] - 0.05


def test_the_temperature_scales_a_gaussians_variance():
    agent = build("aepo", NOISY, horizon=2, log_std_init=-1.0)
    group, settings = torch.zeros(800, dtype=torch.int64), EpisodesConfig(tempered_share=1.0)
    for temperature in (0.25, 4.0):
        _, hot = draw(agent, {"tempered"}, [0] * 800, group, settings, temperature).parts
        std = float(hot.action[:, 0].std())
        assert std == pytest.approx(temperature**0.5 * 0.3679, rel=0.1)


@pytest.mark.parametrize("env", ["ctrlrl/TokenSort-v0", env_id("Choice"), NOISY])
def test_what_is_tempered_is_told_in_the_policys_own_terms(env):
    agent = agent_with_opinions(env, tempered_share=0.5, **({} if "Token" in env else {"horizon": 4}))
    gathered = agent.feed.gather(0, {"temperature": torch.tensor(3.0)}, 0.0)
    batch = gathered.batch
    hot = batch.source == TEMPERED
    assert hot.tolist() == [False] * 12 + [True] * 8 and len(gathered.episodes) == 12
    out = agent.policy(batch.obs, batch.action)
    exists = gathered.valid.T
    torch.testing.assert_close(batch.logp_old[exists], out.logp.detach()[exists], atol=1e-5, rtol=0)
