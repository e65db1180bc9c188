"""IWOCS against domain randomisation and robust value iteration on a pendulum of uncertain mass and length.

The set is a list of 25 kernels, which is far from rectangular: robust value iteration guards against an adversary who
changes mass and length at every step and pays for it.
"""

from itertools import product
from typing import NamedTuple

import numpy as np
import pytest
from planning.pendulum import hanging, pendulum, pendulum_reward

from ctrlrl.planning.iwocs_tabular import IwocsResult, NoCertificateError, iwocs
from ctrlrl.planning.model import Model
from ctrlrl.planning.robust_mdp import RobustMDP
from ctrlrl.planning.robust_value_iteration import robust_value_iteration, value_iteration, worst_case

GAMMA = 0.97


class Outcome(NamedTuple):
    iwocs: IwocsResult
    randomised: float
    """Worst case of the policy that is best in the even mixture of all models."""
    hull: float
    """Value of robust value iteration."""
    robust: float
    """Worst case of its policy in the list."""


def compare(cells: int, torques: int, per_side: int) -> Outcome:
    box = list(product(np.linspace(0.5, 1.5, per_side), np.linspace(0.7, 1.3, per_side)))
    kernels, reward = [pendulum(*rod, cells, torques) for rod in box], pendulum_reward(cells, torques)
    mdp = RobustMDP.models(kernels, reward, GAMMA, hanging(cells))
    result = iwocs(mdp, first_model=len(box) // 2, gap_tolerance=1e-3, solver_tolerance=1e-6)
    with pytest.raises(NoCertificateError):
        result.certificate()
    to = np.concatenate([to for to, _ in kernels], -1)
    mixture = Model.of((to, np.concatenate([p for _, p in kernels], -1) / len(box)), reward)
    randomised = worst_case(mdp, value_iteration(mixture, GAMMA, 1e-6).policy).value
    robust = robust_value_iteration(mdp, 1e-6)
    assert robust.is_hull
    return Outcome(result, randomised, float(mdp.start @ robust.values), worst_case(mdp, robust.policy).value)


def check_order(outcome: Outcome):
    assert outcome.iwocs.worst_case > outcome.randomised + 1 and outcome.iwocs.worst_case > outcome.robust + 1
    assert outcome.robust > outcome.hull + 1  # the hull is a lower bound, and a loose one
    assert outcome.iwocs.worst_case > outcome.iwocs.iterations[0].lower + 1
    assert outcome.iwocs.dual_bound > outcome.iwocs.worst_case


def test_a_coarse_pendulum_has_the_order_of_the_fine_one():
    check_order(compare(cells=21, torques=5, per_side=3))


@pytest.mark.slow
def test_pendulum_has_the_values_of_the_note():
    outcome = compare(cells=41, torques=7, per_side=5)
    check_order(outcome)
    turns = outcome.iwocs.iterations
    assert [round(turn.lower, 1) for turn in turns] == [-197.8, -190.0, -189.8]
    assert round(turns[-1].upper, 1) == -182.9
    assert (round(outcome.randomised, 1), round(outcome.hull, 1), round(outcome.robust, 1)) == (-200.7, -224.9, -199.9)


def test_rows_of_the_pendulum_are_distributions_around_the_landing_point():
    to, share = pendulum(1.0, 1.0, cells=41, torques=7)
    assert (share >= 0).all() and np.abs(share.sum(-1) - 1).max() < 1e-12
    # hanging at rest with the torque in the middle, nothing moves
    rest = hanging(41)
    assert share[rest, 3, to[rest, 3] == rest].sum() == pytest.approx(1.0)
