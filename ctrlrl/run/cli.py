"""The command line: ctrlrl train | eval | play | report | list."""

from __future__ import annotations

import dataclasses
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import tyro

from ctrlrl import names
from ctrlrl.types import Backend

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
    episodes: int = 100
    """Whole episodes, each from a seed of its own."""
    checkpoint: str = "last"
    """last, best or interrupted."""
    stochastic: bool = False
    """Sample the actions instead of taking the mode."""
    seed: int | None = None
    """Seed of the episodes; the run's own by default."""
    out: Path | None = None
    """Also write the raw returns to this JSON file."""


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
    expected = (ValueError, TypeError, KeyError, OSError, ImportError, RuntimeError, ArithmeticError, gym.error.Error)
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
    run, settings = _parse_training(cls.method, words[1:])
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


def _parse_training(method: str, words: list[str]) -> tuple[Train, dict[str, Any]]:
    """Flags of the run, the loop, the network and the loss in one flat parser, over the method's defaults."""
    from ctrlrl.engine.config import build
    from ctrlrl.losses import base as losses

    preset = None
    for i, word in enumerate(words):
        if word == "--preset" and i + 1 < len(words):
            preset = words[i + 1]
        elif word.startswith("--preset="):
            preset = word.partition("=")[2]
    config, loss = build(losses.get(method), {}, preset, _world_defaults(losses.get(method), words))
    flat = tyro.conf.OmitArgPrefixes
    parser = dataclasses.make_dataclass(
        "Training",
        [
            ("run", flat[Train]),
            ("loss", flat[type(loss)], dataclasses.field(default=loss)),
            ("loop", flat[type(config)], dataclasses.field(default=config)),
        ],
        frozen=True,
    )
    about = getattr(loss, "paper", loss.__doc__)
    parsed = tyro.cli(parser, args=words, prog=f"ctrlrl train {method}", description=about)
    loop = {f.name: getattr(parsed.loop, f.name) for f in dataclasses.fields(parsed.loop)}
    settings = dict(loop)
    for group in (settings.pop("network"), settings.pop("episodes")):
        settings |= {f.name: getattr(group, f.name) for f in dataclasses.fields(group)}
    return parsed.run, settings | {f.name: getattr(parsed.loss, f.name) for f in dataclasses.fields(parsed.loss)}


def _world_defaults(loss: Any, words: list[str]) -> dict[str, Any]:
    """The defaults of the environment among ``words``: token sequences and groups of episodes have some of their own.

    Without an environment, or with one that cannot be built, the loss alone decides; training says what is wrong.
    """
    from ctrlrl.engine import environments, world

    def value(flag: str, default: str) -> str:
        for i, word in enumerate(words):
            if word == flag and i + 1 < len(words):
                return words[i + 1]
            if word.startswith(f"{flag}="):
                return word.partition("=")[2]
        return default

    name = value("--env", "")
    if not name:
        return world.defaults("continuous", loss.needs)
    try:
        spec = environments.resolve(name, env_kwargs=json.loads(value("--env-kwargs", "{}")))
        _, actions, tokens = environments.describe(spec)
        return world.defaults(world.world_of(actions, tokens, value("--policy", "auto"), loss.needs), loss.needs)
    except Exception:
        return world.defaults("continuous", loss.needs)


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
    agent = api.load(options.run, options.checkpoint)
    result = agent.evaluate(options.episodes, deterministic=not options.stochastic, seed=options.seed)
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
        f"{options.episodes} {kind} episodes"
    )
    low, middle, high = np.quantile(result.returns, (0.0, 0.5, 1.0))
    print(f"  mean {result.mean:.2f}, standard deviation over episodes {result.std:.2f}")
    print(f"  lowest {low:.2f}, median {middle:.2f}, highest {high:.2f}")
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
