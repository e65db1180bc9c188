"""Selectors against exhaustive search, hand-worked sampling weights and a known logistic model."""

import itertools

import pytest
import torch

from ctrlrl.core import budget as budgets
from ctrlrl.core import select


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def best_allocation(value, low, budget):
    """The largest total value over all splits, by exhaustion."""
    groups, high = value.shape[0], value.shape[1] - 1
    sizes = (s for s in itertools.product(range(low, high + 1), repeat=groups) if sum(s) == budget)
    return max(sum(value[g, n].item() for g, n in enumerate(s)) for s in sizes)


# -- budgets --------------------------------------------------------------------------------------


def test_allocation_equals_exhaustive_search():
    g = generator()
    for _ in range(60):
        groups = int(torch.randint(2, 5, (), generator=g))
        p = torch.rand(groups, generator=g)
        budget = int(torch.randint(2 * groups, 8 * groups + 1, (), generator=g))
        value = budgets.mixed_outcome_value(p, 8)
        size = budgets.allocate(value, 2, budget)
        assert int(size.sum()) == budget and int(size.min()) >= 2 and int(size.max()) <= 8
        got = value.gather(1, size.unsqueeze(1)).sum().item()
        assert got == pytest.approx(best_allocation(value, 2, budget), abs=1e-12)


def test_four_seeds_share_32_episodes():
    """p = (.9, .5, .25, .0625): sizes (2, 7, 11, 12) are worth .288963, equal ones .277847."""
    p = torch.tensor([0.9, 0.5, 0.25, 0.0625])
    value = budgets.mixed_outcome_value(p, 32)
    size = budgets.allocate(value, 2, 32)
    assert size.tolist() == [2, 7, 11, 12]
    assert value.gather(1, size.unsqueeze(1)).sum().item() == pytest.approx(0.288963, abs=1e-6)
    assert value[:, 8].sum().item() == pytest.approx(0.277847, abs=1e-6)


def test_values_of_the_examples():
    v = budgets.mixed_outcome_value(torch.tensor([0.5, 0.1, 0.9]).double(), 8)
    expected = [[0.0625, 0.124023], [0.01458, 0.046132], [0.00162, 0.005126]]
    torch.testing.assert_close(v[:, [2, 8]], torch.tensor(expected).double(), atol=1e-6, rtol=0)
    u = budgets.failure_value(torch.tensor([0.1, 0.5, 0.9, 0.01]).double(), 32)
    assert u[:3, 8].tolist() == pytest.approx([3.75626, 3.96875, 0.8], abs=1e-5)
    assert u[3, 32].item() == pytest.approx(8.4806, abs=1e-4)
    assert (u[0, 32] - u[0, 31]).item() == pytest.approx(0.9, abs=0.1), "steps tend to 1 - p"


def test_equal_gains_are_shared_evenly():
    size = budgets.allocate(torch.zeros(5, 9), 1, 13)
    assert sorted(size.tolist()) == [2, 2, 3, 3, 3]


@pytest.mark.parametrize("low, budget", [(2, 5), (2, 25), (9, 30), (0, 10)])
def test_an_impossible_budget_is_refused(low, budget):
    with pytest.raises(ValueError, match="cannot be split"):
        budgets.allocate(torch.zeros(3, 9), low, budget)


def test_pass_rates_set_the_sizes():
    selector = select.PassRateBudget(low=2, high=40, prior=0.5, decay=0.5)
    features = torch.zeros(4, 1)
    state = selector.initial(4, features)
    assert selector.select(state, 4, 8, 0.0, generator()).size.tolist() == [8] * 4
    index = torch.arange(4).repeat_interleave(16)
    score = torch.cat([(torch.arange(16) < k).float() for k in (15, 8, 4, 1)])
    state = selector.learn(state, index, score, features[index])
    choice = selector.select(state, 4, 8, 0.0, generator())
    sizes = dict(zip(choice.index.tolist(), choice.size.tolist(), strict=True))
    assert sum(sizes.values()) == 32 and sizes[0] == 2 and sizes[0] < sizes[1] < sizes[2]
    state = selector.learn(state, torch.tensor([0, 0]), torch.tensor([0.0, 0.0]), torch.zeros(2, 1))
    assert state["solved"].tolist() == [7.5, 8, 4, 1] and state["played"].tolist() == [10, 16, 16, 16]


