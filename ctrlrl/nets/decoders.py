"""Generators of actions: small conditional networks that turn Gaussian noise into an action, state by state."""

from __future__ import annotations

import itertools
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal, NamedTuple, TypeAlias

import gymnasium as gym
import torch
from torch import Tensor, nn
from torch.nn.functional import linear, silu, softplus

from ctrlrl.nets.actor_critic import Preprocess
from ctrlrl.nets.heads import STD_MIN, DiagonalGaussian
from ctrlrl.nets.mlp import mlp, orthogonal
from ctrlrl.nets.normalizer import ObsScaling, RunningMoments
from ctrlrl.types import Obs, check_types

Generate: TypeAlias = Callable[[Tensor, Tensor], Tensor]
"""(features [N, F], noise [N, A]) -> action [N, A]."""

CLIP = 10.0
"""Bound on a scaled feature: an observation far from those that were fitted says no more than that it is far."""
NEWTON_STEPS, NEWTON_TOLERANCE = 100, 1e-9


@dataclass(frozen=True)
class DecoderConfig:
    """Shape, fit and sampler of the generator g(s, eps) -> a."""

    decoder: Literal["flow", "diffusion", "gaussian"] = "flow"
    """A flow-matching network, a diffusion model, or one Gaussian per state (the baseline both are compared with)."""
    decoder_hidden: tuple[int, ...] = (32, 32, 32, 32)
    """Widths of the hidden layers, with SiLU between them."""
    decoder_time_features: int = 8
    """Sines and cosines of the time, at the frequencies 1, 2, 4, ...; an even number."""
    decoder_steps: int = 10
    """Steps from noise to an action."""
    decoder_draws: int = 8
    """Draws of noise and time per action in the loss."""
    decoder_prediction: Literal["v", "epsilon"] = "v"
    """What a diffusion model predicts: the velocity alpha eps - sigma a, or the noise eps."""
    decoder_schedule: Literal["cosine", "linear", "released"] = "cosine"
    """Noise of a diffusion model: see :func:`ctrlrl.nets.diffusion_decoder.noise_levels`."""

    def __post_init__(self) -> None:
        check_types(self)
        if not self.decoder_hidden:
            raise ValueError("decoder_hidden=() has no layer; expected at least one width")
        if self.decoder_time_features < 2 or self.decoder_time_features % 2:
            raise ValueError(f"decoder_time_features={self.decoder_time_features} must be even and at least 2")
        least = 2 if self.decoder == "diffusion" else 1
        if self.decoder_steps < least:
            raise ValueError(f"decoder_steps={self.decoder_steps} must be at least {least} for {self.decoder!r}")
        if self.decoder_draws < 1:
            raise ValueError(f"decoder_draws={self.decoder_draws} must be at least 1")


