"""Checkpoints survive kills, and damaged ones are never read."""

from __future__ import annotations

import math
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ctrlrl.engine import checkpoint
from ctrlrl.engine.errors import CheckpointError


def small() -> tuple[dict[str, torch.Tensor], dict]:
    tensors = {
        "policy/actor.0.weight": torch.arange(6, dtype=torch.float32).reshape(2, 3),
        "optimizer/m": torch.tensor([0.1, -0.0, 1e-300], dtype=torch.float64),
        "counts": torch.tensor(7, dtype=torch.int64),
        "mask": torch.tensor([True, False]),
    }
    return tensors, {"method": "ppo", "step": 128, "controllers": {"kl": [0.1, math.inf]}, "note": "a\u00e9\n"}


def test_round_trip_of_every_type(tmp_path: Path) -> None:
    types = [
        torch.float16,
        torch.bfloat16,
        torch.float32,
        torch.float64,
        torch.int8,
        torch.int64,
        torch.uint8,
        torch.bool,
    ]
    tensors = {str(t): (torch.randn(3, 2) * 5).to(t) for t in types}
    tensors |= {"empty": torch.zeros(0, 4), "scalar": torch.tensor(3.5), "nan": torch.tensor([math.nan, -math.inf])}
    checkpoint.write(tmp_path / "a.safetensors", tensors, {"x": 1})
    read, state = checkpoint.read(tmp_path / "a.safetensors")
    assert state == {"x": 1}
    assert sorted(read) == sorted(tensors)
    for name, tensor in tensors.items():
        assert read[name].dtype == tensor.dtype and read[name].shape == tensor.shape
        assert read[name].reshape(-1).view(torch.uint8).equal(tensor.reshape(-1).view(torch.uint8))
    assert [p.name for p in tmp_path.iterdir()] == ["a.safetensors"]


def test_views_tied_weights_and_transposes_are_stored_in_full(tmp_path: Path) -> None:
    base = torch.arange(12.0).reshape(3, 4)
    tensors = {"a": base, "tied": base, "row": base[1], "turned": base.t(), "grad": torch.nn.Parameter(base)}
    checkpoint.write(tmp_path / "a.safetensors", tensors, {})
    read, _ = checkpoint.read(tmp_path / "a.safetensors")
    for name, tensor in tensors.items():
        assert read[name].equal(tensor.detach())
    read["a"].zero_()
    assert read["tied"].equal(base)


def test_same_content_gives_same_bytes(tmp_path: Path) -> None:
    tensors, state = small()
    for name in ("a", "b"):
        checkpoint.write(tmp_path / f"{name}.safetensors", tensors, state)
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(st.text(max_size=8).filter(lambda k: k != "$float"), inner, max_size=4)
    ),
    max_leaves=12,
)


@settings(deadline=None, max_examples=60)
@given(value=json_values)
def test_state_round_trips_exactly(tmp_path_factory: pytest.TempPathFactory, value: object) -> None:
    path = tmp_path_factory.mktemp("c") / "a.safetensors"
    checkpoint.write(path, {}, {"value": value})
    _, state = checkpoint.read(path)
    assert repr(state["value"]) == repr(value)  # repr tells nan, -0.0 and 1 from 1.0


def test_numpy_scalars_and_generator_states_round_trip(tmp_path: Path) -> None:
    generator = np.random.default_rng(3)
    generator.random(5)
    state = {"rng": generator.bit_generator.state, "f32": np.float32(0.1), "t": (1, 2)}
    checkpoint.write(tmp_path / "a.safetensors", {}, state)
    _, read = checkpoint.read(tmp_path / "a.safetensors")
    other = np.random.default_rng()
    other.bit_generator.state = read["rng"]
    assert np.array_equal(other.random(4), generator.random(4))
    assert np.float32(read["f32"]) == np.float32(0.1) and read["t"] == [1, 2]


def test_truncation_anywhere_is_refused(tmp_path: Path) -> None:
    tensors, state = small()
    path = tmp_path / "a.safetensors"
    checkpoint.write(path, tensors, state)
    whole = path.read_bytes()
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        with pytest.raises(CheckpointError, match=r"truncated|damaged"):
            checkpoint.read(path)
    path.write_bytes(whole + b"\0")
    with pytest.raises(CheckpointError):
        checkpoint.read(path)


def test_every_flipped_bit_is_refused(tmp_path: Path) -> None:
    tensors, state = small()
    path = tmp_path / "a.safetensors"
    checkpoint.write(path, tensors, state)
    whole, spellings = path.read_bytes(), 0
    for position in range(len(whole)):
        for bit in (0, 3, 5, 7) if position > 8 else range(8):
            path.write_bytes(whole[:position] + bytes([whole[position] ^ (1 << bit)]) + whole[position + 1 :])
            try:
                read, found = checkpoint.read(path)
            except CheckpointError:
                continue
            # Another spelling of the same content (the 9 of an escape in capitals) is the one thing let through.
            assert found == state and all(read[name].equal(tensor) for name, tensor in tensors.items())
            spellings += 1
    assert spellings <= 2


def test_swapped_tensors_are_refused(tmp_path: Path) -> None:
    """A header whose names were exchanged has the same bytes in the payload."""
    path = tmp_path / "a.safetensors"
    checkpoint.write(path, {"aa": torch.zeros(2), "bb": torch.ones(2)}, {})
    raw = path.read_bytes().replace(b'"aa"', b'"cc"').replace(b'"bb"', b'"aa"').replace(b'"cc"', b'"bb"')
    path.write_bytes(raw)
    with pytest.raises(CheckpointError, match="checksum"):
        checkpoint.read(path)


