"""Critics side by side: each is a network of its own."""

import math

import gymnasium as gym
import numpy as np
import pytest
import torch
from helpers.off_policy import plain

from ctrlrl.nets.actors import QNetworkConfig
from ctrlrl.nets.q_ensemble import EnsembleLinear, QEnsemble

OBS = gym.spaces.Box(-np.inf, np.inf, (3,), np.float32)
SMALL = QNetworkConfig(critic_hidden=(16, 8), image_features=8, n_critics=3)


def batch(n=11):
    g = torch.Generator().manual_seed(0)
    return torch.randn(n, 3, generator=g), torch.randn(n, 2, generator=g)


def test_every_member_is_a_network_of_its_own():
    obs, action = batch()
    ensemble = QEnsemble(OBS, 2, SMALL)
    alone = [plain(ensemble.body, k) for k in range(3)]  # before anything could be shared between them
    found = ensemble(obs, action)
    assert found.shape == (3, 11)
    for k in range(3):
        expected = alone[k](torch.cat([obs, action], 1))[:, 0]
        torch.testing.assert_close(found[k], expected, rtol=1e-5, atol=1e-6)
    assert not torch.allclose(found[0], found[1]) and not torch.allclose(found[1], found[2])


def test_some_of_the_members_may_be_asked_alone():
    obs, action = batch()
    ensemble = QEnsemble(OBS, 2, SMALL)
    whole = ensemble(obs, action)
    for count in (1, 2):
        torch.testing.assert_close(ensemble(obs, action, members=count), whole[:count])


def test_a_members_values_move_that_member_alone():
    obs, action = batch()
    ensemble = QEnsemble(OBS, 2, SMALL)
    parameters = list(ensemble.body.parameters())
    for gradient in torch.autograd.grad(ensemble(obs, action)[1].sum(), parameters):
        assert gradient[1].abs().sum() > 0 and (gradient[[0, 2]] == 0).all()


def test_members_start_uniformly_as_torchs_layers_do():
    layer = EnsembleLinear(2, 400, 100)
    for parameter in (layer.weight, layer.bias):
        assert parameter.abs().max() <= 1 / math.sqrt(400) and parameter.abs().max() > 0.9 / math.sqrt(400)
    assert layer.weight.std().item() == pytest.approx(1 / math.sqrt(3 * 400), rel=0.02)
    assert layer.weight.mean().abs() < 1e-3 and not torch.equal(layer.weight[0], layer.weight[1])


def test_inputs_may_be_shared_or_each_members_own():
    layer = EnsembleLinear(2, 4, 3)
    x = torch.randn(2, 5, 4)
    each = torch.stack([x[k] @ layer.weight[k] + layer.bias[k] for k in range(2)])
    torch.testing.assert_close(layer(x), each)
    torch.testing.assert_close(layer(x[0])[1], x[0] @ layer.weight[1] + layer.bias[1])


def test_state_values_several_outputs_and_deeper_heads():
    obs, action = batch()
    assert QEnsemble(OBS, 0, SMALL, members=1)(obs).shape == (1, 11)
    assert QEnsemble(OBS, 2, SMALL, outputs=4)(obs, action).shape == (3, 11, 4)
    # further inputs are joined in order: an action and parameters of the environment
    deep = QEnsemble(OBS, 3, SMALL, extra_layers=1)
    assert deep(obs, action, obs[:, :1]).shape == (3, 11)
    widths = [tuple(layer.weight.shape[1:]) for layer in deep.body if isinstance(layer, EnsembleLinear)]
    assert widths == [(6, 16), (16, 8), (8, 8), (8, 1)]


def test_images_go_through_convolutions_before_the_members():
    space = gym.spaces.Dict({"image": gym.spaces.Box(0, 255, (8, 8, 3), np.uint8), "vector": OBS})
    ensemble = QEnsemble(space, 2, SMALL)
    obs = {"image": torch.randint(0, 256, (4, 8, 8, 3), dtype=torch.uint8), "vector": torch.randn(4, 3)}
    value = ensemble(obs, torch.randn(4, 2))
    assert value.shape == (3, 4)
    other = ensemble({**obs, "image": 255 - obs["image"]}, torch.randn(4, 2))
    assert not torch.allclose(value, other)
