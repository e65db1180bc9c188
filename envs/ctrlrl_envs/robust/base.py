"""What the robust environments share: parameters that change a MuJoCo model, and the environment that sets them."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import islice, product
from typing import Any, ClassVar, Literal

import gymnasium as gym
import mujoco
import numpy as np
from gymnasium.envs.mujoco import MujocoEnv
from gymnasium.utils import EzPickle

__all__ = ["Force", "Friction", "Mass", "Parameter", "RobustEnv", "evaluation_grid"]

_SIZES = {"1d": 1, "2d": 2, "3d": 3}
FRICTION_MODES = ("contact", "floor")


@dataclass(frozen=True)
class Mass:
    """Mass of a body in kg; ``scale_inertia`` scales its inertia with it."""

    body: str
    low: float
    high: float

    def nominal(self, env: RobustEnv) -> float:
        """The model's own mass."""
        return float(env.original.body(self.body).mass[0])

    def write(self, env: RobustEnv, value: float) -> None:
        """Put the mass into the model, whose derived constants are then out of date."""
        body = env.model.body(self.body).id
        env.model.body_mass[body] = value
        if env.scale_inertia:
            env.model.body_inertia[body] = env.original.body_inertia[body] * (value / self.nominal(env))


@dataclass(frozen=True)
class Friction:
    """Sliding friction between the floor and the robot; ``friction_mode`` says of which geoms."""

    foot: str
    """The geom that stands on the floor."""
    low: float
    high: float
    all_geoms: bool = False
    """Both modes set all geoms."""

    def nominal(self, env: RobustEnv) -> float:
        """The model's own friction of the floor (mode "floor") or of the contact of foot and floor."""
        floor, foot = (float(env.original.geom(name).friction[0]) for name in ("floor", self.foot))
        # MuJoCo takes the larger of the two coefficients
        return floor if env.friction_mode == "floor" else max(floor, foot)

    def write(self, env: RobustEnv, value: float) -> None:
        """Put the friction into the model; the nominal value brings back the model's own of every geom."""
        geoms = slice(None) if self.all_geoms or env.friction_mode == "contact" else env.model.geom("floor").id
        nominal = value == self.nominal(env)
        env.model.geom_friction[geoms, 0] = env.original.geom_friction[geoms, 0] if nominal else value


@dataclass(frozen=True)
class Force:
    """External force on a body's centre of mass in N, along a world axis (0, 1, 2 = x, y, z)."""

    body: str
    axis: int
    low: float = -3.0
    high: float = 3.0

    def nominal(self, env: RobustEnv) -> float:
        """No force."""
        return 0.0

    def write(self, env: RobustEnv, value: float) -> None:
        """Put the force into the state, where it acts until ``mj_resetData``."""
        env.data.xfrc_applied[env.model.body(self.body).id, self.axis] = value


Parameter = Mass | Friction | Force


