"""AEPO: what tempered rows add, which of them count, and the switch of the temperature."""

import pytest
import torch
from losses.golden import begun, case_of, categorical_output, objective

from ctrlrl.core.penalty import categorical_entropy
from ctrlrl.data.rows import rows
from ctrlrl.losses.aepo import AEPO
from ctrlrl.losses.group import ClippedGroupLoss
from ctrlrl.types import ON_POLICY, TEMPERED


def two_actions(own_returns, hot_returns, hot_actions, coef=None):
    """One state of p = (.8, .2); a group on-policy (actions 0) and one of tempered rows, all of length one.

    Returns the descent direction on the state's logits.
    """
    size = len(own_returns) + len(hot_returns)
    batch = rows(case_of(AEPO, rows=4, length=1).batch, torch.zeros(size, dtype=torch.long))
    leaf = torch.tensor([0.8, 0.2], dtype=torch.float64).log().requires_grad_()
    action = torch.tensor([0] * len(own_returns) + hot_actions).unsqueeze(1)
    out = categorical_output(leaf.expand(size, 1, 2), action)
    batch = batch._replace(
        action=action,
        mask=torch.ones(size, 1, dtype=torch.bool),
        logp_old=out.logp.detach(),
        sequence_return=torch.tensor(own_returns + hot_returns, dtype=torch.float64),
        group=torch.zeros(size, dtype=torch.long),
        source=torch.tensor([ON_POLICY] * len(own_returns) + [TEMPERED] * len(hot_returns)),
    )
    loss = AEPO(tempered_coef=coef)
    (gradient,) = torch.autograd.grad(objective(loss, begun(loss, batch), out), leaf)
    return -gradient


def test_tempered_successes_pull_to_the_tempered_policy():
    """At T = 2, pi_T = (2/3, 1/3): the added direction is pi_T - pi = (-2/15, 2/15), which raises the entropy by
    .059149 per unit step. The on-policy group agrees, so nothing else is there; three of five rows are successes."""
    pull = two_actions([1.0, 1.0], [1.0, 1.0, 1.0, 0.0], [0, 0, 1, 0])
    torch.testing.assert_close(pull * 5 / 3, torch.tensor([-2 / 15, 2 / 15], dtype=torch.float64))
    logits = torch.tensor([0.8, 0.2], dtype=torch.float64).log()
    step = 1e-5 * pull * 5 / 3
    slope = (categorical_entropy(logits + step) - categorical_entropy(logits - step)) / 2e-5
    assert slope.item() == pytest.approx(0.059149, abs=1e-6)


def test_cooler_successes_lower_the_entropy():
    """At T = 1/2, pi_T = (16, 1) / 17."""
    pull = two_actions([1.0, 1.0], [1.0] * 17 + [0.0], [0] * 16 + [1, 0])
    torch.testing.assert_close(pull * 19 / 17, torch.tensor([16 / 17 - 0.8, 1 / 17 - 0.2], dtype=torch.float64))


def test_an_explicit_weight_is_that_of_the_mean_over_all_tempered_rows():
    """c E_T[1[success] grad log pi]: (3/4) c (pi_T - pi), whatever the number of rows."""
    pull = two_actions([1.0, 1.0], [1.0, 1.0, 1.0, 0.0], [0, 0, 1, 0], coef=0.4)
    torch.testing.assert_close(pull, 0.4 * 0.75 * torch.tensor([-2 / 15, 2 / 15], dtype=torch.float64))
    assert two_actions([1.0, 1.0], [1.0, 1.0, 1.0, 0.0], [0, 0, 1, 0], coef=0.0).abs().max() == 0


def test_only_successes_of_a_group_with_failures_count():
    case = case_of(AEPO, rows=8)
    source = torch.tensor([ON_POLICY] * 4 + [TEMPERED] * 4)
    returns = torch.tensor([0.0, 1, 0, 0, 0, 1, 1, 0]).double()
    batch = case.batch._replace(source=source, sequence_return=returns, group=torch.zeros(8, dtype=torch.long))
    found = begun(AEPO(), batch)
    assert found.mask.any(1).tolist() == [True] * 4 + [False, True, True, False]
    assert (found.advantage[5:7][found.mask[5:7]] == 1).all()
    agreed = begun(AEPO(), batch._replace(sequence_return=torch.ones(8).double()))
    assert agreed.mask[4:].sum() == 0, "no advantage, no success"


@pytest.mark.parametrize("coef", [None, 0.5])
def test_without_tempered_rows_it_is_grpo_bit_for_bit(coef):
    case = case_of(AEPO)
    batch = case.batch._replace(source=torch.zeros(12, dtype=torch.long))
    base = type("Base", (ClippedGroupLoss,), {"aggregation": "token_mean", "name": "base"})()
    values = []
    for loss in (AEPO(tempered_coef=coef), base):
        leaf = case.leaf.clone().requires_grad_()
        total = objective(loss, begun(loss, batch), case.output(leaf))
        values.append((total, torch.autograd.grad(total, leaf)[0]))
    assert torch.equal(values[0][0], values[1][0]) and torch.equal(values[0][1], values[1][1])


def test_tempered_rows_do_not_move_the_advantages_of_the_others():
    case = case_of(AEPO)
    plain = begun(AEPO(), case.batch._replace(source=None)).advantage
    source = torch.tensor([ON_POLICY] * 4 + [TEMPERED] * 8)
    batch = case.batch._replace(source=source, group=torch.zeros(12, dtype=torch.long))
    torch.testing.assert_close(begun(AEPO(), batch).advantage[:4], plain[:4])


def test_the_temperature_switches_at_the_target():
    """H = (.4, .5, .6) with target .5: T = (1.2, 1.2, .8)."""
    controller = AEPO().controllers()["temperature"]
    state, found = controller.initial(), []
    for entropy in (0.4, 0.5, 0.6):
        state, knobs = controller.step(state, {"entropy": entropy})
        found.append(knobs["temperature"])
    assert found == [1.2, 1.2, 0.8] and controller.initial() == {"temperature": 1.2}
