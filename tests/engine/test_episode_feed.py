"""Batches of whole episodes: outcomes, advantages along time, likelihoods, references, seeds, replay."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import ctrlrl_envs  # noqa: F401 - registers the tasks
import gymnasium as gym
import pytest
import torch
from gymnasium.vector import AutoresetMode, SyncVectorEnv
from helpers import envs
from helpers.agents import EPISODES, NOISY, quiet
from helpers.envs import env_id
from helpers.policies import gen

from ctrlrl import api
from ctrlrl.core.select import Selection
from ctrlrl.core.support import restricted_logp, top_p_support
from ctrlrl.data.episodes import Episodes
from ctrlrl.losses.base import PolicyLoss
from ctrlrl.losses.ppo import PPO
from ctrlrl.types import ON_POLICY, REPLAYED, TEMPERED


class Along(PPO):
    """PPO on whole episodes."""

    needs: ClassVar = frozenset({"values", "groups"})


class Outcome(PPO):
    """The same from outcomes alone."""

    needs: ClassVar = frozenset({"groups", "score", "success"})
    critics: ClassVar = ()


class Turns:
    """Chooses seeds in turn, one group of 3 and one of 1 episodes; remembers what it is shown."""

    def __init__(self) -> None:
        self.shown: list[tuple[Any, ...]] = []

    def initial(self, pool, features):
        self.features = features
        return {"played": torch.zeros(pool), "next": torch.tensor(0)}

    def select(self, state, n_groups, group_size, progress, generator):
        index = (state["next"] + torch.arange(2)) % len(state["played"])
        return Selection(index, torch.tensor([3, 1]))

    def learn(self, state, index, score, features):
        self.shown.append((index, score, features))
        return {"played": state["played"].index_add(0, index, torch.ones(len(index))), "next": state["next"] + 2}


@dataclass(frozen=True)
class Choosing(Outcome):
    """Outcomes of chosen seeds."""

    def selector(self):
        return Turns()


@dataclass(frozen=True)
class ChoosingRetries(Choosing):
    """With retries, whose rows come in another order; and tempered episodes, which no selector sees."""

    needs: ClassVar = frozenset({"groups", "score", "retries"})

    def selector(self):
        turns = Turns()
        turns.select = lambda state, *_: Selection(torch.tensor([4, 1]), torch.tensor([4, 2]))
        return turns


@dataclass(frozen=True)
class ChoosingTempered(Choosing):
    needs: ClassVar = frozenset({"groups", "score", "tempered"})


@dataclass(frozen=True)
class Keeping(Outcome):
    """Would keep every row."""

    needs: ClassVar = frozenset({"groups", "score", "tempered", "replay"})


class Verdict(envs.Noisy):
    """Says at the end whether the first action was positive; with ``shy``, only if it was."""

    def __init__(self, shy: bool = False) -> None:
        self.shy = shy

    def reset(self, **kwargs: Any):
        self.good = None
        return super().reset(**kwargs)

    def step(self, action):
        self.good = bool(action[0] > 0) if self.good is None else self.good
        obs, reward, terminated, _, _ = super().step(action)
        terminated = terminated or reward > 0.3
        told = terminated and (self.good or not self.shy)
        return obs, reward, terminated, False, {"is_success": self.good} if told else {}


gym.register("feed/Verdict-v0", f"{__name__}:Verdict")
VERDICT = f"{__name__}:feed/Verdict-v0"


def build(method, env=NOISY, **settings):
    if isinstance(method, type) and issubclass(method, PolicyLoss):
        method = f"{__name__}:{method.__name__}"
    more = {} if "Token" in str(env) else {"horizon": 8}
    return api.make(method, env, seed=settings.pop("seed", 3), **EPISODES | more | settings)


def gather(agent, iteration=0, knobs: Mapping[str, Any] | None = None):
    """One iteration's data, and all the episodes it is made of."""
    feed, seen = agent.feed, []
    play = feed.player.play
    feed.player.play = lambda *args, **kwargs: seen.append(play(*args, **kwargs)) or seen[-1]
    try:
        return feed.gather(iteration, knobs or {}, 0.0), seen
    finally:
        del feed.player.play


def disturb(policy, size=0.3, seed=1):
    with torch.no_grad():
        for p in policy.parameters():
            p.add_(size * torch.randn(p.shape, generator=gen(seed)))


def watch(agent):
    """Every update's batch, with what the policy makes of it before the first step."""
    seen, run = [], agent.updater.run

    def spy(batch, knobs, generator):
        with torch.no_grad():
            out = agent.policy(batch.obs, batch.action)
        seen.append((batch, out))
        return run(batch, knobs, generator)

    agent.updater.run = spy
    return seen


