"""Networks that value every Discrete action, and act by the best one."""

from __future__ import annotations

from collections.abc import Callable

import gymnasium as gym
import torch
from torch import Tensor, nn

from ctrlrl.core.utility import Utility
from ctrlrl.nets.actors import Features, QNetworkConfig
from ctrlrl.nets.mlp import mlp
from ctrlrl.types import Obs

STOCK, DISCOUNT = "stock", "discount"
"""Entries of the observation that :class:`StockActor` needs."""


class Choice:
    """A choice by the largest of ``preference`` [..., n], among equals by the largest of ``second`` [..., n]."""

    def __init__(self, preference: Tensor, second: Tensor | None = None) -> None:
        self.preference, self.second = preference, second

    def mode(self) -> Tensor:
        """[...] int64, counted from 0."""
        if self.second is None:
            return self.preference.argmax(-1)
        best = self.preference >= self.preference.amax(-1, keepdim=True)
        return self.second.masked_fill(~best, -torch.inf).argmax(-1)

    def params(self) -> dict[str, Tensor]:
        """``logits`` [..., n]: what is compared, by the name it has in a distribution."""
        return {"logits": self.preference}


class DiscreteActor(nn.Module):
    """Values of every action: [B, n], or [B, n, outputs] where each action has several.

    Args:
        observation_space: Of one environment.
        action_space: Discrete; its numbering is the environment's, choices here count from 0.
        network: Widths, activation and layer normalisation are those for critics.
        encoder: The user's own.
        outputs: Numbers per action; 1 is dropped from the result's shape, of more the mean is the action's value.
        extra: Further inputs behind the encoder, for subclasses.

    Raises:
        TypeError: Actions are not Discrete.
    """

    stochastic = False
    """Noise belongs to collecting data alone."""
    action_shape: tuple[int, ...] = ()
    action_dtype = torch.int64

    def __init__(
        self,
        observation_space: gym.Space,
        action_space: gym.Space,
        network: QNetworkConfig,
        encoder: Callable[..., nn.Module] | None = None,
        *,
        outputs: int = 1,
        extra: int = 0,
    ) -> None:
        super().__init__()
        if not isinstance(action_space, gym.spaces.Discrete):
            others = "sac or td3" if isinstance(action_space, gym.spaces.Box) else "ppo"
            raise TypeError(f"this method needs Discrete actions, found {action_space}; try {others}")
        self.observation_space, self.action_space = observation_space, action_space
        self.n_actions, self.start, self.outputs = int(action_space.n), int(action_space.start), outputs
        self.features = Features(observation_space, network, encoder)
        inputs = self.features.out_features + extra
        self.body = mlp(inputs, network.critic_hidden, network.activation, network.layer_norm != "none")
        width = network.critic_hidden[-1] if network.critic_hidden else inputs
        self.head = nn.Linear(width, self.n_actions * outputs)

    def forward(self, obs: Obs) -> Tensor:
        return self.values(self.features(obs))

    def values(self, inputs: Tensor) -> Tensor:
        """Features (and further inputs) [..., k] to [..., n], or [..., n, outputs]."""
        out = self.head(self.body(inputs))
        return out if self.outputs == 1 else out.unflatten(-1, (self.n_actions, self.outputs))

    def preference(self, obs: Obs) -> Tensor:
        """[B, n]: the largest is what the policy chooses."""
        values = self(obs)
        return values if self.outputs == 1 else values.mean(-1)

    def mode(self, obs: Obs) -> Tensor:
        """The choices [B], counted from 0."""
        return self.distribution(obs).mode()

    def distribution(self, obs: Obs) -> Choice:
        """How the choice is made."""
        return Choice(self.preference(obs))

    def deterministic(self, obs: Obs) -> Tensor:
        """Raw observations [B, ...] to the environment's actions [B]: the policy one would deploy."""
        return self.to_env(obs, self.mode(obs))

    def to_env(self, obs: Obs, action: Tensor) -> Tensor:
        """Choices in the environment's numbering."""
        return action + self.start if self.start else action


