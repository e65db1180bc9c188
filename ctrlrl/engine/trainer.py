"""What every trained method does around its iterations: run folder, borders, evaluations, checkpoints, Ctrl-C."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import math
import os
import time
from abc import abstractmethod
from collections import deque
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Self

import gymnasium as gym
import numpy as np
from torch import Tensor

from ctrlrl.engine import checkpoint, environments, hooks, runfolder
from ctrlrl.engine.agent import Agent
from ctrlrl.engine.config import to_dict
from ctrlrl.engine.errors import NonFiniteError, NonFiniteUpdateError
from ctrlrl.engine.evaluate import Evaluation
from ctrlrl.engine.graphs import compiler_available
from ctrlrl.engine.log import Histogram, Progress, RunLogger, Tags
from ctrlrl.nets.actor_critic import encoder_path
from ctrlrl.types import EnvSpec

logger = logging.getLogger("ctrlrl")

_FREE = frozenset(["device", "threads", "compile", "cudagraphs", "encoder", "eval_every", "eval_episodes"])
"""Settings with which a run may be resumed that are not its own."""


class TrainedAgent(Agent):
    """An agent that learns in iterations; subclasses say what an iteration is.

    Attributes:
        config: Frozen settings with at least checkpoint_every, eval_every, eval_episodes and threads.
        iteration: Iterations done.
        span: Steps at which the present training began and is to end.
        best: Highest mean return of an evaluation so far.
        episodes: Training episodes that ended.
        recent: Return and length of the last 100 of them.
        run_dir: Folder of the run; None writes no files.
        interrupted: "asked" is true once Ctrl-C was pressed.
        cut: The last iteration ended early because of it: nothing of it may become a checkpoint to resume from.
        histograms: What the last iteration found beside numbers, for TensorBoard.
    """

    method = ""
    own_name: ClassVar[str]
    """Under which name config.json holds the method's own settings."""
    config: Any
    n_envs: int
    _live: gym.Env | gym.vector.VectorEnv | None

    def __init__(self) -> None:
        self.iteration = self.steps = 0
        self.span = (0, 0)
        self.best = -math.inf
        self.episodes = 0
        self.recent: deque[tuple[float, int]] = deque(maxlen=100)
        self.run_dir: Path | None = None
        self.histograms: Mapping[str, Histogram] = {}
        self.interrupted: Mapping[str, bool] = {"asked": False}
        self.cut = False
        self.timings = {"simulation_s": 0.0, "inference_s": 0.0, "update_s": 0.0, "rest_s": 0.0}

    # -- what every constructor does ----------------------------------------------------------

    def _name_encoder(self, encoder: Any, settings: dict[str, Any]) -> Any:
        """Put the user's encoder into ``settings`` by name where it has one, so that the run can be loaded without
        passing it again. Returns what is left to pass on: a class without a name, or None."""
        if encoder is None:
            return None
        settings["encoder"] = encoder if isinstance(encoder, str) else encoder_path(encoder)
        return encoder if settings["encoder"] is None else None

    def _use(self, env: EnvSpec | gym.Env | gym.vector.VectorEnv) -> None:
        """Take note of what the environments are built from."""
        self._live = None if isinstance(env, EnvSpec) else env
        self.env_spec = env if isinstance(env, EnvSpec) else environments.spec_of(env)
        self.n_envs = environments.width(env)

    def _compiles(self) -> bool:
        """Whether the update is compiled: as asked, where there is a compiler."""
        if self.config.compile and not compiler_available(self.device):
            logger.warning("--compile needs a compiler (g++ or clang++; on a GPU Triton): none found, running eager.")
            return False
        return self.config.compile

    # -- what a method adds -------------------------------------------------------------------

    @property
    @abstractmethod
    def steps_bound(self) -> int:
        """Environment steps of one iteration; where environments spend steps on resetting, a few more."""

    @abstractmethod
    def _iterate(self) -> dict[str, float]:
        """One iteration: advance ``iteration`` and ``steps``, return what to log."""

    @abstractmethod
    def _border(self) -> None:
        """Create the environments afresh, from the run's seed and the iteration."""

    def _prepare(self) -> None:
        """Refuse what cannot be trained, before a run folder is made."""

    def _open(self) -> None:
        """Training begins."""

    def _close(self) -> None:
        """Training has ended, or failed."""

    # -- training -----------------------------------------------------------------------------

    def learn(
        self,
        steps: int,
        *,
        run_dir: str | os.PathLike[str] | None = None,
        root: str | os.PathLike[str] | None = "runs",
        callbacks: Sequence[Any] = (),
        progress: bool = True,
        wandb: Mapping[str, Any] | None = None,
        tensorboard: bool = True,
        tags: Tags = "sb3",
    ) -> Self:
        """Train for ``steps`` more environment steps (rounded up to whole iterations) and return the agent.

        Args:
            steps: Environment steps, counted over all environments.
            run_dir: Folder of the run; None makes one below ``root``.
            root: Where run folders are made; None (with no ``run_dir``) writes no files at all.
            callbacks: Objects with any of the methods of :class:`ctrlrl.engine.hooks.Callback`.
            progress: Show a live display.
            wandb: Arguments of wandb.init to also log there.
            tensorboard: Also write TensorBoard files.
            tags: Whose names TensorBoard and wandb show: sb3, cleanrl or rsl_rl.

        Ctrl-C saves after the iteration (off-policy: after the step), and says how to resume; a second one stops at
        once. A callback that asks to stop ends the run where it stands, which need not be a border: what is trained
        from there begins with fresh environments.
        """
        if steps < 1:
            raise ValueError(f"steps={steps} must be at least 1")
        self._prepare()
        before = self.run_dir
        if run_dir is not None:
            runfolder.guard_target(run_dir)
            if before != Path(run_dir) and (Path(run_dir) / runfolder.CONFIG).exists():
                raise FileExistsError(
                    f"{run_dir} holds a run already; agent.resume continues it (ctrlrl train --resume), "
                    "another run needs another folder"
                )
            self.run_dir = Path(run_dir)
            (self.run_dir / runfolder.CHECKPOINTS).mkdir(parents=True, exist_ok=True)
        elif root is not None:
            self.run_dir = runfolder.create(root, self._env_name(), self.method, self.seed)
        else:
            self.run_dir = None
        self.span = (self.steps, self.steps + steps)
        if self.run_dir != before:
            self.best = -math.inf  # every run has a best checkpoint of its own
        if self.run_dir is not None:
            runfolder.write_json(self.run_dir / runfolder.CONFIG, self.document())
            with environments.torch_threads(self.config.threads):
                runfolder.write_json(self.run_dir / runfolder.VERSIONS, runfolder.versions())
            self.write_checkpoint(self.run_dir, "last")
        return self._train(callbacks, progress, wandb, tensorboard, tags, resume=False)

    def resume(
        self,
        run_dir: str | os.PathLike[str],
        *,
        callbacks: Sequence[Any] = (),
        progress: bool = True,
        wandb: Mapping[str, Any] | None = None,
        tensorboard: bool = True,
        tags: Tags = "sb3",
    ) -> Self:
        """Continue the run in ``run_dir`` from its last checkpoint to its planned end.

        Raises:
            ValueError: This agent has another seed, number of environments or other settings than the run.
        """
        self._compare(run_dir)
        self.run_dir = Path(run_dir)
        checkpoint.clean_temporaries(self.run_dir / runfolder.CHECKPOINTS)
        self.load_checkpoint(self.run_dir, "last")
        if self.steps >= self.span[1]:
            return self
        return self._train(callbacks, progress, wandb, tensorboard, tags, resume=True)

    def _compare(self, run_dir: str | os.PathLike[str]) -> None:
        theirs, mine = runfolder.read_config(run_dir), runfolder.plain(self.document())

        def differing(a: Any, b: Any, name: str) -> list[str]:
            if isinstance(a, dict) and isinstance(b, dict):
                return [d for k in sorted({*a, *b} - _FREE) for d in differing(a.get(k), b.get(k), k)]
            return [] if a == b else [f"{name}={b!r} (the run has {a!r})"]

        found = [d for k in ("seed", "n_envs", "config", self.own_name) for d in differing(theirs.get(k), mine[k], k)]
        if found:
            raise ValueError(
                f"this agent is not that of {run_dir}: {', '.join(found)}. ctrlrl.load(folder).resume(folder), or "
                "ctrlrl train --resume on the command line, goes on as it was begun"
            )

    def _train(
        self,
        callbacks: Sequence[Any],
        progress: bool,
        wandb: Mapping[str, Any] | None,
        tensorboard: bool,
        tags: Tags,
        resume: bool,
    ) -> Self:
        hooks.check(callbacks)
        if self.config.eval_every is not None and not self.can_evaluate:
            logger.warning("No evaluations: these environments cannot be built again one by one (see Agent.evaluate).")
        with contextlib.ExitStack() as stack:
            stack.enter_context(environments.torch_threads(self.config.threads))
            self.interrupted = stack.enter_context(hooks.interruptible())
            log = None
            if self.run_dir is not None:
                begin = (self.steps, self.iteration) if resume else (None, None)
                log = RunLogger(self.run_dir, tensorboard, None if wandb is None else dict(wandb), *begin, tags)
                stack.callback(log.close)
            label = f"{self.method} {self._env_name()}"
            bar = stack.enter_context(Progress(self.span[1], self.steps, label, enabled=progress))
            self._open()
            stack.callback(self._close)
            try:
                self._loop(log, bar, callbacks)
            except (NonFiniteError, NonFiniteUpdateError) as error:
                if self.run_dir is not None:
                    last = self.run_dir / runfolder.CHECKPOINTS / "last.safetensors"
                    error.add_note(f"The last saved state is {last}.")
                raise
        return self

    def _loop(
        self,
        log: RunLogger | None,
        bar: Progress,
        callbacks: Sequence[Any],
    ) -> None:
        border_every = max(10, math.ceil(self.config.checkpoint_every / self.steps_bound))
        self.stopped = False
        first = self.iteration
        clock = time.perf_counter()
        while self.steps < self.span[1] and not self.stopped:
            if self.iteration == first or self.iteration % border_every == 0:
                self._border()
            before = self.steps
            metrics = self._iterate()
            now = time.perf_counter()
            metrics["time/fps"] = (self.steps - before) / (now - clock)
            clock = now
            metrics |= self._progress_metrics()
            bar.update(self.steps, metrics)
            if log is not None:
                log.log(self.steps, metrics, self.histograms)
            self._notify(callbacks, "on_update", metrics)
            if not self.cut and self._due(self.config.eval_every, before):
                self._evaluate(log, bar, callbacks)
                clock = time.perf_counter()
            finished = self.steps >= self.span[1] or self.stopped
            at_border = self.iteration % border_every == 0 and not self.cut
            if self.run_dir is not None and (finished or at_border):
                if log is not None:
                    log.flush()
                path = self.write_checkpoint(self.run_dir, "last")
                path.with_name("interrupted.safetensors").unlink(missing_ok=True)  # behind "last" by now
                self._notify(callbacks, "on_checkpoint", path)
                clock = time.perf_counter()
            if self.interrupted["asked"] and not finished:
                if self.run_dir is not None:
                    self.write_checkpoint(self.run_dir, "interrupted")
                raise hooks.Interrupted(self.run_dir, self.steps)

    def _progress_metrics(self) -> dict[str, float]:
        values: dict[str, float] = {
            "time/iterations": self.iteration,
            "time/total_timesteps": self.steps,
            "time/episodes": self.episodes,
        }
        if self.recent:
            values["rollout/ep_rew_mean"] = float(np.mean([r for r, _ in self.recent]))
            values["rollout/ep_len_mean"] = float(np.mean([n for _, n in self.recent]))
        return values

    def _due(self, every: int | None, before: int) -> bool:
        """Whether a multiple of ``every`` steps was passed since step ``before``, or the run ends here."""
        if every is None:
            return False
        passed = self.steps // every > before // every
        return (passed or self.steps >= self.span[1]) and self.can_evaluate

    def _evaluate(self, log: RunLogger | None, bar: Progress, callbacks: Sequence[Any]) -> Evaluation:
        result = self.evaluate(self.config.eval_episodes)
        bar.update(self.steps, {"eval/mean_reward": result.mean})
        if log is not None:
            extra: dict[str, Any] = {"deterministic": True, "checkpoint": "current", "seeds": result.seeds.tolist()}
            score = self.normalized(result.mean)
            if score is not None:
                extra["normalized_score"] = float(score)
            log.evaluation(self.steps, result.returns.tolist(), result.lengths.tolist(), extra)
        if result.mean > self.best:
            self.best = result.mean
            if self.run_dir is not None:
                self.write_checkpoint(self.run_dir, "best")
        self._notify(callbacks, "on_evaluation", result)
        return result

    def _notify(self, callbacks: Sequence[Any], hook: str, value: Any) -> None:
        if not hooks.notify(callbacks, hook, self, value):
            self.stopped = True

    def _source(self) -> EnvSpec | gym.Env | gym.vector.VectorEnv:
        source = self.env_spec if self._live is None else self._live
        assert source is not None
        return source

    def _env_name(self) -> str:
        return self.env_spec.id if self.env_spec is not None else "live"

    def normalized(self, returns: Any) -> np.ndarray | None:
        """D4RL's score of raw returns, where there are reference scores for it."""
        return None

    # -- state --------------------------------------------------------------------------------

    @property
    @abstractmethod
    def own(self) -> Any:
        """The settings of the method itself, a frozen dataclass."""

    @classmethod
    @abstractmethod
    def blueprint(
        cls, preset: str | None = None, env: str = "", env_kwargs: Mapping[str, Any] | None = None, policy: str = "auto"
    ) -> tuple[Any, Any]:
        """The settings of the loop and of the method with which it would train on ``env``, before the user's own."""

    @classmethod
    def from_document(cls, document: Mapping[str, Any], env: Any, settings: dict[str, Any]) -> Self:
        """The agent that config.json describes, as it began; its checkpoint is loaded next."""
        return cls(env, seed=document["seed"], restoring=True, **settings)  # type: ignore[call-arg]

    def document(self) -> dict[str, Any]:
        return {
            "format": runfolder.FORMAT,
            "method": self.method,
            "env": dataclasses.asdict(self.env_spec) if self.env_spec is not None else None,
            "config": to_dict(self.config),
            self.own_name: to_dict(self.own),
            "seed": self.seed,
            "n_envs": self.n_envs,
            "spaces": {k: v for k, v in self.identity().items() if k.endswith("_space")},
            "total_steps": self.span[1],
        }

    def counters(self) -> dict[str, Any]:
        return {
            "iteration": self.iteration,
            "steps": self.steps,
            "span": list(self.span),
            "best": self.best,
            "episodes": self.episodes,
            "recent": [list(e) for e in self.recent],
        }

    def restore(self, tensors: Mapping[str, Tensor], counters: Mapping[str, Any]) -> None:
        self.iteration, self.steps = counters["iteration"], counters["steps"]
        self.span = (counters["span"][0], counters["span"][1])
        self.best, self.episodes = counters["best"], counters["episodes"]
        self.recent = deque(((e[0], int(e[1])) for e in counters["recent"]), maxlen=100)
