"""DQN against an implementation of its own, against Stable-Baselines3, and against known values."""

import copy
import dataclasses
import inspect

import gymnasium as gym
import numpy as np
import pytest
import torch
from helpers.off_policy import (
    CHOICES,
    CHOOSY,
    OBS,
    Double,
    adam,
    assert_like,
    learner,
    make,
    plain,
    polyak,
    transitions,
)

from ctrlrl.engine import algorithm as algorithms
from ctrlrl.engine.config import ConfigError
from ctrlrl.engine.explore import EpsilonGreedy
from ctrlrl.engine.learner import part
from ctrlrl.online.dqn import DQN

GAMMA, TAU, RATE, B = 0.95, 0.1, 1e-2, 12


@pytest.fixture
def double():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def rows(n, seed=0):
    """Transitions with choices counted from 0."""
    g = torch.Generator().manual_seed(seed)
    return transitions(n, seed)._replace(action=torch.randint(3, (n,), generator=g))


def train(name="dqn", count=3, encoder=Double, **settings):
    """The learner before and after ``count`` updates, what it logged, and the batches."""
    mine = learner(name, encoder, actions=CHOICES, **{"gamma": GAMMA, "tau": TAU, "learning_rate": RATE} | settings)
    with torch.no_grad():  # else choosing by the network and by its target would be the same
        g = torch.Generator().manual_seed(3)
        target = mine.state["actor_target"]
        target.add_(0.3 * torch.randn(target.shape, generator=g, dtype=target.dtype))
    before = copy.deepcopy(mine.modules)
    batches = [part(rows(count * B), slice(i * B, (i + 1) * B)) for i in range(count)]
    found = [mine.run(batch, {}, 1) for batch in batches]
    return mine, before, found, batches


def layers(actor):
    return [*actor.body, actor.head]


@pytest.mark.parametrize("target_steps", [500, None])
@pytest.mark.parametrize("own_choice", [False, True])
@pytest.mark.parametrize("kappa", [1.0, 0.2])
def test_three_updates_equal_an_independent_implementation(own_choice, target_steps, kappa, double):
    settings = {"target_steps": target_steps, "kappa": kappa}
    mine, before, found, batches = train(double=own_choice, adam_eps=1e-8, **settings)
    network, target = plain(layers(before["actor"])), plain(layers(before["actor_target"]))
    optimiser = adam(network, lr=RATE)
    for i, batch in enumerate(batches):
        loss, total = torch.zeros(()), torch.zeros(())
        for k in range(B):
            with torch.no_grad():
                following = target(batch.next_obs[k].double())
                best = (network(batch.next_obs[k].double()) if own_choice else following).argmax()
                wanted = batch.reward_t[k] if batch.terminated_t[k] else batch.reward_t[k] + GAMMA * following[best]
            q = network(batch.obs[k].double())[batch.action[k]]
            loss = loss + torch.nn.functional.huber_loss(q, wanted, delta=kappa) / kappa / B
            total = total + q.detach() / B
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        if target_steps is None:
            polyak(target, network, TAU)
        assert found[i].keys() == {"critic_loss", "q"}
        torch.testing.assert_close(found[i]["critic_loss"][0], loss.detach(), rtol=0, atol=1e-7)
        torch.testing.assert_close(found[i]["q"][0], total, rtol=0, atol=1e-7)
    assert_like(network, layers(mine.modules["actor"]))
    assert_like(target, layers(mine.modules["actor_target"]))


def fixed(mine, name, values):
    """Make the network ``name`` give these values everywhere."""
    with torch.no_grad():
        mine.state[name].zero_()
        mine.modules[name].head.bias.copy_(torch.tensor(values))


@pytest.mark.parametrize("own_choice,value", [(False, 5.0), (True, 3.0)])
def test_the_target_is_the_reward_and_what_follows_unless_the_episode_ended(own_choice, value, double):
    """Values (0, 0, 1) and target values (5, -1, 3): the target itself takes 5, Double DQN 3. Huber(4) = 3.5."""
    mine = learner("dqn", Double, actions=CHOICES, gamma=0.5, learning_rate=0.0, double=own_choice)
    fixed(mine, "actor", [0.0, 0.0, 1.0])
    fixed(mine, "actor_target", [5.0, -1.0, 3.0])
    batch = rows(2)._replace(
        action=torch.tensor([0, 2]), reward_t=torch.tensor([2.0, 5.0]), terminated_t=torch.tensor([0.0, 1.0])
    )
    expected = ((2.0 + 0.5 * value - 0.5) + 3.5) / 2
    assert mine.run(batch, {}, 1)["critic_loss"].item() == pytest.approx(expected, abs=1e-12)