def episodes(reward, **fields):
    """Episodes of which only the rewards matter, or ``fields``."""
    rows, steps = reward.shape
    never = torch.zeros(rows, steps, dtype=torch.bool)
    made = {
        "obs": torch.zeros(rows, steps, 3), "action": torch.zeros(rows, steps, 1), "mask": ~never,
        "reward_t": reward, "terminated_t": never, "truncated_t": never, "last_obs": torch.zeros(rows, 3),
        "length": torch.full((rows,), steps), "group": torch.zeros(rows, dtype=torch.int64), "simulation_s": 0.0,
    }  # fmt: skip
    return Episodes(**made | fields)


# -- groups and seeds -----------------------------------------------------------------------------


@pytest.mark.parametrize("env", [NOISY, "ctrlrl/TokenSort-v0"])
def test_episodes_of_a_group_start_equal_and_others_do_not(env):
    agent = build(Outcome, env)
    starts = []
    for iteration in range(2):
        batch = gather(agent, iteration)[0].batch
        assert batch.group.tolist() == [0] * 4 + [1] * 4 + [2] * 4 and (batch.source == ON_POLICY).all()
        first = batch.obs[:, 0].view(3, 4, -1)
        assert (first == first[:, :1]).all()
        starts += first[:, 0].tolist()
        actions = batch.action[:4].flatten(1)
        assert len(actions.unique(dim=0)) > 1
    assert len({tuple(s) for s in starts}) == 6, "new ones in every iteration"


def test_the_number_of_environments_does_not_matter():
    batches = [gather(build(Along, n_envs=n))[0].batch for n in (1, 3, 50)]
    for other in batches[1:]:
        assert torch.equal(batches[0].mask, other.mask) and torch.equal(batches[0].group, other.group)
        for name in ("obs", "action", "logp_old", "advantage", "value_target", "sequence_return", "score"):
            torch.testing.assert_close(getattr(batches[0], name), getattr(other, name), atol=1e-5, rtol=1e-5)


def test_what_is_reported_of_an_iteration():
    gathered, (e,) = gather(build(Along))
    assert gathered.steps == int(e.length.sum()) == int(gathered.valid.sum()) == int(gathered.batch.mask.sum())
    assert gathered.episodes == [
        (pytest.approx(float(r)), int(n)) for r, n in zip(e.returns(), e.length, strict=True)
    ]  # fmt: skip
    assert gathered.obs.shape == (*gathered.valid.shape, 3) and len(e.length.unique()) > 1
    b = gathered.batch
    assert float(gathered.stats["entropy"]) == pytest.approx(float(b.entropy_old[b.mask].mean()))
    assert float(gathered.stats["success"]) == pytest.approx(float(b.success.float().mean()))


def test_a_pool_of_seeds_comes_back():
    agent, starts, per_iteration = build(Outcome, seed_pool=3, n_groups=2), set(), []
    for iteration in range(6):
        first = gather(agent, iteration)[0].batch.obs[:, 0].view(2, 4, -1)[:, 0]
        per_iteration.append({tuple(s) for s in first.tolist()})
        starts |= per_iteration[-1]
    assert len(starts) == 3 and all(len(s) == 2 for s in per_iteration), "and none twice in one iteration"
    assert len({frozenset(s) for s in per_iteration}) > 1
    many = gather(build(Outcome, seed_pool=2, n_groups=5, group_size=1))[0].batch.obs[:, 0]
    assert many.unique(dim=0, return_counts=True)[1].sort().values.tolist() == [2, 3]


@pytest.mark.parametrize(("env", "size"), [(NOISY, 3), ("ctrlrl/TokenPattern-v0", 5 * 5), (env_id("DictObs"), 55)])
def test_selectors_see_the_first_observation_of_every_seed(env, size):
    agent = build(Choosing, env, seed_pool=5)
    turns = agent.feed.selector
    for iteration in range(2):
        batch = gather(agent, iteration)[0].batch
        assert batch.group.tolist() == [0, 0, 0, 1], "groups as large as it wants"
        index, score, features = turns.shown[-1]
        assert index.tolist() == [2 * iteration] * 3 + [2 * iteration + 1]
        assert torch.equal(score, batch.score) and torch.equal(features, turns.features[index])
        if env == NOISY:
            assert torch.equal(features, batch.obs[:, 0]), "the features of a seed are those of its episodes"
    assert turns.features.shape == (5, size) and turns.features.dtype == torch.float32
    assert agent.feed.selector_state["played"].tolist() == [3, 1, 3, 1, 0]
    again = build(Choosing, env, seed_pool=5)
    again.feed.restore(agent.feed.tensors(), json.loads(json.dumps(agent.feed.counters())))
    gather(again, 2)
    assert again.feed.selector.shown[0][0].tolist() == [4, 4, 4, 0]
    assert again.feed.selector_state["played"].tolist() == [4, 1, 3, 1, 3]


