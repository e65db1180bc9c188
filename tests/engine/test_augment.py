"""Generated rows in an offline learner's batches: how many, when they are made, for whom, and across a resume."""

import dataclasses
import os
import signal

import numpy as np
import pytest
import torch
from helpers.agents import Recorder, assert_same_tensors, quiet
from helpers.offline import recorded, tiny, trace, watch

from ctrlrl import api
from ctrlrl.engine import checkpoint, hooks
from ctrlrl.engine.config import ConfigError
from ctrlrl.engine.seeding import derive
from ctrlrl.nets.trajectory_codec import Steps

LEARNERS = ["bc", "cql", "edac", "iql", "rebrac", "sac_n", "td3_bc"]
PROBE = torch.linspace(-1.0, 1.0, 12).reshape(4, 3)


class Known:
    """Rows [20] that tell where they are from: observations are (100, update, row), the next ones 50 more.

    Rewards are random, actions the policy's: a set made by another policy or with other random numbers is another.
    """

    def __init__(self, agent):
        self.agent, self.calls = agent, []
        self.statistics = {"own": 7.0}

    def rows(self, policy, first, generator):
        at, n = self.agent.learner.updates, 20
        self.calls.append((at, first, policy.mode(PROBE)))
        obs = torch.stack([torch.full((n,), 100.0), torch.full((n,), float(at)), torch.arange(n).float()], 1)
        done = (torch.arange(n) % 4 == 0).float()
        return Steps(obs, policy.mode(obs / 100), torch.rand(n, generator=generator), done, obs + 50)


def augmented(name="td3_bc", source=Known, data=None, **settings):
    """An agent whose rows are made by ``source``, three quarters of each batch of eight."""
    agent = api.make(name, dataset=data or recorded(), **tiny(name, augment="fed below", augment_share=0.75) | settings)
    return fed(agent, source)


def fed(agent, source=Known):
    made = source(agent)
    agent._row_source = lambda: made
    agent.made = made
    return agent


def generated(batch):
    return batch.obs[:, 0] == 100.0


# -- batches --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("share", "size", "expected"), [(0.9375, 256, 240), (0.75, 8, 6), (0.3, 8, 2), (1.0, 8, 8), (0.05, 64, 3)]
)
def test_of_each_batch_exactly_the_rounded_share_is_generated(share, size, expected):
    agent = augmented(augment_share=share, batch_size=size, updates_per_graph=2, iteration_steps=4)
    seen = watch(agent)
    quiet(agent, 4)
    assert len(seen) == 2
    for graph in seen:
        assert generated(graph).unflatten(0, (2, size)).sum(1).tolist() == [expected] * 2
    real = seen[0].obs[~generated(seen[0])]
    trace(agent.data, real)  # raises where a row is neither


def test_every_row_of_a_set_is_drawn_and_unchanged():
    agent = augmented(batch_size=512)
    seen = watch(agent)
    quiet(agent, 1)
    batch = seen[0]
    mine = generated(batch)
    row = batch.obs[mine][:, 2].long()
    assert set(row.tolist()) == set(range(20))
    assert torch.equal(batch.next_obs[mine], batch.obs[mine] + 50)
    assert torch.equal(batch.terminated_t[mine], (row % 4 == 0).float())


def test_rewards_are_mapped_once_and_like_the_recorded_ones():
    agents = [augmented(reward_scale=scale, reward_shift=shift) for scale, shift in ((1.0, 0.0), (2.0, -3.0))]
    plain, mapped = (watch(agent) for agent in agents)
    for agent in agents:
        quiet(agent, 3)
    assert torch.equal(plain[0].obs, mapped[0].obs)
    torch.testing.assert_close(mapped[0].reward_t, plain[0].reward_t * 2.0 - 3.0)
    assert plain[0].reward_t.std() > 0.1


@pytest.mark.parametrize("name", [n for n in LEARNERS if n != "rebrac"])
def test_every_learner_of_single_steps_learns_from_them(name):
    agent = augmented(name)
    seen = watch(agent)
    quiet(agent, 6)
    assert all(int(generated(batch).sum()) == 6 for batch in seen)


# -- when, and for whom ---------------------------------------------------------------------------


def test_sets_are_made_before_every_multiple_of_the_interval_by_the_policy_of_that_moment():
    agent, policies = augmented(augment_every=4), []
    seen, run = [], agent.learner.run

    def noted(batch, noise, count):
        policies.append(agent.policy.mode(PROBE))
        seen.append(batch.obs[generated(batch)][:, 1].unique().tolist())
        return run(batch, noise, count)

    agent.learner.run = noted
    quiet(agent, 11)
    assert [(at, first) for at, first, _ in agent.made.calls] == [(0, True), (4, False), (8, False)]
    assert seen == [[0.0]] * 4 + [[4.0]] * 4 + [[8.0]] * 3
    for at, _, outputs in agent.made.calls:
        assert torch.equal(outputs, policies[at])
    assert not torch.equal(policies[0], policies[4]) and not torch.equal(policies[4], policies[8])


