"""What the sampler of trajectory diffusion costs beside its network.

The network is the default U-Net for trajectories of 32 steps of HalfCheetah (17 observations, 6 actions), the sampler
32 steps of Heun's method: 63 evaluations. A round is one batch drawn, and as many calls of the same network at the same
levels, one after the other, with nothing between them; rounds alternate. The overhead is the median over rounds of
their difference, as a share of the calls alone, in processor time (on a GPU in time, with everything waited for). The
plain rows evaluate the network as it is; the compiled ones through torch.compile, whose gain is in the last column.

    python scripts/bench_diffusion_sampler.py --minutes 5 --out bench/diffusion_sampler.json
"""

from __future__ import annotations

import argparse
import itertools
import json
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

CHANNELS, LENGTH = 26, 32


def clock(device: str) -> float:
    import torch

    if device == "cpu":
        return time.process_time()
    torch.cuda.synchronize()
    return time.perf_counter()


def timed(device: str, run: Callable[[], object]) -> float:
    began = clock(device)
    run()
    return clock(device) - began


def measure(args: argparse.Namespace, kind: str, churn: float) -> dict:
    import torch

    from ctrlrl.nets.edm import Preconditioned, SamplerConfig, sample
    from ctrlrl.nets.trajectory_denoiser import DenoiserConfig, make_denoiser

    torch.manual_seed(0)
    network = Preconditioned(make_denoiser(DenoiserConfig(), CHANNELS, LENGTH)).to(args.device).eval()
    denoise = torch.compile(network, fullgraph=True, dynamic=False) if kind == "compiled" else network
    config, noise = SamplerConfig(s_churn=churn), torch.Generator().manual_seed(0)
    start = torch.randn(args.batch_size, CHANNELS, LENGTH, generator=noise).to(args.device)
    levels = torch.tensor(config.levels(), device=args.device)
    # Heun's method evaluates at both ends of each step but the last
    calls = [s for now, following in itertools.pairwise(levels) for s in (now, following) if s > 0.0]

    def alone() -> None:
        with torch.inference_mode():
            for sigma in calls:
                denoise(start, sigma)

    def whole() -> None:
        sample(denoise, start, config, noise)

    whole(), alone()
    rounds: list[tuple[float, float]] = []
    deadline = time.monotonic() + 60.0 * args.minutes / 4
    while len(rounds) < 3 or time.monotonic() < deadline:
        rounds.append((timed(args.device, alone), timed(args.device, whole)))
    bare = median(a for a, _ in rounds)
    return {
        "network": kind, "churn": churn, "evaluations": len(calls), "rounds": len(rounds),
        "network_s": round(bare, 4), "overhead_percent": round(100.0 * median(w - a for a, w in rounds) / bare, 2),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=5.0)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=None)
    args = parser.parse_args()
    import torch

    from ctrlrl.engine.runfolder import versions

    torch.set_num_threads(args.threads)
    rows = [measure(args, kind, churn) for kind in ("plain", "compiled") for churn in (0.0, 80.0)]
    for row in rows:
        row["times_as_fast"] = round(rows[0]["network_s"] / row["network_s"], 2)
        print("{network:9} churn {churn:4g}: overhead {overhead_percent:5.2f} %, x {times_as_fast}".format(**row))
    if args.out is not None:
        settings = {k: v for k, v in vars(args).items() if k != "out"}
        document = {"protocol": __doc__.split("\n\n")[1], "arguments": settings, "rows": rows, "versions": versions()}
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(document, indent=2) + "\n")


if __name__ == "__main__":
    main()