def test_the_target_is_copied_whenever_enough_steps_have_passed():
    mine, before, *_ = train(encoder=None, count=1, target_steps=10)
    start = {k: v.clone() for k, v in mine.state.items()}
    for steps in ((0, 9), (10, 19), (11, 11)):
        mine.algorithm.after_steps(mine, *steps)
        assert torch.equal(mine.state["actor_target"], start["actor_target"])
    mine.algorithm.after_steps(mine, 19, 20)
    assert torch.equal(mine.state["actor_target"], start["actor"])
    soft = train(encoder=None, count=1, target_steps=None)[0]
    before = soft.state["actor_target"].clone()
    soft.algorithm.after_steps(soft, 0, 10**6)
    assert torch.equal(soft.state["actor_target"], before)


def test_the_copy_comes_at_the_right_steps_of_a_run():
    """Before the update of step 20, and then not again before step 40."""
    agent = make("dqn", CHOOSY, learning_starts=8, iteration_steps=1)
    same = []

    class Look:
        def on_update(self, agent, step, metrics):
            same.append(torch.equal(agent.learner.state["actor"], agent.learner.state["actor_target"]))
            lags.append(agent.learner.state["actor_target"].clone())

    lags = [agent.learner.state["actor_target"].clone()]
    agent.learn(45, root=None, progress=False, callbacks=[Look()])
    changed = [k + 1 for k in range(45) if not torch.equal(lags[k], lags[k + 1])]
    assert changed == [20, 40] and not any(same[9:])


# -- exploration ----------------------------------------------------------------------------------


class Always:
    """A policy that chooses 2 of 4."""

    action_shape, action_dtype, n_actions = (), torch.int64, 4

    def mode(self, obs):
        return torch.full((len(obs),), 2)

    def to_env(self, obs, action):
        return action + 5


def test_epsilon_falls_linearly_and_then_stays():
    explorer = EpsilonGreedy(Always(), 1.0, 0.2, 0.5)
    assert explorer.epsilon == 1.0
    explorer.ready = True
    for progress, epsilon in ((0.0, 1.0), (0.25, 0.6), (0.5, 0.2), (0.75, 0.2), (1.5, 0.2)):
        explorer.progress = progress
        assert explorer.epsilon == pytest.approx(epsilon)
        assert explorer.metrics() == {"rollout/exploration_rate": explorer.epsilon}


def test_a_random_choice_replaces_the_policys_with_probability_epsilon():
    explorer = EpsilonGreedy(Always(), 0.3, 0.3, 1.0)
    noise = torch.tensor([[0.29, 0.0], [0.31, 0.0], [0.0, 0.26], [0.0, 0.9999999], [0.99, 0.99]])
    obs = torch.zeros(5, 1)
    assert explorer.act(obs, noise).tolist() == [0, 0, 1, 3, 3]  # still warming up
    explorer.ready = True
    assert explorer.act(obs, noise).tolist() == [0, 2, 1, 3, 2]
    drawn = explorer.noise(2000, 5, torch.Generator().manual_seed(0)).flatten(0, 1)
    share = torch.bincount(explorer.act(torch.zeros(10_000, 1), drawn), minlength=4) / 10_000
    torch.testing.assert_close(share, torch.tensor([0.075, 0.075, 0.775, 0.075]), atol=0.01, rtol=0)
    action, sent = explorer.sampler()(obs, noise)
    assert sent.tolist() == [5, 7, 6, 8, 7] and action.dtype == torch.int64


