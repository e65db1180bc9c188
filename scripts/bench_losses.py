"""All losses side by side: two token tasks against GRPO, two control tasks against PPO, and the papers' claims.

Everyone has the same network and number of steps, the loop's defaults (rows per optimiser step, passes, learning
rate) and the loss's own; what a method demands of the loop (its ``loop_defaults``) comes first. Nothing is tuned. The
token tasks are small enough for a transformer of one block of width 32, so that a run takes seconds. Of the dozen
losses only GRPO has a penalty on leaving the reference policy, so GRPO without it stands beside them. A run is scored
by its last policy, which acts by sampling, from fixed reset seeds: 512 answers, or 20 episodes of control. The table
gives the interquartile mean over seeds with a 95 % bootstrap interval over runs (rliable, 2,000 repetitions); losses
with one seed have no interval, and say whether they run and learn, not how they rank.

Each run is a shard (one JSON file); a later call adds the missing ones and merges all.

    python scripts/bench_losses.py --minutes 60 --out bench/losses                      # a dozen losses, five seeds
    python scripts/bench_losses.py --minutes 60 --out bench/losses --all --claims       # every loss; the claims
    python scripts/bench_losses.py --minutes 0 --out bench/losses --markdown --plot assets/losses.png
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import re
import sys
import time
import traceback
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

PLAIN = "grpo,ref_kl_coef=0"
HEADLINE = ("grpo", PLAIN, "gspo", "cispo", "dr_grpo", "rloo", "ppo", "bapo", "mhpo", "aepo", "epo", "d3s", "bnpo")
SEEDS = 5
ANSWERS, EPISODES = 512, 20
POINTS = 12  # of each run's curve


# -- what is run ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Task:
    """An environment, a budget, and the settings that all losses share on it."""

    env: str
    steps: int
    baseline: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    episodes: Mapping[str, Any] = field(default_factory=dict)
    """Settings of losses that see whole episodes."""
    transitions: Mapping[str, Any] = field(default_factory=dict)
    """Settings of losses that see single transitions."""
    words: str = ""


SMALL = {"width": 32, "layers": 1}
CONTROL = {"n_envs": 8, "backend": "sync"}


def tokens(name: str, steps: int, words: str = "", more: Mapping[str, Any] | None = None, **kwargs: Any) -> Task:
    settings = {**SMALL, "env_kwargs": kwargs, **(more or {})}
    return Task(f"ctrlrl/Token{name}-v0", steps, "grpo", settings, words=words)


TASKS = {
    "sort": tokens("Sort", 32_000, "sort 4 of 4 digits", digits=4, size=4),
    "arithmetic": tokens("Arithmetic", 60_000, "two turns of running sums in base 3", digits=3, turns=2),
    "cartpole": Task(
        "CartPole-v1", 25_000, "ppo", CONTROL, {"n_groups": 4, "group_size": 8, "batch_size": 8}, {"n_steps": 256}
    ),
    "acrobot": Task(
        "Acrobot-v1", 60_000, "ppo", CONTROL, {"n_groups": 2, "group_size": 8, "batch_size": 4}, {"n_steps": 256}
    ),
}
# the tasks of the claims
TASKS |= {
    "entropy": tokens("Sort", 60_000, "as sort, twice as long", digits=4, size=4),
    "balance": tokens(
        "Sort", 40_000, "all or nothing: sort 3 of 4 digits, 8 passes", {"epochs": 8}, digits=4, size=3, binary=True
    ),
    "length": tokens("Format", 40_000, "no reward for brevity", digits=4, size=3, weights=[0.8, 0.2, 0.0]),
    "variance": tokens("Ladder", 30_000, "pool of 64 prompts", {"seed_pool": 64}, digits=4, rungs=5),
    "channels": tokens("Format", 40_000, "correctness, format, brevity", digits=4, size=3),
}


class Job(NamedTuple):
    task: str
    method: str
    seed: int


def parse(method: str) -> tuple[str, dict[str, Any]]:
    """``bapo,epochs=8`` as a name and settings; values are JSON."""
    name, *settings = re.split(r",(?=[a-z_]+=)", method)
    return name, {k: json.loads(v) for k, v in (s.split("=", 1) for s in settings)}


def shard(out: Path, job: Job) -> Path:
    name = re.sub(r"[^\w.,=+-]", "", job.method)
    return out / f"{job.task}-{TASKS[job.task].steps}" / f"{name}-s{job.seed}.json"


# -- one run --------------------------------------------------------------------------------------


class Watched:
    """A loss that notes what an iteration's episodes were, on their way through ``begin``."""

    def __init__(self, loss: Any) -> None:
        self.loss, self.batch, self.knobs = loss, None, {}
        self.used = self.seen = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self.loss, name)

    def begin(self, batch: Any, knobs: Any, memory: Any) -> Any:
        import torch

        start = self.loss.begin(batch, knobs, memory)
        self.batch, self.knobs = start.batch, knobs
        self.seen += int(batch.mask.sum())
        self.used += int((start.batch.mask & (start.batch.advantage != 0)).sum())
        own = slice(None) if batch.source is None else batch.source == 0
        group, score = batch.group[own], batch.sequence_return[own]
        _, index = group.unique(return_inverse=True)
        count = int(index.max()) + 1
        high = torch.full((count,), -torch.inf).scatter_reduce(0, index, score.cpu().float(), "amax")
        low = torch.full((count,), torch.inf).scatter_reduce(0, index, score.cpu().float(), "amin")
        return start._replace(stats=start.stats | {"varied": (high > low).float().mean()})

    def shares(self, policy: Any) -> dict[str, float]:
        """Share of the positive advantages in the last batch's objective after the update: with the band it began
        with, and with the one the loss uses."""
        import torch

        from ctrlrl.core import head

        batch = self.batch
        assert batch is not None
        with torch.no_grad():
            out = policy(batch.obs, batch.action)
            batch = batch._replace(coef=self.loss.prepare(batch, self.knobs).coef)
            a = batch.coef["advantage"]
            r = torch.where(batch.mask, out.logp - batch.logp_old, 0.0).exp()
            weight = torch.where(batch.mask, batch.logp_old.exp(), 0.0)

            def share(low: Any, high: Any) -> float:
                size = weight * head.clipped_surrogate(r, a, 1 - low, high - 1).abs()
                total = float(size.sum())
                return float(size[a > 0].sum()) / total if total > 0 else float("nan")

            if not hasattr(self.loss, "band"):
                low, high = 1 - self.loss.eps_low, 1 + self.loss.eps_high
                return {"before": share(low, high), "after": share(low, high)}
            low, high = self.loss.band(batch, out)
            found = {"before": share(self.loss.ratio_low, self.loss.ratio_high), "after": share(low, high)}
            return found | {"low": float(low), "high": float(high)}


