"""The dynamics ensemble against sums done by hand and against networks of torch's own pieces."""

import math

import pytest
import torch
from torch import nn

from ctrlrl.nets.dynamics import DynamicsEnsemble, Prediction, likelihood_loss

OBS, A, E = 3, 2, 4


def make(elites=2, seed=0, hidden=(6, 5)):
    torch.manual_seed(seed)
    ensemble = DynamicsEnsemble(OBS, A, E, hidden, elites)
    with torch.no_grad():
        for parameter in ensemble.parameters():  # no two members, no two dimensions alike
            parameter.add_(0.3 * torch.randn(parameter.shape))
    return ensemble


def scaled(seed=1):
    """An ensemble whose units are not the networks' own, and what they are."""
    ensemble = make()
    g = torch.Generator().manual_seed(seed)
    means = {"input": 5 * torch.randn(OBS + A, generator=g), "target": 3 * torch.randn(OBS + 1, generator=g)}
    stds = {"input": torch.rand(OBS + A, generator=g) + 0.2, "target": 4 * torch.rand(OBS + 1, generator=g) + 0.2}
    for name in means:
        ensemble.scale(name, means[name], stds[name])
    return ensemble, means, stds


def plain(ensemble, member, x):
    """Mean and log-variance of one member at standardised inputs [B, O + A], in torch's own pieces."""
    for layer in ensemble.body:
        silu = isinstance(layer, nn.SiLU)
        x = x * torch.sigmoid(x) if silu else x @ layer.weight[member] + layer.bias[member]
    mean, raw = x[:, : OBS + 1], x[:, OBS + 1 :]
    high, low = ensemble.log_var_max[member], ensemble.log_var_min[member]
    raw = high - torch.log(1 + torch.exp(high - raw))
    return mean, low + torch.log(1 + torch.exp(raw - low))


def rows(n, seed=3):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(n, OBS, generator=g), torch.rand(n, A, generator=g) * 2 - 1


# -- the loss --------------------------------------------------------------------------------------


def test_the_loss_is_twice_the_negative_log_likelihood_without_its_constant():
    mean = torch.tensor([[[0.0, 1.0]], [[2.0, -1.0]]])
    log_var = torch.tensor([[[0.0, math.log(4.0)]], [[math.log(0.25), 0.0]]])
    target = torch.tensor([[[1.0, 3.0]], [[2.5, -1.0]]])
    # member 0: (1/1 + 0 + 4/4 + ln 4) / 2; member 1: (0.25/0.25 - ln 4 + 0 + 0) / 2
    expected = torch.tensor([(2.0 + math.log(4.0)) / 2, (1.0 - math.log(4.0)) / 2])
    torch.testing.assert_close(likelihood_loss(mean, log_var, target), expected)


def test_the_loss_differs_from_torchs_log_density_by_the_constant_alone():
    g = torch.Generator().manual_seed(0)
    mean, log_var, target = (torch.randn(E, 7, OBS + 1, generator=g) for _ in range(3))
    density = torch.distributions.Normal(mean, (0.5 * log_var).exp()).log_prob(target).mean((1, 2))
    torch.testing.assert_close(likelihood_loss(mean, log_var, target), -2 * density - math.log(2 * math.pi))


# -- the networks ----------------------------------------------------------------------------------


