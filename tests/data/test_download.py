"""Downloads: continued where they stopped, whole or not at all, and the same file ever after."""

import hashlib
import json
import os
import threading
from collections import namedtuple

import numpy as np
import pytest
from data.file_server import serving

from ctrlrl.data import download
from ctrlrl.data.dataset import DatasetError

BODY = np.random.default_rng(0).bytes(300_000)
SHA = hashlib.sha256(BODY).hexdigest()


@pytest.fixture
def server():
    with serving(BODY) as running:
        yield running


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(download.time, "sleep", lambda _: None)
    monkeypatch.setattr(download, "_checked", set())


@pytest.fixture
def target(tmp_path):
    return tmp_path / "cache" / "set.hdf5"


def fetch(server, target, **options):
    return download.fetch(server.address(), target, progress=False, **options)


def test_a_file_is_fetched_whole_once_and_its_checksum_is_recorded(server, target):
    assert fetch(server, target) == target and target.read_bytes() == BODY
    entry = json.loads((target.parent / "checksums.json").read_text())["set.hdf5"]
    assert entry["sha256"] == SHA and entry["size"] == len(BODY)
    fetch(server, target)
    assert server.asked == [None]
    left = {p.name for p in target.parent.iterdir() if not p.name.startswith(".")}
    assert left == {"set.hdf5", "checksums.json"}


def test_a_connection_that_ends_too_early_is_continued_from_there(server, target):
    server.cuts = [100_000, 50_000]
    fetch(server, target)
    assert target.read_bytes() == BODY
    assert server.asked == [None, "bytes=100000-", "bytes=150000-"]


def test_a_later_call_continues_what_an_earlier_one_left(server, target):
    server.cuts = [100_000, 0, 0, 0]
    with pytest.raises(DatasetError, match=r"0\.1 MB are kept and will be continued"):
        fetch(server, target)
    assert not target.exists() and target.with_name("set.hdf5.part").stat().st_size == 100_000
    fetch(server, target)
    assert target.read_bytes() == BODY and server.asked[-1] == "bytes=100000-"


def test_tries_that_get_further_do_not_count_as_failures(server, target):
    server.cuts = [30_000] * 9
    fetch(server, target)
    assert target.read_bytes() == BODY and len(server.asked) == 10


def test_a_part_of_another_version_is_not_continued(server, target):
    server.cuts = [100_000, 0, 0, 0]
    with pytest.raises(DatasetError):
        fetch(server, target)
    server.body, server.etag = BODY[::-1], '"two"'
    fetch(server, target)
    assert target.read_bytes() == BODY[::-1]


@pytest.mark.parametrize("without", ["ranges", "etag"])
def test_a_server_that_cannot_continue_sends_it_all_again(server, target, without):
    setattr(server, without, None)
    server.cuts = [100_000]
    fetch(server, target)
    assert target.read_bytes() == BODY


def test_a_part_that_is_whole_already_only_gets_its_name(server, target):
    server.cuts = [100_000, 0, 0, 0]
    with pytest.raises(DatasetError):
        fetch(server, target)
    target.with_name("set.hdf5.part").write_bytes(BODY)
    fetch(server, target)
    assert target.read_bytes() == BODY and server.asked[-1] == f"bytes={len(BODY)}-"


def test_another_checksum_than_the_expected_is_an_error_and_nothing_is_kept(server, target):
    with pytest.raises(DatasetError, match=f"has SHA-256 {SHA}, expected {'0' * 64}; it was not kept"):
        fetch(server, target, sha256="0" * 64)
    assert not target.exists() and not target.with_name("set.hdf5.part").exists()
    fetch(server, target, sha256=SHA.upper())
    with pytest.raises(DatasetError, match="delete it to fetch it again"):
        fetch(server, target, sha256="0" * 64)


def test_a_file_that_changed_since_its_first_use_is_an_error_that_says_what_to_do(server, target, monkeypatch):
    fetch(server, target)
    target.write_bytes(BODY[:-1] + b"?")
    with pytest.raises(DatasetError, match=r"is not the file of its first use .*Delete it .*checksums\.json to accept"):
        fetch(server, target)
    target.unlink()
    fetch(server, target)  # the first one again
    server.body = b"other"
    target.unlink()
    with pytest.raises(DatasetError, match="is not the file of its first use"):
        fetch(server, target)


