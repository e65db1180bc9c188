"""Minari sets: what is written is read back, by us and by minari; those of others are read with care."""

import dataclasses
import json
import warnings

import gymnasium as gym
import numpy as np
import pytest
from data.minari_parts import ACTIONS, BOX, ID, assert_same, edit_metadata, toy

from ctrlrl.data import minari
from ctrlrl.data.dataset import DatasetError, DatasetInfo
from ctrlrl.types import EnvSpec

library = pytest.importorskip("minari", reason="minari is not installed")
h5py = pytest.importorskip("h5py", reason="h5py is not installed")


@pytest.fixture(autouse=True)
def root(tmp_path, monkeypatch):
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "root"))
    return tmp_path / "root"


# -- the way there and back -----------------------------------------------------------------------


def test_a_set_comes_back_as_it_was_written(root):
    folder = minari.write(toy(), ID)
    assert folder == root / ID
    for name in (ID, str(folder), str(folder / "data")):
        found = minari.read(name)
        assert_same(found, toy())
        assert found.info.id == ID and found.info.path == str(folder)
    import hashlib

    assert found.info.sha256 == hashlib.sha256((folder / "data" / "main_data.hdf5").read_bytes()).hexdigest()


def test_dict_and_discrete_observations_and_discrete_actions_come_back():
    space = gym.spaces.Dict(
        [("zeta", BOX), ("mode", gym.spaces.Discrete(9)), ("image", gym.spaces.Box(0, 255, (40, 40, 3), np.uint8))]
    )
    rng, one = np.random.default_rng(0), toy()
    image = rng.integers(0, 256, (7, 40, 40, 3), dtype=np.uint8)
    first = {"zeta": one.observations, "mode": np.arange(6), "image": image[:6]}
    after = {"zeta": one.next_observations, "mode": np.arange(1, 7), "image": image[1:]}
    # within an episode the next observation is the following row
    for name in ("mode", "image"):
        first[name], after[name] = first[name].copy(), after[name].copy()
    data = toy(
        observations=first, next_observations=after, observation_space=space,
        action_space=gym.spaces.Discrete(3, start=5), actions=np.array([5, 6, 7, 5, 6, 7]),
    )  # fmt: skip
    found = minari.read(minari.write(data, "images-v3"))
    assert_same(found, data)
    assert list(found.observation_space.spaces) == ["zeta", "mode", "image"]


def test_minaris_own_loader_reads_what_we_wrote():
    minari.write(toy(), ID, author="A. Writer", code_permalink="https://example.org/code", algorithm_name="sac")
    assert list(library.list_local_datasets()) == [ID]
    theirs = library.load_dataset(ID)
    assert theirs.total_episodes == 3 and theirs.total_steps == 6
    assert theirs.observation_space == BOX and theirs.action_space == ACTIONS
    one, two, three = theirs.iterate_episodes()
    np.testing.assert_array_equal(one.observations[:, 0], [0, 2.5, 4.5, 6.5])
    assert one.terminations.tolist() == [False, False, True] and one.truncations.tolist() == [False] * 3
    assert two.terminations.tolist() == two.truncations.tolist() == [True]
    assert three.truncations.tolist() == [False, True] and not three.terminations.any()
    np.testing.assert_array_equal(three.infos["action_log_probs"], [-4, -5])
    assert three.rewards.tolist() == [5, 6]
    assert library.get_normalized_score(theirs, np.array([-1.5, 7.25])).tolist() == [0, 1]
    metadata = theirs.storage.metadata
    assert metadata["author"] == {"A. Writer"} and metadata["code_permalink"] == "https://example.org/code"
    assert metadata["algorithm_name"] == "sac"
    env = theirs.recover_environment()
    assert env.spec.id == "Hopper-v5" and env.unwrapped._ctrl_cost_weight == 0.1
    env.close()


def test_words_about_the_set_stay_through_two_rounds():
    words = {"author": "A. Writer", "algorithm_name": "sac", "code_permalink": "https://example.org", "kind": "medium"}
    data = toy(info=dataclasses.replace(toy().info, about=words))
    once = minari.read(minari.write(data, "once-v0"))
    assert once.info.about == words
    assert_same(minari.read(minari.write(once, "twice-v0")), data)