class Decoder(nn.Module, ABC):
    """A deterministic generator a = g(s, eps), eps ~ N(0, I), fitted to pairs (s, a) by regression.

    Actions are those before the map to the environment's bounds. Observations pass through the decoder's own
    scaling, fixed by :meth:`fit_scaling`.

    Args:
        observation_space: Of one environment; a vector, or a Dict of vectors and integers. Images raise ``TypeError``.
        size: A, dimensions of the action and of the noise.
        config: The settings.
    """

    initial_gain: float = 1.0
    """What the generator multiplies the noise by before its first fit; 1 is the identity, g(s, eps) = eps."""

    def __init__(self, observation_space: gym.Space, size: int, config: DecoderConfig) -> None:
        super().__init__()
        self.preprocess = Preprocess(observation_space, normalize=False, clip=CLIP)
        if self.preprocess.images:
            found = ", ".join(f"{k or 'observation'}: {s}" for k, s in self.preprocess.images.items())
            raise TypeError(f"a decoder needs vector observations, found images ({found}); encode them in a wrapper")
        self.feature_size, self.size, self.config = self.preprocess.flat_size, size, config
        self.scaling = ObsScaling(self.feature_size)

    # -- acting -------------------------------------------------------------------------------

    def features(self, obs: Obs) -> Tensor:
        """Raw observations [N, ...] as one vector each [N, F]: floats as they are, integers one-hot."""
        return self.preprocess(obs)["flat"].to(self.scaling.scale.dtype)

    def forward(self, features: Tensor, noise: Tensor) -> Tensor:
        """The actions [N, A] that ``noise`` [N, A] selects at ``features`` [N, F]."""
        self._check(features, noise, "noise")
        return self.sampler()(features, noise)

    @abstractmethod
    def sampler(self) -> Generate:
        """``forward`` with all that does not depend on its arguments computed once; equal to it bit for bit.

        Valid until the parameters or the scaling change. Arguments are not checked.
        """

    # -- fitting ------------------------------------------------------------------------------

    @abstractmethod
    def draws(self, n: int, generator: torch.Generator) -> dict[str, Tensor]:
        """The randomness of ``n`` actions' losses, each [n, ...] on the CPU, so that every device sees the same."""

    @abstractmethod
    def loss(self, features: Tensor, action: Tensor, draws: Mapping[str, Tensor]) -> Tensor:
        """What the fit minimises, [N], for actions [N, A] at ``features`` [N, F] and their :meth:`draws`."""

    @torch.no_grad()
    def fit_scaling(self, features: Tensor) -> None:
        """Scale features by the mean and deviation of ``features`` [M, F]; one that never varies is only centred."""
        if not features.isfinite().all():
            bad = (~features.isfinite()).any(0).nonzero().flatten().tolist()
            raise ValueError(f"features {bad} hold values that are not finite; expected finite observations")
        moments = RunningMoments((self.feature_size,)).to(features.device)
        for part in features.split(1 << 16):
            moments.update(part)
        std = moments.var.sqrt()
        # dividing by the rounding noise of a constant would turn its first change into an enormous input
        varies = std > 1e-6 * moments.mean.abs().clamp(min=1.0)
        self.scaling.fit(moments.mean, torch.where(varies, std, 1.0), eps=0.0)

    # -- density ------------------------------------------------------------------------------

    @abstractmethod
    def invert(self, features: Tensor, action: Tensor) -> tuple[Tensor, Tensor]:
        """The noise [N, A] that selects ``action`` [N, A], and log|det dg/deps| [N] there."""

    @abstractmethod
    def log_det(self, features: Tensor, noise: Tensor) -> Tensor:
        """log|det dg/deps| [N] at ``noise`` [N, A]; no gradient."""

    @torch.no_grad()
    def log_prob(self, features: Tensor, action: Tensor) -> Tensor:
        """Log-density [N] of ``action`` [N, A] under eps ~ N(0, I): log N(eps; 0, I) - log|det dg/deps|.

        The density of the sampler with its finite steps, not of the continuous flow they approximate; no gradient.
        Raises ``RuntimeError`` where the noise cannot be found.
        """
        noise, log_det = self.invert(features, action)
        return DiagonalGaussian(torch.zeros_like(noise), torch.zeros_like(noise)).log_prob(noise) - log_det

    # -- parts --------------------------------------------------------------------------------

    def _inputs(self, features: Tensor) -> Tensor:
        return self.scaling(features).clamp(-CLIP, CLIP)

    def _check(self, features: Tensor, other: Tensor, name: str, rows: bool = False) -> None:
        sizes = (self.feature_size, self.size)
        if (features.shape[-1], other.shape[-1]) != sizes or (rows and len(features) != len(other)):
            raise ValueError(
                f"expected features [N, {sizes[0]}] and {name} [N, {sizes[1]}], "
                f"found {list(features.shape)} and {list(other.shape)}"
            )


