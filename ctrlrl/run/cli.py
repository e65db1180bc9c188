"""The command line: ctrlrl train | eval | play | export | report | data | ope | tuning | list."""

from __future__ import annotations

import dataclasses
import importlib
import json
import math
import os
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from ctrlrl import names
from ctrlrl.run.complaint import fail
from ctrlrl.types import Backend

if TYPE_CHECKING:
    from ctrlrl.api import AgentClass

VERBS = {
    "train": "train an agent: ctrlrl train bpo --env HalfCheetah-v5 --steps 1_000_000",
    "eval": "evaluate a run: ctrlrl eval RUN --episodes 100",
    "play": "watch a run, or record it: ctrlrl play RUN --video agent.mp4",
    "export": "write a run's policy as an ONNX file: ctrlrl export RUN --out policy.onnx",
    "report": "compare runs on one page: ctrlrl report RUN...",
    "data": "recorded data: ctrlrl data list|info|make|convert|verify|generate",
    "ope": "estimate a run's return from data alone: ctrlrl ope RUN --dataset ID",
    "tuning": "what choosing among runs costs in evaluations: ctrlrl tuning RUN...",
    "list": "what there is: ctrlrl list methods|losses|envs",
}


ELSEWHERE = {verb: f"ctrlrl.run.{verb}_cli" for verb in ("eval", "export", "data", "ope", "tuning")}
"""Verbs with a file of their own."""


@dataclass(frozen=True)
class Train:
    """Where and how long to train."""

    env: str
    """Gymnasium id, for example HalfCheetah-v5."""
    steps: int = 1_000_000
    """Environment steps, over all environments."""
    seed: int = 0
    """Seed of everything."""
    n_envs: int = 1
    """Environments side by side."""
    backend: Backend = "auto"
    """sync (this process), async (one process each), envpool (C++ threads), or auto: envpool where it is installed,
    is known to agree with Gymnasium on the environment and there are several of them (one is faster in this
    process), sync elsewhere."""
    env_kwargs: str = "{}"
    """Keyword arguments of the environment, as JSON."""
    preset: str | None = None
    """Named settings of the method (ctrlrl list methods shows them); other flags override it."""
    root: Path = Path("runs")
    """Folder under which the run's folder is made."""
    tags: Literal["sb3", "cleanrl", "rsl_rl"] = "sb3"
    """Whose names TensorBoard and wandb show."""
    wandb: str | None = None
    """Also log to this Weights & Biases project (extra: ctrlrl[wandb])."""
    quiet: bool = False
    """No progress display."""


@dataclass(frozen=True)
class TrainOffline:
    """What to learn from is --dataset; where to evaluate, and how long to train."""

    env: str | None = None
    """Gymnasium id to evaluate in; the dataset's own by default."""
    steps: int = 1_000_000
    """Updates."""
    seed: int = 0
    """Seed of everything."""
    env_kwargs: str = "{}"
    """Keyword arguments of the environment, as JSON."""
    preset: str | None = None
    """Named settings of the method (ctrlrl list methods shows them); other flags override it."""
    published: bool = False
    """Begin with the settings that are published for this method on this dataset; other flags override them."""
    root: Path = Path("runs")
    """Folder under which the run's folder is made."""
    tags: Literal["sb3", "cleanrl", "rsl_rl"] = "sb3"
    """Whose names TensorBoard and wandb show."""
    wandb: str | None = None
    """Also log to this Weights & Biases project (extra: ctrlrl[wandb])."""
    quiet: bool = False
    """No progress display."""


@dataclass(frozen=True)
class TrainAlone:
    """What methods with a way of their own through an environment take."""

    env: str
    """Gymnasium id."""
    seed: int = 0
    """Seed of everything."""
    env_kwargs: str = "{}"
    """Keyword arguments of the environment, as JSON."""
    preset: str | None = None
    """Named settings of the method (ctrlrl list methods shows them); other flags override it."""
    root: Path = Path("runs")
    """Folder under which the run's folder is made."""
    tags: Literal["sb3", "cleanrl", "rsl_rl"] = "sb3"
    """Whose names TensorBoard and wandb show."""
    wandb: str | None = None
    """Also log to this Weights & Biases project (extra: ctrlrl[wandb])."""
    quiet: bool = False
    """No progress display."""


