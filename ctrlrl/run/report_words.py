"""The sentences of a report, and how its numbers are written."""

from __future__ import annotations

import math
import re
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from ctrlrl.run.report_runs import Run
from ctrlrl.run.report_statistics import Estimate

NONE = "\N{EN DASH}"


def warnings(groups: Mapping[tuple[str, str], Sequence[Run]], evaluated: Mapping[str, bool]) -> list[str]:
    """What a reader must know before trusting the final scores of ``groups`` ((environment, label) to runs)."""
    said = []
    for env in sorted({env for env, _ in groups}):
        without = sum(not run.evaluations for (name, _), group in groups.items() if name == env for run in group)
        if without:
            said.append(
                f"{env}: {without} run{'s have' if without > 1 else ' has'} no evaluation yet, so all its numbers are "
                "training returns (rollout/ep_rew_mean: exploring policy, recent episodes), which are not final scores."
            )
    for (env, label), group in groups.items():
        said += [f"{label} on {env}: {line}" for line in _of_group(group, evaluated[env])]
    return said


def _of_group(group: Sequence[Run], evaluated: bool) -> list[str]:
    said = []
    ends = [(run.curve(evaluated)[0][-1], run.final(evaluated)) for run in group if len(run.curve(evaluated)[0])]
    finite = sum(math.isfinite(value) for _, value in ends)
    if len(ends) < len(group):
        said.append(f"{len(group) - len(ends)} of {len(group)} runs have recorded no return yet.")
    if finite < len(ends):
        said.append(
            f"{len(ends) - finite} of {len(group)} runs ended in returns that are not finite and are left out of the "
            "scores; what is left looks better than the method is."
        )
    if finite == 1:
        said.append("one run, so there is no interval.")
    elif 1 < finite < 5:
        said.append(f"{finite} runs; a bootstrap interval of so few is narrower than the truth.")
    last = [int(step) for step, _ in ends]
    if len(set(last)) > 1:
        said.append(f"runs of different length ({min(last):,} to {max(last):,} steps); each counts with its own end.")
    if going := [run for run in group if run.planned is not None and run.steps < run.planned]:
        said.append(f"{len(going)} of {len(group)} runs {'is' if len(going) == 1 else 'are'} unfinished.")
    seeds = [run.seed for run in group if run.seed is not None]
    if twice := sorted({seed for seed in seeds if seeds.count(seed) > 1}):
        said.append(f"seed {', '.join(map(str, twice))} occurs more than once; each run counts.")
    return said


def footnotes(references: Mapping[str, tuple[float, float]], reps: int) -> list[str]:
    """How every number was computed, in the order of the marks [1] to [5]."""
    how = f"95 % percentile interval of a stratified bootstrap over runs ({reps:,} replications, rliable)"
    given = "; ".join(f"{env}: {zero:g}, {one:g}" for env, (zero, one) in references.items()) or "none were given"
    return [
        "Final score of a run: mean undiscounted return over the episodes of its last evaluation, of the policy as it "
        "was at that step (the last, not the best). Where an environment has runs without evaluations: the last "
        "training return. IQM: interquartile mean over runs, the mean without the lowest and highest quarter (rounded "
        f"down: with fewer than four runs it is the mean). Interval: {how}.",
        "Normalised score: (final score \N{MINUS SIGN} zero) / (one \N{MINUS SIGN} zero) with the reference returns "
        f"({given}). IQM over all runs and environments together; {how}, resampling runs within each environment.",
        "Probability of improvement: share of pairs (one run of each method, same environment) in which the first has "
        "the higher final score, ties counting half, averaged over the environments both were run on "
        f"(Mann\N{EN DASH}Whitney U / number of pairs). {how[0].upper()}{how[1:]}.",
        "Curves: straight lines between recorded points; mean, lowest and highest run at each point of the range that "
        "all runs of the method cover. The band is a range, not a confidence interval.",
        "Wall-clock: from the start of training to the last record, evaluations included, time between a stop and a "
        "resume left out. Steps/s: steps / wall-clock of each run. Steps are environment steps over all copies.",
    ]


def source(group: Sequence[Run]) -> str:
    """Which episodes, of which checkpoint, the final scores of a group come from."""
    last = [run.evaluations[-1] for run in group]
    episodes, steps = sorted({len(r["returns"]) for r in last}), sorted({int(r["step"]) for r in last})
    modes = {r.get("deterministic") for r in last}
    known = {(True,): ", deterministic", (False,): ", stochastic", (None,): ""}
    mode = known.get(tuple(modes), ", deterministic and stochastic")
    return f"{span(episodes)} episode{'s' if episodes[-1] > 1 else ''} at step {span(steps)}{mode}"


def span(values: Sequence[int]) -> str:
    """One number, or the first and last."""
    return f"{values[0]:,}" if values[0] == values[-1] else f"{values[0]:,} to {values[-1]:,}"


def number(value: float) -> str:
    """A return with the digits it deserves."""
    digits = 0 if abs(value) >= 1000 else 1 if abs(value) >= 100 else 2 if abs(value) >= 1 else 3
    return f"{value:,.{digits}f}".replace("-", "\N{MINUS SIGN}")


def interval(estimate: Estimate, digits: int | None = None) -> str:
    """The interval in words."""
    if estimate.low is None or estimate.high is None:
        return "none: one run"
    low, high = ((f"{v:.{digits}f}" if digits is not None else number(v)) for v in (estimate.low, estimate.high))
    return f"{low} to {high}"


def spoken(panels: Mapping[str, Mapping[str, Estimate]]) -> str:
    """Estimates as a sentence, for those who cannot see the figure."""
    said = [
        f"{name + ', ' if name else ''}{label}: {number(e.value)} ({interval(e)})"
        for name, panel in panels.items() for label, e in panel.items()
    ]  # fmt: skip
    return "; ".join(said) + "."


def clock(seconds: float) -> str:
    """Hours, minutes and seconds."""
    whole = round(seconds)
    return f"{whole // 3600}:{whole // 60 % 60:02d}:{whole % 60:02d}"


def median(values: Sequence[float], show: Callable[[float], str]) -> str:
    """Median as text, a dash without values."""
    return show(statistics.median(values)) if values else NONE


def values(found: Iterable[str | None]) -> str:
    """Distinct values as text."""
    return " / ".join(sorted({NONE if value is None else value for value in found}))


def few(names: Sequence[str]) -> str:
    """Up to three names, and how many more."""
    return ", ".join(names) if len(names) <= 3 else f"{', '.join(names[:3])} and {len(names) - 3} more"


def slug(name: str) -> str:
    """``name`` as part of a file name."""
    return re.sub(r"[^A-Za-z0-9._-]+", "_", name).strip("._") or "environment"


def packages(versions: Mapping[str, Any]) -> str:
    """The packages that matter to a result."""
    names = ("ctrlrl", "torch", "gymnasium", "mujoco", "envpool", "numpy", "python")
    return ", ".join(f"{name} {versions[name]}" for name in names if versions.get(name)) or NONE


def commit(versions: Mapping[str, Any]) -> str:
    """The commit the run was started from, and whether files were changed since."""
    if not versions.get("git_commit"):
        return NONE
    return str(versions["git_commit"])[:10] + (" with changes" if versions.get("git_dirty") else "")


def machine(versions: Mapping[str, Any]) -> str:
    """Accelerator, system and processors."""
    said = [str(versions[name]) for name in ("gpu", "platform") if versions.get(name)]
    if versions.get("cpu_count"):
        said.append(f"{versions['cpu_count']} CPUs, {versions.get('torch_threads', '?')} threads of torch")
    return ", ".join(said) or NONE
