import dataclasses
import json
import math
from typing import Any

import pytest

from ctrlrl.core.control import BangBang, Controller, KLAdaptive, LinearSchedule

ALL: list[Any] = [
    LinearSchedule("step", 1.0, 0.0, 1e-3),
    KLAdaptive("lr", 3e-4, 0.01),
    BangBang("temperature", "entropy", 0.75, 0.8, 1.2),
]


@pytest.mark.parametrize("controller", ALL, ids=lambda c: type(c).__name__)
def test_contract(controller):
    state = controller.initial()
    assert json.loads(json.dumps(state)) == state
    before = dict(state)
    kept, knobs = controller.step(state, {})
    assert kept == before == state and set(knobs) == {controller.knob}
    stats = {"progress": 0.5, "approx_kl": 1.0, "entropy": 2.0}
    assert controller.step(state, stats) == controller.step(state, stats)
    assert state == before
    assert type(controller)(**dataclasses.asdict(controller)) == controller


def test_all_are_controllers():
    assert all(isinstance(c, Controller) for c in ALL)


def test_linear_schedule():
    c = LinearSchedule("k", 1.0, 0.0, 0.1)
    state, seen = c.initial(), []
    for progress in (0.0, 0.25, 0.95, 1.0):
        state, knobs = c.step(state, {"progress": progress})
        seen.append(knobs["k"])
    assert seen == [1.0, 0.75, 0.1, 0.1]
    assert c.step(state, {})[1] == {"k": 0.1}
    assert LinearSchedule("k", 0.0, -2.0).step({"k": 0.0}, {"progress": 1.0})[1] == {"k": -2.0}


def test_kl_adaptive():
    c = KLAdaptive("lr", 1e-3, target=0.01, factor=2.0, low=4e-4, high=3e-3)
    state, seen = c.initial(), []
    for kl in (0.021, 0.02, 0.005, 0.004, 0.004, 0.004, 1.0, 1.0, 1.0, 1.0, math.nan, math.inf):
        state, knobs = c.step(state, {"approx_kl": kl})
        seen.append(knobs["lr"])
    assert seen == pytest.approx(
        [5e-4, 5e-4, 5e-4, 1e-3, 2e-3, 3e-3, 1.5e-3, 7.5e-4, 4e-4, 4e-4, 4e-4, 4e-4], rel=1e-12
    )
    coefficient = KLAdaptive("kl_coef", 1.0, target=0.01, factor=0.5, low=0.1, high=10.0)
    assert coefficient.step({"kl_coef": 1.0}, {"approx_kl": 0.1})[1] == {"kl_coef": 2.0}


def test_bang_bang():
    c = BangBang("k", "entropy", 0.5, low=0.8, high=1.2)
    state, seen = c.initial(), []
    for stats in ({}, {"entropy": 0.6}, {}, {"entropy": 0.5}, {"entropy": 0.4}):
        state, knobs = c.step(state, stats)
        seen.append(knobs["k"])
    assert seen == [1.2, 0.8, 0.8, 1.2, 1.2]


@pytest.mark.parametrize("bad", [{"target": 0.0}, {"factor": 0.0}, {"initial_value": 1.0}])
def test_wrong_settings_raise(bad):
    with pytest.raises(ValueError):
        KLAdaptive(**{"knob": "lr", "initial_value": 1e-3, "target": 0.01, **bad})
