"""The flow policy: chains and their densities, the marginals of the SDE, and the matching loss as a likelihood."""

import math

import gymnasium as gym
import numpy as np
import pytest
import torch
from helpers.policies import gen

from ctrlrl.engine.collector import Collector
from ctrlrl.nets.actor_critic import NetworkConfig
from ctrlrl.nets.flow_policy import FlowPolicy, Matching
from ctrlrl.types import Distribution, EnvSpec

BOX = gym.spaces.Box(-np.inf, np.inf, (3,), np.float32)
ACT = gym.spaces.Box(-1.0, 1.0, (2,), np.float32)
OBS = {
    "vector": (BOX, lambda n: torch.randn(n, 3, generator=gen(1))),
    "choice": (gym.spaces.Discrete(4, start=3), lambda n: 3 + torch.arange(n) % 4),
    "dict": (
        gym.spaces.Dict({"image": gym.spaces.Box(0, 255, (3, 8, 8), np.uint8), "x": BOX}),
        lambda n: {
            "image": torch.randint(256, (n, 3, 8, 8), generator=gen(2), dtype=torch.uint8),
            "x": torch.randn(n, 3, generator=gen(3)),
        },
    ),
}
SMALL = NetworkConfig(actor_hidden=(8,), critic_hidden=(6,), image_features=5)


def build(obs=BOX, action=ACT, config=SMALL, kind=FlowPolicy, **settings):
    torch.manual_seed(0)
    return kind(obs, action, config, **{"denoising_steps": 4} | settings)


def asked(policy, obs, chain):
    """The rows that a policy's forward sees, from observations [R, ...] and chains [R, K + 1, D]."""
    inputs = {f"obs/{k}": v for k, v in obs.items()} if isinstance(obs, dict) else {"obs": obs}
    return {**inputs, "x": chain[:, :-1], "time": policy.times.repeat(len(chain), 1)}, chain[:, 1:]


@pytest.mark.parametrize("name", OBS)
def test_shapes_for_every_kind_of_observation(name):
    space, draw = OBS[name]
    policy, obs = build(space, critics=("value", "other")), draw(6)
    noise = policy.noise(3, 6, gen())
    assert noise.shape == (3, 6, 5, 2) and policy.action_shape == (5, 2) and policy.action_dtype == torch.float32
    with torch.inference_mode():
        chain, sent = policy.sampler()(obs, noise[0])
        assert torch.equal(chain, policy.act(obs, noise[0])) and torch.equal(chain[:, 0], noise[0, :, 0])
        assert torch.equal(sent, chain[:, -1].clamp(-1.0, 1.0)) and sent.shape == (6, 2)
    out = policy(*asked(policy, obs, chain.clone()))
    assert out.logp.shape == out.entropy.shape == out.values["other"].shape == (6, 4)
    assert isinstance(out.dist, Distribution) and out.dist.params()["mean"].shape == (6, 4, 2)
    # critics see the environment's observation: the same at every denoising step
    values = policy.values(obs)["value"]
    torch.testing.assert_close(out.values["value"], values.unsqueeze(1).expand(6, 4))
    assert policy.deterministic(obs).shape == (6, 2)


def test_the_density_is_that_of_the_noise_that_was_drawn():
    policy, obs = build(), OBS["vector"][1](5)
    noise = policy.noise(1, 5, gen())[0]
    out = policy(*asked(policy, obs, policy.act(obs, noise)))
    s = out.dist.params()["log_std"].exp()
    # a = 0.7, K = 4: sigma^2 = 0.49 t / (1 - t), with 1 - t = 1/4 in place of 0 at the start, and s^2 = sigma^2 / 4
    expected = [0.7 * math.sqrt(r / 4) for r in (1 / 0.25, 0.75 / 0.25, 0.5 / 0.5, 0.25 / 0.75)]
    torch.testing.assert_close(s[0, :, 0], torch.tensor(expected))
    z = noise[:, 1:]
    logp = (-0.5 * z.square() - s.log() - 0.5 * math.log(2 * math.pi)).sum(-1)
    torch.testing.assert_close(out.logp, logp, atol=2e-5, rtol=1e-5)
    torch.testing.assert_close(out.entropy[0], 2 * (s[0, :, 0].log() + 0.5 * math.log(2 * math.pi * math.e)))
    averaged = build(logp_reduce="mean")
    averaged.load_state_dict(policy.state_dict())
    torch.testing.assert_close(averaged(*asked(policy, obs, policy.act(obs, noise))).logp, out.logp / 2)


def test_the_ratio_is_exactly_one_at_the_old_parameters_and_every_parameter_learns():
    policy, obs = build(), OBS["vector"][1](5)
    rows = asked(policy, obs, policy.act(obs, policy.noise(1, 5, gen())[0]).detach())
    old = policy(*rows).logp.detach()
    out = policy(*rows)
    assert torch.equal((out.logp - old).exp(), torch.ones(5, 4))
    (out.logp.sum() + out.values["value"].sum()).backward()
    gradients = {n: p.grad for n, p in policy.named_parameters()}
    assert all(g is not None and g.abs().sum() > 0 for g in gradients.values())
    assert {n.split(".")[0] for n in gradients} == {"actor", "head", "critics"}
    assert "head.log_std" not in gradients