@dataclass(frozen=True)
class TrainSimulated(TrainAlone):
    """Whose simulator to train in, and how long."""

    env: str
    """Gymnasium id, for example ctrlrl/OneStoreLost-v0."""
    steps: int = 2_000
    """Updates."""


@dataclass(frozen=True)
class TrainPlanned(TrainAlone):
    """Whose transition table to plan on."""

    env: str
    """Gymnasium id, for example ctrlrl/Ladder-v0 or FrozenLake-v1."""
    seed: int = 0
    """Seed of evaluations; planning has no chance in it."""


@dataclass(frozen=True)
class Play:
    """Run the agent in one environment, on screen or into a film."""

    run: Annotated[Path, tyro.conf.Positional]
    """Run folder."""
    episodes: int = 1
    """Episodes to play."""
    checkpoint: str = "last"
    """last, best or interrupted."""
    video: Path | None = None
    """Write an mp4 here instead of opening a window."""
    stochastic: bool = False
    """Sample the actions instead of taking the mode."""
    seed: int = 0
    """Seed of the episodes."""


@dataclass(frozen=True)
class Report:
    """Compare runs on one self-contained HTML page."""

    runs: Annotated[tuple[Path, ...], tyro.conf.Positional]
    """Run folders, or folders above them."""
    out: Path = Path("report")
    """Folder for the page and its pictures."""


