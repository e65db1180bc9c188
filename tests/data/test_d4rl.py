"""D4RL's HDF5 layout: what a file's rows mean, and that writing loses nothing."""

import dataclasses
import importlib
import importlib.util
import sys
import types

import gymnasium as gym
import h5py
import numpy as np
import pytest
from data.d4rl_files import door, rows, save, with_next

from ctrlrl.data import checks, d4rl
from ctrlrl.data.dataset import Dataset, DatasetError, DatasetInfo
from ctrlrl.types import EnvSpec


@pytest.fixture
def path(tmp_path):
    return tmp_path / "set.hdf5"


def test_terminals_and_timeouts_stay_apart(path):
    d = d4rl.read(save(path, rows((3, 4, 2), "tct")))
    assert np.flatnonzero(d.terminals).tolist() == [2, 8]
    assert np.flatnonzero(d.timeouts).tolist() == [6]
    assert [tuple(e) for e in d.episodes] == [(0, 3), (3, 7), (7, 9)]


def test_without_recorded_next_observations_they_are_the_following_rows_and_unknown_where_an_episode_ends(path):
    d = d4rl.read(save(path, rows((3, 4, 2), "tct")))
    assert d.next_known.tolist() == [True, True, False, True, True, True, False, True, False]
    assert d.next_observations[d.next_known, 0].tolist() == [1, 2, 4, 5, 6, 8]
    assert np.isfinite(d.next_observations).all()
    assert np.flatnonzero(~d.usable).tolist() == [6]  # the cut row alone: nothing follows a terminal


def test_recorded_next_observations_are_used_and_known_at_timeouts_too(path):
    columns = with_next(rows((3, 4, 2), "tct"))
    d = d4rl.read(save(path, columns))
    assert d.next_known.all() and d.usable.all()
    assert d.next_observations[[2, 6, 8], 0].tolist() == [1002, 1006, 1008]
    assert np.array_equal(d.next_observations, columns["next_observations"])


def test_where_both_flags_are_set_the_terminal_counts(path):
    d = d4rl.read(save(path, rows((3, 2), "bc")))
    assert d.terminals[2] and d.usable[2]
    assert len(d.episodes) == 2


def test_double_precision_rows_become_single_and_columns_of_one_become_flat(path):
    columns = {k: v.astype(np.float64) for k, v in rows().items()}
    columns |= {k: columns[k][:, None] for k in ("rewards", "terminals", "timeouts")}
    d = d4rl.read(save(path, columns))
    assert {v.dtype for v in (d.observations, d.actions, d.rewards, d.next_observations)} == {np.dtype(np.float32)}
    assert d.rewards.shape == (9,) and d.terminals.dtype == bool
    assert d.observation_space.dtype == np.float32


def test_further_columns_and_words_of_the_file_are_kept(path):
    columns = rows() | {"infos/qpos": np.zeros((9, 3)), "infos/env/qvel": np.ones(9)}
    metadata = {"algorithm": np.bytes_("SAC"), "iteration": np.int32(7), "policy/nonlinearity": np.bytes_("relu")}
    d = d4rl.read(save(path, columns, **metadata))
    assert d.infos["qpos"].shape == (9, 3) and d.infos["env/qvel"].dtype == np.float32
    assert d.info.about == {"algorithm": "SAC", "iteration": 7}


def test_a_known_set_gives_its_scores_and_environment_and_a_given_environment_goes_before(path):
    save(path, rows(size=11, actions=3))
    d = d4rl.read(path, like="hopper-medium-v2")
    assert (d.info.ref_min_score, d.info.ref_max_score) == (-20.272305, 3234.3)
    assert d.info.env == EnvSpec("Hopper-v4") and d.info.path == str(path)
    assert d.normalized(3234.3) == 100.0
    assert d4rl.read(path, like="hopper-medium-v2", env="Hopper-v5").info.env == EnvSpec("Hopper-v5")
    assert d4rl.read(path).info.ref_min_score is None


