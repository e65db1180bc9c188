"""Episodes of recorded experience, and what may be learned from their last steps."""

import dataclasses

import gymnasium as gym
import numpy as np
import pytest

from ctrlrl.data.dataset import Dataset, DatasetError, DatasetInfo, Episode, normalized

END, CUT = np.array([0, 0, 1, 0, 0, 0], bool), np.array([0, 0, 0, 0, 1, 1], bool)


def dataset(**changes):
    obs = np.arange(6, dtype=np.float32)[:, None]
    fields = {
        "observations": obs,
        "actions": -obs,
        "rewards": np.array([1, 2, 4, 8, 16, 32], np.float32),
        "terminals": END,
        "timeouts": CUT,
        "next_observations": obs + 1,
        "next_known": ~(END | CUT),
        "observation_space": gym.spaces.Box(-9, 9, (1,)),
        "action_space": gym.spaces.Box(-9, 9, (1,)),
        "info": DatasetInfo("six", ref_min_score=-10.0, ref_max_score=30.0),
        "infos": {"qpos": 10 * obs},
    }
    return Dataset(**(fields | changes))


def test_episodes_end_at_terminals_and_at_timeouts():
    assert dataset().episodes == [Episode(0, 3), Episode(3, 5), Episode(5, 6)]
    assert list(dataset()) == dataset().episodes
    assert len(dataset()) == 6


def test_returns_are_sums_of_each_episode_in_float64():
    assert dataset().returns.tolist() == [7.0, 24.0, 32.0]
    big = dataset(rewards=np.array([1, 2**24, 1, 0, 0, 0], np.float32))
    assert big.returns[0] == 2**24 + 2 and big.returns.dtype == np.float64  # float32 would lose the ones


def test_a_value_can_be_learned_from_a_terminal_and_not_from_a_cut_without_a_next_observation():
    assert dataset().usable.tolist() == [True, True, True, True, False, False]
    known = dataset(next_known=np.array([1, 1, 1, 1, 0, 1], bool))
    assert known.usable.tolist() == [True, True, True, True, False, True]


def test_taking_episodes_keeps_every_column_together_in_the_given_order():
    taken = dataset().take([2, 0])
    assert taken.observations[:, 0].tolist() == [5, 0, 1, 2]
    assert taken.actions[:, 0].tolist() == [-5, 0, -1, -2]
    assert taken.next_observations[:, 0].tolist() == [6, 1, 2, 3]
    assert taken.infos["qpos"][:, 0].tolist() == [50, 0, 10, 20]
    assert taken.terminals.tolist() == [False, False, False, True]
    assert taken.returns.tolist() == [32.0, 7.0]


def test_taking_no_episode_says_so():
    with pytest.raises(DatasetError, match="no episode of six is left"):
        dataset().take([])


def test_dict_observations_are_columns_of_their_own_and_are_taken_together():
    obs = {"a": np.arange(6), "b": np.zeros((6, 2))}
    d = dataset(observations=obs, next_observations=obs)
    assert {"observations/a", "observations/b", "next_observations/b", "infos/qpos"} <= set(d.columns())
    assert d.take([1]).observations["a"].tolist() == [3, 4]


def test_columns_of_different_lengths_are_refused_by_name():
    with pytest.raises(DatasetError, match="infos/qpos has 5 rows, rewards has 6"):
        dataset(infos={"qpos": np.zeros(5)})


def test_an_empty_set_is_refused():
    empty = {k: v[:0] for k, v in dataset().columns().items() if not k.startswith("infos")}
    with pytest.raises(DatasetError, match="has no steps"):
        dataset(**empty, infos={})


def test_an_episode_without_an_end_is_refused_with_its_rows():
    with pytest.raises(DatasetError, match="rows 3 to 5 has no end"):
        dataset(timeouts=np.zeros(6, bool))
    with pytest.raises(DatasetError, match="rows 0 to 5 has no end"):
        dataset(timeouts=np.zeros(6, bool), terminals=np.zeros(6, bool))


def test_flags_that_are_no_booleans_are_refused():
    with pytest.raises(DatasetError, match="terminals holds float32"):
        dataset(terminals=END.astype(np.float32))


def test_scores_are_zero_at_the_minimum_and_a_hundred_at_the_maximum():
    assert dataset().normalized(np.array([-10.0, 30.0, 10.0])).tolist() == [0.0, 100.0, 50.0]
    assert normalized(DatasetInfo("none", ref_min_score=0.0), 1.0) is None


def test_a_changed_copy_counts_its_own_episodes():
    d = dataset()
    assert len(d.episodes) == 3
    assert len(dataclasses.replace(d, timeouts=np.array([1, 0, 0, 0, 1, 1], bool)).episodes) == 4
