"""Minari sets that are damaged, missing or not finished: what is said, and that nothing stays behind."""

import numpy as np
import pytest
from data.minari_parts import ID, assert_same, edit, edit_metadata, toy

from ctrlrl.data import minari, minari_checks, minari_root
from ctrlrl.data.dataset import DatasetError

library = pytest.importorskip("minari", reason="minari is not installed")
h5py = pytest.importorskip("h5py", reason="h5py is not installed")


@pytest.fixture(autouse=True)
def root(tmp_path, monkeypatch):
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "root"))
    return tmp_path / "root"


# -- damage ---------------------------------------------------------------------------------------


def _shorter(file):
    rows = file["episode_1/observations"][:-1]
    del file["episode_1/observations"]
    file["episode_1/observations"] = rows


def _wide(file):
    del file["episode_0/actions"]
    file["episode_0/actions"] = np.zeros((3, 5))


def _early(file):
    file["episode_0/truncations"][1] = True


def _endless(file):
    file["episode_2/truncations"][1] = False


def _gone(file):
    del file["episode_1/rewards"]


FAULTS = {
    _shorter: r"\.hdf5: episode_1/observations is float32 of shape \(1, 2\), expected numbers of shape \(2, 2\)",
    _wide: r"episode_0/actions is float64 of shape \(3, 5\), expected numbers of shape \(3, 2\)",
    _early: r"episode_0: its step 1 of 3 ends the episode .*others follow",
    _endless: r"episode_2 has no end: .*unfinished='cut'",
    _gone: r"episode_1.* cannot be read by minari",
}


@pytest.mark.parametrize("fault", FAULTS, ids=lambda f: f.__name__)
def test_a_fault_is_named_with_its_file_episode_and_key(fault):
    folder = minari.write(toy(), ID)
    edit(folder, fault)
    with pytest.raises(DatasetError, match=FAULTS[fault]):
        minari.read(folder)
    problems = minari_checks.problems(folder)
    assert len(problems) == 1 and problems[0].severity == "error"


def test_verifying_reports_everything_at_once():
    folder = minari.write(toy(), ID)

    def spoil(file):
        _wide(file)
        _endless(file)
        file["episode_1/rewards"][0] = np.nan
        file["episode_1/infos/qpos"][0, 2] = np.inf

    edit(folder, spoil)
    found = minari_checks.problems(ID)
    assert [(p.key, p.index) for p in found] == [("", None), ("rewards", 0), ("infos/qpos", 0), ("", None)]
    text = "\n".join(map(str, found))
    for part in ("episode_0", "episode_1", "episode_2", "actions is float64", "has no end"):
        assert part in text
    assert len(minari_checks.problems(ID, unfinished="cut")) == 3


def _spoil(key, index, value):
    def change(file):
        file[key][index] = value

    return change


@pytest.mark.parametrize(
    ("key", "index", "value", "words"),
    [
        ("episode_0/observations", (1, 1), np.nan, r"observations\[1\]: .*nan.* is not finite"),
        ("episode_2/observations", (2, 0), np.inf, r"observations\[2\]: .*inf.* is not finite"),
        ("episode_2/actions", (1, 0), np.nan, r"actions\[1\]: .*nan.* is not finite"),
        ("episode_1/rewards", 0, -np.inf, r"rewards\[0\]: -inf is not finite"),
        ("episode_0/actions", (2, 1), 3.25, r"actions\[2\]: .*3\.25\] is outside of the action space Box"),
        ("episode_2/actions", (0, 0), -1.0001, r"actions\[0\]: .*-1\.0001.* is outside of the action space Box"),
    ],
)
def test_numbers_that_are_not_finite_and_actions_outside_of_their_space_are_named(key, index, value, words):
    folder = minari.write(toy(), ID)
    edit(folder, _spoil(key, index, value))
    with pytest.raises(DatasetError, match=rf"{ID}/data/main_data\.hdf5: {key.partition('/')[0]}: {words}"):
        minari.read(folder)
    (problem,) = minari_checks.problems(folder)
    assert problem.severity == "error" and problem.file.endswith(key.partition("/")[0])
    step = index[0] if isinstance(index, tuple) else index
    assert (problem.key, problem.index) == (key.partition("/")[2], step)


def test_an_action_outside_by_rounding_is_brought_back():
    folder = minari.write(toy(), ID)
    edit(folder, _spoil("episode_0/actions", (2, 1), np.float32(3 + 2e-5)))
    assert minari.read(folder).actions[2, 1] == np.float32(3)
    assert minari_checks.problems(folder) == []


def test_discrete_actions_outside_of_their_space_are_named():
    import gymnasium as gym

    data = toy(action_space=gym.spaces.Discrete(3, start=5), actions=np.array([5, 6, 7, 5, 6, 7]))
    folder = minari.write(data, ID)
    edit(folder, _spoil("episode_2/actions", 1, 8))
    with pytest.raises(DatasetError, match=r"episode_2: actions\[1\]: 8 is outside of the action space Discrete"):
        minari.read(folder)
    assert [(p.key, p.index) for p in minari_checks.problems(folder)] == [("actions", 1)]


