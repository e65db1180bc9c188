"""Rows of whole episodes put together, picked and padded."""

import pytest
import torch

from ctrlrl.data.episodes import Episodes, concatenate, pad, take

TIMELESS = {"last_obs", "length", "group", "task", "success", "rewards", "answer"}
MINUS_ONE = {"turn", "solution"}


def full(first, count, steps, **fields):
    """Every field filled, each with other numbers; none is what padding would put there."""
    g = torch.Generator().manual_seed(first)

    def noise(*shape):
        return 1.0 + torch.rand(count, *shape, generator=g)

    def integers(*shape):
        return torch.randint(1, 9, (count, *shape), generator=g)

    true = torch.ones(count, steps, dtype=torch.bool)
    made = {
        "obs": noise(steps, 2), "action": noise(steps, 1), "mask": true, "reward_t": noise(steps),
        "terminated_t": true, "truncated_t": true, "last_obs": noise(2), "length": torch.full((count,), steps),
        "group": torch.arange(first, first + count), "simulation_s": float(first + 1), "logp_behaviour": noise(steps),
        "turn": integers(steps), "task": integers(), "success": true[:, 0], "rewards": noise(3), "answer": integers(),
        "void": true, "solution": integers(steps), "support": true.unsqueeze(-1).expand(count, steps, 4),
    }  # fmt: skip
    assert made.keys() == set(Episodes._fields)
    return Episodes(**made | fields)


def leaves(episodes):
    for name, x in episodes._asdict().items():
        if name != "simulation_s":
            yield from ((name, v) for v in (x.values() if isinstance(x, dict) else [x]))


def same(a, b):
    for (name, x), (_, y) in zip(leaves(a), leaves(b), strict=True):
        assert (x is None and y is None) or (x.dtype == y.dtype and torch.equal(x, y)), name


def test_rows_of_all_parts_in_order_padded_to_the_longest():
    parts = [full(0, 2, 3), full(2, 1, 5), full(3, 4, 2)]
    whole = concatenate(parts)
    at = 0
    for part in parts:
        rows = slice(at, at + len(part.length))
        at += len(part.length)
        for (name, x), (_, y) in zip(leaves(whole), leaves(part), strict=True):
            if name in TIMELESS:
                assert torch.equal(x[rows], y), name
                continue
            steps = y.shape[1]
            assert x.shape[1] == 5 and x.dtype == y.dtype and torch.equal(x[rows, :steps], y), name
            assert (x[rows, steps:] == (-1 if name in MINUS_ONE else 0)).all(), name
    assert at == len(whole.length) == 7
    assert whole.simulation_s == 1.0 + 3.0 + 4.0
    torch.testing.assert_close(whole.returns(), torch.cat([p.returns() for p in parts]))


def test_group_ids_stay():
    whole = concatenate([full(4, 2, 3), full(4, 1, 3), full(0, 1, 3)])
    assert whole.group.tolist() == [4, 5, 4, 0]


def test_one_part_is_itself():
    part = full(0, 2, 3)
    assert concatenate([part]) is part


@pytest.mark.parametrize("name", ["support", "solution", "success", "logp_behaviour", "rewards"])
def test_what_one_part_does_not_tell_is_not_told(name):
    whole = concatenate([full(0, 2, 3), full(2, 2, 3, **{name: None})])
    assert getattr(whole, name) is None and whole.turn is not None


def test_dictionaries_of_observations():
    def obs(count, steps):
        return {"image": torch.full((count, steps, 2, 2), 7, dtype=torch.uint8), "mode": torch.ones(count, steps)}

    def last(count):
        return {"image": torch.ones(count, 2, 2, dtype=torch.uint8), "mode": torch.zeros(count)}

    parts = [full(k, n, t, obs=obs(n, t), last_obs=last(n)) for k, n, t in ((0, 2, 3), (2, 1, 4))]
    whole = concatenate(parts)
    assert whole.obs["image"].shape == (3, 4, 2, 2) and whole.obs["image"].dtype == torch.uint8
    assert whole.obs["mode"].tolist() == [[1, 1, 1, 0], [1, 1, 1, 0], [1, 1, 1, 1]]
    assert whole.last_obs["image"].shape == (3, 2, 2)
    picked = take(whole, torch.tensor([2, 0]))
    assert picked.obs["mode"].tolist() == [[1, 1, 1, 1], [1, 1, 1, 0]] and picked.last_obs["mode"].shape == (2,)


def test_take_picks_rows_in_the_order_asked():
    whole = full(0, 5, 3)
    picked = take(whole, torch.tensor([3, 0, 3]))
    assert picked.group.tolist() == [3, 0, 3] and picked.simulation_s == whole.simulation_s
    for (name, x), (_, y) in zip(leaves(picked), leaves(whole), strict=True):
        assert torch.equal(x, y[[3, 0, 3]]), name
    none = take(whole, torch.zeros(0, dtype=torch.int64))
    assert none.mask.shape == (0, 3) and none.rewards.shape == (0, 3)
    same(concatenate([none, whole]), whole)


def test_take_undoes_a_permutation_of_concatenated_rows():
    whole, order = full(0, 6, 4), torch.tensor([4, 1, 0, 5, 3, 2])
    split = concatenate([take(whole, order[:2]), take(whole, order[2:])])
    same(take(split, torch.argsort(order)), whole)


def test_what_is_missing_stays_missing():
    assert take(full(0, 2, 3, turn=None), torch.tensor([1])).turn is None


def test_pad():
    x = torch.arange(6).view(2, 3)
    assert pad(x, 5).tolist() == [[0, 1, 2, 0, 0], [3, 4, 5, 0, 0]]
    assert pad(x, 4, -1).tolist() == [[0, 1, 2, -1], [3, 4, 5, -1]]
    assert pad(x, 3) is x and pad(x, 2) is x
    wide = pad(torch.ones(2, 1, 3, 2), 4)
    assert wide.shape == (2, 4, 3, 2) and wide[:, 0].eq(1).all() and wide[:, 1:].eq(0).all()
    assert pad(torch.ones(1, 1, dtype=torch.bool), 3).tolist() == [[True, False, False]]
