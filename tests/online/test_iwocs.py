"""IWOCS: its rule of choice by hand, its critics against torch's own pieces, its phases, and what a kill may cost."""

import copy
import types

import gymnasium as gym
import numpy as np
import pytest
import torch
from helpers.agents import assert_same_tensors
from helpers.off_policy import ACTIONS, OBS, TINY, drawn, learner, transitions

from ctrlrl import api
from ctrlrl.engine.algorithm import Spaces
from ctrlrl.engine.seeding import derive
from ctrlrl.online.iwocs import Composite, Memory, Predictor

LENGTH = 6


class Ledge(gym.Env):
    """The action, carried on by the wind, says where one stands on [-1, 1]; further right pays more, up to the edge at
    1, beyond which one falls. In still air the best action is the edge; for all winds in [0, 1] it is far from it."""

    observation_space = gym.spaces.Box(-np.inf, np.inf, (2,), np.float32)
    action_space = gym.spaces.Box(-2.0, 2.0, (1,), np.float32)
    parameter_space = gym.spaces.Dict(
        [("wind", gym.spaces.Box(0.0, 1.0, (), np.float64)), ("grip", gym.spaces.Box(0.5, 1.0, (), np.float64))]
    )
    nominal = {"wind": 0.0, "grip": 1.0}  # noqa: RUF012

    def __init__(self) -> None:
        self.params = dict(self.nominal)

    def set_params(self, params):
        assert set(params) == {"wind", "grip"}
        self.params = dict(params)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.x, self.t = self.np_random.uniform(-0.5, 0.5), 0
        return self.obs(), {}

    def obs(self):
        return np.array([self.x, 0.1 * self.t], np.float32)

    def step(self, action):
        self.x, reward = move(self.x, float(action[0]), self.params)
        self.t += 1
        fell = reward < -1.0
        return self.obs(), reward, fell, self.t == LENGTH and not fell, {}


def move(x, action, params):
    x = 0.3 * x + params["grip"] * 0.5 * action + params["wind"]
    return x, (x if x <= 1.0 else -5.0)


gym.register("test/Ledge-v0", Ledge)
SMALL = TINY | {
    "default_steps": 40, "model_steps": 24, "max_models": 3, "search": "grid", "grid_points": 3, "search_episodes": 2,
    "search_envs": 7, "thresholds": (0.5, 2.0), "eval_every": None, "repeat_tolerance": 0.0, "checkpoint_every": 1,
    "replay_ratio": 0.2,
}  # fmt: skip
STEPS = 40 + 3 * 24


def make(seed=0, **settings):
    return api.make("iwocs", "test/Ledge-v0", seed=seed, **SMALL | settings)


def quiet(agent, steps=STEPS, **options):
    return agent.learn(steps, **{"root": None, "progress": False, "tensorboard": False} | options)


def never_repeats(monkeypatch):
    """Goes on whatever the searches find, as worst cases of tiny networks soon repeat themselves."""
    original = type(make())._reason
    monkeypatch.setattr(
        api.get_method("iwocs"), "_reason",
        lambda self, row, count: None if (found := original(self, row, count)) in ("repeated", "gap") else found,
    )  # fmt: skip


class Watch:
    """Notes after each iteration."""

    def __init__(self, note):
        self.note, self.seen = note, []

    def on_update(self, agent, step, metrics):
        self.seen.append(self.note(agent, metrics))


# -- the rule of choice ---------------------------------------------------------------------------


def fake(action, values, error, noisy=0.25):
    """A model that always does ``action``, expects ``values`` (one for each critic), and mispredicts by ``error``."""

    def constant(value, obs):
        return torch.full((obs.shape[0], 1), float(value))

    actor = types.SimpleNamespace(
        mode=lambda obs: constant(action, obs), act=lambda obs, noise: constant(action, obs) + noisy * noise
    )
    seen = []

    def predictor(obs, done, following):
        seen.append((obs, done, following))
        return torch.as_tensor(error, dtype=torch.float32).expand(2, obs.shape[0])

    value = lambda obs, done: torch.tensor(values, dtype=torch.float32).unsqueeze(1).expand(-1, obs.shape[0])  # noqa: E731
    return types.SimpleNamespace(actor=actor, value=value, predictor=predictor, seen=seen)


