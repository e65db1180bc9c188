"""The replay of a run as data."""

import numpy as np
import pytest
from engine.data_making_parts import FORGETFUL, LOPSIDED, Lopsided, assert_same
from helpers import agents, off_policy
from helpers.envs import env_id

from ctrlrl.data.dataset import DatasetError
from ctrlrl.engine import runfolder
from ctrlrl.engine.data_making import Source, make
from ctrlrl.engine.replay_data import from_run, trajectories
from ctrlrl.types import EnvSpec


@pytest.fixture
def train(tmp_path):
    """Train and return the folder of the run and the agent."""

    def run(steps, env=LOPSIDED, name="sac", **settings):
        settings = {"replay_size": 1000, "seed": 5} | settings
        agent = off_policy.make(name, env, **{"learning_starts": settings["replay_size"]} | settings)
        agents.quiet(agent, steps, run_dir=tmp_path / "run")
        return tmp_path / "run", agent

    return run


# -- the replay of a run --------------------------------------------------------------------------


def test_the_replay_comes_out_row_by_row_in_the_environments_units(train):
    Lopsided.told.clear()
    run, agent = train(64, learning_starts=32)
    data = from_run(run)
    rows = agent.replay.rows(0, 64)
    for column, name in [("obs", "observations"), ("next_obs", "next_observations"), ("reward", "rewards")]:
        np.testing.assert_array_equal(getattr(data, name), rows[column], err_msg=name)
    np.testing.assert_array_equal(data.actions, np.stack(Lopsided.told[:64]))
    np.testing.assert_array_equal(data.terminals, rows["terminated"] > 0)
    cut = (rows["truncated"] > 0).numpy()
    cut[-1] = not data.terminals[-1]
    np.testing.assert_array_equal(data.timeouts, cut)
    assert data.next_known.all() and data.info.env == EnvSpec(LOPSIDED) and data.infos == {}
    assert data.info.about == {
        "algorithm": "sac", "run": "run", "checkpoint": "last", "seed": 5, "rows_left_out": 0
    }  # fmt: skip


def test_medium_replay_is_the_whole_replay_and_its_beginning_where_asked(train):
    run, agent = train(64)
    source = Source(agent, run)
    whole = make("medium-replay", EnvSpec(LOPSIDED), source)
    assert_same(whole, from_run(run))
    part = make("medium-replay", EnvSpec(LOPSIDED), source, 25)
    assert len(part) == 25 and (part.timeouts | part.terminals)[-1]
    np.testing.assert_array_equal(part.observations, whole.observations[:25])
    np.testing.assert_array_equal(part.timeouts[:24], whole.timeouts[:24])
    assert part.info.about["kind"] == "medium-replay" and part.info.id == f"{LOPSIDED}-medium-replay"


def test_episodes_that_a_border_cuts_are_timeouts_with_their_last_observation(train):
    # the environments are built anew every ten iterations of eight steps; the counter begins again
    run, agent = train(200, env_id("OnlyTruncates"), checkpoint_every=80)
    data, rows = from_run(run), agent.replay.rows(0, 200)
    for border in (80, 160):
        assert rows["obs"][border].item() == 10 and not rows["truncated"][border - 1]  # it was running
        assert data.timeouts[border - 1] and data.next_observations[border - 1, 0] == rows["next_obs"][border - 1]
    assert data.next_known.all() and data.timeouts.sum() == 80 // 3 + 1 + 80 // 3 + 1 + 40 // 3 + 1
    assert all(data.observations[e.start, 0] % 10 == 0 for e in data.episodes)


def test_environments_side_by_side_are_taken_apart(train):
    run, agent = train(63, n_envs=3, iteration_steps=9)
    data, rows = from_run(run), agent.replay.rows(0, 63)
    order = np.concatenate([[np.flatnonzero((rows["obs"].numpy() == o).all(1))[0]] for o in data.observations])
    assert sorted(order) == list(range(63)) and (np.diff(order) != 1).any()
    for start, stop in data.episodes:
        np.testing.assert_array_equal(data.observations[start + 1 : stop], data.next_observations[start : stop - 1])
        assert set(order[start:stop] % 3) == {order[start] % 3}
    np.testing.assert_array_equal(data.rewards, rows["reward"].numpy()[order])
    np.testing.assert_array_equal(data.terminals, rows["terminated"].numpy()[order] > 0)
    ended = (rows["terminated"] + rows["truncated"]).numpy() > 0
    assert len(data.episodes) == ended[:60].sum() + 3


