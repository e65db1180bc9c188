"""QwenLong-L1.5: deviations by task, and a mask with hysteresis."""

import math

import torch
from losses.golden import batch_of, begun, column, weights

from ctrlrl.losses.grpo import GRPO
from ctrlrl.losses.qwen_long import QwenLong


def tasks(returns, group, task, entropy=0.0):
    rows = len(returns)
    batch, out = batch_of(torch.ones(rows, 1, dtype=torch.float64), torch.zeros(rows, 1))
    return batch._replace(
        sequence_return=torch.tensor(returns, dtype=torch.float64),
        group=torch.tensor(group),
        task=torch.tensor(task),
        entropy_old=torch.full((rows, 1), entropy, dtype=torch.float64),
        logp_ref=out.logp,
    ), out


def test_golden_table():
    """Task 0 has groups (1, 0) and (1, 1), deviation 1/2; task 1 has (.2, .4), deviation sqrt .02."""
    batch, out = tasks([1, 0, 1, 1, 0.2, 0.4], [0, 0, 1, 1, 2, 2], [0, 0, 0, 0, 1, 1])
    loss = QwenLong(std_floor=1e-12)
    half = 1 / math.sqrt(2)
    torch.testing.assert_close(weights(loss, begun(loss, batch), out), column(1, -1, 0, 0, -half, half))


def test_one_task_with_one_group_is_grpo():
    batch, _ = tasks([3.0, 1.0, 0.5, 2.0], [0] * 4, [7] * 4)
    torch.testing.assert_close(begun(QwenLong(), batch).advantage, begun(GRPO(), batch).advantage)


def test_units_of_a_task_do_not_matter():
    batch, _ = tasks([1, 0, 1, 1, 0.2, 0.4], [0, 0, 1, 1, 2, 2], [0, 0, 0, 0, 1, 1])
    returns = torch.where(batch.task == 0, 500 * batch.sequence_return, 1600 * batch.sequence_return - 1600)
    loss = QwenLong(std_floor=1e-12)
    other = begun(loss, batch._replace(sequence_return=returns))
    torch.testing.assert_close(other.advantage, begun(loss, batch).advantage)


def test_hysteresis():
    loss, memory = QwenLong(), QwenLong().memory()
    hot = []
    for entropy in (0.5, 0.7, 0.5, 0.2, 0.5):
        batch, out = tasks([1, 0], [0, 0], [0, 0], entropy)
        start = loss.begin(batch, {}, memory)
        memory = start.memory
        hot.append(int(memory["hot"]))
        got = weights(loss, start.batch, out)
        assert got[0] > 0 and bool(got[1] == 0) == bool(memory["hot"])
        assert loss.prepare(start.batch, {}).denominator == (1 if memory["hot"] else 2)
    assert hot == [0, 1, 1, 0, 0]


def test_entropy_is_averaged_within_a_sequence_first():
    mask = torch.tensor([[True, True, True], [True, False, False]])
    batch, _ = tasks([1, 0], [0, 0], [0, 0])
    full, _ = batch_of(torch.ones(2, 3, dtype=torch.float64), torch.zeros(2, 3), mask)
    entropy = torch.tensor([[0.0, 0.0, 0.0], [1.0, math.nan, math.nan]], dtype=torch.float64)
    full = full._replace(**{k: getattr(batch, k) for k in ("sequence_return", "group", "task")}, entropy_old=entropy)
    stats = QwenLong().begin(full, {}, QwenLong().memory()).stats
    assert stats["entropy_per_sequence"] == 0.5 and stats["hot"] == 0


def test_a_group_that_agrees_gives_exactly_nothing():
    batch, _ = tasks([0.1, 0.1, 0.1, 1, 0], [0, 0, 0, 1, 1], [0] * 5)
    assert begun(QwenLong(), batch).advantage[:3].abs().max() == 0