class StockActor(DiscreteActor):
    """Quantiles of the return-to-go [B, n, m] for every action, given observation, stock and discount.

    Acts by the best mean utility of stock plus return-to-go; among equals by the best mean. The return-to-go does not
    contain the stock. The encoder sees the observation without ``stock`` and ``discount``, and once for many stocks.

    Args:
        observation_space: Dict with ``stock`` [1] (gamma^t C_t) and ``discount`` [1] (gamma^t) among its entries, as
            ``engine.stock.Stock`` tells them.
        action_space: Discrete.
        network: See DiscreteActor.
        encoder: The user's own, of the observation without these two.
        utility: What is maximised.
        quantiles: m.
        stocks: Range of initial stocks, by which inputs are scaled.
        knots: Steps tanh((stock - knot) / distance), evenly over that range, which are inputs beside the stock itself:
            what is best changes abruptly with it.

    Raises:
        TypeError: Actions are not Discrete.
        ValueError: An entry is missing, or the stock has several components.
    """

    knots: Tensor

    def __init__(
        self,
        observation_space: gym.Space,
        action_space: gym.Space,
        network: QNetworkConfig,
        encoder: Callable[..., nn.Module] | None = None,
        *,
        utility: Utility,
        quantiles: int,
        stocks: tuple[float, float],
        knots: int,
    ) -> None:
        own = without_stock(observation_space)
        super().__init__(own, action_space, network, encoder, outputs=quantiles, extra=2 + knots)
        self.observation_space, self.utility = observation_space, utility
        self.single = not isinstance(own, gym.spaces.Dict)
        low, high = stocks
        self.middle, self.reach, self.distance = (low + high) / 2, (high - low) / 2, (high - low) / max(knots, 1)
        self.register_buffer("knots", low + (torch.arange(knots) + 0.5) * self.distance, persistent=False)

    def forward(self, obs: Obs, stock: Tensor | None = None) -> Tensor:
        """[B, n, m]; with other stocks [B, E] than those observed [B, E, n, m]."""
        assert isinstance(obs, dict)
        own = {k: v for k, v in obs.items() if k not in (STOCK, DISCOUNT)}
        features = self.features(next(iter(own.values())) if self.single else own).unsqueeze(1)
        at = obs[STOCK] if stock is None else stock
        parts = [
            features.expand(-1, at.shape[1], -1),
            ((at - self.middle) / self.reach).unsqueeze(2),
            obs[DISCOUNT].unsqueeze(1).expand(-1, at.shape[1], -1),
            torch.tanh((at.unsqueeze(2) - self.knots) / self.distance),
        ]
        found = self.values(torch.cat(parts, 2))
        return found.squeeze(1) if stock is None else found

    def preference(self, obs: Obs) -> Tensor:
        return self.distribution(obs).preference

    def distribution(self, obs: Obs) -> Choice:
        assert isinstance(obs, dict)
        returns = self(obs)
        utilities = self.utility.of(returns, obs[STOCK].squeeze(1), obs[DISCOUNT].squeeze(1))
        best = utilities.amax(-1, keepdim=True)
        return Choice(torch.where(self.utility.ties(utilities), best, utilities), returns.mean(-1))


def without_stock(space: gym.Space) -> gym.Space:
    """The observation space beside ``stock`` and ``discount``: a single entry by itself."""
    entries = dict(space.spaces) if isinstance(space, gym.spaces.Dict) else {}
    missing = [k for k in (STOCK, DISCOUNT) if k not in entries or entries[k].shape != (1,)]
    if missing or len(entries) < 3:
        raise ValueError(
            f"the observation must be a Dict with the entries {STOCK} [1], {DISCOUNT} [1] and one more, found {space}. "
            "Wrap the environment in ctrlrl.engine.stock:Stock with a scalar reward"
        )
    rest = {k: v for k, v in entries.items() if k not in (STOCK, DISCOUNT)}
    return next(iter(rest.values())) if len(rest) == 1 else gym.spaces.Dict(rest)


def chosen(values: Tensor, action: Tensor) -> Tensor:
    """The entries [B] or [B, m] of ``values`` [B, n] or [B, n, m] at the choices ``action`` [B]."""
    index = action.view(-1, *[1] * (values.dim() - 1)).expand(-1, 1, *values.shape[2:])
    return values.gather(1, index).squeeze(1)
