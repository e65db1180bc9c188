"""The uncertainty set of a ParametricEnv: its unit cube, and the grids over which robust methods are evaluated."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any, Literal, TypeAlias, get_args

import gymnasium as gym
import numpy as np
from numpy.typing import ArrayLike

from ctrlrl.engine import environments
from ctrlrl.types import EnvSpec

Convention: TypeAlias = Literal["m2td3", "rrls"]
"""Whether grids include the upper ends: M2TD3's do (arXiv 2211.03413), RRLS's do not (arXiv 2406.08406)."""

Params: TypeAlias = dict[str, float]


@dataclass(frozen=True)
class UncertaintySet:
    """A box of parameters, in the order of the environment's ``parameter_space``."""

    names: tuple[str, ...]
    """[d]"""
    low: np.ndarray
    """[d] in the parameters' own units."""
    high: np.ndarray
    """[d] in the parameters' own units."""
    nominal: Params
    """The environment's own values; they may lie outside the box."""

    @property
    def dim(self) -> int:
        """Number of parameters."""
        return len(self.names)

    def from_unit(self, points: ArrayLike) -> list[Params]:
        """Points [..., d] of the unit cube as parameters, one mapping each, in row-major order.

        Raises:
            ValueError: Another last dimension than d, or a coordinate outside [0, 1].
        """
        u = np.asarray(points, dtype=np.float64)
        if u.ndim == 0 or u.shape[-1] != self.dim:
            raise ValueError(f"points have shape {u.shape}; expected (..., {self.dim}) for {', '.join(self.names)}")
        if not ((u >= 0) & (u <= 1)).all():
            raise ValueError(f"points of the unit cube must lie in [0, 1], found {u.min()} to {u.max()}; clip them")
        # low + (high - low) may round to above high, which an environment refuses
        values = np.clip(self.low + u * (self.high - self.low), self.low, self.high)
        return [dict(zip(self.names, row, strict=True)) for row in values.reshape(-1, self.dim).tolist()]

    def to_unit(self, params: Mapping[str, float] | Sequence[Mapping[str, float]]) -> np.ndarray:
        """Parameters as coordinates of the unit cube: [d] of one mapping, [n, d] of several.

        Values outside the box, as the nominal ones may be, lie outside [0, 1].

        Raises:
            ValueError: The names are not those of the set.
        """
        each = [params] if isinstance(params, Mapping) else list(params)
        for one in each:
            if set(one) != set(self.names):
                raise ValueError(f"parameters are {', '.join(one) or 'none'}; expected {', '.join(self.names)}")
        values = np.array([[one[name] for name in self.names] for one in each], dtype=np.float64)
        unit = (values.reshape(-1, self.dim) - self.low) / (self.high - self.low)
        return unit[0] if isinstance(params, Mapping) else unit

    def axes(self, points: int = 10, convention: Convention = "m2td3") -> list[np.ndarray]:
        """The values [points] of each parameter on a regular grid, evenly spaced from the lower end.

        Raises:
            ValueError: Fewer than two points, or an unknown convention.
        """
        if convention not in get_args(Convention):
            raise ValueError(f"convention={convention!r} is unknown; expected one of {', '.join(get_args(Convention))}")
        if not isinstance(points, int) or points < 2:
            raise ValueError(f"points={points!r} must be an integer of at least 2")
        end = convention == "m2td3"
        return [np.linspace(lo, hi, points, endpoint=end) for lo, hi in zip(self.low, self.high, strict=True)]

    def grid(self, points: int = 10, convention: Convention = "m2td3") -> list[Params]:
        """The points^d parameters of a regular grid; the first parameter changes slowest. See :meth:`axes`."""
        return cells(self.names, self.axes(points, convention))


def cells(names: Sequence[str], axes: Sequence[np.ndarray]) -> list[Params]:
    """All combinations of the values of each axis; the first changes slowest."""
    return [dict(zip(names, values, strict=True)) for values in product(*(axis.tolist() for axis in axes))]


def of(env: str | EnvSpec | environments.Live) -> UncertaintySet:
    """The uncertainty set of an environment (see ``ctrlrl.types.ParametricEnv``), found through its wrappers.

    Args:
        env: Id or EnvSpec, of which one environment is built for a moment; or a live environment. Of a vector
            environment, whose members share one set, the first is asked; they must run in this process.

    Raises:
        ValueError: The environment has no such set; says what is missing.
    """
    if isinstance(env, str | EnvSpec):
        spec = environments.resolve(env, n_envs=1, backend="sync")
        assert isinstance(spec, EnvSpec)
        one = environments.build_env(spec)
        try:
            return of(one)
        finally:
            one.close()
    name = getattr(env, "name", None) or (env.spec.id if env.spec is not None else type(env).__name__)
    members = getattr(env, "envs", None)
    found = members[0] if isinstance(env, gym.vector.VectorEnv) and members else env

    def attribute(name: str) -> Any:
        if isinstance(found, gym.Env):
            return found.get_wrapper_attr(name) if found.has_wrapper_attr(name) else None
        return getattr(found, name, None)

    missing = [name for name in ("parameter_space", "nominal", "set_params") if attribute(name) is None]
    if missing:
        raise ValueError(
            f"{name} has no uncertainty set: it lacks {', '.join(missing)} (ctrlrl.types.ParametricEnv). Take an "
            "environment (env=, --env) whose parameters can be set, for example ctrlrl/RobustHopper-v0"
        )
    return _from_space(attribute("parameter_space"), attribute("nominal"), name)


def keeper(env: gym.vector.VectorEnv | None) -> Callable[[], None]:
    """What gives a live environment its present parameters back (and its ``randomize``), when it is called.

    Members that do not show their parameters (``params``) get the nominal ones.
    """
    undo: list[Callable[[], None]] = []
    for member in getattr(env, "envs", []):

        def give_back(member: gym.Env = member, attributes: Mapping[str, Any] = _shown(member)) -> None:
            member.get_wrapper_attr("set_params")(attributes["params"])
            if "randomize" in attributes:
                member.set_wrapper_attr("randomize", attributes["randomize"])

        undo.append(give_back)

    def all_back() -> None:
        for one in undo:
            one()

    return all_back


def _shown(member: gym.Env) -> dict[str, Any]:
    shown = {k: member.get_wrapper_attr(k) for k in ("params", "randomize") if member.has_wrapper_attr(k)}
    return {"params": member.get_wrapper_attr("nominal")} | shown


def _from_space(space: Any, nominal: Mapping[str, float], name: str) -> UncertaintySet:
    spaces = space.spaces if isinstance(space, gym.spaces.Dict) else {}
    boxes = {k: b for k, b in spaces.items() if isinstance(b, gym.spaces.Box) and b.shape == ()}
    low, high = (np.array([getattr(b, end) for b in boxes.values()], np.float64) for end in ("low", "high"))
    if not boxes or len(boxes) < len(spaces) or not (np.isfinite(high - low) & (low < high)).all():
        raise ValueError(
            f"{name}: parameter_space is {space}; expected a gymnasium Dict of scalar Boxes (shape ()) with finite "
            "low < high, one for each parameter"
        )
    if set(nominal) != set(boxes):
        raise ValueError(f"{name}: nominal has {', '.join(nominal)}; expected {', '.join(boxes)} as parameter_space")
    return UncertaintySet(tuple(boxes), low, high, {k: float(nominal[k]) for k in boxes})