def test_epsilon_of_a_run_follows_its_planned_steps():
    agent = make("dqn", CHOOSY, epsilon_end=0.1, epsilon_share=0.5)
    found = []

    class Note:
        def on_update(self, agent, step, metrics):
            found.append(metrics["rollout/exploration_rate"])

    agent.learn(80, root=None, progress=False, callbacks=[Note()])
    # rows are written after 8 steps each, whose last step was decided one earlier; the first 8 are the warm-up
    expected = [1.0, *(max(0.1, 1.0 - 0.9 * (8 * k - 1) / 40) for k in range(2, 11))]
    assert found == pytest.approx(expected)


# -- what it learns -------------------------------------------------------------------------------


class Fork(gym.Env):
    """State 0: wait (to state 1) or take 1 and end. State 1: take 3 or 0 and end."""

    observation_space, action_space = gym.spaces.Discrete(2), gym.spaces.Discrete(2)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.state = 0
        return 0, {}

    def step(self, action):
        if self.state == 0 and action == 0:
            self.state = 1
            return 1, 0.0, False, False, {}
        return self.state, [1.0, 3.0 * (action == 0)][self.state], True, False, {}


@pytest.mark.parametrize("name,settings", [("dqn", {}), ("dqn", {"double": True}), ("qr_dqn", {})])
def test_learns_the_optimal_values_of_a_fork(name, settings):
    """With gamma 0.9: waiting is worth 2.7, taking 1; then 3 and 0."""
    agent = make(name, Fork(), gamma=0.9, replay_size=1000, critic_hidden=(16,), epsilon_end=1.0, **settings)
    agent.learn(500, root=None, progress=False)
    with torch.no_grad():
        values = agent.policy(torch.tensor([0, 1]))
    values = values if values.dim() == 2 else values.mean(2)
    torch.testing.assert_close(values, torch.tensor([[2.7, 1.0], [3.0, 0.0]]), atol=0.15, rtol=0)
    assert [int(agent.predict(s, deterministic=True)[0]) for s in (0, 1)] == [0, 0]
    assert agent.policy.features.out_features == 2


@pytest.mark.slow
def test_learns_to_balance_a_pole():
    """With the settings of Stable-Baselines3's zoo, in three fifths of its steps."""
    agent = make(
        "dqn", "CartPole-v1", learning_rate=2.3e-3, replay_size=100_000, batch_size=64, learning_starts=1000,
        critic_hidden=(256, 256), replay_ratio=0.5, collect_steps=256, target_steps=10, epsilon_share=0.16,
        epsilon_end=0.04, iteration_steps=1024,
    )  # fmt: skip
    agent.learn(30_000, root=None, progress=False)
    assert agent.evaluate(20).mean >= 150.0


# -- what it is built from ------------------------------------------------------------------------


@pytest.mark.parametrize(
    "space,message",
    [
        (gym.spaces.Box(-1.0, 1.0, (2,)), r"needs Discrete actions, found Box.*try sac or td3"),
        (gym.spaces.MultiDiscrete([2, 3]), r"needs Discrete actions, found MultiDiscrete.*try ppo"),
    ],
)
def test_other_actions_are_refused_with_a_way_out(space, message):
    with pytest.raises(TypeError, match=message):
        learner("dqn", actions=space)


@pytest.mark.parametrize(
    "settings,message",
    [
        ({"target_steps": 0}, "target_steps=0 must be at least 1"),
        ({"kappa": -1.0}, "kappa=-1.0 must not be negative"),
        ({"epsilon_end": 1.5}, r"epsilon_end=1.5 must lie in \[0, 1\]"),
        ({"epsilon_share": 0.0}, r"epsilon_share=0.0 must lie in \(0, 1\]"),
        ({"double": 1}, "double=1 is a int; expected bool"),
    ],
)
def test_impossible_settings_are_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        learner("dqn", actions=CHOICES, **settings)


def test_a_run_of_an_offline_method_cannot_be_gone_on_with():
    agent = make("dqn", CHOOSY)
    agent.config = dataclasses.replace(agent.config, start_from="somewhere")
    with pytest.raises(ConfigError, match="Box spaces, dqn cannot"):
        agent._check_online()


