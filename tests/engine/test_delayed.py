"""The delayed policy and the smoothed target of TD3 and its kin."""

import pytest
import torch

from ctrlrl.engine import algorithm as algorithms

METHODS = pytest.mark.parametrize("name", ["td3", "td3_bc", "rebrac"])


class Steps:
    """Takes note of what moves."""

    def __init__(self):
        self.moved = []

    def descend(self, name, loss):
        self.moved.append(name)
        return {"actor_loss": torch.zeros(())}

    def track(self, target, source, tau):
        self.moved.append((target, source, float(tau)))


@METHODS
def test_policy_and_targets_move_at_the_last_of_the_updates(name):
    method, nets = algorithms.get(name)(policy_delay=3), Steps()
    assert method.period == 3
    found = [method.move(nets, lambda actor: None, {"tau": torch.tensor(0.5)}, phase) for phase in range(3)]
    assert found[:2] == [{}, {}] and "actor_loss" in found[2]
    assert nets.moved == ["actor", ("actor_target", "actor", 0.5), ("critic_target", "critic", 0.5)]


@METHODS
def test_noise_is_cut_and_the_action_stays_inside(name):
    method = algorithms.get(name)(target_noise=0.25, target_noise_clip=0.5)
    x, noise = torch.tensor([[0.0, 0.0, 0.9, -0.25]]), torch.tensor([[1.0, -4.0, 2.0, -1.0]])
    assert method.smoothed(x, noise).tolist() == [[0.25, -0.5, 1.0, -0.5]]


@METHODS
@pytest.mark.parametrize("wrong", [{"policy_delay": 0}, {"target_noise": -0.1}, {"target_noise_clip": float("nan")}])
def test_wrong_settings_are_refused(name, wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        algorithms.get(name)(**wrong)
