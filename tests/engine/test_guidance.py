"""Guidance: on a system where the denoiser and the tilted distribution are known exactly, and by finite differences."""

import itertools
import math

import gymnasium as gym
import numpy as np
import pytest
import torch
from helpers.linear_gaussian import K, LinearCodec, LinearGaussian
from torch.distributions import Independent, Normal, TransformedDistribution
from torch.distributions.transforms import TanhTransform

from ctrlrl.engine.guidance import Guidance, GuidanceConfig, log_prob_of, rescaled_kappa
from ctrlrl.engine.policy_density import NoDensityError
from ctrlrl.nets.actor_critic import ActorCritic, NetworkConfig
from ctrlrl.nets.actors import DeterministicActor, GaussianActor, QNetworkConfig, SquashedGaussianActor
from ctrlrl.nets.decoders import DecoderConfig
from ctrlrl.nets.edm import SamplerConfig, sample
from ctrlrl.nets.latent_policy import LatentPolicy
from ctrlrl.nets.trajectory_codec import TrajectoryCodec

STRENGTHS = (0.1, 0.3, 1.0)
TARGETS = {"offset": (K, 0.6), "softer": (0.4 * K, 0.0), "aggressive": (2.0 * K, 0.0)}
"""Gain and offset of target policies; the data's has gain K, and all have its deviation."""


@pytest.fixture(scope="module")
def system():
    return LinearGaussian()


def drawn(system, target=None, steps=64, n=300, **settings):
    sampler, guide = SamplerConfig(sampler_steps=steps), None
    if target is not None:
        log_prob, config = system.policy(*TARGETS[target]), GuidanceConfig(**settings)
        guide = Guidance(log_prob, LinearCodec(system), system.denoise, config, sampler)
    return sample(system.denoise, system.start(n, 0), sampler, torch.Generator().manual_seed(1), guide)


def likelihood(system, target, x):
    return system.log_policy(x, *TARGETS[target])


@pytest.fixture(scope="module")
def unguided(system):
    return drawn(system)


# -- check P2 of the method's notes ---------------------------------------------------------------


@pytest.mark.parametrize("target", ["offset", "softer"])
def test_a_policys_actions_become_more_likely_with_kappa(system, unguided, target):
    found = [likelihood(system, target, unguided)]
    found += [likelihood(system, target, drawn(system, target, kappa=kappa)) for kappa in STRENGTHS]
    assert all(after > before + 0.1 for before, after in itertools.pairwise(found)), found


def test_of_a_more_aggressive_policy_they_become_less_likely_unless_observations_are_pushed_too(system, unguided):
    """Actions pushed away from zero make the model infer states that call for still larger ones."""
    found = {
        wrt: [likelihood(system, "aggressive", drawn(system, "aggressive", kappa=k, grad_wrt=wrt)) for k in STRENGTHS]
        for wrt in ("action", "both")
    }
    start = likelihood(system, "aggressive", unguided)
    assert start > found["action"][0] > found["action"][1] > found["action"][2] + 1.0, found
    assert start + 0.2 < found["both"][0] < found["both"][1] < found["both"][2] and found["both"][2] > -0.5, found


@pytest.mark.parametrize("form", ["heuristic", "posterior"])
def test_kappa_zero_is_unguided_bit_for_bit(system, form):
    settings = {"guidance": form, "kappa": 0.0}
    assert drawn(system, "offset", steps=16, n=20, **settings).equal(drawn(system, steps=16, n=20))
    assert not drawn(system, "offset", steps=16, n=20, **settings | {"kappa": 0.1}).equal(drawn(system, steps=16, n=20))


def test_guided_trajectories_still_obey_the_dynamics(system):
    """Pushes leave the data's subspace, and the exact denoiser leads back."""
    assert system.residual(drawn(system, "offset", n=50, kappa=1.0)) < 1e-12


