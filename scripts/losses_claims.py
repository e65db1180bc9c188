"""The papers' claims that small tasks can show, and how scripts/bench_losses.py judges them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from losses_runs import PLAIN, TASKS, records


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
    verdicts = []
    for arm, runs in found.items():
        target = runs[0]["settings"]["loss"].get("positive_share", 0.4)
        shares = [s for r in runs for s in r["shares"] if s["before"] is not None and s["after"] is not None]
        before, after = (np.array([s[k] for s in shares]) for k in ("before", "after"))
        reached, without = float((after >= target - 1e-6).mean()), float((before >= target - 1e-6).mean())
        numbers = (
            f"at least {target} in {reached:.0%} of the iterations, {without:.0%} without the search; median "
            f"{float(np.median(after)):.2f} and {float(np.median(before)):.2f}, success "
            f"{mean(runs, 'score', 'success'):.2f}"
        )
        if arm != PLAIN:
            verdicts.append((arm, reached >= 0.9 and (reached > without or without == 1.0), numbers))
    return verdicts


def judge_length(found: dict[str, list[dict]]) -> list[tuple[str, bool, str]]:
    base = mean(found[PLAIN], "score", "wrong_length")
    return [
        (
            arm,
            mean(runs, "score", "wrong_length") < 0.8 * base,
            f"wrong responses {mean(runs, 'score', 'wrong_length'):.2f} tokens against {base:.2f}, "
            f"all {mean(runs, 'score', 'length'):.2f}, reward {mean(runs, 'score', 'reward'):.3f} "
            f"against {mean(found['grpo,ref_kl_coef=0'], 'score', 'reward'):.3f}",
        )
        for arm, runs in found.items()
        if arm != PLAIN
    ]


def judge_samples(found: dict[str, list[dict]]) -> list[tuple[str, bool, str]]:
    runs, base = found["d3s"], found[PLAIN]
    reward = mean(runs, "score", "reward")
    share = mean(runs, "used") / mean(base, "used")
    # what GRPO had spent when it first came to the same reward
    reached = [next((row["step"] for row in r["curve"] if row["reward"] >= reward), r["steps"]) for r in base]
    spent = float(np.mean([r["used"] * at / r["steps"] for r, at in zip(base, reached, strict=True)]))
    numbers = (
        f"reward {reward:.3f} after {mean(runs, 'used'):,.0f} positions with a gradient, for which GRPO took "
        f"{spent:,.0f}; at the same number of episodes {share:.0%} of GRPO's positions, GRPO's reward "
        f"{mean(base, 'score', 'reward'):.3f}"
    )
    return [("d3s", mean(runs, "used") < 0.7 * spent, numbers)]


def judge_variance(found: dict[str, list[dict]]) -> list[tuple[str, bool, str]]:
    def share(runs: list[dict]) -> float:
        return float(np.mean([r["used"] / r["seen"] for r in runs]))

    base, success = share(found[PLAIN]), mean(found[PLAIN], "score", "success")
    return [
        (
            arm,
            share(runs) > base + 0.02,
            f"positions in groups with both outcomes {share(runs):.2f} against {base:.2f} (groups "
            f"{mean(runs, 'varied'):.2f} against {mean(found[PLAIN], 'varied'):.2f}), success on new prompts "
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
    "free": Claim(
        "The same where many answers are right",
        "free",
        (
            PLAIN,
            "aepo",
            "aepo,entropy_target=1.0",
            "dcpo",
            "dcpo,entropy_target=1.0",
            "epo",
            "epo,bonus_coef=0.05",
            "steer",
        ),
        judge_entropy,
    ),
    "balance": Claim(
        "The share of positive advantages in the objective reaches its target",
        "balance",
        (PLAIN, "bapo", "bapo,positive_share=0.65"),
        judge_balance,
    ),
    "length": Claim("Wrong responses do not grow longer, as GRPO's do", "length", (PLAIN, "dr_grpo"), judge_length),
    "brief": Claim("The same where the format counts too", "brief", (PLAIN, "dr_grpo"), judge_length),
    "samples": Claim("The same reward from fewer positions", "sort", (PLAIN, "d3s"), judge_samples),
    "variance": Claim(
        "More of the episodes are in groups whose outcomes differ than with uniform sampling",
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
