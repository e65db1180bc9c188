"""The ring of transitions: which rows are where, what they hold, and what memory they take."""

import math
import os
import re
import sys
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import torch

from ctrlrl.data import transitions
from ctrlrl.data.transitions import ReplaySizeError, TransitionReplay, Transitions, bytes_needed, free_bytes

BOX = gym.spaces.Box(-1, 1, (3,), np.float32)
IMAGE = gym.spaces.Box(0, 255, (2, 4, 5), np.uint8)
SPACES = {
    "vector": (BOX, {"": ((3,), torch.float32)}),
    "float64": (gym.spaces.Box(-1, 1, (2, 2), np.float64), {"": ((2, 2), torch.float32)}),
    "image": (IMAGE, {"": ((2, 4, 5), torch.uint8)}),
    "discrete": (gym.spaces.Discrete(900), {"": ((), torch.int64)}),
    "multi-discrete": (gym.spaces.MultiDiscrete([5, 900]), {"": ((2,), torch.int64)}),
    "multi-binary": (gym.spaces.MultiBinary(3), {"": ((3,), torch.int8)}),
    "dict": (
        gym.spaces.Dict({"eye": IMAGE, "pose": BOX, "room": gym.spaces.Discrete(9)}),
        {"eye": ((2, 4, 5), torch.uint8), "pose": ((3,), torch.float32), "room": ((), torch.int64)},
    ),
}
linux = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


def ring(capacity, space=BOX, **kwargs):
    return TransitionReplay(space, (2,), torch.float32, capacity, **kwargs)


def filled(numbers, shape, dtype, salt):
    """[n, *shape] in which every element depends on the row's number and on its place."""
    size = math.prod(shape)
    flat = numbers.unsqueeze(1) * 31 + torch.arange(size) * 7 + salt
    return (flat % (2 if dtype is torch.int8 else 251)).reshape(len(numbers), *shape).to(dtype)


def numbered(first, last, kind="vector"):
    """Arguments of ``add`` for the rows numbered first to last - 1; every row differs in every column."""
    numbers = torch.arange(first, last)
    parts = SPACES[kind][1]

    def obs(salt):
        made = {key: filled(numbers, *part, salt) for key, part in parts.items()}
        return made.get("", made)

    return {
        "obs": obs(1),
        "action": filled(numbers, (2,), torch.float32, 2) / 7,
        "reward": numbers / 3,
        "terminated": numbers % 5 == 0,
        "truncated": numbers % 5 == 1,
        "next_obs": obs(3),
    }


def same(found, expected):
    if isinstance(expected, dict):
        assert found.keys() == expected.keys()
        for key, value in expected.items():
            same(found[key], value)
    else:
        assert found.shape == expected.shape and torch.equal(found, expected.to(found.dtype))


def holds(replay, places, numbers, kind="vector"):
    """Check that the rows at ``places`` are the rows ``numbers``."""
    batch = replay.sample(torch.as_tensor(places))
    truncated = replay.columns["truncated"][torch.as_tensor(places)]
    for i, number in enumerate(numbers):
        one = numbered(number, number + 1, kind)
        row = {k: v[i : i + 1] for k, v in batch.obs.items()} if isinstance(batch.obs, dict) else batch.obs[i : i + 1]
        after = batch.next_obs
        after = {k: v[i : i + 1] for k, v in after.items()} if isinstance(after, dict) else after[i : i + 1]
        same(row, one["obs"])
        same(after, one["next_obs"])
        for name, value in (("action", batch.action), ("reward", batch.reward_t), ("terminated", batch.terminated_t)):
            same(value[i : i + 1], one[name])
        same(truncated[i : i + 1], one["truncated"])


@pytest.mark.parametrize("size", [1, 3, 4, 7])
def test_the_ring_holds_the_last_rows_at_their_number_modulo_the_capacity(size):
    replay, added = ring(7), 0
    assert len(replay) == replay.position == replay.added == replay.oldest == 0
    for _ in range(12):
        replay.add(**numbered(added, added + size))
        added += size
        oldest = max(0, added - 7)
        assert (replay.added, len(replay), replay.oldest) == (added, min(added, 7), oldest)
        assert replay.position == added % 7 and replay.capacity == 7
        numbers = range(oldest, added)
        holds(replay, [n % 7 for n in numbers], numbers)


