"""Faults of a D4RL file: all found at once, each with its key and row."""

import sys

import h5py
import numpy as np
import pytest
from data.d4rl_files import door, rows, save, with_next

from ctrlrl.data import checks, d4rl
from ctrlrl.data.checks import problems
from ctrlrl.data.dataset import DatasetError


@pytest.fixture
def path(tmp_path):
    return tmp_path / "set.hdf5"


def found(path, **options):
    return [(p.severity, p.key, p.index) for p in problems(path, **options)]


def text(path, key, **options):
    return next(p.text for p in problems(path, **options) if p.key == key)


def test_a_sound_file_has_no_problems(path):
    assert found(save(path, rows())) == []
    assert found(save(path, with_next(rows()) | {"infos/qpos": np.ones((9, 2))}, algorithm=np.bytes_("SAC"))) == []


def test_the_real_file_has_no_problems():
    assert found(door(), like="door-human-v1") == []


def test_all_faults_are_reported_at_once_errors_first_and_reading_raises_the_first(path):
    columns = with_next(rows((3, 4, 2), "tb-")) | {"infos/action_log_probs": np.full(9, -np.inf)}
    columns["observations"][5, 1] = np.nan
    columns["actions"][7] = 2.0
    columns["rewards"] = columns["rewards"][:8]
    columns["next_observations"][1, 0] = 77.0
    save(path, columns)
    assert found(path) == [
        ("error", "rewards", None),
        ("error", "observations", 5),
        ("error", "actions", 7),
        ("error", "timeouts", 7),
        ("note", "infos/action_log_probs", 0),
        ("note", "timeouts", 6),
        ("note", "next_observations", 1),
    ]
    with pytest.raises(DatasetError, match="rewards: has 8 rows; observations has 9"):
        d4rl.read(path)


def test_a_problem_reads_as_file_key_row_and_words(path):
    columns = rows()
    columns["actions"][4, 1] = 3.0
    assert str(problems(save(path, columns))[0]).startswith(f"{path}: actions[4]: entry 1 is 3, outside of [-1, 1]")


@pytest.mark.parametrize("block", [1, 2, 65_536])
def test_rows_and_counts_do_not_depend_on_the_block_size(path, block, monkeypatch):
    monkeypatch.setattr(checks, "BLOCK", block)
    columns = with_next(rows((3, 4, 2), "tct"))
    columns["observations"][[4, 8], 1] = np.inf
    columns["actions"][[2, 3, 6]] = [[0, -1.1], [1.1, 0], [-2, 2]]
    columns["next_observations"][[3, 5], 0] += 50
    save(path, columns)
    assert found(path) == [("error", "observations", 4), ("error", "actions", 2), ("note", "next_observations", 3)]
    assert text(path, "observations").startswith("is inf; 2 entries")
    assert text(path, "actions").startswith("entry 1 is -1.1, outside of [-1, 1]; 4 entries")
    assert "in 3 rows within an episode" in text(path, "next_observations")  # and row 7, which meets the infinite one


def test_keys_that_are_missing_are_each_named_with_those_that_are_there(path):
    columns = rows()
    del columns["actions"], columns["rewards"]
    assert found(save(path, columns)) == [("error", "actions", None), ("error", "rewards", None)]
    assert text(path, "actions") == "is missing; found the keys observations, terminals, timeouts"


def test_missing_timeouts_are_an_error_unless_the_set_is_known(path):
    columns = rows((3,), "t", size=11, actions=3)
    del columns["timeouts"]
    assert found(save(path, columns)) == [("error", "timeouts", None)]
    assert found(path, like="hopper-medium-v0") == []


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("observations", np.zeros(9), r"has shape \(9,\); expected \(rows, size\)"),
        ("actions", np.zeros(9), r"has shape \(9,\); expected \(rows, size\)"),
        ("actions", np.zeros((0, 2)), "expected at least one row"),
        ("rewards", np.zeros((9, 2)), r"has shape \(9, 2\); expected \(9,\)"),
        ("rewards", np.float32(3), r"has shape \(\); expected at least one row"),
        ("rewards", np.zeros(9, bool), "holds bool; expected numbers"),
        ("terminals", np.array([b"a"] * 9), r"holds \|S1; expected numbers"),
        ("next_observations", np.zeros((9, 3)), r"has shape \(9, 3\); observations has \(9, 2\)"),
        ("infos/qpos", np.zeros((8, 3)), "has 8 rows; observations has 9"),
    ],
)
def test_wrong_shapes_types_and_lengths_are_errors(path, key, value, words):
    save(path, rows() | {key: value})
    assert found(path) == [("error", key, None)]
    with pytest.raises(DatasetError, match=words):
        d4rl.read(path)


def test_flags_other_than_true_and_false_are_errors(path):
    columns = rows()
    columns["terminals"] = columns["terminals"].astype(np.float32)
    columns["terminals"][4] = np.nan
    assert found(save(path, columns)) == [("error", "terminals", 4)]