def test_a_seed_not_yet_played_gets_the_usual_size():
    selector = select.PassRateBudget()
    state = selector.learn(selector.initial(3, torch.zeros(3, 1)), torch.tensor([0, 1]), torch.ones(2), torch.zeros(2))
    choice = selector.select(state, 3, 8, 0.0, generator())
    assert choice.size[choice.index == 2].item() == 8 and int(choice.size.sum()) == 24


# -- which seeds ----------------------------------------------------------------------------------


def variance_state(p):
    selector = select.VarianceSampling()
    index = torch.arange(len(p)).repeat_interleave(4)
    score = torch.cat([(torch.arange(4) < 4 * x).float() for x in p])
    return selector.learn(selector.initial(len(p), torch.zeros(len(p), 1)), index, score, torch.zeros(len(index), 1))


def test_outcome_variances_of_the_example():
    """p = (0, .5, .75, 1): variances (0, .25, .1875, 0), scaled (0, 1, .75, 0)."""
    state = variance_state([0, 0.5, 0.75, 1])
    assert state["variance"].tolist() == pytest.approx([0, 0.25, 0.1875, 0])
    assert select.VarianceSampling().weight(state).tolist() == pytest.approx([0, 1, 0.75, 0])


def test_half_of_the_groups_are_drawn_by_variance():
    state = variance_state([0, 0.5, 0.75, 1])
    choice = select.VarianceSampling(share=0.5).select(state, 8, 6, 0.0, generator())
    assert set(choice.index[:4].tolist()) <= {1, 2} and sorted(choice.index[4:].tolist()) == [0, 1, 2, 3]
    assert choice.size.tolist() == [6] * 8
    many = select.VarianceSampling(share=1.0).select(state, 7000, 6, 0.0, generator()).index
    assert (many == 1).double().mean().item() == pytest.approx(4 / 7, abs=0.03)


def test_no_share_is_uniform_and_equal_variances_fall_back_to_it():
    state = variance_state([0, 0.5, 0.75, 1])
    choice = select.VarianceSampling(share=0.0).select(state, 8, 6, 0.0, generator())
    assert torch.bincount(choice.index).tolist() == [2, 2, 2, 2]
    solved = variance_state([1, 1, 1])
    assert len(select.VarianceSampling(share=1.0).select(solved, 5, 2, 0.0, generator()).index) == 5


def test_momentum_keeps_the_old_variance():
    state = {"variance": torch.tensor([0.25, 0.25])}
    lazy = select.VarianceSampling(momentum=0.75)
    after = lazy.learn(state, torch.tensor([0, 0]), torch.tensor([1.0, 1.0]), torch.zeros(2, 1))
    assert after["variance"].tolist() == [0.1875, 0.25]


def test_subset_of_largest_variance_equals_brute_force():
    g = generator(2)
    for _ in range(100):
        total = int(torch.randint(1, 9, (), generator=g))
        x = torch.randn(total, generator=g, dtype=torch.float64).mul(2).round().div(2)
        n = int(torch.randint(1, total + 1, (), generator=g))
        kept = budgets.max_variance_subset(x, n)
        assert int(kept.sum()) == n
        best = max(x[list(s)].var(unbiased=False).item() for s in itertools.combinations(range(total), n))
        assert x[kept].var(unbiased=False).item() == pytest.approx(best, abs=1e-12)


def test_subset_of_the_example():
    x = torch.tensor([0.5, -1.5, 0.0, 1.5, -0.5])
    assert sorted(x[budgets.max_variance_subset(x, 2)].tolist()) == [-1.5, 1.5]
    assert x[budgets.max_variance_subset(x, 3)].var(unbiased=False).item() == pytest.approx(1.5556, abs=1e-4)
    assert budgets.max_variance_subset(x, 5).all()
    with pytest.raises(ValueError, match="cannot keep 6 of 5"):
        budgets.max_variance_subset(x, 6)


# -- a value of the first observation -------------------------------------------------------------


def area(score, label):
    """Probability that a success is ranked above a failure."""
    good, bad = score[label > 0.5], score[label < 0.5]
    return (good.unsqueeze(1) > bad).double().mean().item()