class Recorder:
    """A callback that keeps a run's curve."""

    def __init__(self, watched: Watched | None, shares: bool) -> None:
        self.watched, self.rows, self.shares = watched, [], [] if shares else None

    def on_update(self, agent: Any, step: int, metrics: Mapping[str, float]) -> None:
        names = {"reward": "rollout/ep_rew_mean", "length": "rollout/ep_len_mean", "success": "train/success",
                 "entropy": "train/entropy", "kl": "train/approx_kl", "varied": "train/varied"}  # fmt: skip
        row = {k: float(metrics[v]) for k, v in names.items() if v in metrics}
        if "entropy" not in row and "train/entropy_loss" in metrics:
            row["entropy"] = -float(metrics["train/entropy_loss"])
        self.rows.append({"step": step, **row})
        if self.shares is not None and self.watched is not None:
            self.shares.append(self.watched.shares(agent.policy))

    def curve(self) -> list[dict[str, float]]:
        picked = sorted({round(i) for i in np.linspace(0, len(self.rows) - 1, POINTS)}) if self.rows else []
        return [{k: round(v, 4) for k, v in self.rows[i].items()} for i in picked]

    def mean(self, name: str) -> float | None:
        values = [row[name] for row in self.rows if name in row]
        return float(np.mean(values)) if values else None


def build(task: Task, method: str, seed: int) -> Any:
    """The agent: the task's settings, then the loss's ``loop_defaults``, then those in ``method``."""
    from ctrlrl.api import make
    from ctrlrl.engine.world import whole_episodes
    from ctrlrl.losses import base

    name, chosen = parse(method)
    loss = base.get(name)
    whole = whole_episodes("tokens" if "Token" in task.env else "discrete", loss.needs)
    settings = {**task.settings, **(task.episodes if whole else task.transitions)}
    settings = {k: v for k, v in settings.items() if k not in loss.loop_defaults} | chosen
    return make(
        name, task.env, seed=seed, device="cpu", threads=1, eval_every=None, diagnose_every=None, **settings
    )  # fmt: skip


