"""Replay buffers on disk: exact, incremental, and restorable whenever the process is killed."""

import os
import shutil
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import torch

from ctrlrl.data.transitions import TransitionReplay
from ctrlrl.engine import checkpoint, replay_files
from ctrlrl.engine.errors import CheckpointError

SPACE = gym.spaces.Dict(
    {"pose": gym.spaces.Box(-1, 1, (3,), np.float64), "eye": gym.spaces.Box(0, 255, (2, 2), np.uint8)}
)


def ring(capacity=10, space=SPACE, **kwargs):
    return TransitionReplay(space, (2,), torch.float32, capacity, extras={"params": ((2,), torch.float32)}, **kwargs)


def add(replay, count, salt=0):
    for _ in range(count):
        g = torch.Generator().manual_seed(replay.added + 1000 * salt)

        def obs(g=g):
            eye = torch.randint(256, (1, 2, 2), generator=g, dtype=torch.uint8)
            return {"pose": torch.randn(1, 3, generator=g), "eye": eye}

        before, after, action, reward = obs(), obs(), torch.randn(1, 2, generator=g), torch.randn(1, generator=g)
        ended = torch.rand(1, generator=g)
        extras = {"params": torch.randn(1, 2, generator=g)}
        replay.add(before, action, reward, ended < 0.2, ended > 0.8, after, extras)


def contents(replay):
    """Everything that draws and samples depend on."""
    return replay.added, {k: v.clone() for k, v in replay.rows(replay.oldest, replay.added).items()}


def same(a, b):
    assert a[0] == b[0] and a[1].keys() == b[1].keys()
    for name, value in a[1].items():
        assert torch.equal(value, b[1][name]), name


def restored(source, manifest, capacity=10, **kwargs):
    replay = ring(capacity, **kwargs)
    replay_files.restore(replay, source, manifest)
    return replay


def names(folder):
    return sorted(p.name for p in Path(folder).iterdir())


def numbers(manifest):
    return [(entry["first"], entry["last"]) for entry in manifest]


def test_each_save_writes_only_what_is_new(tmp_path):
    replay, manifest = ring(), []
    assert replay_files.save(replay, tmp_path, []) == [] and names(tmp_path) == []
    for count, segments in (
        (4, [(0, 4)]),
        (0, [(0, 4)]),
        (5, [(0, 4), (4, 9)]),
        (1, [(0, 4), (4, 9), (9, 10)]),
        (3, [(0, 4), (4, 9), (9, 10), (10, 13)]),  # rows 0 to 2 are gone, 3 is not
        (1, [(4, 9), (9, 10), (10, 13), (13, 14)]),
        (25, [(29, 39)]),  # longer than the ring
        (0, [(29, 39)]),
    ):
        add(replay, count)
        there = {name: (tmp_path / name).stat().st_mtime_ns for name in names(tmp_path)}
        manifest = replay_files.save(replay, tmp_path, manifest)
        assert numbers(manifest) == segments
        assert [e["file"] for e in manifest] == [f"replay-{a}-{b}.safetensors" for a, b in segments]
        assert there.items() <= {name: (tmp_path / name).stat().st_mtime_ns for name in names(tmp_path)}.items()
        assert len(names(tmp_path)) - len(there) == (count > 0)
        stored, state = checkpoint.read(tmp_path / manifest[-1]["file"])
        assert state == {"first": segments[-1][0], "last": segments[-1][1]}
        assert len(stored["reward"]) == segments[-1][1] - segments[-1][0]
        same(contents(replay), contents(restored(tmp_path, manifest)))