def test_the_denoised_base_point_guides_better_than_the_noisy_one(system):
    noisy, denoised = (drawn(system, "softer", kappa=0.3, denoised=d) for d in (False, True))
    assert likelihood(system, "softer", denoised) > likelihood(system, "softer", noisy) + 0.02


def test_a_rescaled_kappa_pushes_alike_at_another_number_of_steps(system, unguided):
    """Item 2 of 2.5: without the rule four times the steps push about four times as far."""
    few = likelihood(system, "offset", drawn(system, "offset", steps=32, kappa=0.4))
    settings = {"steps": 128, "n": 150, "kappa": 0.4}
    carried = likelihood(system, "offset", drawn(system, "offset", kappa_at=(32, 32, 1), **settings))
    as_it_is = likelihood(system, "offset", drawn(system, "offset", **settings))
    assert few - likelihood(system, "offset", unguided) > 0.25
    assert abs(carried - few) < 0.1 < 0.4 < as_it_is - few, (few, carried, as_it_is)


def test_rescaling_follows_the_rule():
    """kappa (N0 / N) sqrt(T A / (T0 A0)): 0.2 * (64 / 128) * sqrt(128 * 2 / (32 * 2)) = 0.2."""
    assert rescaled_kappa(0.2, from_=(64, 32, 2), to=(128, 128, 2)) == pytest.approx(0.2)
    assert rescaled_kappa(1.0, from_=(256, 32, 6), to=(32, 16, 3)) == pytest.approx(4.0)


@pytest.mark.parametrize(
    "settings, channels",
    [({}, 2), ({"grad_wrt": "both"}, 5), ({"grad_wrt": "both", "guidance": "posterior"}, 7)],
)
def test_rescaling_counts_the_channels_that_are_guided(settings, channels):
    config = GuidanceConfig(kappa=3.0, kappa_at=(10, 4, channels), **settings)
    guide = Guidance(log_prob, codec(), denoise, config, SamplerConfig(sampler_steps=20))
    assert guide.kappa == pytest.approx(3.0 * 0.5)


# -- the posterior form against the exact tilt ---------------------------------------------------


def distribution(system, steps, log_prob=None, sigma_max=80.0, **settings):
    """Mean and covariance of what is sampled: exact, for without churn it is an affine map of the noise."""
    sampler = SamplerConfig(sampler_steps=steps, s_churn=0.0, sigma_max=sigma_max)
    guide = None
    if log_prob is not None:
        config = GuidanceConfig(guidance="posterior", grad_wrt="both", normalize=False, **settings)
        guide = Guidance(log_prob, LinearCodec(system), system.denoise, config, sampler)
    size = 3 * system.steps
    start = torch.cat([torch.zeros(1, size), torch.eye(size)]).double().view(-1, system.steps, 3).transpose(1, 2)
    x = sample(system.denoise, start, sampler, torch.Generator(), guide).transpose(1, 2).flatten(1)
    return x[0], (x[1:] - x[0]).T @ (x[1:] - x[0])


def test_the_posterior_form_is_exact_for_a_linear_log_density():
    """exp(l c'x) shifts a normal by l S c and leaves S; the error is that of first-order steps, so it halves with them.

    This pins the factor sigma_i (sigma_i - sigma_{i+1}). Levels start high, for the sampler starts unshifted.
    """
    system = LinearGaussian(steps=12)
    slope = torch.tensor([0.02, -0.03, 0.1], dtype=torch.float64)

    def linear(state, action):
        return state @ slope[:2] + action[:, 0] * slope[2]

    expected = system.covariance @ (0.7 * slope * system.scale).repeat(12)
    errors = []
    for steps in (64, 128):
        mean, covariance = distribution(system, steps, linear, sigma_max=2000.0, kappa=0.7)
        torch.testing.assert_close(covariance, system.covariance, atol=0.02, rtol=0.02)
        errors.append(float((mean - expected).norm() / expected.norm()))
    assert errors[1] < 0.06 and 0.4 < errors[1] / errors[0] < 0.65, errors


