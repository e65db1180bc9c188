"""EMPG's golden table: three turns of normalised entropy 0, 1/2, 1."""

import torch
from losses.golden import batch_of, begun, weights

from ctrlrl.losses.empg import EMPG
from ctrlrl.losses.grpo import GRPO


def episodes(entropy, returns, turn=None, mask=None):
    entropy = torch.tensor(entropy, dtype=torch.float64)
    batch, out = batch_of(torch.ones_like(entropy), torch.zeros_like(entropy), mask)
    return batch._replace(
        entropy_old=entropy,
        sequence_return=torch.tensor(returns, dtype=torch.float64),
        group=torch.zeros(len(returns), dtype=torch.long),
        turn=None if turn is None else torch.tensor(turn),
        logp_ref=out.logp,
    ), out


TURNS = [[0, 0, 1, 2], [0, 0, 1, 2]]
# entropies 1, 2, 3: means of turns; the second sequence has the same
ENTROPY = [[0.5, 1.5, 2.0, 3.0], [1.2, 0.8, 2.0, 3.0]]
UP = torch.tensor([1.58009, 1.58009, 0.95838, 0.55897], dtype=torch.float64)
DOWN = torch.tensor([-1.45879, -1.45879, -0.88480, -0.55897], dtype=torch.float64)


def test_golden_table():
    batch, out = episodes(ENTROPY, [1, 0], TURNS)
    # +-1/sqrt 2 times g and the bonus of the table: g and f are the same whatever A is
    s = 2**-0.5
    g, bonus = (UP - DOWN) / 2, (UP + DOWN) / 2
    loss = EMPG(center=False, std_floor=1e-12)
    got = begun(loss, batch).advantage
    torch.testing.assert_close(got, torch.stack([s * g + bonus, -s * g + bonus]), atol=1e-5, rtol=0)
    # each turn counts once in the mean: of the bonus alone, as the two A cancel
    mean = (bonus[0] + bonus[2] + bonus[3]) / 3
    centred = begun(EMPG(std_floor=1e-12), batch).advantage
    torch.testing.assert_close(centred, got - mean, atol=1e-5, rtol=0)
    torch.testing.assert_close(weights(EMPG(std_floor=1e-12), begun(EMPG(std_floor=1e-12), batch), out), centred / 4)


def test_confidence_has_mean_one_over_turns():
    batch, _ = episodes(ENTROPY, [1, 0], TURNS)
    got = begun(EMPG(clarity_coef=0.0, center=False, confidence=3.0), batch).advantage[0, [0, 2, 3]]
    torch.testing.assert_close(got.mean().item(), 2**-0.5, atol=2e-6, rtol=0)
    assert got[0] > got[1] > got[2] > 0


def test_equal_entropies_and_no_bonus_leave_grpo():
    batch, _ = episodes([[2.0] * 4] * 2, [1, 0], TURNS)
    got = begun(EMPG(clarity_coef=0.0), batch).advantage
    torch.testing.assert_close(got, begun(GRPO(), batch).advantage, atol=1e-7, rtol=0)


def test_shift_and_scale_of_entropies_do_not_matter():
    batch, _ = episodes(ENTROPY, [1, 0], TURNS)
    other = batch._replace(entropy_old=7.0 * batch.entropy_old - 3.0)
    torch.testing.assert_close(begun(EMPG(), other).advantage, begun(EMPG(), batch).advantage, atol=1e-7, rtol=0)


def test_without_turns_every_position_is_one():
    flat, _ = episodes([[1.0, 2.0, 3.0]] * 2, [1, 0])
    turned, _ = episodes([[1.0, 2.0, 3.0]] * 2, [1, 0], [[0, 1, 2]] * 2)
    torch.testing.assert_close(begun(EMPG(), flat).advantage, begun(EMPG(), turned).advantage)


def test_what_others_wrote_is_no_turn_and_not_looked_at():
    mask = torch.tensor([[True, False, True], [True, False, False]])
    batch, _ = episodes(
        [[-3.0, torch.nan, -1.0], [-3.0, torch.nan, torch.inf]], [1, 0], [[0, -1, 1], [0, -1, -1]], mask
    )
    loss = EMPG(center=False, std_floor=1e-12)
    got = begun(loss, batch).advantage
    e = torch.tensor(-1.0, dtype=torch.float64).exp()
    g = 3 / (2 + e)  # entropies 0, 1 and 0 once normalised
    s = 2**-0.5
    torch.testing.assert_close(got[0, [0, 2]], torch.stack([s * g + 0.1 * e, s * g * e]), atol=1e-7, rtol=0)
    torch.testing.assert_close(got[1, 0], -s * g, atol=1e-7, rtol=0)
    assert got[~mask].abs().max() == 0
