"""The command line: ctrlrl train | eval | play | report | list."""

from __future__ import annotations

import dataclasses
import json
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import numpy as np
import tyro

from ctrlrl import names
from ctrlrl.types import Backend

if TYPE_CHECKING:
    from ctrlrl.api import AgentClass

VERBS = {
    "train": "train an agent: ctrlrl train bpo --env HalfCheetah-v5 --steps 1_000_000",
    "eval": "evaluate a run: ctrlrl eval RUN --episodes 100",
    "play": "watch a run, or record it: ctrlrl play RUN --video agent.mp4",
    "report": "compare runs on one page: ctrlrl report RUN...",
    "list": "what there is: ctrlrl list methods|losses|envs",
}


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
class Eval:
    """Evaluate a run and print the returns."""

    run: Annotated[Path, tyro.conf.Positional]
    """Run folder."""
    episodes: int | None = None
    """Whole episodes, each from a seed of its own; 100 by default. With --robust: in each cell, 1 by default."""
    checkpoint: str = "last"
    """last, best or interrupted."""
    stochastic: bool = False
    """Sample the actions instead of taking the mode."""
    seed: int | None = None
    """Seed of the episodes; the run's own by default."""
    out: Path | None = None
    """Also write the raw returns to this JSON file; --robust writes robust.json in the run folder by default."""
    robust: bool = False
    """Evaluate on a grid over the environment's uncertainty set: worst case, mean, and a picture."""
    grid_points: int = 10
    """With --robust: points of the grid in each dimension."""
    grid_convention: Literal["m2td3", "rrls"] = "m2td3"
    """With --robust: m2td3 includes the upper end of every range, rrls leaves it out."""
    env: str | None = None
    """With --robust: evaluate on this id, for example ctrlrl/RobustHopper-v0 for a run on Hopper-v5. It needs the same
    spaces and gets the run's wrappers."""
    env_kwargs: str = "{}"
    """With --robust: arguments of --env, or added to those of the run's environment, as JSON."""
    plot: Path | None = None
    """With --robust: where to draw the picture; robust.png in the run folder by default."""


ROBUST = ("grid_points", "grid_convention", "env", "env_kwargs", "plot")
"""Fields of Eval that need --robust."""


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
        return _fail(f"no verb {verb!r}.{names.hint(verb, VERBS)} Verbs: {', '.join(VERBS)}", 2)
    import gymnasium as gym

    from ctrlrl.engine.hooks import Interrupted

    # ArithmeticError: what became NaN, and where; TypeError: an environment that does not know an argument
    # MemoryError: a replay that would not fit
    expected = (
        ValueError, TypeError, KeyError, OSError, ImportError, RuntimeError, ArithmeticError, MemoryError,
        gym.error.Error,
    )  # fmt: skip
    try:
        return {"train": _train, "eval": _eval, "play": _play, "report": _report, "list": _list}[verb](rest)
    except Interrupted as stop:
        if stop.run_dir is None:
            return _fail("stopped; nothing was saved, there is no run folder", 130)
        print(f"\nStopped at step {stop.steps:,}. The policy is saved.")
        print(f"Resume (from the last checkpoint) with: ctrlrl train --resume {stop.run_dir}")
        return 130
    except KeyboardInterrupt:
        return _fail("stopped at once; ctrlrl train --resume RUN continues from the last checkpoint", 130)
    except expected as error:
        if os.environ.get("CTRLRL_TRACEBACK"):
            raise
        text = error.args[0] if isinstance(error, KeyError) and error.args else error
        notes = " ".join(getattr(error, "__notes__", []))
        # these may also come from a fault in an environment, a loss or here: say how to see where
        where = " (CTRLRL_TRACEBACK=1 shows where)" if type(error) in (TypeError, KeyError, RuntimeError) else ""
        return _fail(f"{text} {notes}".strip() + where, 1)