def score_tokens(agent: Any, answers: int = ANSWERS, seed: int = 10_000) -> dict[str, Any]:
    """How the policy answers when it samples."""
    import torch

    from ctrlrl.engine.environments import make_native
    from ctrlrl.engine.seeding import derive, generator

    env = make_native(agent.env_spec, answers)
    obs, info = env.reset(seed=[derive(seed, "losses", k) for k in range(answers)])
    noise = generator(seed, "losses")
    running = np.ones(answers, dtype=bool)
    reward, length, success = np.zeros(answers), np.zeros(answers), np.zeros(answers, dtype=bool)
    channels, entropies = None, []
    while running.any():
        with torch.inference_mode():
            at = torch.as_tensor(obs)
            dist = agent.policy.distribution(at)
            action = dist.sample(agent.policy.noise(1, answers, noise)[0]).numpy()
        entropies.append(dist.entropy().numpy()[running & (info["turn"] >= 0)])
        obs, gain, terminated, _, info = env.step(action)
        length += running
        reward += gain
        ended = running & terminated
        success |= ended & info["success"]
        channels = np.zeros(info["rewards"].shape) if channels is None else channels
        channels[ended] = info["rewards"][ended]
        running &= ~terminated
    env.close()
    assert channels is not None
    wrong = length[~success]
    return {
        "success": float(success.mean()),
        "reward": float(reward.mean()),
        "entropy": float(np.concatenate(entropies).mean()),
        "length": float(length.mean()),
        "wrong_length": float(wrong.mean()) if len(wrong) else None,
        "right_length": float(length[success].mean()) if success.any() else None,
        "channels": channels.mean(0).tolist(),
    }


def run(job: Job, out: str, steps: int | None = None) -> str:
    """Train, score, write the shard; returns what happened in a word."""
    import torch

    from ctrlrl.engine.config import ConfigError
    from ctrlrl.engine.episode_feed import EpisodeFeed
    from ctrlrl.engine.runfolder import versions, write_json

    torch.set_num_threads(1)
    task, began, cpu = TASKS[job.task], time.perf_counter(), time.process_time()
    record: dict[str, Any] = {
        **job._asdict(), "env": task.env, "at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "outcome": "ran",
    }  # fmt: skip
    try:
        agent = build(task, job.method, job.seed)
        record["settings"] = {
            "loss": agent.document()["loss"], "learning_rate": agent.config.learning_rate,
            "batch_size": agent.config.batch_size, "epochs": agent.config.epochs, "n_envs": agent.n_envs,
            "n_groups": agent.config.episodes.n_groups, "group_size": agent.config.episodes.group_size,
            "seed_pool": agent.config.episodes.seed_pool,
        }  # fmt: skip
        watched = None
        if isinstance(agent.feed, EpisodeFeed):
            watched = agent.feed.loss = Watched(agent.loss)  # type: ignore[assignment]
        recorder = Recorder(watched, job.task == "balance")
        agent.learn(steps or task.steps, root=None, progress=False, callbacks=[recorder])
        record["steps"] = agent.steps
        if "Token" in task.env:
            score = score_tokens(agent)
        else:
            returns = agent.evaluate(EPISODES, deterministic=False, seed=10_000).returns
            score = {"reward": float(returns.mean()), "entropy": recorder.rows[-1].get("entropy")}
        record |= {"score": score, "curve": recorder.curve(), "varied": recorder.mean("varied")}
        if watched is not None:
            record |= {"seen": watched.seen, "used": watched.used}
        if recorder.shares:
            record["shares"] = recorder.shares
    except ConfigError as error:
        record |= {"outcome": "not here", "why": str(error)}
    except Exception as error:
        last = traceback.extract_tb(error.__traceback__)[-1]
        where = f"{Path(last.filename).name}:{last.lineno}"
        record |= {"outcome": "failed", "why": f"{type(error).__name__}: {error}", "where": where}
    record["wall_s"] = round(time.perf_counter() - began, 1)
    record["cpu_s"] = round(time.process_time() - cpu, 1)
    record["versions"] = versions()
    path = shard(Path(out), job)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, record)
    return record["outcome"] + (f" ({record['why']})" if "why" in record else "")