def memory(n, there=True):
    return Memory(torch.zeros(n, 2), torch.zeros(n, 1), torch.full((n,), there))


DEFAULT = fake(-1.0, [0.0], 0.0).actor
ONE = torch.zeros(1, 2)


def chosen(models, thresholds, there=True):
    policy = Composite(DEFAULT, models, thresholds)
    index = int(policy.choose(ONE, memory(1, there)))
    action = float(policy.act(ONE, memory(1, there)))
    assert action == (-1.0 if index < 0 else float(models[index].actor.mode(ONE)))
    return index


def test_the_policy_that_expects_least_acts():
    models = [fake(0.1, [5.0, 5.0], 0.0), fake(0.2, [3.0, 3.0], 0.0), fake(0.3, [4.0, 4.0], 0.0)]
    assert chosen(models, [1.0] * 3) == 1


def test_what_a_policy_expects_is_the_smaller_of_its_critics():
    models = [fake(0.1, [3.0, 4.0], 0.0), fake(0.2, [9.0, 2.0], 0.0)]
    assert chosen(models, [1.0] * 2) == 1


def test_a_model_that_mispredicted_is_left_out_by_its_own_threshold():
    models = [fake(0.1, [5.0, 5.0], 0.4), fake(0.2, [3.0, 3.0], 0.4)]
    assert chosen(models, [0.5, 0.3]) == 0
    assert chosen(models, [0.3, 0.5]) == 1
    assert chosen(models, [0.5, 0.5]) == 1


def test_an_error_equal_to_the_threshold_is_valid():
    assert chosen([fake(0.1, [1.0], 0.25)], [0.25]) == 0


def test_where_no_model_is_valid_the_default_policy_acts():
    assert chosen([fake(0.1, [5.0], 2.0), fake(0.2, [3.0], 3.0)], [1.0, 1.0]) == -1
    assert chosen([], []) == -1


def test_at_the_first_step_every_policy_is_valid():
    models = [fake(0.1, [5.0], 9.0), fake(0.2, [3.0], 9.0)]
    assert chosen(models, [1.0, 1.0], there=False) == 1


def test_the_prediction_is_from_the_last_step_to_this_observation():
    model, obs = fake(0.1, [5.0], 0.0), torch.tensor([[1.0, 2.0]])
    before = Memory(torch.tensor([[3.0, 4.0]]), torch.tensor([[0.5]]), torch.tensor([True]))
    Composite(DEFAULT, [model], [1.0]).choose(obs, before)
    assert all(torch.equal(a, b) for a, b in zip(model.seen[0], (before.obs, before.action, obs), strict=True))


def test_every_row_chooses_for_itself():
    models = [fake(0.1, [3.0], [0.0, 9.0, 9.0, 9.0]), fake(0.2, [4.0], [0.0, 0.0, 9.0, 9.0])]
    before = memory(4)._replace(there=torch.tensor([True, True, True, False]))
    policy = Composite(DEFAULT, models, [1.0, 1.0])
    obs = torch.zeros(4, 2)
    assert policy.choose(obs, before).tolist() == [0, 1, -1, 0]
    assert policy.act(obs, before).flatten().tolist() == pytest.approx([0.1, 0.2, -1.0, 0.1])
    noise = torch.tensor([[1.0], [2.0], [3.0], [4.0]])
    sampled = policy.act(obs, before, noise).flatten().tolist()
    assert sampled == pytest.approx([0.35, 0.7, -0.25, 1.1])


# -- the enhanced critic --------------------------------------------------------------------------


