"""Rows kept for later iterations: how many, how long, and what of them."""

import pytest
import torch
from safetensors.torch import load, save

from ctrlrl.data.replay import NO_TIME, Replay, join
from ctrlrl.types import ON_POLICY, REPLAYED, TEMPERED, SequenceBatch

RELABELLED = ("source", "group")


def full(first, count, steps=3, **fields):
    """A batch with every field filled; row ``first + i`` has that number as its return."""
    g = torch.Generator().manual_seed(first + 1)

    def noise(*shape):
        return torch.randn(count, *shape, generator=g)

    number = torch.arange(first, first + count)
    made = {name: noise(steps) for name in SequenceBatch._fields}
    made |= {
        "obs": noise(steps, 2), "action": noise(steps, 2), "coef": None, "weight": None, "route": None,
        "mask": torch.arange(steps) < 1 + number.unsqueeze(1) % steps,
        "dist_old": {"mean": noise(steps, 2), "log_std": noise(steps, 2)}, "dist_ref": {"mean": noise(steps, 2)},
        "sequence_return": number.float(), "score": noise(), "success": number % 2 == 0, "rewards": noise(2),
        "group": number // 2, "task": number % 3, "answer": number % 5, "preference": number % 2, "pivot": number % 2,
        "source": torch.full((count,), ON_POLICY), "turn": torch.arange(steps).expand(count, steps).clone(),
        "void": noise(steps) > 0, "support": noise(steps, 4) > 0,
    }  # fmt: skip
    return SequenceBatch(**made | fields)


def all_rows(batch):
    return torch.ones(len(batch.mask), dtype=torch.bool)


def kept(replay, new=None):
    """Returns, and so the numbers, of the rows that would be put behind a new batch."""
    new = full(1000, 2) if new is None else new
    return [int(r) for r in replay.extend(new).sequence_return[len(new.mask) :]]


def same(a, b, but=()):
    for name, x, y in zip(SequenceBatch._fields, a, b, strict=True):
        if name in but:
            continue
        x, y = ({"": v} if not isinstance(v, dict) else v for v in (x, y))
        assert x.keys() == y.keys(), name
        for k in x:
            if x[k] is None or y[k] is None:
                assert x[k] is None and y[k] is None, name
            else:
                assert x[k].dtype == y[k].dtype and torch.equal(x[k], y[k]), name


def test_nothing_is_kept_at_first():
    replay, batch = Replay(4, 3), full(0, 2)
    assert replay.extend(batch) is batch and replay.tensors() == {}
    replay.update(batch, torch.zeros(2, dtype=torch.bool))
    assert replay.extend(batch) is batch


def test_the_last_rows_are_kept_oldest_first():
    replay = Replay(5, 10)
    replay.update(full(0, 3), all_rows(full(0, 3)))
    assert kept(replay) == [0, 1, 2]
    replay.update(full(3, 4), all_rows(full(3, 4)))
    assert kept(replay) == [2, 3, 4, 5, 6] and replay.age.tolist() == [1, 0, 0, 0, 0]
    replay.update(full(7, 9), all_rows(full(7, 9)))
    assert kept(replay) == [11, 12, 13, 14, 15] and replay.age.tolist() == [0] * 5


def test_only_chosen_rows_are_kept():
    replay = Replay(10, 10)
    replay.update(full(0, 5), torch.tensor([False, True, False, True, True]))
    assert kept(replay) == [1, 3, 4]


@pytest.mark.parametrize("max_age", [1, 2, 4])
def test_a_row_comes_back_in_as_many_iterations_as_it_may_grow_old(max_age):
    replay = Replay(10, max_age)
    replay.update(full(0, 2), all_rows(full(0, 2)))
    seen = []
    for k in range(1, 7):
        seen.append(0 in kept(replay))
        fresh = full(10 * k, 1)
        replay.update(fresh, all_rows(fresh) if k % 2 else ~all_rows(fresh))
    assert seen == [True] * max_age + [False] * (6 - max_age)


def test_replayed_rows_are_marked_and_belong_to_no_group():
    replay, old, new = Replay(10, 3), full(0, 4), full(10, 2, source=torch.tensor([ON_POLICY, TEMPERED]))
    replay.update(old, all_rows(old))
    batch = replay.extend(new)
    assert batch.source.tolist() == [ON_POLICY, TEMPERED] + [REPLAYED] * 4
    assert batch.group[:2].tolist() == new.group.tolist()
    assert (batch.group[2:] < 0).all() and len(batch.group[2:].unique()) == 4


