"""One suite over the registry of off-policy methods: what a method declares, it keeps."""

import dataclasses

import gymnasium as gym
import numpy as np
import pytest
import torch
from helpers.agents import NOISY, assert_same_tensors, quiet
from helpers.off_policy import CHOOSY, tiny
from test_methods import STRICT, KillAt, Killed, assert_same_run, lines

import ctrlrl
from ctrlrl import api
from ctrlrl.engine import algorithm as algorithms
from ctrlrl.engine.config import ConfigError, flat
from ctrlrl.engine.off_policy import OffPolicyAgent
from ctrlrl.types import EnvSpec

EVERYTHING = frozenset(["resume", "vector", "box", "dict_obs", "image_obs", "gpu", "compile"])
CHOICES = EVERYTHING - {"box"} | {"discrete"}
DECLARED = {"sac": EVERYTHING, "td3": EVERYTHING, "mdpo_off": EVERYTHING, "dqn": CHOICES, "qr_dqn": CHOICES}
"""What each method must declare. Taking something away here is a decision, not an accident."""
ELSEWHERE = {
    "d_eta_n": CHOICES,
    "gorl_sac": EVERYTHING - {"image_obs", "gpu"},
    "iwocs": EVERYTHING - {"dict_obs", "image_obs"},
    "m2td3": EVERYTHING,
    "rarl": EVERYTHING,
}
"""Methods that need an environment with parameters or a stock, which none of those below has, or whose stages are too
long for them; they have suites of their own."""
CLASSES = {"sac": "SAC", "td3": "TD3", "mdpo_off": "MDPOOff", "dqn": "DQN", "qr_dqn": "QRDQN"}
NETWORKS = {
    "sac": {"actor", "critic", "temperature", "critic_target"},
    "td3": {"actor", "critic", "actor_target", "critic_target"},
    "mdpo_off": {"actor", "critic", "value", "actor_old", "value_target"},
    "dqn": {"actor", "actor_target"},
    "qr_dqn": {"actor", "actor_target"},
}
PRESETS = {"mdpo_off": {"released", "sac"}, "dqn": {"sb3", "atari"}, "qr_dqn": {"sb3"}}
HOME = {name: NOISY if "box" in declared else CHOOSY for name, declared in DECLARED.items()}
"""An environment that each acts in."""
EVERY = pytest.mark.parametrize("name", sorted(DECLARED))


def having(capability):
    """Parametrise over the methods that the table says have it."""
    return pytest.mark.parametrize("name", sorted(n for n, declared in DECLARED.items() if capability in declared))


def learnt(name):
    """The networks with an encoder that a method trains."""
    return [k for k in ("actor", "critic") if k in NETWORKS[name]]


def action(name):
    """Actions of the environments below that a method takes."""
    return "bounded" if "box" in DECLARED[name] else "discrete"


def everything(name):
    """Whatever has state or moves during a run, at once; the replay wraps around more than once."""
    return tiny(name, checkpoint_every=1, eval_every=24, eval_episodes=2, max_grad_norm=5.0, replay_ratio=0.6)


# -- what is declared -----------------------------------------------------------------------------


def test_every_method_declares_what_the_table_says():
    online = [name for name in algorithms.names() if issubclass(api.get_method(name), OffPolicyAgent)]
    assert {name: algorithms.get(name).capabilities for name in online} == DECLARED | ELSEWHERE


@EVERY
def test_a_method_has_one_name_everywhere(name):
    own, method = algorithms.get(name), api.methods()[name]
    assert own.name == method.name == name == method.agent.method and method.family == "off-policy"
    assert method.agent.__name__ == own.__name__ == CLASSES[name]
    assert getattr(ctrlrl, CLASSES[name]) is method.agent is api.get_method(name)
    assert CLASSES[name] in dir(ctrlrl) and name in ctrlrl.available("methods")
    assert issubclass(method.agent, OffPolicyAgent) and method.agent.capabilities == DECLARED[name]
    assert method.paper and method.paper in (method.agent.__doc__ or "") and own.differs
    assert getattr(ctrlrl, CLASSES[name])(HOME[name], **tiny(name)).method == name


@EVERY
def test_the_networks_are_those_of_the_paper(name):
    agent = api.make(name, HOME[name], **tiny(name))
    assert agent.learner.modules.keys() == NETWORKS[name]
    assert agent.learner.modules["actor"] is agent.policy


