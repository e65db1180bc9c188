"""How many threads."""

import pytest
from torch import nn

from ctrlrl.engine import devices

LARGE, MIDDLING, SMALL = nn.Linear(1000, 1000), nn.Linear(400, 400), nn.Linear(8, 8)


@pytest.fixture
def cores(monkeypatch):
    monkeypatch.setattr(devices.os, "sched_getaffinity", lambda _: set(range(8)), raising=False)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)


def test_threads_follow_the_networks_size_and_the_batch(cores):
    assert devices.threads(SMALL, 4096) == 1
    assert devices.threads(MIDDLING) == 1 and devices.threads(MIDDLING, 256) == devices.ENOUGH
    assert devices.threads(LARGE) == 8


@pytest.mark.parametrize("said, expected", [("1", 1), ("3", 3), ("64", 8), ("0", 8), ("", 8), ("4,2", 8)])
def test_what_the_environment_says_is_the_most(cores, monkeypatch, said, expected):
    monkeypatch.setenv("OMP_NUM_THREADS", said)
    assert devices.threads(LARGE) == expected
