"""Every method on whole episodes: the same run twice, and stopped and resumed, bit for bit; saved and loaded."""

import numpy as np
import pytest
import torch
from contracts.test_methods import KillAt, Killed, lines
from helpers.agents import assert_same_tensors, home

from ctrlrl import api
from ctrlrl.engine import checkpoint
from ctrlrl.engine.world import whole_episodes
from ctrlrl.losses import base


def episodic():
    """All of them; those that remember nothing of their own are all alike to a checkpoint, and slow but for one."""
    found = []
    for name in base.names():
        loss = base.get(name)()
        if not whole_episodes("continuous", loss.needs):
            continue
        asks = (loss.needs | loss.uses) & {"replay", "support", "tempered", "hints", "retries", "demonstrations"}
        state = loss.memory() or loss.controllers() or loss.selector() or asks
        found.append(pytest.param(name, marks=() if state or name == "grpo" else pytest.mark.slow))
    return found


def build(name, **more):
    env, settings = home(name)
    return api.make(name, env, seed=3, **settings | more)


@pytest.mark.parametrize("name", episodic())
def test_stopped_and_resumed_equals_never_stopped(name, tmp_path):
    """Borders every ten iterations; death in the twelfth, after a checkpoint with memory, replay and references."""
    quiet = {"progress": False, "tensorboard": False}
    whole = build(name)
    before = torch.get_rng_state(), np.random.get_state()[1].copy()
    start = {k: v.clone() for k, v in whole.tensors().items()}
    whole.learn(10**9, run_dir=tmp_path / "whole", callbacks=[StopAt(13)], **quiet)
    assert torch.equal(before[0], torch.get_rng_state()) and (before[1] == np.random.get_state()[1]).all()
    killed = build(name)
    with pytest.raises(Killed):
        killed.learn(10**9, run_dir=tmp_path / "killed", callbacks=[KillAt(12)], **quiet)
    resumed = api.load(tmp_path / "killed")
    assert resumed.iteration == 10
    resumed.resume(tmp_path / "killed", callbacks=[StopAt(13)], **quiet)
    runs = [tmp_path / name for name in ("whole", "killed")]
    (tensors_a, state_a), (tensors_b, state_b) = (checkpoint.read(r / "checkpoints/last.safetensors") for r in runs)
    assert state_a == state_b
    assert_same_tensors(tensors_a, tensors_b)
    assert lines(runs[0] / "metrics.jsonl") == lines(runs[1] / "metrics.jsonl")
    assert_same_tensors(whole.tensors(), resumed.tensors())
    assert whole.counters() == resumed.counters()
    end = whole.tensors()
    assert any(not torch.equal(start[k], end[k]) for k in start if k.startswith("policy/")), "nothing was learned"
    loaded = api.load(tmp_path / "whole")
    obs = np.stack([whole.observation_space.sample() for _ in range(20)])
    assert np.array_equal(whole.predict(obs, deterministic=True)[0], loaded.predict(obs, deterministic=True)[0])


class StopAt:
    """Ends the run in good order."""

    def __init__(self, iteration):
        self.iteration = iteration

    def on_update(self, agent, step, metrics):
        return agent.iteration < self.iteration


@pytest.mark.parametrize("name", ["grpo", "rloo"])
def test_another_seed_gives_another_run(name):
    env, settings = home(name)
    agents = [api.make(name, env, seed=s, **settings).learn(200, root=None, progress=False) for s in (0, 1)]
    a, b = (next(iter(x.policy.parameters())).detach() for x in agents)
    assert not torch.equal(a, b)
