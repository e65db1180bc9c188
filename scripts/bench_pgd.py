"""Policy-guided diffusion: what guidance does to generated trajectories, and what learners make of them.

``--part guidance``: trajectories of 33 steps (so that there are 32 transitions) on two tasks. Pendulum-v1: 50,000
steps of a weak policy that swings up with noise of deviation 0.25 in units of actions; the target does the same with
0.4 added to its mean. HalfCheetah-v5: what a SAC's replay holds (medium-replay, as bench_offline makes it); the target
is TD3+BC trained on it and the behaviour a cloned policy, both with noise of deviation 0.25. Strengths kappa hold for
32 sampler steps, length 32 and one action, and are carried over by the library's rule; the gradient is normalised, of
actions alone, at the denoised trajectory. All strengths start from the same noise. The predictor of the released code
is asked unguided. Beside them MOPO's ensemble, rolled out by behaviour and target from recorded observations, and the
simulator itself by the target. The error of a step is that of the next observation against the simulator's at the same
observation and action; at horizon h it is that of the h-th one, where the simulator starts at the trajectory's first
observation and does all its actions. Errors are squared, in deviations of the data, averaged over dimensions; the table
has their mean, and their median in brackets, for a few lost trajectories can make the mean. Likelihoods are mean
log-densities of the actions under target and behaviour, of which the latter is exact on the pendulum alone. Numbers are
means over seeds, each with models of its own.

``--part scores``: TD3+BC and IQL on HalfCheetah's set alone, with rows generated unguided, and with rows guided to the
policy as it learns. 15 of 16 rows of a batch are generated, anew every 10,000 updates from 512 trajectories; the first
set is unguided. Networks of 256-256 and settings as in bench_offline; each seed has a diffusion model of its own, which
both arms and both methods share. The score of a run is the mean over 100 deterministic episodes of its last policy, in
D4RL's terms between random (0) and the SAC that made the data (100), from reset seeds that all share. Intervals are
95 % bootstraps over runs. Of two runs they only span the runs themselves, so a difference that such an interval tells
is said to be of few runs (below five).

Each model and each run is a shard (one JSON file); a later call adds the missing ones and merges all.

    python scripts/bench_pgd.py --part guidance --minutes 60 --out bench/pgd
    python scripts/bench_pgd.py --part scores --minutes 120 --out bench/pgd
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import time
from functools import partial
from pathlib import Path
from statistics import fmean

import bench_offline
import shards

TASKS = PENDULUM, CHEETAH = "Pendulum-v1", "HalfCheetah-v5"
KAPPAS = (0.0, 0.1, 0.3, 1.0, 3.0)
METHODS, ARMS = ("td3_bc", "iql"), ("real", "unguided", "guided")
PAIRS = (("unguided", "real"), ("guided", "real"), ("guided", "unguided"))
LENGTH, FEW, EVALUATION_SEED = 33, 5, 10_000
NETWORK = {"normalize_obs": True, "actor_hidden": (256, 256), "critic_hidden": (256, 256), "learning_rate": 3e-4}
WORDS = (
    "part", "out", "data", "transitions", "sac_steps", "data_seed", "updates", "learner_updates", "policy_updates",
    "epochs", "trajectories", "sampler_steps", "kappa", "augment_trajectories", "augment_every", "episodes", "compile",
)  # fmt: skip


def folder(args: argparse.Namespace, task: str) -> Path:
    if task == PENDULUM:
        return args.out / f"{task}-{args.transitions}"
    if args.data is not None:
        return args.out / f"{args.data.parent.name}-{args.data.stem}"
    return bench_offline.folder(args, task)


def data_file(args: argparse.Namespace, task: str) -> Path:
    return args.data if task == CHEETAH and args.data is not None else folder(args, task) / "data.hdf5"


def shard(args: argparse.Namespace, task: str, kind: str, seed: int | str) -> Path:
    if kind == "data":
        return data_file(args, task)
    updates = {"policies": args.policy_updates, "ensemble": args.epochs}.get(kind, args.updates)
    name = f"{kind}-{args.learner_updates}" if "-" in kind else kind
    return folder(args, task) / f"{updates}" / f"{name}-s{seed}.json"


def run_folder(args: argparse.Namespace, task: str, kind: str, seed: int | str) -> Path:
    return shard(args, task, kind, seed).with_suffix("")


def learn(args: argparse.Namespace, task: str, method: str, seed: int, updates: int, into: Path | None, **settings):
    """A trained agent; one that was stopped begins anew."""
    from ctrlrl import api

    if into is not None:
        shutil.rmtree(into, ignore_errors=True)
    agent = api.make(
        method, dataset=data_file(args, task), seed=seed, device="cpu", threads=1, compile=args.compile,
        eval_every=None, **settings,
    )  # fmt: skip
    return agent.learn(updates, run_dir=into, root=None, progress=False, tensorboard=False)


# -- jobs -----------------------------------------------------------------------------------------


def make_data(args: argparse.Namespace, task: str) -> None:
    if task != PENDULUM:
        bench_offline.make_set(args, task)
        return
    import pgd_dynamics

    from ctrlrl.data import d4rl

    path = data_file(args, task)
    path.parent.mkdir(parents=True, exist_ok=True)
    d4rl.write(pgd_dynamics.pendulum_set(args.transitions, args.data_seed), path)


def train_model(args: argparse.Namespace, task: str, kind: str, seed: int) -> dict:
    """The diffusion model, or the policies that guide and judge it."""
    into = run_folder(args, task, kind, seed)
    if kind == "diffusion":
        agent = learn(args, task, "policy_guided_diffusion", seed, args.updates, into, window_length=LENGTH)
        return {"parameters": sum(p.numel() for p in agent.averaged.parameters())}
    for method in ("bc", "td3_bc"):
        learn(args, task, method, seed, args.policy_updates, into / method, batch_size=256, **NETWORK)
    return {}


def compare(args: argparse.Namespace, task: str, kind: str, seed: int) -> dict:
    """Rows of trajectories against the simulator: of the diffusion model, or of the ensemble and the simulator."""
    import pgd_dynamics as pgd
    import torch

    from ctrlrl import api
    from ctrlrl.data.load import load
    from ctrlrl.nets.edm import SamplerConfig

    torch.set_num_threads(1)
    rows, simulator = pgd.recorded(load(data_file(args, task))), pgd.Simulator(task)
    policies = pgd.pendulum_policies() if task == PENDULUM else pgd.kernels(run_folder(args, task, "policies", seed))
    behaviour, target = policies
    std, noise = rows.obs.double().std(0).numpy(), torch.Generator().manual_seed(seed)
    start = rows.obs[torch.randint(len(rows.obs), (args.trajectories,), generator=noise)]
    found = []

    def add(source: str, steps) -> None:
        found.append({"source": source, **pgd.measure(simulator, steps, std, target, behaviour)})

    if kind == "ensemble":
        world = pgd.fit_ensemble(rows, args.epochs, seed)
        add("simulator, target", simulator.roll_out(target, start, LENGTH - 1, noise))
        for name, policy in (("behaviour", behaviour), ("target", target)):
            act = lambda obs, _, policy=policy: policy.act(obs, noise)  # noqa: E731
            add(f"ensemble, {name}", world.open_loop(act, start, LENGTH - 1, noise))
        return {"rows": found}
    model = api.load(run_folder(args, task, "diffusion", seed)).averaged
    for kappa in KAPPAS:
        sampler = SamplerConfig(sampler_steps=args.sampler_steps)
        add(f"diffusion, kappa {kappa:g}", pgd.generate(model, args.trajectories, target, kappa, sampler, seed))
    sampler = SamplerConfig(sampler_steps=args.sampler_steps, legacy_predictor=True)
    add("released predictor, kappa 0", pgd.generate(model, args.trajectories, target, 0.0, sampler, seed))
    return {"rows": found}


def score(args: argparse.Namespace, task: str, kind: str, seed: int) -> dict:
    method, arm = kind.split("-")
    settings = {"iql": {"scale_by_returns": True, "actor_schedule": "constant"}}.get(method, {})
    if arm != "real":
        settings |= {
            "augment": str(run_folder(args, task, "diffusion", seed)), "augment_every": args.augment_every,
            "augment_trajectories": args.augment_trajectories, "sampler_steps": args.sampler_steps,
        }  # fmt: skip
    if arm == "guided":
        import pgd_dynamics

        settings |= {"kappa": args.kappa, "kappa_at": pgd_dynamics.KAPPA_AT}
    agent = learn(args, task, method, seed, args.learner_updates, None, batch_size=256, **NETWORK, **settings)
    returns = agent.evaluate(args.episodes, seed=EVALUATION_SEED).returns
    return {"returns": returns.tolist(), "scores": agent.data.normalized(returns).tolist()}


def worker(args: argparse.Namespace) -> None:
    from ctrlrl.data.load import load
    from ctrlrl.engine.runfolder import versions, write_json

    task, kind, seed = args.worker
    if kind == "data":
        make_data(args, task)
        return
    began = time.perf_counter()
    job = score if "-" in kind else compare if kind in ("guidance", "ensemble") else train_model
    path = shard(args, task, kind, seed)
    path.parent.mkdir(parents=True, exist_ok=True)
    document = job(args, task, kind, int(seed))
    data = load(data_file(args, task))
    document |= {
        "task": task, "kind": kind, "seed": int(seed), "arguments": {k: str(getattr(args, k)) for k in WORDS},
        "set": {"steps": len(data), "sha256": data.info.sha256}, "wall_s": round(time.perf_counter() - began, 1),
        "versions": versions(),
    }  # fmt: skip
    write_json(path, document)


def jobs(args: argparse.Namespace) -> list[shards.Job]:
    seeds = range(args.seeds)
    if args.part == "scores":
        queue: list[shards.Job] = [(CHEETAH, "data", 0), *((CHEETAH, "diffusion", s) for s in seeds)]
        return queue + [(CHEETAH, f"{m}-{a}", s) for s in seeds for m in args.methods for a in ARMS]
    queue = [(t, "data", 0) for t in args.tasks]
    for s in seeds:
        queue += [(CHEETAH, "policies", s)] if CHEETAH in args.tasks else []
        queue += [(t, k, s) for t in args.tasks for k in ("diffusion", "ensemble", "guidance")]
    return queue


def ready(args: argparse.Namespace, job: shards.Job) -> bool:
    """Whether what a job needs is there."""
    task, kind, seed = str(job[0]), str(job[1]), str(job[2])
    needs = [] if kind == "data" else ["data"]
    needs += ["diffusion"] if kind == "guidance" or ("-" in kind and not kind.endswith("real")) else []
    needs += ["policies"] if kind in ("guidance", "ensemble") and task != PENDULUM else []
    return all(shard(args, task, need, seed).exists() for need in needs)


# -- merging --------------------------------------------------------------------------------------


def read(args: argparse.Namespace) -> list[dict]:
    """The shards of this call's settings; all of a task must be of one set."""
    paths = [shard(args, *map(str, job)) for job in jobs(args) if job[1] != "data"]
    found = [json.loads(path.read_text()) for path in paths if path.exists()]
    for task in {s["task"] for s in found}:
        sets = {s["set"]["sha256"] for s in found if s["task"] == task}
        if len(sets) > 1:
            sys.exit(f"{args.out} has runs of {len(sets)} sets of {task}; name another --out")
    return found


