"""Value iteration, exact evaluation and worst cases against closed forms and enumeration."""

from itertools import product

import numpy as np
import pytest
from planning import games

from ctrlrl.planning.model import Model
from ctrlrl.planning.robust_mdp import RobustMDP
from ctrlrl.planning.robust_value_iteration import evaluate, greedy, robust_value_iteration, value_iteration, worst_case


def garnet(seed, states=6, actions=3):
    rng = np.random.default_rng(seed)
    return Model.of(rng.dirichlet(np.full(states, 0.3), size=(states, actions)), rng.standard_normal((states, actions)))


def as_sparse(model):
    to = np.broadcast_to(np.arange(model.states), model.probability.shape)
    return Model.of((to, model.probability), model.reward)


def test_evaluation_has_the_closed_form_of_two_states():
    """Stay with probability p, reward 1 while there: V = 1 / (1 - gamma p); a coin between p = .9 and .5 gives .7."""
    rows = [[[0.9, 0.1], [0.5, 0.5]], [[0.0, 1.0], [0.0, 1.0]]]
    for model in (Model.of(rows, [[1.0, 1.0], [0.0, 0.0]]), as_sparse(Model.of(rows, [[1.0, 1.0], [0.0, 0.0]]))):
        assert evaluate(model, [0, 0], 0.8) == pytest.approx([1 / (1 - 0.72), 0.0])
        assert evaluate(model, [1, 0], 0.8) == pytest.approx([1 / (1 - 0.4), 0.0])
        assert evaluate(model, [[0.5, 0.5], [1.0, 0.0]], 0.8) == pytest.approx([1 / (1 - 0.56), 0.0])


@pytest.mark.parametrize("tolerance", [1.0, 1e-3, 1e-10])
@pytest.mark.parametrize("gamma", [0.0, 0.5, 0.99])
def test_value_iteration_is_within_its_error_of_the_best_policy(tolerance, gamma):
    for seed in range(5):
        model = garnet(seed, states=4)
        best = np.max([evaluate(model, policy, gamma) for policy in product(range(3), repeat=4)], axis=0)
        for one in (model, as_sparse(model)):
            solved = value_iteration(one, gamma, tolerance)
            assert np.abs(solved.values - best).max() <= solved.error <= tolerance * 1.2
            assert np.abs(solved.q - (model.reward + gamma * model.probability @ best)).max() <= solved.error
            assert (solved.values == solved.q.max(-1)).all()


def test_the_error_is_not_far_larger_than_it_must_be():
    """On a chain that pays 1 for ever, the first sweep already shows the value: 1 / (1 - gamma)."""
    solved = value_iteration(Model.of([[[1.0]]], [[1.0]]), 0.999, 1e-6)
    assert solved.values == pytest.approx([1000.0]) and solved.error < 1e-6


class Counting:
    """A model that counts its sweeps."""

    def __init__(self, model):
        self.model, self.states, self.sweeps = model, model.states, 0

    def backup(self, values, gamma):
        self.sweeps += 1
        return self.model.backup(values, gamma)


@pytest.mark.parametrize(("states", "gamma"), [(6, 0.99), (20, 0.999)])
def test_values_beyond_the_resolution_of_floats_still_end(states, gamma):
    """Values near 1e15: rounding hides 1e-10, sweeps beyond it are in vain, and the error says what was reached."""
    model = garnet(0, states)
    large = Model(model.probability, model.reward * 1e12)
    counting = Counting(large)
    solved = value_iteration(counting, gamma, 1e-10)
    assert counting.sweeps < 1000
    best = evaluate(large, solved.policy, gamma)
    assert 1e-10 < solved.error < 1e-10 * best.max() and np.abs(solved.values - best).max() <= solved.error


def test_equal_actions_are_resolved_by_the_lowest_index_not_by_rounding():
    assert greedy(np.array([[1.0, 1.0 + 1e-15], [1.0, 1.0 + 1e-9], [-5.0, -5.0]])).tolist() == [0, 1, 0]


