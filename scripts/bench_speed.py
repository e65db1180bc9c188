"""Environment steps per second of PPO: ctrlrl beside Stable-Baselines3, on the same machine in one run.

Stable-Baselines3's default setting for MuJoCo (2048 steps per environment and update, batches of 64, 10 epochs,
two tanh layers of 64), on HalfCheetah-v5 unless told otherwise. Every measurement is a process of its own that
trains a few iterations and reports the median iteration, the first one (compilation, warm-up) left out; the
contestants alternate, and the ratio is taken between medians over the rounds. Stable-Baselines3 runs at the
thread count that is best for it. Neither side normalises, as is its default.

    python scripts/bench_speed.py --minutes 10 --out bench/speed.json
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

STEPS = 2048


def measure_ctrlrl(args: argparse.Namespace) -> dict:
    from ctrlrl.api import make
    from ctrlrl.engine.runfolder import versions

    agent = make(
        "ppo", args.env, seed=args.seed, n_envs=args.n_envs, backend=args.backend, n_steps=STEPS, batch_size=64,
        epochs=10, compile=args.contestant != "eager", normalize_obs=False, normalize_reward=False, eval_every=None,
        device="cpu", threads=args.threads, checkpoint_every=10**9,
    )  # fmt: skip

    class Clock:
        speeds: list[float] = []  # noqa: RUF012
        timings: list[dict] = []  # noqa: RUF012

        def on_update(self, agent, step, metrics):
            self.speeds.append(metrics["time/fps"])
            self.timings.append(dict(agent.timings))

    clock = Clock()
    began = time.perf_counter()
    agent.learn((args.iterations + 1) * STEPS * args.n_envs, root=None, progress=False, callbacks=[clock])
    total = time.perf_counter() - began
    first, last = clock.timings[0], clock.timings[-1]
    split = {k: last[k] - first[k] for k in last}
    whole = sum(split.values())
    warmup = total - sum(STEPS * args.n_envs / s for s in clock.speeds[1:])
    return {
        "steps_per_s": statistics.median(clock.speeds[1:]),
        "share": {k.removesuffix("_s"): round(v / whole, 3) for k, v in split.items()},
        "warm_up_s": round(warmup, 1),
        "versions": {k: v for k, v in versions().items() if k in ("python", "torch", "gymnasium", "mujoco", "envpool")},
    }


def measure_sb3(args: argparse.Namespace) -> dict:
    import stable_baselines3
    import torch
    from stable_baselines3 import PPO
    from stable_baselines3.common.callbacks import BaseCallback
    from stable_baselines3.common.env_util import make_vec_env

    torch.set_num_threads(args.threads)

    class Clock(BaseCallback):
        def __init__(self):
            super().__init__()
            self.times: list[float] = []

        def _on_rollout_start(self):
            self.times.append(time.perf_counter())

        def _on_step(self):
            return True

    clock = Clock()
    model = PPO("MlpPolicy", make_vec_env(args.env, args.n_envs, seed=args.seed), seed=args.seed, device="cpu")
    model.learn((args.iterations + 1) * STEPS * args.n_envs, callback=clock)
    clock.times.append(time.perf_counter())
    spans = [b - a for a, b in zip(clock.times[1:], clock.times[2:], strict=False)]
    return {
        "steps_per_s": STEPS * args.n_envs / statistics.median(spans),
        "versions": {"stable-baselines3": stable_baselines3.__version__, "torch": torch.__version__},
    }


def run_worker(args: argparse.Namespace, contestant: str, n_envs: int, threads: int, backend: str = "sync") -> dict:
    command = [
        sys.executable, __file__, "--worker", "--contestant", contestant, "--env", args.env, "--seed", str(args.seed),
        "--n-envs", str(n_envs), "--threads", str(threads), "--backend", backend,
        "--iterations", str(args.iterations if n_envs == 1 else max(2, args.iterations // 3)),
    ]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    if done.returncode:
        sys.exit(f"{contestant} with {n_envs} environments failed:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def has_envpool(env: str) -> bool:
    try:
        import envpool
    except ImportError:
        return False
    return env in envpool.list_all_envs()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10.0, help="rounds are added until this much time is spent")
    parser.add_argument("--env", default="HalfCheetah-v5")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--iterations", type=int, default=9, help="timed iterations per measurement, one environment")
    parser.add_argument("--out", type=Path, default=Path("bench/speed.json"))
    parser.add_argument("--off-policy", action="store_true", help="updates of SAC and TD3 instead of PPO's steps")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--contestant", default="", help=argparse.SUPPRESS)
    parser.add_argument("--n-envs", type=int, default=1, help=argparse.SUPPRESS)
    parser.add_argument("--threads", type=int, default=1, help=argparse.SUPPRESS)
    parser.add_argument("--backend", default="sync", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        print(json.dumps(measure_sb3(args) if args.contestant == "sb3" else measure_ctrlrl(args)))
        return
    if args.off_policy:
        from off_policy_speed import compare

        out = args.out if args.out != parser.get_default("out") else args.out.with_name("off_policy_speed.json")
        compare(args.minutes, out, steps=1_000)
        return
    deadline = time.monotonic() + 60 * args.minutes
    cores = len(os.sched_getaffinity(0))
    best_threads = {}
    for n_envs in (1, 8):
        tried = {t: run_worker(args, "sb3", n_envs, t)["steps_per_s"] for t in sorted({1, cores})}
        best_threads[n_envs] = max(tried, key=lambda t: tried[t])
        print(f"Stable-Baselines3 with {n_envs} environment(s), steps/s by threads: {tried}", flush=True)
    contestants = [("sb3", "sync"), ("compiled", "sync"), ("eager", "sync")]
    contestants += [("envpool", "envpool")] if has_envpool(args.env) else []
    found: dict[tuple[int, str], list[dict]] = {}
    rounds = 0
    while not rounds or time.monotonic() < deadline:
        for n_envs in (1, 8):
            for name, backend in contestants:
                threads = best_threads[n_envs] if name == "sb3" else 1
                result = run_worker(args, name, n_envs, threads, backend)
                found.setdefault((n_envs, name), []).append(result)
                print(f"round {rounds}: {n_envs} env {name:9} {result['steps_per_s']:8.0f} steps/s", flush=True)
        rounds += 1
    table = []
    for n_envs in (1, 8):
        peer = statistics.median(r["steps_per_s"] for r in found[n_envs, "sb3"])
        for name, backend in contestants:
            results = found[n_envs, name]
            speeds = [r["steps_per_s"] for r in results]
            row = {
                "n_envs": n_envs, "contestant": name, "simulator": backend, "rounds": len(results),
                "steps_per_s": round(statistics.median(speeds)), "lowest": round(min(speeds)),
                "highest": round(max(speeds)), "ratio_to_sb3": round(statistics.median(speeds) / peer, 2),
                "threads": best_threads[n_envs] if name == "sb3" else 1, "share": results[-1].get("share"),
                "warm_up_s": results[-1].get("warm_up_s"),
            }  # fmt: skip
            table.append(row)
            share = ", ".join(f"{k} {v:.0%}" for k, v in (row["share"] or {}).items())
            print(f"{n_envs} env  {name:9} {row['steps_per_s']:7} steps/s  {row['ratio_to_sb3']:5.2f} x SB3  {share}")
    args.out.parent.mkdir(parents=True, exist_ok=True)
    document = {
        "arguments": {k: str(v) for k, v in vars(args).items() if k not in ("worker", "contestant")},
        "cores": cores, "versions": [found[1, n][0]["versions"] for n, _ in contestants[:2]], "table": table,
    }  # fmt: skip
    args.out.write_text(json.dumps(document, indent=2) + "\n")
    print(f"Written: {args.out}")


if __name__ == "__main__":
    main()