# -- the claims -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Claim:
    """What a paper says that can be seen at this size, and how it is measured here."""

    says: str
    task: str
    arms: tuple[str, ...]
    """Methods; the first is what the others are compared with."""
    judge: Callable[[dict[str, list[dict]]], list[tuple[str, bool, str]]]
    """From each arm's runs: (who, held, numbers) for each."""


def mean(runs: Iterable[Mapping[str, Any]], *path: str) -> float:
    values = []
    for item in runs:
        value: Any = item
        for key in path:
            value = value[int(key)] if isinstance(value, list) else value[key]
        if value is not None:
            values.append(value)
    return float(np.mean(values)) if values else float("nan")


def judge_entropy(found: dict[str, list[dict]]) -> list[tuple[str, bool, str]]:
    collapsed = mean(found[PLAIN], "score", "entropy")
    verdicts = []
    for arm, runs in found.items():
        if arm == PLAIN:
            continue
        entropy, success = mean(runs, "score", "entropy"), mean(runs, "score", "success")
        numbers = f"entropy {entropy:.3f} against {collapsed:.3f}, success {success:.2f}"
        target = runs[0]["settings"]["loss"].get("entropy_target")
        if target is not None:
            verdicts.append((arm, abs(entropy - target) <= 0.1, f"target {target}: {numbers}"))
        else:
            verdicts.append((arm, entropy > 1.5 * collapsed, numbers))
    return verdicts


def judge_balance(found: dict[str, list[dict]]) -> list[tuple[str, bool, str]]:
    verdicts, reached = [], {}
    for arm, runs in found.items():
        shares = [s for r in runs for s in r["shares"] if all(v is not None for v in s.values())]
        before, after = np.array([s["before"] for s in shares]), np.array([s["after"] for s in shares])
        reached[arm] = float((after >= 0.4 - 1e-6).mean())
        numbers = (
            f"share of positive advantages at least 0.4 in {reached[arm]:.0%} of the iterations "
            f"(before the search {float((before >= 0.4).mean()):.0%}), median {float(np.median(after)):.2f}, "
            f"tenth percentile {float(np.quantile(after, 0.1)):.2f}"
        )
        verdicts.append((arm, reached[arm] >= 0.9, numbers))
    return verdicts


def judge_length(found: dict[str, list[dict]]) -> list[tuple[str, bool, str]]:
    base = mean(found[PLAIN], "score", "wrong_length")
    return [
        (
            arm,
            mean(runs, "score", "wrong_length") < base - 0.1,
            f"wrong responses {mean(runs, 'score', 'wrong_length'):.2f} tokens against {base:.2f}, "
            f"all {mean(runs, 'score', 'length'):.2f}, reward {mean(runs, 'score', 'reward'):.3f} "
            f"against {mean(found['grpo,ref_kl_coef=0'], 'score', 'reward'):.3f}",
        )
        for arm, runs in found.items()
        if arm != PLAIN
    ]


def judge_samples(found: dict[str, list[dict]]) -> list[tuple[str, bool, str]]:
    base = mean(found[PLAIN], "score", "reward")
    share = mean(found["d3s"], "used") / mean(found[PLAIN], "used")
    reward = mean(found["d3s"], "score", "reward")
    numbers = f"{share:.0%} of GRPO's positions with a gradient, reward {reward:.3f} against {base:.3f}"
    return [("d3s", share < 0.5 and reward >= base - 0.02, numbers)]


def judge_variance(found: dict[str, list[dict]]) -> list[tuple[str, bool, str]]:
    base = mean(found[PLAIN], "varied")
    success = mean(found[PLAIN], "score", "success")
    return [
        (
            arm,
            mean(runs, "varied") > base + 0.02,
            f"groups with both outcomes {mean(runs, 'varied'):.2f} against {base:.2f}, success "
            f"{mean(runs, 'score', 'success'):.3f} against {success:.3f}",
        )
        for arm, runs in found.items()
        if arm != PLAIN
    ]