def test_a_file_is_looked_through_once_in_a_session_and_again_when_it_changes(server, target, monkeypatch):
    seen, digest = [], download.digest
    monkeypatch.setattr(download, "digest", lambda path: seen.append(path) or digest(path))
    fetch(server, target)
    for _ in range(3):
        assert download.verified(target) == SHA
    assert len(seen) == 1
    os.utime(target, ns=(1, 1))
    assert download.verified(target) == SHA and len(seen) == 2
    download._checked.clear()  # another session
    assert download.verified(target) == SHA and len(seen) == 3


def test_files_that_others_put_there_are_recorded_at_first_use(tmp_path):
    for name in ("b.hdf5", "a.hdf5"):
        (tmp_path / name).write_bytes(name.encode())
        assert download.verified(tmp_path / name) == hashlib.sha256(name.encode()).hexdigest()
    assert list(json.loads((tmp_path / "checksums.json").read_text())) == ["a.hdf5", "b.hdf5"]


def test_a_folder_that_cannot_be_written_is_used_without_a_record(tmp_path, monkeypatch):
    (tmp_path / "a.hdf5").write_bytes(b"a")
    monkeypatch.setattr(download.os, "access", lambda path, mode: False)
    assert download.fetch("http://nowhere.invalid/a.hdf5", tmp_path / "a.hdf5") == tmp_path / "a.hdf5"
    assert [p.name for p in tmp_path.iterdir()] == ["a.hdf5"]


def test_a_damaged_record_is_named(tmp_path):
    (tmp_path / "a.hdf5").write_bytes(b"a")
    (tmp_path / "checksums.json").write_text("{")
    with pytest.raises(DatasetError, match=r"checksums\.json is damaged; delete it"):
        download.verified(tmp_path / "a.hdf5")


def test_without_a_network_the_address_and_the_place_are_named(target):
    with serving(b"") as gone:
        address = gone.address()
    with pytest.raises(DatasetError, match=rf"cannot fetch {address} .*Is there a network\?.*cache/set\.hdf5"):
        download.fetch(address, target, progress=False)
    assert not target.exists()


def test_a_refusal_is_final_and_a_failing_server_is_asked_again(server, target):
    server.status = 404
    with pytest.raises(DatasetError, match="the server answers 404 Not Found"):
        fetch(server, target)
    assert len(server.asked) == 1
    server.status = 503
    with pytest.raises(DatasetError, match="503"):
        fetch(server, target)
    assert len(server.asked) == 5


def test_too_little_space_is_told_before_anything_is_written(server, target, monkeypatch):
    Usage = namedtuple("Usage", "total used free")
    monkeypatch.setattr(download.shutil, "disk_usage", lambda path: Usage(10, 5, 100_000))
    with pytest.raises(DatasetError, match="D4RL_DATASET_DIR"):
        fetch(server, target)
    assert not target.exists() and not target.with_name("set.hdf5.part").exists()


def test_a_silent_server_counts_as_a_failure(target):
    import socket

    with socket.create_server(("127.0.0.1", 0)) as silent:  # accepts and never answers
        address = f"http://127.0.0.1:{silent.getsockname()[1]}/set.hdf5"
        with pytest.raises(DatasetError, match="timed out"):
            download.fetch(address, target, progress=False, timeout_s=0.05)


def test_other_addresses_than_of_the_web_are_refused(tmp_path, target):
    (tmp_path / "secret").write_text("x")
    with pytest.raises(DatasetError, match="expected an address beginning with http"):
        download.fetch(f"file://{tmp_path}/secret", target)


def test_several_that_want_one_file_at_once_fetch_it_once(server, target):
    threads = [threading.Thread(target=fetch, args=(server, target)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert server.asked == [None] and target.read_bytes() == BODY


def test_the_bar_goes_to_standard_error(server, target, capfd):
    download.fetch(server.address(), target, progress=True)
    out, err = capfd.readouterr()
    assert out == "" and "set.hdf5" in err


def test_the_cache_is_where_d4rl_has_it(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("D4RL_DATASET_DIR", raising=False)
    assert download.cache_folder() == tmp_path / ".d4rl" / "datasets"
    monkeypatch.setenv("D4RL_DATASET_DIR", "/elsewhere")
    assert str(download.cache_folder()) == "/elsewhere"