def test_a_selector_learns_from_the_policys_own_episodes_in_their_order():
    agent = build(ChoosingRetries, seed_pool=5)
    gathered, (base, _) = gather(agent)
    index, score, features = agent.feed.selector.shown[0]
    assert index.tolist() == [4, 4, 1] and torch.equal(features, base.obs[:, 0])
    assert torch.equal(score, gathered.batch.score[:3])
    agent = build(ChoosingTempered, seed_pool=5, tempered_share=1.0)
    gathered, _ = gather(agent)
    assert gathered.batch.mask.shape[0] == 8 and agent.feed.selector.shown[0][0].tolist() == [0, 0, 0, 1]


def test_choosing_needs_a_pool_and_an_environment_that_can_be_built_again():
    with pytest.raises(ValueError, match="set seed_pool"):
        build(Choosing)
    live = SyncVectorEnv([envs.Noisy] * 3, autoreset_mode=AutoresetMode.DISABLED)
    assert gather(build(Outcome, live, seed_pool=5))[0].batch.mask.any(1).all()
    with pytest.raises(ValueError, match="can be built again"):
        gather(build(Choosing, live, seed_pool=5))


# -- likelihoods ----------------------------------------------------------------------------------


@pytest.mark.parametrize("env", [env_id("Choice"), "ctrlrl/TokenSort-v0"])
def test_a_restricted_policy_is_the_one_that_sampled(env):
    agent = build("nlpo", env, mask_top_p=0.6, mask_every=2, epochs=2, gamma=1.0)
    disturb(agent.policy)
    seen = watch(agent)
    agent.span = (0, 10**6)
    for iteration in range(3):
        lagged = None if iteration != 1 else {k: v.clone() for k, v in agent.feed.player.lagged.state_dict().items()}
        agent._iterate()
        batch, out = seen[-1]
        mine, player = batch.mask, agent.feed.player
        assert batch.support.gather(-1, batch.action.unsqueeze(-1)).all(), "what was done was allowed"
        assert not batch.support[mine].all(-1).all(), "and not everything was"
        logits = out.dist.params()["logits"]
        expected = restricted_logp(logits, batch.support, batch.action)
        assert torch.equal(batch.logp_old[mine], expected[mine]) and (expected - out.logp)[mine].max() > 0.05
        ratio = (agent.loss.restricted(batch, out).logp - batch.logp_old)[mine].exp()
        assert (ratio == 1.0).all(), "before the first step"
        with torch.no_grad():
            masking = player.lagged(batch.obs, batch.action).dist.params()["logits"]
        allowed = top_p_support(masking, 0.6, 2)
        assert (allowed == batch.support)[mine].float().mean() > 0.999  # but for rounding at the edge
        if lagged is not None:
            now = player.lagged.state_dict()
            assert all(torch.equal(v, now[k]) for k, v in lagged.items()), "copied every second iteration only"


@pytest.mark.parametrize("env", [NOISY, env_id("Choice"), "ctrlrl/TokenSort-v0"])
def test_the_sampler_in_half_precision_differs_a_little(env):
    gaps = {}
    for dtype in ("float32", "bfloat16"):
        agent = build("mini_rl", env, behaviour_dtype=dtype)
        disturb(agent.policy)
        batch = gather(agent)[0].batch
        assert batch.logp_behaviour.dtype == batch.logp_old.dtype == torch.float32
        out = agent.policy(batch.obs, batch.action)
        torch.testing.assert_close(batch.logp_old[batch.mask], out.logp.detach()[batch.mask], atol=1e-5, rtol=0)
        gaps[dtype] = (batch.logp_behaviour - batch.logp_old)[batch.mask].abs()
    told = batch.logp_behaviour[batch.mask]
    assert (told != told.bfloat16().float()).any(), "its probabilities are formed in full precision"
    assert gaps["float32"].max() < 1e-5
    assert 1e-4 < gaps["bfloat16"].max() < 0.3 and gaps["bfloat16"].mean() < 0.05


def test_what_nothing_asks_for_is_left_out():
    batch = gather(build(Outcome))[0].batch
    assert batch.logp_ref is None and batch.dist_ref is None and batch.logp_behaviour is None
    assert batch.preference is None and batch.support is None and not batch.advantage.any()
    assert batch.rewards.shape == (12, 1) and batch.task.tolist() == [0] * 12


# -- references -----------------------------------------------------------------------------------