def test_the_exported_graph_chooses_as_the_agent_does(tmp_path):
    onnx = pytest.importorskip("onnxruntime")
    agent = make("dqn", CHOOSY)
    with torch.no_grad():
        agent.policy.head.bias.zero_()
    agent.export(tmp_path / "policy.onnx")
    obs = np.random.default_rng(0).normal(size=(64, 3)).astype(np.float32)
    session = onnx.InferenceSession(str(tmp_path / "policy.onnx"), providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {"obs": obs})
    assert found.dtype == np.int64 and set(found.tolist()) <= {5, 6, 7} and len(set(found.tolist())) > 1
    assert np.array_equal(found, agent.predict(obs, deterministic=True)[0])
    with pytest.raises(ValueError, match="deterministic"):
        agent.export(tmp_path / "drawn.onnx", deterministic=False)


def test_the_defaults_are_those_of_cleanrl():
    config, own = algorithms.get("dqn").loop_defaults, DQN()
    assert (config["learning_rate"], config["replay_size"], config["batch_size"]) == (2.5e-4, 10_000, 128)
    assert (config["replay_ratio"], config["learning_starts"], config["critic_hidden"]) == (0.1, 10_000, (120, 84))
    assert (own.target_steps, own.epsilon_start, own.epsilon_end, own.epsilon_share) == (500, 1.0, 0.05, 0.5)
    assert own.kappa == 1.0 and own.double is False


# -- Stable-Baselines3 ----------------------------------------------------------------------------

THEIRS = {
    "learning_rate": "learning_rate", "replay_size": "buffer_size", "learning_starts": "learning_starts",
    "batch_size": "batch_size", "target_steps": "target_update_interval", "epsilon_share": "exploration_fraction",
    "epsilon_end": "exploration_final_eps", "epsilon_start": "exploration_initial_eps",
    "max_grad_norm": "max_grad_norm",
}  # fmt: skip


def test_the_preset_sb3_has_the_defaults_of_stable_baselines3():
    sb3 = pytest.importorskip("stable_baselines3")
    defaults = {k: p.default for k, p in inspect.signature(sb3.DQN).parameters.items()}
    mine = dataclasses.asdict(DQN()) | DQN.presets["sb3"]
    assert {k: mine[k] for k in THEIRS} == {k: defaults[v] for k, v in THEIRS.items()}
    assert mine["replay_ratio"] == 1 / defaults["train_freq"] and defaults["gradient_steps"] == 1


class Spaces(gym.Env):
    observation_space, action_space = OBS, gym.spaces.Discrete(3)


def test_losses_equal_those_of_stable_baselines3(monkeypatch):
    """Same weights and batches, three gradient steps with clipped gradients."""
    sb3 = pytest.importorskip("stable_baselines3")
    from stable_baselines3.common.logger import Logger
    from stable_baselines3.common.type_aliases import ReplayBufferSamples

    mine = learner("dqn", actions=CHOICES, gamma=GAMMA, learning_rate=1e-3, max_grad_norm=0.1)
    theirs = sb3.DQN(
        "MlpPolicy", Spaces(), learning_rate=1e-3, gamma=GAMMA, max_grad_norm=0.1, batch_size=B, buffer_size=10,
        policy_kwargs={"net_arch": [8, 8]}, device="cpu",
    )  # fmt: skip
    for network in (theirs.q_net, theirs.q_net_target):
        network.q_net.load_state_dict(plain(layers(mine.modules["actor"])).state_dict())
    batches = [part(rows(3 * B), slice(i * B, (i + 1) * B)) for i in range(3)]
    column = lambda x: x.unsqueeze(1)  # noqa: E731
    samples = iter(
        ReplayBufferSamples(b.obs, column(b.action), b.next_obs, column(b.terminated_t), column(b.reward_t))
        for b in batches
    )
    monkeypatch.setattr(theirs.replay_buffer, "sample", lambda *_, **__: next(samples))
    logged = {}
    theirs.set_logger(Logger(None, []))
    monkeypatch.setattr(theirs.logger, "record", lambda key, value, **_: logged.__setitem__(key, value))
    for batch in batches:
        theirs.train(gradient_steps=1, batch_size=B)
        assert mine.run(batch, {}, 1)["critic_loss"].item() == pytest.approx(logged["train/loss"], rel=1e-5)
    assert_like(theirs.q_net.q_net, layers(mine.modules["actor"]), tolerance=1e-5)
