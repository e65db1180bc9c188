"""Risky PointMass (D3): demonstrations walk around a dangerous disc, the policy straight through it."""

import numpy as np
import pytest
from ctrlrl_envs.risky import RiskyPointMass, RiskyPointMassVector, safe_action, straight_action
from helpers.agents import quiet

from ctrlrl import api
from ctrlrl.data.dataset import Dataset, DatasetInfo
from ctrlrl.engine.evaluate import Evaluation

LIMIT, STRIDE = 60, 0.1


def demonstrations(episodes, seed):
    """The safe policy with a little noise."""
    rng, env = np.random.default_rng(seed), RiskyPointMassVector(episodes, max_episode_steps=LIMIT)
    obs, _ = env.reset(seed=seed)
    rows, live = [], np.ones(episodes, bool)
    while live.any():
        action = np.clip(safe_action(obs) + 0.02 * rng.normal(size=(episodes, 2)), -STRIDE, STRIDE).astype(np.float32)
        following, reward, terminated, truncated, _ = env.step(action)
        rows.append((obs, action, reward, following, terminated, truncated, live.copy()))
        live &= ~(terminated | truncated)
        obs = following
    # one episode after the other
    columns = [np.stack(c, 1) for c in zip(*rows, strict=True)]
    obs, action, reward, following, terminated, truncated = (c[columns[-1]] for c in columns[:-1])
    space = RiskyPointMass()
    return Dataset(
        observations=obs, actions=action, rewards=reward.astype(np.float32), terminals=terminated,
        timeouts=truncated & ~terminated, next_observations=following, next_known=np.ones(len(obs), bool),
        observation_space=space.observation_space, action_space=space.action_space, info=DatasetInfo("safe", None),
    )  # fmt: skip


def played(act, episodes=500, seed=1):
    """Returns, violating steps per episode, and the share that reached the goal."""
    env = RiskyPointMassVector(episodes, max_episode_steps=LIMIT)
    obs, _ = env.reset(seed=seed)
    returns, violations, live = np.zeros(episodes), np.zeros(episodes), np.ones(episodes, bool)
    reached = np.zeros(episodes, bool)
    while live.any():
        obs, reward, terminated, truncated, info = env.step(act(obs))
        returns += np.where(live, reward, 0.0)
        violations += live & info["violation"]
        reached |= live & terminated
        live &= ~(terminated | truncated)
    result = Evaluation(returns, np.zeros(episodes, int), np.arange(episodes))
    return result.conditional_value_at_risk(0.1), violations.mean(), reached.mean()


class Straight:
    def predict(self, obs, deterministic=False):
        return straight_action(obs), None


def test_the_table_begins_as_it_should():
    """Values of the untrained rows: the straight policy breaks the rule in about four steps, the safe one in none."""
    cvar, violations, reach = played(straight_action)
    assert cvar == pytest.approx(-80, abs=12) and violations == pytest.approx(4.1, abs=0.3) and reach == 1.0
    cvar, violations, reach = played(safe_action)
    assert cvar == pytest.approx(-13.5, abs=1.5) and violations == 0 and reach == 1.0


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_state_gradient_alone_at_weight_two_keeps_out_of_the_disc(seed):
    agent = api.make(
        "cdsa", dataset=demonstrations(250, seed), seed=seed, densities="conditional", actor_hidden=(128, 128, 128),
        batch_size=256, learning_rate=2e-3, device="cpu",
    )  # fmt: skip
    quiet(agent, 2000)
    base, *_ = played(straight_action)
    safe = agent.correct(Straight(), eta_action=0.0, eta_state=2.0, skip_in_data=False)
    cvar, violations, reach = played(lambda obs: safe.predict(obs)[0])
    assert violations == 0 and reach >= 0.99 and cvar >= base / 2
    # changes of the same size in random directions do not help
    rng = np.random.default_rng(seed)

    def shaken(obs):
        size = np.linalg.norm(safe.predict(obs)[0] - straight_action(obs), axis=1, keepdims=True)
        way = rng.normal(size=(len(size), 2))
        return np.clip(straight_action(obs) + size * way / np.linalg.norm(way, axis=1, keepdims=True), -STRIDE, STRIDE)

    cvar, violations, _ = played(shaken)
    assert violations > 1 and cvar < base / 2