def test_value_and_predictor_take_the_steps_of_their_losses_with_adam():
    mine = learner("iwocs", entropy_temp=50.0, gamma=0.9, tau=0.1, learning_rate=1e-2, critic_learning_rate=2e-2)
    batch, noise = transitions(12), drawn(mine, 1, 12)
    mine.modules["predictor"].observe(batch.obs)
    before = copy.deepcopy(mine.modules)
    logged = mine.run(batch, noise, 1)

    value, predictor = before["value"], before["predictor"]
    with torch.no_grad():
        actor = before["actor"](batch.next_obs)
        action = torch.tanh(actor.mean + actor.log_std.exp() * noise["next_action"][0])
        q = before["value_target"](batch.next_obs, action)
        following = torch.minimum(q[0], q[1])
        # no entropy in it, although the coefficient of the entropy is 50
        target = torch.where(batch.terminated_t > 0, batch.reward_t, batch.reward_t + 0.9 * following)
        wanted = (batch.next_obs - batch.obs.mean(0)) / batch.obs.std(0, correction=0)
    losses = {
        "value": lambda: ((value(batch.obs, batch.action) - target) ** 2).mean(1).sum() / 2,
        "predictor": lambda: (predictor.body(batch.obs, batch.action) - wanted).abs().mean(2).mean(1).sum(),
    }
    found = {}
    for name, loss in losses.items():
        net = before[name].requires_grad_(True)
        found[name] = loss()
        found[name].backward()
        for (k, p), b in zip(net.named_parameters(), mine.modules[name].parameters(), strict=True):
            # Adam's first step
            expected = p.detach() - 2e-2 * p.grad / (p.grad.abs() + 1e-5)
            torch.testing.assert_close(b, expected, rtol=1e-4, atol=1e-5, msg=f"{name} {k}")
    assert logged["value_loss"].item() == pytest.approx(found["value"].item(), rel=1e-5)
    assert logged["prediction_error"].item() == pytest.approx(found["predictor"].item() / 2, rel=1e-5)
    for a, b, c in zip(*(m.parameters() for m in (before["value_target"], mine.modules["value"],
                                                  mine.modules["value_target"])), strict=True):  # fmt: skip
        torch.testing.assert_close(c, 0.9 * a + 0.1 * b)


def test_the_actor_and_the_soft_critic_learn_as_in_sac():
    """From the same networks and noise: what IWOCS adds does not reach them."""
    ours, sac = learner("iwocs"), learner("sac", critic_learning_rate=1e-3, adam_eps=1e-5)
    for name in sac.modules:
        ours.modules[name].load_state_dict(sac.modules[name].state_dict())
    for seed in range(3):
        for one in (ours, sac):
            one.run(transitions(12, seed), drawn(one, 1, 12, seed), 1)
    for name in sac.modules:
        assert_same_tensors(dict(sac.modules[name].state_dict()), dict(ours.modules[name].state_dict()))


def test_the_plain_critic_is_one_layer_deeper_and_the_sizes_are_the_papers():
    config, own = api.get_method("iwocs").blueprint()
    nets = own.networks(Spaces(OBS, ACTIONS, 2), config, None)
    widths = {k: [layer.weight.shape[2] for layer in nets.trained[k].body if hasattr(layer, "weight")]
              for k in ("critic", "value")}  # fmt: skip
    assert widths == {"critic": [256, 256, 1], "value": [256, 256, 256, 1]}
    assert (config.learning_rate, config.critic_learning_rate, config.adam_eps) == (3e-4, 1e-3, 1e-5)
    assert (config.gamma, config.tau, config.batch_size, config.learning_starts) == (0.99, 0.005, 256, 10_000)
    rates = {k: own.learning_rate(k, config) for k in ("actor", "critic", "value", "predictor")}
    assert rates == {"actor": 3e-4, "critic": 1e-3, "value": 1e-3, "predictor": 1e-3}
    paper = api.get_method("iwocs").blueprint("paper")[1]
    assert (paper.default_steps, paper.model_steps, paper.max_models) == (1_600_000, 800_000, 3)
    assert (paper.population, paper.generations, paper.search) == (100, 6, "cma")
    assert paper.thresholds == tuple(k / 10 for k in range(1, 11)) and not paper.normalize_error


@pytest.mark.parametrize("mean", [True, False])
def test_the_error_of_a_prediction_counts_in_standard_deviations(mean):
    """As the mean over the observation's three entries, or as the L1 norm of the paper."""
    space = gym.spaces.Box(-np.inf, np.inf, (3,), np.float32)
    config, _ = api.get_method("iwocs").blueprint()
    predictor = Predictor(space, 1, config.network, None, 2, mean)
    count = 3 if mean else 1
    for parameter in predictor.parameters():
        torch.nn.init.zeros_(parameter)
    obs, action = torch.zeros(1, 3), torch.zeros(1, 1)
    following = torch.tensor([[4.0, 100.0, 7.5]])
    assert predictor(obs, action, following).flatten().tolist() == pytest.approx([111.5 / count] * 2)
    # deviations 2 and 50, and an entry that never changes
    predictor.observe(torch.tensor([[0.0, 50.0, 7.0], [4.0, 150.0, 7.0]]))
    expected = abs(4 - 2) / 2 + abs(100 - 100) / 50 + abs(7.5 - 7.0)
    assert predictor(obs, action, following).flatten().tolist() == pytest.approx([expected / count] * 2)
    predictor.observe(torch.tensor([[2.0, 100.0, 7.0]] * 2))  # running: four rows, half the variance
    expected = abs(4 - 2) / 2**0.5 + 0.5
    assert predictor(obs, action, following).flatten().tolist() == pytest.approx([expected / count] * 2)