def scores_table(found: list[dict]) -> dict:
    """Scores by method and arm, and the arms' differences with the words for their direction."""
    interval, table = bench_offline.interval, {}
    for method in METHODS:
        runs = {a: [fmean(s["scores"]) for s in found if s["kind"] == f"{method}-{a}"] for a in ARMS}
        runs = {a: r for a, r in runs.items() if r}
        scores, differences = {}, {}
        for arm, of in runs.items():
            scores[arm] = {
                "seeds": len(of), "mean": round(fmean(of), 1), "interval": interval(of),
                "runs": [round(x, 1) for x in of],
            }  # fmt: skip
        for a, b in PAIRS:
            if a in runs and b in runs:
                value, between = fmean(runs[a]) - fmean(runs[b]), interval(runs[a], runs[b])
                sure = between is not None and between[0] * between[1] > 0.0
                word = ("higher" if value > 0.0 else "lower") if sure else "not told apart"
                word += ", of few runs" if sure and min(len(runs[a]), len(runs[b])) < FEW else ""
                differences[f"{a} - {b}"] = {"mean": round(value, 1), "interval": between, "direction": word}
        if scores:
            table[method] = {"scores": scores, "differences": differences}
    return table


def plot_scores(found: dict, axis, method: str) -> None:
    """A tick per run, the mean with its interval."""
    rows = found["scores"]
    for y, row in enumerate(reversed(rows.values())):
        axis.plot(row["runs"], [y] * len(row["runs"]), "|", color="#0072b2", markersize=9, alpha=0.6)
        if row["interval"] is not None:
            axis.plot(row["interval"], [y, y], color="#0072b2", linewidth=2)
        axis.plot(row["mean"], y, "o", color="#0072b2", markersize=6)
    axis.set_yticks(range(len(rows)), list(reversed(rows)))
    axis.set_title(f"{method}: score", fontsize=10)


