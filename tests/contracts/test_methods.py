"""One suite over the method registry: what a method declares, it keeps."""

import json

import gymnasium as gym
import numpy as np
import pytest
import torch
from helpers.agents import NOISY, assert_same_tensors, tiny
from helpers.envs import env_id

import ctrlrl
from ctrlrl import api
from ctrlrl.engine import checkpoint
from ctrlrl.losses import base as losses
from ctrlrl.types import EnvSpec

EPISODES = frozenset(
    ["resume", "vector", "box", "discrete", "multidiscrete", "tokens", "flow", "dict_obs", "image_obs", "gpu"]
)
ON_POLICY = EPISODES | {"compile"}
TOKENS_ONLY = frozenset(["resume", "tokens", "gpu"])
EXCEPTIONS = {
    **dict.fromkeys("ppo spo bpo bpo_mean mdpo s_ppo r2vpo direct_advantage".split(), ON_POLICY),
    **dict.fromkeys("simple_tir st_ppo turn_ppo ghpo hpt sft precision_diversity".split(), TOKENS_ONLY),
    **dict.fromkeys("mini_rl r3l d3s qwen_long empg epo dpo rpo copg p3o real".split(), EPISODES - {"flow"}),
    **dict.fromkeys("aepo dcpo obl_rpo capo steer".split(), EPISODES - {"flow", "multidiscrete"}),
    "nlpo": EPISODES - {"flow", "box", "multidiscrete"},
    "rover": TOKENS_ONLY,
    "awm": frozenset(["resume", "vector", "flow", "dict_obs", "image_obs", "gpu"]),
    "dppo": frozenset(["resume", "vector", "flow", "dict_obs", "image_obs", "gpu", "compile"]),
    "flow_grpo": frozenset(["resume", "vector", "flow", "dict_obs", "image_obs", "gpu"]),
    "fpo": frozenset(["resume", "vector", "flow", "dict_obs", "image_obs", "gpu", "compile"]),
    "grpo_guard": frozenset(["resume", "vector", "flow", "dict_obs", "image_obs", "gpu"]),
    "diffusion_opd": frozenset(["resume", "vector", "box", "flow", "dict_obs", "image_obs", "gpu", "compile"]),
}
DECLARED = {name: EXCEPTIONS.get(name, EPISODES) for name in losses.names()}
DECLARED["gorl"] = frozenset({"resume", "vector", "box", "dict_obs", "gpu", "compile"})
"""What each method must declare. Taking something away here is a decision, not an accident."""
TRANSITIONS = [name for name, declared in DECLARED.items() if "compile" in declared and name != "diffusion_opd"]
"""Methods on single transitions: what depends on the loop and not on the loss is checked with these."""


def having(capability):
    """Parametrise over the methods that the table says have it."""
    return pytest.mark.parametrize("name", [n for n in TRANSITIONS if capability in DECLARED[n]])


EVERY = pytest.mark.parametrize("name", TRANSITIONS)


def everything(name):
    """Whatever has state or moves during a run, at once."""
    return tiny(
        name,
        checkpoint_every=1,
        eval_every=96,
        eval_episodes=2,
        learning_rate_schedule="linear",
        target_kl=0.01,
        normalize_obs=True,
        normalize_reward=True,
        entropy_coef=0.01,
        learning_rate=1e-2,
    )


def lines(path):
    """Rows of a .jsonl file without what the clock says."""
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    return [{k: v for k, v in row.items() if k not in ("time_s", "time/fps")} for row in rows]


def assert_same_run(a, b, checkpoints=("last", "best")):
    for name in checkpoints:
        files = [folder / "checkpoints" / f"{name}.safetensors" for folder in (a, b)]
        (tensors_a, state_a), (tensors_b, state_b) = (checkpoint.read(f) for f in files)
        assert state_a == state_b
        assert_same_tensors(tensors_a, tensors_b)
    for name in ("metrics.jsonl", "evaluations.jsonl"):
        assert lines(a / name) == lines(b / name), name
    assert (a / "config.json").read_bytes() == (b / "config.json").read_bytes()


