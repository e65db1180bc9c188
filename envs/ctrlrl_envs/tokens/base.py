"""What all token tasks share: the batched rows, the single environment and the native vector environment."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

import gymnasium as gym
import numpy as np
from gymnasium.utils import seeding
from gymnasium.vector import AutoresetMode
from gymnasium.vector.utils import batch_space

DIGITS = tuple("0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZ")


class Question(NamedTuple):
    """One episode's start."""

    prompt: Sequence[int]
    """[P] tokens."""
    script: Sequence[int]
    """[R] the best answer, with the environment's own tokens where these are its turn; -1 past its end."""
    task: int = 0
    """Kind or difficulty."""


class Outcome(NamedTuple):
    """How ``M`` ended episodes went."""

    reward: np.ndarray
    """[M] in [0, 1]."""
    success: np.ndarray
    """[M] bool."""
    rewards: np.ndarray
    """[M, K]."""
    answer: np.ndarray
    """[M] int64."""
    void: np.ndarray | None = None
    """[M, R] bool, in tasks of several turns."""


class Task(ABC):
    """A task without state. Subclasses are frozen dataclasses, whose fields are the environment's arguments."""

    channels: ClassVar[int] = 1
    """K, the number of reward channels."""
    options: ClassVar[tuple[str, ...]] = ()
    """Names that ``reset(options=...)`` understands."""
    several_turns: ClassVar[bool] = False
    """Whether outcomes tell void positions."""

    @property
    @abstractmethod
    def words(self) -> tuple[str, ...]:
        """What each token is called; their number is the vocabulary's size."""

    @property
    @abstractmethod
    def prompt(self) -> int:
        """P, the prompt's length."""

    @property
    @abstractmethod
    def schedule(self) -> tuple[int, ...]:
        """[R] turn of each position after the prompt, -1 where the environment writes."""

    @property
    def answer_length(self) -> int:
        """Tokens of the final answer, at most."""
        return len(self.schedule)

    @abstractmethod
    def question(self, rng: np.random.Generator, options: Mapping[str, Any]) -> Question:
        """Draw an episode."""

    def reply(self, response: np.ndarray, script: np.ndarray, at: np.ndarray) -> np.ndarray:
        """[M] what the environment writes at positions ``at`` [M] after ``response`` [M, R] (-1: not written)."""
        return script[np.arange(len(at)), at]

    def over(self, response: np.ndarray, script: np.ndarray, count: np.ndarray) -> np.ndarray:
        """[M] bool: the episode ends after these ``count`` [M] positions; by default where its script does."""
        following = np.minimum(count, script.shape[1] - 1)
        return script[np.arange(len(count)), following] < 0

    def outcome(self, response: np.ndarray, script: np.ndarray, count: np.ndarray) -> Outcome:
        """Score ended episodes; by default the share of the script's positions that are right."""
        share = matches(response, script)
        success = share == 1.0
        reward = success.astype(np.float64) if getattr(self, "binary", False) else share
        return Outcome(reward, success, reward[:, None], identify(response, len(self.words)))


def matches(response: np.ndarray, script: np.ndarray) -> np.ndarray:
    """[M] share of the script's positions, those that are not -1, at which the response [M, R] agrees."""
    there = script >= 0
    return ((response == script) & there).sum(1) / np.maximum(there.sum(1), 1)


def identify(tokens: np.ndarray, vocabulary: int) -> np.ndarray:
    """[M] one number for each sequence of ``tokens`` [M, k]; -1 stands for nothing."""
    place = (vocabulary + 1) ** np.arange(tokens.shape[1], dtype=np.int64)
    return ((tokens.astype(np.int64) + 1) * place).sum(1)


def positive(**sizes: int) -> None:
    """Raise ``ValueError`` for a size that is not an integer of at least 1."""
    for name, value in sizes.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"{name}={value!r} must be an integer of at least 1")


def digits_between(digits: int, least: int = 2) -> None:
    """Raise ``ValueError`` unless there are names for that many digits."""
    positive(digits=digits)
    if not least <= digits <= len(DIGITS):
        raise ValueError(f"digits={digits} must lie between {least} and {len(DIGITS)}")