@having("box")
def test_the_loop_begins_with_the_papers_settings(name):
    """256-256, batches of 256, a million transitions, one update per step after 10,000 random ones."""
    config, own = api.get_method(name).blueprint()
    assert config.network.actor_hidden == config.network.critic_hidden == (256, 256)
    assert (config.batch_size, config.replay_size, config.learning_starts) == (256, 1_000_000, 10_000)
    assert (config.gamma, config.tau, config.learning_rate, config.replay_ratio) == (0.99, 0.005, 3e-4, 1.0)
    assert config.critic_learning_rate is None and config.network.n_critics == 2


@EVERY
def test_presets_are_known_build_and_change_something(name):
    assert set(algorithms.get(name).presets) == PRESETS.get(name, set()) == set(api.methods()[name].presets)
    plain = api.make(name, HOME[name], **tiny(name))
    for preset in PRESETS.get(name, ()):
        agent = api.make(name, HOME[name], preset=preset, **tiny(name))
        assert (agent.config, agent.algorithm) != (plain.config, plain.algorithm)
        settings = flat(agent.config) | flat(agent.algorithm)
        for setting, value in algorithms.get(name).presets[preset].items():
            assert settings[setting] == tiny(name).get(setting, value)
        assert quiet(agent, 16).learner.updates == 8
    with pytest.raises(ConfigError, match="nonsense"):
        api.make(name, HOME[name], preset="nonsense")


@EVERY
def test_unknown_settings_name_the_nearest_known_ones(name):
    for wrong, right in (("learning_start", "learning_starts"), ("critic_hiden", "critic_hidden")):
        with pytest.raises(ConfigError, match=rf"{name}.*{wrong}.*{right}"):
            api.make(name, HOME[name], **{wrong: 1})
    own = dataclasses.fields(algorithms.get(name))[0].name
    with pytest.raises(ConfigError, match=own):
        api.make(name, HOME[name], **{own + "x": 1})
    with pytest.raises(KeyError, match=name):
        api.make(name + "x", HOME[name])


# -- same seed, same run --------------------------------------------------------------------------


@EVERY
def test_the_same_seed_gives_the_same_run_bit_for_bit(name, tmp_path):
    """Whatever other code did to the global generators before, and without touching them."""
    agents = []
    for k, folder in enumerate(("a", "b")):
        torch.manual_seed(100 + k)
        np.random.seed(100 + k)
        before = torch.get_rng_state(), np.random.get_state()[1].copy()
        agent = api.make(name, HOME[name], seed=7, n_envs=2, **everything(name))
        agent.learn(8 * 8, run_dir=tmp_path / folder, progress=False, tensorboard=False)
        assert torch.equal(before[0], torch.get_rng_state()) and (before[1] == np.random.get_state()[1]).all()
        agents.append(agent)
    assert_same_run(tmp_path / "a", tmp_path / "b")
    assert_same_tensors(*(a.replay.columns for a in agents))


@EVERY
def test_another_seed_gives_another_run(name):
    def train(seed):
        agent = api.make(name, HOME[name], seed=seed, n_envs=2, **tiny(name))
        start = {k: agent.learner.state[k].clone() for k in agent.learner.modules}
        quiet(agent, 48)
        return start, {k: agent.learner.state[k] for k in start}, agent.replay.columns

    (start_a, end_a, rows_a), (start_b, end_b, rows_b) = train(0), train(1)
    for key in start_a:
        assert not torch.equal(start_a[key], end_a[key]), f"{key} did not learn"
        assert not torch.equal(end_a[key], end_b[key])
        assert key == "temperature" or not torch.equal(start_a[key], start_b[key])
    for key in ("obs", "action", "reward", "next_obs"):
        assert not torch.equal(rows_a[key][:8], rows_b[key][:8])


# -- stopped and resumed --------------------------------------------------------------------------


def train_whole(name, folder, steps, env=None, **settings):
    env = env or HOME[name]
    agent = api.make(name, env, seed=3, **({"n_envs": 2} if isinstance(env, str) else {}), **settings)
    return agent.learn(steps, run_dir=folder, progress=False, tensorboard=False)


def train_killed(name, folder, steps, kills, env=None, **settings):
    env = env or HOME[name]
    for k, kill in enumerate(kills):
        with pytest.raises(Killed):
            if k == 0:
                agent = api.make(name, env, seed=3, **({"n_envs": 2} if isinstance(env, str) else {}), **settings)
                agent.learn(steps, run_dir=folder, progress=False, tensorboard=False, callbacks=[kill])
            else:
                api.load(folder).resume(folder, progress=False, tensorboard=False, callbacks=[kill])
    return api.load(folder).resume(folder, progress=False, tensorboard=False)