class GaussianDecoder(Decoder):
    """a = m(s) + std(s) eps with a diagonal deviation, std = softplus(.) + 0.001; its loss is -log p(a | s)."""

    def __init__(self, observation_space: gym.Space, size: int, config: DecoderConfig) -> None:
        super().__init__(observation_space, size, config)
        self.net = mlp(self.feature_size, config.decoder_hidden, "silu")
        self.net.append(nn.Linear(config.decoder_hidden[-1], 2 * size))
        orthogonal(self.net)
        last = self.net[-1]
        assert isinstance(last, nn.Linear)
        nn.init.zeros_(last.weight)
        nn.init.constant_(last.bias[size:], math.log(math.expm1(1.0 - STD_MIN)))

    def sampler(self) -> Generate:
        def generate(features: Tensor, noise: Tensor) -> Tensor:
            mean, std = self._moments(features)
            return torch.addcmul(mean, std, noise)

        return generate

    def draws(self, n: int, generator: torch.Generator) -> dict[str, Tensor]:
        return {}

    def loss(self, features: Tensor, action: Tensor, draws: Mapping[str, Tensor]) -> Tensor:
        self._check(features, action, "action", rows=True)
        mean, std = self._moments(features)
        return -DiagonalGaussian(mean, std.log()).log_prob(action)

    @torch.no_grad()
    def invert(self, features: Tensor, action: Tensor) -> tuple[Tensor, Tensor]:
        self._check(features, action, "action", rows=True)
        mean, std = self._moments(features)
        return (action - mean) / std, std.log().sum(-1)

    @torch.no_grad()
    def log_det(self, features: Tensor, noise: Tensor) -> Tensor:
        self._check(features, noise, "noise", rows=True)
        return self._moments(features)[1].log().sum(-1)

    def _moments(self, features: Tensor) -> tuple[Tensor, Tensor]:
        mean, raw = self.net(self._inputs(features)).chunk(2, -1)
        return mean, softplus(raw) + STD_MIN