def test_an_episode_without_an_end_is_an_error_or_when_cut_a_note(path):
    save(path, rows((3, 4), "t-"))
    assert found(path) == [("error", "timeouts", 3)]
    assert found(path, unfinished="cut") == [("note", "timeouts", 3)]
    assert "rows 3 to 6 has no end" in text(path, "timeouts")


def test_a_minus_infinite_log_probability_is_only_noted_and_read(path):
    save(path, rows() | {"infos/action_log_probs": np.full(9, -np.inf)})
    assert found(path) == [("note", "infos/action_log_probs", 0)]
    assert d4rl.read(path).infos["action_log_probs"][0] == -np.inf


def test_words_among_the_infos_are_noted_and_not_read(path):
    save(path, rows() | {"infos/names": np.array([b"a"] * 9), "infos/scalar": 3.0})
    assert found(path) == [("note", "infos/names", None), ("note", "infos/scalar", None)]
    assert d4rl.read(path).infos == {}


def test_a_group_of_observations_is_sent_to_minari(path):
    columns = rows()
    columns["observations/place"] = columns.pop("observations")
    assert "Minari" in text(save(path, columns), "observations")


def test_a_minari_file_is_recognised(path):
    with h5py.File(path, "w") as file:
        file["episode_0/observations"] = np.zeros((3, 2))
    assert [p.text.startswith("it looks like the main_data.hdf5 of a Minari set") for p in problems(path)] == [True]


def test_bounds_that_do_not_fit_are_named(path):
    assert found(save(path, rows(), action_low=[-1.0, -1.0, -1.0])) == [("error", "metadata/action_low", None)]
    assert found(save(path, rows(), action_low=np.bytes_("low"))) == [("error", "metadata/action_low", None)]
    with pytest.raises(DatasetError, match="metadata/action_low"):
        d4rl.read(path)


METADATA = [
    ({"action_low": np.nan}, "action_low", "is NaN"),
    ({"action_low": [-1.0, np.nan]}, "action_low", "is NaN"),
    ({"action_high": [1.0, 1.0, 1.0]}, "action_high", r"of shape|has shape \(3,\); expected \(2,\)"),
    ({"action_low": 2.0}, "action_low", "is above metadata/action_high"),
    ({"observation_low": [0.0, 0.0, 0.0]}, "observation_low", r"has shape \(3,\); expected \(2,\)"),
    ({"observation_high": np.bytes_("high")}, "observation_high", "expected one number"),
    ({"observation_low": np.nan}, "observation_low", "is NaN"),
    ({"action_low/deeper": 1.0}, "action_low", "expected one number"),
    ({"ctrlrl": np.bytes_("{")}, "ctrlrl", "is no JSON"),
    ({"ctrlrl/deeper": 1.0}, "ctrlrl", "is no JSON"),
    ({"ctrlrl": np.zeros(0)}, "ctrlrl", "is no JSON"),
    ({"ctrlrl": np.bytes_("[1]")}, "ctrlrl", "expected an object"),
    ({"next_known": [True, False]}, "next_known", r"has shape \(2,\)"),
    ({"next_known": np.zeros(9)}, "next_known", "expected true or false"),
]


@pytest.mark.parametrize(("metadata", "key", "words"), METADATA)
def test_damaged_metadata_are_named_with_their_key(path, metadata, key, words):
    save(path, with_next(rows()), **metadata)
    assert found(path) == [("error", f"metadata/{key}", None)]
    with pytest.raises(DatasetError, match=rf"set\.hdf5: metadata/{key}: .*({words})"):
        d4rl.read(path)


@pytest.mark.parametrize(
    ("metadata", "key", "words"),
    [
        ({"action_n": 3}, "action_start", "is missing; discrete actions need metadata/action_n and"),
        ({"action_start": 0}, "action_n", "is missing; discrete actions need metadata/action_n and"),
        ({"action_n": 0, "action_start": 0}, "action_n", "is 0; expected at least 1"),
        ({"action_n": 3.5, "action_start": 0}, "action_n", "is no whole number"),
        ({"action_n": [3, 3], "action_start": 0}, "action_n", "is no whole number"),
    ],
)
def test_damaged_metadata_of_discrete_actions_are_named_with_their_key(path, metadata, key, words):
    save(path, rows() | {"actions": np.arange(9) % 3}, **metadata)
    assert found(path) == [("error", f"metadata/{key}", None)]
    with pytest.raises(DatasetError, match=rf"set\.hdf5: metadata/{key}: {words}"):
        d4rl.read(path)


def test_discrete_actions_outside_of_those_stated_are_errors(path):
    save(path, rows() | {"actions": np.array([0, 1, 2, 0, 3, 2, 0, 1, -1])}, action_n=3, action_start=0)
    assert found(path) == [("error", "actions", 4)]
    with pytest.raises(DatasetError, match=r"actions\[4\]"):
        d4rl.read(path)
    save(path, rows(), action_n=3, action_start=0)
    assert found(path) == [("error", "actions", None)]