def test_a_permutation_of_the_rows_permutes_the_answers():
    policy, obs = build(), OBS["vector"][1](5)
    inputs, action = asked(policy, obs, policy.act(obs, policy.noise(1, 5, gen())[0]))
    order = torch.tensor([3, 1, 4, 0, 2])
    moved = policy({k: v[order] for k, v in inputs.items()}, action[order])
    out = policy(inputs, action)
    torch.testing.assert_close(moved.logp, out.logp[order])
    torch.testing.assert_close(moved.values["value"], out.values["value"][order])


# -- the flow -------------------------------------------------------------------------------------

MEAN, STD = 0.8, 0.3


class GaussianFlow(FlowPolicy):
    """The exact velocity of x0 ~ N(MEAN, STD^2): E[eps - x0 | x_t]."""

    def velocity(self, features, x, time):
        t = time.unsqueeze(-1)
        slope = (t - (1 - t) * STD**2) / ((1 - t) ** 2 * STD**2 + t**2)
        return -MEAN + slope * (x - (1 - t) * MEAN)


def moments(steps, noise=0.7):
    """Mean and deviation of x0 of the chain, exactly: every step is affine in x."""
    policy = build(action=gym.spaces.Box(-9, 9, (1,)), kind=GaussianFlow, denoising_steps=steps, flow_noise=noise)
    mean, variance = torch.zeros(1, dtype=torch.float64), torch.ones(1, dtype=torch.float64)
    for time in policy.times.double():
        step = lambda x, t=time: policy.transition(policy.velocity(None, x, t), x, t)  # noqa: E731
        slope = step(torch.ones(1).double()).mean - step(torch.zeros(1).double()).mean
        after = step(mean)
        mean, variance = after.mean, slope**2 * variance + (2 * after.log_std).exp()
    return mean.item(), variance.sqrt().item()


@pytest.mark.parametrize("noise", [0.0, 0.7])
def test_the_chain_reproduces_a_gaussian_target(noise):
    """With the exact velocity the only error is that of the step length, and it vanishes with it."""
    found = [moments(k, noise) for k in (25, 100, 400)]
    errors = [abs(mean - MEAN) + abs(std - STD) for mean, std in found]
    assert errors[2] < 0.005
    assert errors[1] < 0.5 * errors[0] and errors[2] < 0.5 * errors[1]


def test_sampled_chains_have_the_marginals_of_the_flow():
    policy = build(action=gym.spaces.Box(-9, 9, (1,)), kind=GaussianFlow, denoising_steps=128)
    chain = policy.act(torch.zeros(20_000, 3), policy.noise(1, 20_000, gen())[0])[..., 0]
    for k in (32, 64, 96, 128):
        t = 1.0 - k / 128
        expected = (1 - t) * MEAN, math.sqrt((1 - t) ** 2 * STD**2 + t**2)
        assert abs(chain[:, k].mean() - expected[0]) < 0.02
        assert abs(chain[:, k].std() - expected[1]) < 0.02


def test_the_deterministic_action_is_where_zero_noise_flows():
    policy = build(action=gym.spaces.Box(-9, 9, (1,)), kind=GaussianFlow)
    # on the path of zero noise the velocity is constant, so even four steps are exact
    torch.testing.assert_close(policy.deterministic(torch.zeros(2, 3)), torch.full((2, 1), MEAN))


def test_without_noise_the_steps_are_those_of_the_ode_and_have_no_density():
    policy, obs = build(flow_noise=0.0), OBS["vector"][1](5)
    noise = policy.noise(1, 5, gen())[0]
    noise[:, 0] = 0.0
    chain = policy.act(obs, noise)
    torch.testing.assert_close(policy.to_env(obs, chain), policy.deterministic(obs))
    out = policy(*asked(policy, obs, chain))
    assert (out.logp == 0).all() and (out.entropy == 0).all() and torch.isneginf(out.dist.params()["log_std"]).all()


def test_one_step_is_allowed():
    policy, obs = build(denoising_steps=1), OBS["vector"][1](5)
    out = policy(*asked(policy, obs, policy.act(obs, policy.noise(1, 5, gen())[0])))
    torch.testing.assert_close(out.dist.params()["log_std"].exp(), torch.full((5, 1, 2), 0.7))
    assert out.logp.isfinite().all()


def test_the_gain_is_the_derivative_of_the_mean_by_the_velocity():
    policy = build()
    time = policy.times.clone()
    velocity = torch.zeros(4, 1, requires_grad=True)
    policy.transition(velocity, torch.ones(4, 1), time).mean.sum().backward()
    torch.testing.assert_close(-velocity.grad[:, 0], policy.velocity_gain(time))
    # h (1 + a^2 / 2) wherever the schedule is not guarded, h where it is
    torch.testing.assert_close(policy.velocity_gain(time), torch.tensor([1.0, 1.245, 1.245, 1.245]) / 4)


