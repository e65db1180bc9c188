"""Agents that train in milliseconds, and a callback that notes what it sees."""

from pathlib import Path

import torch

from ctrlrl import api
from ctrlrl.engine import checkpoint, runfolder
from ctrlrl.losses import base as losses
from ctrlrl.losses.needs import missing
from helpers.envs import env_id

TINY = {
    "n_steps": 16, "batch_size": 16, "epochs": 2, "actor_hidden": (8,), "critic_hidden": (8,), "device": "cpu",
    "threads": 1, "eval_every": None,
}  # fmt: skip
NOISY = env_id("Noisy")


def make(env=NOISY, n_envs=2, **settings):
    return api.make("ppo", env, **({"n_envs": n_envs} if isinstance(env, str) else {}), **TINY | settings)


def quiet(agent, steps, **kwargs):
    return agent.learn(steps, **{"root": None, "progress": False, "tensorboard": False} | kwargs)


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def rows(folder):
    return [r for r in runfolder.read_lines(Path(folder) / "metrics.jsonl") if "train/loss" in r]


def tiny(name, **settings):
    """Settings that train in milliseconds; methods which take the whole rollout by default still do."""
    small = {"n_steps": 16, "epochs": 2, "actor_hidden": (8,), "critic_hidden": (8,), "device": "cpu", "threads": 1}
    small |= {"image_features": 8, "eval_every": None}
    if name == "gorl":
        small["stages"] = (1.0,)  # the others are looked at in tests/online/test_gorl.py
    defaults = losses.get("ppo" if name == "gorl" else name).loop_defaults
    for field in ("batch_size", "value_batch_size"):
        if defaults.get(field, 16 if field == "batch_size" else None) is not None:
            small[field] = 16
    return small | settings


EPISODES = {
    "n_groups": 3, "group_size": 4, "batch_size": None, "epochs": 1, "actor_hidden": (8,), "critic_hidden": (8,),
    "width": 16, "layers": 1, "heads": 2, "denoising_steps": 2, "matching_times": 2, "device": "cpu", "threads": 1,
    "eval_every": None, "checkpoint_every": 1, "learning_rate": 1e-2,
}  # fmt: skip


def home(name):
    """An environment that ``name`` runs on, and settings with which its iterations take milliseconds."""
    loss = losses.get(name)
    settings = dict(EPISODES)
    if "seed_pool" in loss.loop_defaults:
        settings["seed_pool"] = 6
    if missing(loss.needs, "continuous") and missing(loss.needs, "flow"):
        return "ctrlrl/TokenArithmetic-v0", settings
    return NOISY, settings | {"horizon": 6}


def assert_same_tensors(a, b):
    assert a.keys() == b.keys()
    for key in a:
        assert a[key].dtype == b[key].dtype and torch.equal(a[key], b[key]), f"{key} differs"


class Recorder:
    def __init__(self, stop_hook="", stop_step=0, answer=False):
        self.seen = []
        self.stop = (stop_hook, stop_step, answer)

    def _note(self, hook, agent, step, value):
        self.seen.append((hook, agent, step, value))
        return self.stop[2] if (hook, step) == self.stop[:2] else None

    def on_update(self, agent, step, metrics):
        return self._note("update", agent, step, dict(metrics))

    def on_evaluation(self, agent, step, evaluation):
        return self._note("evaluation", agent, step, evaluation)

    def on_checkpoint(self, agent, step, path):
        assert checkpoint.read(path)[1]["steps"] == step
        return self._note("checkpoint", agent, step, path)

    def of(self, hook):
        return [(step, value) for h, _, step, value in self.seen if h == hook]