@pytest.mark.parametrize("kind", SPACES)
def test_every_space_comes_back_exactly_in_its_own_type(kind):
    space, parts = SPACES[kind]
    replay = ring(5, space)
    replay.add(**numbered(0, 4, kind))
    replay.add(**numbered(4, 7, kind))
    holds(replay, [5 % 5, 6 % 5, 2, 3, 4, 2], [5, 6, 2, 3, 4, 2], kind)
    batch = replay.sample(torch.tensor([0, 1]))
    for obs in (batch.obs, batch.next_obs):
        found = obs if isinstance(obs, dict) else {"": obs}
        assert {k: (tuple(v.shape[1:]), v.dtype) for k, v in found.items()} == parts
    assert batch.reward_t.dtype == batch.terminated_t.dtype == torch.float32
    assert batch.reward_t.shape == batch.terminated_t.shape == (2,)


def test_discrete_actions_keep_their_type_and_shape():
    replay = TransitionReplay(BOX, (), torch.int64, 4)
    replay.add(**(numbered(0, 3) | {"action": torch.tensor([5, 2**40, 0])}))
    assert replay.sample(torch.tensor([1, 0])).action.tolist() == [2**40, 5]


@pytest.mark.parametrize("space", [gym.spaces.Text(3), gym.spaces.Dict({"a": gym.spaces.Dict({"b": BOX})})])
def test_a_space_without_tensors_is_refused(space):
    with pytest.raises(TypeError, match=r"cannot be replayed; expected Box.*FlattenObservation"):
        ring(4, space)


def test_a_cut_episode_is_not_an_ended_one():
    replay = ring(3)
    rows = numbered(0, 3) | {
        "terminated": torch.tensor([False, True, False]), "truncated": torch.tensor([False, False, True]),
    }  # fmt: skip
    replay.add(**rows)
    batch = replay.sample(torch.tensor([0, 1, 2]))
    assert batch.terminated_t.tolist() == [0.0, 1.0, 0.0]
    assert replay.columns["truncated"].tolist() == [0.0, 0.0, 1.0]
    assert torch.equal(batch.next_obs[2], rows["next_obs"][2])


def test_extras_are_kept_beside_the_rest():
    replay = ring(4, extras={"params": ((3,), torch.float32), "seed": ((), torch.int64)})
    extras = {"params": torch.arange(9.0).view(3, 3), "seed": torch.tensor([7, 2**40, 9])}
    replay.add(**numbered(0, 3), extras=extras)
    batch = replay.sample(torch.tensor([2, 1]))
    assert batch.extras.keys() == extras.keys()
    assert batch.extras["params"].tolist() == [[6, 7, 8], [3, 4, 5]] and batch.extras["seed"].tolist() == [9, 2**40]
    assert batch.extras["seed"].dtype is torch.int64
    holds(replay, [0, 1, 2], [0, 1, 2])
    with pytest.raises(ValueError, match="extras/params"):
        replay.add(**numbered(0, 3))


def test_without_extras_a_sample_has_none():
    replay = ring(4)
    replay.add(**numbered(0, 3))
    assert replay.sample(torch.tensor([0])).extras == {}
    assert Transitions(*replay.sample(torch.tensor([0]))[:5]).extras == {}


def test_samples_and_arguments_are_copies():
    replay, rows = ring(2), numbered(0, 2)
    replay.add(**rows)
    batch = replay.sample(torch.tensor([0, 1]))
    rows["obs"].zero_()
    holds(replay, [0, 1], [0, 1])
    replay.add(**numbered(2, 4))
    same(batch.obs, numbered(0, 2)["obs"])


def test_no_gradient_gets_into_the_ring():
    replay, rows = ring(4), numbered(0, 3)
    replay.add(**(rows | {"action": rows["action"].clone().requires_grad_()}))
    assert not replay.sample(torch.tensor([0])).action.requires_grad
    assert not any(column.requires_grad for column in replay.columns.values())