def test_a_set_of_other_sizes_than_it_is_said_to_be_like_is_refused(path):
    with pytest.raises(DatasetError, match=r"observations: has shape \(9, 2\); hopper-medium-v2 has rows of 11"):
        d4rl.read(save(path, rows()), like="hopper-medium-v2")
    with pytest.raises(DatasetError, match="Did you mean hopper-medium-v2"):
        d4rl.read(path, like="hopper-medium-v3")


def test_a_file_without_timeouts_is_cut_by_the_time_limit_of_its_set(path):
    columns = rows((250, 1000, 1, 1001), "tttt", size=11, actions=3)
    columns["terminals"][1249] = False
    del columns["timeouts"]
    with pytest.raises(DatasetError, match=r"timeouts: is missing.*like="):
        d4rl.read(save(path, columns))
    d = d4rl.read(path, like="hopper-medium-v0")
    assert np.flatnonzero(d.timeouts).tolist() == [1249, 2250]
    assert [e.stop - e.start for e in d.episodes] == [250, 1000, 1, 1000, 1]


def test_a_terminal_in_the_last_step_of_the_time_limit_is_no_timeout(path):
    columns = rows((150, 150, 20), "t-t", size=4)
    del columns["timeouts"]
    d = d4rl.read(save(path, columns), like="maze2d-open-v0")
    assert np.flatnonzero(d.timeouts).tolist() == [299]
    assert np.flatnonzero(d.terminals).tolist() == [149, 319]


def test_a_last_episode_without_an_end_is_an_error_unless_it_is_taken_as_cut(path):
    save(path, rows((3, 4), "t-"))
    with pytest.raises(DatasetError, match=rf"{path.name}: timeouts\[3\]: the episode of rows 3 to 6 has no end"):
        d4rl.read(path)
    d = d4rl.read(path, unfinished="cut")
    assert np.flatnonzero(d.timeouts).tolist() == [6] and not d.next_known[6] and not d.usable[6]


def test_a_last_episode_taken_as_cut_keeps_its_recorded_next_observation(path):
    columns = with_next(rows((3, 4), "t-"))
    columns["next_observations"][6] = 5.0
    d = d4rl.read(save(path, columns), unfinished="cut")
    assert d.next_known[6] and d.next_observations[6].tolist() == [5.0, 5.0]


def test_an_action_outside_of_the_bounds_is_named_with_its_row_entry_and_value(path):
    columns = rows()
    columns["actions"][4, 1] = -1.5
    with pytest.raises(DatasetError, match=r"set.hdf5: actions\[4\]: entry 1 is -1.5, outside of \[-1, 1\]; 1 entries"):
        d4rl.read(save(path, columns))


def test_an_action_outside_by_rounding_is_brought_back(path):
    columns = rows()
    columns["actions"][4, 1] = np.nextafter(np.float32(1), np.float32(2))
    d = d4rl.read(save(path, columns))
    assert d.actions[4, 1] == 1.0 and d.action_space.contains(d.actions[4])


def test_bounds_of_the_actions_may_be_stated_in_the_file(path):
    columns = rows()
    columns["actions"][4, 1] = -1.5
    d = d4rl.read(save(path, columns, action_low=[-1.0, -2.0], action_high=2.0))
    assert d.action_space == gym.spaces.Box(np.float32([-1, -2]), np.float32([2, 2]))
    assert d.actions[4, 1] == -1.5


def test_the_first_fault_is_raised_and_the_others_are_counted(path):
    columns = rows()
    columns["rewards"][3] = np.nan
    columns["actions"][5] = 7
    with pytest.raises(DatasetError, match=r"rewards\[3\]: is nan.*\(1 more; `ctrlrl data verify"):
        d4rl.read(save(path, columns))


def test_the_real_door_demonstrations_are_read_with_their_known_figures():
    d = d4rl.read(door(), like="door-human-v1")
    assert len(d.episodes) == 25 and len(d) == 6729
    assert d.returns.mean() == pytest.approx(794.1, abs=0.05) and d.returns.max() == pytest.approx(1496.2, abs=0.05)
    assert (d.info.ref_min_score, d.info.ref_max_score) == (-56.512833, 2880.5693087298737)
    assert not d.terminals.any() and (~d.usable).sum() == 25
    assert d.info.env.id.endswith("AdroitHandDoor-v1")