# -- what is declared -----------------------------------------------------------------------------


def test_every_method_declares_what_the_table_says():
    found = {k: method.capabilities for k, method in api.methods().items() if method.family == "on-policy"}
    assert found == DECLARED


@pytest.mark.parametrize("name", sorted(DECLARED))
def test_a_method_has_one_name_everywhere(name):
    method = api.methods()[name]
    assert method.name == name == method.agent.method
    assert getattr(ctrlrl, method.agent.__name__) is method.agent is api.get_method(name)
    assert method.agent.__name__ in dir(ctrlrl) and name in ctrlrl.available("methods")
    assert method.paper and method.paper in (method.agent.__doc__ or "")


# -- same seed, same run --------------------------------------------------------------------------


@EVERY
def test_the_same_seed_gives_the_same_run_bit_for_bit(name, tmp_path):
    """Whatever other code did to the global generators before, and without touching them."""
    for k, folder in enumerate(("a", "b")):
        torch.manual_seed(100 + k)
        np.random.seed(100 + k)
        before = torch.get_rng_state(), np.random.get_state()[1].copy()
        agent = api.make(name, NOISY, seed=7, n_envs=2, **everything(name))
        agent.learn(32 * 4, run_dir=tmp_path / folder, progress=False, tensorboard=False)
        assert torch.equal(before[0], torch.get_rng_state()) and (before[1] == np.random.get_state()[1]).all()
    assert_same_run(tmp_path / "a", tmp_path / "b")


@EVERY
def test_another_seed_gives_another_run(name):
    def train(seed):
        agent = api.make(name, NOISY, seed=seed, n_envs=2, **tiny(name))
        start = {k: v.clone() for k, v in agent.tensors().items()}
        return start, agent.learn(64, root=None, progress=False).tensors()

    (start_a, end_a), (start_b, end_b) = train(0), train(1)
    moved = [k for k in start_a if k.startswith("policy/actor") and k.endswith("weight")]
    assert moved and all(not torch.equal(start_a[k], start_b[k]) and not torch.equal(end_a[k], end_b[k]) for k in moved)
    assert all(not torch.equal(start_a[k], end_a[k]) for k in moved)


# -- stopped and resumed --------------------------------------------------------------------------


class Killed(Exception):
    """Stands for the machine going away."""


class KillAt:
    """Dies in the middle of a run, without saving; ``hook`` says at which moment of that iteration."""

    def __init__(self, iteration, hook="on_update"):
        self.iteration = iteration
        setattr(self, hook, self.maybe)

    def maybe(self, agent, step, value):
        if agent.iteration == self.iteration:
            raise Killed


def train_whole(name, folder, steps, env=NOISY, **kwargs):
    agent = api.make(name, env, seed=3, n_envs=2, **kwargs)
    return agent.learn(steps, run_dir=folder, progress=False, tensorboard=False)


def train_killed(name, folder, steps, kills, env=NOISY, **kwargs):
    agent = api.make(name, env, seed=3, n_envs=2, **kwargs)
    for k, kill in enumerate(kills):
        with pytest.raises(Killed):
            if k == 0:
                agent.learn(steps, run_dir=folder, progress=False, tensorboard=False, callbacks=[kill])
            else:
                agent = api.load(folder)
                agent.resume(folder, progress=False, tensorboard=False, callbacks=[kill])
    return api.load(folder).resume(folder, progress=False, tensorboard=False)


