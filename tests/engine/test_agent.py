"""Acting, saving and loading: what fits works bit for bit, what does not fit is named and harms nothing."""

import json
import shutil

import gymnasium as gym
import numpy as np
import pytest
import torch
from helpers.envs import env_id

from ctrlrl import api
from ctrlrl.engine import checkpoint
from ctrlrl.engine.errors import CheckpointError, UnknownEnvironment

TINY = {
    "n_steps": 16, "batch_size": 16, "epochs": 2, "actor_hidden": (8,), "critic_hidden": (8,), "device": "cpu",
    "threads": 1, "eval_every": None, "image_features": 8,
}  # fmt: skip
NOISY = env_id("Noisy")


def make(env=NOISY, method="ppo", **settings):
    return api.make(method, env, **TINY | settings)


def trained(env=NOISY, steps=64, **settings):
    return make(env, n_envs=2, **settings).learn(steps, root=None, progress=False)


OBSERVATIONS = {
    "vector": gym.spaces.Box(-np.inf, np.inf, (3,), np.float32),
    "double": gym.spaces.Box(-np.inf, np.inf, (3,), np.float64),
    "image": gym.spaces.Box(0, 255, (4, 4, 3), np.uint8),
    "choice": gym.spaces.Discrete(4, start=2),
    "bits": gym.spaces.MultiBinary(3),
    "dict": gym.spaces.Dict(
        {"vector": gym.spaces.Box(-1, 1, (2,), np.float32), "mode": gym.spaces.Discrete(3)}
    ),
}  # fmt: skip
ACTIONS = {
    "box": gym.spaces.Box(-1, 1, (2,), np.float32),
    "matrix": gym.spaces.Box(-1, 1, (2, 3), np.float64),
    "discrete": gym.spaces.Discrete(3, start=5),
    "multi": gym.spaces.MultiDiscrete([2, 3]),
}


class Shapes(gym.Env):
    """Any of the spaces above; episodes of four steps."""

    def __init__(self, obs="vector", action="box"):
        self.observation_space, self.action_space = OBSERVATIONS[obs], ACTIONS[action]

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.t = 0
        return self.observation_space.sample(), {}

    def step(self, action):
        self.t += 1
        return self.observation_space.sample(), 1.0, False, self.t == 4, {}


gym.register("agent/Shapes-v0", f"{__name__}:Shapes")


def shaped(obs="vector", action="box"):
    return make(f"{__name__}:agent/Shapes-v0", env_kwargs={"obs": obs, "action": action})


# -- predict --------------------------------------------------------------------------------------


@pytest.mark.parametrize("deterministic", [True, False])
@pytest.mark.parametrize("action", ACTIONS)
@pytest.mark.parametrize("obs", OBSERVATIONS)
def test_one_observation_or_a_batch_of_them(obs, action, deterministic):
    agent, space = shaped(obs, action), OBSERVATIONS[obs]
    space.seed(0)
    raw = [space.sample() for _ in range(5)]
    batch = {k: np.stack([r[k] for r in raw]) for k in raw[0]} if isinstance(raw[0], dict) else np.stack(raw)
    one, state = agent.predict(raw[0], deterministic=deterministic)
    many, _ = agent.predict(batch, deterministic=deterministic)
    assert state is None and agent.action_space.contains(one)
    assert many.shape == (5, *agent.action_space.shape) and many.dtype == agent.action_space.dtype
    if deterministic:
        np.testing.assert_allclose(one, many[0], atol=1e-6)


def test_the_state_passes_through_and_episode_starts_are_taken():
    agent, state = make(), (np.ones(3),)
    assert agent.predict(np.zeros(3, np.float32), state, np.array([True]))[1] is state


def test_lists_and_read_only_arrays_are_observations_too():
    agent = make()
    frozen = np.zeros(3, np.float32)
    frozen.setflags(write=False)
    expected = agent.predict(np.zeros(3, np.float32), deterministic=True)[0]
    for same in ([0.0, 0.0, 0.0], (0, 0, 0), frozen, np.zeros((3, 2), np.float32)[:, 0], np.zeros(3)):
        assert np.array_equal(agent.predict(same, deterministic=True)[0], expected)


def test_sampled_actions_differ_and_repeat_with_the_seed():
    obs = np.zeros((20, 3), np.float32)
    a, b, c = make(seed=1), make(seed=1), make(seed=2)
    first = a.predict(obs)[0]
    assert np.array_equal(first, b.predict(obs)[0]) and not np.array_equal(first, a.predict(obs)[0])
    assert not np.array_equal(first, c.predict(obs)[0]) and np.unique(first).size > 5