def test_the_real_door_demonstrations_reward_being_near_the_handle_as_d4rl_does():
    """r = -0.1 |palm - handle| - 0.1 (hinge - 1.57)^2 - 1e-5 |v|^2 + bonuses, at the observation after the step."""
    d = d4rl.read(door())
    obs, hinge = d.next_observations, d.next_observations[:, 28]
    near = -0.1 * np.linalg.norm(obs[:, 35:38], axis=1) - 0.1 * (hinge - 1.57) ** 2
    bonus = 2.0 * (hinge > 0.2) + 8.0 * (hinge > 1.0) + 10.0 * (hinge > 1.35)
    left = (d.rewards - near - bonus)[d.next_known]
    assert np.median(left) == pytest.approx(0.0, abs=1e-3) and np.percentile(np.abs(left), 95) < 0.01


def full(**changes) -> Dataset:
    """A set with everything that can be written."""
    columns = with_next(rows((3, 4, 2), "tcb"))
    known = np.ones(9, bool)
    known[6] = False
    info = DatasetInfo(
        "mine",
        env=EnvSpec("Hopper-v5", {"frame_skip": 2}, (("gymnasium.wrappers:ClipAction", {}),), n_envs=4, threads=2),
        ref_min_score=-1.5,
        ref_max_score=1 / 3,
        about={"algorithm": "sac", "kind": "medium", "checkpoint": "ab12", "versions": {"torch": "2.13"}},
    )
    fields = columns | {
        "next_known": known,
        "observation_space": gym.spaces.Box(-np.inf, np.inf, (2,)),
        "action_space": gym.spaces.Box(np.float32([-1, -3]), np.float32([1, 2])),
        "info": info,
        "infos": {"action_log_probs": np.arange(9, dtype=np.float32), "a/b": np.arange(18).reshape(9, 2)},
    }
    return Dataset(**(fields | changes))


def assert_same(found: Dataset, wanted: Dataset, everywhere=True):
    columns = found.columns()
    assert columns.keys() == wanted.columns().keys()
    for key, value in wanted.columns().items():
        known = slice(None) if everywhere or not key.startswith("next_obs") else wanted.next_known
        assert np.array_equal(columns[key][known], value[known]) and columns[key].dtype == value.dtype, key
    assert found.observation_space == wanted.observation_space and found.action_space == wanted.action_space
    assert dataclasses.replace(found.info, path=None) == dataclasses.replace(wanted.info, path=None)


def test_what_is_written_is_read_back_with_scores_environment_and_words(path):
    d4rl.write(full(), path)
    assert_same(d4rl.read(path), full())
    with h5py.File(path) as file:
        assert file["metadata/algorithm"][()] == b"sac"  # where D4RL's files have it
        assert file["observations"].compression == "gzip"


def test_bounded_observations_and_discrete_actions_are_read_back(path):
    discrete = full(
        actions=np.array([1, 2, 3, 1, 2, 3, 1, 2, 3]),
        action_space=gym.spaces.Discrete(4, start=1),
        observations=np.arange(36, dtype=np.uint8).reshape(9, 2, 2),
        next_observations=np.arange(36, dtype=np.uint8).reshape(9, 2, 2),
        observation_space=gym.spaces.Box(0, 40, (2, 2), np.uint8),
    )
    d4rl.write(discrete, path)
    assert_same(d4rl.read(path), discrete)


def test_next_observations_that_follow_from_the_rows_are_not_written(path):
    derived = d4rl.read(save(path, rows()))
    other = path.with_name("other.hdf5")
    d4rl.write(derived, other)
    assert_same(d4rl.read(other), derived, everywhere=False)
    with h5py.File(other) as file:
        assert "next_observations" not in file
    changed = np.array(derived.next_observations)
    changed[3] += 1
    d4rl.write(dataclasses.replace(derived, next_observations=changed), other)
    assert np.array_equal(d4rl.read(other).next_observations, changed)
    fewer = derived.next_known & (np.arange(9) != 4)  # a step inside an episode whose end was not recorded
    d4rl.write(dataclasses.replace(derived, next_known=fewer), other)
    assert np.array_equal(d4rl.read(other).next_known, fewer)


