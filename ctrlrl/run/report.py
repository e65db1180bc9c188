"""One page about some runs: learning curves, final scores with intervals, speed, and what differs between them."""

from __future__ import annotations

import base64
import itertools
import math
import os
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ctrlrl.engine.checkpoint import atomic_path
from ctrlrl.run import report_actions as actions
from ctrlrl.run import report_figures as figures
from ctrlrl.run import report_statistics as stats
from ctrlrl.run import report_updates as updates
from ctrlrl.run import report_words as words
from ctrlrl.run.report_page import Image, Section, Table, render
from ctrlrl.run.report_runs import Run, differences, load, stage_starts, version_fields


def report(
    runs: Iterable[str | os.PathLike[str]] | str | os.PathLike[str],
    out: str | os.PathLike[str] = "report",
    references: Mapping[str, tuple[float, float]] | None = None,
    reps: int = stats.REPS,
) -> Path:
    """Write ``report.html`` (self-contained) and its figures as PNG files into the folder ``out``.

    Args:
        runs: Run folders, or folders above runs.
        out: Made if needed; a report there is replaced.
        references: Environment id to (return that counts 0, return that counts 1). Scores are averaged over
            environments only where each has a reference.
        reps: Bootstrap replications of each interval.

    Returns:
        Path of the page.

    Raises:
        FileNotFoundError: A path that is no run and has none below it.
        ValueError: A damaged record, or a reference whose two returns are the same.
    """
    loaded = load([runs] if isinstance(runs, str | os.PathLike) else runs)
    if not loaded:
        raise FileNotFoundError("no runs were given; name at least one run folder, or a folder above runs")
    for env, (zero, one) in (references or {}).items():
        if not math.isfinite(one - zero) or one == zero:
            raise ValueError(f"reference of {env} is ({zero}, {one}); expected two different returns")
    folder = Path(out)
    if folder.exists() and not folder.is_dir():
        raise FileExistsError(f"{folder} is a file, expected a folder to write report.html into")
    folder.mkdir(parents=True, exist_ok=True)
    page = _Page(loaded, folder, dict(references or {}), reps)
    sections = [page.final_scores(), page.improvement(), page.curves(), page.actions(), page.updates()]
    sections += [page.speed(), page.settings(), page.run_list()]
    shown = [section for section in sections if section is not None]
    html = render(page.title(), page.summary(), shown, words.footnotes(page.references, reps))
    target = folder / "report.html"
    with atomic_path(target) as temporary:
        temporary.write_text(html, encoding="utf-8")
    return target


