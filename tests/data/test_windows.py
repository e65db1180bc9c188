"""Where windows of a dataset begin."""

import dataclasses

import gymnasium as gym
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ctrlrl.data.dataset import Dataset, DatasetError, DatasetInfo
from ctrlrl.data.windows import windows

BOX = gym.spaces.Box(-1, 1, (1,), np.float32)
BY_HAND = [(5, "end"), (3, "cut"), (7, "cut"), (4, "both")]
"""Rows 0-4, 5-7, 8-14 and 15-18."""


def dataset(episodes):
    """Episodes of the given lengths; after a cut the next observation is unknown."""
    n = sum(length for length, _ in episodes)
    last = np.cumsum([length for length, _ in episodes]) - 1
    kinds = np.array([kind for _, kind in episodes])
    terminals, timeouts = np.zeros(n, bool), np.zeros(n, bool)
    terminals[last], timeouts[last] = kinds != "cut", kinds != "end"
    rows = np.arange(n, dtype=np.float32)[:, None]
    return Dataset(rows, rows, rows[:, 0], terminals, timeouts, rows, ~timeouts, BOX, BOX, DatasetInfo("toy"))


@pytest.mark.parametrize(
    "length, stride, drop, expected",
    [
        (3, 2, False, [0, 2, 5, 8, 10, 12, 15, 16]),
        (3, 2, True, [0, 2, 8, 10, 15, 16]),
        (4, 3, False, [0, 1, 8, 11, 15]),
        (2, 100, False, [0, 3, 5, 8, 15, 17]),
        (7, 1, False, [8]),
        (3, 1, False, [0, 1, 2, 5, 8, 9, 10, 11, 12, 15, 16]),
    ],
)
def test_windows_begin_at_every_stride_and_where_one_ends_in_a_termination(length, stride, drop, expected):
    found = windows(dataset(BY_HAND), length, stride, drop)
    assert found.tolist() == expected and found.dtype == np.int64


def test_windows_of_one_step_are_the_usable_steps_whatever_the_stride():
    """Rows 7 and 14 were cut with an unknown next observation; row 18 ended as well."""
    expected = [k for k in range(19) if k not in (7, 14)]
    assert windows(dataset(BY_HAND), 1, 4).tolist() == windows(dataset(BY_HAND), 1, 1, True).tolist() == expected


def test_a_set_without_windows_says_what_to_set():
    with pytest.raises(DatasetError, match=r"toy has no window of 8 steps: the longest episode has 7.*window_length"):
        windows(dataset(BY_HAND), 8)
    cut = dataset([(3, "cut")])
    assert windows(cut, 3).tolist() == [0]
    with pytest.raises(DatasetError, match=r"all of them end in a timeout\. Set drop_timeouts to False"):
        windows(cut, 3, 1, True)
    with pytest.raises(DatasetError, match="no step whose next observation is known"):
        windows(dataclasses.replace(cut, next_known=np.zeros(3, bool)), 1)
    for length, stride in ((0, 1), (2, 0)):
        with pytest.raises(ValueError, match="must be at least 1"):
            windows(cut, length, stride)


EPISODES = st.lists(st.tuples(st.integers(1, 9), st.sampled_from(["end", "cut", "both"])), min_size=1, max_size=12)


@settings(max_examples=200, deadline=None)
@given(EPISODES, st.integers(2, 5), st.integers(1, 6), st.booleans())
def test_no_window_crosses_an_end_and_none_is_missing(episodes, length, stride, drop):
    """Against the definition, window by window."""
    data = dataset(episodes)
    expected = set()
    for start, stop in data.episodes:
        grid = range(start, stop - length + 1, stride)
        last = [stop - length] if stop - length >= start and data.terminals[stop - 1] else []
        expected |= {s for s in [*grid, *last] if not (drop and s + length == stop and not data.terminals[stop - 1])}
    if not expected:
        with pytest.raises(DatasetError):
            windows(data, length, stride, drop)
        return
    found = windows(data, length, stride, drop)
    assert found.tolist() == sorted(expected)
    inside = found[:, None] + np.arange(length - 1)
    assert not data.ends[inside].any() and found.max() + length <= len(data)
