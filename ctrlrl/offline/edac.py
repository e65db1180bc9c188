"""EDAC: SAC-N whose critics are kept apart by their slopes, so that few of them do."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from torch import Tensor, nn

from ctrlrl.engine.algorithm import Networks, Spaces, register
from ctrlrl.engine.config import ConfigError
from ctrlrl.offline.sac_n import SACN
from ctrlrl.types import Obs

if TYPE_CHECKING:
    from ctrlrl.engine.transition_config import TransitionConfig


@register
@dataclass(frozen=True)
class EDAC(SACN):
    """The critics' gradients at the data's actions are pushed apart: their values differ off the data."""

    differs: ClassVar[str] = (
        "eta is 1 with 10 critics, the paper's numbers on HalfCheetah medium; it chooses both for every data set. The "
        "penalty is over all pairs of critics, as in the paper; the released code takes pairs of as many critics, "
        "drawn anew for each update, as there are action dimensions."
    )

    eta: float = 1.0
    """Weight of the gradients' likeness; 0 is SAC-N."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.eta >= 0.0:
            raise ValueError(f"eta={self.eta} must not be negative")

    def networks(self, spaces: Spaces, config: TransitionConfig, encoder: Callable[..., nn.Module] | None) -> Networks:
        if self.eta > 0.0 and config.network.n_critics < 2:
            raise ConfigError(f"edac compares critics: n_critics={config.network.n_critics} must be at least 2")
        return super().networks(spaces, config, encoder)

    def values(self, critic: Callable[..., Tensor], obs: Obs, action: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        if self.eta == 0.0:
            return super().values(critic, obs, action)
        q, slopes = critic(obs, action, slopes=True)
        return q, {"likeness_loss": self.eta * likeness(slopes)}


def likeness(slopes: Tensor) -> Tensor:
    """Mean over the batch of 1/(E - 1) times the sum of cosines between members' gradients (An et al. 2021, section 4).

    Args:
        slopes: [E, B, A] gradients; a member whose gradient is zero counts as orthogonal to all.

    Returns:
        A scalar between -E/(E - 1) and E, which it is where all gradients point the same way.
    """
    units = nn.functional.normalize(slopes, dim=-1, eps=1e-10)
    # the sum over all pairs, without the E x E matrix
    pairs = units.sum(0).square().sum(-1) - units.square().sum((0, -1))
    return pairs.mean() / (slopes.shape[0] - 1)
