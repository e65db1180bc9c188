"""Check P3: a model learned from data of a pendulum, against the pendulum itself."""

import sys
from pathlib import Path

import pytest
import torch

from ctrlrl import api
from ctrlrl.nets.edm import SamplerConfig

pytest.importorskip("diffusers", reason="diffusers is not installed")
LENGTH, KAPPAS = 33, (0.0, 0.3, 1.0, 3.0)


@pytest.fixture(scope="module")
def pgd():
    """The dynamics and measures of scripts/bench_pgd.py."""
    sys.path.insert(0, str(Path(__file__).parents[2] / "scripts"))
    import pgd_dynamics

    yield pgd_dynamics
    sys.path.pop(0)


@pytest.fixture(scope="module")
def measured(pgd):
    """By source, what 128 generated trajectories are like."""
    data = pgd.pendulum_set(20_000, 100)
    settings = {"window_length": LENGTH, "device": "cpu", "threads": 1, "denoiser_channels": (32, 64)}
    agent = api.make("policy_guided_diffusion", dataset=data, **settings)
    agent.learn(1_500, root=None, progress=False, tensorboard=False)
    rows, simulator = pgd.recorded(data), pgd.Simulator("Pendulum-v1")
    behaviour, target = pgd.pendulum_policies()
    std = rows.obs.double().std(0).numpy()

    def of(kappa, legacy=False):
        sampler = SamplerConfig(legacy_predictor=legacy)
        steps = pgd.generate(agent.averaged, 128, target, kappa, sampler, 0)
        return pgd.measure(simulator, steps, std, target, behaviour)

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    found = {kappa: of(kappa) for kappa in KAPPAS} | {"released": of(0.0, legacy=True)}
    torch.set_num_threads(threads)
    return found


@pytest.mark.slow
def test_more_guidance_makes_the_targets_actions_more_likely(measured):
    likelihood = [measured[kappa]["log_target"] for kappa in KAPPAS]
    assert likelihood == sorted(likelihood) and likelihood[-1] > likelihood[0] + 1.0


@pytest.mark.slow
def test_weak_guidance_leaves_the_dynamics_as_they_are(measured):
    assert measured[1.0]["one_step"]["mean"] < 1.3 * measured[0.0]["one_step"]["mean"]


@pytest.mark.slow
def test_the_released_predictor_costs_a_factor_of_three_in_dynamics(measured):
    assert measured["released"]["one_step"]["mean"] > 3.0 * measured[0.0]["one_step"]["mean"]