def test_an_interrupted_write_leaves_the_old_file_and_nothing_beside_it(path):
    d4rl.write(full(), path)
    before = path.read_bytes()
    with pytest.raises(TypeError):  # met after the columns are written
        d4rl.write(full(info=DatasetInfo("mine", about={"no": object()})), path)
    assert path.read_bytes() == before and [p.name for p in path.parent.iterdir()] == [path.name]


def test_dict_observations_and_other_spaces_are_sent_to_minari(path):
    obs = {"a": np.zeros((9, 1))}
    with pytest.raises(DatasetError, match="Minari"):
        d4rl.write(full(observations=obs, next_observations=obs), path)
    with pytest.raises(DatasetError, match="Minari"):
        d4rl.write(full(action_space=gym.spaces.MultiDiscrete([2, 2])), path)
    with pytest.raises(DatasetError, match="infos/words holds <U1; D4RL HDF5 holds numbers"):
        d4rl.write(full(infos={"words": np.array(["a"] * 9)}), path)
    assert not list(path.parent.iterdir())


def test_a_file_cannot_choose_what_code_its_environment_wraps_it_in(path):
    harmful = dataclasses.replace(full().info, env=EnvSpec("Hopper-v5", wrappers=(("subprocess:Popen", {}),)))
    d4rl.write(full(info=harmful), path)
    with pytest.raises(DatasetError, match="wrapper subprocess:Popen; give env="):
        d4rl.read(path)
    assert d4rl.read(path, env="Hopper-v5").info.env == EnvSpec("Hopper-v5")


def test_damaged_words_of_ours_are_named(path):
    with pytest.raises(DatasetError, match="metadata/ctrlrl: is no JSON"):
        d4rl.read(save(path, rows(), ctrlrl=np.bytes_("{")))
    with pytest.raises(DatasetError, match="expected an object"):
        d4rl.read(save(path, rows(), ctrlrl=np.bytes_("[1]")))
    with pytest.raises(DatasetError, match="has an env that is none"):
        d4rl.read(save(path, rows(), ctrlrl=np.bytes_('{"env": {"colour": 1}}')))
    with pytest.raises(DatasetError, match=r"metadata/next_known: has shape \(2,\)"):
        d4rl.read(save(path, with_next(rows()), next_known=[True, False]))


@pytest.mark.parametrize("env", ["trap:Env-v0", "gymnasium_evil:Env-v0", "ctrlrl_envs:trap:Env-v0", "os.path:Env-v0"])
def test_a_file_cannot_choose_what_module_its_environment_imports(path, env):
    d4rl.write(full(info=dataclasses.replace(full().info, env=EnvSpec(env))), path)
    found = d4rl.read(path).info
    assert found.env is None and found.about["env_left_out"] == env
    given = d4rl.read(path, env="Hopper-v5").info
    assert given.env == EnvSpec("Hopper-v5") and "env_left_out" not in given.about


@pytest.mark.parametrize("env", ["Hopper-v5", "ctrlrl_envs:ctrlrl/Grid-v0", "gymnasium_robotics:X-v1"])
def test_an_environment_of_a_known_package_is_taken_from_the_file(path, env):
    d4rl.write(full(info=dataclasses.replace(full().info, env=EnvSpec(env))), path)
    assert d4rl.read(path).info.env == EnvSpec(env) and "env_left_out" not in d4rl.read(path).info.about