WRONG = {
    "one number too many": ("vector", np.zeros(4, np.float32), r"shape \(4,\); expected \(3,\) or \(batch, \*\(3,\)\)"),
    "two batch dimensions": ("vector", np.zeros((2, 2, 3), np.float32), r"has shape \(2, 2, 3\); expected \(3,\)"),
    "a number": ("vector", 1.0, r"has shape \(\); expected \(3,\)"),
    "words": ("vector", np.array(["a", "b", "c"]), r"has dtype <U1; expected numbers of float32"),
    "nothing": ("vector", None, r"has dtype object; expected numbers of float32"),
    "a dict for an array": ("vector", {"vector": np.zeros(3)}, "has dtype object"),
    "floats for an image": ("image", np.zeros((4, 4, 3), np.float32), "has dtype float32; expected uint8"),
    "channels first for last": ("image", np.zeros((3, 4, 4), np.uint8), r"has shape \(3, 4, 4\); expected \(4, 4, 3\)"),
    "an array for a dict": ("dict", np.zeros(2), r"a dict observation with keys \['mode', 'vector'\], found ndarray"),
    "a key missing": ("dict", {"vector": np.zeros(2)}, r"keys \['mode', 'vector'\], found \['vector'\]"),
    "a key too many": ("dict", {"vector": np.zeros(2), "mode": 0, "x": 1}, r"found \['mode', 'vector', 'x'\]"),
    "a wrong part": ("dict", {"vector": np.zeros(3), "mode": 0}, r"'vector' has shape \(3,\); expected \(2,\)"),
    "half a batch": ("dict", {"vector": np.zeros((5, 2)), "mode": 0}, "have a batch dimension and some have not"),
    "batches of two sizes": ("dict", {"vector": np.zeros((5, 2)), "mode": np.zeros(4, int)}, "of different sizes"),
    "a choice that does not exist": ("choice", 1, r"observation is 1; expected one of Discrete\(4, start=2\)"),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_an_observation_that_does_not_fit_says_what_was_found_and_expected(case):
    space, observation, message = WRONG[case]
    with pytest.raises(ValueError, match=message):
        shaped(space).predict(observation, deterministic=True)


def test_acting_leaves_no_gradient_and_changes_nothing():
    agent = trained()
    before = {k: v.clone() for k, v in agent.tensors().items()}
    agent.predict(np.full((4, 3), 50.0, np.float32))
    assert all(torch.equal(before[k], v) for k, v in agent.tensors().items())
    assert all(p.grad is None for p in agent.policy.parameters())


def test_stable_baselines3_evaluates_the_agent():
    """Its own function, its own vector environment; CartPole pays 1 a step, so returns are lengths."""
    pytest.importorskip("stable_baselines3")
    from stable_baselines3.common.evaluation import evaluate_policy
    from stable_baselines3.common.vec_env import DummyVecEnv

    agent = make("CartPole-v1", n_envs=4, n_steps=64, batch_size=64, epochs=4, learning_rate=3e-3)
    agent.learn(256 * 5, root=None, progress=False)
    env = DummyVecEnv([lambda: gym.make("CartPole-v1")] * 3)
    env.seed(0)
    theirs, lengths = evaluate_policy(agent, env, n_eval_episodes=20, return_episode_rewards=True, warn=False)
    ours = agent.evaluate(20)
    assert theirs == lengths and ours.returns.tolist() == ours.lengths.tolist()
    error = np.hypot(np.std(theirs), ours.std) / np.sqrt(20)
    assert abs(np.mean(theirs) - ours.mean) < 5 * error + 1e-9
    assert ours.mean > 25, "it has learned something: a random policy holds the pole for about twenty steps"


def test_stable_baselines3_evaluates_dict_observations():
    pytest.importorskip("stable_baselines3")
    from stable_baselines3.common.evaluation import evaluate_policy
    from stable_baselines3.common.vec_env import DummyVecEnv

    agent = shaped("dict", "discrete")
    env = DummyVecEnv([lambda: Shapes("dict", "discrete")] * 2)
    assert evaluate_policy(agent, env, n_eval_episodes=4, warn=False) == (4.0, 0.0)


# -- the deployable policy ------------------------------------------------------------------------


@pytest.mark.parametrize("action_map", ["clip", "tanh"])
def test_the_traced_and_the_exported_policy_equal_predict(action_map):
    """Normaliser, network and action map are one module: nothing has to be done around it."""
    agent = trained(action_map=action_map)
    obs = (np.random.default_rng(0).normal(size=(32, 3)) * 8 + 3).astype(np.float32)
    expected = agent.predict(obs, deterministic=True)[0]
    assert agent.policy.preprocess.normalizer.moments.count > 0 and np.unique(expected).size > 10

    class Deployed(torch.nn.Module):
        def __init__(self, policy):
            super().__init__()
            self.policy = policy

        def forward(self, obs):
            return self.policy.deterministic(obs)

    module = Deployed(agent.policy).eval()
    example = torch.from_numpy(obs[:2])
    with torch.no_grad():
        traced = torch.jit.trace(module, (example,))
        exported = torch.export.export(module, (example,), dynamic_shapes=({0: torch.export.Dim("batch")},)).module()
        for policy in (traced, exported):
            np.testing.assert_allclose(policy(torch.from_numpy(obs)).numpy(), expected, atol=1e-6)


def test_the_normaliser_is_saved_with_the_policy_and_matters(tmp_path):
    agent = trained()
    agent.save(tmp_path / "agent")
    loaded = api.load(tmp_path / "agent")
    a, b = agent.policy.preprocess.normalizer, loaded.policy.preprocess.normalizer
    assert a.state_dict().keys() == b.state_dict().keys() and a.moments.count == 64
    assert all(torch.equal(v, b.state_dict()[k]) for k, v in a.state_dict().items())
    obs = np.array([[2.0, -1.0, 3.0]], np.float32)
    kept = loaded.predict(obs, deterministic=True)[0]
    assert np.array_equal(kept, agent.predict(obs, deterministic=True)[0])
    b.scale.fill_(1.0)
    b.shift.zero_()
    assert not np.allclose(kept, loaded.predict(obs, deterministic=True)[0], atol=1e-4)
    # the running rewards go on too
    assert torch.equal(agent.reward_normalizer.moments.var, loaded.reward_normalizer.moments.var)
    assert loaded.reward_normalizer.moments.count == 64


# -- saving ---------------------------------------------------------------------------------------


def contents(folder):
    return {p.relative_to(folder): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_saving_into_a_foreign_folder_is_refused_and_harms_nothing(tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "results.csv").write_text("1,2")
    (tmp_path / "config.json").write_text('{"mine": true}')
    before = contents(tmp_path)
    with pytest.raises(FileExistsError, match=r"config\.json \(not written by ctrlrl\), data"):
        make().save(tmp_path)
    assert contents(tmp_path) == before
    (tmp_path / "file").write_text("x")
    with pytest.raises(FileExistsError, match="is a file"):
        make().save(tmp_path / "file")
    assert (tmp_path / "file").read_text() == "x"


def test_saving_again_replaces_and_holds_no_pickle(tmp_path):
    agent = make()
    agent.save(tmp_path / "a")
    agent.learn(32, root=None, progress=False)
    agent.save(tmp_path / "a")
    assert api.load(tmp_path / "a").steps == 32
    assert {p.suffix for p in (tmp_path / "a").rglob("*") if p.is_file()} == {".json", ".safetensors"}


def test_saved_folders_can_be_moved(tmp_path):
    agent = trained()
    agent.save(tmp_path / "a")
    shutil.move(tmp_path / "a", tmp_path / "elsewhere" / "b")
    obs = np.ones((3, 3), np.float32)
    loaded = api.load(tmp_path / "elsewhere" / "b")
    assert np.array_equal(loaded.predict(obs, deterministic=True)[0], agent.predict(obs, deterministic=True)[0])


# -- loading what does not fit --------------------------------------------------------------------


@pytest.fixture
def saved(tmp_path):
    make(n_envs=2).save(tmp_path / "agent")
    return tmp_path / "agent"


def refuse(folder, error, message, **kwargs):
    """Loading raises that, and the folder is untouched, byte for byte."""
    before = contents(folder) if folder.exists() else None
    with pytest.raises(error, match=message):
        api.load(folder, **kwargs)
    assert before is None or contents(folder) == before


@pytest.mark.parametrize("keep", [0, 5, 100, -1])
def test_a_truncated_checkpoint(saved, keep):
    file = saved / "checkpoints" / "last.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    refuse(saved, CheckpointError, r"last\.safetensors.*truncated")


def test_one_changed_byte(saved):
    file = saved / "checkpoints" / "last.safetensors"
    data = bytearray(file.read_bytes())
    data[-10] ^= 1
    file.write_bytes(bytes(data))
    refuse(saved, CheckpointError, r"last\.safetensors is damaged.*checksum")


def test_a_checkpoint_of_another_method(saved, tmp_path):
    make(method="spo").save(tmp_path / "other")
    shutil.copy(tmp_path / "other" / "checkpoints" / "last.safetensors", saved / "checkpoints" / "last.safetensors")
    refuse(saved, CheckpointError, r"method is 'spo' in the checkpoint, expected 'ppo'")


def test_an_environment_with_other_observations(saved):
    message = r"observation_space\.shape is \[3\] in the checkpoint, expected \[1\]"
    refuse(saved, CheckpointError, message, env=env_id("OnlyTruncates"))


def test_an_environment_with_other_actions(saved, tmp_path):
    make(env_id("OnlyTruncates")).save(tmp_path / "box")
    refuse(tmp_path / "box", CheckpointError, r"action_space\.type is 'Box'.*expected 'Discrete'", env=env_id("Choice"))


def test_another_network(saved):
    config = json.loads((saved / "config.json").read_text())
    config["config"]["network"]["actor_hidden"] = [16]
    (saved / "config.json").write_text(json.dumps(config))
    refuse(saved, CheckpointError, "does not fit this agent's network")


def test_a_folder_that_is_not_a_run(tmp_path):
    refuse(tmp_path / "nowhere", FileNotFoundError, r"no config\.json in .*nowhere")
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "config.json").write_text('{"model": "resnet"}')
    refuse(tmp_path / "notes", ValueError, "is not a ctrlrl config")
    (tmp_path / "notes" / "config.json").write_text("{")
    refuse(tmp_path / "notes", ValueError, "not valid JSON")


def test_a_checkpoint_that_was_never_written(saved):
    refuse(
        saved, CheckpointError, r"no checkpoint at .*best\.safetensors: there are last\.safetensors", checkpoint="best"
    )


def test_an_environment_that_is_not_registered_any_more(saved):
    config = json.loads((saved / "config.json").read_text())
    config["env"]["id"] = "helpers.envs:test/Nosy-v0"
    (saved / "config.json").write_text(json.dumps(config))
    refuse(saved, UnknownEnvironment, r"no environment .*test/Nosy-v0.*Did you mean test/Noisy-v0")
    config["env"]["id"] = "no_such_package:test/Noisy-v0"
    (saved / "config.json").write_text(json.dumps(config))
    refuse(saved, UnknownEnvironment, "package 'no_such_package', which is not installed")
    # the way out: give the environment oneself
    assert api.load(saved, env=NOISY).steps == 0


def test_a_method_that_is_gone(saved):
    config = json.loads((saved / "config.json").read_text())
    config["method"] = "ppoo"
    (saved / "config.json").write_text(json.dumps(config))
    refuse(saved, KeyError, "no method named 'ppoo'")


def test_a_config_of_the_future(saved):
    config = json.loads((saved / "config.json").read_text())
    config["config"]["new_setting"] = 1
    (saved / "config.json").write_text(json.dumps(config))
    refuse(saved, ValueError, "no setting 'new_setting'")
    config["format"] = 99
    (saved / "config.json").write_text(json.dumps(config))
    refuse(saved, ValueError, "has format 99")


def test_a_refused_checkpoint_leaves_the_agent_as_it_was(tmp_path):
    agent, other = trained(), trained(actor_hidden=(16,))
    other.save(tmp_path / "other")
    before = {k: v.clone() for k, v in agent.tensors().items()}
    counters = agent.counters()
    with pytest.raises(CheckpointError):
        agent.load_checkpoint(tmp_path / "other")
    assert all(torch.equal(before[k], v) for k, v in agent.tensors().items()) and agent.counters() == counters


def test_a_checkpoint_holds_all_there_is(saved):
    tensors, state = checkpoint.read(saved / "checkpoints" / "last.safetensors")
    assert {k.split("/")[0] for k in tensors} == {"policy", "optimizer", "reward"}
    assert {"iteration", "steps", "span", "controllers", "stats", "best", "episodes", "recent", "method"} <= set(state)
    assert not (saved / "metrics.jsonl").exists()


@pytest.mark.parametrize("episodes", [0, -1])
def test_no_episodes_are_refused(episodes):
    with pytest.raises(ValueError, match=f"episodes={episodes} must be at least 1"):
        make().evaluate(episodes)


def test_a_run_is_not_overwritten_by_another(tmp_path):
    first = api.make("ppo", "CartPole-v1", n_steps=16, batch_size=8, epochs=1, eval_every=None, backend="sync")
    first.learn(16, run_dir=tmp_path / "run", progress=False)
    before = {p: p.read_bytes() for p in (tmp_path / "run").rglob("*") if p.is_file()}
    other = api.make("spo", "CartPole-v1", n_steps=16, batch_size=8, epochs=1, eval_every=None, backend="sync")
    with pytest.raises(FileExistsError, match="holds a run already"):
        other.learn(16, run_dir=tmp_path / "run", progress=False)
    assert {p: p.read_bytes() for p in (tmp_path / "run").rglob("*") if p.is_file()} == before
    first.learn(16, run_dir=tmp_path / "run", progress=False)  # its own run goes on


def test_a_run_of_a_gpu_loads_without_one(tmp_path):
    if torch.cuda.is_available():
        pytest.skip("this machine has one")
    agent = api.make("ppo", "CartPole-v1", backend="sync")
    agent.save(tmp_path / "run")
    config = tmp_path / "run" / "config.json"
    text = config.read_text().replace('"device": "cpu"', '"device": "cuda:1"')
    config.write_text(text.replace('"cudagraphs": false', '"cudagraphs": true'))
    assert api.load(tmp_path / "run").device.type == "cpu"