class Rows:
    """``n`` episodes of one task side by side: the arithmetic of both kinds of environment."""

    def __init__(self, task: Task, n: int) -> None:
        positive(num_envs=n)
        self.task, self.n = task, n
        self.vocabulary, self.prompt = len(task.words), task.prompt
        self.schedule = np.array(task.schedule, dtype=np.int64)
        self.positions = len(self.schedule)
        self.length = self.prompt + self.positions
        if (self.vocabulary + 1) ** task.answer_length > 2**63:
            raise ValueError(
                f"answers of {task.answer_length} positions over {self.vocabulary} tokens are too many to number in 64 "
                "bits; choose smaller sizes"
            )
        self.obs = np.zeros((n, self.length), dtype=np.int64)
        self.script = np.full((n, self.positions), -1, dtype=np.int64)
        self.kind = np.zeros(n, dtype=np.int64)
        self.count = np.zeros(n, dtype=np.int64)
        self.ended = np.ones(n, dtype=np.bool_)
        self.started = np.zeros(n, dtype=np.bool_)
        self.success = np.zeros(n, dtype=np.bool_)
        self.rewards = np.zeros((n, task.channels))
        self.answer = np.full(n, -1, dtype=np.int64)
        self.void = np.zeros((n, self.positions), dtype=np.bool_)

    @property
    def sizes(self) -> dict[str, int]:
        """What ``metadata["tokens"]`` tells."""
        return {"vocabulary": self.vocabulary, "prompt": self.prompt, "length": self.length}

    @property
    def observation_space(self) -> gym.spaces.MultiDiscrete:
        """Of one row."""
        return gym.spaces.MultiDiscrete([self.vocabulary + 1] * self.length)

    @property
    def action_space(self) -> gym.spaces.Discrete:
        """Of one row."""
        return gym.spaces.Discrete(self.vocabulary)

    @property
    def response(self) -> np.ndarray:
        """[n, R] tokens after the prompt, -1 where not written."""
        return self.obs[:, self.prompt :] - 1

    @property
    def turn(self) -> np.ndarray:
        """[n] turn of the next position."""
        return np.where(self.ended, -1, self.schedule[np.minimum(self.count, self.positions - 1)])

    @property
    def solution(self) -> np.ndarray:
        """[n, R] the best action at each position, -1 where there is none."""
        return np.where(self.schedule >= 0, self.script, -1)

    def begin(self, row: int, rng: np.random.Generator, options: Mapping[str, Any]) -> None:
        """Start a new episode in ``row``."""
        unknown = set(options) - set(self.task.options)
        if unknown:
            known = ", ".join(self.task.options) or "none"
            raise ValueError(f"unknown reset options {sorted(unknown)}; this environment knows: {known}")
        question = self.task.question(rng, options)
        self.obs[row] = 0
        self.obs[row, : self.prompt] = np.asarray(question.prompt) + 1
        self.script[row], self.kind[row] = question.script, question.task
        self.count[row], self.ended[row], self.started[row] = 0, False, True
        self.success[row], self.rewards[row], self.answer[row], self.void[row] = False, 0.0, -1, False

    def step(self, action: np.ndarray) -> np.ndarray:
        """Append one token to every row that runs; the rewards [n]."""
        if not self.started.all():
            raise gym.error.ResetNeeded("call reset() before step()")
        reward = np.zeros(self.n)
        rows = np.flatnonzero(~self.ended)
        at = self.count[rows]
        token = np.asarray(action).reshape(self.n)[rows].astype(np.int64)
        theirs = self.schedule[at] < 0
        if theirs.any():
            its = rows[theirs]
            token[theirs] = self.task.reply(self.response[its], self.script[its], at[theirs])
        if ((token < 0) | (token >= self.vocabulary)).any():
            raise ValueError(f"actions must be tokens from 0 to {self.vocabulary - 1}, found {token.tolist()}")
        self.obs[rows, self.prompt + at] = token + 1
        self.count[rows] += 1
        over = self.count[rows] == self.positions
        over |= self.task.over(self.response[rows], self.script[rows], self.count[rows])
        if over.any():
            last = rows[over]
            outcome = self.task.outcome(self.response[last], self.script[last], self.count[last])
            self.ended[last] = True
            reward[last], self.success[last], self.rewards[last] = outcome.reward, outcome.success, outcome.rewards
            self.answer[last] = outcome.answer
            if outcome.void is not None:
                self.void[last] = outcome.void
        return reward