@pytest.mark.parametrize("target", TARGETS)
def test_the_posterior_form_comes_close_to_the_exact_tilt(system, target):
    """Of a tilt by the power 1/4. It overshoots: DPS takes the data as known while they still are not."""
    gain, offset = TARGETS[target]
    mean, covariance = system.tilted(gain, offset, 0.25)
    exact = system.expected_log_policy(mean, covariance, gain, offset)
    gaps, shifts, spreads = [], [], []
    for log_prob in (None, system.policy(gain, offset)):
        m, c = distribution(system, 64, log_prob, kappa=0.25)
        gaps.append(system.expected_log_policy(m, c, gain, offset) - exact)
        shifts.append(float((m - mean).norm()))
        spreads.append(float((c - covariance).norm() / covariance.norm()))
    assert gaps[0] < -0.8 and 0.0 < gaps[1] < -0.1 * gaps[0], gaps
    if target == "offset":  # a tilt that moves the mean alone
        assert shifts[0] > 0.8 and shifts[1] < 0.15 * shifts[0]
    else:  # and two that change the covariance alone
        assert spreads[0] > 3.0 and spreads[1] < 0.2 * spreads[0]


def test_the_exact_tilt_is_that_of_weighted_samples(system):
    """The oracle itself: draws weighted by the policy's density to a small power."""
    g = torch.Generator().manual_seed(0)
    values, vectors = torch.linalg.eigh(system.covariance)
    normal = torch.randn(20_000, len(values), generator=g, dtype=torch.float64)
    flat = normal @ (vectors * values.clamp_min(0.0).sqrt()).T
    raw = flat.view(-1, system.steps, 3) * system.scale
    logp = Normal(raw[..., :2] @ (0.4 * K) + 0.6, 0.3).log_prob(raw[..., 2]).sum(1)
    weights = torch.softmax(0.01 * logp, 0)
    mean, covariance = system.tilted(0.4 * K, 0.6, 0.01)
    torch.testing.assert_close(weights @ flat, mean, atol=0.06, rtol=0)
    found = (flat - mean).T @ ((flat - mean) * weights[:, None])
    assert (found - covariance).norm() < 0.05 * covariance.norm() < 0.2 * (system.covariance - covariance).norm()
    assert float(weights @ logp) / system.steps == pytest.approx(
        system.expected_log_policy(mean, covariance, 0.4 * K, 0.6), abs=0.03
    )


# -- check P4: what a single increment is --------------------------------------------------------

SHAPE = (3, 7, 4)
"""[B, C, T] of three observations, two actions, reward and done."""


def codec():
    g = torch.Generator().manual_seed(3)
    fitted = TrajectoryCodec(3, 2, 4).double()
    fitted.fit(torch.randn(7, generator=g).double() * 0.3, torch.rand(7, generator=g).double() + 0.5)
    return fitted


def noise(seed=0):
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def log_prob(obs, action):
    """N(a; tanh(W s), 0.5^2) in two dimensions."""
    weight = torch.tensor([[0.5, -0.3, 0.2], [0.1, 0.4, -0.6]], dtype=torch.float64)
    return -2.0 * (action - torch.tanh(obs @ weight.T)).square().sum(-1)


MIX = torch.randn(28, 28, generator=torch.Generator().manual_seed(5), dtype=torch.float64) / 6.0


def denoise(x, sigma):
    """A denoiser that is not linear and mixes everything within a trajectory."""
    return (torch.tanh(x.flatten(1) @ MIX) / (1.0 + sigma)).view(x.shape)


def made(steps=8, law=log_prob, denoiser=denoise, **settings):
    sampler = SamplerConfig(sampler_steps=steps, s_churn=0.0)
    return Guidance(law, codec(), denoiser, GuidanceConfig(**{"kappa": 0.7} | settings), sampler)


def increment(x, i=2, steps=8, **settings):
    level = SamplerConfig(sampler_steps=steps).levels()[i]
    return made(steps, **settings)(x, torch.tensor(level, dtype=x.dtype), i)