def judge_channels(found: dict[str, list[dict]]) -> list[tuple[str, bool, str]]:
    def channels(runs: list[dict]) -> list[float]:
        return [mean(runs, "score", "channels", str(k)) for k in range(3)]

    base = channels(found[PLAIN])
    verdicts = []
    for arm, runs in found.items():
        if arm != PLAIN:
            mine = channels(runs)
            words = ", ".join(
                f"{n} {x:.2f} against {y:.2f}"
                for n, x, y in zip(("correctness", "format", "brevity"), mine, base, strict=True)
            )
            reward = mean(runs, "score", "reward") - mean(found[PLAIN], "score", "reward")
            verdicts.append((arm, reward > 0.01, f"{words}; reward {reward:+.3f}"))
    return verdicts


CLAIMS = {
    "entropy": Claim(
        "The entropy holds where GRPO's collapses (aepo, dcpo: within 0.1 of the target; the others: half as much "
        "again as GRPO's)",
        "entropy",
        (PLAIN, "aepo", "aepo,entropy_target=0.8", "dcpo", "epo", "epo,bonus_coef=0.05", "steer"),
        judge_entropy,
    ),
    "balance": Claim(
        "The positive share of the objective stays at 0.4 or above",
        "balance",
        (PLAIN, "bapo", 'bapo,contribution="gradient"'),
        judge_balance,
    ),
    "length": Claim("Wrong responses do not grow", "length", (PLAIN, "dr_grpo"), judge_length),
    "samples": Claim("As good with fewer positions", "sort", (PLAIN, "d3s"), judge_samples),
    "variance": Claim(
        "More groups have outcomes that differ than with uniform sampling",
        "variance",
        (PLAIN, "knapsack", "vas", "v0"),
        judge_variance,
    ),
    "channels": Claim(
        "Several rewards are served better when each is standardised",
        "channels",
        (PLAIN, 'gdpo,weights="0.6,0.2,0.2"', "gdpo"),
        judge_channels,
    ),
}


def judge(out: Path) -> dict[str, Any]:
    """What the shards say about the claims."""
    verdicts: dict[str, Any] = {}
    for name, claim in CLAIMS.items():
        found = defaultdict(list)
        for record in records(out, claim.task):
            if record["method"] in claim.arms and record["outcome"] == "ran":
                found[record["method"]].append(record)
        # an arm may have more seeds than its opponent; compare like with like
        common = set.intersection(
            *({r["seed"] for r in found[arm]} for arm in claim.arms if found[arm]), set(range(99))
        )
        kept = {arm: [r for r in found[arm] if r["seed"] in common] for arm in claim.arms if found[arm]}
        if len(kept) < 2 or claim.arms[0] not in kept or not common:
            continue
        verdicts[name] = {
            "says": claim.says,
            "task": f"{TASKS[claim.task].env}: {TASKS[claim.task].words}, {TASKS[claim.task].steps:,} positions",
            "seeds": len(common),
            "verdicts": [{"who": w, "held": bool(h), "numbers": n} for w, h, n in claim.judge(kept)],
        }
    return verdicts


# -- merging --------------------------------------------------------------------------------------


def records(out: Path, task: str) -> list[dict]:
    folder = out / f"{task}-{TASKS[task].steps}"
    return [json.loads(p.read_text()) for p in sorted(folder.glob("*.json"))]


MEASURES = ("reward", "success", "entropy", "length")


def table(out: Path, tasks: Iterable[str]) -> dict[str, dict[str, dict]]:
    """Per task and method: each measure's interquartile mean with its interval."""
    from ctrlrl.run.report_statistics import iqm

    merged: dict[str, dict[str, dict]] = {}
    for task in tasks:
        scores: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
        for record in records(out, task):
            if record["outcome"] == "ran":
                for name in MEASURES:
                    if (value := record["score"].get(name)) is not None:
                        scores[record["method"]][name].append(value)
        rows: dict[str, dict] = {}
        for method, measures in scores.items():
            row: dict[str, Any] = {"seeds": len(measures["reward"])}
            for name, values in measures.items():
                estimate = iqm(np.array(values)[:, None])
                row[name] = {
                    "iqm": round(estimate.value, 4), "low": rounded(estimate.low), "high": rounded(estimate.high),
                    "runs": [round(v, 4) for v in values],
                }  # fmt: skip
            rows[method] = row
        if rows:
            merged[task] = dict(sorted(rows.items(), key=lambda item: -item[1]["reward"]["iqm"]))
    return merged


def rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 4)