def test_every_member_is_a_network_of_its_own():
    ensemble = make()
    x = torch.randn(8, OBS + A, generator=torch.Generator().manual_seed(2))
    mean, log_var = ensemble(x)
    assert mean.shape == log_var.shape == (E, 8, OBS + 1)
    for member in range(E):
        expected = plain(ensemble, member, x)
        torch.testing.assert_close(mean[member], expected[0], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(log_var[member], expected[1], rtol=1e-4, atol=1e-5)
        own = ensemble(x.expand(E, -1, -1).clone().index_fill_(0, torch.tensor([(member + 1) % E]), 0.0))
        torch.testing.assert_close(own[0][member], mean[member])  # another member's inputs are no matter
    gradients = torch.autograd.grad(mean[1].sum() + log_var[1].sum(), list(ensemble.parameters()))
    for gradient in gradients:
        others = gradient[[0, 2, 3]]
        assert (others == 0.0).all() and (gradient[1] != 0.0).any()


def test_log_variances_bend_at_their_bounds_and_begin_as_in_pets():
    ensemble = DynamicsEnsemble(OBS, A, E, (4,), 1)
    assert (ensemble.log_var_min == -10.0).all() and (ensemble.log_var_max == 0.5).all()
    with torch.no_grad():
        for value, near in ((1e4, 0.5), (-1e4, -10.0)):
            ensemble.body[-1].bias[..., OBS + 1 :] = value
            log_var = ensemble(torch.zeros(1, OBS + A))[1]
            torch.testing.assert_close(log_var, torch.full_like(log_var, near), rtol=0, atol=1e-4)
        ensemble.body[-1].weight.zero_()
        ensemble.body[-1].bias[..., OBS + 1 :] = -4.0
        middle = ensemble(torch.zeros(1, OBS + A))[1]
        torch.testing.assert_close(middle, torch.full_like(middle, -4.0), rtol=0, atol=0.02)


# -- units -----------------------------------------------------------------------------------------


def test_predictions_are_in_the_datas_own_units():
    ensemble, means, stds = scaled()
    obs, action = rows(9)
    found = ensemble.predict(obs, action)
    x = (torch.cat([obs, action], 1) - means["input"]) / stds["input"]
    for member in range(E):
        mean, log_var = plain(ensemble, member, x)
        torch.testing.assert_close(found.mean[member], means["target"] + stds["target"] * mean, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(found.std[member], stds["target"] * log_var.exp().sqrt(), rtol=1e-4, atol=1e-5)
    assert not found.mean.requires_grad


def test_targets_are_the_change_of_the_observation_and_the_reward():
    ensemble, means, stds = scaled()
    obs, _ = rows(5)
    following, reward = obs + torch.arange(3.0), torch.arange(5.0)
    found = ensemble.targets(obs, reward, following) * stds["target"] + means["target"]
    torch.testing.assert_close(found[:, :3], torch.arange(3.0).expand(5, 3), rtol=0, atol=1e-4)
    torch.testing.assert_close(found[:, 3], reward, rtol=0, atol=1e-4)


def test_what_never_changes_keeps_deviation_one():
    ensemble = make()
    mean = torch.tensor([0.0, 1000.0, 1000.0, 1e-9], dtype=torch.float64)
    ensemble.scale("target", mean, torch.tensor([0.0, 1e-12, 0.01, 1e-9], dtype=torch.float64))
    torch.testing.assert_close(ensemble.target_std, torch.tensor([1.0, 1.0, 0.01, 1e-9]))
    torch.testing.assert_close(ensemble.target_mean, mean.float())


# -- samples and uncertainty -----------------------------------------------------------------------


def test_a_sample_is_mean_and_deviation_of_the_rows_own_member():
    ensemble, _, _ = scaled()
    obs, action = rows(6)
    member = torch.tensor([3, 0, 1, 1, 2, 3])
    noise = torch.randn(6, OBS + 1, generator=torch.Generator().manual_seed(5))
    following, reward = ensemble.sample(obs, action, member, noise)
    found = ensemble.predict(obs, action)
    for i, k in enumerate(member.tolist()):
        drawn = found.mean[k, i] + found.std[k, i] * noise[i]
        torch.testing.assert_close(following[i], obs[i] + drawn[:OBS])
        torch.testing.assert_close(reward[i], drawn[OBS])


def test_the_uncertainty_is_the_largest_norm_of_a_members_deviations():
    std = torch.tensor([[[3.0, 4.0, 0.0], [0.1, 0.2, 0.2]], [[2.0, 2.0, 1.0], [2.0, 3.0, 6.0]]])
    # norms 5 and 0.3 of the first member, 3 and 7 of the second
    found = Prediction(torch.randn(2, 2, 3), std).uncertainty()
    torch.testing.assert_close(found, torch.tensor([5.0, 7.0]))
    ensemble, _, _ = scaled()
    obs, action = rows(6)
    torch.testing.assert_close(ensemble.uncertainty(obs, action), ensemble.predict(obs, action).uncertainty())


@pytest.mark.parametrize("elites", [1, 3])
def test_elites_are_as_many_as_asked_for_and_part_of_the_state(elites):
    ensemble = make(elites)
    ensemble.elites.copy_(torch.arange(elites) + 1)
    other = make(elites, seed=9)
    other.load_state_dict(ensemble.state_dict())
    assert other.elites.tolist() == [k + 1 for k in range(elites)]
    obs, action = rows(3)
    assert torch.equal(other.predict(obs, action).mean, ensemble.predict(obs, action).mean)