@pytest.mark.parametrize(
    "change, message",
    [
        ({"action": torch.zeros(1, 2)}, r"'action' is torch.float32 \[1, 2\], expected torch.float32 \[3, 2\]"),
        ({"reward": torch.zeros(3, 1)}, r"'reward' is torch.float32 \[3, 1\]"),
        ({"obs": torch.zeros(3, 3, dtype=torch.complex64)}, "'obs' is torch.complex64"),
        ({"obs": {"a": torch.zeros(3, 3)}}, r"columns .*'obs/a'.*expected .*'obs'"),
        ({"extras": {"params": torch.zeros(3)}}, "extras/params"),
    ],
)
def test_rows_that_do_not_fit_are_refused_and_nothing_is_stored(change, message):
    replay = ring(4)
    replay.add(**numbered(0, 4))
    with pytest.raises(ValueError, match=message):
        replay.add(**(numbered(4, 7) | change))
    assert replay.added == 4
    holds(replay, [0, 1, 2, 3], [0, 1, 2, 3])


def test_fractions_do_not_go_into_whole_numbers():
    replay = TransitionReplay(BOX, (2,), torch.int64, 4)
    with pytest.raises(ValueError, match=r"'action' is torch\.float32 .* expected torch\.int64"):
        replay.add(**numbered(0, 3))


def test_more_rows_than_the_capacity_are_refused():
    replay = ring(4)
    with pytest.raises(ValueError, match="5 rows at once do not fit into a replay buffer of 4"):
        replay.add(**numbered(0, 5))
    with pytest.raises(ValueError, match="expected at least 1"):
        ring(0)


def test_rows_by_number_are_in_order_also_around_the_end():
    replay = ring(5)
    replay.add(**numbered(0, 5))
    replay.add(**numbered(5, 8))
    for first, last in ((3, 8), (3, 5), (4, 6), (5, 8), (8, 8)):
        rows = replay.rows(first, last)
        assert list(rows) == list(replay.columns)
        same({k: rows[k] for k in numbered(0, 1)}, numbered(first, last))
    for first, last in ((2, 8), (3, 9), (6, 5)):
        with pytest.raises(ValueError, match=f"rows {first} to {last} were asked for, there are rows 3 to 8"):
            replay.rows(first, last)


def test_put_continues_from_any_number():
    replay, rows = ring(5), numbered(12, 15)
    replay.put(12, rows)
    assert (replay.added, replay.position, replay.oldest) == (15, 0, 10)
    holds(replay, [2, 3, 4], [12, 13, 14])


# draws


def test_draws_are_uniform_over_the_filled_part_only():
    replay = ring(16)
    for size, filled_rows in ((10, 10), (10, 16)):
        replay.add(**numbered(0, size))
        index = replay.draw(100, 200, torch.Generator().manual_seed(0))
        assert index.shape == (100, 200) and index.dtype is torch.int64
        counts = torch.bincount(index.flatten(), minlength=16).double()
        expected = 20_000 / filled_rows
        assert counts[filled_rows:].sum() == 0
        chi_square = ((counts[:filled_rows] - expected) ** 2 / expected).sum()
        # mean k, standard deviation sqrt(2 k) for k = filled_rows - 1
        assert chi_square < filled_rows - 1 + 4 * math.sqrt(2 * (filled_rows - 1))


def test_equal_generators_draw_equal_places_and_go_on():
    replay = ring(16)
    replay.add(**numbered(0, 12))
    a, b = torch.Generator().manual_seed(3), torch.Generator().manual_seed(3)
    first = replay.draw(4, 8, a)
    torch.manual_seed(0)
    assert torch.equal(first, replay.draw(4, 8, b))
    assert not torch.equal(first, replay.draw(4, 8, a))
    assert not torch.equal(first[0], first[1])


def test_an_empty_ring_has_nothing_to_draw():
    with pytest.raises(ValueError, match="empty replay buffer"):
        ring(4).draw(1, 1, torch.Generator())


