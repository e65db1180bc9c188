"""A trained diffusion model as a learner's source of rows: policy-guided diffusion from end to end."""

import numpy as np
import pytest
import torch
from helpers.agents import Recorder, assert_same_tensors, quiet
from helpers.offline import recorded, tiny

from ctrlrl import api
from ctrlrl.data import d4rl
from ctrlrl.engine.config import ConfigError

pytest.importorskip("diffusers", reason="diffusers is not installed")

DIFFUSION = {
    "batch_size": 8, "iteration_steps": 10, "learning_rate": 1e-2, "device": "cpu", "threads": 1, "window_length": 3,
    "window_stride": 1, "denoiser_channels": (8,), "denoiser_width": 16, "denoiser_blocks": 1, "held_out": 0.0,
}  # fmt: skip


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A file of recorded steps."""
    path = tmp_path_factory.mktemp("data") / "toy.hdf5"
    d4rl.write(recorded(), path)
    return path


@pytest.fixture(scope="module")
def diffusion(data, tmp_path_factory):
    """A trained run of policy_guided_diffusion."""
    agent = api.make("policy_guided_diffusion", dataset=data, **DIFFUSION)
    return keep(agent, 20, tmp_path_factory.mktemp("run") / "diffusion").run_dir


class Dies:
    """In the twelfth iteration, without saving."""

    def on_update(self, agent, step, metrics):
        if agent.iteration == 12:
            raise KeyboardInterrupt


def keep(agent, steps, folder, **kwargs):
    return agent.learn(steps, run_dir=folder, progress=False, tensorboard=False, **kwargs)


def test_a_learner_is_trained_on_what_a_diffusion_model_generates_and_resumed_exactly(data, diffusion, tmp_path):
    settings = tiny("iql") | {
        "augment": diffusion, "augment_every": 7, "augment_trajectories": 12, "kappa": 1.0, "sampler_steps": 3,
        "augment_share": 0.75, "iteration_steps": 1,
    }  # fmt: skip
    whole = keep(api.make("iql", dataset=data, **settings), 15, tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        keep(api.make("iql", dataset=data, **settings), 15, tmp_path / "run", callbacks=[Dies()])
    agent = api.load(tmp_path / "run")
    assert agent.steps == 10 and agent.generated.made_at == 7
    log = Recorder()
    agent.resume(tmp_path / "run", progress=False, tensorboard=False, callbacks=[log])
    assert_same_tensors(whole.tensors(), agent.tensors())
    (line,) = [metrics for _, metrics in log.of("update") if "augment/rows" in metrics]  # the set of update 14
    assert 24 <= line["augment/rows"] <= 36 and np.isfinite(line["augment/log_prob"])
    other = keep(api.make("iql", dataset=data, **settings | {"kappa": 0.0}), 15, tmp_path / "other")
    assert not torch.equal(other.generated.replay.columns["action"], whole.generated.replay.columns["action"])


def test_a_training_that_ends_before_any_row_is_guided_says_so(data, diffusion, caplog):
    settings = tiny("td3_bc") | {"augment": diffusion, "augment_trajectories": 8, "kappa": 1.0, "sampler_steps": 2}
    for every, warned in ((6, True), (5, False)):
        caplog.clear()
        quiet(api.make("td3_bc", dataset=data, **settings, augment_every=every), 6)
        assert ("No row will be guided" in caplog.text) is warned


def test_the_guidance_of_a_diffusion_model_raises_the_policys_density(data, diffusion):
    settings = tiny("td3_bc") | {"augment": diffusion, "augment_every": 1, "augment_trajectories": 64, "tau": 0.0}
    settings |= {"learning_rate": 1e-12, "sampler_steps": 8, "kernel_std": 0.3, "kappa": 3.0}
    log = Recorder()
    quiet(api.make("td3_bc", dataset=data, **settings | {"iteration_steps": 1}), 2, callbacks=[log])
    unguided, guided = (metrics["augment/log_prob"] for _, metrics in log.of("update"))
    assert guided > unguided + 0.1


def test_rebrac_learns_from_a_diffusion_models_trajectories(data, diffusion):
    agent = api.make("rebrac", dataset=data, augment=diffusion, augment_trajectories=12, **tiny("rebrac"))
    quiet(agent, 3)
    rows = agent.generated.replay.columns
    ended = rows["terminated"] > 0.5
    assert len(ended) >= 24  # two of three steps, and every third that ends
    assert rows["extras/next_action"][ended].eq(0.0).all() and rows["extras/next_action"][~ended].ne(0.0).any()


def test_rebrac_refuses_a_model_of_single_transitions(data, tmp_path):
    agent = api.make("policy_guided_diffusion", dataset=data, **DIFFUSION | {"window_length": 1})
    agent.save(tmp_path / "single")
    with pytest.raises(ConfigError, match="window_length above 1"):
        quiet(api.make("rebrac", dataset=data, augment=tmp_path / "single", **tiny("rebrac")), 3)
    iql = api.make("iql", dataset=data, augment=tmp_path / "single", augment_trajectories=9, **tiny("iql"))
    quiet(iql, 3)  # as SynthER
    assert len(iql.generated.replay) == 9
