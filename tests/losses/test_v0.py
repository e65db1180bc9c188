"""V_0: GRPO's objective, with budgets by a predicted chance of success; the predictor can be the user's own."""

from dataclasses import dataclass

import pytest
import torch
from losses.golden import begun, case_of, objective

from ctrlrl.core.select import LogisticStartValue, StartValueBudget
from ctrlrl.losses.group import ClippedGroupLoss
from ctrlrl.losses.v0 import V0


@dataclass(frozen=True)
class FirstFeature:
    """A predictor that reads the chance off the observation."""

    context: int

    def initial(self, features):
        return {"seen": torch.zeros(())}

    def probability(self, state, features):
        return features[:, 0]

    def learn(self, state, features, score):
        return {"seen": state["seen"] + len(score)}


@dataclass(frozen=True)
class NoPredictor:
    context: int


def test_the_objective_is_grpo_without_kl():
    case = case_of(V0)
    base = type("Base", (ClippedGroupLoss,), {"name": "base"})()
    totals = [objective(x, begun(x, case.batch), case.output(case.leaf)) for x in (V0(), base)]
    torch.testing.assert_close(totals[0], totals[1], rtol=0, atol=0)


def test_settings_reach_the_selector():
    loss = V0(size_min=3, size_max=9, context=64)
    assert loss.selector() == StartValueBudget(LogisticStartValue(64), low=3, high=9)


def test_a_predictor_of_ones_own():
    """p = (.9, .5, .2): the steps of U from size 2 are .108, .75 and .96; each unit goes to the largest."""
    selector = V0(size_max=8, start_value=f"{__name__}:FirstFeature").selector()
    features = torch.tensor([[0.9], [0.5], [0.2]])
    state = selector.initial(3, features)
    choice = selector.select(state, 3, 4, 0.0, torch.Generator().manual_seed(0))
    u = [[n * (1 - p) * (1 - (1 - p) ** (n - 1)) for n in range(1, 10)] for p in (0.9, 0.5, 0.2)]
    size = [2, 2, 2]
    for _ in range(6):
        gain = [u[g][size[g]] - u[g][size[g] - 1] if size[g] < 8 else -1 for g in range(3)]
        size[gain.index(max(gain))] += 1
    assert choice.size[choice.index.argsort()].tolist() == size
    state = selector.learn(state, torch.tensor([0, 1]), torch.ones(2), features[:2])
    assert state["value.seen"] == 2


def test_a_wrong_predictor_is_refused():
    with pytest.raises(ValueError, match="cannot load the value of the first observation"):
        V0(start_value="no.such.module:Value").selector()
    with pytest.raises(ValueError, match="lacks a method"):
        V0(start_value=f"{__name__}:NoPredictor").selector()


@pytest.mark.parametrize("wrong", [{"size_min": 1}, {"context": 0}])
def test_impossible_settings_are_refused(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        V0(**wrong)
