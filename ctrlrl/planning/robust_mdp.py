"""A finite decision process whose transition model is only known to lie in a finite set."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Hashable, Iterator, Sequence
from functools import cached_property
from math import prod
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ctrlrl.planning.model import Array, IntArray, Model, Table, check_rows, stack, terminal_states

BLOCK_NUMBERS = 2**23
"""Float64 numbers that a pass over all models holds at once (64 MiB)."""


class RobustMDP(ABC):
    """A set of models over the same states and actions. Build one with ``models``, ``rectangular`` or ``tables``.

    An agent chooses a policy, then the worst model of the set is drawn against it, once and for all ("static").
    A set is (s,a)-rectangular when every combination of its rows is a member; only there does the static worst case
    always equal the one against an adversary who chooses anew at each step (Iyengar 2005), and the best worst case
    always min_T V*_T (Wiesemann et al. 2013).
    """

    states: int
    actions: int
    gamma: float
    start: Array
    """[S] where an episode starts."""

    def __init__(self, states: int, actions: int, gamma: float, start: ArrayLike) -> None:
        if not 0.0 <= gamma < 1.0:
            raise ValueError(f"gamma={gamma!r}; expected 0 <= gamma < 1: values are discounted sums without end")
        self.states, self.actions, self.gamma = states, actions, float(gamma)
        self.start = _start(start, states)

    @staticmethod
    def models(
        transitions: ArrayLike | Sequence[Any],
        rewards: ArrayLike,
        gamma: float,
        start: ArrayLike = 0,
        terminal: ArrayLike = (),
    ) -> RobustMDP:
        """The set of the M listed models.

        ``transitions`` is an array [M, S, A, S], or a sequence of models, each [S, A, S] or a pair
        (next_state [S, A, B], probability [S, A, B]). Lists and tuples are read and checked at once; any other
        sequence is lazy, its models being made and checked whenever they are needed.
        ``rewards``: [S, A], or per model [M, S, A] or [M, S, A, S] (gained on the way to the last index).
        ``start``: a state or a distribution [S]. ``terminal``: states that become absorbing and free of reward.
        Raises ValueError on shapes, numbers and rows that fit nothing, naming the model.
        """
        lazy = _Lazy(transitions, rewards, terminal)
        eager = isinstance(transitions, list | tuple | np.ndarray)
        return ListedMDP(list(lazy) if eager else lazy, gamma, start)

    @staticmethod
    def rectangular(
        choices: Sequence[Sequence[ArrayLike]],
        rewards: ArrayLike,
        gamma: float,
        start: ArrayLike = 0,
        terminal: ArrayLike = (),
    ) -> RobustMDP:
        """Every combination of the rows ``choices[s][a]`` [K, S], K of its own at each pair; never enumerated.

        ``rewards``: [S, A] or [S, A, S]. ``start``, ``terminal`` and errors as in ``models``.
        """
        return ProductMDP(choices, rewards, gamma, start, terminal)

    @staticmethod
    def tables(tables: Sequence[Table], gamma: float, start: ArrayLike = 0) -> RobustMDP:
        """The set of the listed Gymnasium tables, one ``env.unwrapped.P`` per model.

        The process has one state more than the tables, the last: steps that terminate lead there.
        ``start``: a state, or a distribution over the states of the tables such as ``initial_state_distrib``.
        """
        read = [Model.of_table(table, f"tables[{m}]") for m, table in enumerate(tables)]
        begin = np.asarray(start, dtype=np.float64 if np.ndim(start) else None)
        if read and begin.shape == (read[0].states - 1,):
            begin = np.append(begin, 0.0)
        return ListedMDP(read, gamma, begin)

    @property
    @abstractmethod
    def n_models(self) -> int:
        """Members of the set; on products an exact integer that may be astronomical."""

    @property
    @abstractmethod
    def is_rectangular(self) -> bool:
        """Is every combination of the rows of the members a member? Rows count together with their reward."""

    @abstractmethod
    def model(self, key: Hashable) -> Model:
        """The member of that key: its index in the list, or per state a tuple of the row taken by each action."""

    @abstractmethod
    def first(self) -> Hashable:
        """Key of the first member."""

    @abstractmethod
    def worst_rows(self, values: Array) -> tuple[Array, IntArray]:
        """min over rows of r + gamma E[values], [S, A], pair by pair, and which row of the pair (lowest index).

        On a list that is not rectangular this is the backup of its rectangular hull.
        """


class ListedMDP(RobustMDP):
    """A plain list of models, held as one stack, or made when needed; see ``RobustMDP.models``."""

    def __init__(self, listed: Sequence[Model], gamma: float, start: ArrayLike = 0) -> None:
        if len(listed) == 0:
            raise ValueError("there is no model; expected at least one")
        self._listed: Sequence[Any] = listed
        first = listed[0]
        super().__init__(first.states, first.actions, gamma, start)
        self._branches = first.probability.shape[-1]
        self._stack = stack([self._checked(m) for m in range(len(listed))]) if isinstance(listed, list) else None
        if self._stack is not None:
            self._listed = range(len(listed))

    def _checked(self, m: int) -> Model:
        found: Model = self._listed[m]
        if found.reward.shape != (self.states, self.actions):
            wanted = [self.states, self.actions]
            raise ValueError(f"model {m} has [S, A] = {list(found.reward.shape)}; expected {wanted}, as model 0 has")
        return found

    @property
    def n_models(self) -> int:
        return len(self._listed)

    @property
    def is_rectangular(self) -> bool:
        return self._is_product

    @cached_property
    def _is_product(self) -> bool:
        """A set is a product when each prefix of its pairs shows as many combinations as the rows there allow.

        The first prefix that shows fewer decides, within a few states for most lists. Rows are compared exactly.
        """
        member = np.zeros(self.n_models, dtype=np.int64)
        product, states = 1, max(1, BLOCK_NUMBERS // (self.n_models * self.actions * self.states))
        for low in range(0, self.states, states):
            for rows in self._rows(slice(low, low + states)):
                _, row = np.unique(rows, axis=0, return_inverse=True)
                rows_here = int(row.max()) + 1
                product *= rows_here
                shown, member = np.unique(member * rows_here + row.ravel(), return_inverse=True)
                if len(shown) < product:
                    return False
        return True

    def _rows(self, states: slice) -> list[Array]:
        """For each pair of some states, its row and reward in every model, [M, S + 1]; only where the models differ."""
        parts = [(one.dense(states), one.reward[:, states, :, None]) for _, one in self.blocks()]
        rows = np.concatenate([np.concatenate(part, -1) for part in parts]).reshape(self.n_models, -1, self.states + 1)
        differs = (rows != rows[:1]).any((0, 2))
        return [rows[:, pair] for pair in np.flatnonzero(differs)]

    def model(self, key: Hashable) -> Model:
        if not isinstance(key, int | np.integer) or not 0 <= key < self.n_models:
            raise ValueError(f"model {key!r}; expected an index from 0 to {self.n_models - 1}")
        return self._checked(int(key)) if self._stack is None else self._stack[int(key)]

    def first(self) -> int:
        return 0

    def blocks(self, numbers: int = 0) -> Iterator[tuple[int, Model]]:
        """All models as stacks, each with the index of its first, as large as BLOCK_NUMBERS allows.

        ``numbers``: what the caller makes of each model, if that is more than the model itself.
        """
        step = max(1, BLOCK_NUMBERS // max(numbers, self.states * self.actions * self._branches))
        for low in range(0, self.n_models, step):
            high = min(low + step, self.n_models)
            made = (
                self._stack[low:high]
                if self._stack is not None
                else stack([self._checked(m) for m in range(low, high)])
            )
            yield low, made

    def worst_rows(self, values: Array) -> tuple[Array, IntArray]:
        least = np.full((self.states, self.actions), np.inf)
        which = np.zeros(least.shape, dtype=np.int64)
        for low, block in self.blocks():
            q = block.backup(values, self.gamma)
            lowest = q.argmin(0)
            q = np.take_along_axis(q, lowest[None], 0)[0]
            which = np.where(q < least, low + lowest, which)
            least = np.minimum(least, q)
        return least, which


class _Lazy(Sequence[Model]):
    """Models made and checked one at a time, whenever they are asked for."""

    def __init__(self, transitions: Any, rewards: ArrayLike, terminal: ArrayLike) -> None:
        if isinstance(transitions, np.ndarray) and transitions.ndim != 4:
            raise ValueError(f"transitions have shape {list(transitions.shape)}; expected [M, S, A, S] or a sequence")
        self._transitions, self._terminal = transitions, terminal
        self._rewards = np.array(rewards, dtype=np.float64)
        if self._rewards.ndim not in (2, 3, 4) or (self._rewards.ndim > 2 and len(self._rewards) != len(transitions)):
            found = f"rewards have shape {list(self._rewards.shape)}, for {len(transitions)} models"
            raise ValueError(f"{found}; expected [S, A], [M, S, A] or [M, S, A, S]")

    def __len__(self) -> int:
        return len(self._transitions)

    def __getitem__(self, m: Any) -> Any:
        rewards = self._rewards if self._rewards.ndim == 2 else self._rewards[m]
        return Model.of(self._transitions[m], rewards, self._terminal, f"model {m}")


class ProductMDP(RobustMDP):
    """All combinations of the rows of every pair; see ``RobustMDP.rectangular``."""

    def __init__(
        self,
        choices: Sequence[Sequence[ArrayLike]],
        rewards: ArrayLike,
        gamma: float,
        start: ArrayLike = 0,
        terminal: ArrayLike = (),
    ) -> None:
        states, actions = len(choices), len(choices[0]) if len(choices) else 0
        if not actions or any(len(row) != actions for row in choices):
            found = sorted({len(row) for row in choices})
            raise ValueError(f"choices: {states} states with {found} actions; expected as many actions in every state")
        super().__init__(states, actions, gamma, start)
        ends = set(terminal_states(terminal, states))
        sets = [[_choice(choices[s][a], s, a, states, s in ends) for a in range(actions)] for s in range(states)]
        self.counts = np.array([[len(rows) for rows in row] for row in sets])
        """[S, A] rows that each pair may choose from."""
        # shorter choices are filled up with copies, which are masked: rounding might prefer one to its original
        width = int(self.counts.max())
        padded = [[np.concatenate([rows, np.repeat(rows[:1], width - len(rows), 0)]) for rows in row] for row in sets]
        self._rows = np.moveaxis(np.array(padded), 2, 0)  # [K, S, A, S]
        self._absent = np.arange(width)[:, None, None] >= self.counts
        made = [Model.of(rows, rewards, terminal, f"row {k} of each pair") for k, rows in enumerate(self._rows)]
        self._reward = np.stack([one.reward for one in made])

    @property
    def n_models(self) -> int:
        return prod(int(n) for n in self.counts.ravel())

    @property
    def is_rectangular(self) -> bool:
        return True

    def model(self, key: Hashable) -> Model:
        table = key if isinstance(key, tuple) else ()
        fits = [isinstance(row, tuple) and len(row) == self.actions for row in table] == [True] * self.states
        taken = np.array(table if fits else -1)
        if (taken < 0).any() or (taken >= self.counts).any():
            wanted = f"{self.states} tuples of {self.actions} rows, each below the number of choices of its pair"
            raise ValueError(f"model {key!r}; expected a tuple of {wanted}")
        s, a = np.arange(self.states)[:, None], np.arange(self.actions)
        return Model(self._rows[taken, s, a], self._reward[taken, s, a])

    def first(self) -> Hashable:
        return key_of(np.zeros_like(self.counts))

    def worst_rows(self, values: Array) -> tuple[Array, IntArray]:
        q = np.where(self._absent, np.inf, self._reward + self.gamma * (self._rows @ values))
        which = q.argmin(0)
        return np.take_along_axis(q, which[None], 0)[0], which


def key_of(rows: IntArray) -> tuple[tuple[int, ...], ...]:
    """A table of rows [S, A] as the key of a member of a product."""
    return tuple(map(tuple, rows.tolist()))


def _choice(rows: ArrayLike, s: int, a: int, states: int, terminal: bool) -> Array:
    found = np.atleast_2d(np.array(rows, dtype=np.float64))
    if found.ndim != 2 or not len(found) or found.shape[1] != states:
        raise ValueError(f"choices[{s}][{a}] has shape {list(found.shape)}; expected rows [K, {states}], K >= 1")
    check_rows(found, f"choices[{s}][{a}]")
    return np.eye(states)[[s]] if terminal else found


def _start(start: ArrayLike, states: int) -> NDArray[np.float64]:
    found = np.asarray(start)
    if found.ndim == 0 and np.issubdtype(found.dtype, np.integer) and 0 <= int(found) < states:
        return np.eye(states)[int(found)]
    if found.shape != (states,):
        raise ValueError(f"start={start!r}; expected a state from 0 to {states - 1} or a distribution [{states}]")
    found = found.astype(np.float64)
    check_rows(found, "start")
    return found