class Layers(NamedTuple):
    """The weights of a :class:`ConditionalMLP`, its first layer in three: of the observation, of x, of the time."""

    of_obs: Tensor
    of_x: Tensor
    of_time: Tensor
    bias: Tensor
    rest: list[tuple[Tensor, Tensor]]

    def clock(self, time: Tensor) -> Tensor:
        """The share [..., H] of times [...] in the first layer."""
        frequencies = 2.0 ** torch.arange(self.of_time.shape[1] // 2, device=time.device)
        angle = time.to(self.bias.dtype).unsqueeze(-1) * frequencies
        return linear(torch.cat([angle.sin(), angle.cos()], -1), self.of_time, self.bias)

    def value(self, x: Tensor, shift: Tensor) -> Tensor:
        """The network's answer [..., A] at x [..., A]; ``shift`` is the other inputs' share in the first layer."""
        hidden = linear(x, self.of_x) + shift
        for weight, bias in self.rest:
            hidden = linear(silu(hidden), weight, bias)
        return hidden

    def slope(self, x: Tensor, shift: Tensor) -> tuple[Tensor, Tensor]:
        """The same, and its Jacobian [..., A, A] by x."""
        hidden, slope = linear(x, self.of_x) + shift, self.of_x
        for weight, bias in self.rest:
            gate = hidden.sigmoid()
            slope = weight @ ((gate * (1.0 + hidden * (1.0 - gate))).unsqueeze(-1) * slope)
            hidden = linear(silu(hidden), weight, bias)
        return hidden, slope


class ConditionalMLP(nn.Module):
    """f(s, x, t): an MLP on an observation, a noisy action and a time. The last layer starts at zero."""

    def __init__(self, features: int, size: int, hidden: tuple[int, ...], time_features: int) -> None:
        super().__init__()
        self.inputs = (features, size, time_features)
        widths = (sum(self.inputs), *hidden, size)
        self.linears = nn.ModuleList(nn.Linear(before, after) for before, after in itertools.pairwise(widths))
        orthogonal(self)
        nn.init.zeros_(self.linears[-1].weight)  # type: ignore[arg-type]

    def layers(self, dtype: torch.dtype | None = None) -> Layers:
        """Its weights, in ``dtype`` if given."""
        (first, bias), *rest = [(m.weight.to(dtype), m.bias.to(dtype)) for m in self.linears]  # type: ignore[union-attr]
        return Layers(*first.split(self.inputs, 1), bias, rest)  # type: ignore[call-arg]


class DenoisingDecoder(Decoder):
    """K steps x <- keep_k x + move_k f(s, x, t_k) from the noise to the action, with a learned f.

    The loss is the squared error of f, averaged over the draws and over the action's dimensions (their mean, not
    their sum, as in GoRL's code).
    """

    times: Tensor
    """Times at which f is asked, in the sampler's order."""
    steps: list[tuple[float, float]]
    """(keep_k, move_k) in that order."""

    def __init__(self, observation_space: gym.Space, size: int, config: DecoderConfig) -> None:
        super().__init__(observation_space, size, config)
        self.net = ConditionalMLP(self.feature_size, size, config.decoder_hidden, config.decoder_time_features)

    @abstractmethod
    def pairs(self, action: Tensor, draws: Mapping[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """Noisy actions [N, M, A], times [N, M] and what f should be there [N, M, A], for ``action`` [N, 1, A]."""

    def loss(self, features: Tensor, action: Tensor, draws: Mapping[str, Tensor]) -> Tensor:
        self._check(features, action, "action", rows=True)
        on_device = {k: v.to(action if v.is_floating_point() else action.device) for k, v in draws.items()}
        x, time, target = self.pairs(action.unsqueeze(1), on_device)
        layers = self.net.layers()
        seen = linear(self._inputs(features), layers.of_obs).unsqueeze(1)
        return (layers.value(x, seen + layers.clock(time)) - target).square().mean((1, 2))

    def integrate(self, field: Callable[[Tensor, int], Tensor], noise: Tensor) -> Tensor:
        """The sampler's steps from ``noise`` [N, A] with f(x, k) = ``field`` at step k, in place of the network."""
        x = noise
        for k, (keep, move) in enumerate(self.steps):
            x = torch.add(x if keep == 1.0 else keep * x, field(x, k), alpha=move)
        return x

    def sampler(self) -> Generate:
        layers = self.net.layers()
        clocks = layers.clock(self.times).unbind(0)

        def generate(features: Tensor, noise: Tensor) -> Tensor:
            seen = linear(self._inputs(features), layers.of_obs)
            return self.integrate(lambda x, k: layers.value(x, seen + clocks[k]), noise)

        return generate

    @torch.no_grad()
    def invert(self, features: Tensor, action: Tensor) -> tuple[Tensor, Tensor]:
        """The noise [N, A] that selects ``action`` [N, A], and log|det dg/deps| [N], step by step in float64.

        Each step is undone by Newton's method and is exact to 1e-9. It has one solution as long as f changes by less
        than keep / move per unit of x; where a fit is steeper, a step can fold, and the solution found is one of
        several. Raises ``RuntimeError`` if there is none.
        """
        self._check(features, action, "action", rows=True)
        layers = self.net.layers(torch.float64)
        clocks = layers.clock(self.times)
        seen = linear(self._inputs(features).double(), layers.of_obs)
        x, log_det = action.double(), seen.new_zeros(len(action))
        for k in reversed(range(len(self.steps))):
            x, jacobian = self._undo(k, x, layers, seen + clocks[k])
            log_det = log_det + torch.linalg.slogdet(jacobian).logabsdet
        return x.to(action.dtype), log_det.to(action.dtype)

    @torch.no_grad()
    def log_det(self, features: Tensor, noise: Tensor) -> Tensor:
        self._check(features, noise, "noise", rows=True)
        layers = self.net.layers(torch.float64)
        clocks = layers.clock(self.times)
        seen = linear(self._inputs(features).double(), layers.of_obs)
        eye = torch.eye(self.size, dtype=torch.float64, device=noise.device)
        x, log_det = noise.double(), seen.new_zeros(len(noise))
        for k, (keep, move) in enumerate(self.steps):
            value, slope = layers.slope(x, seen + clocks[k])
            x = keep * x + move * value
            log_det = log_det + torch.linalg.slogdet(keep * eye + move * slope).logabsdet
        return log_det.to(noise.dtype)

    def _undo(self, k: int, after: Tensor, layers: Layers, shift: Tensor) -> tuple[Tensor, Tensor]:
        """x [N, A] before step k, and the step's Jacobian [N, A, A] there."""
        keep, move = self.steps[k]
        eye = torch.eye(self.size, dtype=after.dtype, device=after.device)

        def step(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            value, slope = layers.slope(x, shift)
            gap = keep * x + move * value - after
            return gap, gap.abs().amax(-1), keep * eye + move * slope

        x, length = after / keep, torch.ones_like(after[:, 0])
        tolerance = NEWTON_TOLERANCE * (1.0 + after.abs().amax(-1))
        gap, error, jacobian = step(x)
        for _ in range(NEWTON_STEPS):
            if (error <= tolerance).all():
                return x, jacobian
            direction = torch.linalg.solve_ex(jacobian, gap).result
            trial = x - length.unsqueeze(-1) * direction
            new_gap, new_error, new_jacobian = step(trial)
            # far from the solution a full step may lead further away: such a row stays and tries half of it
            better = new_error < error
            x, gap = (torch.where(better.unsqueeze(-1), a, b) for a, b in ((trial, x), (new_gap, gap)))
            jacobian = torch.where(better[:, None, None], new_jacobian, jacobian)
            error = torch.where(better, new_error, error)
            length = torch.where(better, (2.0 * length).clamp(max=1.0), 0.5 * length)
        failed = int((~(error <= tolerance)).sum())
        raise RuntimeError(
            f"step {k} of the decoder could not be undone for {failed} of {len(x)} actions: "
            f"the residual is {error.max().item():.2g} after {NEWTON_STEPS} Newton steps. The action may be out of the "
            "generator's reach or not finite"
        )


class FlowDecoder(DenoisingDecoder):
    """Flow matching: f is the velocity eps - a at x_t = (1 - t) a + t eps, t = 1 being noise; K Euler steps of 1 / K.

    Before the first fit it is the identity. Source: GoRL (arXiv:2512.02581, section 3) with time reversed, as in its
    code; flow matching is Lipman et al. 2022, arXiv:2210.02747.
    """

    def __init__(self, observation_space: gym.Space, size: int, config: DecoderConfig) -> None:
        super().__init__(observation_space, size, config)
        count = config.decoder_steps
        self.steps = [(1.0, -1.0 / count)] * count
        self.register_buffer("times", 1.0 - torch.arange(count) / count, persistent=False)

    def draws(self, n: int, generator: torch.Generator) -> dict[str, Tensor]:
        """``noise`` [n, M, A] and ``time`` [n, M], uniform on [0, 1)."""
        shape = (n, self.config.decoder_draws)
        noise = torch.randn(*shape, self.size, generator=generator)
        return {"noise": noise, "time": torch.rand(*shape, generator=generator)}

    def pairs(self, action: Tensor, draws: Mapping[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        noise, time = draws["noise"], draws["time"]
        return torch.lerp(action, noise, time.unsqueeze(-1)), time, noise - action


def make_decoder(config: DecoderConfig, observation_space: gym.Space, size: int) -> Decoder:
    """The decoder of ``config`` for actions of ``size`` dimensions.

    It starts as the identity, but for the released schedule of diffusion (see :attr:`Decoder.initial_gain`).
    """
    from ctrlrl.nets.diffusion_decoder import DiffusionDecoder  # which is built on this module

    kinds: dict[str, type[Decoder]] = {"flow": FlowDecoder, "diffusion": DiffusionDecoder, "gaussian": GaussianDecoder}
    return kinds[config.decoder](observation_space, size, config)