def cell(row: Mapping[str, Any] | None, name: str, digits: int) -> str:
    if row is None or name not in row:
        return ""
    value = row[name]
    text = f"{value['iqm']:.{digits}f}"
    return text if value["low"] is None else f"{text} [{value['low']:.{digits}f}, {value['high']:.{digits}f}]"


def markdown(document: Mapping[str, Any]) -> str:
    """The tables of the documentation."""
    merged = document["table"]
    methods = {m for rows in merged.values() for m in rows}
    first = [m for m in HEADLINE if m in methods]
    columns = [("sort", "success", 2), ("sort", "reward", 3), ("sort", "entropy", 2), ("arithmetic", "success", 2),
               ("arithmetic", "reward", 3), ("arithmetic", "entropy", 2), ("cartpole", "reward", 0),
               ("acrobot", "reward", 0)]  # fmt: skip
    columns = [c for c in columns if c[0] in merged]

    def lines(names: Iterable[str]) -> list[str]:
        titles = [f"{task}: {'return' if task in ('cartpole', 'acrobot') else name}" for task, name, _ in columns]
        head = ["| loss | " + " | ".join(titles) + " |", "|---" * (len(columns) + 1) + "|"]
        return head + [
            f"| `{m}` | " + " | ".join(cell(merged[t].get(m), n, d) for t, n, d in columns) + " |" for m in names
        ]

    def rank(name: str) -> float:
        return -merged.get("sort", {}).get(name, {"reward": {"iqm": -1.0}})["reward"]["iqm"]

    text = [*lines(sorted(first, key=rank)), ""]
    if rest := sorted(methods - set(first), key=rank):
        text += ["One seed each:", "", *lines(rest), ""]
    if document["claims"]:
        text += ["| claim | who | held | numbers |", "|---|---|---|---|"]
        for claim in document["claims"].values():
            for v in claim["verdicts"]:
                text.append(f"| {claim['says']} | `{v['who']}` | {'yes' if v['held'] else 'no'} | {v['numbers']} |")
    return "\n".join(text).rstrip() + "\n"