def test_the_reference_stays_as_the_policy_began():
    agent = build("super_hf")
    start = {k: v.clone() for k, v in agent.policy.state_dict().items()}
    seen = watch(agent)
    quiet(agent, 200)
    now = agent.policy.state_dict()
    assert any(not torch.equal(v, now[k]) for k, v in start.items())
    assert all(torch.equal(v, agent.reference.state_dict()[k]) for k, v in start.items())
    assert not any(p.requires_grad for p in agent.reference.parameters())
    (first, _), (last, out) = seen[0], seen[-1]
    torch.testing.assert_close(first.logp_ref, first.logp_old)
    with torch.no_grad():
        expected = agent.reference(last.obs, last.action)
    torch.testing.assert_close(last.logp_ref[last.mask], expected.logp[last.mask])
    torch.testing.assert_close(last.dist_ref["mean"], expected.dist.params()["mean"])
    assert (last.logp_ref - out.logp)[last.mask].abs().max() > 1e-4


def test_a_run_as_the_reference(tmp_path):
    """Of a method with a critic, and not needed any more once its policy is in a checkpoint."""
    teacher = build("ppo", n_steps=16, seed=8)
    quiet(teacher, 32, run_dir=tmp_path / "teacher")
    agent = build("super_hf", reference=str(tmp_path / "teacher"))
    expected = {k: v for k, v in teacher.policy.state_dict().items() if not k.startswith("critics.")}
    found = agent.reference.state_dict()
    assert found.keys() == expected.keys() and all(torch.equal(v, found[k]) for k, v in expected.items())
    batch = gather(agent)[0].batch
    with torch.no_grad():
        logp = teacher.policy(batch.obs, batch.action).logp
    torch.testing.assert_close(batch.logp_ref[batch.mask], logp[batch.mask])
    quiet(agent, 20, run_dir=tmp_path / "student")
    (tmp_path / "teacher").rename(tmp_path / "elsewhere")
    loaded = api.load(tmp_path / "student").reference.state_dict()
    assert all(torch.equal(v, loaded[k]) for k, v in expected.items())


# -- replay ---------------------------------------------------------------------------------------


def test_replayed_rows_reach_the_loss_with_the_policy_moved_on():
    agent = build("spear", "ctrlrl/TokenPattern-v0", policy="tabular", learning_rate=0.1, replay_age=2, replay_rows=20)
    seen = watch(agent)
    agent.span = (0, 10**6)
    stats = [agent._iterate() for _ in range(5)]
    kept = {}
    for iteration, (batch, out) in enumerate(seen):
        fresh = batch.source == ON_POLICY
        assert fresh.tolist() == sorted(fresh.tolist(), reverse=True) and int(fresh.sum()) == 12
        assert stats[iteration]["train/replayed"] == int((~fresh).sum()) <= 20
        again = batch.source == REPLAYED
        assert torch.equal(again, ~fresh) and (again.any() or iteration == 0)
        ratio = (out.logp - batch.logp_old).exp()
        torch.testing.assert_close(ratio[fresh], torch.ones_like(ratio[fresh]))
        if iteration:
            assert ((ratio[again] - 1).abs() > 0.01).any()
            old = {row for k in (iteration - 1, iteration - 2) if k in kept for row in kept[k]}
            back = {(tuple(a), tuple(p)) for a, p in rows_of(batch, again)}
            assert back <= old, "from the last two iterations, with the probabilities of their time"
        kept[iteration] = {(tuple(a), tuple(p)) for a, p in rows_of(batch, fresh)}
    assert len(agent.feed.replay.age) <= 20


def test_only_the_policys_own_rows_are_kept_and_once():
    agent, before = build(Keeping, tempered_share=1.0, n_groups=2, group_size=1), []
    for iteration in range(3):
        gathered, (own, _) = gather(agent, iteration)
        assert gathered.batch.source.tolist() == [ON_POLICY] * 2 + [TEMPERED] * 2 + [REPLAYED] * 2 * iteration
        assert float(gathered.stats["replayed"]) == 2 * iteration
        assert gathered.batch.action[4:, 0].tolist() == before
        before += own.action[:, 0].tolist()


def rows_of(batch, which):
    return zip(batch.action[which].tolist(), batch.logp_old[which].tolist(), strict=True)


def test_replay_is_saved():
    a, b = (build("spear", "ctrlrl/TokenPattern-v0", policy="tabular", learning_rate=0.1) for _ in range(2))
    a.span = (0, 10**6)
    for _ in range(3):
        a._iterate()
    b.restore({k: v.clone() for k, v in a.tensors().items()}, json.loads(json.dumps(a.counters())))
    seen = [watch(x) for x in (a, b)]
    for x in (a, b):
        x._iterate()
    (batch, _), (other, _) = seen[0][0], seen[1][0]
    assert (batch.source == REPLAYED).any()
    for name in ("action", "logp_old", "advantage", "source", "group", "mask"):
        assert torch.equal(getattr(batch, name), getattr(other, name)), name