def _train(words: list[str]) -> int:
    from ctrlrl import api

    if any(w == "--resume" or w.startswith("--resume=") for w in words):
        return _resume(tyro.cli(Resume, args=words, prog="ctrlrl train"))
    if not words or words[0] in ("-h", "--help"):
        print("usage: ctrlrl train METHOD --env ID [--steps N] [options]\n       ctrlrl train --resume RUN\n")
        print(f"methods: {', '.join(api.available('methods'))}")
        print("\nctrlrl train METHOD --help shows every hyper-parameter with its meaning and default.")
        return 0
    if words[0].startswith("-"):
        return _fail("the method comes first: ctrlrl train METHOD --env ID", 2)
    cls = api.get_method(words[0])
    run, settings = _parse_training(cls, words[1:])
    try:
        env_kwargs = json.loads(run.env_kwargs)
    except ValueError as error:
        return _fail(f"--env-kwargs is not JSON ({error}); example: --env-kwargs '{{\"ctrl_cost_weight\": 0.1}}'", 2)
    if not isinstance(env_kwargs, dict):
        return _fail(f"--env-kwargs is {run.env_kwargs}, expected names and values: --env-kwargs '{{\"name\": 1}}'", 2)
    agent = cls(run.env, seed=run.seed, n_envs=run.n_envs, backend=run.backend, env_kwargs=env_kwargs, **settings)
    wandb = None if run.wandb is None else {"project": run.wandb}
    agent.learn(run.steps, root=run.root, progress=not run.quiet, wandb=wandb, tags=run.tags)
    return _finish(agent)


def _parse_training(cls: AgentClass, words: list[str]) -> tuple[Train, dict[str, Any]]:
    """Flags of the run, the loop, the network and the method in one flat parser, over the method's defaults."""
    from ctrlrl.engine.config import flat

    def value(flag: str, default: Any) -> Any:
        for i, word in enumerate(words):
            if word == flag and i + 1 < len(words):
                return words[i + 1]
            if word.startswith(f"{flag}="):
                return word.partition("=")[2]
        return default

    try:
        env_kwargs = json.loads(value("--env-kwargs", "{}"))
    except ValueError:
        env_kwargs = {}  # said when the run begins
    config, own = cls.blueprint(value("--preset", None), value("--env", ""), env_kwargs, value("--policy", "auto"))
    plain = tyro.conf.OmitArgPrefixes
    parser = dataclasses.make_dataclass(
        "Training",
        [
            ("run", plain[Train]),
            ("own", plain[type(own)], dataclasses.field(default=own)),
            ("loop", plain[type(config)], dataclasses.field(default=config)),
        ],
        frozen=True,
    )
    about = getattr(own, "paper", own.__doc__)
    parsed = tyro.cli(parser, args=words, prog=f"ctrlrl train {cls.method}", description=about)
    return parsed.run, flat(parsed.loop) | flat(parsed.own)


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
        print(f"Last evaluation: mean return {mean:.1f} over {len(returns)} deterministic episodes.")
    print(f"Look at it: ctrlrl report {agent.run_dir}")
    return 0


def _eval(words: list[str]) -> int:
    from ctrlrl import api
    from ctrlrl.engine.runfolder import write_json

    options = tyro.cli(Eval, args=words, prog="ctrlrl eval")
    if options.robust:
        return _eval_robust(options)
    asked = [f.name for f in dataclasses.fields(Eval) if f.name in ROBUST and getattr(options, f.name) != f.default]
    if asked:
        flags = ", ".join(f"--{name.replace('_', '-')}" for name in asked)
        return _fail(f"{flags} is for evaluations over an uncertainty set: add --robust", 2)
    agent = api.load(options.run, options.checkpoint)
    episodes = 100 if options.episodes is None else options.episodes
    result = agent.evaluate(episodes, deterministic=not options.stochastic, seed=options.seed)
    if options.out is not None:
        write_json(
            options.out,
            {
                "run": options.run,
                "checkpoint": options.checkpoint,
                "steps": agent.steps,
                "deterministic": not options.stochastic,
                "returns": result.returns,
                "lengths": result.lengths,
                "seeds": result.seeds,
            },
        )
    kind = "stochastic" if options.stochastic else "deterministic"
    print(
        f"{agent.method} on {agent._env_name()}, {options.checkpoint} checkpoint at {agent.steps:,} steps, "
        f"{episodes} {kind} episodes"
    )
    low, middle, high = np.quantile(result.returns, (0.0, 0.5, 1.0))
    print(f"  mean {result.mean:.2f}, standard deviation over episodes {result.std:.2f}")
    print(f"  lowest {low:.2f}, median {middle:.2f}, highest {high:.2f}")
    return 0