# -- acting ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained():
    """An agent of four phases whose best is made to be the last, so that all of it acts."""
    with pytest.MonkeyPatch.context() as patch:
        never_repeats(patch)
        agent = quiet(make(n_envs=2), STEPS)
    assert len(agent.models) == 3
    return agent


def by_hand(models, thresholds, default, obs, before):
    """The composite policy for one observation, in plain Python; ``before`` is None or (observation, action)."""
    row = lambda x: torch.as_tensor(np.asarray(x, np.float32)).reshape(1, -1)  # noqa: E731
    best, action = np.inf, default.mode(row(obs))
    for model, threshold in zip(models, thresholds, strict=True):
        own = model.actor.mode(row(obs))
        if before is not None:
            error = model.predictor(row(before[0]), row(before[1]), row(obs))
            if float(error.mean()) > threshold:
                continue
        value = min(float(v) for v in model.value(row(obs), own).flatten())
        if value < best:
            best, action = value, own
    return action.detach().numpy()[0]


def episode_by_hand(agent, count, thresholds, params, seed):
    """Return of one episode of the policy of the first ``count`` models."""
    env = gym.make("test/Ledge-v0", disable_env_checker=True)
    env.unwrapped.set_params(params)
    obs, _ = env.reset(seed=seed)
    before, total, steps, over = None, 0.0, 0, False
    while not over:
        action = by_hand(agent.models[:count], thresholds, agent.default, obs, before)
        before = obs, action
        obs, reward, ended, cut, _ = env.step(2.0 * action)
        total, steps, over = total + reward, steps + 1, ended or cut
    return total, steps


def best_is(agent, index):
    for k, row in enumerate(agent.rows):
        row["worst_case"] = float(k == index)


def test_predict_session_and_the_rule_by_hand_agree(trained):
    agent = copy.copy(trained)
    agent.rows = copy.deepcopy(trained.rows)
    best_is(agent, 3)
    thresholds = [row["threshold"] for row in agent.rows[1:]]
    rng = np.random.default_rng(0)
    # two episodes side by side; the second place begins anew at step 3
    obs = rng.normal(0.0, 1.0, (7, 2, 2)).astype(np.float32)
    numbers = np.array([[0, 1]] * 3 + [[0, 2]] * 4)
    act, state, before = agent.session(), None, [None, None]
    kinds = set()
    for t in range(7):
        start = np.array([t == 0, t in (0, 3)])
        hand = []
        for n in range(2):
            last = None if start[n] else before[n]
            raw = by_hand(agent.models, thresholds, agent.default, obs[t, n], last)
            default = agent.default.mode(torch.tensor(obs[t, n : n + 1])).detach().numpy()[0]
            kinds.add(bool(np.allclose(raw, default, atol=1e-4)))
            before[n] = obs[t, n], raw
            hand.append(2.0 * raw)
        mine = act(obs[t], numbers[t])
        predicted, state = agent.predict(obs[t], state, start, deterministic=True)
        np.testing.assert_allclose(mine, np.stack(hand), atol=1e-5)
        assert np.array_equal(mine, predicted)
    assert kinds == {True, False}  # both the default and the models have acted


def test_predict_takes_single_observations_and_gives_a_state_back(trained):
    obs = np.zeros(2, np.float32)
    action, state = trained.predict(obs, deterministic=True)
    assert action.shape == (1,) and [part.shape for part in state] == [(1, 2), (1, 1), (1,)]
    assert state[0].tolist() == [[0.0, 0.0]] and 2.0 * state[1][0] == pytest.approx(action) and state[2].all()
    again, _ = trained.predict(obs, state, np.array([True]), deterministic=True)
    assert again == action
    with pytest.raises(ValueError, match=r"state has arrays of shapes .* batch of 3"):
        trained.predict(np.zeros((3, 2), np.float32), state)
    with pytest.raises(ValueError, match=r"episode_start has shape \(2,\); expected \(3,\)"):
        trained.predict(np.zeros((3, 2), np.float32), None, np.zeros(2, bool))
    samples = {float(trained.predict(obs)[0][0]) for _ in range(5)}
    assert len(samples) == 5


