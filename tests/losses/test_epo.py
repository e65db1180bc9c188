"""EPO: the hinge around the past entropy, its history, and the phases."""

import math

import pytest
import torch
from losses.golden import begun, case_of, objective

from ctrlrl.losses.epo import EPO
from ctrlrl.losses.group import ClippedGroupLoss


def test_the_band_has_a_gradient():
    """h = 1, H = (.7, 1, 1.5), band (.8, 1.2): .1 mean(.1, 0, .3) = .013333, slopes (-, 0, +) .0333."""
    entropy = torch.tensor([[0.7, 1.0, 1.5]], dtype=torch.float64, requires_grad=True)
    value = 0.1 * EPO().departure(entropy, torch.ones(1, 3, dtype=torch.float64)).mean()
    assert value.item() == pytest.approx(0.013333, abs=1e-6)
    (slope,) = torch.autograd.grad(value, entropy)
    torch.testing.assert_close(slope, torch.tensor([[-1.0, 0.0, 1.0]], dtype=torch.float64) / 30)


def test_a_negative_entropy_has_a_band_around_it():
    loss, history = EPO(), torch.full((1, 4), -1.0)
    inside = loss.departure(torch.tensor([[-1.2, -1.0, -0.81, -0.8]]), history)
    assert inside.abs().max() < 1e-6
    outside = loss.departure(torch.tensor([[-1.5, -0.5]]), history[:, :2])
    torch.testing.assert_close(outside, torch.tensor([[0.3, 0.3]]))


def parts(loss, case, batch, knobs=None):
    leaf = case.leaf.clone().requires_grad_()
    out = case.output(leaf)
    total = objective(loss, batch, out, knobs)
    return total, torch.autograd.grad(total, leaf)[0], out


def test_without_a_band_it_is_the_entropy_bonus():
    case = case_of(EPO)
    base = type("Base", (ClippedGroupLoss,), {"aggregation": "token_mean", "name": "base"})()
    wide = EPO(bonus_coef=0.3, eps_band_low=1.0, eps_band_high=math.inf)
    bonus, _, out = parts(wide, case, begun(wide, case.batch))
    plain, _, _ = parts(base, case, begun(base, case.batch))
    torch.testing.assert_close(plain - bonus, 0.3 * out.entropy[case.batch.mask].mean())
    off = EPO(bonus_coef=0.0)
    torch.testing.assert_close(
        parts(off, case, begun(off, case.batch))[1], parts(base, case, begun(base, case.batch))[1]
    )


def test_the_history_is_the_mean_over_iterations_at_each_turn():
    """Turn 0 had entropies 1 and 3 in two iterations, so the third is held to 2; turn 1 was never reached before."""
    loss, case = EPO(), case_of(EPO, rows=4)
    turn = torch.tensor([[0, 0, 1, 1]] * 4)
    first = torch.tensor([[True, True, False, False]] * 4)
    memory = loss.memory()
    for entropy in (1.0, 3.0):
        batch = case.batch._replace(mask=first, turn=turn, entropy_old=torch.full((4, 4), entropy).double())
        memory = loss.begin(batch, {}, memory).memory
    assert memory["count"].tolist() == [2, 0]
    last = case.batch._replace(mask=torch.ones(4, 4).bool(), turn=turn, entropy_old=torch.full((4, 4), 5.0).double())
    start = loss.begin(last, {}, memory)
    torch.testing.assert_close(start.batch.coef["history"], torch.tensor([[2.0, 2, 5, 5]] * 4).double())
    torch.testing.assert_close(start.memory["entropy"], torch.tensor([3.0, 5.0]).double())
    assert start.memory["count"].tolist() == [3, 1]


def test_without_turns_the_history_is_by_position_and_keeps_longer_pasts():
    loss, case = EPO(), case_of(EPO, rows=4)
    long = case.batch._replace(turn=None, mask=torch.ones(4, 4).bool())
    memory = loss.begin(long, {}, loss.memory()).memory
    torch.testing.assert_close(memory["entropy"], long.entropy_old.mean(0))
    short = long._replace(**{k: getattr(long, k)[:, :2] for k in ("mask", "entropy_old", "advantage")})
    again = loss.begin(short, {}, memory).memory
    torch.testing.assert_close(again["entropy"], memory["entropy"])
    assert again["count"].tolist() == [2, 2, 1, 1]


def test_masked_positions_do_not_enter():
    loss, case = EPO(), case_of(EPO)
    spoiled = case.batch._replace(entropy_old=torch.where(case.batch.mask, case.batch.entropy_old, torch.nan))
    clean, dirty = (loss.begin(b, {}, loss.memory()) for b in (case.batch, spoiled))
    torch.testing.assert_close(clean.memory, dirty.memory)
    leaf = case.leaf.clone()
    out = case.output(leaf)
    entropy = torch.where(case.batch.mask, out.entropy, torch.nan).requires_grad_()
    total = objective(loss, dirty.batch, out._replace(entropy=entropy))
    (gradient,) = torch.autograd.grad(total, entropy)
    assert total.isfinite() and (gradient[~case.batch.mask] == 0).all() and (gradient[case.batch.mask] != 0).any()


def test_phases_of_the_released_code():
    """Weights of steps 37, 75, 76, 112 and 150 of 150: .8746, .8271, .7686, .1821, .0398."""
    case = case_of(EPO)
    constant, phased = (EPO(bonus_coef=1.0, phase=p) for p in ("constant", "released"))
    batch = begun(constant, case.batch)
    narrow = EPO(bonus_coef=1.0, eps_band_low=1.0, eps_band_high=1e9)
    free, full = (parts(loss, case, batch)[0] for loss in (narrow, constant))
    assert full > free, "leaving the band is penalised"
    for step, weight in ((0, 1.0), (37, 0.8746), (75, 0.8271), (76, 0.7686), (112, 0.1821), (150, 0.0398)):
        knobs = {"phase": torch.tensor(step / 150, dtype=torch.float64)}
        assert ((parts(phased, case, batch, knobs)[0] - free) / (full - free)).item() == pytest.approx(weight, abs=5e-5)
    assert phased.controllers()["phase"].step({"phase": 0.0}, {"progress": 0.3})[1] == {"phase": 0.3}