@having("resume")
def test_stopped_and_resumed_equals_never_stopped(name, tmp_path):
    """Borders at iterations 10 and 20 of 23; death before the first one, right after it, between two and after both."""
    steps, settings = 23 * 8, everything(name)
    whole = train_whole(name, tmp_path / "whole", steps, **settings)
    kills = [KillAt(4), KillAt(10, "on_checkpoint"), KillAt(15, "on_evaluation"), KillAt(22)]
    resumed = train_killed(name, tmp_path / "killed", steps, kills, **settings)
    assert_same_run(tmp_path / "whole", tmp_path / "killed")
    assert_same_tensors(whole.tensors(), resumed.tensors())
    assert whole.counters() == resumed.counters()
    assert_same_tensors(whole.replay.columns, resumed.replay.columns)
    # the comparison is worth something only if all of it was in use
    assert whole.replay.added == steps > 3 * whole.replay.capacity
    assert whole.learner.updates == int(0.6 * (steps - 8)) and 0 < whole.debt < 1
    rows = [r for r in lines(tmp_path / "whole" / "metrics.jsonl") if "time/iterations" in r]
    assert [r["step"] for r in rows] == [8 * (i + 1) for i in range(23)]
    assert len(lines(tmp_path / "whole" / "evaluations.jsonl")) == 23 // 3 + 1
    assert len({r["train/critic_loss"] for r in rows[1:]}) == 22


@pytest.mark.parametrize(
    "spec",
    [EnvSpec(NOISY, n_envs=2, backend="async"), EnvSpec("Pendulum-v1", n_envs=2, backend="envpool")],
    ids=["async", "envpool"],
)
def test_resuming_is_exact_on_every_backend(spec, tmp_path):
    if spec.backend == "envpool":
        pytest.importorskip("envpool")
    settings = everything("td3") | {"eval_every": None}
    whole = train_whole("td3", tmp_path / "whole", 14 * 8, spec, **settings)
    resumed = train_killed("td3", tmp_path / "killed", 14 * 8, [KillAt(12)], spec, **settings)
    assert_same_tensors(whole.tensors(), resumed.tensors())
    assert_same_tensors(whole.replay.columns, resumed.replay.columns)


def test_a_finished_run_is_resumed_by_doing_nothing(tmp_path):
    train_whole("sac", tmp_path / "run", 24, **tiny("sac"))
    before = {p: p.read_bytes() for p in sorted((tmp_path / "run").rglob("*")) if p.is_file()}
    assert api.load(tmp_path / "run").resume(tmp_path / "run", progress=False).steps == 24
    assert {p: p.read_bytes() for p in sorted((tmp_path / "run").rglob("*")) if p.is_file()} == before


# -- save, load, predict --------------------------------------------------------------------------


@EVERY
def test_a_loaded_agent_acts_like_the_saved_one_and_learns_on_like_it(name, tmp_path):
    agent = api.make(name, HOME[name], seed=5, n_envs=2, **tiny(name))
    quiet(agent, 56)
    assert agent.save(tmp_path / "agent") == tmp_path / "agent"
    loaded = api.load(tmp_path / "agent")
    obs = np.random.default_rng(0).normal(size=(50, 3)).astype(np.float32)
    for deterministic in (True, False, False):
        actions = [a.predict(obs, deterministic=deterministic)[0] for a in (agent, loaded)]
        assert np.array_equal(*actions) and actions[0].dtype == agent.action_space.dtype
    if "box" in DECLARED[name]:  # the best of three choices may well be the same everywhere
        assert np.unique(agent.predict(obs)[0]).size > 10
    assert (loaded.method, loaded.steps, loaded.config, loaded.algorithm) == (name, 56, agent.config, agent.algorithm)
    assert np.array_equal(agent.evaluate(3).returns, loaded.evaluate(3).returns)
    for a in (agent, loaded):
        quiet(a, 16)
    assert_same_tensors(agent.tensors(), loaded.tensors())
    assert_same_tensors(agent.replay.columns, loaded.replay.columns)


# -- spaces ---------------------------------------------------------------------------------------


def train_on(name, tmp_path, obs, actions):
    settings = tiny(name, eval_every=16, eval_episodes=1, learning_starts=4)
    agent = api.make(name, STRICT, n_envs=2, env_kwargs={"obs": obs, "action": actions}, **settings)
    before = {k: agent.learner.state[k].clone() for k in learnt(name)}
    agent.learn(32, run_dir=tmp_path / "run", progress=False, tensorboard=False)
    assert all(not torch.equal(v, agent.learner.state[k]) for k, v in before.items())
    loaded = api.load(tmp_path / "run")
    observation, space = agent.observation_space, agent.action_space
    observation.seed(0)
    for _ in range(8):
        raw = observation.sample()
        for deterministic in (True, False):
            one = agent.predict(raw, deterministic=deterministic)[0]
            assert space.contains(one), f"{one!r} is not in {space}"
            assert np.array_equal(one, loaded.predict(raw, deterministic=deterministic)[0])
    assert_same_tensors(agent.replay.rows(0, agent.steps), loaded._memory().rows(0, agent.steps))
    return agent


