"""D-eta-N: stock-augmented value iteration on return distributions, with a network of quantiles."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal, cast

import torch
from torch import Tensor, nn

from ctrlrl.core.quantiles import quantile_loss
from ctrlrl.core.utility import Utility
from ctrlrl.data.transitions import Transitions
from ctrlrl.engine.algorithm import Networks, Spaces, register
from ctrlrl.engine.value_based import CLEANRL, ValueBased
from ctrlrl.nets.discrete import DISCOUNT, STOCK, StockActor

if TYPE_CHECKING:
    from ctrlrl.engine.learner import Nets
    from ctrlrl.engine.transition_agent import TransitionAgent
    from ctrlrl.engine.transition_config import TransitionConfig

INITIAL = "initial"
"""Column of the replay: the stock that the transition's episode began with."""


@register
@dataclass(frozen=True)
class DEtaN(ValueBased):
    """Maximise the mean utility of stock plus return, by quantiles of the return-to-go given the stock.

    One network serves every initial stock in ``stock_low`` to ``stock_high``: all levels of the conditional value at
    risk, all target returns, all thresholds.
    """

    paper: ClassVar[str] = (
        "Optimizing Return Distributions with Distributional Dynamic Programming, arXiv:2501.13028 (section 6, D-eta-N)"
    )
    differs: ClassVar[str] = (
        "The paper's table of settings was not at hand: defaults are those of released code for static risk measures "
        "(50 quantiles, kappa 0.1, 120-84, learning rate 1e-3), with batches of 64 transitions at 8 stocks each. The "
        "stock is seen as gamma^t C_t beside gamma^t, which stays bounded, and through tanh steps over its range. Tied "
        "greedy actions enter the target as the mixture of their laws, which has their utility; averaging their "
        "quantiles would not. When acting, ties go to the better mean."
    )
    loop_defaults: ClassVar[Mapping[str, Any]] = {
        **CLEANRL, "learning_rate": 1e-3, "replay_size": 100_000, "batch_size": 64, "adam_eps": 0.01 / 128,
    }  # fmt: skip

    kappa: float = 0.1
    """Size of an error from which it counts linearly, not squared (Huber); it blurs atoms by about as much."""
    objective: Literal["cvar", "mean_cvar", "target", "exceedance", "mean"] = "cvar"
    """What is maximised, see :class:`ctrlrl.core.utility.Utility`."""
    level: float = 0.25
    """Share of the worst returns that mean_cvar averages; of cvar the level that choose_stock takes if it is given
    none."""
    mean_weight: float = 0.5
    """Weight of the mean in mean_cvar."""
    margin: float = 0.0
    """Forgiven shortfall of the threshold in exceedance: half the distance of possible returns is best, as the
    quantiles are never exact."""
    quantiles: int = 50
    """Quantiles per action, at the midpoints of as many equal parts of [0, 1]."""
    stock_low: float = -10.0
    """Least initial stock, in rewards."""
    stock_high: float = 10.0
    """Largest initial stock; each episode draws its own, uniformly."""
    stock_edits: int = 7
    """Copies of each transition at other initial stocks, for the environment does not see the stock."""
    stock_knots: int = 32
    """Steps over the range of stocks that the network sees beside the number itself."""
    tie_tolerance: float = 1e-4
    """Actions whose mean utilities, in the money of the first step, differ by no more count as equal."""
    finite_horizon: bool = False
    """The limit of steps belongs to the problem: it ends the episode for good, and the step's number is shown."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0.0 < self.level <= 1.0:
            raise ValueError(f"level={self.level} must lie in (0, 1]")
        if not 0.0 <= self.mean_weight <= 1.0:
            raise ValueError(f"mean_weight={self.mean_weight} must lie in [0, 1]")
        if self.quantiles < 2:
            raise ValueError(f"quantiles={self.quantiles} must be at least 2")
        if not self.stock_low < self.stock_high:
            raise ValueError(f"stock_low={self.stock_low} must be below stock_high={self.stock_high}")
        for name in ("margin", "stock_edits", "stock_knots", "tie_tolerance"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name}={getattr(self, name)} must not be negative")
        if self.margin and self.objective != "exceedance":
            raise ValueError(f"margin={self.margin} has no part in objective={self.objective!r}")

    @classmethod
    def agent_class(cls) -> type[TransitionAgent]:
        from ctrlrl.online.d_eta_n_agent import DEtaNAgent

        return DEtaNAgent

    @property
    def utility(self) -> Utility:
        """What is maximised."""
        return Utility(self.objective, self.level, self.mean_weight, self.margin, self.tie_tolerance)

    def networks(self, spaces: Spaces, config: TransitionConfig, encoder: Callable[..., nn.Module] | None) -> Networks:
        actor = StockActor(
            spaces.observation, spaces.action, config.network, encoder, utility=self.utility, quantiles=self.quantiles,
            stocks=(self.stock_low, self.stock_high), knots=self.stock_knots,
        )  # fmt: skip
        return Networks(actor, {}, {"actor_target": "actor"})

    def noise(
        self, n: int, batch_size: int, action_size: int, generator: torch.Generator, params: int = 0
    ) -> dict[str, Tensor]:
        """Uniform in [0, 1), [n, B, stock_edits]: where in their range the other initial stocks lie."""
        shape = (n, batch_size, self.stock_edits)
        return {STOCK: torch.rand(shape, generator=generator, device=generator.device)}

    def shifts(self, initial: Tensor, noise: Tensor) -> Tensor:
        """[B, 1 + stock_edits] what is added to gamma^t C_t at every step to begin with another stock; 0 comes first.

        gamma^t C_t is the initial stock and the discounted rewards so far, so that it moves as the initial stock does.
        """
        others = self.stock_low + (self.stock_high - self.stock_low) * noise
        return torch.cat([torch.zeros_like(initial).unsqueeze(1), others - initial.unsqueeze(1)], 1)

    def update(
        self, nets: Nets, batch: Transitions, noise: Mapping[str, Tensor], knobs: Mapping[str, Tensor], phase: int
    ) -> dict[str, Tensor]:
        obs, next_obs = cast(dict[str, Tensor], batch.obs), cast(dict[str, Tensor], batch.next_obs)
        shift = self.shifts(batch.extras[INITIAL], noise[STOCK])
        with torch.no_grad():
            stock = next_obs[STOCK] + shift
            returns = nets["actor_target"](next_obs, stock)
            utilities = self.utility.of(returns, stock, next_obs[DISCOUNT].expand_as(stock))
            ties = self.utility.ties(utilities).to(returns.dtype)
            weights = (ties / ties.sum(-1, keepdim=True) / self.quantiles).unsqueeze(-1).expand_as(returns)
            going_on = knobs["gamma"] * (1.0 - batch.terminated_t)
            # the return-to-go, without any stock
            atoms = batch.reward_t.view(-1, 1, 1, 1) + going_on.view(-1, 1, 1, 1) * returns

        def loss(actor: Callable[..., Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
            found = actor(obs, obs[STOCK] + shift)
            index = batch.action.view(-1, 1, 1, 1).expand(-1, found.shape[1], 1, self.quantiles)
            found = found.gather(2, index).squeeze(2)
            value = quantile_loss(found, atoms.flatten(2), self.kappa, weights.flatten(2)).mean()
            return value, {"critic_loss": value.detach(), "q": found.detach().mean()}

        metrics = nets.descend("actor", loss)
        self.follow(nets, knobs)
        return metrics | {"utility": utilities.amax(-1).mean()}
