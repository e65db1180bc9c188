"""The one-file PPO and the library's PPO are the same computation."""

import importlib.util
import sys
from pathlib import Path

import pytest
import torch

from ctrlrl.api import make

SCRIPT = Path(__file__).parents[2] / "scripts" / "ppo_in_one_file.py"


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("ppo_in_one_file", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules["ppo_in_one_file"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("env", ["Pendulum-v1", "Hopper-v5"])
def test_matches_the_library_step_for_step(script, env):
    # Pendulum only truncates (200 steps), Hopper mostly terminates; both end episodes inside and across rollouts
    config = script.Config(env=env, steps=3 * 256, n_steps=256, epochs=3, seed=7)
    ours = script.train(config, verbose=False)
    agent = make("ppo", env, seed=7, n_steps=256, epochs=3, backend="sync", device="cpu", eval_every=None)
    agent.learn(3 * 256, root=None, progress=False)
    pairs = {
        "actor.0.weight": "actor.0.weight",
        "actor.2.bias": "actor.2.bias",
        "mean.weight": "head.linear.weight",
        "log_std": "head.log_std",
        "critic.0.weight": "critics.value.0.weight",
        "critic.4.weight": "critics.value.4.weight",
    }
    script_state, library_state = ours.state_dict(), agent.policy.state_dict()
    for mine, theirs in pairs.items():
        torch.testing.assert_close(script_state[mine], library_state[theirs], atol=2e-5, rtol=0)


def test_is_about_two_hundred_lines():
    assert len(SCRIPT.read_text().splitlines()) < 230