def plot(merged: Mapping[str, Mapping[str, dict]], path: Path) -> None:
    """A panel per task and measure: a bar per run, the interquartile mean with its interval, the baseline as a line."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    panels = [("sort", "reward", "sorting: reward"), ("arithmetic", "reward", "arithmetic: reward"),
              ("sort", "entropy", "sorting: entropy at the end"), ("cartpole", "reward", "CartPole-v1: return"),
              ("acrobot", "reward", "Acrobot-v1: return")]  # fmt: skip
    panels = [p for p in panels if p[0] in merged]
    methods = [m for m in HEADLINE if any(m in rows for rows in merged.values())]
    order = merged[panels[0][0]]
    methods.sort(key=lambda m: order[m]["reward"]["iqm"] if m in order else -np.inf)
    height = 0.9 + 0.26 * len(methods)
    figure, axes = plt.subplots(
        1, len(panels), figsize=(0.8 + 2.3 * len(panels), height), sharey=True, constrained_layout=True, squeeze=False
    )
    for axis, (task, measure, title) in zip(axes[0], panels, strict=True):
        rows, baseline = merged[task], TASKS[task].baseline
        if baseline in rows and measure in rows[baseline]:
            axis.axvline(rows[baseline][measure]["iqm"], color="#8a8f98", linewidth=1, linestyle="--", zorder=0)
        for y, method in enumerate(methods):
            value = rows.get(method, {}).get(measure)
            if value is None:
                continue
            color = "#8a8f98" if method == baseline else "#0072b2"
            axis.plot(value["runs"], [y] * len(value["runs"]), "|", color=color, markersize=7, alpha=0.5)
            if value["low"] is not None:
                axis.plot([value["low"], value["high"]], [y, y], color=color, linewidth=2)
            axis.plot(value["iqm"], y, "o", color=color, markersize=5)
        axis.set_title(title, fontsize=9)
        axis.tick_params(labelsize=8)
        axis.grid(axis="x", alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0][0].set_yticks(range(len(methods)), methods)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


def merge(args: argparse.Namespace) -> dict[str, Any]:
    """Everything there is in ``--out`` as one document."""
    every = [r for task in TASKS for r in records(args.out, task)]
    runs = [{k: v for k, v in r.items() if k not in ("versions", "shares")} for r in every]
    for short, r in zip(runs, every, strict=True):
        short["git_commit"] = r["versions"]["git_commit"]
    latest = max(every, key=lambda r: r["at"])["versions"] if every else {}
    return {
        "protocol": " ".join((__doc__ or "").split("\n\n")[1].split()),
        "arguments": {
            "tasks": {
                name: {"env": t.env, "steps": t.steps, "baseline": t.baseline, "settings": dict(t.settings),
                       "episodes": dict(t.episodes), "transitions": dict(t.transitions)}
                for name, t in TASKS.items()
            },
            "headline": HEADLINE, "answers": ANSWERS, "episodes": EPISODES,
        },
        "versions": latest,
        "table": table(args.out, ("sort", "arithmetic", "cartpole", "acrobot")),
        "claims": judge(args.out),
        "absent": sorted({(r["task"], r["method"], r["outcome"], r["why"]) for r in every if r["outcome"] != "ran"}),
        "runs": runs,
    }  # fmt: skip


# -- the queue ------------------------------------------------------------------------------------


def queue_of(args: argparse.Namespace) -> list[Job]:
    """All jobs, those first that tell most: every method once before any has a second seed."""
    from ctrlrl.losses import base

    jobs = []
    for seed in range(args.seeds):
        jobs += [Job(task, m, seed) for task in args.tasks for m in args.methods]
        if args.claims and seed < args.claim_seeds:
            wanted = {n: c for n, c in CLAIMS.items() if not args.only or n in args.only}
            jobs += [Job(claim.task, arm, seed) for claim in wanted.values() for arm in claim.arms]
        if args.all and seed == 0:
            jobs += [Job(task, m, 0) for task in args.tasks for m in base.names() if m not in args.methods]
    return list(dict.fromkeys(jobs))


def work(args: argparse.Namespace) -> int:
    """Run what is missing until the time is up; returns the number of failures."""
    deadline = time.monotonic() + 60 * args.minutes
    queue = [job for job in queue_of(args) if not shard(args.out, job).exists()]
    if not queue or args.minutes <= 0:
        return 0
    os.environ["OMP_NUM_THREADS"] = "1"
    failed, running = 0, {}
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(min(args.jobs, len(queue)), mp_context=context) as pool:
        while running or (queue and time.monotonic() < deadline):
            while queue and len(running) < args.jobs and time.monotonic() < deadline:
                job = queue.pop(0)
                if not shard(args.out, job).exists():  # made by another call meanwhile
                    future: Future[str] = pool.submit(run, job, str(args.out), args.steps)
                    running[future] = job
            done, _ = wait(running, return_when=FIRST_COMPLETED)
            for future in done:
                job, outcome = running.pop(future), future.result()
                failed += outcome.startswith("failed")
                print(f"{job.task} {job.method} s{job.seed}: {outcome}", flush=True)
    return failed


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=60.0, help="no new run is started after this; 0 only merges")
    parser.add_argument("--seeds", type=int, default=SEEDS)
    parser.add_argument("--tasks", nargs="*", default=["sort", "arithmetic", "cartpole", "acrobot"], choices=[*TASKS])
    about = "methods with all seeds, with settings if wanted: bapo,epochs=8"
    parser.add_argument("--methods", nargs="+", default=list(HEADLINE), help=about)
    parser.add_argument("--all", action="store_true", help="also every other loss, with one seed")
    parser.add_argument("--claims", action="store_true", help="also the runs behind the claims")
    parser.add_argument("--claim-seeds", type=int, default=3)
    parser.add_argument("--only", nargs="+", default=[], choices=[*CLAIMS], help="these claims only")
    parser.add_argument("--jobs", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--out", type=Path, default=Path("bench/losses"))
    parser.add_argument("--json", type=Path, default=None, help="where the merged document goes; default: in --out")
    parser.add_argument("--plot", type=Path, default=None, help="also draw the table as a picture")
    parser.add_argument("--markdown", action="store_true", help="print the tables for the documentation")
    parser.add_argument("--steps", type=int, default=None, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    failed = work(args)
    document = merge(args)
    from ctrlrl.engine.runfolder import write_json

    path = args.json or args.out / "losses.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, document)
    if args.plot is not None and document["table"]:
        plot(document["table"], args.plot)
    if args.markdown:
        print(markdown(document))
    if failed:
        sys.exit(f"{failed} runs failed and are missing from the table")


if __name__ == "__main__":
    main()
