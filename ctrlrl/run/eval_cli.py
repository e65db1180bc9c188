"""``ctrlrl eval``: episodes of a run's policy, as it is or corrected, or a grid over an uncertainty set."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import numpy as np
import tyro

from ctrlrl.run.complaint import fail

if TYPE_CHECKING:
    from ctrlrl.engine.evaluate import Evaluation


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
    risk: tuple[float, ...] = ()
    """Levels at which to show value at risk and conditional value at risk: 0.1 is the worst tenth of the episodes."""
    out: Path | None = None
    """Also write the raw returns to this JSON file; --robust writes robust.json in the run folder by default."""
    correct: Path | None = None
    """Run of cdsa by which to correct the policy while it acts; with it, --help shows the options of correcting."""
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
    """With --robust or --law, and of runs of distributional_dp or on an inventory network: where to draw the picture;
    robust.png, law.png or inventory.png in the run folder by default."""
    law: bool = False
    """Of a run on an environment with a transition table: the law of its return beside that of the exact optimum for
    its objective, for the CVaR at the first --risk if there is one, and beside that of the best mean. Always done for
    distributional_dp."""
    scenarios: int | None = None
    """Of a run on an inventory network: test scenarios of its simulator, for the cost per store and period; by
    default every recorded series once, or as many as make about 4 million demands, 64 to 8,192."""


ROBUST = ("grid_points", "grid_convention", "env", "env_kwargs", "plot")
"""Fields of Eval that need --robust; laws and runs on an inventory network have a picture without."""


def main(words: list[str]) -> int:
    """Evaluate as ``words`` say; returns the exit status."""
    from ctrlrl import api
    from ctrlrl.engine.runfolder import write_json
    from ctrlrl.run import inventory_cli

    if any(word.partition("=")[0] == "--correct" for word in words):
        from ctrlrl.run import correction_cli

        return correction_cli.main(words)
    options = tyro.cli(Eval, args=words, prog="ctrlrl eval")
    if wrong := [p for p in options.risk if not 0.0 < p <= 1.0]:
        return fail(f"--risk {wrong[0]:g} is no share of the episodes; give numbers in (0, 1], such as 0.1", 2)
    if options.scenarios is not None and options.scenarios < 1:
        return fail(f"--scenarios {options.scenarios} must be at least 1", 2)
    if options.robust:
        if options.risk:
            return fail("--risk is of the episodes of one environment; leave it or --robust out", 2)
        if options.scenarios is not None:
            return fail("--scenarios is of an inventory network; leave it or --robust out", 2)
        if options.law:
            return fail("--law is of one environment; leave it or --robust out", 2)
        return _eval_robust(options)
    asked = [f.name for f in dataclasses.fields(Eval) if f.name in ROBUST and getattr(options, f.name) != f.default]
    if asked and asked != ["plot"]:
        flags = ", ".join(f"--{name.replace('_', '-')}" for name in asked)
        return fail(f"{flags} is for evaluations over an uncertainty set: add --robust", 2)
    agent = api.load(options.run, options.checkpoint)
    if options.law or agent.method == "distributional_dp":
        return _eval_law(agent, options)
    inventory, why = inventory_cli.network_of(agent, options.seed)
    if inventory is None and (options.plot is not None or options.scenarios is not None):
        flag = "--plot, without --robust," if options.scenarios is None else "--scenarios"
        return fail(f"{flag} is for runs on inventory networks; {why or f'{agent._env_name()} is none'}", 2)
    plot = options.plot or options.run / inventory_cli.PICTURE
    if inventory is not None and not plot.parent.is_dir():
        return fail(f"{plot.parent} does not exist; make it, or draw {plot.name} elsewhere", 1)
    episodes = 100 if options.episodes is None else options.episodes
    result = agent.evaluate(episodes, deterministic=not options.stochastic, seed=options.seed)
    figures = None if inventory is None else inventory_cli.figures(inventory, options.scenarios)
    if options.out is not None:
        extra = {} if figures is None else {"inventory": figures.document()}
        write_json(options.out, _document(agent, options, result) | extra)
    spec = None if inventory is None else agent.env_spec
    _show(agent, options, result, "" if spec is None else f" of the {spec.kwargs.get('split', 'train')} split")
    if inventory is not None and figures is not None:
        print("\n".join(inventory_cli.lines(figures, inventory.simulator)))
        inventory_cli.draw(inventory, plot, f"{agent.method} on {agent._env_name()}, {options.checkpoint} checkpoint")
        print(f"Picture: {plot}")
    elif why:
        print(f"  no cost per store and period: {why}")
    return 0


def _eval_law(agent: Any, options: Eval) -> int:
    """With the law of the return, exact and simulated."""
    from ctrlrl.engine.runfolder import write_json
    from ctrlrl.run import distribution_cli

    if options.scenarios is not None:
        return fail(f"--scenarios is for runs on inventory networks; {agent._env_name()} is none", 2)
    plot = options.plot or options.run / distribution_cli.PICTURE
    if not plot.parent.is_dir():
        return fail(f"{plot.parent} does not exist; make it, or draw {plot.name} elsewhere", 1)
    answer = distribution_cli.answer_of(agent, options.risk if options.law else ())
    deterministic = not options.stochastic
    result = agent.evaluate(100 if options.episodes is None else options.episodes, deterministic, seed=options.seed)
    found = distribution_cli.look(agent, result, deterministic, options.seed, answer)
    if options.out is not None:
        write_json(options.out, _document(agent, options, result) | {"law": found.document()})
    _show(agent, options, result)
    print("\n".join(found.lines()))
    distribution_cli.draw(found, plot, f"{agent.method} on {agent._env_name()}, {options.checkpoint} checkpoint")
    print(f"Picture: {plot}")
    return 0


def _document(agent: Any, options: Eval, result: Evaluation) -> dict[str, Any]:
    """For JSON: the raw returns."""
    return {
        "run": options.run,
        "checkpoint": options.checkpoint,
        "steps": agent.steps,
        "deterministic": not options.stochastic,
        "returns": result.returns,
        "normalized": agent.normalized(result.returns),
        "risk": {str(p): _at_risk(result, p) for p in options.risk},
        "lengths": result.lengths,
        "seeds": result.seeds,
    }


def _show(agent: Any, options: Eval, result: Evaluation, split: str = "") -> None:
    """Print the returns."""
    kind = "stochastic" if options.stochastic else "deterministic"
    print(
        f"{agent.method} on {agent._env_name()}, {options.checkpoint} checkpoint at {agent.steps:,} steps, "
        f"{len(result.returns)} {kind} episodes{split}"
    )
    low, middle, high = np.quantile(result.returns, (0.0, 0.5, 1.0))
    print(f"  mean {result.mean:.2f}, standard deviation over episodes {result.std:.2f}")
    print(f"  lowest {low:.2f}, median {middle:.2f}, highest {high:.2f}")
    for level in options.risk:
        worst, mean = result.value_at_risk(level), result.conditional_value_at_risk(level)
        print(f"  worst {100 * level:g} %: value at risk {worst:.2f}, conditional value at risk {mean:.2f}")
    scores = agent.normalized(result.returns)
    if scores is not None:
        print(f"  D4RL-normalised score {scores.mean():.1f}, standard error {scores.std() / len(scores) ** 0.5:.1f}")
    best = _best(agent, options)
    if best:
        print(best)


def _at_risk(result: Evaluation, level: float) -> dict[str, float]:
    return {
        "value_at_risk": result.value_at_risk(level),
        "conditional_value_at_risk": result.conditional_value_at_risk(level),
    }


def _best(agent: Any, options: Eval) -> str:
    """What the best of the evaluations during training was: chosen by these numbers, so no fair score."""
    from ctrlrl.engine.runfolder import read_evaluations

    evaluations = read_evaluations(options.run)
    if options.checkpoint != "last" or not evaluations:
        return ""
    best = max(evaluations, key=lambda line: np.mean(line["returns"]))
    mean, scores = np.mean(best["returns"]), agent.normalized(best["returns"])
    score = "" if scores is None else f", score {scores.mean():.1f}"
    return (
        f"  best evaluation during training: mean {mean:.2f}{score} over {len(best['returns'])} episodes at step "
        f"{best['step']:,} (chosen by its own number)"
    )


def _eval_robust(options: Eval) -> int:
    from rich.console import Console

    from ctrlrl import api
    from ctrlrl.engine import runfolder
    from ctrlrl.run import robust_figures

    try:
        env_kwargs = json.loads(options.env_kwargs)
    except ValueError as error:
        return fail(f"--env-kwargs is not JSON ({error}); example: --env-kwargs '{{\"friction\": 0.1}}'", 2)
    if not isinstance(env_kwargs, dict):
        return fail(f"--env-kwargs is {options.env_kwargs}, expected names and values in braces", 2)
    agent = api.load(options.run, options.checkpoint)
    out, plot = options.out or options.run / "robust.json", options.plot or options.run / "robust.png"
    for path in (out, plot):
        if not path.parent.is_dir():
            return fail(f"{path.parent} does not exist; make it, or write {path.name} elsewhere", 1)
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