def test_logistic_start_value_learns_a_logistic_policy():
    g = generator(3)
    x = torch.randn(4000, 6, generator=g)
    weight = torch.tensor([1.5, -1.0, 0.8, 0.0, 0.0, -0.6])
    p = torch.sigmoid(x @ weight + 0.5)
    y = torch.bernoulli(p, generator=g)
    model = select.LogisticStartValue()
    state = model.initial(x)
    assert model.probability(state, x[:9]).tolist() == [0.5] * 9
    few = model.learn(state, x[:16], y[:16])
    many = model.learn(state, x[:256], y[:256])
    found = [area(model.probability(s, x[1000:]), y[1000:]) for s in (few, many)]
    oracle = area(p[1000:], y[1000:])
    assert found[0] < found[1] and found[1] > oracle - 0.015
    shuffled = torch.randperm(256, generator=g)
    again = model.learn(state, x[shuffled], y[shuffled])
    torch.testing.assert_close(model.probability(again, x[:50]), model.probability(many, x[:50]))


def test_logistic_mode_is_that_of_the_weights():
    """The same model in weight space: at the mode the gradient of the log-posterior vanishes."""
    g = generator(4)
    x, y = torch.randn(40, 3, generator=g).double(), torch.rand(40, generator=g).double()
    model = select.LogisticStartValue(prior_scale=1.5)
    state = model.learn(model.initial(x), x, y)
    z = torch.cat([state["x"] / 3**0.5, torch.ones(40, 1)], 1)
    weight = 1.5**2 * z.T @ state["residual"]
    gradient = z.T @ (y - torch.sigmoid(z @ weight)) - weight / 1.5**2
    assert gradient.abs().max() < 1e-8
    # the Laplace variance in weight space gives the same prediction
    hessian = z.T @ (state["precision"].unsqueeze(1) * z) + torch.eye(4) / 1.5**2
    variance = (z @ torch.linalg.inv(hessian) * z).sum(1)
    expected = torch.sigmoid(z @ weight / (1 + torch.pi / 8 * variance).sqrt())
    torch.testing.assert_close(model.probability(state, x), expected)


def test_only_the_last_episodes_count():
    g = generator(5)
    x, y = torch.randn(30, 2, generator=g), torch.rand(30, generator=g).round()
    model = select.LogisticStartValue(context=8)
    state = model.initial(x)
    whole = model.learn(model.learn(state, x[:20], y[:20]), x[20:], y[20:])
    last = model.learn(state, x[22:], y[22:])
    assert len(whole["x"]) == 8
    torch.testing.assert_close(model.probability(whole, x), model.probability(last, x))


def test_start_values_set_the_sizes():
    g = generator(6)
    features = torch.tensor([[-2.0], [-1.0], [1.0], [2.0]])
    selector = select.StartValueBudget(high=24)
    assert isinstance(selector, select.Selector) and isinstance(selector.value, select.StartValue)
    state = selector.initial(4, features)
    assert selector.select(state, 4, 8, 0.0, generator()).size.tolist() == [8] * 4
    index = torch.arange(4).repeat_interleave(30)
    score = torch.bernoulli(torch.tensor([0.1, 0.3, 0.8, 0.97])[index], generator=g)
    state = selector.learn(state, index, score, features[index])
    choice = selector.select(state, 4, 8, 0.0, generator())
    sizes = dict(zip(choice.index.tolist(), choice.size.tolist(), strict=True))
    # the greedy rule starts where a failure and a success are soonest seen, and stops at the bound
    assert sum(sizes.values()) == 32 and sizes[3] == 2 and sizes[1] == 24


@pytest.mark.parametrize(
    "selector",
    [select.VarianceSampling(), select.PassRateBudget(), select.StartValueBudget()],
    ids=lambda s: type(s).__name__,
)
@pytest.mark.parametrize("pool", [3, 40])
def test_selectors_keep_the_protocol(selector, pool):
    """A fixed generator repeats the choice, the budget is met, and states are dictionaries of tensors."""
    assert isinstance(selector, select.Selector)
    g = generator(7)
    features = torch.randn(pool, 5, generator=g)
    state = selector.initial(pool, features)
    for _ in range(3):
        choice = selector.select(state, 10, 4, 0.5, generator(1))
        again = selector.select(state, 10, 4, 0.5, generator(1))
        assert torch.equal(choice.index, again.index) and torch.equal(choice.size, again.size)
        assert int(choice.size.sum()) == 40 and int(choice.size.min()) >= 1
        assert choice.index.dtype == choice.size.dtype == torch.int64 and int(choice.index.max()) < pool
        index = choice.index.repeat_interleave(choice.size)
        before = {k: v.clone() for k, v in state.items()}
        after = selector.learn(state, index, torch.rand(40, generator=g).round(), features[index])
        assert all(torch.equal(state[k], v) for k, v in before.items()), "learn must not change its argument"
        assert set(after) == set(state) and all(isinstance(v, torch.Tensor) for v in after.values())
        state = after
