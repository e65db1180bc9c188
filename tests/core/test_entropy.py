"""Entropy changes against finite differences, and tempered policies against their definition."""

import math

import pytest
import torch

from ctrlrl.core import entropy
from ctrlrl.core.penalty import categorical_entropy, gaussian_entropy
from ctrlrl.nets.heads import Categorical, DiagonalGaussian


def logs(*p):
    return {"logits": torch.tensor(p, dtype=torch.float64).log()}


def test_changes_of_a_two_action_policy():
    """p = (.9, .1), H = .325083: exact -.039550 and +.355950; half of each with one logit; released 81 : 1."""
    params = logs([0.9, 0.1], [0.9, 0.1])
    action = torch.tensor([0, 1])
    expected = {
        "exact": [-0.039550, 0.355950],
        "single_logit": [-0.019775, 0.177975],
        "released": [-0.021972, 1.779752],
    }
    for form, numbers in expected.items():
        got = entropy.entropy_change(params, action, form)
        want = torch.tensor(numbers, dtype=torch.float64)
        torch.testing.assert_close(got, want, atol=1e-6, rtol=0)
        assert got[0] < 0 < got[1], "likely actions lower the entropy, unlikely ones raise it"
    with pytest.raises(ValueError, match="form must be"):
        entropy.entropy_change(params, action, "repo")


def test_exact_change_is_the_derivative_along_a_gradient_step():
    g = torch.Generator().manual_seed(0)
    logits = torch.randn(6, 5, generator=g, dtype=torch.float64)
    action = torch.randint(5, (6,), generator=g)
    step = torch.nn.functional.one_hot(action, 5) - logits.softmax(-1)
    c = 1e-6
    difference = (categorical_entropy(logits + c * step) - categorical_entropy(logits - c * step)) / (2 * c)
    torch.testing.assert_close(entropy.entropy_change({"logits": logits}, action), difference, atol=1e-8, rtol=0)


def test_an_action_that_does_not_exist_changes_nothing():
    two, three = logs([0.9, 0.1]), {"logits": torch.tensor([[0.9, 0.1, 0.0]], dtype=torch.float64).log()}
    action = torch.tensor([1])
    for form in ("exact", "single_logit", "released"):
        torch.testing.assert_close(
            entropy.entropy_change(three, action, form), entropy.entropy_change(two, action, form)
        )


def test_gaussian_change_is_the_derivative_along_the_step_on_log_std():
    mean, log_std = torch.tensor([[0.3, -1.0]]).double(), torch.tensor([[-0.5, 0.2]]).double()
    action = torch.tensor([[1.0, -2.0]]).double()
    leaf = log_std.clone().requires_grad_()
    (score,) = torch.autograd.grad(DiagonalGaussian(mean, leaf).log_prob(action).sum(), leaf)
    c = 1e-6
    difference = (gaussian_entropy(log_std + c * score) - gaussian_entropy(log_std)) / c
    got = entropy.entropy_change({"mean": mean, "log_std": log_std}, action)
    torch.testing.assert_close(got, difference, atol=1e-8, rtol=0)


def test_tempered_choice_has_the_entropies_of_the_example():
    """p = (.8, .2) at T = 2 is (2/3, 1/3): entropy .500402 -> .636514."""
    params = logs([0.8, 0.2])
    hot = entropy.tempered(params, 2.0)
    torch.testing.assert_close(hot["logits"].exp(), torch.tensor([[2 / 3, 1 / 3]], dtype=torch.float64))
    entropies = [categorical_entropy(p["logits"]).item() for p in (params, hot)]
    assert entropies == pytest.approx([0.500402, 0.636514], abs=1e-6)


def test_tempered_ratios_of_the_three_action_example():
    params = logs([[0.5, 0.3, 0.2]] * 3)
    action = torch.arange(3).unsqueeze(0)
    ratio = entropy.tempered_log_ratio(params, action, 1.2).exp()
    torch.testing.assert_close(ratio, torch.tensor([[0.9437, 1.0276, 1.0994]]).double(), atol=5e-5, rtol=0)
    assert entropy.tempered_log_ratio(params, action, 1.0).abs().max() < 1e-15


@pytest.mark.parametrize("temperature", [0.8, 1.2, torch.tensor(1.5)])
def test_tempered_log_ratio_is_the_difference_of_log_probabilities(temperature):
    g = torch.Generator().manual_seed(1)
    logits, action = torch.randn(4, 3, 5, generator=g), torch.randint(5, (4, 3), generator=g)
    before, after = Categorical(logits), Categorical(**entropy.tempered({"logits": logits}, temperature))
    got = entropy.tempered_log_ratio(before.params(), action, temperature)
    torch.testing.assert_close(got, after.log_prob(action) - before.log_prob(action))
    mean, log_std = torch.randn(4, 2, generator=g), torch.randn(4, 2, generator=g)
    action = torch.randn(4, 2, generator=g)
    before = DiagonalGaussian(mean, log_std)
    after = DiagonalGaussian(**entropy.tempered(before.params(), temperature))
    got = entropy.tempered_log_ratio(before.params(), action, temperature)
    torch.testing.assert_close(got, after.log_prob(action) - before.log_prob(action), atol=1e-5, rtol=1e-5)
    moved = gaussian_entropy(after.log_std) - gaussian_entropy(before.log_std)
    torch.testing.assert_close(moved, torch.full((4,), math.log(float(temperature))))


def test_several_choices_at_a_time_are_refused():
    with pytest.raises(ValueError, match="one choice per position"):
        entropy.entropy_change({"logits": torch.zeros(2, 3, 7)}, torch.zeros(2, 3, 2, dtype=torch.long))