@dataclass
class _Page:
    runs: Sequence[Run]
    folder: Path
    references: Mapping[str, tuple[float, float]]
    reps: int

    def __post_init__(self) -> None:
        self.envs = sorted({run.env for run in self.runs})
        self.labels = sorted({run.label for run in self.runs})
        keys = sorted({(run.env, run.label) for run in self.runs})
        self.groups = {key: [run for run in self.runs if (run.env, run.label) == key] for key in keys}
        # One source per environment: evaluations and training returns are never compared with each other.
        self.evaluated = {env: all(run.evaluations for run in self.runs if run.env == env) for env in self.envs}
        self.scores = {
            (env, label): np.array([s for run in group if math.isfinite(s := run.final(self.evaluated[env]))])
            for (env, label), group in self.groups.items()
        }

    def title(self) -> str:
        return f"{words.few(self.labels)} on {words.few(self.envs)}"

    def summary(self) -> list[str]:
        counts = [(len(self.runs), "run"), (len(self.labels), "method"), (len(self.envs), "environment")]
        said = ", ".join(f"{n} {name}{'s' if n != 1 else ''}" for n, name in counts)
        return [f"{said}. Written {time.strftime('%Y-%m-%d %H:%M')} by ctrlrl."]

    # -- sections -----------------------------------------------------------------------------

    def final_scores(self) -> Section:
        section = Section("Final scores", "final")
        panels: dict[str, dict[str, stats.Estimate]] = {}
        rows = []
        for (env, label), group in self.groups.items():
            scores = self.scores[env, label]
            source = words.source(group) if self.evaluated[env] else "training return"
            if not len(scores):
                rows.append([env, label, source, f"0 of {len(group)}", words.NONE, words.NONE, words.NONE])
                continue
            estimate = stats.iqm(scores[:, None], self.reps)
            panels.setdefault(env, {})[label] = estimate
            used = str(len(scores)) if len(scores) == len(group) else f"{len(scores)} of {len(group)}"
            rows.append(
                [
                    env,
                    label,
                    source,
                    used,
                    words.number(estimate.value),
                    words.interval(estimate),
                    words.number(scores.mean()),
                ]
            )
        if panels:
            alt = "Interquartile mean of the final return with its 95 percent interval. " + words.spoken(panels)
            caption = "Final return per method: dot, interquartile mean over runs; bar, 95 % interval.[1]"
            drawn = figures.intervals(panels, self.labels, "final return (sum of rewards per episode)")
            section.images.append(self._image("final-scores", drawn, alt, caption))
        head = ["Environment", "Method", "Taken from", "Runs", "IQM", "95 % interval", "Mean"]
        section.tables.append(Table(head, rows, 3, "Return of the last evaluation of each run [1]"))
        section.notes += words.warnings(self.groups, self.evaluated)
        self._aggregate(section)
        return section

    def _aggregate(self, section: Section) -> None:
        if len(self.envs) < 2:
            return
        missing = [env for env in self.envs if env not in self.references]
        if missing:
            section.text.append(
                f"No score over all environments: returns of different environments have different scales, and "
                f"{words.few(missing)} {'has' if len(missing) == 1 else 'have'} no reference returns to normalise by."
            )
            return
        estimates: dict[str, stats.Estimate] = {}
        for label in self.labels:
            matrix, said = self._matrix(label, self.envs)
            if matrix is None:
                section.text.append(
                    f"{label}: no score over all environments, for it has no score in {words.few(said)}."
                )
                continue
            scale = np.array([self.references[env] for env in self.envs])
            estimates[label] = stats.iqm((matrix - scale[:, 0]) / (scale[:, 1] - scale[:, 0]), self.reps)
            section.notes += [f"{label}: {line}" for line in said]
        if estimates:
            panels = {f"All {len(self.envs)} environments": estimates}
            alt = "Interquartile mean of the normalised score over all environments. " + words.spoken(panels)
            drawn = figures.intervals(panels, self.labels, "normalised score (0 and 1: the reference returns)")
            caption = "Normalised final score over all environments, with 95 % interval.[2]"
            section.images.append(self._image("aggregate-scores", drawn, alt, caption))
            rows = [[name, str(e.n), words.number(e.value), words.interval(e)] for name, e in estimates.items()]
            head = ["Method", "Runs per environment", "IQM", "95 % interval"]
            section.tables.append(Table(head, rows, 1, "Normalised score over all environments [2]"))

    def _matrix(self, label: str, envs: Sequence[str]) -> tuple[np.ndarray | None, list[str]]:
        """[runs, environments] of final scores, and what has to be said about it (without it: what is missing)."""
        columns = [self.scores.get((env, label), np.zeros(0)) for env in envs]
        if missing := [env for env, column in zip(envs, columns, strict=True) if not len(column)]:
            return None, missing
        n = min(map(len, columns))
        said = [] if n == max(map(len, columns)) else [
            f"environments have different numbers of runs; the first {n} by seed of each count over all environments."
        ]  # fmt: skip
        return np.column_stack([column[:n] for column in columns]), said

    def improvement(self) -> Section:
        section = Section("Probability of improvement", "improvement")
        if len(self.labels) < 2:
            section.text.append("There is one method, so nothing to compare: give runs of two or more.")
        estimates, rows = {}, []
        for x, y in itertools.combinations(self.labels, 2):
            shared = [e for e in self.envs if len(self.scores.get((e, x), ())) and len(self.scores.get((e, y), ()))]
            if not shared:
                section.text.append(f"{x} and {y} have no environment in common: nothing to compare.")
                continue
            (a, said_x), (b, said_y) = self._matrix(x, shared), self._matrix(y, shared)
            assert a is not None and b is not None
            estimate = stats.probability_of_improvement(a, b, self.reps)
            estimates[f"{x} > {y}"] = estimate
            rows.append(
                [
                    f"{x} > {y}",
                    str(len(shared)),
                    f"{len(a)} and {len(b)}",
                    f"{estimate.value:.2f}",
                    words.interval(estimate, 2),
                ]
            )
            section.notes += [f"{name}: {line}" for name, said in ((x, said_x), (y, said_y)) for line in said]
        if estimates:
            alt = "Probability that a run of one method ends above a run of the other. " + words.spoken({"": estimates})
            caption = "Chance that a run of the first method ends above a run of the second; dotted: no difference.[3]"
            drawn = figures.intervals({"": estimates}, self.labels, "probability", middle=0.5, limits=(-0.02, 1.02))
            section.images.append(self._image("improvement", drawn, alt, caption))
            head = ["Pair", "Environments", "Runs", "Probability", "95 % interval"]
            section.tables.append(Table(head, rows, 1, "Probability of improvement [3]"))
        section.notes = list(dict.fromkeys(section.notes))
        return section

    def curves(self) -> Section:
        section = Section("Learning curves", "curves")
        for env in self.envs:
            groups = {label: group for (name, label), group in self.groups.items() if name == env}
            evaluated = self.evaluated[env]
            y_label = "evaluation return" if evaluated else "training return (mean of recent episodes)"
            for column, x_label, short in ((0, "environment steps", "steps"), (1, "wall-clock (minutes)", "time")):
                scale = 1.0 if column == 0 else 1 / 60
                points = {k: [r.curve(evaluated) for r in group] for k, group in groups.items()}
                drawn = {k: stats.curve([(p[column] * scale, p[2]) for p in ps]) for k, ps in points.items()}
                shown = {label: one for label, one in drawn.items() if one is not None}
                if not shown:
                    section.text.append(f"{env}: no return has been recorded yet, so there is no curve over {x_label}.")
                    continue
                means = [f"{k} ends at {words.number(c.mean[-1])}" for k, c in shown.items() if len(c.mean)]
                alt = f"Learning curves on {env}, {y_label} over {x_label}. {'; '.join(means)}."
                caption = (
                    f"{env}, {y_label} over {x_label}. Thick: mean; band: worst to best run; thin: single runs.[4]"
                )
                if all(len(one.runs) == 1 for one in shown.values()):
                    caption = f"{env}, {y_label} over {x_label}; one run per method, so no band.[4]"
                if cut := [label for label, one in shown.items() if one.cut]:
                    caption += f" Runs of {words.few(cut)} end at different points: mean and band stop at the shortest."
                fits = {k: [s * scale for s in stage_starts(groups[k], column)] for k in shown}
                if any(found and len(groups[k]) > 1 for k, found in fits.items()):
                    caption += " Fits of decoders: the median over runs."
                png = figures.learning_curves(shown, self.labels, x_label, y_label, fits)
                section.images.append(self._image(f"curve-{words.slug(env)}-{short}", png, alt, caption))
        return section

    def actions(self) -> Section | None:
        return actions.section(self.groups, self.labels, self._image)

    def updates(self) -> Section | None:
        return updates.section(self.groups, self.labels, self._image)

    def speed(self) -> Section:
        rows = []
        for (env, label), group in self.groups.items():
            timed = [run for run in group if run.time_s > 0]
            rate = words.median([run.steps / run.time_s for run in timed], lambda v: f"{v:,.0f}")
            clock = words.median([run.time_s for run in timed], words.clock)
            steps = words.median([run.steps for run in group], lambda v: f"{v:,.0f}")
            rows.append([env, label, str(len(timed)), steps, clock, rate])
        head = ["Environment", "Method", "Runs", "Steps", "Wall-clock (h:mm:ss)", "Steps/s"]
        return Section("Speed", "speed", tables=[Table(head, rows, 2, "Medians over runs [5]")])

    def settings(self) -> Section:
        section = Section("What differs", "settings")
        groups = self.groups
        names = differences(self.runs, [run.fields for run in self.runs])
        if names:
            rows = [
                [n, *(words.values(run.fields.get(n) for run in group) for group in groups.values())] for n in names
            ]
            head = ["Setting", *(f"{label} \N{MIDDLE DOT} {env}" for env, label in groups)]
            section.tables.append(Table(head, rows, caption="Settings that are not the same in all runs"))
        else:
            section.text.append(
                "All runs have the same settings but for method, environment and seed." if len(self.runs) > 1
                else "There is one run, so nothing to compare its settings with."
            )  # fmt: skip
        versions = differences(self.runs, [version_fields(run) for run in self.runs])
        if versions:
            section.notes.append(
                f"The runs were made with different versions or machines: {', '.join(versions)} differ."
            )
        return section

    def run_list(self) -> Section:
        section = Section("Runs", "runs")
        tail = {
            "Versions": [words.packages(run.versions) for run in self.runs],
            "Commit": [words.commit(run.versions) for run in self.runs],
            "Machine": [words.machine(run.versions) for run in self.runs],
        }
        # What is the same everywhere is said once instead of in every row.
        common = {name: cells[0] for name, cells in tail.items() if len(set(cells)) == 1}
        section.text += [f"{name}: {text}." for name, text in common.items() if text != words.NONE]
        tail = {name: cells for name, cells in tail.items() if name not in common}
        rows = []
        for index, run in enumerate(self.runs):
            unfinished = run.planned is not None and run.steps < run.planned
            steps = f"{run.steps:,} of {run.planned:,}" if unfinished else f"{run.steps:,}"
            seed = words.NONE if run.seed is None else str(run.seed)
            rows.append([run.name, run.env, run.label, seed, steps, *(cells[index] for cells in tail.values())])
        head = ["Run", "Environment", "Method", "Seed", "Steps", *tail]
        section.tables.append(Table(head, rows, caption="Folder, settings and steps done of each run"))
        return section

    def _image(self, name: str, png: bytes, alt: str, caption: str) -> Image:
        with atomic_path(self.folder / f"{name}.png") as temporary:
            temporary.write_bytes(png)
        return Image(f"{name}.png", base64.b64encode(png).decode(), alt, caption)