@pytest.mark.parametrize("mapped", [False, True])
@pytest.mark.parametrize("count", [1, 4, 7, 10, 23])
def test_what_is_restored_draws_and_samples_bit_for_bit_the_same(count, mapped, tmp_path):
    replay, manifest = ring(), []
    for _ in range(6):
        add(replay, count)
        manifest = replay_files.save(replay, tmp_path, manifest)
        replay_files.clean(tmp_path, manifest)
        again = restored(tmp_path, manifest, folder=tmp_path / "map" if mapped else None)
        assert (again.added, again.position, len(again)) == (replay.added, replay.position, len(replay))
        for step in range(3):
            index = replay.draw(1, 16, torch.Generator().manual_seed(step))
            assert torch.equal(index, again.draw(1, 16, torch.Generator().manual_seed(step)))
            a, b = replay.sample(index[0]), again.sample(index[0])
            for x, y in ((a.obs, b.obs), (a.next_obs, b.next_obs), (a.extras, b.extras)):
                assert all(torch.equal(x[k], y[k]) for k in x)
            assert all(torch.equal(x, y) for x, y in zip(a[1:4], b[1:4], strict=True))
            assert torch.equal(replay.columns["truncated"][index[0]], again.columns["truncated"][index[0]])
            add(replay, 1)
            add(again, 1)


def test_odd_bits_survive(tmp_path):
    replay = ring()
    add(replay, 3)
    replay.columns["reward"][:3] = torch.tensor([-0.0, float("nan"), float("inf")])
    again = restored(tmp_path, replay_files.save(replay, tmp_path, []))
    assert torch.equal(again.columns["reward"][:3].view(torch.int32), replay.columns["reward"][:3].view(torch.int32))


def test_many_rows_are_written_in_parts(tmp_path, monkeypatch):
    replay = ring(100)
    add(replay, 50)
    monkeypatch.setattr(replay_files, "SEGMENT_BYTES", 20 * replay.row_bytes)
    manifest = replay_files.save(replay, tmp_path, [])
    assert numbers(manifest) == [(0, 20), (20, 40), (40, 50)]
    same(contents(replay), contents(restored(tmp_path, manifest, 100)))
    monkeypatch.setattr(replay_files, "SEGMENT_BYTES", 1)
    add(replay, 2)
    assert numbers(replay_files.save(replay, tmp_path, manifest))[3:] == [(50, 51), (51, 52)]


def test_clean_deletes_what_no_manifest_names_and_nothing_else(tmp_path):
    replay, kept = ring(), ["last.safetensors", "replay-x.safetensors", "notes.txt", "replay-1-2.safetensors.bak"]
    for name in kept:
        (tmp_path / name).write_text("mine")
    add(replay, 6)
    first = replay_files.save(replay, tmp_path, [])
    add(replay, 10)
    second = replay_files.save(replay, tmp_path, first)
    assert replay_files.clean(tmp_path, first, second) == []
    assert [p.name for p in replay_files.clean(tmp_path, second)] == ["replay-0-6.safetensors"]
    assert names(tmp_path) == sorted([*kept, "replay-6-16.safetensors"])