@pytest.mark.parametrize("action_map", ["clip", "tanh"])
def test_actions_meet_the_bounds_as_those_of_the_gaussian_head(action_map):
    space = gym.spaces.Box(np.array([[-1, 0.1]]), np.array([[1, 0.3]]), dtype=np.float64)
    policy = build(action=space, config=NetworkConfig(actor_hidden=(8,), action_map=action_map))
    chain = torch.zeros(3, 5, 2)
    chain[:, -1] = torch.tensor([[50.0, 50.0], [-50.0, -50.0], [0.0, 0.2]])
    sent = policy.to_env(None, chain)
    assert sent.shape == (3, 1, 2) and all(a in space for a in sent.numpy().astype(np.float64))
    torch.testing.assert_close(sent[2, 0], torch.tensor([0.0, 0.2 if action_map == "clip" else 0.1 + 0.2 * 0.598688]))


def test_the_collector_stores_chains():
    policy = build(action=gym.spaces.Box(-2.0, 2.0, (1,), np.float32))
    collector = Collector(EnvSpec("Pendulum-v1", n_envs=2), policy, 5)
    collected = collector.collect(gen())
    collector.close()
    assert collected.action.shape == (5, 2, 5, 1)
    torch.testing.assert_close(
        collected.action[2], policy.act(collected.obs[2], policy.noise(5, 2, gen())[2]).detach(), atol=1e-6, rtol=1e-5
    )
    policy.update_normalizer(collected.obs, collected.valid_t)
    assert policy.preprocess.normalizer.moments.count == 10


# -- matching -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("weight", "expected", "slope"),
    [
        ("uniform", -2.25, -3.0),
        ("time", -0.675, -0.9),
        ("time_squared", -0.2025, -0.27),
        ("huber", -0.449997, -0.3),
        ("ghuber", -1.4659, -0.3 * 2.25**-0.75 * 3.0),
    ],
)
def test_golden_matching_likelihood(weight, expected, slope):
    """v = 0, x0 = 2, eps = 0.5, t = 0.3: the target is -1.5 and the squared error 2.25."""
    v = torch.zeros(1, 1, dtype=torch.float64, requires_grad=True)
    dist = Matching(v, torch.tensor([0.3], dtype=torch.float64), weight)
    logp = dist.log_prob(torch.tensor([[0.5 - 2.0]], dtype=torch.float64))
    logp.sum().backward()
    assert logp.item() == pytest.approx(expected, abs=1e-4)
    assert v.grad.item() == pytest.approx(slope, abs=1e-6)


def test_matching_is_a_distribution_over_dimensions_by_their_mean():
    v, time = torch.tensor([[[1.0, 3.0]]]), torch.tensor([[0.5]])
    dist = Matching(v, time)
    assert isinstance(dist, Distribution)
    assert dist.log_prob(torch.zeros(1, 1, 2)).item() == -5.0 and dist.kl({"mean": torch.zeros(1, 1, 2)}).item() == 5.0
    assert torch.equal(dist.params()["mean"], v) and torch.equal(dist.mode(), dist.sample(torch.ones(1, 1, 2)))
    assert dist.entropy().item() == 0.0


@pytest.mark.parametrize("weight", ["uniform", "huber", "ghuber"])
def test_a_perfect_velocity_has_a_finite_gradient(weight):
    v = torch.zeros(1, 2, requires_grad=True)
    logp = Matching(v, torch.tensor([0.3]), weight).log_prob(torch.zeros(1, 2))
    logp.sum().backward()
    assert logp.item() == 0.0 and v.grad.isfinite().all()


def test_the_same_time_and_noise_make_the_matching_ratio_exactly_one():
    policy, obs = build(likelihood="matching", matching_weight="ghuber"), OBS["vector"][1](5)
    x0 = torch.randn(5, 1, 2, generator=gen())

    def rows(seed):
        g = gen(seed)
        t, eps = torch.rand(5, 6, generator=g), torch.randn(5, 6, 2, generator=g)
        return {"obs": obs, "x": x0 + t.unsqueeze(-1) * (eps - x0), "time": t}, eps - x0

    old = policy(*rows(1)).logp
    assert torch.equal((policy(*rows(1)).logp - old).exp(), torch.ones(5, 6))
    assert not torch.allclose(policy(*rows(2)).logp, old)


# -- what is refused ------------------------------------------------------------------------------


@pytest.mark.parametrize("space", [gym.spaces.Discrete(3), gym.spaces.Box(0, 5, (2,), np.int64)])
def test_only_boxes_of_floats(space):
    with pytest.raises(TypeError, match="Box of floats"):
        build(action=space)


@pytest.mark.parametrize(
    "settings",
    [
        {"denoising_steps": 0}, {"flow_noise": -0.1}, {"logp_reduce": "max"}, {"likelihood": "other"},
        {"matching_weight": "cubic"}, {"matching_power": 0.0}, {"matching_times": 0},
    ],
)  # fmt: skip
def test_settings_are_checked(settings):
    with pytest.raises(ValueError, match=next(iter(settings))):
        build(**settings)


def test_there_is_no_density_of_the_whole_action():
    with pytest.raises(TypeError, match="denoising steps"):
        build().distribution(torch.zeros(1, 3))
