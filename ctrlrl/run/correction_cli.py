"""``ctrlrl eval RUN --correct CDSA_RUN``: a policy corrected by the density of a dataset, over a sweep of strengths."""

from __future__ import annotations

import dataclasses
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple

import numpy as np
import tyro

from ctrlrl.run.complaint import fail

if TYPE_CHECKING:
    from ctrlrl.engine.evaluate import Evaluation

MEASURES = ("mean", "VaR", "CVaR")


@dataclass(frozen=True)
class EvalCorrected:
    """Evaluate a run as it is and corrected by a run of cdsa, for every pair of strengths, on the same episodes."""

    run: Annotated[Path, tyro.conf.Positional]
    """Run folder of the policy, or an ONNX file."""
    correct: Path
    """Run folder of cdsa."""
    eta_action: tuple[float, ...] = (0.5,)
    """Sizes of the action's steps."""
    eta_state: tuple[float, ...] = (0.0,)
    """Sizes of the state's step. A weak one can be worse than none: look at the whole curve."""
    sigma_start: float = 1.0
    """Largest noise level of the action's steps."""
    sigma_end: float = 0.12
    """Smallest one; levels between are geometric."""
    steps: tuple[int, ...] = (2, 3, 4, 5)
    """Steps at each level; as many levels as numbers."""
    sigma_state: float = 0.2
    """Noise level of the state's step."""
    score_on: Literal["joint", "conditional"] = "conditional"
    """Gradient of log p(s, a), or of log p(a | s) and log p(s)."""
    state_grad_at: Literal["state", "next_state"] = "state"
    """Take the gradient of states where the policy is, or where its action leads to."""
    combine: Literal["add", "replace"] = "add"
    """Add the change that the inverse dynamics asks for, or do what they say."""
    skip_in_data: bool = True
    """Leave steps out where the gradient is no larger than in nine tenths of the data."""
    blend: tuple[float, ...] = ()
    """Also blend the policy with that of --blend-with by these weights: the control that tells correction from
    imitation."""
    blend_with: Path | None = None
    """Run folder of a policy learned from the same data, usually bc."""
    controls: tuple[Path, ...] = ()
    """Runs to evaluate beside it as they are, for example one of td3_bc."""
    risk: float = 0.1
    """Share of the worst episodes that VaR and CVaR are of."""
    episodes: int = 100
    """Whole episodes, each from a seed of its own; the same for every row."""
    checkpoint: str = "last"
    """last, best or interrupted: of the policy."""
    stochastic: bool = False
    """Sample the policy's actions instead of taking the mode."""
    seed: int | None = None
    """Seed of the episodes; the run's own by default, that of the cdsa run for an ONNX file."""
    out: Path | None = None
    """Also write the raw returns of every row to this JSON file."""
    plot: Path | None = None
    """Where to draw a sweep; correction.png in the run folder by default (of an ONNX file beside it)."""


class Row(NamedTuple):
    """One policy and how it did."""

    name: str
    eta_action: float | None
    eta_state: float | None
    result: Evaluation


def main(words: list[str]) -> int:
    """Evaluate as ``words`` say; returns the exit status."""
    options = tyro.cli(EvalCorrected, args=words, prog="ctrlrl eval")
    if bool(options.blend) != (options.blend_with is not None):
        return fail("--blend needs the run that is blended in, --blend-with RUN, and that needs --blend WEIGHTS", 2)
    if not 0.0 < options.risk <= 1.0:
        return fail(f"--risk {options.risk} must lie in (0, 1]", 2)
    if options.episodes < 1:
        return fail(f"--episodes {options.episodes} must be at least 1", 2)
    sweep = len(options.eta_action) * len(options.eta_state) > 1
    plot = options.plot or ((options.run.parent if options.run.suffix == ".onnx" else options.run) / "correction.png")
    plot = plot if sweep or options.plot is not None else None
    for path in filter(None, (options.out, plot)):
        if not path.parent.is_dir():
            return fail(f"{path.parent} does not exist; make it, or write {path.name} elsewhere", 1)
    return _run(options, plot)


def _run(options: EvalCorrected, plot: Path | None) -> int:
    from rich.console import Console

    from ctrlrl.engine.runfolder import versions, write_json

    title, rows, normalized = _evaluate(options)
    kind = "stochastic" if options.stochastic else "deterministic"
    print(f"{title}, {options.episodes} {kind} episodes each")
    Console().print(_table(rows, options.risk, normalized))
    if options.out is not None:
        document = [
            {"policy": row.name, "eta_action": row.eta_action, "eta_state": row.eta_state, **row.result._asdict()}
            for row in rows
        ]
        asked = dataclasses.asdict(options)
        found = {"run": options.run, "correct": options.correct, "options": asked, "rows": document}
        write_json(options.out, found | {"versions": versions()})
        print(f"Returns: {options.out}")
    if plot is not None:
        plot.write_bytes(picture(rows, options.risk, title))
        print(f"Picture: {plot}")
    return 0


