"""Action distributions against torch.distributions, and actions against their spaces."""

import gymnasium as gym
import numpy as np
import pytest
import torch
from helpers.policies import gen
from torch import distributions as td

from ctrlrl.nets.heads import Categorical, DiagonalGaussian, MultiCategorical, action_head

NVEC = (2, 3, 4)


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=gen(seed), dtype=torch.float64)


def gaussian(seed):
    mean, log_std = randn(5, 3, seed=seed), 0.5 * randn(5, 3, seed=seed + 1)
    return DiagonalGaussian(mean, log_std), td.Independent(td.Normal(mean, log_std.exp()), 1), randn(5, 3, seed=99)


def categorical(seed):
    logits = 2.0 * randn(5, 4, seed=seed)
    return Categorical(logits), td.Categorical(logits=logits), torch.tensor([0, 3, 1, 2, 3])


class Blocks:
    """MultiCategorical in torch.distributions: one object per block."""

    def __init__(self, logits):
        self.parts = [td.Categorical(logits=part) for part in logits.split(list(NVEC), -1)]

    def log_prob(self, action):
        return sum(p.log_prob(a) for p, a in zip(self.parts, action.unbind(-1), strict=True))

    def entropy(self):
        return sum(p.entropy() for p in self.parts)


def multi(seed):
    logits = 2.0 * randn(5, sum(NVEC), seed=seed)
    action = torch.stack([torch.randint(n, (5,), generator=gen(n)) for n in NVEC], -1)
    return MultiCategorical(logits, NVEC), Blocks(logits), action


def kl(p, q):
    if isinstance(p, Blocks):
        return sum(td.kl_divergence(a, b) for a, b in zip(p.parts, q.parts, strict=True))
    return td.kl_divergence(p, q)


KINDS = pytest.mark.parametrize("build", [gaussian, categorical, multi], ids=["gaussian", "categorical", "multi"])


@KINDS
def test_log_prob_and_entropy_agree_with_torch(build):
    ours, theirs, action = build(0)
    torch.testing.assert_close(ours.log_prob(action), theirs.log_prob(action), atol=1e-12, rtol=0)
    torch.testing.assert_close(ours.entropy(), theirs.entropy(), atol=1e-12, rtol=0)


@KINDS
def test_kl_is_from_self_to_the_other(build):
    (p, p_torch, _), (q, q_torch, _) = build(0), build(7)
    torch.testing.assert_close(p.kl(q.params()), kl(p_torch, q_torch), atol=1e-12, rtol=0)
    torch.testing.assert_close(q.kl(p.params()), kl(q_torch, p_torch), atol=1e-12, rtol=0)
    # the two directions differ here, so a swap cannot pass
    assert ((kl(p_torch, q_torch) - kl(q_torch, p_torch)).abs() > 1e-3).any()
    assert p.kl(p.params()).abs().max() < 1e-14


@KINDS
def test_params_rebuild_the_distribution_and_the_mode_is_the_most_probable(build):
    ours, _, action = build(0)
    params = ours.params()
    again = {
        DiagonalGaussian: lambda: DiagonalGaussian(**params),
        Categorical: lambda: Categorical(params["logits"]),
        MultiCategorical: lambda: MultiCategorical(params["logits"], NVEC),
    }[type(ours)]()
    torch.testing.assert_close(again.log_prob(action), ours.log_prob(action), atol=1e-14, rtol=0)
    assert (ours.log_prob(ours.mode()) >= ours.log_prob(action)).all()


def test_gumbel_noise_samples_with_the_stated_frequencies():
    logits = torch.tensor([1.0, -1.0, 0.3, -2.0, 2.0])
    head = action_head(2, gym.spaces.Discrete(5), 0.0, "clip")
    n = 200_000
    drawn = Categorical(logits.expand(n, 5)).sample(head.noise((n,), gen(1)))
    found = torch.bincount(drawn, minlength=5) / n
    p = logits.softmax(-1)
    # five standard errors
    assert ((found - p).abs() < 5 * (p * (1 - p) / n).sqrt()).all()


def test_multi_gumbel_samples_blocks_independently_with_the_stated_frequencies():
    head = action_head(2, gym.spaces.MultiDiscrete([2, 3]), 0.0, "clip")
    n, logits = 100_000, torch.tensor([0.5, -0.5, 1.0, 0.0, -1.0])
    drawn = MultiCategorical(logits.expand(n, 5), (2, 3)).sample(head.noise((n,), gen(1)))
    found = torch.bincount(drawn[:, 0] * 3 + drawn[:, 1], minlength=6).view(2, 3) / n
    p = torch.outer(logits[:2].softmax(-1), logits[2:].softmax(-1))
    assert ((found - p).abs() < 5 * (p * (1 - p) / n).sqrt()).all()


def test_gaussian_noise_has_the_stated_moments():
    head = action_head(2, gym.spaces.Box(-np.inf, np.inf, (2,), np.float32), 0.7, "clip")
    n = 200_000
    dist = head(torch.zeros(n, 2))
    drawn = dist.sample(head.noise((n,), gen(1)))
    torch.testing.assert_close(drawn.mean(0), head.linear.bias.detach(), atol=0.03, rtol=0)
    torch.testing.assert_close(drawn.std(0), torch.full((2,), 0.7).exp(), atol=0.03, rtol=0)


