"""Fitting a decoder to what a policy did: GoRL's second phase (arXiv:2512.02581, section 3.3)."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ctrlrl.engine.errors import CheckpointError, NonFiniteUpdateError
from ctrlrl.engine.seeding import generator
from ctrlrl.engine.step import FlatParameters, OptState, adam, gradient
from ctrlrl.nets.decoders import Decoder
from ctrlrl.types import check_types


@dataclass(frozen=True)
class RefinementConfig:
    """How a decoder is fitted to collected actions."""

    refine_steps: int | None = None
    """Environment steps collected for each fit; None: one hundredth of the run's steps, for all fits together."""
    refine_epochs: int = 50
    """Passes over the collected pairs, at most."""
    refine_batch_size: int = 512
    """Pairs per optimiser step; the paper takes 8,192 of half a million."""
    refine_learning_rate: float = 3e-4
    """Adam's learning rate."""
    refine_patience: int = 20
    """Passes without a lower validation loss after which fitting stops."""
    refine_held_out: float = 0.1
    """Share of the pairs that is held out for validation."""
    refine_latents: Literal["prior", "used"] = "prior"
    """Noise that the decoder learns to turn into an action: fresh and independent of it, or the latent that led to
    it. The second is the paper's ablation, which loses what was learnt as soon as the latent policy is reset."""

    def __post_init__(self) -> None:
        check_types(self)
        for name in ("refine_steps", "refine_epochs", "refine_batch_size", "refine_patience"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name}={value} must be at least 1")
        if not 0.0 < self.refine_held_out < 1.0:
            raise ValueError(f"refine_held_out={self.refine_held_out} must lie in (0, 1)")
        if not self.refine_learning_rate > 0.0:
            raise ValueError(f"refine_learning_rate={self.refine_learning_rate} must be positive")


class _Objective(nn.Module):
    """A decoder's loss in forward's place, where functional_call finds it."""

    def __init__(self, decoder: Decoder) -> None:
        super().__init__()
        self.decoder = decoder

    def forward(self, features: Tensor, action: Tensor, draws: dict[str, Tensor]) -> Tensor:
        return self.decoder.loss(features, action, draws).mean()


