"""GoRL with flow and diffusion decoders beside the Gaussian policy, FPO and DPPO, on tasks of the DeepMind suite.

Everyone trains for the same number of environment steps in the same environments (EnvPool), with the same rollouts
and the same discount. ``gaussian`` is PPO with exactly the networks, clipping and regularisation of GoRL's latent
policy (the preset gorl of ppo), so that what it differs by is the decoder. Collecting for a decoder's fit counts as
steps. The score of a run is the mean return of the deterministic episodes of its last policy, from seeds that all
share; the highest possible is 1000. The table gives, per task, the interquartile mean over seeds (the plain mean, for
three) with a 95 % bootstrap interval over runs (rliable, 5,000 repetitions), and the wall time against the Gaussian
policy's.

``--ceilings`` asks what a decoder can express: each GoRL run leaves the decoder that each of its stages began with;
fresh latent policies are trained on each of these, frozen, and scored alike. A Gaussian decoder is what flow and
diffusion are compared with.

Each run is a shard (one JSON file); a later call adds the missing ones and merges all.

    python scripts/bench_gorl.py --minutes 120 --out bench/gorl
    python scripts/bench_gorl.py --ceilings --minutes 120 --out bench/gorl
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Collection
from functools import partial
from pathlib import Path

import shards

ENVS = ("HopperStand-v1", "FingerSpin-v1", "WalkerWalk-v1")
ARMS = {
    "gaussian": ("ppo", {"preset": "gorl"}),
    "gorl_flow": ("gorl", {"decoder": "flow"}),
    "gorl_diffusion": ("gorl", {"decoder": "diffusion"}),
    "fpo": ("fpo", {"preset": "gorl"}),
    "dppo": ("dppo", {"preset": "gorl"}),
}
DECODERS = ("gaussian", "flow", "diffusion")
SHARED = {"n_envs": 16, "n_steps": 256, "batch_size": 256, "epochs": 8, "gamma": 0.995}
EVALUATION_SEED = 10_000


def train(args: argparse.Namespace, method: str, settings: dict, env: str, seed: int, folder: Path | None):
    """The agent of ``method`` after the budget, and the seconds it took."""
    from ctrlrl import api

    agent = api.make(
        method, env, seed=seed, backend=args.backend, device="cpu", threads=1, compile=args.compile, eval_every=None,
        **SHARED, **settings,
    )  # fmt: skip
    began = time.perf_counter()
    agent.learn(args.steps, run_dir=folder, root=None, progress=False, tensorboard=False)
    return agent, time.perf_counter() - began


def worker(args: argparse.Namespace) -> None:
    from ctrlrl.engine.runfolder import versions, write_json

    env, arm, seed = args.worker
    path = shard(args, env, arm, seed)
    path.parent.mkdir(parents=True, exist_ok=True)
    if args.ceilings:
        _, decoder, stage = arm.split("-")
        frozen = {}  # of stage 0 the decoder is the identity, whatever it becomes
        if stage != "0":
            run = source(args, env, decoder, seed)
            frozen = {"decoder_from": str(run), "decoder_checkpoint": f"stage_{stage}"}
        agent, seconds = train(args, "gorl", {"stages": (1.0,), **frozen}, env, int(seed), None)
    else:
        method, settings = ARMS[arm]
        agent, seconds = train(args, method, settings, env, int(seed), None)
    returns = agent.evaluate(args.episodes, seed=EVALUATION_SEED).returns.tolist()
    document = {
        "env": env, "method": arm, "seed": int(seed), "steps": args.steps, "returns": returns,
        "train_s": round(seconds, 1), "settings": SHARED, "versions": versions(),
    }  # fmt: skip
    write_json(path, document)


def source(args: argparse.Namespace, env: str, decoder: str, seed: str) -> Path:
    """The GoRL run whose decoders are looked at; trained where it is not there yet."""
    folder = args.out / f"{args.steps}" / "decoders" / env / f"{decoder}-s{seed}"
    if (folder / "config.json").exists():  # perhaps of a call that was stopped
        from ctrlrl import api

        api.load(folder).resume(folder, progress=False, tensorboard=False)
    else:
        train(args, "gorl", {"decoder": decoder}, env, int(seed), folder)
    return folder


def shard(args: argparse.Namespace, env: str, arm: str, seed: int | str) -> Path:
    kind = "ceilings" if args.ceilings else "returns"
    return args.out / f"{args.steps}" / kind / env / f"{arm}-s{seed}.json"


def table(args: argparse.Namespace, arms: list[str]) -> dict:
    from statistics import fmean, median

    import numpy as np

    from ctrlrl.run.report_statistics import iqm

    found: dict[str, dict] = {}
    for env in args.envs:
        made: dict[str, list[dict]] = {}
        for path in sorted(shard(args, env, "x", 0).parent.glob("*.json")):
            data = json.loads(path.read_text())
            made.setdefault(data["method"], []).append(data)
        slowest = [s["train_s"] for s in made.get("gaussian", [])]
        for arm in [a for a in arms if a in made]:
            runs = [fmean(s["returns"]) for s in made[arm]]
            estimate = iqm(np.array(runs)[:, None], reps=5000)
            seconds = median(s["train_s"] for s in made[arm])
            found.setdefault(env, {})[arm] = {
                "seeds": len(runs), "iqm": round(estimate.value, 1), "low": rounded(estimate.low),
                "high": rounded(estimate.high), "runs": [round(r, 1) for r in runs], "train_s": seconds,
                "time_against_gaussian": round(seconds / median(slowest), 2) if slowest else None,
            }  # fmt: skip
    return found


def rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    shards.add_arguments(parser, "bench/gorl", words=3)
    about = "fresh latent policies on frozen decoders"
    parser.add_argument("--ceilings", action=argparse.BooleanOptionalAction, default=False, help=about)
    parser.add_argument("--envs", nargs="+", default=None, help=f"{' '.join(ENVS)}; with --ceilings {ENVS[0]}")
    parser.add_argument("--methods", nargs="+", default=list(ARMS), choices=ARMS)
    parser.add_argument("--steps", type=int, default=1_000_000)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--episodes", type=int, default=50, help="of each evaluation")
    parser.add_argument("--backend", default="envpool", choices=["envpool", "sync"])
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--plot", type=Path, default=None, help="also draw the table as a picture")
    args = parser.parse_args()
    args.envs = args.envs or list(ENVS[:1] if args.ceilings else ENVS)
    if args.worker:
        worker(args)
        return
    frozen = ["frozen-identity-0", *(f"frozen-{d}-{k}" for k in range(1, 4) for d in DECODERS)]
    arms = frozen if args.ceilings else args.methods

    def source_of(job: shards.Job) -> shards.Job:
        return job[0], str(job[1]).rpartition("-")[0], job[2]

    def not_shared(job: shards.Job, running: Collection[shards.Job]) -> bool:
        """The stages of one decoder share the run that makes it, which must not be trained twice at once."""
        return not args.ceilings or source_of(job) not in map(source_of, running)

    queue = [(e, a, s) for s in range(args.seeds) for e in args.envs for a in arms]
    words = shards.flags(args, "steps", "episodes", "out", "backend", "compile", "ceilings")
    failed = shards.run_missing(args, __file__, queue, partial(shard, args), words, ready=not_shared)
    merged = table(args, arms)
    document = {
        "protocol": shards.protocol(__doc__, 2 if args.ceilings else 1),
        "arguments": {k: getattr(args, k) for k in ("steps", "seeds", "envs", "episodes", "backend", "compile")},
        "shared": SHARED,
        "table": merged,
    }
    kind = "ceilings" if args.ceilings else "returns"
    (args.out / f"{kind}-{args.steps}.json").write_text(json.dumps(document, indent=2) + "\n")
    if args.plot is not None:
        label = f"return after {args.steps:,} steps"
        shards.plot(merged, args.plot, label, lambda arm: "gorl" not in arm and not arm.startswith("frozen"))
    for env, rows in merged.items():
        print(env)
        for arm, row in rows.items():
            slower = row["time_against_gaussian"]
            pace = "" if slower is None else f"  {slower} x the Gaussian's time"
            print(f"  {arm:20} {row['iqm']:8.1f}  [{row['low']}, {row['high']}]  {row['seeds']} seeds{pace}")
    if failed:
        sys.exit(f"{failed} runs failed and are missing from the table")


if __name__ == "__main__":
    main()