# memory


def test_bytes_are_known_beforehand():
    # float32: obs 17, action 6, next_obs 17, reward, terminated, truncated
    assert bytes_needed(gym.spaces.Box(-1, 1, (17,)), (6,), torch.float32, 1_000_000) == 172_000_000
    # 84 x 84 x 4 bytes twice, an int64 action, three flags
    assert bytes_needed(gym.spaces.Box(0, 255, (4, 84, 84), np.uint8), (), torch.int64, 10) == 10 * (56_448 + 8 + 12)
    extras = {"params": ((5,), torch.float32)}
    assert bytes_needed(gym.spaces.Discrete(3), (2,), torch.float32, 2, extras) == 2 * (16 + 8 + 12 + 20)


@pytest.mark.parametrize("kind", SPACES)
def test_the_columns_take_the_bytes_foretold(kind):
    replay = ring(6, SPACES[kind][0])
    taken = sum(column.numel() * column.element_size() for column in replay.columns.values())
    matrices = {c.untyped_storage().data_ptr(): c.untyped_storage().nbytes() for c in replay.columns.values()}
    assert taken == sum(matrices.values()) == bytes_needed(SPACES[kind][0], (2,), torch.float32, 6)


def test_a_ring_that_does_not_fit_is_refused_before_it_is_made(monkeypatch, tmp_path):
    row = bytes_needed(BOX, (2,), torch.float32, 1)
    monkeypatch.setattr(transitions, "free_bytes", lambda device, folder: 2**40 - 1)
    rows = 2**40 // row + 1
    text = f"{rows:,} rows of {row} bytes needs 1024.00 GiB, but 1024.00 GiB are free in memory (cpu): use a smaller"
    with pytest.raises(ReplaySizeError, match=re.escape(text) + rf".* \({rows - 1:,} rows would fit.*memory-mapped"):
        ring(rows)
    with pytest.raises(MemoryError, match=re.escape(f"are free on the disk of {tmp_path}: use a smaller replay_size")):
        ring(rows, folder=tmp_path)
    with pytest.raises(MemoryError, match=re.escape("are free on cuda:0: use a smaller") + ".*memory-mapped"):
        ring(rows, device="cuda:0")
    assert not any(tmp_path.iterdir())
    monkeypatch.setattr(transitions, "free_bytes", lambda device, folder: 5 * row)
    assert ring(5).capacity == 5
    with pytest.raises(MemoryError, match="5 rows would fit"):
        ring(6)
    monkeypatch.setattr(transitions, "free_bytes", lambda device, folder: None)
    ring(6)


def test_free_memory_is_asked_of_the_place_in_question(monkeypatch, tmp_path):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (111, 222))
    monkeypatch.setattr(transitions.shutil, "disk_usage", lambda folder: type("Usage", (), {"free": len(str(folder))}))
    assert free_bytes(torch.device("cuda", 0)) == 111
    assert free_bytes(torch.device("cuda", 0), tmp_path) == free_bytes(torch.device("cpu"), tmp_path)
    assert free_bytes(torch.device("cpu"), tmp_path) == len(str(tmp_path))
    for system, group, expected in ((5, 3, 3), (5, 8, 5), (None, 8, 8), (5, None, 5), (None, None, None)):
        monkeypatch.setattr(transitions, "_system_room", lambda room=system: room)
        monkeypatch.setattr(transitions, "_group_room", lambda room=group: room)
        assert free_bytes(torch.device("cpu")) == expected


@linux
def test_free_memory_lies_between_nothing_and_all():
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    assert 0 < free_bytes(torch.device("cpu")) < total
    assert total / 1000 < transitions._system_room() < total


def group(folder: Path, limit, usage, inactive, names):
    folder.mkdir(parents=True, exist_ok=True)
    for name, value in zip(names, (limit, usage), strict=True):
        (folder / name).write_text(f"{value}\n")
    (folder / "memory.stat").write_text(f"anon 5\ninactive_file {inactive}\nactive_file 9\n")