def test_noise_depends_on_the_generator_alone():
    for space in (gym.spaces.Discrete(3), gym.spaces.MultiDiscrete([2, 3]), gym.spaces.Box(-1, 1, (2,))):
        head = action_head(4, space, 0.0, "clip")
        torch.testing.assert_close(head.noise((4, 2), gen(3)), head.noise((4, 2), gen(3)), atol=0, rtol=0)
        assert not torch.equal(head.noise((4, 2), gen(3)), head.noise((4, 2), gen(4)))
        assert head.noise((50_000, 2), gen(3)).isfinite().all()


ODD_BOUNDS = [(-0.1, 0.1), (-1.7, 0.3), (0.7, 0.9), (-2.0, 2.0), (-1 / 3, 1e-3), (100.1, 100.3)]


@pytest.mark.parametrize("action_map", ["clip", "tanh"])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("low,high", ODD_BOUNDS)
def test_box_actions_stay_inside_the_space_in_its_own_precision(action_map, dtype, low, high):
    """Not one unit in the last place beyond: environments that assert ``action_space.contains`` would stop."""
    space = gym.spaces.Box(low, high, (1,), dtype)
    head = action_head(2, space, 0.0, action_map)
    raw = torch.cat([torch.linspace(-25, 25, 2001), torch.tensor([-1e30, 1e30, -100.0, 100.0])]).unsqueeze(-1)
    out = head.to_env(raw).numpy().astype(dtype)
    assert (out >= space.low).all() and (out <= space.high).all()
    assert out.min() == pytest.approx(low, rel=1e-5, abs=1e-6) and out.max() == pytest.approx(high, rel=1e-5, abs=1e-6)


def test_tanh_maps_zero_to_the_middle_and_rises_everywhere():
    head = action_head(2, gym.spaces.Box(np.array([-1.0, 2.0]), np.array([3.0, 10.0]), dtype=np.float64), 0.0, "tanh")
    torch.testing.assert_close(head.to_env(torch.zeros(1, 2)), torch.tensor([[1.0, 6.0]]))
    raw = torch.linspace(-4, 4, 101).unsqueeze(-1).expand(-1, 2)
    assert (head.to_env(raw).diff(dim=0) > 0).all()


def test_tanh_needs_finite_bounds_and_says_what_to_use():
    space = gym.spaces.Box(np.array([-1.0, -np.inf]), np.array([1.0, np.inf]), dtype=np.float64)
    with pytest.raises(ValueError, match=r"finite bounds.*action_map='clip'"):
        action_head(2, space, 0.0, "tanh")


def test_half_bounded_boxes_are_cut_on_the_finite_side_only():
    space = gym.spaces.Box(np.float32([-1.0, -np.inf]), np.float32([np.inf, 2.0]), dtype=np.float32)
    out = action_head(2, space, 0.0, "clip").to_env(torch.tensor([[-5.0, -50.0], [50.0, 5.0]]))
    torch.testing.assert_close(out, torch.tensor([[-1.0, -50.0], [50.0, 2.0]]))


@pytest.mark.parametrize(
    "space",
    [
        gym.spaces.Box(-1, 1, (2, 3), np.float32),
        gym.spaces.Box(-1, 1, (1,), np.float64),
        gym.spaces.Discrete(3, start=-4),
        gym.spaces.MultiDiscrete([2, 3], start=[5, -1]),
        gym.spaces.MultiDiscrete([[2, 3], [4, 2]]),
    ],
    ids=str,
)
def test_every_sampled_and_modal_action_is_in_the_space(space):
    head = action_head(4, space, 1.0, "clip").requires_grad_(False)
    dist = head(randn(200, 4).float() * 3)
    sampled = dist.sample(head.noise((200,), gen(1)))
    assert sampled.shape == (200, *head.action_shape) and sampled.dtype == head.action_dtype
    assert dist.log_prob(sampled).shape == dist.entropy().shape == (200,)
    for action in (*head.to_env(sampled), *head.to_env(dist.mode())):
        assert space.contains(action.numpy().astype(space.dtype)) or space.contains(space.dtype.type(action.numpy()))


def test_all_choices_of_a_shifted_discrete_space_are_reached():
    space = gym.spaces.Discrete(3, start=5)
    head = action_head(4, space, 0.0, "clip")
    drawn = head.to_env(Categorical(torch.zeros(500, 3)).sample(head.noise((500,), gen(0))))
    assert set(drawn.tolist()) == {5, 6, 7}


def test_spaces_without_a_density_are_refused_with_advice():
    for space in (gym.spaces.MultiBinary(3), gym.spaces.Tuple([gym.spaces.Discrete(2)]), gym.spaces.Dict({})):
        with pytest.raises(TypeError, match=r"not supported; expected Box, Discrete or MultiDiscrete"):
            action_head(4, space, 0.0, "clip")