@pytest.mark.parametrize("checkpoint_every", [50_000, 80], ids=["one file", "two files, the first with older rows"])
def test_of_a_full_replay_episodes_without_their_beginning_are_left_out(train, checkpoint_every):
    run, agent = train(104, FORGETFUL, replay_size=45, checkpoint_every=checkpoint_every)
    steps = agent.replay.rows(59, 104)["obs"][:, 0].tolist()
    first = steps.index(0)
    data = from_run(run)
    assert first > 0 and data.info.about["rows_left_out"] == first
    assert data.observations[:, 0].tolist() == steps[first:]
    assert all(data.observations[e.start, 0] == 0 for e in data.episodes)
    assert (data.returns == 28).sum() >= 4


def test_a_replay_with_parts_of_episodes_only_is_refused(train):
    run, _ = train(40, env_id("ActionEcho"), replay_size=16)
    with pytest.raises(DatasetError, match="parts of episodes only"):
        from_run(run)


def test_only_what_a_checkpoint_had_seen(train):
    run, agent = train(64, eval_every=16, eval_episodes=2)
    top = max(runfolder.read_evaluations(run), key=lambda row: np.mean(row["returns"]))["step"]
    data, whole = from_run(run, "best"), from_run(run)
    assert len(data) == top
    np.testing.assert_array_equal(data.observations, whole.observations[:top])
    assert data.ends[-1] and data.info.about["checkpoint"] == "best"


def test_more_columns_of_a_replay_become_info_columns(train):
    run, agent = train(24, "ctrlrl/RobustInvertedPendulum-v0", name="rarl")
    data, rows = from_run(run), agent.replay.rows(0, 24)
    extras = {k.removeprefix("extras/"): v for k, v in rows.items() if k.startswith("extras/")}
    assert set(data.infos) == set(extras) and extras
    for name, value in extras.items():
        np.testing.assert_array_equal(data.infos[name], value)


def test_what_has_no_replay_is_said(train, tmp_path):
    run, _ = train(24)
    (run / "checkpoints" / "last.safetensors").rename(run / "checkpoints" / "gone")
    with pytest.raises(RuntimeError, match=r"last\.safetensors"):
        from_run(run)
    agents.quiet(agents.make(), 32, run_dir=tmp_path / "ppo")
    with pytest.raises(DatasetError, match="has no replay: it was trained by ppo"):
        from_run(tmp_path / "ppo")
    with pytest.raises(FileNotFoundError):
        from_run(tmp_path / "nothing")


def test_steps_that_the_replay_no_longer_has_are_said(train):
    run, _ = train(104, replay_size=40)
    with pytest.raises(DatasetError, match="has the steps from 64 to 104 of the run, none of the first 60"):
        from_run(run, steps=60)
    assert len(from_run(run, steps=90)) <= 30


# -- which rows belong together -------------------------------------------------------------------


def chained(before, after, ends, n_envs):
    columns = {"obs": np.float32(before)[:, None], "next_obs": np.float32(after)[:, None]}
    first, follows = trajectories(columns, np.array(ends, bool), n_envs)
    return first.tolist(), follows.tolist()


def test_rows_are_chained_by_what_they_saw():
    # two environments; the first is cut without a sign after its second row, the second ends
    first, follows = chained([1, 5, 2, 6, 9, 7], [2, 6, 3, 7, 10, 8], [0, 0, 0, 0, 0, 1], 2)
    assert first == [0, 1, 0, 1, 4, 1] and follows == [True, True, False, True, False, False]


def test_rows_that_are_missing_between_them_do_not_matter():
    # environment 0 spent a step on its reset, which is not stored
    first, _ = chained([1, 5, 6, 3, 7], [2, 6, 7, 4, 8], [1, 0, 0, 0, 0], 2)
    assert first == [0, 1, 1, 3, 1]


def test_equal_environments_are_told_apart_by_their_place():
    first, follows = chained([1, 1, 2, 2, 3, 3], [2, 2, 3, 3, 4, 4], [0] * 6, 2)
    assert first == [0, 1, 0, 1, 0, 1] and follows == [True] * 4 + [False] * 2


def test_an_ended_row_is_never_gone_on_with():
    assert chained([1, 2, 3], [2, 3, 4], [1, 0, 0], 1)[0] == [0, 1, 1]


def test_nobody_goes_on_in_a_row_that_is_taken():
    first, _ = chained([1, 1, 2], [2, 2, 3], [0, 0, 0], 2)
    assert first == [0, 1, 0]
