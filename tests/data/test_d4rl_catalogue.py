"""The catalogue of D4RL, against what D4RL publishes and against the environments of today."""

import importlib.util
import pathlib
import re
import runpy

import gymnasium as gym
import numpy as np
import pytest

from ctrlrl import names
from ctrlrl.data.d4rl_catalogue import CATALOGUE, ROOT, entry
from ctrlrl.data.dataset import DatasetError


@pytest.mark.parametrize(
    ("id", "file", "low", "high", "steps"),
    [
        ("halfcheetah-random-v0", "gym_mujoco/halfcheetah_random", -280.178953, 12135.0, 1000),
        ("walker2d-medium-replay-v0", "gym_mujoco/walker_mixed", 1.629008, 4592.3, 1000),
        ("ant-random-expert-v0", "gym_mujoco/ant_random_expert", -325.6, 3879.7, 1000),
        ("hopper-full-replay-v1", "gym_mujoco_v1/hopper_full_replay-v1", -20.272305, 3234.3, 1000),
        ("hopper-medium-expert-v2", "gym_mujoco_v2/hopper_medium_expert-v2", -20.272305, 3234.3, 1000),
        ("pen-human-v0", "hand_dapg/pen-v0_demos_clipped", 96.262799, 3076.8331017826877, 100),
        ("hammer-cloned-v0", "hand_dapg/hammer-demos-v0-bc-combined", -274.856578, 12794.134825156867, 200),
        ("relocate-expert-v0", "hand_dapg/relocate-v0_expert_clipped", -6.425911, 4233.877797728884, 200),
        ("door-human-v1", "hand_dapg_v1/door-human-v1", -56.512833, 2880.5693087298737, 200),
        ("door-human-longhorizon-v1", "hand_dapg_v1/door-human-v1", -56.512833, 2880.5693087298737, 300),
        ("maze2d-open-v0", "maze2d/maze2d-open-sparse", 0.01, 20.66, 150),
        ("maze2d-large-v1", "maze2d/maze2d-large-sparse-v1", 6.7, 273.99, 800),
        ("maze2d-umaze-dense-v1", "maze2d/maze2d-umaze-dense-v1", 68.537689, 193.66285642381482, 300),
        (
            "antmaze-umaze-v0",
            "ant_maze_new/Ant_maze_u-maze_noisy_multistart_False_multigoal_False_sparse",
            0.0,
            1.0,
            700,
        ),
        (
            "antmaze-large-play-v2",
            "ant_maze_v2/Ant_maze_hardest-maze_noisy_multistart_True_multigoal_False_sparse_fixed",
            0.0,
            1.0,
            1000,
        ),
        ("kitchen-complete-v0", "kitchen/mini_kitchen_microwave_kettle_light_slider-v0", 0.0, 4.0, 280),
    ],
)
def test_addresses_scores_and_time_limits_are_the_published_ones(id, file, low, high, steps):
    found = entry(id)
    assert found.url == f"http://rail.eecs.berkeley.edu/datasets/offline_rl/{file}.hdf5"
    assert (found.ref_min_score, found.ref_max_score, found.max_episode_steps) == (low, high, steps)


def test_every_set_of_the_five_families_is_there():
    count = {}
    for id in CATALOGUE:
        family = id.partition("-")[0]
        count[family] = count.get(family, 0) + 1
    # five kinds of v0 (ant has one more) and six each of v1 and v2; human, cloned, expert and a long horizon, twice
    assert count == {
        **dict.fromkeys(("halfcheetah", "hopper", "walker2d"), 17),
        "ant": 18,
        **dict.fromkeys(("pen", "hammer", "door", "relocate"), 8),
        "maze2d": 20,
        "antmaze": 24,
        "kitchen": 3,
    }


def test_an_unknown_id_names_the_nearest():
    with pytest.raises(DatasetError, match="Did you mean hopper-medium-v2"):
        entry("hopper-medum-v2")


ENVIRONMENTS = {e.env.id: e for e in CATALOGUE.values() if e.env and "longhorizon" not in e.id}


@pytest.mark.parametrize("id", ENVIRONMENTS)
@pytest.mark.filterwarnings("ignore")
def test_the_environment_of_today_has_the_sizes_bounds_and_time_limit_of_d4rl(id):
    if ":" in id:
        pytest.importorskip("gymnasium_robotics", reason="the extra robotics is absent")
    found = ENVIRONMENTS[id]
    env = gym.make(id, **found.env.kwargs)
    assert env.observation_space.shape == (found.observation_size,)
    assert env.action_space.shape == (found.action_size,)
    assert (env.action_space.low == -1).all() and (env.action_space.high == 1).all()
    assert env.spec.max_episode_steps == found.max_episode_steps
    env.close()


def test_the_door_is_rewarded_as_in_the_files_on_the_long_horizon_too():
    for id, steps in (("door-human-v1", 200), ("door-human-longhorizon-v1", 300)):
        ((wrapper, kwargs),) = entry(id).env.wrappers
        assert names.load(wrapper, "wrapper").__name__ == "DoorReward" and kwargs == {}
        assert entry(id).env.kwargs == {"max_episode_steps": steps}


@pytest.mark.filterwarnings("ignore")
def test_the_ant_of_today_shows_no_contact_forces_as_in_the_files():
    spec = entry("ant-medium-v2").env
    env = gym.make(spec.id, **spec.kwargs)
    env.reset(seed=0)
    env.action_space.seed(0)
    strongest = 0.0
    for _ in range(200):
        obs, _, terminated, _, _ = env.step(env.action_space.sample())
        strongest = max(strongest, np.abs(env.unwrapped.data.cfrc_ext).max())
        assert obs.shape == (111,) and not obs[27:].any()
        if terminated:
            env.reset()
    assert strongest > 0  # there were contacts
    env.close()


def test_a_set_without_an_environment_says_why():
    for found in CATALOGUE.values():
        assert found.difference.startswith("D4RL ")
        assert (found.env is None) == (found.id.partition("-")[0] in ("maze2d", "antmaze", "kitchen"))


def test_the_catalogue_is_that_of_the_official_package():
    spec = importlib.util.find_spec("d4rl")
    if spec is None:
        pytest.skip("the package d4rl is absent; pip install --no-deps d4rl")
    folder = pathlib.Path(spec.origin).parent
    infos = runpy.run_path(str(folder / "infos.py"))  # by itself: the package imports simulators
    families = {id.partition("-")[0] for id in CATALOGUE}
    urls = {id: url for id, url in infos["DATASET_URLS"].items() if id.partition("-")[0] in families}
    assert len(urls) > 100
    for id, url in urls.items():
        assert CATALOGUE[id].url == url
        if id in infos["REF_MIN_SCORE"]:
            scores = infos["REF_MIN_SCORE"][id], infos["REF_MAX_SCORE"][id]
            assert (CATALOGUE[id].ref_min_score, CATALOGUE[id].ref_max_score) == scores
    registered = 0
    for part in ("locomotion", "pointmaze", "hand_manipulation_suite", "gym_mujoco", "kitchen"):
        text = (folder / part / "__init__.py").read_text()
        for match in re.finditer(
            r"register\(\s*id='([^']+)'.*?max_episode_steps=(\d+).*?'(http[^']+)'.*?\n\)", text, re.S
        ):
            if match[1] in ("door-v0", "hammer-v0", "pen-v0", "relocate-v0"):  # environments without a set
                continue
            found = CATALOGUE[match[1]]
            registered += 1
            assert (found.max_episode_steps, found.url) == (int(match[2]), match[3])
    assert registered > 70
    assert all(found.url.startswith(ROOT) for found in CATALOGUE.values())