@having("resume")
def test_stopped_and_resumed_equals_never_stopped(name, tmp_path):
    """Borders at iterations 10 and 20 of 26; death before the first one, right after it, and between two."""
    steps, settings = 26 * 32, everything(name)
    whole = train_whole(name, tmp_path / "whole", steps, **settings)
    kills = [KillAt(4), KillAt(13), KillAt(18, "on_evaluation"), KillAt(20, "on_checkpoint"), KillAt(25)]
    resumed = train_killed(name, tmp_path / "killed", steps, kills, **settings)
    assert_same_run(tmp_path / "whole", tmp_path / "killed")
    assert_same_tensors(whole.tensors(), resumed.tensors())
    assert whole.counters() == resumed.counters()
    # the comparison is worth something only if all of it was in use
    rows = [r for r in lines(tmp_path / "whole" / "metrics.jsonl") if "train/learning_rate" in r]
    assert [r["step"] for r in rows] == [32 * (i + 1) for i in range(26)]
    rates = [r["train/learning_rate"] for r in rows]
    assert rates == sorted(rates, reverse=True) and rates[-1] < rates[0] / 20
    assert len(lines(tmp_path / "whole" / "evaluations.jsonl")) == 26 // 3 + 1
    assert whole.reward_normalizer.moments.count > 0 and whole.policy.preprocess.normalizer.moments.count > 0
    for key, controller in whole.controllers.items():
        assert whole.controller_states[key] != controller.initial()


@pytest.mark.parametrize(
    "spec",
    [
        EnvSpec(NOISY, n_envs=2, backend="async"),
        EnvSpec("CartPole-v1", n_envs=2, backend="envpool"),
        EnvSpec(env_id("Choice"), {"length": 5}, (("helpers.envs:AddOne", {"amount": 2.0}),), 2, "sync"),
    ],
    ids=["async", "envpool", "wrapped"],
)
def test_resuming_is_exact_on_every_backend(spec, tmp_path):
    if spec.backend == "envpool":
        pytest.importorskip("envpool")
    settings = everything("ppo")
    train_whole("ppo", tmp_path / "whole", 12 * 32, spec, **settings)
    train_killed("ppo", tmp_path / "killed", 12 * 32, [KillAt(11)], spec, **settings)
    assert_same_run(tmp_path / "whole", tmp_path / "killed")


def test_a_finished_run_is_resumed_by_doing_nothing(tmp_path):
    train_whole("ppo", tmp_path / "run", 64, **tiny("ppo"))
    before = {p: p.read_bytes() for p in sorted((tmp_path / "run").rglob("*")) if p.is_file()}
    assert api.load(tmp_path / "run").resume(tmp_path / "run", progress=False).steps == 64
    assert {p: p.read_bytes() for p in sorted((tmp_path / "run").rglob("*")) if p.is_file()} == before


# -- save, load, predict --------------------------------------------------------------------------


@EVERY
def test_a_loaded_agent_acts_like_the_saved_one(name, tmp_path):
    agent = api.make(name, NOISY, seed=5, n_envs=2, **tiny(name, log_std_init=-0.5))
    agent.learn(64, root=None, progress=False)
    assert agent.save(tmp_path / "agent") == tmp_path / "agent"
    loaded = api.load(tmp_path / "agent")
    obs = np.random.default_rng(0).normal(size=(50, 3)).astype(np.float32) * 5
    for deterministic in (True, False, False):
        actions = [a.predict(obs, deterministic=deterministic)[0] for a in (agent, loaded)]
        assert np.array_equal(*actions) and actions[0].dtype == np.float32
    assert np.unique(agent.predict(obs)[0]).size > 10
    assert (loaded.method, loaded.steps, loaded.config, loaded.loss) == (name, 64, agent.config, agent.loss)
    assert np.array_equal(agent.evaluate(3).returns, loaded.evaluate(3).returns)
    # what one can do with the original one can do with the copy: training on gives the same again
    for a in (agent, loaded):
        a.learn(64, root=None, progress=False)
    assert_same_tensors(agent.tensors(), loaded.tensors())


# -- spaces ---------------------------------------------------------------------------------------

VECTOR = gym.spaces.Box(-np.inf, np.inf, (3,), np.float32)
OBSERVATIONS = {
    "vector": VECTOR,
    "dict": gym.spaces.Dict({"vector": VECTOR, "mode": gym.spaces.Discrete(4), "bits": gym.spaces.MultiBinary(2)}),
    "image": gym.spaces.Box(0, 255, (8, 8, 3), np.uint8),
    "image_and_vector": gym.spaces.Dict({"image": gym.spaces.Box(0, 255, (1, 8, 8), np.uint8), "vector": VECTOR}),
}
ACTIONS = {
    "bounded": gym.spaces.Box(np.float32([-0.1, -2.0]), np.float32([0.3, 7.0])),
    "double": gym.spaces.Box(-0.1, 0.1, (2,), np.float64),
    "matrix": gym.spaces.Box(-1, 1, (2, 2), np.float32),
    "unbounded": gym.spaces.Box(-np.inf, np.inf, (2,), np.float32),
    "discrete": gym.spaces.Discrete(3, start=5),
    "multidiscrete": gym.spaces.MultiDiscrete([2, 3], start=[1, -4]),
}


