"""Speed of the off-policy updates: ctrlrl's SAC and TD3 against Stable-Baselines3's, for bench_speed.py --off-policy.

Everyone has actor and critics of 256-256 ReLU and batches of 256 on transitions shaped as HalfCheetah's (17 observed,
6 actions), drawn from a replay of 100,000 random ones; sampling is part of the time. A process of its own per
contestant; rounds alternate, medians over them. Stable-Baselines3 runs with each number of threads and counts at its
best. "steps" are environment steps per second of whole training on HalfCheetah-v5 with one update per step.
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

ENV, ROWS = "HalfCheetah-v5", 100_000


def random_rows(rng, n):
    return rng.normal(size=(n, 17)), rng.uniform(-1, 1, size=(n, 6)), rng.normal(size=n), rng.normal(size=(n, 17))


def updates_ctrlrl(method: str, kind: str, threads: int):
    """A function that does k updates, and one that trains k steps from scratch."""
    import numpy as np
    import torch

    from ctrlrl.api import make

    def agent(**settings):
        return make(
            method, ENV, backend="sync", device="cuda" if kind.startswith("cuda") else "cpu", threads=threads,
            compile=kind in ("compiled", "cuda graphs"), cudagraphs=kind == "cuda graphs", eval_every=None, **settings,
        )  # fmt: skip

    one = agent(replay_size=ROWS)
    memory = one._memory()
    obs, action, reward, following = (
        torch.as_tensor(x, dtype=torch.float32) for x in random_rows(np.random.default_rng(0), ROWS)
    )
    never = torch.zeros(ROWS, dtype=torch.bool)
    memory.add(obs, action, reward, never, never, following)
    drawing = torch.Generator(one.device).manual_seed(0)

    def update(k):
        one.debt = float(k)
        one._update(memory, drawing, {})
        if one.device.type == "cuda":
            torch.cuda.synchronize()

    def train(k):
        fresh = agent(learning_starts=256, iteration_steps=k, replay_size=ROWS)
        fresh.learn(512, root=None, progress=False)  # compiled by now
        began = time.perf_counter()
        fresh.learn(k, root=None, progress=False)
        return k / (time.perf_counter() - began)

    return update, train


def updates_sb3(method: str, threads: int):
    import gymnasium as gym
    import numpy as np
    import stable_baselines3
    from stable_baselines3.common.logger import configure

    def model(**settings):
        kind = getattr(stable_baselines3, method.upper())
        policy = {"net_arch": [256, 256]}
        return kind("MlpPolicy", gym.make(ENV), policy_kwargs=policy, batch_size=256, device="cpu", **settings)

    one = model(buffer_size=ROWS)
    one.set_logger(configure(None, []))
    obs, action, reward, following = random_rows(np.random.default_rng(0), ROWS)
    for i in range(ROWS):
        one.replay_buffer.add(obs[i : i + 1], following[i : i + 1], action[i : i + 1], reward[i : i + 1], [False], [{}])

    def train(k):
        fresh = model(buffer_size=ROWS, learning_starts=256)
        fresh.learn(512)
        began = time.perf_counter()
        fresh.learn(k, reset_num_timesteps=False)  # or its first steps would be random and without updates again
        return k / (time.perf_counter() - began)

    return lambda k: one.train(gradient_steps=k, batch_size=256), train


def worker(args: argparse.Namespace) -> None:
    import torch

    torch.set_num_threads(args.threads)
    if args.contestant == "sb3":
        update, train = updates_sb3(args.method, args.threads)
    else:
        update, train = updates_ctrlrl(args.method, args.contestant, args.threads)
    update(8)  # compiles
    speeds = []
    for _ in range(5):
        began = time.perf_counter()
        update(60)
        speeds.append(60 / (time.perf_counter() - began))
    print(json.dumps({"updates_per_s": statistics.median(speeds), "steps_per_s": train(args.steps)}))


def run(method: str, contestant: str, threads: int, steps: int) -> dict:
    command = [
        sys.executable, __file__, "--method", method, "--contestant", contestant, "--threads", str(threads),
        "--steps", str(steps),
    ]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    if done.returncode:
        sys.exit(f"{method} of {contestant} failed:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def compare(minutes: float, out: Path, steps: int) -> None:
    """Rounds over all contestants until the time is spent; writes and prints the table."""
    import torch

    from ctrlrl.engine.runfolder import versions

    deadline = time.monotonic() + 60 * minutes
    threads = sorted({1, len(os.sched_getaffinity(0))})
    contestants = [(name, t) for name in ("sb3", "compiled") for t in threads] + [("eager", 1)]
    if torch.cuda.is_available():
        contestants += [("cuda eager", 1), ("cuda graphs", 1)]
    found: dict[tuple[str, str, int], list[dict]] = {}
    while not found or time.monotonic() < deadline:
        for method in ("sac", "td3"):
            for name, t in contestants:
                result = run(method, name, t, steps)
                found.setdefault((method, name, t), []).append(result)
                print(f"{method} {name:12} {t} threads  {result['updates_per_s']:7.1f} updates/s", flush=True)
    table = []
    for (method, name, t), results in found.items():
        row = {"method": method, "contestant": name, "threads": t, "rounds": len(results)}
        for key in ("updates_per_s", "steps_per_s"):
            row[key] = round(statistics.median(r[key] for r in results), 1)
            # round by round against the peer's faster number of threads in that round
            peers = [max(found[method, "sb3", p][k][key] for p in threads) for k in range(len(results))]
            row[f"{key}_ratio_to_sb3"] = round(
                statistics.median(r[key] / p for r, p in zip(results, peers, strict=True)), 2
            )
        table.append(row)
        print(
            f"{method} {name:12} {t} threads: {row['updates_per_s']:7.1f} updates/s "
            f"{row['updates_per_s_ratio_to_sb3']:5.2f} x SB3, {row['steps_per_s']:7.1f} steps/s "
            f"{row['steps_per_s_ratio_to_sb3']:5.2f} x"
        )
    out.parent.mkdir(parents=True, exist_ok=True)
    document = {
        "protocol": " ".join((__doc__ or "").split("\n\n")[1].split()),
        "cores": threads[-1],
        "versions": versions(),
        "table": table,
    }
    out.write_text(json.dumps(document, indent=2) + "\n")
    print(f"Written: {out}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--method", required=True)
    parser.add_argument("--contestant", required=True)
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--steps", type=int, required=True)
    worker(parser.parse_args())