class TokenEnv(gym.Env[np.ndarray, np.int64]):
    """One episode at a time; see the package's docstring for the contract. The arguments are the task's fields."""

    metadata: dict[str, Any] = {"render_modes": ["ansi"], "render_fps": 4}  # noqa: RUF012 - as gymnasium declares it
    task_type: ClassVar[type[Task]]

    def __init__(self, render_mode: str | None = None, **sizes: Any) -> None:
        self.task = self.task_type(**sizes)
        self.rows = Rows(self.task, 1)
        self.metadata = {**type(self).metadata, "tokens": self.rows.sizes}
        self.observation_space, self.action_space = self.rows.observation_space, self.rows.action_space
        self.render_mode = render_mode

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[np.ndarray, dict[str, Any]]:
        """Start an episode; the seed fixes its prompt."""
        super().reset(seed=seed)
        self.rows.begin(0, self.np_random, options or {})
        return self.rows.obs[0].copy(), {**self._info(), "solution": self.rows.solution[0]}

    def step(self, action: Any) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        """Append one token; after the end nothing changes any more."""
        rows = self.rows
        reward = float(rows.step(np.asarray(action))[0])
        ended, info = bool(rows.ended[0]), self._info()
        if ended:
            success = bool(rows.success[0])
            info |= {"success": success, "is_success": success, "rewards": rows.rewards[0].copy()}
            info["answer"] = int(rows.answer[0])
            if self.task.several_turns:
                info["void"] = rows.void[0].copy()
        return rows.obs[0].copy(), reward, ended, False, info

    def render(self) -> str | None:  # type: ignore[override]
        """The context in words, with a bar after the prompt."""
        if self.render_mode != "ansi":
            return None
        said = [self.task.words[token - 1] for token in self.rows.obs[0] if token > 0]
        return " ".join([*said[: self.rows.prompt], "|", *said[self.rows.prompt :]])

    def _info(self) -> dict[str, Any]:
        return {"turn": int(self.rows.turn[0]), "task": int(self.rows.kind[0])}


class TokenVectorEnv(gym.vector.VectorEnv[np.ndarray, np.ndarray, np.ndarray]):
    """``num_envs`` episodes at once, without a loop over them in ``step``; equal to as many single environments."""

    task_type: ClassVar[type[Task]]

    def __init__(self, num_envs: int = 1, **sizes: Any) -> None:
        self.task = self.task_type(**sizes)
        self.rows = Rows(self.task, num_envs)
        self.num_envs = num_envs
        self.metadata = {"autoreset_mode": AutoresetMode.DISABLED, "tokens": self.rows.sizes}
        self.single_observation_space, self.single_action_space = self.rows.observation_space, self.rows.action_space
        self.observation_space = batch_space(self.single_observation_space, num_envs)
        self.action_space = batch_space(self.single_action_space, num_envs)
        self._streams: list[np.random.Generator | None] = [None] * num_envs

    def reset(
        self, *, seed: int | Sequence[int | None] | None = None, options: dict[str, Any] | None = None
    ) -> tuple[np.ndarray, dict[str, Any]]:
        """Reset all rows, or those of ``options["reset_mask"]``; infos are those of all rows.

        Args:
            seed: One seed each; an int ``s`` gives row ``i`` the seed ``s + i``, None goes on with each row's stream.
            options: Besides ``reset_mask``, the task's own: one value for all rows, or a list with one each.
        """
        n = self.num_envs
        options = dict(options or {})
        mask = np.asarray(options.pop("reset_mask", np.ones(n, dtype=np.bool_)))
        if mask.shape != (n,) or mask.dtype != np.bool_ or not mask.any():
            raise ValueError(f"reset_mask must be bool of shape ({n},) and true somewhere, found {mask!r}")
        if seed is None or isinstance(seed, int | np.integer):
            seeds: list[int | None] = [None if seed is None else int(seed) + i for i in range(n)]
        else:
            seeds = [None if s is None else int(s) for s in seed]
        if len(seeds) != n:
            raise ValueError(f"found {len(seeds)} seeds for {n} environments; give one seed each or a single int")
        for row in np.flatnonzero(mask).tolist():
            stream = self._streams[row]
            if stream is None or seeds[row] is not None:
                stream = self._streams[row] = seeding.np_random(seeds[row])[0]
            self.rows.begin(row, stream, {k: _row_of(k, v, row, n) for k, v in options.items()})
        infos = self._infos()
        infos["solution"] = self.rows.solution
        return self.rows.obs.copy(), infos

    def step(self, actions: Any) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, dict[str, Any]]:
        """Append one token to every row that runs; ended rows stay as they are."""
        reward = self.rows.step(actions)
        return (
            self.rows.obs.copy(),
            reward,
            self.rows.ended.copy(),
            np.zeros(self.num_envs, dtype=np.bool_),
            self._infos(),
        )

    def _infos(self) -> dict[str, Any]:
        rows = self.rows
        infos = {"turn": rows.turn, "task": rows.kind.copy(), "success": rows.success.copy()}
        infos |= {"is_success": rows.success.copy(), "rewards": rows.rewards.copy(), "answer": rows.answer.copy()}
        if self.task.several_turns:
            infos["void"] = rows.void.copy()
        return infos


def _row_of(name: str, value: Any, row: int, n: int) -> Any:
    if not isinstance(value, list | tuple | np.ndarray):
        return value
    if len(value) != n:
        raise ValueError(f"option {name!r} has {len(value)} values for {n} environments; give one each or a single one")
    return value[row]