@having("box")
@pytest.mark.parametrize("actions", ["bounded", "double", "matrix"])
def test_trains_on_box_actions(name, actions, tmp_path):
    train_on(name, tmp_path, "vector", actions)


@having("discrete")
def test_trains_on_discrete_actions_that_do_not_start_at_zero(name, tmp_path):
    agent = train_on(name, tmp_path, "vector", "discrete")
    stored = agent.replay.rows(0, agent.steps)["action"]
    assert stored.dtype == torch.int64 and set(stored.tolist()) == {0, 1, 2}


@having("dict_obs")
def test_trains_on_dict_observations(name, tmp_path):
    agent = train_on(name, tmp_path, "dict", action(name))
    assert agent.replay.columns["obs/mode"].dtype == torch.int64


@having("image_obs")
def test_trains_on_images(name, tmp_path):
    agent = train_on(name, tmp_path, "image_and_vector", action(name))
    for network in learnt(name):
        assert any("cnns" in n for n, _ in agent.learner.modules[network].named_parameters())
    assert agent.replay.columns["obs/image"].dtype == torch.uint8


@having("vector")
def test_trains_on_live_vector_environments(name):
    env = gym.make_vec(STRICT, num_envs=3, vectorization_mode="sync", action=action(name))
    agent = api.make(name, env, **tiny(name))
    assert agent.n_envs == 3 and quiet(agent, 24).steps >= 24 and agent.learner.updates == agent.steps - 8


class Half(torch.nn.Module):
    """An encoder of one's own."""

    def __init__(self, space):
        super().__init__()
        self.out_features, self.layer = 2, torch.nn.Linear(space.shape[0], 2)

    def forward(self, x):
        return self.layer(x)


@EVERY
def test_trains_with_an_encoder_of_ones_own(name, tmp_path):
    agent = api.make(name, HOME[name], encoder=Half, **tiny(name))
    agent.learn(24, run_dir=tmp_path / "run", progress=False, tensorboard=False)
    encoders = [agent.learner.modules[k].features.encoder for k in learnt(name)]
    assert all(isinstance(e, Half) for e in encoders) and len(set(encoders)) == len(encoders)
    assert_same_tensors(agent.tensors(), api.load(tmp_path / "run").tensors())


@having("gpu")
def test_trains_on_the_gpu(name):
    if not torch.cuda.is_available():
        pytest.skip("no GPU here")
    agent = quiet(api.make(name, HOME[name], **tiny(name, device="cuda")), 24)
    assert agent.learner.state[learnt(name)[-1]].is_cuda and agent.replay.columns["obs"].is_cuda
    assert agent.action_space.contains(agent.predict(np.zeros(3, np.float32))[0])


# -- learning -------------------------------------------------------------------------------------

PENDULUM = {"sac": {"entropy_temp": 0.2}, "td3": {}, "mdpo_off": {}}


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(PENDULUM))
def test_learns_to_swing_a_pendulum_up_in_8000_steps(name):
    """Section 4.2's pass line, -200; a random policy is at about -1,200."""
    agent = api.make(
        name, "Pendulum-v1", seed=0, learning_rate=1e-3, learning_starts=1000, replay_size=8000, device="cpu",
        threads=1, eval_every=None, **PENDULUM[name],
    )  # fmt: skip
    quiet(agent, 8000)
    assert agent.evaluate(20).mean >= -200.0


@pytest.mark.parametrize(
    "name,settings,message",
    [
        ("sac", {"entropy_temp": "auto"}, "entropy_temp='auto' is a str; expected float"),
        ("sac", {"target_entropy": float("nan")}, "target_entropy=nan must be finite"),
        ("td3", {"policy_delay": 2.5}, r"policy_delay=2\.5 is a float; expected int"),
        ("mdpo_off", {"value_network": "false"}, "value_network='false' is a str; expected bool"),
        ("mdpo_off", {"proximity": "forward", "kl_coef": None}, "proximity='forward' has no part in it"),
        ("sac", {"learning_rate": float("inf")}, "learning_rate=inf must not be negative, nor infinite"),
        ("sac", {"image_features": 0}, "image_features=0 must be at least 1"),
    ],
)
def test_wrong_settings_are_refused_in_words(name, settings, message):
    with pytest.raises(ConfigError, match=message):
        api.make(name, HOME[name], **settings)