def numeric(function, x):
    """Gradient of ``function`` [B] of x [B, C, T] by central differences."""
    found, step = torch.zeros_like(x), 1e-5
    for c in range(x.shape[1]):
        for t in range(x.shape[2]):
            move = torch.zeros_like(x)
            move[:, c, t] = step
            found[:, c, t] = (function(x + move) - function(x - move)) / (2 * step)
    return found


def total(x, held=None):
    """sum_t log pi of x, at the observations of ``held`` if given; the codec's map spelled out."""
    raw = (x * codec().std[:, None] + codec().mean[:, None]).transpose(1, 2)
    seen = raw if held is None else (held * codec().std[:, None] + codec().mean[:, None]).transpose(1, 2)
    return log_prob(seen[..., :3], torch.tanh(raw[..., 3:5])).sum(1)


LAMBDA_2 = 0.7 * (1 - 2 / 8 + 0.3 * math.sin(3 * math.pi / 8))


@pytest.mark.parametrize("denoised", [True, False])
@pytest.mark.parametrize("wrt", ["action", "both"])
def test_the_heuristic_is_the_gradient_at_its_base_point_through_tanh_and_deviation(wrt, denoised):
    x = noise()
    sigma = SamplerConfig(sampler_steps=8).levels()[2]
    base = denoise(x, torch.tensor(sigma)) if denoised else x
    expected = LAMBDA_2 * numeric(lambda at: total(at, held=base if wrt == "action" else None), base)
    found = increment(x, grad_wrt=wrt, denoised=denoised, normalize=False)
    torch.testing.assert_close(found, expected, atol=1e-8, rtol=1e-5)
    assert expected.abs().max() > 0.1