def test_within_a_graph_a_set_waits_and_the_next_one_does_not():
    agent = augmented(augment_every=3, updates_per_graph=2, iteration_steps=4)
    quiet(agent, 8)
    assert [at for at, *_ in agent.made.calls] == [0, 4, 6]


def test_training_on_goes_on_with_the_set_there_is():
    agent = augmented(augment_every=5)
    quiet(agent, 6)
    quiet(agent, 6)
    assert [(at, first) for at, first, _ in agent.made.calls] == [(0, True), (5, False), (10, False)]


def test_the_log_compares_generated_and_recorded_rows():
    agent = augmented(augment_every=4, reward_scale=2.0, reward_shift=-3.0)
    log = Recorder()
    quiet(agent, 9, callbacks=[log])
    lines = [metrics for _, metrics in log.of("update")]
    found = [{k.removeprefix("augment/"): v for k, v in line.items() if k.startswith("augment/")} for line in lines]
    assert [bool(f) for f in found] == [True, True, True]  # sets at 0, 4 and 8
    data = agent.data
    rewards = 2.0 * data.rewards[data.usable] - 3.0
    expected = {
        "rows": 20.0, "own": 7.0, "terminal_rate": 0.25, "terminal_rate_data": data.terminals[data.usable].mean(),
        "reward_mean_data": rewards.mean(), "reward_std_data": rewards.std(),
    }  # fmt: skip
    drawn = torch.rand(20, generator=torch.Generator().manual_seed(derive(0, "augment", 8)), dtype=torch.float32)
    expected |= {"reward_mean": 2.0 * drawn.numpy().mean() - 3.0, "reward_std": 2.0 * drawn.numpy().std()}
    assert found[2] == pytest.approx(expected, rel=1e-5)
    assert found[0]["reward_mean"] != found[2]["reward_mean"]


def test_lines_without_a_new_set_say_nothing_of_it():
    agent, log = augmented(augment_every=6), Recorder()
    quiet(agent, 9, callbacks=[log])
    assert [any(k.startswith("augment/") for k in m) for _, m in log.of("update")] == [True, False, True]


def test_rows_that_are_not_finite_stop_the_training():
    class Broken(Known):
        def rows(self, *args):
            steps = super().rows(*args)
            return steps._replace(next_obs=torch.full_like(steps.next_obs, float("inf")))

    with pytest.raises(FloatingPointError, match=r"next_obs.*kappa"):
        quiet(augmented(source=Broken), 3)


def test_a_source_without_a_single_row_is_refused():
    class Empty(Known):
        def rows(self, *args):
            return Steps(*(part[:0] for part in super().rows(*args)))

    with pytest.raises(ConfigError, match="no transition"):
        quiet(augmented(source=Empty), 3)


# -- without --------------------------------------------------------------------------------------


def test_without_generated_rows_batches_are_the_draws_they_always_were():
    agent = api.make("td3_bc", dataset=recorded(), seed=3, **tiny("td3_bc"))
    seen = watch(agent)
    quiet(agent, 6)
    rows = np.flatnonzero(agent.data.usable)
    for iteration in (0, 1):
        drawing = torch.Generator().manual_seed(derive(3, "draw", iteration))
        index = torch.randint(len(rows), (3, 8), generator=drawing)
        for k in range(3):
            assert trace(agent.data, seen[3 * iteration + k].obs).tolist() == rows[index[k]].tolist()


def test_a_share_of_no_row_is_a_run_without_and_does_not_look_for_the_model(tmp_path):
    plain = api.make("td3_bc", dataset=recorded(), **tiny("td3_bc"))
    settings = tiny("td3_bc", augment=str(tmp_path / "nowhere"), kappa=1.0)
    agents = [api.make("td3_bc", dataset=recorded(), **settings, augment_share=share) for share in (0.0, 0.06)]
    for agent in (plain, *agents):
        quiet(agent, 6)
    for agent in agents:
        assert_same_tensors(plain.tensors(), agent.tensors())
        assert plain.counters() == agent.counters()
    with pytest.raises(FileNotFoundError, match="nowhere"):
        quiet(api.make("td3_bc", dataset=recorded(), **settings), 6)


# -- resuming -------------------------------------------------------------------------------------


class Stop:
    """Dies after ``iteration``, without saving."""

    def __init__(self, iteration):
        self.iteration = iteration

    def on_update(self, agent, step, metrics):
        if agent.iteration == self.iteration:
            raise KeyboardInterrupt