def test_the_phase_with_the_best_worst_case_acts_the_first_among_equals(trained):
    agent = copy.copy(trained)
    agent.rows = copy.deepcopy(trained.rows)
    for values, expected in (((5.0, 7.0, 7.0, 6.0), 1), ((9.0, 7.0, 7.0, 6.0), 0), ((-3.0, -4.0, -5.0, -2.0), 3)):
        for row, value in zip(agent.rows, values, strict=True):
            row["worst_case"] = value
        policy = agent.acting
        assert [model for model, _ in policy.parts] == agent.models[:expected]
        assert [t for _, t in policy.parts] == [row["threshold"] for row in agent.rows[1 : expected + 1]]
        assert policy.default is agent.default


def test_until_the_first_search_the_policy_under_training_acts():
    obs, agent = np.ones((1, 2), np.float32), make(default_steps=200, model_steps=50)
    seen = []

    def note(agent, metrics):
        acts = agent.policy.deterministic(torch.tensor(obs)).detach().numpy()
        seen.append((agent.predict(obs, deterministic=True)[0] == acts, acts.item()))

    quiet(agent, 16, callbacks=[Watch(note)])
    assert all(same for same, _ in seen) and seen[0][1] != seen[1][1]
    assert len(agent.rows) == 1  # a run that ends in the midst of a phase ends the phase


def test_the_table_holds_brute_force_worst_cases_of_the_composite_policies(trained):
    """Of the policy of all models so far, over the grid and the models trained on; and the better threshold is kept."""
    grid = [{"wind": w, "grip": g} for w in (0.0, 0.5, 1.0) for g in (0.5, 0.75, 1.0)]
    seeds = [derive(trained.seed, "search", k) for k in range(2)]
    kept: list[float] = []
    episodes = steps = 0
    for k, row in enumerate(trained.rows):
        known = [r["worst"] for r in trained.rows[:k]]
        candidates = [*known, *grid]
        found = []
        for threshold in (0.5, 2.0) if k else (None,):
            thresholds = kept if threshold is None else [*kept, threshold]
            played = [[episode_by_hand(trained, k, thresholds, p, s) for s in seeds] for p in candidates]
            means = np.array([np.mean([r for r, _ in one]) for one in played])
            found.append((threshold, means))
            episodes += len(candidates) * 2
            steps += sum(n for one in played for _, n in one)
        threshold, means = max(found, key=lambda item: item[1].min())
        assert row["worst_case"] == pytest.approx(means.min(), abs=1e-4)
        assert means[candidates.index(row["worst"])] == pytest.approx(means.min(), abs=1e-4)
        assert row["model"] == (trained.rows[k - 1]["worst"] if k else None)
        assert row["known"] == (pytest.approx(means[: len(known)].min(), abs=1e-4) if k else None)
        if k:
            by_threshold = dict((t, m.min()) for t, m in found)
            assert by_threshold[row["threshold"]] == pytest.approx(means.min(), abs=1e-4)
            kept.append(row["threshold"])
    assert (trained.search_episodes, trained.search_steps) == (episodes, steps)


def test_a_loaded_agent_acts_and_evaluates_like_the_saved_one(trained, tmp_path):
    trained.save(tmp_path / "agent")
    loaded = api.load(tmp_path / "agent")
    assert loaded.iterations_table == trained.iterations_table and len(loaded.models) == 3
    for one in (loaded, trained):
        one.__dict__.pop("_generator", None)
    state = [None, None]
    for t in range(4):
        obs = np.random.default_rng(t).normal(size=(5, 2)).astype(np.float32)
        found = [a.predict(obs, s, deterministic=t % 2 == 0) for a, s in zip((trained, loaded), state, strict=True)]
        state = [s for _, s in found]
        assert np.array_equal(found[0][0], found[1][0])
    assert np.array_equal(trained.evaluate(5).returns, loaded.evaluate(5).returns)
    assert np.array_equal(trained.evaluate(5, False).returns, loaded.evaluate(5, False).returns)
