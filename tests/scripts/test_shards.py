"""Runs of a benchmark: what is missing is run, in order, and no more of them than fit."""

import argparse
import importlib
import sys
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).parents[2] / "scripts"
WORKER = """
import pathlib, sys, time
out, flag, name, seed = sys.argv[2], *sys.argv[3:]
time.sleep(0.2)
if name == "bad":
    sys.exit("broken on purpose")
pathlib.Path(out, f"{name}-{seed}.json").write_text(flag)
"""


@pytest.fixture(scope="module")
def shards():
    sys.path.insert(0, str(SCRIPTS))
    try:
        return importlib.import_module("shards")
    finally:
        sys.path.remove(str(SCRIPTS))


@pytest.fixture
def bench(shards, tmp_path):
    """Runs the queue with a worker that writes its file, and says what was printed."""
    script = tmp_path / "bench.py"
    script.write_text(WORKER)

    def run(queue, **options):
        args = argparse.Namespace(minutes=options.pop("minutes", 1.0), jobs=options.pop("jobs", 2))
        path = lambda name, seed: tmp_path / f"{name}-{seed}.json"  # noqa: E731
        return shards.run_missing(args, str(script), queue, path, ["--out", str(tmp_path)], **options)

    return run


def made(folder):
    return sorted(p.stem for p in folder.glob("*.json"))


def test_only_what_is_missing_is_run(bench, tmp_path, capsys):
    (tmp_path / "a-0.json").write_text("of an earlier call")
    assert bench([("a", 0), ("a", 1)]) == 0
    assert made(tmp_path) == ["a-0", "a-1"]
    assert (tmp_path / "a-0.json").read_text() == "of an earlier call"
    assert capsys.readouterr().out.split("\n")[0] == "ran: a 1"


def test_failures_are_counted_and_the_others_run(bench, tmp_path, capfd):
    assert bench([("bad", 0), ("a", 0), ("bad", 1)]) == 2
    assert made(tmp_path) == ["a-0"]
    assert capfd.readouterr().out.count("FAILED: bad") == 2


def test_a_job_waits_until_it_is_ready_and_is_given_up_where_that_cannot_be(bench, tmp_path):
    seen = []

    def ready(job, running):
        seen.append((job, tuple(running)))
        return job[0] == "data" or (tmp_path / "data-0.json").exists()

    assert bench([("a", 0), ("data", 0)], ready=ready) == 0
    assert made(tmp_path) == ["a-0", "data-0"]
    assert (("a", 0), (("data", 0),)) in seen, "it was asked again beside what it waits for"
    assert bench([("b", 0)], ready=lambda job, running: False) == 0
    assert made(tmp_path) == ["a-0", "data-0"]


def test_no_more_than_the_given_number_at_once(bench):
    most = []
    bench([("a", s) for s in range(4)], jobs=2, ready=lambda job, running: not most.append(len(running)))
    assert set(most) == {0, 1}


def test_after_the_time_nothing_is_begun(bench, tmp_path):
    assert bench([("a", 0)], minutes=0.0) == 0
    assert made(tmp_path) == []


def test_arguments_become_words(shards):
    args = argparse.Namespace(steps=5, sac_steps=7, compile=False, off=True, out=Path("a b"))
    words = shards.flags(args, "steps", "sac_steps", "compile", "off", "out")
    assert words == ["--steps", "5", "--sac-steps", "7", "--no-compile", "--off", "--out", "a b"]