def keep(agent, steps, folder, **kwargs):
    return agent.learn(steps, run_dir=folder, progress=False, tensorboard=False, **kwargs)


@pytest.mark.parametrize(
    ("every", "stored"), [(7, True), (10, False), (100, True)], ids=["between two sets", "a set is due", "one set"]
)
def test_killed_and_resumed_equals_never_killed(every, stored, tmp_path):
    """Checkpoints are written every ten iterations: at update 30."""
    whole = augmented(augment_every=every)
    expected = watch(whole)
    keep(whole, 48, tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        keep(augmented(augment_every=every), 48, tmp_path / "run", callbacks=[Stop(13)])
    kept, state = checkpoint.read(tmp_path / "run" / "checkpoints" / "last.safetensors")
    assert any(k.startswith("generated/") for k in kept) == stored
    assert state["generated_at"] == {7: 28, 10: 20, 100: 0}[every]
    again = fed(augmented(augment_every=every))
    seen = watch(again)
    again.resume(tmp_path / "run", progress=False, tensorboard=False)
    assert len(seen) == 18
    for a, b in zip(expected[30:], seen, strict=True):
        assert all(torch.equal(x, y) for x, y in zip(a[:5], b[:5], strict=True))
    assert_same_tensors(whole.tensors(), again.tensors())
    assert whole.counters() == again.counters()
    assert [first for _, first, _ in again.made.calls] == [False] * {7: 2, 10: 2, 100: 0}[every]


def test_stopped_by_ctrl_c_within_an_iteration_and_resumed_equals_never_stopped(tmp_path):
    whole = keep(augmented(augment_every=7), 33, tmp_path / "whole")
    agent = augmented(augment_every=7)
    run = agent.learner.run

    def interrupted(*args):
        if agent.learner.updates == 16:
            os.kill(os.getpid(), signal.SIGINT)
        return run(*args)

    agent.learner.run = interrupted
    with pytest.raises(hooks.Interrupted):
        keep(agent, 33, tmp_path / "run")
    left, data = checkpoint.read(tmp_path / "run" / "checkpoints" / "interrupted.safetensors")
    assert data["updates"] == 17 and data["generated_at"] == 14
    assert left["generated/obs"][:, 1].eq(14).all()
    again = fed(augmented(augment_every=7))
    again.resume(tmp_path / "run", progress=False, tensorboard=False)
    assert_same_tensors(whole.tensors(), again.tensors())


def test_a_loaded_agent_that_is_saved_again_keeps_its_rows(tmp_path):
    keep(augmented(data=recorded(), augment_every=100), 6, tmp_path / "run")
    agent = api.load(tmp_path / "run")
    agent.save(tmp_path / "copy")
    a, b = (checkpoint.read(tmp_path / f / "checkpoints" / "last.safetensors")[0] for f in ("run", "copy"))
    assert_same_tensors(a, b)
    assert a["generated/reward"].shape == (20,)


# -- columns of a method's own --------------------------------------------------------------------


class Whole(Known):
    """Recorded-looking trajectories instead of single rows."""

    def dataset(self, policy, first, generator):
        self.calls.append((self.agent.learner.updates, first, policy.mode(PROBE)))
        made = recorded(episodes=6, seed=len(self.calls), mean=100.0, std=0.5)
        self.made = dataclasses.replace(made, info=dataclasses.replace(made.info, id="made"))
        return self.made


def test_next_actions_of_rebrac_are_found_from_whole_trajectories():
    agent = augmented("rebrac", Whole, augment_every=3)
    seen = watch(agent)
    quiet(agent, 3)
    made = agent.made.made
    for batch in seen:
        mine = batch.obs[:, 0] > 50.0
        assert int(mine.sum()) == 6
        row = trace(made, batch.obs[mine])
        assert not (made.timeouts & ~made.terminals)[row].any()
        following = np.where(made.terminals[row, None], 0.0, made.actions[np.minimum(row + 1, len(made) - 1)])
        np.testing.assert_allclose(batch.extras["next_action"][mine], following, atol=1e-6)


def test_their_columns_survive_a_resume(tmp_path):
    whole = keep(augmented("rebrac", Whole, augment_every=100), 36, tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        keep(augmented("rebrac", Whole, augment_every=100), 36, tmp_path / "run", callbacks=[Stop(11)])
    again = augmented("rebrac", Whole, augment_every=100)
    again.resume(tmp_path / "run", progress=False, tensorboard=False)
    assert again.made.calls == []
    assert_same_tensors(whole.tensors(), again.tensors())


def test_rebrac_refuses_a_source_of_single_transitions():
    with pytest.raises(ConfigError, match="whole trajectories"):
        quiet(augmented("rebrac"), 3)