@pytest.mark.parametrize("policy", ["deterministic", "mixed"])
def test_worst_case_over_a_product_is_that_of_its_enumeration(policy):
    rng = np.random.default_rng(0)
    rows, rewards = games.draw(4, 20)
    for row, reward in zip(rows, rewards, strict=True):
        pi = rng.integers(2, size=4) if policy == "deterministic" else rng.dirichlet(np.ones(2), size=4)
        start = rng.dirichlet(np.ones(4))
        every = [evaluate(Model.of(one, reward), pi, games.GAMMA) for one in games.members(row)]
        product_set = RobustMDP.rectangular(row, reward, games.GAMMA, start)
        found = worst_case(product_set, pi)
        assert found.value == pytest.approx(min(start @ values for values in every), abs=1e-11)
        assert found.values == pytest.approx(np.min(every, axis=0), abs=1e-11)  # worst from every state at once
        made = product_set.model(found.model)
        assert evaluate(made, pi, games.GAMMA) == pytest.approx(found.values, abs=1e-12)
        # where the policy never acts the model is the worst too
        backup = reward + games.GAMMA * made.probability @ found.values
        assert backup == pytest.approx((reward[..., None] + games.GAMMA * row @ found.values).min(-1), abs=1e-11)
        listed = worst_case(RobustMDP.models(games.members(row), reward, games.GAMMA, start), pi)
        assert listed.value == pytest.approx(found.value, abs=1e-11)


def test_of_equally_bad_models_a_list_yields_the_first():
    rng = np.random.default_rng(0)
    one, other = rng.dirichlet(np.ones(3), size=(2, 3, 1))
    mdp = RobustMDP.models(np.stack([other, one, one, other, one]), rng.standard_normal((3, 1)), gamma=0.9)
    assert worst_case(mdp, [0, 0, 0]).model in (0, 1)


def test_robust_values_of_the_hull_bound_every_policy_from_below():
    """On a list the hull's adversary is stronger; on its own product the two agree."""
    models, rewards = games.draw(5, 30, rows_per_pair=3)
    below = 0
    for rows, reward in zip(models, rewards, strict=True):
        listed = RobustMDP.models(np.moveaxis(rows, 2, 0), reward, games.GAMMA)
        hull = robust_value_iteration(listed)
        full = robust_value_iteration(RobustMDP.rectangular(rows, reward, games.GAMMA))
        assert hull.is_hull and not full.is_hull
        assert np.abs(hull.values - full.values).max() < 1e-9 and (hull.rows == full.rows).all()
        own = worst_case(listed, hull.policy).value
        assert own >= hull.values[0] - 1e-9
        below += own > hull.values[0] + 1e-6
    assert below > 5


def test_the_robust_policy_attains_its_value_on_a_rectangular_set():
    rows, rewards = games.draw(6, 20)
    for row, reward in zip(rows, rewards, strict=True):
        mdp = RobustMDP.rectangular(row, reward, games.GAMMA)
        solved = robust_value_iteration(mdp)
        assert worst_case(mdp, solved.policy).value == pytest.approx(solved.values[0], abs=1e-9)


@pytest.mark.parametrize(
    ("policy", "message"),
    [
        ([0, 1, 0, 2], "actions run from 0 to 2"),
        ([0, -1, 0, 0], "actions run from -1"),
        ([0, 1], r"shape \[2\]; expected integers \[4\]"),
        ([0.0, 1.0, 0.0, 0.0], "float64 of shape"),
        (np.full((4, 2), 0.6), r"policy: row \(0,\) sums to 1.2"),
    ],
)
def test_policies_that_do_not_fit_are_refused(policy, message):
    rows, rewards = games.draw(0, 1)
    with pytest.raises(ValueError, match=message):
        worst_case(RobustMDP.rectangular(rows[0], rewards[0], games.GAMMA), policy)


@pytest.mark.parametrize("settings", [{"tolerance": 0.0}, {"tolerance": float("nan")}, {"gamma": 1.0}])
def test_settings_out_of_range_are_refused(settings):
    with pytest.raises(ValueError, match=next(iter(settings))):
        value_iteration(**{"model": garnet(0), "gamma": 0.9, **settings})
