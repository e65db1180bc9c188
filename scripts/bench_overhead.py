"""What the shared core costs: the library's losses beside the same formulas written out by hand.

Forward and backward of the loss alone, to the log-probabilities of 512 sequences of 512 positions in float32, on one
thread; up to half of a sequence is padding. What does not depend on the current policy is computed before the clock
starts, on both sides.

The hand-written side gives what the library guarantees: it does not look at padding, NaN included, bounds log-ratios
inside exponentials, and computes in float32. It is plain PyTorch, differentiated by autograd, and writes over its own
temporaries where autograd allows. It may do what the library may not, as it fits one loss on one batch: signs of
advantages, bounds of clips and products with weights are folded into constants before the clock starts, and metrics
are left unmasked where padding is known to add nothing. No derivative is written out by hand; the library does so for
the clip, which is how it can win where much of the time goes into the backward pass.

Every loss is timed alone and with what every run logs (approx_kl, clip_fraction), eager and compiled. Contestants
alternate; times are processor time, which other work on the machine disturbs least, and the ratio is between medians
over all rounds. A tensor of these shapes is 1 MB; whether memory for it is at hand or has to come from the system
decides over a part of the eager times, and varies between runs. Before anything is timed, values and gradients are
compared.

    python scripts/bench_overhead.py --minutes 5
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

from ctrlrl.core import ratio, reduce
from ctrlrl.engine.runfolder import versions
from ctrlrl.losses import base
from ctrlrl.losses.base import PolicyLoss
from ctrlrl.nets.heads import Categorical
from ctrlrl.types import PolicyOutput, SequenceBatch

LOSSES = ("ppo", "grpo", "gspo", "mhpo")
MODES = ("eager", "compiled")
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
    zero, inf, nothing = torch.zeros_like(a), torch.full_like(a, torch.inf), torch.zeros(())
    gain = -a * weight
    below = getattr(loss, "eps_low", getattr(loss, "eps", 0.0))
    above = getattr(loss, "eps_high", getattr(loss, "eps", 0.0))
    low, high = torch.where(a < 0, 1 - below + zero, -inf), torch.where(a > 0, 1 + above + zero, inf)

    def bounded(x: Tensor) -> Tensor:
        return x.clamp(-ratio.LOG_RATIO_CLAMP, ratio.LOG_RATIO_CLAMP)

    def logged(log_ratio: Tensor, r: Tensor) -> dict[str, Tensor]:
        if not metrics:
            return {}
        log_ratio, r = log_ratio.detach(), r.detach()  # at padding the log-ratio is 0 and the ratio 1: nothing to mask
        found = {"approx_kl": (r - 1.0 - log_ratio).sum()}
        if above:
            found["clip_fraction"] = ((r < 1 - below) | (r > 1 + above)).sum()
        return found

    def ppo(logp: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        log_ratio = torch.where(mask, logp - old, nothing)
        r = bounded(log_ratio).exp_()
        return (r.clamp(low, high) * gain).sum(), logged(log_ratio, r)

    def grpo(logp: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        value, found = ppo(logp)
        q = torch.where(mask, ref - logp, nothing)
        return value + ((bounded(q).expm1_() - q) * kl_weight).sum(), found

    def gspo(logp: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        log_ratio = torch.where(mask, logp - old, nothing)
        s = bounded(log_ratio.sum(-1) / count).exp_()  # everything behind this is per sequence
        found = logged(log_ratio, bounded(log_ratio.detach()).exp_()) if metrics else {}
        if metrics:  # a clipped sequence counts with all its positions
            outside = (s.detach() < 1 - below) | (s.detach() > 1 + above)
            found["clip_fraction"] = (outside * count).sum()
        return (s.clamp(low[:, 0], high[:, 0]) * whole).sum(), found

    def mhpo(logp: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        log_ratio = torch.where(mask, logp - old, nothing)
        psi = c * torch.tanh(log_ratio / c)
        fixed = psi.detach()
        up = torch.nn.functional.softplus(fixed)  # and softplus(-x) = softplus(x) - x
        down = (up - fixed).div_(down_scale).pow_(down_power)
        hazard = up.div_(up_scale).pow_(up_power).add_(down)
        found = logged(log_ratio, bounded(log_ratio.detach()).exp_()) if metrics else {}
        return ((psi - hazard).exp_() * gain).sum(), found

    kl_weight = getattr(loss, "ref_kl_coef", 0.0) * weight
    count, whole = mask.sum(-1), gain.sum(-1)
    c = getattr(loss, "modulation", 1.0)
    up_scale, up_power = getattr(loss, "scale_up", 1.0), getattr(loss, "power_up", 1.0)
    down_scale, down_power = getattr(loss, "scale_down", 1.0), getattr(loss, "power_down", 1.0)
    return {"ppo": ppo, "grpo": grpo, "gspo": gspo, "mhpo": mhpo}[name]


def differentiated(run: Run, compiled: bool) -> Callable[[Tensor], object]:
    """One forward and backward, as the training loop does it eager or compiled."""
    if compiled:
        return torch.compile(torch.func.grad_and_value(run, has_aux=True), fullgraph=True, dynamic=False)

    def both(logp: Tensor) -> object:
        leaf = logp.detach().requires_grad_()
        value, metrics = run(leaf)
        return torch.autograd.grad(value, leaf), (value, metrics)

    return both


def measure(function: Callable[[Tensor], object], logp: Tensor) -> float:
    """Milliseconds of processor time."""
    began = time.process_time()
    function(logp)
    return 1e3 * (time.process_time() - began)


def compare(name: str, ours: Run, theirs: Run, logp: Tensor) -> None:
    """Both sides must say the same before they may race."""
    found = []
    for run in (ours, theirs):
        leaf = logp.detach().requires_grad_()
        value, metrics = run(leaf)
        (gradient,) = torch.autograd.grad(value, leaf)
        found.append({"value": value.detach(), "gradient": gradient, **metrics})
    for key, value in found[1].items():
        size = float(logp.numel()) if key in ("approx_kl", "clip_fraction") else 1.0  # these are sums
        torch.testing.assert_close(
            found[0][key] / size,
            value.to(logp.dtype) / size,
            rtol=1e-3,
            atol=1e-5,
            msg=lambda m, k=key: f"{name} {k}: {m}",
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=5.0, help="rounds are added until this much time is spent")
    parser.add_argument("--rows", type=int, default=512)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--losses", nargs="+", choices=LOSSES, default=list(LOSSES))
    parser.add_argument("--modes", nargs="+", choices=MODES, default=list(MODES))
    parser.add_argument("--out", type=Path, default=Path("assets/overhead.json"))
    args = parser.parse_args()
    deadline = time.monotonic() + 60 * args.minutes
    torch.set_num_threads(1)
    torch._dynamo.config.recompile_limit = 64  # all contestants share the code object that differentiates
    batch, logp = batch_of(args.rows, args.length, args.seed)
    contestants = {}
    for name in args.losses:
        loss = base.get(name)()
        begun = loss.begin(batch, {}, loss.memory()).batch
        for metrics in (False, True):
            ours, theirs = library(loss, begun, metrics), by_hand(name, loss, begun, metrics)
            compare(name, ours, theirs, logp)
            for mode in args.modes:
                pair = [differentiated(run, mode == "compiled") for run in (ours, theirs)]
                for function in pair:
                    function(logp)  # compiles, and warms up
                contestants[name, mode, metrics] = pair
    times: dict[tuple[str, str, bool], tuple[list[float], list[float]]] = {key: ([], []) for key in contestants}
    rounds = 0
    while not rounds or time.monotonic() < deadline:
        for key, pair in contestants.items():
            for side in (0, 1) if rounds % 2 else (1, 0):
                times[key][side].append(measure(pair[side], logp))
        rounds += 1
    table = []
    for (name, mode, metrics), (ours, theirs) in times.items():
        row = {
            "loss": name, "mode": mode, "metrics": metrics, "rounds": rounds,
            "library_ms": round(statistics.median(ours), 3), "by_hand_ms": round(statistics.median(theirs), 3),
            "ratio": round(statistics.median(ours) / statistics.median(theirs), 2),
        }  # fmt: skip
        table.append(row)
        what = f"{name:5} {mode:8} {'with metrics' if metrics else 'loss alone':12}"
        print(f"{what} {row['library_ms']:7.2f} ms, by hand {row['by_hand_ms']:7.2f} ms, ratio {row['ratio']:5.2f}")
    document = {
        "arguments": {k: str(v) if isinstance(v, Path) else v for k, v in vars(args).items()},
        "cores": len(os.sched_getaffinity(0)), "versions": versions(), "table": table,
    }  # fmt: skip
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(document, indent=2) + "\n")
    print(f"Written: {args.out}")


if __name__ == "__main__":
    main()