def test_what_is_no_checkpoint_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no checkpoint at .*saved one yet"):
        checkpoint.read(tmp_path / "none.safetensors")
    with pytest.raises(CheckpointError, match="folder"):
        checkpoint.read(tmp_path)
    torch.save({"a": torch.ones(1)}, tmp_path / "zip.safetensors")
    with pytest.raises(CheckpointError, match="zip or pickle"):
        checkpoint.read(tmp_path / "zip.safetensors")
    from safetensors.torch import save_file

    save_file({"a": torch.ones(1)}, tmp_path / "foreign.safetensors", metadata={"who": "else"})
    with pytest.raises(CheckpointError, match=r"not a ctrlrl checkpoint.*who"):
        checkpoint.read(tmp_path / "foreign.safetensors")
    with pytest.raises(CheckpointError, match=r"there are foreign\.safetensors"):
        checkpoint.read(tmp_path / "none.safetensors")


def test_another_format_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint, "FORMAT", 2)
    checkpoint.write(tmp_path / "a.safetensors", {}, {})
    monkeypatch.undo()
    with pytest.raises(CheckpointError, match=r"format 2, this ctrlrl reads format 1. Update"):
        checkpoint.read(tmp_path / "a.safetensors")


def test_expectations_name_found_and_expected(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    checkpoint.write(
        path, {}, {"method": "bpo", "spaces": {"observation": {"shape": [3]}, "action": 2}, "lr": math.nan}
    )
    checkpoint.read(path, expect={"method": "bpo", "spaces": {"observation": {"shape": (3,)}}, "lr": math.nan})
    with pytest.raises(CheckpointError, match="method is 'bpo' in the checkpoint, expected 'ppo'"):
        checkpoint.read(path, expect={"method": "ppo"})
    with pytest.raises(CheckpointError, match=r"spaces.observation.shape is \[3\] in the checkpoint, expected \[4\]"):
        checkpoint.read(path, expect={"spaces": {"observation": {"shape": (4,)}}})
    with pytest.raises(CheckpointError, match="env is nothing"):
        checkpoint.read(path, expect={"env": "CartPole-v1"})


@pytest.mark.parametrize(
    ("tensors", "state", "message"),
    [
        ({"a": 1}, {}, "'a' is a int"),
        ({"": torch.ones(1)}, {}, "non-empty"),
        ({"a": torch.eye(2).to_sparse()}, {}, "sparse"),
        ({}, {"a": [{"b": object()}]}, r"state.a\[0\].b is a object"),
        ({}, {"a": torch.ones(1)}, "among the tensors"),
        ({}, {"a": {1: 2}}, "key 1"),
    ],
)
def test_what_cannot_be_stored_leaves_the_old_file(tmp_path: Path, tensors: dict, state: dict, message: str) -> None:
    path = tmp_path / "a.safetensors"
    checkpoint.write(path, {}, {"old": True})
    with pytest.raises(CheckpointError, match=message):
        checkpoint.write(path, tensors, state)
    assert checkpoint.read(path)[1] == {"old": True}
    assert [p.name for p in tmp_path.iterdir()] == ["a.safetensors"]


def test_a_failing_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.safetensors"
    checkpoint.write(path, {}, {"old": True})

    def full(*_: object, **__: object) -> None:
        Path(f"{path}.tmp-{os.getpid()}").write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "save_file", full)
    with pytest.raises(OSError, match="No space"):
        checkpoint.write(path, {}, {})
    assert checkpoint.read(path)[1] == {"old": True}
    assert [p.name for p in tmp_path.iterdir()] == ["a.safetensors"]


WRITER = """
import sys, torch
from ctrlrl.engine import checkpoint
n = 0
while True:
    checkpoint.write(sys.argv[1], {"w": torch.full((300_000,), float(n)), "b": torch.full((5,), float(n))}, {"n": n})
    if n == 0:
        print("ready", flush=True)
    n += 1
"""


def test_kill_nine_in_the_middle_of_writing(tmp_path: Path) -> None:
    """Whenever the writer dies, the file is whole and its parts belong together."""
    path = tmp_path / "last.safetensors"
    chance, torn = random.Random(0), 0
    for attempt in range(60):
        if attempt >= 6 and torn:
            break
        writer = subprocess.Popen([sys.executable, "-c", WRITER, str(path)], stdout=subprocess.PIPE)
        assert writer.stdout is not None and writer.stdout.readline() == b"ready\n"
        time.sleep(chance.uniform(0.0, 0.05))
        writer.send_signal(signal.SIGKILL)
        writer.wait()
        writer.stdout.close()
        tensors, state = checkpoint.read(path)
        assert tensors["w"].eq(state["n"]).all() and tensors["b"].eq(state["n"]).all()
        torn += len(list(tmp_path.glob("*.tmp-*")))
        checkpoint.clean_temporaries(tmp_path)
        assert [p.name for p in tmp_path.iterdir()] == ["last.safetensors"]
    assert torn > 0, "no kill fell into a write: the test shows nothing; let it kill more often"


def test_cleaning_spares_living_writers_and_other_files(tmp_path: Path) -> None:
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    names = [f"a.safetensors.tmp-{dead.pid}", f"a.safetensors.tmp-{os.getpid()}", f"v.mp4.tmp-{dead.pid}.mp4"]
    kept = [f"a.safetensors.tmp-{os.getppid()}", "a.safetensors", "notes.tmp-old"]
    for name in names + kept:
        (tmp_path / name).write_bytes(b"x")
    assert sorted(p.name for p in checkpoint.clean_temporaries(tmp_path)) == sorted(names)
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(kept)
    assert checkpoint.clean_temporaries(tmp_path / "nowhere") == []
