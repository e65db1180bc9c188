"""Trajectories as channels and back."""

import pytest
import torch

from ctrlrl.nets.trajectory_codec import Steps, TrajectoryCodec


def steps(batch=5, length=4, obs=3, act=2, seed=0):
    g = torch.Generator().manual_seed(seed)
    done = torch.zeros(batch, length)
    done[0, -1] = 1.0
    return Steps(
        torch.randn(batch, length, obs, generator=g) * 4 + 7,
        torch.rand(batch, length, act, generator=g) * 1.8 - 0.9,
        torch.randn(batch, length, generator=g) * 100,
        done,
        torch.randn(batch, length, obs, generator=g),
    )


def fitted(s, length):
    codec = TrajectoryCodec(s.obs.shape[-1], s.action.shape[-1], length)
    raw = codec.raw(s).transpose(1, 2).flatten(0, 1)
    codec.fit(raw.mean(0), raw.std(0, correction=0))
    return codec


@pytest.mark.parametrize("length", [1, 4])
def test_decoding_gives_back_what_was_encoded(length):
    s = steps(length=length)
    codec = fitted(s, length)
    x = codec.encode(s)
    assert x.shape == (5, codec.channels, length)
    back, known = codec.decode(x)
    for name in ("obs", "action", "reward", "done"):
        torch.testing.assert_close(getattr(back, name), getattr(s, name), atol=1e-4, rtol=1e-5)
    if length == 1:
        torch.testing.assert_close(back.next_obs, s.next_obs, atol=1e-4, rtol=1e-5)
        assert known.all()
    else:
        torch.testing.assert_close(back.next_obs[:, :-1], s.obs[:, 1:], atol=1e-4, rtol=1e-5)
        assert known[:, :-1].all() and known[:, -1].tolist() == [True, False, False, False, False]


def test_channels_have_mean_zero_and_deviation_one_and_constant_ones_stay_zero():
    s = steps(batch=50)
    s = s._replace(done=torch.zeros_like(s.done))
    x = fitted(s, 4).encode(s).transpose(1, 2).flatten(0, 1)
    torch.testing.assert_close(x.mean(0), torch.zeros(7), atol=1e-5, rtol=0)
    torch.testing.assert_close(x.std(0, correction=0), torch.tensor([1.0] * 6 + [0.0]), atol=1e-5, rtol=0)


def test_a_channel_that_never_changes_is_given_back_exactly():
    s = steps(batch=50)
    s = s._replace(obs=s.obs.clone().index_fill_(-1, torch.tensor([1]), 0.1))
    codec = TrajectoryCodec(3, 2, 4)
    raw = codec.raw(s).transpose(1, 2).flatten(0, 1)
    codec.fit(raw.mean(0), raw.std(0, correction=0).index_fill_(0, torch.tensor([1]), 0.0))
    x = torch.randn(20, 7, 4, generator=torch.Generator().manual_seed(0), requires_grad=True)
    obs, _, _ = codec.split(x)
    assert obs[..., 1].unique().tolist() == pytest.approx([0.1])
    obs.sum().backward()
    assert x.grad[:, 1].abs().max() == 0 and (x.grad[:, 0] != 0).all()


def test_actions_at_their_bounds_are_finite():
    s = steps()
    s = s._replace(action=torch.sign(s.action))
    codec = fitted(s, 4)
    assert codec.encode(s).isfinite().all()
    torch.testing.assert_close(codec.decode(codec.encode(s))[0].action.abs(), torch.full((5, 4, 2), 0.999))


def test_the_gradient_of_an_action_passes_through_tanh_and_deviation():
    codec = TrajectoryCodec(1, 1, 2)
    codec.fit(torch.tensor([0.0, 0.3, 0.0, 0.0]), torch.tensor([1.0, 2.0, 1.0, 1.0]))
    x = torch.tensor([[[0.0, 0.0], [0.5, -0.2], [0.0, 0.0], [0.0, 0.0]]], requires_grad=True)
    codec.split(x)[1].sum().backward()
    expected = 2.0 * (1 - torch.tanh(2.0 * torch.tensor([0.5, -0.2]) + 0.3).square())
    torch.testing.assert_close(x.grad[0, 1], expected)
    assert x.grad[0, [0, 2, 3]].abs().max() == 0