@pytest.mark.parametrize(
    ("document", "words"),
    [
        ('{"env": {"id": 5}}', "has an env that is none .*id=5"),
        ('{"env": "Hopper-v5"}', "has an env that is none"),
        ('{"env": {"id": "Hopper-v5", "wrappers": [[3, {}]]}}', "has an env that is none"),
        ('{"ref_min_score": "low"}', "ref_min_score is 'low'; expected a number"),
        ('{"ref_max_score": NaN}', "ref_max_score is nan; expected a number"),
        ('{"ref_max_score": true}', "ref_max_score is True; expected a number"),
    ],
)
def test_ids_that_are_no_words_and_scores_that_are_no_numbers_are_named(path, document, words):
    save(path, rows(), ctrlrl=np.bytes_(document))
    with pytest.raises(DatasetError, match=rf"set\.hdf5: metadata/ctrlrl:? ?{words}"):
        d4rl.read(path)
    (problem,) = checks.problems(path)
    assert (problem.severity, problem.key) == ("error", "metadata/ctrlrl")


def shift(columns, but=()):
    """Next observations filled in from the next row, also where an episode was cut, but in the rows ``but``."""
    columns = with_next(columns)
    following = columns["next_observations"]
    given = [k for k in range(len(following) - 1) if k not in but]
    following[given] = columns["observations"][[k + 1 for k in given]]
    return columns


def test_next_observations_that_were_filled_in_from_the_next_row_are_not_known_where_an_episode_was_cut(path):
    d = d4rl.read(save(path, shift(rows((3, 4, 2, 5), "ctcc"))))
    assert np.flatnonzero(~d.next_known).tolist() == [2, 8, 13]
    assert np.flatnonzero(~d.usable).tolist() == [2, 8, 13]


@pytest.mark.parametrize(("but", "known"), [((2,), False), ((2, 5), True)])
def test_nine_in_ten_of_the_cuts_show_that_next_observations_were_filled_in(path, but, known):
    d = d4rl.read(save(path, shift(rows((3,) * 11, "c" * 10 + "t"), but)))
    assert d.next_known[8] == known and d.next_known[[0, 1]].all()


def test_a_single_cut_and_next_observations_that_are_close_show_nothing(path):
    assert d4rl.read(save(path, shift(rows((3, 4, 2), "ctt")))).next_known.all()
    columns = shift(rows((3, 4, 2), "cct"))
    columns["next_observations"][[2, 6], 0] += 1e-5
    assert d4rl.read(save(path, columns)).next_known.all()


def test_a_file_that_says_what_is_known_is_believed(path):
    d = d4rl.read(save(path, shift(rows((3, 4, 2), "ccc")), next_known=np.ones(9, bool)))
    assert d.next_known.all()


@pytest.mark.parametrize("recorded", [False, True])
def test_a_memory_map_holds_the_same_rows_read_in_slices(path, recorded, monkeypatch):
    monkeypatch.setattr("ctrlrl.data.checks.BLOCK", 2)
    columns = rows() | {"infos/qpos": np.arange(9.0)}
    columns["actions"][3] = 1.000001
    save(path, with_next(columns) if recorded else columns)
    mapped, held = d4rl.read(path, memory_map=path.parent / "map"), d4rl.read(path)
    assert_same(mapped, held)
    parts = (mapped.observations, mapped.next_observations, mapped.actions, mapped.infos["qpos"])
    assert all(isinstance(part, np.memmap) for part in parts)
    other = d4rl.read(save(path.with_name("other.hdf5"), rows(seed=1)), memory_map=path.parent / "map")
    assert not np.array_equal(other.actions, mapped.actions)
    assert np.array_equal(mapped.actions, held.actions)  # what is in use stays what it was


def test_rows_that_do_not_fit_into_memory_point_to_the_memory_map(path):
    with h5py.File(save(path, rows()), "a") as file:
        del file["observations"]
        file.create_dataset("observations", (2**45, 64), "f4", chunks=(1024, 64))  # 8 PiB that are not there
        for key in ("actions", "rewards", "terminals", "timeouts"):
            file.move(key, f"infos/{key}")
            file.create_dataset(key, (2**45, 2) if key == "actions" else (2**45,), "f4", chunks=True)
        del file["infos"]
    with pytest.raises(DatasetError, match="do not fit into memory; give memory_map="):
        d4rl.read(path)


# -- the official rules -----------------------------------------------------------------------------------------------