def test_saving_elsewhere_writes_all(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    replay = ring()
    add(replay, 6)
    manifest = replay_files.save(replay, tmp_path / "a", [])
    add(replay, 6)
    manifest = replay_files.save(replay, tmp_path / "b", manifest)
    assert numbers(manifest) == [(2, 12)]
    same(contents(replay), contents(restored(tmp_path / "b", manifest)))


def test_a_manifest_of_another_buffer_is_refused(tmp_path):
    replay = ring()
    add(replay, 6)
    manifest = replay_files.save(replay, tmp_path, [])
    fresh = ring()
    add(fresh, 5)
    with pytest.raises(CheckpointError, match="manifest reaches row 6, but 5 rows were added"):
        replay_files.save(fresh, tmp_path, manifest)


def test_a_run_resumed_from_an_older_checkpoint_does_not_touch_the_newer(tmp_path):
    replay = ring()
    add(replay, 4)
    best = replay_files.save(replay, tmp_path, [])
    add(replay, 3)
    last = replay_files.save(replay, tmp_path, best)
    other = restored(tmp_path, best)
    add(other, 3, salt=1)
    branch = replay_files.save(other, tmp_path, best)
    assert numbers(branch) == numbers(last)
    same(contents(replay), contents(restored(tmp_path, last)))
    same(contents(other), contents(restored(tmp_path, branch)))
    assert [p.name for p in replay_files.clean(tmp_path, branch)] == [last[1]["file"]]
    same(contents(other), contents(restored(tmp_path, branch)))


def test_a_smaller_ring_takes_the_newest_rows(tmp_path):
    replay, manifest = ring(), []
    for count in (4, 4, 5):
        add(replay, count)
        manifest = replay_files.save(replay, tmp_path, manifest)
    assert numbers(manifest) == [(0, 4), (4, 8), (8, 13)]
    for capacity in (7, 4):
        again = restored(tmp_path, manifest, capacity)
        assert (again.added, again.oldest) == (13, 13 - capacity)
        same((13, replay.rows(13 - capacity, 13)), contents(again))
    (tmp_path / manifest[0]["file"]).unlink()
    (tmp_path / manifest[1]["file"]).unlink()
    assert restored(tmp_path, manifest, 4).added == restored(tmp_path, [manifest[0], manifest[2]], 4).added == 13


def test_a_larger_ring_is_refused_where_rows_are_gone(tmp_path):
    replay, manifest = ring(), []
    for _ in range(4):
        add(replay, 5)
        manifest = replay_files.save(replay, tmp_path, manifest)
    larger = ring(12)
    with pytest.raises(CheckpointError, match=r"12 rows after 20 were added needs the rows from 8 on.*replay_size"):
        replay_files.restore(larger, tmp_path, manifest)
    assert len(larger) == 0
    with pytest.raises(CheckpointError, match="needs the rows from 10 on"):
        restored(tmp_path, manifest[1:])
    early = manifest[:0] + replay_files.save(replay, tmp_path, [])
    assert restored(tmp_path, early).added == 20


def test_rows_missing_between_segments_are_noticed(tmp_path):
    replay, manifest = ring(), []
    for _ in range(3):
        add(replay, 3)
        manifest = replay_files.save(replay, tmp_path, manifest)
    with pytest.raises(CheckpointError, match="those from 3 on are not in the checkpoint"):
        restored(tmp_path, [manifest[0], manifest[2]])


def test_an_empty_manifest_empties_the_ring(tmp_path):
    replay = ring()
    add(replay, 3)
    replay_files.restore(replay, tmp_path, [])
    assert len(replay) == replay.added == 0


@pytest.mark.parametrize("which", [0, 1])
def test_a_missing_or_damaged_segment_is_named_and_leaves_the_ring_empty(which, tmp_path):
    replay = ring()
    add(replay, 4)
    manifest = replay_files.save(replay, tmp_path, [])
    add(replay, 4)
    manifest = replay_files.save(replay, tmp_path, manifest)
    file = tmp_path / manifest[which]["file"]
    whole = file.read_bytes()
    flipped = bytearray(whole)
    flipped[-5] ^= 1
    for damaged in (whole[:-1], whole[: len(whole) // 2], b"", bytes(flipped), None):
        file.unlink() if damaged is None else file.write_bytes(damaged)
        target = ring()
        with pytest.raises(CheckpointError, match=file.name):
            replay_files.restore(target, tmp_path, manifest)
        assert len(target) == 0


def test_a_segment_in_the_place_of_another_is_noticed(tmp_path):
    replay = ring()
    add(replay, 4)
    manifest = replay_files.save(replay, tmp_path, [])
    add(replay, 4)
    manifest = replay_files.save(replay, tmp_path, manifest)
    shutil.copy(tmp_path / manifest[0]["file"], tmp_path / manifest[1]["file"])
    with pytest.raises(CheckpointError, match="first is 0 in the checkpoint, expected 4"):
        restored(tmp_path, manifest)
    with pytest.raises(CheckpointError, match="not the name of a segment"):
        restored(tmp_path, [manifest[0], manifest[1] | {"file": "last.safetensors"}])


def test_a_segment_of_other_columns_is_refused(tmp_path):
    replay = ring()
    add(replay, 4)
    manifest = replay_files.save(replay, tmp_path, [])
    wider = gym.spaces.Dict(dict(SPACE.spaces) | {"pose": gym.spaces.Box(-1, 1, (4,))})
    with pytest.raises(CheckpointError, match=r"replay-0-4.*'obs/pose': 'torch.float32 \[3\]'.*\[4\]"):
        restored(tmp_path, manifest, space=wider)
    signed = gym.spaces.Dict(dict(SPACE.spaces) | {"eye": gym.spaces.Box(0, 100, (2, 2), np.int16)})
    with pytest.raises(CheckpointError, match=r"uint8 \[2, 2\].*int16 \[2, 2\]"):
        restored(tmp_path, manifest, space=signed)


# kills


class Killed(BaseException):
    """Stands for SIGKILL: once raised, nothing reaches the disk any more, cleaning up included."""


class Disk:
    """Counts the calls that change the disk and kills before or after the one numbered ``at``."""

    def __init__(self, monkeypatch, at, after):
        self.at, self.after, self.count, self.dead = at, after, 0, False
        for owner, name in (
            (os, "replace"), (Path, "unlink"), (Path, "mkdir"), (shutil, "rmtree"), (checkpoint, "save_file"),
        ):  # fmt: skip
            monkeypatch.setattr(owner, name, self.guarded(getattr(owner, name)))
        monkeypatch.setattr(os, "fsync", lambda handle: None)  # slow, and of no use against kills

    def guarded(self, call):
        def guard(*args, **kwargs):
            if self.dead:
                raise Killed
            self.count += 1
            self.dead = self.count == self.at
            if not self.dead:
                return call(*args, **kwargs)
            if self.after:
                call(*args, **kwargs)
            raise Killed

        return guard


def border(replay, folder, manifest):
    """What a run does at a checkpoint."""
    manifest = replay_files.save(replay, folder, manifest)
    checkpoint.write(folder / "last.safetensors", {}, {"replay": manifest, "added": replay.added})
    replay_files.clean(folder, manifest)
    return manifest


COUNTS = (4, 8, 12)
"""Rows before each border: filling, around the end, more than the ring holds."""


def reference():
    replay, states = ring(), {}
    for count in COUNTS:
        add(replay, count)
        states[replay.added] = contents(replay)
    return states


@pytest.mark.parametrize("after", [False, True])
def test_a_kill_at_any_moment_leaves_the_last_checkpoint_restorable(after, tmp_path, monkeypatch):
    states, reached, at = reference(), set(), 0
    while True:
        at += 1
        folder = tmp_path / str(at)
        folder.mkdir()
        replay, manifest, survived = ring(), [], False
        with monkeypatch.context() as patch:
            patch.setattr(replay_files, "SEGMENT_BYTES", 5 * replay.row_bytes)
            Disk(patch, at, after)
            try:
                for count in COUNTS:
                    add(replay, count)
                    manifest = border(replay, folder, manifest)
                survived = True
            except Killed:
                pass
        manifest, state = [], {"added": 0}
        if (folder / "last.safetensors").exists():
            _, state = checkpoint.read(folder / "last.safetensors")
            manifest = state["replay"]
            same(contents(restored(folder, manifest)), states[state["added"]])
        reached.add(state["added"])
        # the run goes on from there, and ends as if nothing had been
        replay = restored(folder, manifest)
        replay_files.clean(folder, manifest)
        for count, added in zip(COUNTS, states, strict=True):
            if added > state["added"]:
                add(replay, count)
                manifest = border(replay, folder, manifest)
        same(contents(restored(folder, manifest)), states[added])
        named = {entry["file"] for entry in manifest}
        assert {n for n in names(folder) if n.startswith("replay-") and ".tmp-" not in n} == named
        if survived:
            break
    assert at > 30 and reached == {0, *states}