@dataclass(frozen=True)
class Resume:
    """Continue a stopped run from its last checkpoint."""

    resume: Path
    """Run folder."""
    wandb: str | None = None
    """Also log to this Weights & Biases project."""
    quiet: bool = False
    """No progress display."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit status. Errors of the user are one line, without a traceback."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    if not words or words[0] in ("-h", "--help"):
        print("usage: ctrlrl VERB ...\n")
        print("\n".join(f"  {verb:8} {text}" for verb, text in VERBS.items()))
        print("\nctrlrl VERB --help shows every option; ctrlrl train METHOD --help every hyper-parameter.")
        return 0
    if words[0] == "--version":
        from ctrlrl import __version__

        print(__version__)
        return 0
    if "" not in sys.path and os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())  # so that mylosses:MyLoss is found here, as python -m ctrlrl finds it
    verb, rest = words[0], words[1:]
    if verb not in VERBS:
        return fail(f"no verb {verb!r}.{names.hint(verb, VERBS)} Verbs: {', '.join(VERBS)}", 2)
    import gymnasium as gym

    from ctrlrl.engine.hooks import Interrupted

    # ArithmeticError: what became NaN, and where; TypeError: an environment that does not know an argument
    # MemoryError: a replay that would not fit
    expected = (
        ValueError, TypeError, KeyError, OSError, ImportError, RuntimeError, ArithmeticError, MemoryError,
        gym.error.Error,
    )  # fmt: skip
    try:
        return _run(verb, rest)
    except Interrupted as stop:
        if stop.run_dir is None:
            return fail("stopped; nothing was saved, there is no run folder", 130)
        print(f"\nStopped at step {stop.steps:,}. The policy is saved.")
        print(f"Resume (from the last checkpoint) with: ctrlrl train --resume {stop.run_dir}")
        return 130
    except KeyboardInterrupt:
        return fail("stopped at once; ctrlrl train --resume RUN continues from the last checkpoint", 130)
    except expected as error:
        if os.environ.get("CTRLRL_TRACEBACK"):
            raise
        text = error.args[0] if isinstance(error, KeyError) and error.args else error
        notes = " ".join(getattr(error, "__notes__", []))
        # these may also come from a fault in an environment, a loss or here: say how to see where
        where = " (CTRLRL_TRACEBACK=1 shows where)" if type(error) in (TypeError, KeyError, RuntimeError) else ""
        return fail(f"{text} {notes}".strip() + where, 1)


def _run(verb: str, words: list[str]) -> int:
    if verb in ELSEWHERE:
        return importlib.import_module(ELSEWHERE[verb]).main(words)
    return {"train": _train, "play": _play, "report": _report, "list": _list}[verb](words)


def _train(words: list[str]) -> int:
    from ctrlrl import api
    from ctrlrl.engine.offline import OfflineAgent
    from ctrlrl.inventory.hdpo import HDPO
    from ctrlrl.planning.distributional_dp_agent import DistributionalDP

    if any(w == "--resume" or w.startswith("--resume=") for w in words):
        return _resume(tyro.cli(Resume, args=words, prog="ctrlrl train"))
    if not words or words[0] in ("-h", "--help"):
        print("usage: ctrlrl train METHOD --env ID [--steps N] [options]")
        print("       ctrlrl train METHOD --dataset ID_OR_FILE [--steps UPDATES] [options]")
        print("       ctrlrl train METHOD --env ID --from OFFLINE_RUN [--steps N] [options]")
        print("       ctrlrl train --resume RUN\n")
        print(f"methods: {', '.join(api.available('methods'))}")
        print("\nctrlrl train METHOD --help shows every hyper-parameter with its meaning and default.")
        return 0
    if words[0].startswith("-"):
        return fail("the method comes first: ctrlrl train METHOD --env ID", 2)
    # some flags are looked at before the words are parsed: spelt in one way
    words = [re.sub(r"^--[a-z_]+", lambda m: m[0].replace("_", "-"), w) for w in words]
    # from is a word of the language, so the setting is called otherwise
    words = [re.sub(r"^--from(?=$|=)", "--start-from", w) for w in words]
    online = _value(words, "--start-from", None) is not None and _value(words, "--dataset", None) is None
    cls = api.get_method(words[0], online)
    kinds = {OfflineAgent: TrainOffline, HDPO: TrainSimulated, DistributionalDP: TrainPlanned}
    kind: type[Any] = next((kind for base, kind in kinds.items() if issubclass(cls, base)), Train)
    run, settings = _parse_training(cls, words[1:], kind)
    try:
        env_kwargs = json.loads(run.env_kwargs)
    except ValueError as error:
        return fail(f"--env-kwargs is not JSON ({error}); example: --env-kwargs '{{\"ctrl_cost_weight\": 0.1}}'", 2)
    if not isinstance(env_kwargs, dict):
        return fail(f"--env-kwargs is {run.env_kwargs}, expected names and values: --env-kwargs '{{\"name\": 1}}'", 2)
    width = {} if kind is not Train else {"n_envs": run.n_envs, "backend": run.backend}
    agent: Any = cls(run.env, seed=run.seed, env_kwargs=env_kwargs, **width, **settings)
    wandb = None if run.wandb is None else {"project": run.wandb}
    steps = 1 if kind is TrainPlanned else run.steps
    agent.learn(steps, root=run.root, progress=not run.quiet, wandb=wandb, tags=run.tags)
    return _finish(agent)


def _value(words: list[str], flag: str, default: Any) -> Any:
    """What follows ``flag``, before the words are parsed."""
    for i, word in enumerate(words):
        if word == flag and i + 1 < len(words):
            return words[i + 1]
        if word.startswith(f"{flag}="):
            return word.partition("=")[2]
    return default


def _parse_training(cls: AgentClass, words: list[str], kind: type[Any]) -> tuple[Any, dict[str, Any]]:
    """Flags of the run, the loop, the network and the method in one flat parser, over the method's defaults."""
    from ctrlrl.engine.config import flat

    try:
        env_kwargs = json.loads(_value(words, "--env-kwargs", "{}"))
    except ValueError:
        env_kwargs = {}  # said when the run begins
    preset = _value(words, "--preset", None)
    run: dict[str, Any] = {}
    source = _value(words, "--start-from", None)
    if "--published" in words:
        run["default"], (config, own) = _published(cls, _value(words, "--dataset", ""), preset)
    elif source is not None:
        from ctrlrl.engine.prior import settings_of

        config, own = cls.blueprint(preset, settings=settings_of(source))  # type: ignore[call-arg]
    else:
        looked_at = {name: _value(words, f"--{name.replace('_', '-')}", None) for name in getattr(cls, "looked_at", ())}
        chosen = {name: value for name, value in looked_at.items() if value is not None}
        extra = {"chosen": chosen} if chosen else {}
        policy = _value(words, "--policy", "auto")
        config, own = cls.blueprint(preset, _value(words, "--env", ""), env_kwargs, policy, **extra)
    plain = tyro.conf.OmitArgPrefixes
    parser = dataclasses.make_dataclass(
        "Training",
        [
            ("run", plain[kind], dataclasses.field(**run)),
            ("own", plain[type(own)], dataclasses.field(default=own)),
            ("loop", plain[type(config)], dataclasses.field(default=config)),
        ],
        frozen=True,
    )
    about = getattr(cls, "paper", None) or getattr(own, "paper", own.__doc__)
    parsed = tyro.cli(parser, args=words, prog=f"ctrlrl train {cls.method}", description=about)
    return parsed.run, flat(parsed.loop) | flat(parsed.own)


