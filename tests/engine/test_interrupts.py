"""A run that is killed, or stopped by Ctrl-C, and taken up again is the run never stopped."""

import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from helpers.agents import NOISY, make, quiet, same

from ctrlrl import api
from ctrlrl.engine import checkpoint, runfolder

STEPS = 32 * 160
CHOICES = {
    "n_envs": 2, "seed": 4, "n_steps": 16, "batch_size": 16, "epochs": 1, "eval_every": 640, "eval_episodes": 2,
    "checkpoint_every": 1, "device": "cpu", "threads": 1, "actor_hidden": (64, 64), "critic_hidden": (64, 64),
}  # fmt: skip


def command(*words):
    root = Path(__file__).resolve().parents[2]
    paths = [str(root), str(root / "envs"), str(root / "tests")]
    return subprocess.Popen(
        [sys.executable, "-m", "ctrlrl", "train", *map(str, words)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def start_training(root, **changes):
    words = ["ppo", "--env", NOISY, "--steps", STEPS, "--root", root, "--quiet"]
    for name, value in (CHOICES | changes).items():
        words += [f"--{name.replace('_', '-')}", *(value if isinstance(value, tuple) else (value,))]
    return command(*words)


def wait_for(process, condition, seconds=60.0):
    end = time.monotonic() + seconds
    while not condition():
        if process.poll() is not None:
            raise AssertionError(f"ended with {process.returncode}: {process.communicate()}")
        assert time.monotonic() < end, "it takes too long"
        time.sleep(0.0005)


def run_below(root):
    found = list(Path(root).glob("*/*/*/checkpoints/last.safetensors"))
    return found[0].parents[1] if found else None


def logged(run):
    file = run / "metrics.jsonl"
    return file.read_bytes().count(b"\n") if file.exists() else 0


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole") / "run"
    api.make("ppo", NOISY, backend="auto", **CHOICES).learn(STEPS, run_dir=folder, progress=False)
    return folder


def assert_equal_runs(run, whole):
    (tensors, state), (expected, expected_state) = (
        checkpoint.read(f / "checkpoints" / "last.safetensors") for f in (run, whole)
    )
    assert state == expected_state and same(tensors, expected)
    assert same(*(checkpoint.read(f / "checkpoints" / "best.safetensors")[0] for f in (run, whole)))
    clock = ("time_s", "time/fps")
    for name in ("metrics.jsonl", "evaluations.jsonl"):
        a, b = ([{k: v for k, v in r.items() if k not in clock} for r in runfolder.read_lines(f / name)]
                for f in (run, whole))  # fmt: skip
        assert a == b
    assert (run / "config.json").read_bytes() == (whole / "config.json").read_bytes()


def test_killed_at_any_moment_and_resumed_is_the_run_never_killed(tmp_path, uninterrupted):
    """SIGKILL in the middle of writing a checkpoint, at a random moment, and in the middle of writing again."""
    process = start_training(tmp_path)
    wait_for(process, lambda: run_below(tmp_path) is not None)
    run = run_below(tmp_path)
    rng = np.random.default_rng()
    moments = [("writing", 14), ("anywhere", 30 + int(rng.integers(40))), ("writing", 75 + int(rng.integers(40)))]
    for moment, lines in moments:
        wait_for(process, lambda: logged(run) >= lines)  # noqa: B023
        if moment == "writing":
            wait_for(process, lambda: any(".tmp-" in n for n in os.listdir(run / "checkpoints")))
        else:
            time.sleep(float(rng.random()) * 0.05)
        process.kill()
        process.communicate()
        assert process.returncode == -signal.SIGKILL
        process = command("--resume", run, "--quiet")
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    assert str(run) in out
    assert_equal_runs(run, uninterrupted)
    assert not [p for p in run.rglob("*") if ".tmp-" in p.name], "a killed write left something behind"


def test_ctrl_c_saves_says_how_to_go_on_and_goes_on(tmp_path, uninterrupted):
    process = start_training(tmp_path)
    wait_for(process, lambda: run_below(tmp_path) is not None)
    run = run_below(tmp_path)
    wait_for(process, lambda: logged(run) >= 15)
    os.killpg(process.pid, signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130 and "Traceback" not in err
    assert re.search(rf"ctrlrl train --resume {re.escape(str(run))}\s", out)
    interrupted, last = api.load(run, "interrupted"), api.load(run)
    assert interrupted.steps > last.steps and interrupted.steps % 32 == 0
    assert f"{interrupted.steps:,}" in out
    process = command("--resume", run, "--quiet")
    _, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    assert_equal_runs(run, uninterrupted)


def test_ctrl_c_in_a_terminal_reaches_the_workers_too_and_still_saves(tmp_path):
    process = start_training(tmp_path, backend="async", eval_every=10**9)
    wait_for(process, lambda: run_below(tmp_path) is not None)
    run = run_below(tmp_path)
    wait_for(process, lambda: logged(run) >= 12)
    os.killpg(process.pid, signal.SIGINT)  # the whole group, as a terminal does
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert "Traceback" not in err and "--resume" in out
    assert api.load(run, "interrupted").steps > 0


def test_outside_the_main_thread_training_works_without_a_signal_handler():
    agents = []
    thread = threading.Thread(target=lambda: agents.append(quiet(make(), 32)))
    before = signal.getsignal(signal.SIGINT)
    thread.start()
    thread.join()
    assert agents[0].steps == 32 and signal.getsignal(signal.SIGINT) is before


def test_the_signal_handler_is_given_back():
    before = signal.getsignal(signal.SIGINT)
    quiet(make(), 32)
    assert signal.getsignal(signal.SIGINT) is before