def test_an_environment_with_wrappers_and_a_time_limit_comes_back():
    wrapper = ("gymnasium.wrappers:RescaleAction", {"min_action": -0.5, "max_action": 0.5})
    env = EnvSpec("InvertedPendulum-v5", {"max_episode_steps": 7}, (wrapper,))
    folder = minari.write(toy(info=DatasetInfo("toy", env)), ID)
    assert minari.read(folder).info.env == env
    spec = library.load_dataset(ID).env_spec
    assert spec.id == "InvertedPendulum-v5" and spec.max_episode_steps == 7 and spec.kwargs == {}
    assert [(w.entry_point, w.kwargs) for w in spec.additional_wrappers] == [wrapper]


def test_a_set_without_environment_and_references_has_none():
    found = minari.read(minari.write(toy(info=DatasetInfo("toy")), ID))
    assert found.info.env is None and found.info.ref_min_score is None and found.info.ref_max_score is None
    assert minari.read(ID, env="Hopper-v5").info.env == EnvSpec("Hopper-v5")


# -- the observation after a step -----------------------------------------------------------------


def test_the_last_observation_of_a_cut_episode_is_the_recorded_one():
    found = minari.read(minari.write(toy(), ID))
    assert found.next_known.all()
    np.testing.assert_array_equal(found.next_observations[5], [10.5 + 2, 11.5 + 2])
    assert not (found.next_observations[2] == found.observations[3]).any()


def test_a_cut_step_without_a_next_observation_is_left_out_and_counted():
    known = np.array([1, 1, 1, 1, 1, 0], bool)
    found = minari.read(minari.write(toy(next_known=known), ID))
    assert len(found) == 5 and found.info.about["steps_left_out"] == 1
    assert found.timeouts.tolist() == [False, False, False, True, True] and found.next_known.all()
    np.testing.assert_array_equal(found.next_observations[4], toy().next_observations[4])


def test_an_end_without_a_next_observation_stays_and_is_marked():
    known = np.array([1, 1, 0, 0, 1, 1], bool)
    found = minari.read(minari.write(toy(next_known=known), ID))
    assert_same(found, toy(next_known=known))
    assert found.usable.all()


def test_nothing_left_to_write_is_said():
    whole = toy()
    names = ("observations", "next_observations", "actions", "rewards", "terminals")
    one = {name: getattr(whole, name)[:1] for name in names}
    data = toy(**one, timeouts=np.ones(1, bool), next_known=np.zeros(1, bool), infos={})
    with pytest.raises(DatasetError, match="nothing to write"):
        minari.write(data, ID)


# -- sets of others -------------------------------------------------------------------------------