def test_an_info_that_is_not_finite_is_noted_and_read():
    folder = minari.write(toy(), ID)
    edit(folder, _spoil("episode_0/infos/action_log_probs", 1, -np.inf))
    assert minari.read(folder).infos["action_log_probs"][1] == -np.inf
    assert [(p.severity, p.key, p.index) for p in minari_checks.problems(folder)] == [
        ("note", "infos/action_log_probs", 1)
    ]


def test_a_sound_set_has_no_problems_and_a_missing_one_has_one():
    minari.write(toy(), ID)
    assert minari_checks.problems(ID) == []
    (problem,) = minari_checks.problems("nowhere")
    assert "nowhere does not exist" in problem.text


def test_an_episode_without_an_end_can_be_taken_as_cut():
    folder = minari.write(toy(), ID)
    edit(folder, _endless)
    assert_same(minari.read(folder, unfinished="cut"), toy())


def test_a_torn_file_and_damaged_metadata_are_named():
    folder = minari.write(toy(), ID)
    file = folder / "data" / "main_data.hdf5"
    file.write_bytes(file.read_bytes()[:3000])
    with pytest.raises(DatasetError, match=r"main_data\.hdf5 cannot be read by minari"):
        minari.read(folder)
    (folder / "data" / "metadata.json").write_text('{"dataset_id": "x"}')
    with pytest.raises(DatasetError, match=r"metadata\.json is not Minari's: it lacks minari_version"):
        minari.read(folder)
    (folder / "data" / "metadata.json").write_text("{")
    with pytest.raises(DatasetError, match=r"metadata\.json cannot be read"):
        minari.read(folder)


def test_a_set_of_a_minari_that_this_one_does_not_know_is_named():
    folder = minari.write(toy(), ID)
    edit_metadata(folder, minari_version="9.0.0")
    with pytest.raises(DatasetError, match=r"9\.0\.0"):
        minari.read(folder)


# -- ids and the network --------------------------------------------------------------------------


def test_local_ids_are_those_of_the_root(root):
    assert minari.local_ids() == []
    minari.write(toy(), ID)
    minari.write(toy(), "plain-v1")
    minari.write(toy(), "elsewhere-v0", root=root.parent / "other")
    (root / "empty-v0").mkdir()
    assert minari.local_ids() == [ID, "plain-v1"]
    assert minari.local_ids(root.parent / "other") == ["elsewhere-v0"]


def test_without_a_network_an_unknown_id_lists_the_local_ones(monkeypatch):
    minari.write(toy(), ID)
    monkeypatch.setattr(minari_root, "_offline", lambda: True)
    with pytest.raises(DatasetError, match=rf"ctrlrl/toy/mode-v0 is not in .*no network.*Did you mean {ID}\?.*{ID}"):
        minari.read("ctrlrl/toy/mode-v0")
    with pytest.raises(DatasetError, match="no id"):
        minari.read("not an id")


def test_an_id_that_is_not_here_is_fetched_by_minari(monkeypatch, capsys, root):
    asked = []

    def download(name):
        print("chatter")
        asked.append(name)
        minari.write(toy(), ID)

    monkeypatch.setattr(minari_root, "_offline", lambda: False)
    monkeypatch.setattr(library, "download_dataset", download)
    assert_same(minari.read(f"hf://someone/{ID}"), toy())
    assert_same(minari.read(ID), toy())  # here by now
    assert asked == [f"hf://someone/{ID}"] and capsys.readouterr().out == ""


@pytest.mark.parametrize("error", [ValueError("no such version"), KeyboardInterrupt()], ids=["refused", "Ctrl-C"])
def test_a_download_that_stops_leaves_nothing_behind(monkeypatch, root, error):
    def download(name):
        (root / name / "data").mkdir(parents=True)
        (root / name / "data" / "main_data.hdf5").write_bytes(b"half")
        raise error

    monkeypatch.setattr(minari_root, "_offline", lambda: False)
    monkeypatch.setattr(library, "download_dataset", download)
    expected = KeyboardInterrupt if isinstance(error, KeyboardInterrupt) else DatasetError
    with pytest.raises(expected, match="no such version" if expected is DatasetError else None):
        minari.read(ID)
    assert not (root / ID).exists()


# -- all or nothing -------------------------------------------------------------------------------


@pytest.mark.parametrize("error", [OSError("disk full"), KeyboardInterrupt()], ids=["full", "Ctrl-C"])
def test_a_set_that_is_not_finished_leaves_nothing_behind(monkeypatch, root, error):
    from minari.dataset._storages.hdf5_storage import HDF5Storage

    real = HDF5Storage.update_episodes

    def torn(self, episodes):
        real(self, [next(iter(episodes))])
        raise error

    minari.write(toy(), "ctrlrl/kept-v0")
    before = sorted(p.relative_to(root) for p in root.rglob("*"))
    monkeypatch.setattr(HDF5Storage, "update_episodes", torn)
    with pytest.raises(type(error)):
        minari.write(toy(), ID)
    assert sorted(p.relative_to(root) for p in root.rglob("*")) == before


def test_an_existing_set_is_never_replaced():
    minari.write(toy(), ID)
    with pytest.raises(DatasetError, match="exists; raise the version"):
        minari.write(toy(), ID)


@pytest.mark.parametrize("name", ["noversion", "../up-v0", "hf://x/y-v0", "a b-v0", "/rooted/x-v0", ""])
def test_what_is_no_id_is_refused(name):
    with pytest.raises(DatasetError, match="no Minari id"):
        minari.write(toy(), name)