class Refinement:
    """The fit of one decoder, an epoch at a time; everything random follows from ``seed``.

    Args:
        decoder: Freshly initialised; a copy of it is trained.
        config: How.
        seed: Of the split, the batches and the loss's draws.
        features: [N, F] what the decoder sees of the observations.
        action: [N, A] actions before the map onto the bounds.
        latent: [N, A] the latents that led to them, looked at with ``refine_latents="used"`` alone.

    Raises:
        ValueError: Fewer than two pairs.
    """

    def __init__(
        self, decoder: Decoder, config: RefinementConfig, seed: int, features: Tensor, action: Tensor, latent: Tensor
    ) -> None:
        if len(action) < 2:
            raise ValueError(f"{len(action)} pair to fit a decoder to; at least 2 are needed, one for validation")
        self.config, self.seed = config, seed
        self.objective = _Objective(copy.deepcopy(decoder).requires_grad_(True))
        self.pairs = {"features": features, "action": action, "latent": latent}
        order = torch.randperm(len(action), generator=generator(seed, "split")).to(action.device)
        held_out = max(1, round(config.refine_held_out * len(action)))
        self.held_out, self.training = order[:held_out], order[held_out:]
        self.objective.decoder.fit_scaling(features[self.training])
        self.flat = FlatParameters(self.objective)
        zeros, device = torch.zeros_like(self.flat.flat), self.flat.flat.device
        self.state = OptState(
            self.flat.flat, zeros, zeros.clone(), torch.zeros(2, device=device),
            torch.ones((), dtype=torch.bool, device=device),
        )  # fmt: skip
        self._tick = torch.tensor([1.0, 0.0], device=device)
        self._rate = torch.tensor(config.refine_learning_rate, device=device)
        self.best = self.flat.flat.clone()
        self.best_loss, self.since, self.epochs = math.inf, 0, 0

    @property
    def done(self) -> bool:
        """Whether all epochs are over, or ``refine_patience`` of them without a lower validation loss."""
        return self.epochs >= self.config.refine_epochs or self.since >= self.config.refine_patience

    def epoch(self, steps: int = 0, iteration: int = 0) -> dict[str, float]:
        """One pass over the training pairs; returns both losses.

        Raises:
            NonFiniteUpdateError: A loss is NaN or infinite; ``steps`` and ``iteration`` say where the run stands.
        """
        order = self.training[
            torch.randperm(len(self.training), generator=generator(self.seed, "order", self.epochs)).to(
                self.training.device
            )
        ]
        noise = generator(self.seed, "draws", self.epochs)
        losses = [self._step(rows, noise) for rows in self._batches(order)]
        train = float(torch.stack(losses).mean())
        with torch.no_grad():
            # the same draws after every epoch, so that epochs differ by the decoder alone
            same = generator(self.seed, "validation")
            parts = [(self._loss(self.state.params, rows, same), len(rows)) for rows in self._batches(self.held_out)]
            validation = float(sum(loss * n for loss, n in parts)) / len(self.held_out)
        if not (math.isfinite(train) and math.isfinite(validation)):
            raise NonFiniteUpdateError("decoder loss", steps, iteration, 0, kept=False)
        self.epochs += 1
        self.since += 1
        if validation < self.best_loss:
            self.best_loss, self.since = validation, 0
            self.best.copy_(self.state.params)
        return {"train_loss": train, "validation_loss": validation}

    def result(self) -> Decoder:
        """The decoder with the lowest validation loss."""
        self.flat.flat.copy_(self.best)
        return self.objective.decoder.requires_grad_(False)

    def _batches(self, rows: Tensor) -> tuple[Tensor, ...]:
        return rows.split(self.config.refine_batch_size)

    def _step(self, rows: Tensor, noise: torch.Generator) -> Tensor:
        def objective(params: Tensor) -> tuple[Tensor, Tensor]:
            loss = self._loss(params, rows, noise)
            return loss, loss.detach()

        grad, loss = gradient(objective, self.state.params)
        self.state = adam(self.state, grad, self._rate, 1e-8, 0, self._tick, None)
        return loss

    def _loss(self, params: Tensor, rows: Tensor, noise: torch.Generator) -> Tensor:
        features, action, latent = (self.pairs[k][rows] for k in ("features", "action", "latent"))
        draws = {k: v.to(action.device) for k, v in self.objective.decoder.draws(len(rows), noise).items()}
        if self.config.refine_latents == "used" and "noise" in draws:
            draws["noise"] = latent.unsqueeze(1).expand_as(draws["noise"])
        inputs = (features, action, draws)
        return torch.func.functional_call(self.objective, self.flat.views(params), inputs, tie_weights=False)

    # -- state --------------------------------------------------------------------------------

    def tensors(self) -> dict[str, Tensor]:
        """Everything that a checkpoint holds of the fit."""
        fit = {"params": self.state.params, "m": self.state.m, "v": self.state.v, "clock": self.state.clock}
        return {**self.pairs, **fit, "best": self.best}

    def counters(self) -> dict[str, Any]:
        """The same, for JSON values."""
        return {"best_loss": self.best_loss, "since": self.since, "epochs": self.epochs}

    def restore(self, tensors: Mapping[str, Tensor], counters: Mapping[str, Any]) -> None:
        """Take over what :meth:`tensors` and :meth:`counters` gave; the pairs were given to the constructor."""
        if tensors["params"].shape != self.flat.flat.shape:
            raise CheckpointError("the checkpoint's decoder differs in size from this agent's; use the run's config")
        device = self.flat.flat.device
        self.flat.flat.copy_(tensors["params"])
        self.state = self.state._replace(
            params=self.flat.flat, **{k: tensors[k].to(device) for k in ("m", "v", "clock")}
        )
        self.best.copy_(tensors["best"])
        self.best_loss, self.since, self.epochs = counters["best_loss"], counters["since"], counters["epochs"]
