"""NLPO's golden table: PPO's, on the policy renormalised over the stored support."""

import pytest
import torch
from losses.golden import batch_of, begun, case_of, categorical_output, objective

from ctrlrl.core import support
from ctrlrl.losses.nlpo import NLPO
from ctrlrl.losses.ppo import PPO

F64 = torch.float64
PLAIN = NLPO(standardize_advantage=False)


def rollout(probabilities, allowed, old, action, advantage, mask=None):
    """One position per row, and the gradient of the sum over rows wrt the logits."""
    logits = torch.tensor(probabilities, dtype=F64).log().unsqueeze(1).requires_grad_()
    action = torch.tensor(action).unsqueeze(-1)
    advantage = torch.tensor(advantage, dtype=F64).unsqueeze(-1)
    batch, _ = batch_of(torch.ones_like(advantage), advantage, mask)
    allowed = torch.tensor(allowed).unsqueeze(1)
    logp_old = support.restricted_logp(torch.tensor(old, dtype=F64).log().unsqueeze(1), allowed, action)
    batch = batch._replace(action=action, support=allowed, logp_old=logp_old)
    return batch, logits, categorical_output(logits, action)


def test_golden_table():
    """pi = (.4, .3, .2, .1) on {0, 1, 2}: (4/9, 3/9, 2/9). Old: (.4, .4, .2), so r = (10/9, 5/6, 10/9)."""
    keep = [True, True, True, False]
    pi, old = [0.4, 0.3, 0.2, 0.1], [0.36, 0.36, 0.18, 0.1]
    batch, logits, out = rollout(3 * [pi], 3 * [keep], 3 * [old], [0, 1, 2], [1.0, 1.0, -1.0])
    (gradient,) = torch.autograd.grad(-3 * objective(PLAIN, batch, out, {}), logits)
    restricted = torch.tensor([4 / 9, 3 / 9, 2 / 9, 0.0], dtype=F64)
    expected = torch.stack(
        [
            r * a * (torch.eye(4, dtype=F64)[k] - restricted)
            for k, (r, a) in enumerate([(10 / 9, 1), (5 / 6, 1), (10 / 9, -1)])
        ]
    )
    torch.testing.assert_close(gradient.squeeze(1), expected)


def test_the_clip_is_of_the_renormalised_ratio():
    """.3 / .24 = 1.25 under the whole policy, (.3 / .6) / (.24 / .8) = 5/3 on {0, 1}: the second one is clipped."""
    pi, old, keep = [0.3, 0.3, 0.4], [0.24, 0.56, 0.2], [True, True, False]
    batch, _, out = rollout([pi], [keep], [old], [0], [1.0])
    assert NLPO(eps=0.7, standardize_advantage=False).metrics(batch, out, {})["clip_fraction"].item() == 0
    assert NLPO(eps=0.6, standardize_advantage=False).metrics(batch, out, {})["clip_fraction"].item() == 1
    (gradient,) = torch.autograd.grad(
        objective(NLPO(eps=0.6, standardize_advantage=False), batch, out, {}), out.logp, allow_unused=True
    )
    assert gradient is None


def test_the_ratio_is_one_before_the_first_step():
    case = case_of(NLPO, spread=0.0)
    logits = case.batch.dist_old["logits"]
    allowed = support.top_p_support(logits, 0.7, 2)
    logp_old = support.restricted_logp(logits, allowed, case.batch.action)
    batch = case.batch._replace(support=allowed, logp_old=logp_old)
    found = PLAIN.metrics(batch, case.output(logits), {})
    assert found["approx_kl"].abs().max() < 1e-14
    assert (found["support_size"] >= 2).all() and (found["support_size"] < 4).any()


def test_with_everything_allowed_it_is_ppo():
    case = case_of(NLPO, spread=0.5)
    assert case.batch.support is not None
    batch = case.batch._replace(support=torch.ones_like(case.batch.support))
    results = []
    for loss in (NLPO(), PPO()):
        leaf = case.leaf.clone().requires_grad_()
        value = objective(loss, begun(loss, batch), case.output(leaf))
        results.append((value, torch.autograd.grad(value, leaf)[0]))
    for mine, theirs in zip(*results, strict=True):
        torch.testing.assert_close(mine, theirs)


def test_masked_positions_may_hold_anything():
    """Padding has no support at all, and its logits may be NaN."""
    mask = torch.tensor([[True], [False]])
    batch, _, out = rollout(
        2 * [[0.5, 0.5]], [[True, True], [False, False]], 2 * [[0.5, 0.5]], [0, 0], [1.0, 1.0], mask
    )
    logits = torch.tensor([[[0.0, 0.0]], [[torch.nan, 0.0]]], dtype=F64, requires_grad=True)
    # log-softmax itself would turn a masked NaN into a NaN gradient, so the distribution is given as it stands
    dist = type(out.dist)(torch.zeros(2, 1, 2, dtype=F64))
    dist.logits = logits
    value = objective(PLAIN, batch, out._replace(dist=dist), {})
    (gradient,) = torch.autograd.grad(value, logits)
    assert value.isfinite() and gradient.isfinite().all()
    assert (gradient[1] == 0).all() and (gradient[0] != 0).all()


@pytest.mark.parametrize("wrong", [{"mask_top_p": 0.0}, {"mask_top_p": 1.1}, {"mask_every": 0}, {"mask_min_keep": 1}])
def test_fields_are_checked(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        NLPO(**wrong)