def test_a_row_keeps_what_it_was_sampled_under():
    replay, old, new = Replay(10, 3), full(0, 4), full(10, 2)
    replay.update(old, all_rows(old))
    for tensor in (old.logp_old, old.advantage, old.dist_old["mean"]):
        tensor.add_(1.0)  # what becomes of the batch afterwards does not reach the kept rows
    batch = replay.extend(new)
    same(batch.rows(slice(0, 2)), new)
    same(batch.rows(slice(2, 6)), full(0, 4), but=RELABELLED)
    same(new, full(10, 2))
    # and once more, behind another batch
    replay.update(new, ~all_rows(new))
    same(replay.extend(full(20, 3)).rows(slice(3, 7)), full(0, 4), but=RELABELLED)


@pytest.mark.parametrize(("short", "long"), [(3, 5), (2, 7)])
@pytest.mark.parametrize("old_is_longer", [False, True])
def test_rows_are_padded_to_the_longer_batch(short, long, old_is_longer):
    steps = (long, short) if old_is_longer else (short, long)
    replay, old, new = Replay(10, 3), full(0, 3, steps[0]), full(10, 2, steps[1])
    replay.update(old, all_rows(old))
    batch = replay.extend(new)
    for name, x in batch._asdict().items():
        for key, tensor in x.items() if isinstance(x, dict) else {"": x}.items():
            if tensor is None:
                continue
            assert len(tensor) == 5, name
            parts = ((tensor[:2], getattr(new, name)), (tensor[2:], getattr(old, name)))
            for found, before in parts:
                before = before[key] if key else before
                if name in NO_TIME:
                    assert name in RELABELLED or torch.equal(found, before), name
                    continue
                length = before.shape[1]
                assert found.shape[1] == long and torch.equal(found[:, :length], before), name
                assert (found[:, length:] == (-1 if name == "turn" else 0)).all(), name


def test_the_table_of_fields_without_time_is_complete():
    """[B] and [B, K] fields must not be padded as if their second dimension were time."""
    wide = full(0, 2, 9)
    for name, x in wide._asdict().items():
        x = next(iter(x.values())) if isinstance(x, dict) else x
        if x is not None:
            assert (x.ndim > 1 and x.shape[1] == 9) == (name not in NO_TIME), name


def test_a_field_that_one_side_lacks_is_dropped():
    a, b = full(0, 2, turn=None), full(2, 2, support=None, dist_old={"mean": torch.zeros(2, 3, 2)})
    batch = join(a, b)
    assert batch.turn is None and batch.support is None and batch.dist_old.keys() == {"mean"}
    assert batch.logp_ref.shape == (4, 3)


def test_dictionaries_of_observations():
    obs = {"image": torch.arange(24, dtype=torch.uint8).view(2, 3, 2, 2), "mode": torch.ones(2, 3, dtype=torch.int64)}
    replay, old = Replay(10, 3), full(0, 2, obs=obs)
    replay.update(old, torch.tensor([False, True]))
    longer = {"image": torch.zeros(1, 4, 2, 2, dtype=torch.uint8), "mode": torch.zeros(1, 4, dtype=torch.int64)}
    batch = replay.extend(full(5, 1, 4, obs=longer))
    assert batch.obs["image"].dtype == torch.uint8 and batch.obs["image"].shape == (2, 4, 2, 2)
    assert torch.equal(batch.obs["image"][1, :3], obs["image"][1]) and batch.obs["mode"][1].tolist() == [1, 1, 1, 0]


def test_saved_and_restored_it_goes_on_alike():
    replay = Replay(6, 3)
    for first, count in ((0, 4), (4, 3)):
        replay.update(full(first, count), all_rows(full(first, count)))
    saved = load(save(replay.tensors()))
    again = Replay(6, 3)
    again.restore(saved)
    assert torch.equal(again.age, replay.age)
    for k in range(4):
        fresh = full(20 + k, 2, 3 + k % 2)
        same(replay.extend(fresh), again.extend(fresh))
        for r in (replay, again):
            r.update(fresh, torch.tensor([True, k % 2 == 0]))
    assert kept(replay) == kept(again) and replay.age.tolist() == again.age.tolist()


def test_restoring_nothing_empties_it():
    replay = Replay(6, 3)
    replay.update(full(0, 2), all_rows(full(0, 2)))
    replay.restore({})
    assert kept(replay) == [] and replay.tensors() == {}
