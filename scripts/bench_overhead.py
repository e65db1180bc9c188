"""What the shared core costs: the library's losses beside the same formulas written out by hand.

Forward and backward of the loss alone, to the log-probabilities of 512 sequences of 512 positions in float32, on one
thread; a quarter of the positions is padding. Everything that does not depend on the current policy is done before
the clock starts, on both sides. The hand-written side is plain PyTorch with as few passes over memory as we found,
trusts its inputs (padding holds finite numbers, no log-ratio overflows) and fits one loss only. Two rows per loss:
the objective alone, and with what every run logs (approx_kl, clip_fraction). Contestants alternate; the ratio is
between medians over all rounds. Before anything is timed, values and gradients are compared.

    python scripts/bench_overhead.py --minutes 2
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from ctrlrl.core import reduce
from ctrlrl.engine.runfolder import versions
from ctrlrl.losses import base
from ctrlrl.losses.base import PolicyLoss
from ctrlrl.nets.heads import Categorical
from ctrlrl.types import PolicyOutput, SequenceBatch

LOSSES = ("ppo", "grpo", "gspo", "mhpo")
GROUP = 8
Run = Callable[[Tensor], tuple[Tensor, dict[str, Tensor]]]


def batch_of(rows: int, length: int, seed: int) -> tuple[SequenceBatch, Tensor]:
    """Sequences whose last positions are padding, and the current log-probabilities."""
    g = torch.Generator().manual_seed(seed)
    logp_old = -torch.rand(rows, length, generator=g) - 0.1
    logp = logp_old + 0.2 * torch.randn(rows, length, generator=g)
    lengths = torch.randint(length // 2, length + 1, (rows, 1), generator=g)
    advantage = torch.randn(rows, length, generator=g)
    zero = torch.zeros(rows, length)
    batch = SequenceBatch(
        obs=zero, action=zero, mask=torch.arange(length) < lengths, logp_old=logp_old, advantage=advantage,
        value_target=advantage, value_old=zero, logp_ref=logp_old + 0.1 * torch.randn(rows, length, generator=g),
        sequence_return=torch.rand(rows, generator=g), group=torch.arange(rows) // GROUP,
    )  # fmt: skip
    return batch, logp


def library(loss: PolicyLoss, batch: SequenceBatch, metrics: bool) -> Run:
    """Our loss on a prepared batch."""
    prepared = loss.prepare(batch, {})
    batch = batch._replace(coef=prepared.coef, weight=prepared.weight)
    zero, dist = torch.zeros_like(batch.logp_old), Categorical(torch.zeros(1, 1, 1))

    def run(logp: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        out = PolicyOutput(logp, zero, {}, dist)
        if metrics:
            sums = loss.loss(batch, out, {})
            return sums.policy, sums.metrics
        return reduce.weighted_sum(loss.per_token(batch, out, {}), prepared.weight), {}

    return run


def by_hand(name: str, loss: PolicyLoss, batch: SequenceBatch, metrics: bool) -> Run:
    """The same sums, written out. Clipping is one clamp whose bounds follow the sign of the advantage."""
    prepared = loss.prepare(batch, {})
    a, weight, old, ref, mask = prepared.coef["advantage"], prepared.weight, batch.logp_old, batch.logp_ref, batch.mask
    assert ref is not None
    valid, zero = mask.to(a.dtype), torch.zeros_like(a)
    gain, inf = -a * weight, torch.full_like(a, torch.inf)
    below = getattr(loss, "eps_low", getattr(loss, "eps", 0.0))
    above = getattr(loss, "eps_high", getattr(loss, "eps", 0.0))
    low, high = torch.where(a < 0, 1 - below + zero, -inf), torch.where(a > 0, 1 + above + zero, inf)

    def logged(log_ratio: Tensor, r: Tensor | None) -> dict[str, Tensor]:
        with torch.no_grad():
            r = log_ratio.exp() if r is None else r
            found = {"approx_kl": torch.where(mask, r - 1.0 - log_ratio, zero).sum()}
            if above:
                found["clip_fraction"] = (((r < 1 - below) | (r > 1 + above)) & mask).sum()
            return found

    def ppo(logp: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        log_ratio = logp - old
        r = log_ratio.exp()
        return torch.vdot((r.clamp(low, high)).flatten(), gain.flatten()), logged(log_ratio, r) if metrics else {}

    def grpo(logp: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        value, found = ppo(logp)
        q = ref - logp
        k3 = q.exp() - q  # minus one each, a constant
        penalty = torch.vdot(k3.flatten(), weight.flatten()) - constant
        return torch.add(value, penalty, alpha=coef), found

    def gspo(logp: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        log_ratio = logp - old
        s = torch.linalg.vecdot(log_ratio, share).exp()  # everything behind this is per sequence
        return torch.vdot(s.clamp(low[:, 0], high[:, 0]), whole), logged(log_ratio, None) if metrics else {}

    def mhpo(logp: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        log_ratio = logp - old
        psi = c * torch.tanh(log_ratio / c)
        with torch.no_grad():
            up = torch.nn.functional.softplus(psi)
            hazard = (up / up_scale) ** up_power + ((up - psi) / down_scale) ** down_power
            # softplus(-x) = softplus(x) - x
        return torch.vdot((psi - hazard).exp().flatten(), gain.flatten()), logged(log_ratio, None) if metrics else {}

    coef, constant = getattr(loss, "ref_kl_coef", 0.0), weight.sum()
    share, whole = valid / valid.sum(-1, keepdim=True), gain.sum(-1)
    c = getattr(loss, "modulation", 1.0)
    up_scale, up_power = getattr(loss, "scale_up", 1.0), getattr(loss, "power_up", 1.0)
    down_scale, down_power = getattr(loss, "scale_down", 1.0), getattr(loss, "power_down", 1.0)
    return {"ppo": ppo, "grpo": grpo, "gspo": gspo, "mhpo": mhpo}[name]


def measure(run: Run, logp: Tensor) -> float:
    """Milliseconds of one forward and backward."""
    leaf = logp.detach().requires_grad_()
    began = time.process_time()  # one thread, so the wall time of an idle machine
    value, _ = run(leaf)
    value.backward()
    return 1e3 * (time.process_time() - began)


def compare(name: str, ours: Run, theirs: Run, logp: Tensor) -> None:
    """Both sides must say the same before they may race."""
    found = []
    for run in (ours, theirs):
        leaf = logp.detach().requires_grad_()
        value, metrics = run(leaf)
        (gradient,) = torch.autograd.grad(value, leaf)
        found.append((value.detach(), gradient, metrics))
    (a, gradient_a, metrics_a), (b, gradient_b, metrics_b) = found
    torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3, msg=lambda m: f"{name}: {m}")
    torch.testing.assert_close(gradient_a, gradient_b, rtol=1e-4, atol=1e-6, msg=lambda m: f"{name}, gradient: {m}")
    for key, value in metrics_b.items():
        torch.testing.assert_close(metrics_a[key], value.to(a.dtype), rtol=1e-3, atol=1e-2, msg=lambda m: f"{name}: {m}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=2.0, help="rounds are added until this much time is spent")
    parser.add_argument("--rows", type=int, default=512)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--losses", nargs="+", choices=LOSSES, default=list(LOSSES))
    parser.add_argument("--out", type=Path, default=Path("assets/overhead.json"))
    args = parser.parse_args()
    deadline = time.monotonic() + 60 * args.minutes
    torch.set_num_threads(args.threads)
    batch, logp = batch_of(args.rows, args.length, args.seed)
    pairs: dict[tuple[str, bool], tuple[Run, Run]] = {}
    for name in args.losses:
        loss = base.get(name)()
        begun = loss.begin(batch, {}, loss.memory()).batch
        for metrics in (False, True):
            pair = library(loss, begun, metrics), by_hand(name, loss, begun, metrics)
            compare(name, *pair, logp)
            pairs[name, metrics] = pair
    times: dict[tuple[str, bool], tuple[list[float], list[float]]] = {key: ([], []) for key in pairs}
    rounds = 0
    while rounds < 3 or time.monotonic() < deadline:
        for key, pair in pairs.items():
            for side in (0, 1) if rounds % 2 else (1, 0):
                spent = measure(pair[side], logp)
                if rounds:  # the first round warms up
                    times[key][side].append(spent)
        rounds += 1
    table = []
    for (name, metrics), (ours, theirs) in times.items():
        row = {
            "loss": name, "with_metrics": metrics, "rounds": len(ours),
            "library_ms": round(statistics.median(ours), 3), "by_hand_ms": round(statistics.median(theirs), 3),
            "ratio": round(statistics.median(ours) / statistics.median(theirs), 3),
        }  # fmt: skip
        table.append(row)
        what = "with metrics" if metrics else "objective"
        print(f"{name:5} {what:12} {row['library_ms']:8.2f} ms  by hand {row['by_hand_ms']:8.2f} ms  {row['ratio']:5.2f}")
    document = {
        "arguments": {k: v if isinstance(v, int | float | list) else str(v) for k, v in vars(args).items()},
        "cores": len(os.sched_getaffinity(0)), "versions": versions(), "table": table,
    }  # fmt: skip
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(document, indent=2) + "\n")
    print(f"Written: {args.out}")


if __name__ == "__main__":
    main()