def test_the_posterior_form_is_the_gradient_through_the_denoiser_times_sigma_and_the_step():
    x = noise()
    levels = SamplerConfig(sampler_steps=8).levels()
    factor = 0.7 * levels[2] * (levels[2] - levels[3])
    expected = factor * numeric(lambda at: total(denoise(at, torch.tensor(levels[2]))), x)
    found = increment(x, guidance="posterior", grad_wrt="both", normalize=False)
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-4)
    assert expected.abs().max() > 0.1
    base = denoise(x, torch.tensor(levels[2]))
    held = factor * numeric(lambda at: total(denoise(at, torch.tensor(levels[2])), held=base), x)
    found = increment(x, guidance="posterior", grad_wrt="action", normalize=False)
    torch.testing.assert_close(found[:, 3:5], held[:, 3:5], atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("form", ["heuristic", "posterior"])
def test_everything_but_actions_receives_exactly_zero(form):
    found = increment(noise(), guidance=form)
    assert found[:, [0, 1, 2, 5, 6]].equal(torch.zeros(3, 5, 4, dtype=torch.float64))
    assert (found[:, 3:5] != 0.0).all()


def test_with_both_the_heuristic_pushes_observations_too_but_not_rewards_and_ends():
    found = increment(noise(), grad_wrt="both")
    assert (found[:, :5] != 0.0).all() and (found[:, 5:] == 0.0).all()


def test_the_schedule_is_the_papers():
    """N = 4, kappa = 2, c = 0.3: 2 (1 + 0.3 sin 45), 2 (0.75 + 0.3), 2 (0.5 + 0.3 sin 135), and nothing at the last."""
    lengths = [float(increment(noise(), i, steps=4, kappa=2.0)[0].norm()) for i in range(4)]
    assert lengths == pytest.approx([2.4242641, 2.1, 1.4242641, 0.0], abs=1e-6)
    flat = [float(increment(noise(), i, steps=4, kappa=2.0, cosine=0.0)[0].norm()) for i in range(4)]
    assert flat == pytest.approx([2.0, 1.5, 1.0, 0.0], abs=1e-6)


@pytest.mark.parametrize("wrt", ["action", "both"])
@pytest.mark.parametrize("form", ["heuristic", "posterior"])
def test_normalised_increments_have_the_length_lambda_in_each_trajectory(form, wrt):
    settings = {"guidance": form, "grad_wrt": wrt}
    found, raw = increment(noise(), **settings), increment(noise(), normalize=False, **settings)
    torch.testing.assert_close(found.flatten(1).norm(dim=1), torch.full((3,), LAMBDA_2).double(), atol=1e-6, rtol=0)
    torch.testing.assert_close(torch.cosine_similarity(found.flatten(1), raw.flatten(1)), torch.ones(3).double())
    assert raw.flatten(1).norm(dim=1).std() > 0.01


def test_without_kappa_and_before_the_last_step_nobody_is_asked():
    def never(*_):
        raise AssertionError

    for i, kappa in ((0, 0.0), (7, 0.5)):
        found = increment(noise(), i, law=never, denoiser=never, kappa=kappa)
        assert found.equal(torch.zeros(SHAPE, dtype=torch.float64))


def test_a_gradient_of_zero_is_no_push_and_no_nan():
    assert increment(noise(), law=lambda obs, action: 0.0 * action.sum(1)).equal(torch.zeros(SHAPE).double())


@pytest.mark.parametrize("form", ["heuristic", "posterior"])
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_it_works_in_every_grad_mode(mode, form):
    guide = made(guidance=form)
    expected = guide(noise(), torch.tensor(3.0), 2)
    with mode():
        found = guide(noise(), torch.tensor(3.0), 2)
    assert found.equal(expected) and not found.requires_grad


def test_a_denoiser_without_gradients_serves_the_heuristic_and_is_refused_by_the_posterior_form():
    closed = torch.no_grad()(denoise)
    assert increment(noise(), denoiser=closed).equal(increment(noise()))
    with pytest.raises(RuntimeError, match="heuristic"):
        increment(noise(), denoiser=closed, guidance="posterior")


def test_the_posterior_form_refuses_churn_unless_it_is_normalised():
    raw, normed = (GuidanceConfig(kappa=1.0, guidance="posterior", normalize=n) for n in (False, True))
    with pytest.raises(ValueError, match="s_churn=0"):
        Guidance(log_prob, codec(), denoise, raw, SamplerConfig())
    Guidance(log_prob, codec(), denoise, normed, SamplerConfig())


@pytest.mark.parametrize(
    "settings, word",
    [({"kappa": -0.1}, "kappa=-0.1"), ({"kappa": math.nan}, "kappa"), ({"kernel_std": 0.0}, "kernel_std"),
     ({"cosine": math.inf}, "cosine"), ({"guidance": "dps"}, "posterior"), ({"grad_wrt": "state"}, "both"),
     ({"guidance": "posterior", "denoised": False}, "denoised=True"), ({"kappa_at": (64, 0, 1)}, "kappa_at"),
     ({"kappa_at": (64, 32)}, "kappa_at"), ({"kappa_at": (64, 32, 2), "normalize": False}, "normalize=True")],
)  # fmt: skip
def test_impossible_settings_are_refused(settings, word):
    with pytest.raises(ValueError, match=word):
        GuidanceConfig(**settings)


# -- densities of policies -------------------------------------------------------------------------

OBS = gym.spaces.Box(-np.inf, np.inf, (3,), np.float32)
ACTIONS = gym.spaces.Box(np.array([-2.0, 1.0], np.float32), np.array([2.0, 4.0], np.float32))
MIDDLE, HALF = torch.tensor([0.0, 2.5]), torch.tensor([2.0, 1.5])


def actor(kind, **options):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        made = kind(OBS, ACTIONS, QNetworkConfig(actor_hidden=(8,)), **options)
    return made.requires_grad_(False)


def on_policy(kind=ActorCritic, actions=ACTIONS, obs=OBS, **options):
    network = NetworkConfig(actor_hidden=(8,), critic_hidden=(8,), head_gain=1.0, log_std_init=-0.4, **options)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return kind(obs, actions, network).requires_grad_(False)


def squashed(mean, std):
    return Independent(TransformedDistribution(Normal(mean, std), TanhTransform()), 1)


def asked(n=5):
    g = torch.Generator().manual_seed(7)
    return torch.randn(n, 3, generator=g), torch.rand(n, 2, generator=g) * 1.8 - 0.9


def expected_log_prob(policy, obs, action):
    """By torch's own distributions, per unit of actions in [-1, 1]."""
    if isinstance(policy, DeterministicActor):
        return Normal(policy(obs), 0.3).log_prob(action).sum(-1)
    if isinstance(policy, SquashedGaussianActor):
        return squashed(policy(obs).mean, policy(obs).log_std.exp()).log_prob(action)
    if isinstance(policy, GaussianActor):
        return Normal(policy.mode(obs), policy.log_std.exp()).log_prob(action).sum(-1)
    found = policy.distribution(obs)
    if policy.head.action_map == "tanh":
        return squashed(found.mean, found.log_std.exp()).log_prob(action)
    return (Normal(found.mean, found.log_std.exp()).log_prob(MIDDLE + HALF * action) + HALF.log()).sum(-1)


POLICIES = {
    "deterministic": lambda: actor(DeterministicActor),
    "squashed": lambda: actor(SquashedGaussianActor),
    "gaussian": lambda: actor(GaussianActor),
    "clip": on_policy,
    "tanh": lambda: on_policy(action_map="tanh"),
    "state-dependent deviation": lambda: on_policy(std="state"),
    "latent, not decoding": lambda: on_policy(LatentPolicy),
}


@pytest.mark.parametrize("name", POLICIES)
def test_the_density_and_its_gradients_are_those_of_torchs_distributions(name):
    policy, (obs, action) = POLICIES[name](), asked()
    obs.requires_grad_()
    action.requires_grad_()
    results = []
    for found in (log_prob_of(policy, kernel_std=0.3)(obs, action), expected_log_prob(policy, obs, action)):
        assert found.shape == (5,)
        results.append((found.detach(), *torch.autograd.grad(found.sum(), (obs, action))))
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-3)
        assert (expected != 0).all()


