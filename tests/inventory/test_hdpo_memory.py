"""What an update of HDPO needs for its backward pass, and what it does where that is not there."""

import pytest
from hdpo_parts import ID

import ctrlrl
from ctrlrl.engine.config import ConfigError
from ctrlrl.inventory import hdpo

QUIET = {"progress": False, "tensorboard": False}


def agent(**settings):
    small = {"policy": "hdpo_parts:Random", "batch_size": 16, "dev_scenarios": 16, "eval_every": None}
    return ctrlrl.HDPO(ID, **{**small, **settings})


def test_periods_are_computed_again_where_an_update_would_not_fit(monkeypatch, caplog, tmp_path):
    """12 periods of 100 bytes for each of 16 scenarios, 19,200 in all: half of 38,400."""
    sizes = []
    monkeypatch.setattr(hdpo, "saved_by_a_period", lambda s, act, state, _: sizes.append(len(state.inventory)) or 1600)
    for free, wanted in ((None, None), (38_400, None), (38_399, 3), (7000, 2), (1600, 1)):
        monkeypatch.setattr(hdpo, "available_memory", lambda device, free=free: free)
        found = agent().learn(1, root=None, **QUIET)
        assert found.config.recompute_periods == wanted
    assert sizes == [16] * 4 and len(caplog.messages) == 3
    assert (
        "an update of 16 scenarios over 12 periods keeps about" in caplog.text and "3 periods at a time" in caplog.text
    )
    monkeypatch.setattr(hdpo, "available_memory", lambda device: 1599)
    with pytest.raises(ConfigError, match=r"not enough for a single period.*lower batch_size"):
        agent().learn(1, run_dir=tmp_path / "run", **QUIET)
    assert not (tmp_path / "run").exists()
    assert agent(recompute_periods=5).learn(1, root=None, **QUIET).config.recompute_periods == 5


def test_the_memory_of_a_batch_is_estimated_by_a_part_of_it_and_goes_by_what_is_recorded(monkeypatch):
    monkeypatch.setattr(hdpo, "saved_by_a_period", lambda s, act, state, _: 1000 * len(state.inventory))
    # 12 periods: 2048 scenarios are 2,048,000 bytes each, ten products 10,000
    for free, kwargs, wanted in (
        (3_000_000, {}, 1),
        (250_000, {"kind": "series"}, None),
        (230_000, {"kind": "series"}, 3),
    ):
        monkeypatch.setattr(hdpo, "available_memory", lambda device, free=free: free)
        assert agent(env_kwargs=kwargs, batch_size=2048)._recompute() == wanted