def _eval_robust(options: Eval) -> int:
    from rich.console import Console

    from ctrlrl import api
    from ctrlrl.engine import runfolder
    from ctrlrl.run import robust_figures

    try:
        env_kwargs = json.loads(options.env_kwargs)
    except ValueError as error:
        return _fail(f"--env-kwargs is not JSON ({error}); example: --env-kwargs '{{\"friction\": 0.1}}'", 2)
    if not isinstance(env_kwargs, dict):
        return _fail(f"--env-kwargs is {options.env_kwargs}, expected names and values in braces", 2)
    agent = api.load(options.run, options.checkpoint)
    out, plot = options.out or options.run / "robust.json", options.plot or options.run / "robust.png"
    for path in (out, plot):
        if not path.parent.is_dir():
            return _fail(f"{path.parent} does not exist; make it, or write {path.name} elsewhere", 1)
    episodes, deterministic = 1 if options.episodes is None else options.episodes, not options.stochastic
    result = agent.evaluate_robust(
        options.grid_points,
        episodes,
        options.grid_convention,
        deterministic,
        options.seed,
        options.env,
        env_kwargs,
    )
    name = options.env or agent._env_name()
    about = {
        "run": options.run,
        "checkpoint": options.checkpoint,
        "steps": agent.steps,
        "env": name,
        "env_kwargs": env_kwargs,
        "grid_convention": options.grid_convention,
        "deterministic": deterministic,
    }
    runfolder.write_json(out, about | result.document())
    plot.write_bytes(robust_figures.picture(result, f"{agent.method} on {name}"))
    shape = " x ".join(str(len(axis)) for axis in result.axes)
    kind = "deterministic" if deterministic else "stochastic"

    def at(params: Mapping[str, float]) -> str:
        return ", ".join(f"{key} {value:.4g}" for key, value in params.items())

    print(
        f"{agent.method} on {name}, {options.checkpoint} checkpoint at {agent.steps:,} steps, grid of {shape} "
        f"({options.grid_convention}), {episodes} {kind} episode{'s' if episodes > 1 else ''} in each cell"
    )
    print(f"  worst case {result.worst:.2f} at {at(result.worst_params)}")
    print(f"  mean {result.mean:.2f}, standard deviation over cells {result.std:.2f}")
    print(f"  nominal {result.nominal_mean:.2f} at {at(result.nominal)}")
    table = robust_figures.table(result)
    if table is not None:
        across, up = result.names
        print(f"  across: {across}, upwards: {up}, *: worst case")
        Console().print(table)
    print(f"Picture: {plot}\nReturns: {out}")
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
        return _fail("name one run folder at least: ctrlrl report RUN...", 2)
    page = report(find_runs(options.runs), options.out)
    print(f"Report: {page}")
    return 0


def _list(words: list[str]) -> int:
    from ctrlrl.run.listing import show

    complaint = show(words)
    return _fail(complaint, 2) if complaint else 0


def _fail(message: str, status: int) -> int:
    print(f"ctrlrl: {message}", file=sys.stderr)
    return status


if __name__ == "__main__":
    sys.exit(main())