def test_next_observations_that_were_filled_in_from_the_next_row_are_noted(path):
    columns = with_next(rows((3, 4, 2), "ccc"))
    assert found(save(path, columns)) == []
    columns["next_observations"][:-1] = columns["observations"][1:]
    assert found(save(path, columns)) == [("note", "next_observations", 2)]
    assert found(save(path, columns, next_known=np.ones(9, bool))) == []


@pytest.mark.parametrize("block", [1, 2, 3, 65_536])
def test_where_next_observations_were_filled_in_does_not_depend_on_the_block_size(block, monkeypatch):
    monkeypatch.setattr(checks, "BLOCK", block)
    obs = np.arange(12.0).reshape(6, 2)
    following, cuts = np.r_[obs[1:], obs[:1]], np.array([0, 0, 1, 1, 0, 1], bool)
    assert checks.shifted(obs, following, cuts) == 2
    following[3, 1] += 1
    assert checks.shifted(obs, following, cuts) is None


def test_hard_links_in_a_circle_and_groups_within_groups_end(path):
    with h5py.File(save(path, rows(), algorithm=np.bytes_("SAC")), "a") as file:
        file["metadata/again"] = file["/"]
        file["infos/self"] = 1.0
        file["infos/circle"] = file["infos"]
    assert d4rl.read(path).info.about == {"algorithm": "SAC"}
    with h5py.File(path, "a") as file:
        deep = file["metadata"]
        for _ in range(1200):
            deep = deep.create_group("g")
        deep["link"] = h5py.SoftLink("/terminals")
    with pytest.raises(DatasetError, match="g/link is a link"):
        d4rl.read(path)


def test_a_file_that_is_absent_foreign_or_truncated_is_named(path):
    with pytest.raises(DatasetError, match=r"set\.hdf5: there is no such file"):
        d4rl.read(path)
    assert found(path) == [("error", "", None)]
    path.write_bytes(b"not hdf5 at all")
    with pytest.raises(DatasetError, match=r"set\.hdf5: it is truncated or no HDF5 file"):
        d4rl.read(path)
    whole = save(path, rows((300,), "t")).read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    assert found(path) == [("error", "", None)]
    assert str(problems(path)[0]).startswith(f"{path}: it is truncated")
    path.write_bytes(b"")
    assert found(path) == [("error", "", None)]


def test_a_damaged_chunk_is_named_with_its_key(path):
    save(path, rows())
    with h5py.File(path, "a") as file:
        actions = file["actions"][()]
        del file["actions"]
        stored = file.create_dataset("actions", data=actions, compression="gzip")
        place = stored.id.get_chunk_info(0).byte_offset
    damaged = bytearray(path.read_bytes())
    damaged[place : place + 16] = bytes(16)
    path.write_bytes(damaged)
    assert found(path) == [("error", "actions", None)]
    with pytest.raises(DatasetError, match="actions: cannot be read"):
        d4rl.read(path)


@pytest.mark.parametrize("kind", ["external link", "soft link", "external storage", "virtual dataset"])
def test_a_file_that_points_outside_of_itself_is_refused(path, tmp_path, kind):
    columns = rows()
    rewards = columns.pop("rewards")
    save(path, columns)
    secret = save(tmp_path / "secret.hdf5", {"rewards": rewards})
    with h5py.File(path, "a") as file:
        if kind == "external link":
            file["rewards"] = h5py.ExternalLink(str(secret), "rewards")
        elif kind == "soft link":
            file["rewards"] = h5py.SoftLink("/terminals")
        elif kind == "external storage":
            file.create_dataset("rewards", (9,), "f4", external=[(str(secret), 0, 36)])
        else:
            layout = h5py.VirtualLayout((9,), "f4")
            layout[:] = h5py.VirtualSource(str(secret), "rewards", (9,))
            file.create_virtual_dataset("rewards", layout)
    words = "is a link" if "link" in kind else "lies outside of the file"
    assert [p.text for p in problems(path) if words in p.text]
    with pytest.raises(DatasetError, match=f"rewards {words}"):
        d4rl.read(path)


def test_links_deeper_in_the_file_are_refused_too(path):
    with h5py.File(save(path, rows(), algorithm=np.bytes_("SAC")), "a") as file:
        file["metadata/policy/fc0"] = h5py.ExternalLink("/etc/passwd", "x")
    with pytest.raises(DatasetError, match="metadata/policy/fc0 is a link"):
        d4rl.read(path)


def test_without_h5py_the_extra_is_named(path, monkeypatch):
    monkeypatch.setitem(sys.modules, "h5py", None)
    with pytest.raises(ImportError, match=r"pip install 'ctrlrl\[offline\]'"):
        problems(path)
