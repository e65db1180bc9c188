"""The wrapper that tells a policy its stock: what a return began with and has collected so far."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from numbers import Real
from typing import Any

import gymnasium as gym
import numpy as np

from ctrlrl.nets.causal import OBSERVATION, TIMESTEP
from ctrlrl.nets.discrete import DISCOUNT, STOCK
from ctrlrl.types import EnvSpec


class Stock(gym.Wrapper, gym.utils.RecordConstructorArgs):
    """Tells the policy the stock and the discount of the step, so that it can act for more than the mean return.

    The stock C of the method follows C' = (C + R) / gamma, so that C_0 + sum_k gamma^k R_(k+1) = gamma^t (C_t + G_t) at
    every step t, with the return-to-go G. It grows like gamma^-t; what is told is gamma^t C_t = C_0 + sum_(k < t)
    gamma^k R_(k+1), which does not, and gamma^t beside it. C_t is the quotient of the two.

    The observation becomes a Dict of ``observation``, ``stock`` ([m] float32, in the reward's units, m = 1 but for a
    vector reward), ``discount`` ([1] float32: gamma^t) and, if asked for, ``timestep`` ([1] int64, from 0 on). A Dict
    keeps its own entries instead of the first. Rewards are the environment's own, and the stock is none of them.

    ``reset(options={"stock": x})`` begins one episode with ``x``, a number or [m]. What is drawn from a range comes
    from a generator of its own, which ``reset(seed=...)`` seeds: the environment's numbers are those without the
    wrapper.

    Source: Avila Pires et al. 2025, Optimizing Return Distributions with Distributional Dynamic Programming
    (arXiv:2501.13028), section 3; the scaling is ours.

    Args:
        env: The environment.
        initial: C_0, a number or a range [low, high] to draw each episode's from uniformly. With ``key`` a list of m of
            these, one for each component.
        gamma: Discount, in (0, 1]; that of the agent.
        key: Entry of the step's info with a vector reward [m]; None takes the scalar reward.
        timestep: Tell the number of the step.
        finite_horizon: The limit of steps belongs to the problem: where the environment truncates, the episode is told
            to have terminated, so that nothing is expected after it. Set ``timestep`` too, unless gamma < 1 tells it.

    Raises:
        ValueError: Arguments outside of these ranges, an observation that has such an entry already, or a step whose
            info lacks the vector reward or has another number of components.
    """

    def __init__(
        self,
        env: gym.Env,
        initial: float | Sequence[Any] = 0.0,
        gamma: float = 1.0,
        key: str | None = None,
        timestep: bool = False,
        finite_horizon: bool = False,
    ) -> None:
        if not (_is_number(gamma) and 0 < gamma <= 1):
            raise ValueError(f"gamma={gamma!r} must be above 0 and at most 1")
        gym.utils.RecordConstructorArgs.__init__(
            self, initial=initial, gamma=gamma, key=key, timestep=timestep, finite_horizon=finite_horizon
        )
        gym.Wrapper.__init__(self, env)
        self.gamma, self.key, self.finite_horizon = float(gamma), key, finite_horizon
        self._low, self._high = _bounds(initial, key is not None)
        self.observation_space = stocked_space(env.observation_space, len(self._low), timestep)
        self._tells_timestep = timestep
        self._draws = np.random.default_rng()
        self._stock, self._discount, self._steps = self._low, 1.0, 0

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        if seed is not None:
            # not the environment's own stream, whose numbers would come again
            self._draws = np.random.default_rng([seed, 0x570C])
        given = None
        if options is not None and STOCK in options:
            given = _vector("options['stock']", options[STOCK], len(self._low))
            options = {k: v for k, v in options.items() if k != STOCK} or None
        obs, info = self.env.reset(seed=seed, options=options)
        # drawn even if it is given, so that later episodes do not depend on whether it was
        drawn = self._low + (self._high - self._low) * self._draws.random(len(self._low))
        self._stock, self._discount, self._steps = drawn if given is None else given, 1.0, 0
        return self._tell(obs), info

    def step(self, action: Any) -> tuple[Any, Any, bool, bool, dict[str, Any]]:
        obs, reward, terminated, truncated, info = self.env.step(action)
        self._stock = self._stock + self._discount * self._collected(reward, info)
        self._discount *= self.gamma
        self._steps += 1
        if self.finite_horizon and truncated:
            terminated, truncated = True, False
        return self._tell(obs), reward, terminated, truncated, info

    def _collected(self, reward: Any, info: Mapping[str, Any]) -> np.ndarray:
        if self.key is None:
            return np.array([float(reward)])
        if self.key not in info:
            raise ValueError(f"the step's info has no {self.key!r}, the vector reward; it has {sorted(info)}")
        return _vector(f"info[{self.key!r}]", info[self.key], len(self._low))

    def _tell(self, obs: Any) -> dict[str, Any]:
        own = obs if isinstance(obs, Mapping) else {OBSERVATION: obs}
        told = {**own, STOCK: self._stock.astype(np.float32), DISCOUNT: np.array([self._discount], np.float32)}
        return {**told, TIMESTEP: np.array([self._steps], np.int64)} if self._tells_timestep else told


def stocked_space(space: gym.Space, components: int = 1, timestep: bool = False) -> gym.spaces.Dict:
    """The space of what :class:`Stock` tells of observations of ``space``.

    Raises:
        ValueError: It has one of the entries already.
    """
    own = dict(space.spaces) if isinstance(space, gym.spaces.Dict) else {OBSERVATION: space}
    added: dict[str, gym.Space] = {
        STOCK: gym.spaces.Box(-np.inf, np.inf, (components,), np.float32),
        DISCOUNT: gym.spaces.Box(0.0, 1.0, (1,), np.float32),
    }
    if timestep:  # a wider one cannot be sampled
        added[TIMESTEP] = gym.spaces.Box(0, np.iinfo(np.int32).max, (1,), np.int64)
    if taken := own.keys() & added.keys():
        raise ValueError(f"the observation has the entry {', '.join(sorted(taken))} already; rename it")
    return gym.spaces.Dict({**own, **added})


def _is_number(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)


def _bounds(initial: Any, vector: bool) -> tuple[np.ndarray, np.ndarray]:
    """Least and largest first stock, [m] each."""
    expected = "a number or a range [low, high]" + (" for each component of the vector reward, in a list" * vector)
    whole = list(initial) if vector and isinstance(initial, Sequence | np.ndarray) else [] if vector else [initial]
    pairs = [[part, part] if _is_number(part) else part for part in whole]
    if not pairs or not all(isinstance(p, Sequence | np.ndarray) and len(p) == 2 and all(map(_is_number, p)) and
                            p[0] <= p[1] for p in pairs):  # fmt: skip
        raise ValueError(f"initial={initial!r} must be {expected}")
    low, high = np.array(pairs, np.float64).T
    return low, high


def _vector(name: str, value: Any, components: int) -> np.ndarray:
    """``value`` as [components] float64, finite."""
    found = np.atleast_1d(np.array(value, np.float64))
    if found.shape != (components,) or not np.isfinite(found).all():
        raise ValueError(f"{name} is {value!r}; expected {components} finite number{'s' * (components > 1)}")
    return found


PATH = f"{__name__}:Stock"


def stock_of(env: str | EnvSpec) -> Any:
    """The ``initial`` stock of ``env``, a number or ranges as :class:`Stock` takes them; None where it has no stock."""
    found = _arguments(env)
    return None if found is None else found.get("initial", 0.0)


def stocked(env: str | EnvSpec, **arguments: Any) -> EnvSpec:
    """``env`` in :class:`Stock` with these arguments, in its place among the wrappers where it is in one already.

    Arguments that are not named keep what they are there, as in ``stocked(env, initial=-1.0)``.
    """
    spec = EnvSpec(env) if isinstance(env, str) else env
    known = _arguments(spec)
    if known is None:
        return dataclasses.replace(spec, wrappers=(*spec.wrappers, (PATH, arguments)))
    changed = (PATH, {**known, **arguments})
    wrappers = tuple(changed if wrapper[0] == PATH else wrapper for wrapper in spec.wrappers)
    return dataclasses.replace(spec, wrappers=wrappers)


def _arguments(env: str | EnvSpec) -> dict[str, Any] | None:
    wrappers = () if isinstance(env, str) else env.wrappers
    return next((kwargs for path, kwargs in wrappers if path == PATH), None)
