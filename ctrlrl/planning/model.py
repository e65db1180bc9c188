"""One finite decision process: transition rows and rewards of every state and action, float64."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from numpy.typing import ArrayLike, NDArray

Array: TypeAlias = NDArray[np.float64]
IntArray: TypeAlias = NDArray[np.int64]
Table: TypeAlias = Mapping[int, Mapping[int, list[tuple[float, int, float, bool]]]]
"""What ``env.unwrapped.P`` of a toy-text environment holds: (probability, next state, reward, terminated)."""

ROW_TOLERANCE = 1e-8
"""How far the probabilities of a row may be from summing to one."""


@dataclass(frozen=True)
class Model:
    """Transition rows [S, A, B] over ``B`` successors each, and expected rewards [S, A]. Build it with ``Model.of``.

    Every array may have a leading axis [M] more: a stack of models, on which the methods work as on one.
    """

    probability: Array
    """[S, A, B] probability of each successor."""

    reward: Array
    """[S, A] expected reward of a step."""

    next_state: IntArray | None = None
    """[S, A, B] the successors; None: every state in turn (B = S)."""

    @classmethod
    def of(cls, transition: object, reward: ArrayLike, terminal: ArrayLike = (), name: str = "transition") -> Model:
        """A checked model, with its terminal states made absorbing and free of reward.

        Shapes: ``transition`` [S, A, S], or a pair (next_state [S, A, B], probability [S, A, B]) where rows are
        sparse; ``reward`` [S, A], or [S, A, S] where it depends on the successor; ``terminal`` indices of states.
        ``name`` opens every message. Raises ValueError on wrong shapes, states that do not exist, numbers that are
        not finite, and rows that are no distributions.
        """
        to, probability = _branches(transition, name)
        states, actions = probability.shape[:2]
        expected = np.array(reward, dtype=np.float64)
        if expected.shape == (states, actions, states):
            if not np.isfinite(expected).all():
                raise ValueError(f"{name}: rewards contain NaN or infinity")
            seen = expected if to is None else np.take_along_axis(expected, to, axis=-1)
            expected = (probability * seen).sum(-1)
        if expected.shape != (states, actions):
            shapes = f"[{states}, {actions}] or [{states}, {actions}, {states}]"
            raise ValueError(f"{name}: rewards have shape {list(expected.shape)}; expected {shapes} ([S, A(, S])")
        if not np.isfinite(expected).all():
            raise ValueError(f"{name}: rewards contain NaN or infinity")
        for state in terminal_states(terminal, states):
            expected[state] = 0.0
            probability[state] = 0.0
            probability[state, :, state if to is None else 0] = 1.0
            if to is not None:
                to[state] = state
        return cls(probability, expected, to)

    @classmethod
    def of_table(cls, table: Table, name: str = "table") -> Model:
        """A model with one state more than the table of a ``TabularEnv``: the end, where every terminated step leads.

        The flag ``terminated`` belongs to a step, not to a state, so no state of the table can stand for the end.
        """
        states = len(table)
        actions = len(table[0]) if 0 in table else 0
        if set(table) != set(range(states)) or any(set(row) != set(range(actions)) for row in table.values()):
            raise ValueError(f"{name}: expected states 0..{states - 1}, each with the same actions 0..{actions - 1}")
        width = max((len(outcomes) for row in table.values() for outcomes in row.values()), default=0)
        to = np.full((states + 1, actions, max(width, 1)), states)
        probability = np.zeros(to.shape)
        reward = np.zeros(to.shape[:2])
        probability[states, :, 0] = 1.0
        for s, row in table.items():
            for a, outcomes in row.items():
                for b, (p, after, gain, terminated) in enumerate(outcomes):
                    if not 0 <= after < states:
                        raise ValueError(f"{name}[{s}][{a}] leads to state {after}; expected 0..{states - 1}")
                    to[s, a, b] = states if terminated else after
                    probability[s, a, b] = p
                    reward[s, a] += p * gain
        return cls.of((to, probability), reward, name=name)

    @property
    def states(self) -> int:
        return self.reward.shape[-2]

    @property
    def actions(self) -> int:
        return self.reward.shape[-1]

    def backup(self, values: Array, gamma: float) -> Array:
        """r(s, a) + gamma E[values(s')], [S, A]; values [S]."""
        if self.next_state is None:
            return self.reward + gamma * (self.probability @ values)
        return self.reward + gamma * (self.probability * values[self.next_state]).sum(-1)

    def dense(self, states: slice = slice(None)) -> Array:
        """Rows over all states, [s, A, S], of some states."""
        rows = self.probability[..., states, :, :]
        return rows if self.next_state is None else _scatter(self.next_state[..., states, :, :], rows, self.states)

    def chain(self, policy: NDArray) -> tuple[Array, Array]:
        """Transition matrix [S, S] and reward [S] under a policy: actions [S] or probabilities [S, A]."""
        state, lead = np.arange(self.states), self.reward.shape[:-1]
        if policy.ndim == 1:
            weight, reward = self.probability[..., state, policy, :], self.reward[..., state, policy]
            to = None if self.next_state is None else self.next_state[..., state, policy, :]
        elif self.next_state is None:
            return np.einsum("sa,...sat->...st", policy, self.probability), (policy * self.reward).sum(-1)
        else:
            weight, reward = (policy[:, :, None] * self.probability).reshape(*lead, -1), (policy * self.reward).sum(-1)
            to = self.next_state.reshape(*lead, -1)
        return weight if to is None else _scatter(to, weight, self.states), reward

    def __getitem__(self, which: int | slice) -> Model:
        """Some models of a stack, not copied."""
        to = None if self.next_state is None else self.next_state[which]
        return Model(self.probability[which], self.reward[which], to)


def stack(models: Sequence[Model]) -> Model:
    """One stack of several models; sparse rows are widened to the longest, and made dense if any model is dense."""
    reward = np.stack([one.reward for one in models])
    successors = [one.next_state for one in models if one.next_state is not None]
    if len(successors) < len(models):
        return Model(np.stack([one.dense() for one in models]), reward)
    width = max(one.probability.shape[-1] for one in models)
    probability, to = np.zeros((*reward.shape, width)), np.zeros((*reward.shape, width), dtype=np.int64)
    for m, (one, where) in enumerate(zip(models, successors, strict=True)):
        probability[m, ..., : where.shape[-1]] = one.probability
        to[m, ..., : where.shape[-1]] = where
    return Model(probability, reward, to)


def _scatter(to: IntArray, weight: Array, states: int) -> Array:
    """Rows [..., B] of weights on the states ``to`` as rows [..., S] over all of them."""
    rows = np.zeros((to[..., 0].size, states))
    np.add.at(rows, (np.arange(len(rows))[:, None], to.reshape(len(rows), -1)), weight.reshape(len(rows), -1))
    return rows.reshape(*to.shape[:-1], states)


def terminal_states(terminal: ArrayLike, states: int) -> Iterable[int]:
    """Indices of the terminal states, checked."""
    found = np.asarray(terminal)
    if found.size and not (np.issubdtype(found.dtype, np.integer) and ((found >= 0) & (found < states)).all()):
        raise ValueError(f"terminal={terminal!r}; expected indices of states, 0..{states - 1}")
    return [int(state) for state in found.ravel()]


def check_policy(policy: ArrayLike, states: int, actions: int) -> NDArray:
    """The policy as an array, actions [S] or probabilities [S, A]; raises ValueError on anything else."""
    found = np.asarray(policy)
    if found.shape == (states,) and np.issubdtype(found.dtype, np.integer):
        if ((found >= 0) & (found < actions)).all():
            return found
        raise ValueError(f"policy: actions run from {found.min()} to {found.max()}; expected 0..{actions - 1}")
    if found.shape != (states, actions):
        wanted = f"integers [{states}] (an action per state) or probabilities [{states}, {actions}]"
        raise ValueError(f"policy: {found.dtype} of shape {list(found.shape)}; expected {wanted}")
    found = found.astype(np.float64)
    check_rows(found, "policy")
    return found


def check_rows(rows: Array, name: str) -> None:
    """Raise ValueError unless every row [..., n] is a distribution; says which one is not."""
    bad = ~np.isfinite(rows).all(-1) | (rows < 0).any(-1) | (np.abs(rows.sum(-1) - 1) > ROW_TOLERANCE)
    if bad.any():
        where = tuple(int(i) for i in np.argwhere(bad)[0])
        row = rows[where]
        what = (
            "has NaN or infinity" if not np.isfinite(row).all() else f"sums to {row.sum():.9g}, least {row.min():.3g}"
        )
        raise ValueError(f"{name}: row {where} {what}; expected probabilities >= 0 that sum to one")


def _branches(transition: object, name: str) -> tuple[IntArray | None, Array]:
    """(successors or None, probabilities), copied and checked."""
    if not isinstance(transition, tuple):
        rows = np.array(transition, dtype=np.float64)
        if rows.ndim != 3 or rows.shape[0] != rows.shape[2] or 0 in rows.shape:
            raise ValueError(f"{name} has shape {list(rows.shape)}; expected [S, A, S], or (next_state, probability)")
        check_rows(rows, name)
        return None, rows
    if len(transition) != 2:
        raise ValueError(f"{name}: a tuple of {len(transition)}; expected the pair (next_state, probability)")
    to, rows = np.array(transition[0]), np.array(transition[1], dtype=np.float64)
    if rows.ndim != 3 or to.shape != rows.shape or 0 in rows.shape:
        found = f"next_state {list(to.shape)}, probability {list(rows.shape)}"
        raise ValueError(f"{name}: {found}; expected both [S, A, B] with B successors per row")
    if not np.issubdtype(to.dtype, np.integer) or to.min() < 0 or to.max() >= len(rows):
        raise ValueError(f"{name}: next_state must hold integers from 0 to {len(rows) - 1}")
    check_rows(rows, name)
    return to.astype(np.int64), rows