class RobustEnv(MujocoEnv, EzPickle):
    """A Gymnasium MuJoCo environment whose physics can be set; to be inherited before Gymnasium's class.

    Until a parameter is set nothing of the model is changed, and setting all to ``nominal`` brings it back exactly.
    A change of mass renews the model's derived constants (``mj_setConst``: subtree masses, inverse inertias, solver
    scales) on scratch data, as if the model had been compiled with it; RRLS leaves them at their old values.

    Args:
        uncertainty: Parameters that can be set: ``"1d"``, ``"2d"``, ``"3d"`` (the first ones) or ``"force"``.
        friction_mode: ``"contact"`` sets the friction of all geoms, so that the contact has the value asked for.
            ``"floor"`` sets the floor's alone, as published: MuJoCo takes the larger of the two geoms' coefficients,
            so that values below the foot's (Hopper 2.0, Walker2d 1.9) change nothing. The nominal value is that of
            the foot's contact or of the floor, and brings back every geom's own, which differ. HalfCheetah sets all
            geoms in both modes; a set without friction has no use for this.
        scale_inertia: Scale a body's inertia with its mass. The published sets leave it: a light body stays as hard
            to turn as a heavy one.
        params: Parameters to begin with; the others are nominal.
        randomize: Draw all parameters uniformly from ``parameter_space`` at every reset, from the environment's
            seeded stream, before the initial state. Ends with the first :meth:`set_params`; set the attribute
            ``randomize`` to True to go on.
        kwargs: Those of Gymnasium's environment.

    Raises:
        ValueError: Unknown set or mode, ``params`` outside the set, or ``params`` together with ``randomize``.
    """

    physics: ClassVar[Mapping[str, Parameter]]
    """The parameters of the sets 1d, 2d and 3d, in order."""
    alone: ClassVar[Mapping[str, Parameter]] = {}
    """The first parameter where its range in 1d is another."""
    forces: ClassVar[Mapping[str, Parameter]]
    """The parameters of the set "force"."""

    parameter_space: gym.spaces.Dict
    """What can be set: one Box of shape () and type float64 for each parameter."""
    nominal: dict[str, float]
    """The model's own values; they may lie outside ``parameter_space``."""

    def __init__(
        self,
        uncertainty: Literal["1d", "2d", "3d", "force"] = "2d",
        *,
        friction_mode: Literal["contact", "floor"] = "contact",
        scale_inertia: bool = False,
        params: Mapping[str, float] | None = None,
        randomize: bool = False,
        **kwargs: Any,
    ) -> None:
        self.parameters = self.uncertainty_set(uncertainty)
        if friction_mode not in FRICTION_MODES:
            raise ValueError(f"friction_mode={friction_mode!r} is unknown; expected one of {', '.join(FRICTION_MODES)}")
        if params is not None and randomize:
            raise ValueError("params fixes the parameters and randomize=True draws them; give one of the two")
        super().__init__(**kwargs)
        self.uncertainty, self.friction_mode, self.scale_inertia = uncertainty, friction_mode, scale_inertia
        self.randomize = randomize
        self.original = copy.copy(self.model)
        # a list of pairs, as a mapping's keys are sorted
        self.parameter_space = gym.spaces.Dict(
            [(name, gym.spaces.Box(p.low, p.high, (), np.float64)) for name, p in self.parameters.items()]
        )
        self.nominal = {name: p.nominal(self) for name, p in self.parameters.items()}
        self._params = dict(self.nominal)
        own = {"uncertainty": uncertainty, "friction_mode": friction_mode, "scale_inertia": scale_inertia}
        EzPickle.__init__(self, **own, **kwargs)
        if params is not None:
            self.set_params(params)

    def uncertainty_set(self, name: str) -> dict[str, Parameter]:
        """The parameters of a set, in order.

        Raises:
            ValueError: There is no such set.
        """
        if name == "force":
            return dict(self.forces)
        known = [size for size, d in _SIZES.items() if d <= len(self.physics)]
        if name not in known:
            raise ValueError(f"{type(self).__name__} has no uncertainty={name!r}; it has {', '.join(known)} and force")
        found = dict(islice(self.physics.items(), _SIZES[name]))
        return found | dict(self.alone) if name == "1d" else found

    @property
    def params(self) -> dict[str, float]:
        """The parameters as they are now (a copy)."""
        return dict(self._params)

    def set_params(self, params: Mapping[str, float]) -> None:
        """Set the named parameters and keep the others as they are now; ends ``randomize``.

        They act from the next step on and hold over resets until set again.

        Args:
            params: Values by name, inside ``parameter_space`` or exactly nominal.

        Raises:
            ValueError: Unknown name, not a number, or outside its range; then nothing is changed.
        """
        self._write(self.checked(params))
        self.randomize = False

    def checked(self, params: Mapping[str, float]) -> dict[str, float]:
        """``params`` as floats, refused as in :meth:`set_params`."""
        if not isinstance(params, Mapping):
            raise ValueError(f"parameters must be a mapping of names to numbers, found {params!r}")
        return {name: self._value(name, value) for name, value in params.items()}

    def _value(self, name: str, value: Any) -> float:
        if name not in self.parameters:
            known = ", ".join(self.parameters)
            raise ValueError(f"unknown parameter {name!r}; {type(self).__name__} ({self.uncertainty}) has {known}")
        p, nominal = self.parameters[name], self.nominal[name]
        number = np.asarray(value)
        if number.shape != () or number.dtype.kind not in "iuf":
            raise ValueError(f"{name}={value!r} is not a number; expected one in [{p.low}, {p.high}]")
        if not (p.low <= number <= p.high or number == nominal):
            raise ValueError(f"{name}={value!r} is outside [{p.low}, {p.high}] and not the nominal {nominal!r}")
        return float(number)

    def _write(self, params: Mapping[str, float]) -> None:
        for name, value in params.items():
            self.parameters[name].write(self, value)
        self._params.update(params)
        if any(isinstance(self.parameters[name], Mass) for name in params):
            mujoco.mj_setConst(self.model, mujoco.MjData(self.model))  # type: ignore[attr-defined]

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[np.ndarray, dict[str, Any]]:
        """Start an episode; ``info["params"]`` are the parameters it has.

        Args:
            seed: Seeds the initial state, and the parameters with ``randomize``.
            options: ``{"params": {...}}`` calls :meth:`set_params` first; other keys are ignored.
        """
        if options is not None and "params" in options:
            self.set_params(options["params"])
        obs, info = super().reset(seed=seed, options=options)
        return obs, {**info, "params": self.params}

    def reset_model(self) -> np.ndarray:
        """The initial state, under the parameters of this episode; MuJoCo's data was cleared just before."""
        if self.randomize:
            boxes = self.parameters.values()
            drawn = self.np_random.uniform([p.low for p in boxes], [p.high for p in boxes])
            self._write(dict(zip(self.parameters, drawn.tolist(), strict=True)))
        for name, p in self.parameters.items():
            if isinstance(p, Force):
                p.write(self, self._params[name])
        return super().reset_model()

    def __getstate__(self) -> dict[str, Any]:
        """As Gymnasium's: a copy is built anew with the same arguments; it has the parameters set here."""
        state = super().__getstate__()
        now: dict[str, Any] = {"randomize": True} if self.randomize else {"params": self.params}
        return {**state, "_ezpickle_kwargs": {**state["_ezpickle_kwargs"], **now}}


def evaluation_grid(
    parameter_space: gym.spaces.Dict, points: int = 10, convention: Literal["m2td3", "rrls"] = "m2td3"
) -> list[dict[str, float]]:
    """Parameters on a regular grid over ``parameter_space``, as the robust suites evaluate.

    Args:
        parameter_space: Of scalar boxes, as the robust environments have it.
        points: In each dimension, evenly spaced from the lower end.
        convention: ``"m2td3"`` includes the upper end (Tanabe et al. 2022), ``"rrls"`` leaves it out (RRLS's code).

    Returns:
        points^d mappings; the first parameter changes slowest.
    """
    if convention not in ("m2td3", "rrls"):
        raise ValueError(f"convention={convention!r} is unknown; expected one of m2td3, rrls")
    if not isinstance(points, int) or points < 2:
        raise ValueError(f"points={points!r} must be an integer of at least 2")
    axes: Sequence[list[float]] = [
        np.linspace(box.low.item(), box.high.item(), points, endpoint=convention == "m2td3").tolist()  # type: ignore[attr-defined]
        for box in parameter_space.spaces.values()
    ]
    return [dict(zip(parameter_space.spaces, values, strict=True)) for values in product(*axes)]