def by_the_rules(columns, steps=None):
    """d4rl.qlearning_dataset, row by row, from its description: (row, next row, terminal) of what it keeps."""
    kept, step = [], 0
    for i in range(len(columns["rewards"]) - 1):
        cut = columns["timeouts"][i] if steps is None else step == steps - 1
        if cut:
            step = 0
        else:
            kept.append((i, i + 1, bool(columns["terminals"][i])))
            step = 1 if columns["terminals"][i] else step + 1
    return kept


@pytest.fixture
def official(tmp_path, monkeypatch):
    """qlearning_dataset of the installed package; gym, which it only derives classes from, is replaced."""
    if importlib.util.find_spec("d4rl") is None:
        pytest.skip("the package d4rl is absent; pip install --no-deps d4rl")
    stand_in, utils = types.ModuleType("gym"), types.ModuleType("gym.utils")
    stand_in.Env, stand_in.Wrapper, stand_in.utils = object, type("Wrapper", (), {}), utils
    utils.colorize = lambda text, colour: text
    monkeypatch.setitem(sys.modules, "gym", stand_in)
    monkeypatch.setitem(sys.modules, "gym.utils", utils)
    monkeypatch.setenv("D4RL_SUPPRESS_IMPORT_ERROR", "1")
    monkeypatch.setenv("D4RL_DATASET_DIR", str(tmp_path / "d4rl"))
    before = set(sys.modules)
    yield importlib.import_module("d4rl").qlearning_dataset
    for name in set(sys.modules) - before:
        if name.partition(".")[0] == "d4rl":
            del sys.modules[name]


MIXED = ((3, 4, 1, 5, 2, 6), "tctcbt")


def test_our_reading_of_the_official_rules_is_the_official_package(official):
    for columns, steps in ((rows(*MIXED), None), (rows((4, 4, 3, 9), "-tt-"), 4)):
        given = columns if steps is None else {k: v for k, v in columns.items() if k != "timeouts"}
        theirs = official(types.SimpleNamespace(_max_episode_steps=steps), dataset=given)
        kept = by_the_rules(given, steps)
        assert theirs["observations"][:, 0].tolist() == [i for i, _, _ in kept]
        assert theirs["next_observations"][:, 0].tolist() == [j for _, j, _ in kept]
        assert theirs["terminals"].tolist() == [t for _, _, t in kept]
        assert np.array_equal(theirs["actions"], columns["actions"][[i for i, _, _ in kept]])
        assert np.array_equal(theirs["rewards"], columns["rewards"][[i for i, _, _ in kept]])


@pytest.mark.parametrize("recorded", [False, True])
def test_our_transitions_are_those_of_the_official_rules(path, recorded):
    """But for what the docstring of read names: rows with a timeout and the last row, which the rules drop."""
    columns = with_next(rows(*MIXED)) if recorded else rows(*MIXED)
    d = d4rl.read(save(path, columns))
    kept = by_the_rules(columns)
    ours = np.flatnonzero(d.usable & ~d.timeouts & (np.arange(len(d)) < len(d) - 1))
    assert ours.tolist() == [i for i, _, _ in kept]
    for i, j, terminal in kept:
        assert d.terminals[i] == terminal
        if not terminal:  # beyond a terminal theirs is the next episode's first observation
            assert np.array_equal(d.next_observations[i], columns["observations"][j])
    more = np.flatnonzero(d.usable)
    assert set(more) - set(ours) == ({6, 12, 14, 20} if recorded else {14, 20})


def test_by_the_time_limit_our_transitions_are_the_official_ones_where_no_terminal_shifts_their_count(path):
    columns = rows((150, 150, 40), "---", size=4)
    del columns["timeouts"]
    d = d4rl.read(save(path, columns), like="maze2d-open-v0", unfinished="cut")
    assert np.flatnonzero(d.usable).tolist() == [i for i, _, _ in by_the_rules(columns, 150)]
    columns["terminals"][9] = True  # then theirs cuts after 149 rows, ours after 150
    d = d4rl.read(save(path, columns), like="maze2d-open-v0", unfinished="cut")
    assert np.flatnonzero(~d.usable)[0] == 159
    assert 158 not in [i for i, _, _ in by_the_rules(columns, 150)]
