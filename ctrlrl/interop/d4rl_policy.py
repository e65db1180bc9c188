"""The behaviour policy that a D4RL file carries, as a policy.

What is known of ``metadata/policy`` (D4RL's scripts collect_data.py and hand_dapg_policies.py): the layers ``fc0``,
``fc1``, ``last_fc`` (the mean) and ``last_fc_log_std``, each with ``weight`` [out, in] as in torch and ``bias`` [out];
``nonlinearity`` is ``relu`` or ``tanh``; ``output_distribution`` is ``tanh_gaussian`` in the medium and expert sets of
locomotion (SAC of rlkit, which keeps the log standard deviation in [-20, 2]) and ``gaussian`` in the expert and cloned
sets of Adroit. Random, replay and medium-expert sets carry no policy. In the Adroit files that DAPG's script made
``last_fc_log_std`` is a copy of ``last_fc``, a slip; the standard deviation is then taken from
``infos/action_log_std``, where the file has it and it is one vector for all rows, as DAPG's is.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping
from typing import Any

import numpy as np

from ctrlrl.data import checks
from ctrlrl.data.dataset import DatasetError

LOG_STD_RANGE = (-20.0, 2.0)
_EDGE = 1.0 - 1e-6
"""rlkit keeps recorded actions that far inside before it inverts the tanh."""
_LOG_2_PI = float(np.log(2.0 * np.pi))
_NONLINEARITY = {"relu": lambda x: np.maximum(x, 0.0), "tanh": np.tanh}
_DISTRIBUTIONS = ("tanh_gaussian", "gaussian", "tanh", "deterministic")


class D4RLPolicy:
    """A perceptron with a Gaussian, tanh-Gaussian or deterministic output. Actions are the environment's, in [-1, 1].

    Args:
        layers: Hidden layers, each (weight [out, in], bias [out]).
        mean: The layer of the mean.
        log_std: The layer of the log standard deviation, one vector [action] of it, or None where it is not known.
        nonlinearity: ``relu`` or ``tanh``.
        distribution: ``tanh_gaussian``, ``gaussian``, ``tanh`` or ``deterministic``.
        seed: Of the sampling in :meth:`predict`.

    Attributes:
        agreement: Share of the rows checked by :func:`load` whose recorded log-density this policy gives; None
            without such rows.
    """

    agreement: float | None = None

    def __init__(
        self,
        layers: list[tuple[np.ndarray, np.ndarray]],
        mean: tuple[np.ndarray, np.ndarray],
        log_std: tuple[np.ndarray, np.ndarray] | np.ndarray | None,
        nonlinearity: str,
        distribution: str,
        seed: int = 0,
    ) -> None:
        if nonlinearity not in _NONLINEARITY:
            raise ValueError(f"nonlinearity={nonlinearity!r} is unknown; expected {' or '.join(_NONLINEARITY)}")
        if distribution not in _DISTRIBUTIONS:
            raise ValueError(f"output_distribution={distribution!r} is unknown; expected {', '.join(_DISTRIBUTIONS)}")
        self.layers, self.mean, self.log_std = layers, mean, log_std
        self.nonlinearity, self.distribution = nonlinearity, distribution
        self.squashed = distribution.startswith("tanh")
        self.observation_size = (layers[0] if layers else mean)[0].shape[1]
        self.action_size = mean[0].shape[0]
        self._noise = np.random.default_rng(seed)

    @property
    def stochastic(self) -> bool:
        """Whether it has a density: a Gaussian whose standard deviation is known."""
        return self.log_std is not None and self.distribution.endswith("gaussian")

    def predict(
        self,
        observation: Any,
        state: tuple[np.ndarray, ...] | None = None,
        episode_start: np.ndarray | None = None,
        deterministic: bool = False,
    ) -> tuple[np.ndarray, tuple[np.ndarray, ...] | None]:
        """Action [size] or [N, size] float32 at ``observation``, by sampling or the mode; ``state`` passes through.

        A plain Gaussian's actions are clipped to [-1, 1], as D4RL recorded them.

        Raises:
            ValueError: The observation does not fit.
            DatasetError: Sampling from a Gaussian whose standard deviation the file does not tell.
        """
        obs = np.asarray(observation, np.float64)
        if obs.ndim not in (1, 2) or obs.shape[-1] != self.observation_size:
            raise ValueError(f"observation has shape {obs.shape}; expected ({self.observation_size},) or (batch, same)")
        mean, log_std = self._outputs(np.atleast_2d(obs))
        if not deterministic and self.distribution.endswith("gaussian"):
            mean = mean + np.exp(self._known(log_std)) * self._noise.standard_normal(mean.shape)
        action = (np.tanh(mean) if self.squashed else np.clip(mean, -1.0, 1.0)).astype(np.float32)
        return (action if obs.ndim == 2 else action[0]), state

    def log_prob(self, obs: Any, actions: Any) -> np.ndarray:
        """[N] float64 log-density of ``actions`` [N, size] at ``obs`` [N, size], in the environment's units.

        tanh-Gaussian: log N(u; mean, std) - sum log(1 - tanh(u)^2) with u = artanh(a) (Haarnoja et al. 2018, appendix
        C); actions at the bounds are taken 1e-6 inside. A plain Gaussian's density is that of the action before D4RL
        clipped it: at a bound it is not the probability of the recorded action.

        Raises:
            DatasetError: The policy is deterministic, or the file does not tell its standard deviation.
        """
        if not self.distribution.endswith("gaussian"):
            raise DatasetError(f"a policy with output_distribution={self.distribution!r} has no density")
        mean, log_std = self._outputs(np.asarray(obs, np.float64))
        log_std = self._known(log_std)
        value = np.asarray(actions, np.float64)
        if value.shape != mean.shape:
            raise ValueError(f"actions has shape {value.shape}; expected {mean.shape}")
        volume = 0.0
        if self.squashed:
            value = np.arctanh(np.clip(value, -_EDGE, _EDGE))
            # log(1 - tanh(u)^2) without the cancellation
            volume = (2.0 * (np.log(2.0) - value - np.logaddexp(0.0, -2.0 * value))).sum(-1)
        z = (value - mean) * np.exp(-log_std)
        return np.asarray((-0.5 * (z**2 + _LOG_2_PI) - log_std).sum(-1) - volume)

    def _outputs(self, obs: np.ndarray) -> tuple[np.ndarray, np.ndarray | None]:
        """Mean and log standard deviation before the squashing, each [N, size]."""
        x = obs
        for weight, bias in self.layers:
            x = _NONLINEARITY[self.nonlinearity](x @ weight.T + bias)
        mean = x @ self.mean[0].T + self.mean[1]
        if self.log_std is None or isinstance(self.log_std, np.ndarray):
            return mean, self.log_std
        return mean, np.clip(x @ self.log_std[0].T + self.log_std[1], *LOG_STD_RANGE)

    def _known(self, log_std: np.ndarray | None) -> np.ndarray:
        if log_std is None:
            raise DatasetError(
                "the file does not tell this policy's standard deviation (its log-std layer is missing or a copy of "
                "the mean's, and infos/action_log_std is absent or varies); predict with deterministic=True works"
            )
        return log_std


def load(path: str | os.PathLike[str], *, seed: int = 0, check: int = 1000) -> D4RLPolicy:
    """The policy in ``metadata/policy`` of the D4RL file at ``path``.

    Where the file has ``infos/action_log_probs`` too, up to ``check`` rows of it are compared with :meth:`log_prob`
    (rows with an action within 0.001 of a bound are passed over: there float32 keeps too little of it).

    Warns:
        UserWarning: Fewer than nine tenths of these rows agree: the file mixes policies, or writes them otherwise.

    Raises:
        DatasetError: There is no policy in the file, or it is incomplete or misshapen.
        ImportError: h5py is missing.
    """
    with checks.opened(path) as file:
        group = file.get("metadata/policy")
        if group is None or not hasattr(group, "keys"):
            raise DatasetError(
                f"{path}: it holds no policy (metadata/policy). D4RL has them in the medium and expert sets of "
                "locomotion (v1, v2) and in the expert and cloned sets of Adroit"
            )
        rows = {k: file[k][:check] for k in ("observations", "actions", "infos/action_log_probs") if k in file}
        spread = np.asarray(file["infos/action_log_std"][:check]) if "infos/action_log_std" in file else None
        policy = _build(group, rows.get("observations"), spread, str(path), seed)
    if policy.stochastic and len(rows) == 3:
        _compare(policy, rows, str(path))
    return policy


def _build(group: Any, obs: np.ndarray | None, spread: np.ndarray | None, path: str, seed: int) -> D4RLPolicy:
    names = sorted((k for k in group if k.startswith("fc") and k[2:].isdigit()), key=lambda k: int(k[2:]))
    if names != [f"fc{k}" for k in range(len(names))]:
        raise DatasetError(f"{path}: metadata/policy has the layers {names}; expected fc0, fc1, ... without gaps")
    layers = {k: _layer(group, k, path) for k in (*names, "last_fc", "last_fc_log_std") if k in group}
    if "last_fc" not in layers:
        raise DatasetError(f"{path}: metadata/policy/last_fc is missing; found {', '.join(sorted(group))}")
    layers = _oriented(layers, path)
    order = [layers[k] for k in (*names, "last_fc")]
    sizes = [w.shape[1] for w, _ in order], [w.shape[0] for w, _ in order]
    if sizes[0][1:] != sizes[1][:-1] or (obs is not None and obs.shape[1:] != (sizes[0][0],)):
        found = ", ".join(f"{k} {layers[k][0].shape}" for k in (*names, "last_fc"))
        rows = "" if obs is None else f" and observations of {obs.shape[1:]}"
        raise DatasetError(f"{path}: the layers of metadata/policy do not fit one another{rows}: {found}")
    mean, log_std = layers["last_fc"], layers.get("last_fc_log_std")
    if log_std is not None and (log_std[0].shape != mean[0].shape or np.array_equal(log_std[0], mean[0])):
        log_std = None
    if log_std is None and spread is not None and spread.shape[1:] == mean[1].shape:
        vectors = np.unique(spread, axis=0)
        log_std = vectors[0].astype(np.float64) if len(vectors) == 1 else None
    words = {k: _word(group, k, path) for k in ("nonlinearity", "output_distribution")}
    try:
        return D4RLPolicy(order[:-1], mean, log_std, words["nonlinearity"], words["output_distribution"], seed)
    except ValueError as error:
        raise DatasetError(f"{path}: metadata/policy: {error}") from error


def _layer(group: Any, name: str, path: str) -> tuple[np.ndarray, np.ndarray]:
    try:
        weight, bias = (np.asarray(group[name][k][()]).astype(np.float64) for k in ("weight", "bias"))
    except (KeyError, TypeError, ValueError) as error:
        raise DatasetError(f"{path}: metadata/policy/{name} is no layer of weight and bias: {error}") from error
    if weight.ndim != 2 or bias.ndim != 1 or len(bias) not in weight.shape:
        shapes = f"weight {weight.shape} and bias {bias.shape}"
        raise DatasetError(f"{path}: metadata/policy/{name} has {shapes}; expected [out, in] and [out]")
    if not (np.isfinite(weight).all() and np.isfinite(bias).all()):
        raise DatasetError(f"{path}: metadata/policy/{name} holds NaN or infinite numbers")
    return weight, bias


def _oriented(
    layers: Mapping[str, tuple[np.ndarray, np.ndarray]], path: str
) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """The layers with weights [out, in]. Which way the file writes them is told by those that are not square."""
    ways = {w.shape[0] == len(b) for w, b in layers.values() if w.shape[0] != w.shape[1]}
    if len(ways) > 1:
        raise DatasetError(f"{path}: some weights of metadata/policy are [out, in] and some are [in, out]")
    return dict(layers) if ways != {False} else {k: (w.T, b) for k, (w, b) in layers.items()}


def _word(group: Any, key: str, path: str) -> str:
    value = np.asarray(group[key][()]).reshape(-1) if key in group else np.array([])
    if len(value) != 1 or not isinstance(value[0], bytes | str):
        raise DatasetError(f"{path}: metadata/policy/{key} is missing or no word")
    return value[0].decode(errors="replace") if isinstance(value[0], bytes) else str(value[0])


def _compare(policy: D4RLPolicy, rows: Mapping[str, np.ndarray], path: str) -> None:
    inside = np.asarray((np.abs(rows["actions"]) < 0.999).all(axis=1))
    if not inside.any():
        return
    recorded = rows["infos/action_log_probs"].reshape(len(inside))[inside].astype(np.float64)
    found = policy.log_prob(rows["observations"][inside], rows["actions"][inside])
    policy.agreement = float((np.abs(found - recorded) <= 0.05 + 0.01 * np.abs(recorded)).mean())
    if policy.agreement < 0.9:
        warnings.warn(
            f"{path}: its policy gives the recorded infos/action_log_probs in {policy.agreement:.0%} of "
            f"{len(recorded)} rows; the file mixes policies, or the policy is not the one that acted",
            stacklevel=3,
        )
