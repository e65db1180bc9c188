"""What scripts/bench_losses.py runs: tasks, one training run, its shard."""

from __future__ import annotations

import json
import re
import time
import traceback
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

PLAIN = "grpo,ref_kl_coef=0"
HEADLINE = ("grpo", PLAIN, "gspo", "cispo", "dr_grpo", "rloo", "ppo", "bapo", "mhpo", "aepo", "epo", "d3s", "bnpo")
SEEDS = 5
ANSWERS, EPISODES = 512, 20
POINTS = 12  # of each run's curve
REPS = 1000


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
        "CartPole-v1",
        25_000,
        "ppo",
        CONTROL,
        {"n_groups": 4, "group_size": 8, "batch_size": 8, "learning_rate": 1e-3},
        {"n_steps": 256},
    ),
    "acrobot": Task(
        "Acrobot-v1",
        60_000,
        "ppo",
        CONTROL,
        {"n_groups": 2, "group_size": 8, "batch_size": 4, "learning_rate": 1e-3},
        {"n_steps": 256},
    ),
}
# the tasks of the claims
TASKS |= {
    "entropy": tokens("Sort", 60_000, "as sort, twice as long", digits=4, size=4),
    "free": tokens(
        "Format", 40_000, "one mark and a stop, the digits are free", digits=4, size=3, weights=[0.0, 1.0, 0.0]
    ),
    "balance": tokens(
        "Sort", 20_000, "all or nothing: sort 3 of 4 digits, 8 passes", {"epochs": 8}, digits=4, size=3, binary=True
    ),
    "length": tokens(
        "Format",
        60_000,
        "only correctness counts, room for 16 tokens",
        digits=10,
        size=5,
        room=16,
        weights=[1.0, 0.0, 0.0],
    ),
    "brief": tokens("Format", 40_000, "correctness and format count", digits=4, size=3, weights=[0.8, 0.2, 0.0]),
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
    reset: Any = env.reset  # gymnasium annotates one seed, its vector environments take a list
    obs, info = reset(seed=[derive(seed, "losses", k) for k in range(answers)])
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
        clipped = any(hasattr(agent.loss, name) for name in ("band", "eps_low"))
        recorder = Recorder(watched, job.task == "balance" and clipped)
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


def records(out: Path, task: str) -> list[dict]:
    folder = out / f"{task}-{TASKS[task].steps}"
    return [json.loads(p.read_text()) for p in sorted(folder.glob("*.json"))]