@pytest.mark.parametrize("name", ["squashed", "tanh"])
def test_saturated_actions_have_finite_densities_and_gradients(name):
    """tanh in float32 is the bound itself above 9."""
    action = torch.tensor([[1.0, -1.0], [0.99999994, -0.99999994]], requires_grad=True)
    found = log_prob_of(POLICIES[name]())(torch.zeros(2, 3), action)
    (g,) = torch.autograd.grad(found.sum(), action)
    assert found.isfinite().all() and g.isfinite().all()


def test_a_policy_guides_trajectories_in_float32():
    x = noise().float()
    found = increment(x, law=log_prob_of(POLICIES["squashed"]()), denoiser=lambda x, sigma: x / (1 + sigma))
    assert found[:, 3:5].isfinite().all() and found.flatten(1).norm(dim=1).min() == pytest.approx(LAMBDA_2, abs=1e-4)


def test_policies_without_a_density_or_with_other_spaces_are_refused():
    discrete = on_policy(actions=gym.spaces.Discrete(3))
    decoding = LatentPolicy(OBS, ACTIONS, decoding=DecoderConfig(decoder_hidden=(8,)))
    decoding.decoding = True
    wide = on_policy(actions=gym.spaces.Box(-np.inf, np.inf, (2,), np.float32))
    for policy, word in ((discrete, "Gaussian"), (decoding, "latents"), (wide, "finite"), (object(), "object")):
        with pytest.raises(NoDensityError, match=word):
            log_prob_of(policy)
    with pytest.raises(TypeError, match="flat Box"):
        log_prob_of(on_policy(obs=gym.spaces.Dict({"a": OBS})))
    with pytest.raises(ValueError, match="kernel_std"):
        log_prob_of(actor(DeterministicActor), kernel_std=0.0)