def show_scores(table: dict) -> None:
    for method, rows in table.items():
        print(method)
        for arm, row in rows["scores"].items():
            print(f"  {arm:10} {row['mean']:7.1f}  {row['interval']}  {row['seeds']} seeds")
        for pair, row in rows["differences"].items():
            print(f"  {pair:20} {row['mean']:7.1f}  {row['interval']}  {row['direction']}")


def plot(args: argparse.Namespace, table: dict) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    import pgd_dynamics

    guided = args.part == "guidance"
    shape = (len(table), 2) if guided else (1, len(table))
    size = (3.8 * shape[1], 2.6 * shape[0])
    figure, axes = plt.subplots(*shape, figsize=size, constrained_layout=True, squeeze=False)
    for i, name in enumerate(table):
        if guided:
            pgd_dynamics.plot(table[name], axes[i], name, KAPPAS)
        else:
            plot_scores(table[name], axes[0][i], name)
    for axis in axes.flat:
        axis.grid(alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
    args.plot.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(args.plot, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    shards.add_arguments(parser, "bench/pgd", words=3)
    parser.add_argument("--part", choices=("guidance", "scores"), default="guidance")
    parser.add_argument("--tasks", nargs="+", default=list(TASKS), choices=TASKS, help="of guidance")
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS, help="of scores")
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--data", type=Path, default=None, help="an existing set of HalfCheetah-v5")
    parser.add_argument("--transitions", type=int, default=50_000, help="of the pendulum's set")
    parser.add_argument("--sac-steps", type=int, default=100_000, help="of the SAC that makes HalfCheetah's set")
    parser.add_argument("--data-seed", type=int, default=100)
    parser.add_argument("--updates", type=int, default=5_000, help="of each diffusion model")
    parser.add_argument("--policy-updates", type=int, default=20_000, help="of HalfCheetah's behaviour and target")
    parser.add_argument("--learner-updates", type=int, default=50_000, help="of each run of scores")
    parser.add_argument("--epochs", type=int, default=100, help="of each ensemble, at most")
    parser.add_argument("--trajectories", type=int, default=256, help="that are measured, of each source")
    parser.add_argument("--sampler-steps", type=int, default=32)
    parser.add_argument("--kappa", type=float, default=1.0, help="of the guided arm of scores")
    parser.add_argument("--augment-trajectories", type=int, default=512)
    parser.add_argument("--augment-every", type=int, default=10_000)
    parser.add_argument("--episodes", type=int, default=100)
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--plot", type=Path, default=None, help="also draw the table as a picture")
    args = parser.parse_args()
    if args.worker:
        worker(args)
        return
    words = shards.flags(args, *(w for w in WORDS if getattr(args, w) is not None))
    failed = shards.run_missing(
        args, __file__, jobs(args), partial(shard, args), words, ready=lambda job, _: ready(args, job)
    )
    found = read(args)
    if args.part == "guidance":
        import pgd_dynamics

        table = pgd_dynamics.table(found)
        pgd_dynamics.show(table)
    else:
        table = scores_table(found)
        show_scores(table)
    document = {
        "protocol": shards.protocol(__doc__, 1 if args.part == "guidance" else 2),
        "arguments": {k: str(getattr(args, k)) for k in (*WORDS, "seeds")},
        "versions": found[0]["versions"] if found else {},
        "wall_s": {f"{s['task']} {s['kind']} {s['seed']}": s["wall_s"] for s in found},
        "table": table,
    }
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / f"{args.part}-{args.updates}.json").write_text(json.dumps(document, indent=2) + "\n")
    if args.plot is not None and table:
        plot(args, table)
    if failed:
        sys.exit(f"{failed} runs failed and are missing from the table")


if __name__ == "__main__":
    main()