def test_limits_of_control_groups_count_also_those_above(tmp_path):
    own, new = tmp_path / "own", ("memory.max", "memory.current")
    own.write_text("0::/outer/inner\n")
    assert transitions._group_room(tmp_path, own) is None
    group(tmp_path / "outer" / "inner", "max", 70, 0, new)
    assert transitions._group_room(tmp_path, own) is None
    group(tmp_path / "outer", 1000, 700, 50, new)
    assert transitions._group_room(tmp_path, own) == 350
    group(tmp_path / "outer" / "inner", 300, 70, 0, new)
    assert transitions._group_room(tmp_path, own) == 230
    group(tmp_path / "outer" / "inner", 300, 400, 0, new)
    assert transitions._group_room(tmp_path, own) == 0
    assert transitions._group_room(tmp_path, tmp_path / "nowhere") is None


def test_limits_of_old_control_groups_count_also_where_their_path_is_hidden(tmp_path):
    own, old = tmp_path / "own", ("memory.limit_in_bytes", "memory.usage_in_bytes")
    own.write_text("9:cpu,cpuacct:/x\n4:memory:/hidden/by/the/container\n0::/\n")
    group(tmp_path / "memory", 1000, 600, 100, old)
    group(tmp_path, 10, 0, 0, old)
    assert transitions._group_room(tmp_path, own) == 500


def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@linux
@pytest.mark.parametrize("mapped", [False, True])
def test_memory_is_taken_only_as_rows_come(mapped, tmp_path):
    before = resident()
    replay = ring(4_000_000, folder=tmp_path if mapped else None)
    replay.add(**numbered(0, 3))
    assert resident() - before < 2**26 < 4_000_000 * replay.row_bytes


@pytest.mark.parametrize("kind", SPACES)
def test_a_mapped_ring_equals_one_in_memory_bit_for_bit(kind, tmp_path):
    space = SPACES[kind][0]
    a, b = ring(7, space), ring(7, space, folder=tmp_path / "new" / "folder")
    for first in range(0, 20, 4):
        for replay in (a, b):
            replay.add(**numbered(first, first + 4, kind))
        index = a.draw(1, 32, torch.Generator().manual_seed(first))
        assert torch.equal(index, b.draw(1, 32, torch.Generator().manual_seed(first)))
        for x, y in zip(a.sample(index[0]), b.sample(index[0]), strict=True):
            same(y, x)
    for name, column in a.columns.items():
        assert torch.equal(column, b.columns[name])


def mappings(folder):
    return [line for line in Path("/proc/self/maps").read_text().splitlines() if str(folder) in line]


@linux
def test_a_mapped_ring_is_a_shared_file_that_leaves_nothing_behind(tmp_path):
    replay = ring(1000, SPACES["dict"][0], folder=tmp_path)
    replay.add(**numbered(0, 8, "dict"))
    batch = replay.sample(torch.tensor([0, 1]))
    assert len(mappings(tmp_path)) == 3 and all("rw-s" in line for line in mappings(tmp_path))
    assert not any(tmp_path.iterdir())
    replay.close()
    assert mappings(tmp_path) == [] and not any(tmp_path.iterdir())
    same(batch.obs, numbered(0, 2, "dict")["obs"])


def test_a_closed_ring_says_so():
    replay = ring(4)
    replay.add(**numbered(0, 2))
    replay.close()
    replay.close()
    for use in (
        lambda: replay.sample(torch.tensor([0])), lambda: replay.add(**numbered(2, 3)), lambda: replay.rows(0, 1),
    ):  # fmt: skip
        with pytest.raises(ValueError, match="closed; make a new one"):
            use()


def test_a_mapped_ring_delivers_on_its_device(tmp_path):
    replay = ring(4, device="meta", folder=tmp_path)
    replay.add(**numbered(0, 3))
    assert replay.columns["obs"].device.type == "cpu"
    batch = replay.sample(torch.tensor([0, 2]))
    assert {x.device.type for x in batch[:5]} == {"meta"} and batch.obs.shape == (2, 3)