class Strict(gym.Env):
    """Random observations of a space; refuses any action that its own space does not contain."""

    def __init__(self, obs="vector", action="bounded"):
        self.observation_space, self.action_space = OBSERVATIONS[obs], ACTIONS[action]

    def draw(self):
        self.observation_space.seed(int(self.np_random.integers(2**31)))
        return self.observation_space.sample()

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return self.draw(), {}

    def step(self, action):
        assert self.action_space.contains(action), f"{action!r} of {type(action)} is not in {self.action_space}"
        end = self.np_random.random(2) < 0.1
        return self.draw(), float(self.np_random.normal()), bool(end[0]), bool(end[1]), {}


STRICT = f"{__name__}:methods/Strict-v0"
gym.register("methods/Strict-v0", f"{__name__}:Strict")


def train_on(name, tmp_path, obs, action, **settings):
    agent = api.make(
        name, STRICT, n_envs=2, env_kwargs={"obs": obs, "action": action}, **tiny(name, eval_every=32, **settings),
        eval_episodes=1, log_std_init=1.0,
    )  # fmt: skip
    before = agent.tensors()["policy/head.linear.weight"].clone()
    agent.learn(64, run_dir=tmp_path / "run", progress=False, tensorboard=False)
    assert not torch.equal(before, agent.tensors()["policy/head.linear.weight"])
    loaded = api.load(tmp_path / "run")
    observation, space = agent.observation_space, agent.action_space
    observation.seed(0)
    for _ in range(8):
        raw = observation.sample()
        for deterministic in (True, False):
            one = agent.predict(raw, deterministic=deterministic)[0]
            assert space.contains(one), f"{one!r} is not in {space}"
            assert np.array_equal(one, loaded.predict(raw, deterministic=deterministic)[0])
    return agent


@having("box")
@pytest.mark.parametrize("action", ["bounded", "double", "matrix", "unbounded"])
def test_trains_on_box_actions(name, action, tmp_path):
    train_on(name, tmp_path, "vector", action)


@having("box")
def test_trains_on_squashed_box_actions(name, tmp_path):
    train_on(name, tmp_path, "vector", "bounded", action_map="tanh")


@having("discrete")
def test_trains_on_discrete_actions_that_do_not_start_at_zero(name, tmp_path):
    train_on(name, tmp_path, "vector", "discrete")


@having("multidiscrete")
def test_trains_on_multidiscrete_actions(name, tmp_path):
    train_on(name, tmp_path, "vector", "multidiscrete")


@having("dict_obs")
def test_trains_on_dict_observations(name, tmp_path):
    train_on(name, tmp_path, "dict", "discrete" if "discrete" in DECLARED[name] else "bounded")


@having("image_obs")
def test_trains_on_images(name, tmp_path):
    agent = train_on(name, tmp_path, "image_and_vector", "bounded")
    assert any("cnns" in n for n, _ in agent.policy.named_parameters())


@having("vector")
def test_trains_on_live_vector_environments(name):
    env = gym.make_vec(STRICT, num_envs=3, vectorization_mode="sync")
    agent = api.make(name, env, **tiny(name))
    assert agent.n_envs == 3 and agent.learn(48, root=None, progress=False).steps == 48


@having("gpu")
def test_trains_on_the_gpu(name):
    if not torch.cuda.is_available():
        pytest.skip("no GPU here")
    agent = api.make(name, NOISY, **tiny(name, device="cuda")).learn(32, root=None, progress=False)
    assert next(agent.policy.parameters()).is_cuda and agent.predict(np.zeros(3, np.float32))[0].shape == (1,)
