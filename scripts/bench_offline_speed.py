"""Gradient updates per second of TD3+BC, IQL and CQL: ctrlrl beside d3rlpy, on the same machine in one run.

A set of one million random transitions (17 observed, 6 actions, episodes of 1,000 steps cut by time), batches of 256,
actor and critics of 256-256 ReLU, learning rates of 3e-4, no normalisation; CQL with ten actions per state and source
and without its Lagrange factor on both sides. The time is that of training: draw a batch, update; of ctrlrl it also
has the loop and its log, of d3rlpy sample_transition_batch and update alone. A process of its own per measurement, of
which the median of five stretches counts; contestants alternate. Everyone runs with one thread and with all cores at
first, and then at its own best; the ratio is taken round by round between both sides' best, and its median is shown.
d3rlpy's compile_graph works on a GPU only; with one, both sides also run there, d3rlpy with and without it.

    python scripts/bench_offline_speed.py --minutes 15 --out bench/offline_speed.json
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

import shards

METHODS = ("td3_bc", "iql", "cql")
SHAPE = {"batch_size": 256, "actor_hidden": (256, 256), "critic_hidden": (256, 256), "normalize_obs": False}
RATES = {"learning_rate": 3e-4, "critic_learning_rate": 3e-4}
ON_CPU = ("d3rlpy", "eager", "compiled")
ON_GPU = ("d3rlpy cuda", "d3rlpy cuda compiled", "eager cuda", "compiled cuda graphs")


def columns(rows: int) -> dict:
    """Random columns; every 1,000th step is cut by time."""
    import numpy as np

    rng = np.random.default_rng(0)
    normal = {"observations": (rows, 17), "rewards": (rows,)}
    found = {k: rng.standard_normal(shape, dtype=np.float32) for k, shape in normal.items()}
    found["actions"] = rng.uniform(-1.0, 1.0, (rows, 6)).astype(np.float32)
    found["terminals"] = np.zeros(rows, bool)
    found["timeouts"] = (np.arange(rows) % 1000 == 999) | (np.arange(rows) == rows - 1)
    return found


def updates_ctrlrl(method: str, contestant: str, threads: int, rows: int):
    """A function that does k updates."""
    import gymnasium as gym
    import numpy as np
    import torch

    from ctrlrl.api import make
    from ctrlrl.data.dataset import Dataset, DatasetInfo

    found = columns(rows)
    data = Dataset(
        **found, next_observations=np.roll(found["observations"], -1, 0), next_known=~found["timeouts"],
        observation_space=gym.spaces.Box(-np.inf, np.inf, (17,)), action_space=gym.spaces.Box(-1.0, 1.0, (6,)),
        info=DatasetInfo("random"),
    )  # fmt: skip
    agent = make(
        method, dataset=data, threads=threads, compile="compiled" in contestant, cudagraphs="graphs" in contestant,
        device="cuda" if "cuda" in contestant else "cpu", eval_every=None, iteration_steps=10**9, **SHAPE, **RATES,
    )  # fmt: skip

    def update(k: int) -> None:
        agent.learn(k, root=None, progress=False)
        if "cuda" in contestant:
            torch.cuda.synchronize()

    return update


def updates_d3rlpy(method: str, contestant: str, threads: int, rows: int):
    import d3rlpy
    import torch

    torch.set_num_threads(threads)
    network = d3rlpy.models.VectorEncoderFactory([256, 256])
    settings = {
        "actor_encoder_factory": network, "critic_encoder_factory": network, "batch_size": 256,
        "actor_learning_rate": 3e-4, "critic_learning_rate": 3e-4, "compile_graph": contestant.endswith("compiled"),
    }  # fmt: skip
    if method == "iql":
        settings["value_encoder_factory"] = network
    if method == "cql":
        settings |= {"temp_learning_rate": 3e-4, "alpha_learning_rate": 0.0, "n_action_samples": 10}
    kind = {"td3_bc": "TD3PlusBCConfig", "iql": "IQLConfig", "cql": "CQLConfig"}[method]
    algorithm = getattr(d3rlpy.algos, kind)(**settings).create(device="cuda:0" if "cuda" in contestant else "cpu:0")
    data = d3rlpy.dataset.MDPDataset(**columns(rows), action_space=d3rlpy.ActionSpace.CONTINUOUS)
    algorithm.build_with_dataset(data)

    def update(k: int) -> None:
        for _ in range(k):
            algorithm.update(data.sample_transition_batch(256))
        if "cuda" in contestant:
            torch.cuda.synchronize()

    return update


def worker(args: argparse.Namespace) -> None:
    build = updates_d3rlpy if args.contestant.startswith("d3rlpy") else updates_ctrlrl
    update = build(args.method, args.contestant, args.threads, args.rows)
    update(20)  # compiles
    speeds = []
    for _ in range(5):
        began = time.perf_counter()
        update(args.updates)
        speeds.append(args.updates / (time.perf_counter() - began))
    print(json.dumps(statistics.median(speeds)))


def measure(args: argparse.Namespace, method: str, contestant: str, threads: int) -> float:
    command = [
        sys.executable, __file__, "--worker", "--method", method, "--contestant", contestant, "--threads", str(threads),
        "--rows", str(args.rows), "--updates", str(args.updates),
    ]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    if done.returncode:
        sys.exit(f"{method} of {contestant} failed:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def rounds(args: argparse.Namespace, threads: list[int], contestants: list[str]) -> dict:
    """Updates per second by method, contestant and threads, one number for each round."""
    deadline = time.monotonic() + 60 * args.minutes
    found: dict[tuple[str, str, int], list[float]] = {}
    number = 0
    while number == 0 or time.monotonic() < deadline:
        for method in args.methods:
            for name in contestants:
                tried = {t: found[method, name, t][0] for t in threads if (method, name, t) in found}
                for t in threads if number == 0 else [max(tried, key=lambda t: tried[t])]:
                    speed = measure(args, method, name, t)
                    found.setdefault((method, name, t), []).append(speed)
                    print(f"round {number}: {method:7} {name:21} {t} threads {speed:8.1f} updates/s", flush=True)
        number += 1
    return found


def table(found: dict, methods: list[str], contestants: list[str]) -> list[dict]:
    rows = []
    for method in methods:
        best = {}  # of each contestant the number of threads that was fastest at first
        for name in contestants:
            tried = {t: s[0] for (m, n, t), s in found.items() if (m, n) == (method, name)}
            best[name] = max(tried, key=lambda t: tried[t])
        for name in contestants:
            ours = found[method, name, best[name]]
            row = {
                "method": method, "contestant": name, "threads": best[name], "rounds": len(ours),
                "updates_per_s": round(statistics.median(ours), 1), "lowest": round(min(ours), 1),
                "highest": round(max(ours), 1),
                "first_round": {t: round(s[0], 1) for (m, n, t), s in found.items() if (m, n) == (method, name)},
            }  # fmt: skip
            peers = [p for p in contestants if p.startswith("d3rlpy") and ("cuda" in p) == ("cuda" in name)]
            theirs = [max(found[method, p, best[p]][k] for p in peers) for k in range(len(ours))]
            row["ratio_to_d3rlpy"] = round(statistics.median(a / b for a, b in zip(ours, theirs, strict=True)), 2)
            rows.append(row)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=15.0, help="rounds are added until this much time is spent")
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS)
    parser.add_argument("--rows", type=int, default=1_000_000, help="transitions of the set")
    parser.add_argument("--updates", type=int, default=200, help="in each of the five timed stretches")
    parser.add_argument("--out", type=Path, default=Path("bench/offline_speed.json"))
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--method", default="", help=argparse.SUPPRESS)
    parser.add_argument("--contestant", default="", help=argparse.SUPPRESS)
    parser.add_argument("--threads", type=int, default=1, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        worker(args)
        return
    from importlib.metadata import version

    import torch

    from ctrlrl.engine.runfolder import versions

    cores = len(os.sched_getaffinity(0))
    contestants = [*ON_CPU, *(ON_GPU if torch.cuda.is_available() else ())]
    rows = table(rounds(args, sorted({1, cores}), contestants), args.methods, contestants)
    for row in rows:
        print(
            f"{row['method']:7} {row['contestant']:21} {row['threads']} threads {row['updates_per_s']:8.1f} updates/s "
            f"{row['ratio_to_d3rlpy']:6.2f} x d3rlpy"
        )
    document = {
        "protocol": shards.protocol(__doc__),
        "arguments": {k: getattr(args, k) for k in ("methods", "rows", "updates", "minutes")},
        "cores": cores, "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "versions": {**versions(), "d3rlpy": version("d3rlpy")}, "table": rows,
    }  # fmt: skip
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(document, indent=2) + "\n")
    print(f"Written: {args.out}")


if __name__ == "__main__":
    main()