def _published(cls: Any, dataset: str, preset: str | None) -> tuple[TrainOffline, tuple[Any, Any]]:
    """Defaults of the run, the loop and the method with the settings published for ``dataset``."""
    from ctrlrl.engine.published import published

    found = published(cls.method, dataset)
    return TrainOffline(steps=found.updates), cls.blueprint(preset, settings=found.settings)


def _resume(options: Resume) -> int:
    from ctrlrl import api

    agent = api.load(options.resume)
    if agent.steps >= agent.span[1]:
        print(f"{options.resume} is finished: {agent.steps:,} of {agent.span[1]:,} steps.")
        return 0
    wandb = None if options.wandb is None else {"project": options.wandb}
    agent.resume(options.resume, progress=not options.quiet, wandb=wandb)
    return _finish(agent)


def _finish(agent: Any) -> int:
    from ctrlrl.engine.runfolder import read_evaluations

    print(f"\nRun folder: {agent.run_dir}")
    evaluations = read_evaluations(agent.run_dir)
    if evaluations:
        returns = evaluations[-1]["returns"]
        mean = sum(returns) / len(returns)
        score = agent.normalized(mean)
        normalized = "" if score is None else f" (D4RL-normalised {score:.1f})"
        print(f"Last evaluation: mean return {mean:.1f}{normalized} over {len(returns)} deterministic episodes.")
    if math.isfinite(getattr(agent, "best_cost", math.inf)):
        profit = agent.simulator.network.objective == "profit"
        name, best = ("Highest profit", -agent.best_cost) if profit else ("Lowest cost", agent.best_cost)
        print(f"{name} on the dev scenarios: {best:.4f} per store and period.")
    if hasattr(agent, "summary"):
        print("\n".join(agent.summary()))
        print(f"Look at it: ctrlrl eval {agent.run_dir}")
        return 0
    print(f"Look at it: ctrlrl report {agent.run_dir}")
    return 0


def _play(words: list[str]) -> int:
    from ctrlrl import api
    from ctrlrl.run.play import play

    options = tyro.cli(Play, args=words, prog="ctrlrl play")
    if options.video is not None and sys.platform == "linux" and not os.environ.get("DISPLAY"):
        # MuJoCo reads this when it is imported, and its own default needs a screen
        os.environ.setdefault("MUJOCO_GL", "egl")
    agent = api.load(options.run, options.checkpoint)
    returns = play(agent, options.episodes, options.video, deterministic=not options.stochastic, seed=options.seed)
    for k, value in enumerate(returns):
        print(f"episode {k}: return {value:.2f}")
    if options.video is not None:
        print(f"Video: {options.video}")
    return 0


def _report(words: list[str]) -> int:
    from ctrlrl.engine.runfolder import find_runs
    from ctrlrl.run.report import report

    options = tyro.cli(Report, args=words, prog="ctrlrl report")
    if not options.runs:
        return fail("name one run folder at least: ctrlrl report RUN...", 2)
    page = report(find_runs(options.runs), options.out)
    print(f"Report: {page}")
    return 0


def _list(words: list[str]) -> int:
    from ctrlrl.run.listing import show

    complaint = show(words)
    return fail(complaint, 2) if complaint else 0


if __name__ == "__main__":
    sys.exit(main())
