"""One call for D4RL ids, files and Minari sets."""

import dataclasses
import hashlib
import types

import pytest
from data.d4rl_files import rows, save
from data.file_server import serving

from ctrlrl.data import download, load
from ctrlrl.data.d4rl_catalogue import CATALOGUE
from ctrlrl.data.dataset import DatasetError
from ctrlrl.types import EnvSpec


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("D4RL_DATASET_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(download, "_checked", set())
    return tmp_path / "cache"


def test_an_id_of_d4rl_is_fetched_into_the_cache_and_its_unfinished_last_episode_is_cut(cache, tmp_path, monkeypatch):
    body = save(tmp_path / "made.hdf5", rows((3, 4), "t-", size=11, actions=3)).read_bytes()
    with serving(body) as server:
        entry = CATALOGUE["hopper-medium-v2"]
        near = dataclasses.replace(entry, url=server.address("hopper_medium-v2.hdf5"))
        monkeypatch.setitem(CATALOGUE, entry.id, near)
        for _ in range(2):
            d = load.load("hopper-medium-v2", progress=False)
    assert server.asked == [None]
    assert d.info.id == "hopper-medium-v2" and d.info.path == str(cache / "hopper_medium-v2.hdf5")
    assert d.info.sha256 == hashlib.sha256(body).hexdigest()
    assert d.info.env == EnvSpec("Hopper-v4") and d.info.ref_max_score == 3234.3
    assert len(d.episodes) == 2 and d.timeouts[6]


def test_a_changed_file_in_the_cache_is_refused(cache, monkeypatch):
    cache.mkdir()
    path = save(cache / "door-human-v1.hdf5", rows((3,), "c", size=39, actions=28))
    assert load.load("door-human-v1").info.env.id.endswith("AdroitHandDoor-v1")
    save(path, rows((4,), "c", size=39, actions=28))
    with pytest.raises(DatasetError, match="is not the file of its first use"):
        load.load("door-human-v1")


def test_a_local_file_is_read_with_its_checksum_and_without_a_record_beside_it(tmp_path):
    path = save(tmp_path / "mine.h5", rows((3, 4), "t-", size=11, actions=3))
    with pytest.raises(DatasetError, match="has no end"):
        load.load(path)
    d = load.load(str(path), like="hopper-medium-v2", env="Hopper-v5", unfinished="cut")
    assert d.info.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    assert d.info.env == EnvSpec("Hopper-v5") and d.info.ref_max_score == 3234.3
    assert [p.name for p in tmp_path.iterdir()] == ["mine.h5"]


def test_a_folder_for_a_memory_map_is_passed_on_for_files_and_ids(cache, tmp_path):
    import numpy as np

    path = save(tmp_path / "mine.hdf5", rows((3,), "c"))
    d = load.load(path, memory_map=tmp_path / "a")
    assert isinstance(d.actions, np.memmap) and (tmp_path / "a" / "actions.npy").is_file()
    cache.mkdir()
    save(cache / "door-human-v1.hdf5", rows((3,), "c", size=39, actions=28))
    d = load.load("door-human-v1", memory_map=str(tmp_path / "b"))
    assert isinstance(d.actions, np.memmap) and (tmp_path / "b" / "actions.npy").is_file()


def test_other_names_go_to_minari_with_what_was_asked(monkeypatch):
    import sys

    import ctrlrl.data as package

    asked = []
    stand_in = types.SimpleNamespace(read=lambda name, **options: asked.append((name, options)) or "read")
    monkeypatch.setitem(sys.modules, "ctrlrl.data.minari", stand_in)
    monkeypatch.setattr(package, "minari", stand_in, raising=False)
    assert load.load("D4RL/door/human-v2", env="X-v0", unfinished="cut") == "read"
    assert asked == [("D4RL/door/human-v2", {"env": "X-v0", "unfinished": "cut"})]

    def unknown(name, **options):
        raise DatasetError(f"no {name}")

    stand_in.read = unknown
    with pytest.raises(DatasetError, match=r"no hopper-medum-v2\. D4RL has no such id\. Did you mean hopper-medium-v2"):
        load.load("hopper-medum-v2")
    with pytest.raises(DatasetError, match="like='door-human-v1' is for local D4RL files"):
        load.load("D4RL/door/human-v2", like="door-human-v1")


def test_files_that_are_absent_or_end_otherwise_are_named(tmp_path):
    with pytest.raises(DatasetError, match=r"absent\.hdf5: there is no such file"):
        load.load(tmp_path / "absent.hdf5")
    (tmp_path / "set.npz").write_bytes(b"")
    with pytest.raises(DatasetError, match=r"set\.npz ends in '\.npz'; expected a D4RL file"):
        load.load(tmp_path / "set.npz")