def _evaluate(options: EvalCorrected) -> tuple[str, list[Row], Any]:
    """A title, a row for each policy, the one without a correction first, and how returns become scores."""
    from ctrlrl import api
    from ctrlrl.engine.corrected import BlendedAgent, CorrectionConfig, PolicyAgent
    from ctrlrl.offline.cdsa_agent import CDSAAgent

    cdsa = api.load(options.correct)
    if not isinstance(cdsa, CDSAAgent):
        raise ValueError(f"--correct {options.correct} is a run of {cdsa.method}, expected one of cdsa")
    policy: Any = options.run if options.run.suffix == ".onnx" else api.load(options.run, options.checkpoint)
    names = {f.name for f in dataclasses.fields(EvalCorrected)} - {"eta_action", "eta_state"}
    settings = {f.name: getattr(options, f.name) for f in dataclasses.fields(CorrectionConfig) if f.name in names}
    about: dict[str, Any] = {
        "observation_space": cdsa.observation_space, "action_space": cdsa.action_space, "env_spec": cdsa.env_spec,
        "seed": cdsa.seed, "info": cdsa.info,
    }  # fmt: skip
    changed: list[tuple[str, float | None, float | None, Any]] = [
        ("corrected", x, y, cdsa.correct(policy, CorrectionConfig(x, y, **settings)))
        for x in options.eta_action for y in options.eta_state
    ]  # fmt: skip
    if options.blend_with is not None:
        other = api.load(options.blend_with)
        changed += [
            (f"{w:g} of {other.method}", None, None, BlendedAgent(policy, other, w, **about)) for w in options.blend
        ]
    plain = PolicyAgent(policy, **about)
    seed = plain.seed if options.seed is None else options.seed
    for path in options.controls:
        control = PolicyAgent(api.load(path), **about)
        control.env_spec = plain.env_spec  # one table, one environment
        changed.append((path.name, None, None, control))
    rows = [
        Row(name, x, y, agent.evaluate(options.episodes, not options.stochastic, seed=seed))
        for name, x, y, agent in [("uncorrected", None, None, plain), *changed]
    ]
    name = options.run.name if isinstance(policy, Path) else policy.method
    env = plain.env_spec.id if plain.env_spec is not None else cdsa.info.id
    return f"{name} on {env}, corrected by {options.correct.name}", rows, plain.normalized


def measures(result: Evaluation, risk: float) -> tuple[float, float, float]:
    """Mean return, value at risk and conditional value at risk."""
    return result.mean, result.value_at_risk(risk), result.conditional_value_at_risk(risk)


def _table(rows: Sequence[Row], risk: float, normalized: Any) -> Any:
    from rich.table import Table

    share, scored = f"{100 * risk:g}", normalized(rows[0].result.returns) is not None
    found = Table(box=None, pad_edge=False)
    found.add_column("")
    for name in ("eta-action", "eta-state", "mean", "error", f"VaR {share}", f"CVaR {share}", *["score"] * scored):
        found.add_column(name, justify="right")
    for row in rows:
        mean, var, cvar = measures(row.result, risk)
        error = row.result.std / len(row.result.returns) ** 0.5
        strengths = ["" if x is None else f"{x:g}" for x in (row.eta_action, row.eta_state)]
        numbers = [f"{x:.2f}" for x in (mean, error, var, cvar)]
        score = [f"{normalized(row.result.returns).mean():.1f}"] if scored else []
        found.add_row(row.name, *strengths, *numbers, *score)
    return found


def picture(rows: Sequence[Row], risk: float, title: str) -> bytes:
    """PNG: mean, VaR and CVaR against the strength that was swept, the uncorrected policy as a dashed line.

    Of two sweeps the one over eta_state is across, with a panel for each eta_action.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    from ctrlrl.run.report_figures import style_of

    swept = [row for row in rows if row.name == "corrected"]
    states = len({row.eta_state for row in swept}) > 1
    across, apart = ("eta_state", "eta_action") if states else ("eta_action", "eta_state")
    panels = sorted({getattr(row, apart) for row in swept})
    figure = Figure(figsize=(3.6 * len(panels) + 0.8, 3.8), dpi=160, layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    plain = measures(rows[0].result, risk)
    for axes, value in zip(figure.subplots(1, len(panels), squeeze=False, sharey=True)[0], panels, strict=True):
        line = sorted((row for row in swept if getattr(row, apart) == value), key=lambda row: getattr(row, across))
        x = [getattr(row, across) for row in line]
        curves = np.array([measures(row.result, risk) for row in line])
        for k, name in enumerate(MEASURES):
            colour = style_of(k)[0]
            axes.plot(x, curves[:, k], color=colour, marker="o", ms=4, lw=1.6, label=_label(name, risk))
            axes.axhline(plain[k], color=colour, ls="--", lw=1.0)
        axes.set_xlabel(across.replace("_", "-"))
        axes.set_title(f"{apart.replace('_', '-')} {value:g}", fontsize=9)
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(labelsize=8)
    figure.axes[0].set_ylabel("return")
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False, fontsize=9)
    figure.suptitle(f"{title}\ndashed: uncorrected", fontsize=9)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": "ctrlrl"})
    return buffer.getvalue()


def _label(name: str, risk: float) -> str:
    return name if name == "mean" else f"{name} {100 * risk:g}"