def foreign(dataset_id="theirs/door-v1", episodes=None, space=BOX, actions=ACTIONS, **words):
    """A set that minari itself writes."""
    episodes = episodes or [episode(3), episode(2)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return library.create_dataset_from_buffers(
            dataset_id, episodes, observation_space=space, action_space=actions, **words
        )


def episode(n, end="truncations", **changes):
    from minari.data_collector import EpisodeBuffer

    flags = {k: [k == end and t == n - 1 for t in range(n)] for k in ("terminations", "truncations")}
    parts = {
        "observations": np.arange(2.0 * (n + 1)).reshape(n + 1, 2), "actions": np.zeros((n, 2), np.float32),
        "rewards": np.arange(n, dtype=np.float64), **flags, "infos": {},
    }  # fmt: skip
    return EpisodeBuffer(**parts | changes)


def test_a_foreign_set_is_read_with_its_types():
    foreign(author={"B", "A"}, ref_min_score=1.0, ref_max_score=2.0, algorithm_name="human")
    found = minari.read("theirs/door-v1")
    assert found.observations.dtype == np.float64 and found.rewards.dtype == np.float32
    np.testing.assert_array_equal(found.observations[:, 0], [0, 2, 4, 0, 2])
    np.testing.assert_array_equal(found.next_observations[:, 0], [2, 4, 6, 2, 4])
    assert found.timeouts.tolist() == [False, False, True, False, True] and not found.terminals.any()
    assert found.info.about == {"author": ["A", "B"], "algorithm_name": "human"} and found.info.env is None


def test_info_columns_with_one_row_more_belong_to_the_observations():
    def one(n, **more):
        infos = {"qpos": np.arange(10.0, 10 + n + 1), "group": {"speed": np.arange(n)}, "name": ["x"] * n}
        return episode(n, infos=infos | more)

    foreign(episodes=[one(3, odd=np.zeros((3, 2)), short=np.zeros(1)), one(2, odd=np.zeros((2, 4)), short=np.zeros(2))])
    found = minari.read("theirs/door-v1")
    assert found.infos["qpos"].tolist() == [10, 11, 12, 10, 11]
    assert found.infos["group/speed"].tolist() == [0, 1, 2, 0, 1]
    assert set(found.infos) == {"qpos", "group/speed"}
    assert found.info.about["infos_left_out"] == ["name", "odd", "short"]


def test_the_environment_to_evaluate_in_goes_before_the_one_of_the_data():
    spec = gym.spec("Hopper-v5")
    other = dataclasses.replace(gym.spec("Hopper-v4"), kwargs={"forward_reward_weight": 2.0}, max_episode_steps=50)
    foreign(env=spec, eval_env=other)
    assert minari.read("theirs/door-v1").info.env == EnvSpec(
        "Hopper-v4", {"forward_reward_weight": 2.0, "max_episode_steps": 50}
    )
    foreign("theirs/plain-v0", env=spec)
    assert minari.read("theirs/plain-v0").info.env == EnvSpec("Hopper-v5")


def test_wrappers_that_cannot_be_rebuilt_or_trusted_are_named():
    folder = minari.local_root() / "theirs" / "door-v1"
    foreign(env=gym.spec("Hopper-v5"))
    spec = json.loads(json.loads((folder / "data" / "metadata.json").read_text())["env_spec"])
    spec["additional_wrappers"] = [
        {"name": "TimeAware", "entry_point": "gymnasium.wrappers:TimeAwareObservation", "kwargs": {"flatten": True}},
        {"name": "Closure", "entry_point": "gymnasium.wrappers:TransformReward", "kwargs": None},
        {"name": "Call", "entry_point": "subprocess:call", "kwargs": {"shell": True}},
    ]
    edit_metadata(folder, env_spec=json.dumps(spec))
    found = minari.read(folder)
    assert found.info.env == EnvSpec("Hopper-v5", {}, (("gymnasium.wrappers:TimeAwareObservation", {"flatten": True}),))
    assert found.info.about["wrappers_left_out"] == ["Closure", "Call"]


def test_a_recorded_wrapper_from_elsewhere_needs_the_callers_word(tmp_path):
    folder = minari.write(toy(info=DatasetInfo("toy", EnvSpec("Hopper-v5", {}, (("helpers.envs:AddOne", {}),)))), ID)
    with pytest.raises(DatasetError, match=r"helpers\.envs:AddOne.*env="):
        minari.read(folder)
    assert minari.read(folder, env="Hopper-v5").info.env == EnvSpec("Hopper-v5")


def test_an_environment_whose_id_imports_a_module_of_others_is_left_out_and_noted():
    folder = minari.write(toy(info=DatasetInfo("toy", EnvSpec("trap:Env-v0"), about={"kind": "made"})), ID)
    found = minari.read(folder).info
    assert found.env is None and found.about == {"kind": "made", "env_left_out": "trap:Env-v0"}
    assert minari.read(folder, env="Hopper-v5").info.env == EnvSpec("Hopper-v5")
    foreign(env=gym.spec("Hopper-v5"))
    theirs = minari.local_root() / "theirs" / "door-v1"
    spec = json.loads(json.loads((theirs / "data" / "metadata.json").read_text())["env_spec"])
    edit_metadata(theirs, env_spec=json.dumps(spec | {"id": "trap:Env-v0"}))
    found = minari.read(theirs).info
    assert found.env is None and found.about["env_left_out"] == "trap:Env-v0"
    edit_metadata(theirs, env_spec=json.dumps(spec | {"id": "gymnasium_robotics:AdroitHandDoor-v1"}))
    assert minari.read(theirs).info.env.id == "gymnasium_robotics:AdroitHandDoor-v1"


@pytest.mark.parametrize(
    ("entries", "words"),
    [
        ({"env_spec": '{"id": 5}'}, "env_spec has the environment id 5"),
        ({"eval_env_spec": "[1]"}, "eval_env_spec describes no environment"),
        ({"eval_env_spec": "{"}, "eval_env_spec describes no environment"),
        ({"ctrlrl": {"env": {"id": 5}}}, "ctrlrl has an env that is none"),
        ({"ctrlrl": {"env": {"id": "Hopper-v5", "n_envs": "two"}}}, "ctrlrl has an env that is none"),
        ({"ctrlrl": [1]}, r"ctrlrl is '\[1\]'; expected an object"),
        ({"ref_min_score": "low"}, "ref_min_score is 'low'; expected a number"),
        ({"ref_max_score": [1.0]}, r"ref_max_score is \[1.0\]; expected a number"),
    ],
)
def test_ids_that_are_no_words_and_scores_that_are_no_numbers_are_named(entries, words):
    from ctrlrl.data import minari_checks

    folder = minari.write(toy(info=DatasetInfo("toy")), ID)
    edit_metadata(folder, **{"ctrlrl": None} | entries)
    with pytest.raises(DatasetError, match=rf"{ID}/data/metadata\.json: {words}"):
        minari.read(folder)
    assert "error" in [p.severity for p in minari_checks.problems(folder)]


def test_reading_runs_no_code_that_the_file_names(tmp_path, monkeypatch):
    (tmp_path / "trap.py").write_text("raise SystemExit('the file was run')")
    monkeypatch.syspath_prepend(tmp_path)
    folder = minari.local_root() / "theirs" / "door-v1"
    foreign(env=gym.spec("Hopper-v5"))
    spec = json.loads(json.loads((folder / "data" / "metadata.json").read_text())["env_spec"])
    trapped = json.dumps(spec | {"id": "Trap-v0", "entry_point": "trap:Env"})
    edit_metadata(folder, env_spec=trapped)
    assert minari.read(folder).info.env.id == "Trap-v0"
    edit_metadata(folder, observation_space=None)
    with pytest.raises(DatasetError, match=r"metadata\.json has no observation_space"):
        minari.read(folder)


@pytest.mark.parametrize(
    ("space", "actions", "message"),
    [
        (gym.spaces.Tuple([BOX]), ACTIONS, "observation_space is of type Tuple; expected Box or Discrete, or a flat"),
        (gym.spaces.Dict(a=BOX, b=gym.spaces.Dict(c=BOX)), ACTIONS, "observation_space 'b' is of type Dict"),
        (gym.spaces.Dict(a=BOX, say=gym.spaces.Text(5)), ACTIONS, "observation_space 'say' is of type Text"),
        (BOX, gym.spaces.MultiDiscrete([2, 3]), "action_space is of type MultiDiscrete; expected Box or Discrete$"),
        (BOX, gym.spaces.Dict(a=ACTIONS), "action_space is of type Dict; expected Box or Discrete$"),
    ],
)
def test_other_spaces_are_refused_by_name(space, actions, message):
    from minari.serialization import serialize_space

    folder = minari.write(toy(), ID)
    edit_metadata(folder, observation_space=serialize_space(space), action_space=serialize_space(actions))
    with pytest.raises(DatasetError, match=message):
        minari.read(folder)


def test_spaces_that_could_not_be_read_are_not_written(root):
    with pytest.raises(DatasetError, match="action is of type MultiDiscrete"):
        minari.write(toy(action_space=gym.spaces.MultiDiscrete([2, 2])), ID)
    with pytest.raises(DatasetError, match="inner is of type Tuple"):
        minari.write(toy(observation_space=gym.spaces.Dict(inner=gym.spaces.Tuple([BOX]))), ID)
    assert minari.local_ids() == []
