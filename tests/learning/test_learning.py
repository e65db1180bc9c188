"""Learning checks of minutes: CartPole, Pendulum for PPO, sorting tokens."""

import statistics

import pytest

from ctrlrl.api import make

pytestmark = pytest.mark.slow

COMMON = {"n_envs": 8, "n_steps": 32, "batch_size": 256, "epochs": 20, "learning_rate": 1e-3}
CARTPOLE = {
    "ppo": COMMON | {"eps": 0.2},
    "spo": COMMON | {"eps": 0.2},
    "bpo": COMMON | {"eps": 0.2, "lam": 1e-3},
    "bpo_mean": COMMON | {"eps": 0.2, "lam": 1e-3},
    "mdpo": {"n_envs": 8, "n_steps": 128, "epochs": 10, "learning_rate": 3e-3, "gamma": 0.98, "value_clip": None},
}


GROUPS = ["grpo", "rloo", "gspo", "dr_grpo", "bapo", "mhpo", "aepo", "spear", "real", "r3l"]


@pytest.mark.parametrize("method", GROUPS)
def test_cartpole_by_groups_in_150k_steps(method):
    """Returns of whole episodes compared within groups, no value function."""
    agent = make(method, "CartPole-v1", seed=0, eval_every=None, learning_rate=3e-3, threads=1)
    agent.learn(150_000, root=None, progress=False)
    assert agent.evaluate(20).mean >= 300


def test_a_transformer_learns_to_sort():
    agent = make("grpo", "ctrlrl/TokenSort-v0", seed=0, eval_every=None, threads=1)
    agent.learn(60_000, root=None, progress=False)
    assert agent.evaluate(100).mean >= 0.6  # the share of digits in their place; 1/12 by chance


@pytest.mark.parametrize("method", sorted(CARTPOLE))
def test_cartpole_in_50k_steps(method):
    scores = []
    for seed in range(3):
        agent = make(method, "CartPole-v1", seed=seed, backend="sync", eval_every=None, **CARTPOLE[method])
        agent.learn(50_000, root=None, progress=False)
        scores.append(agent.evaluate(20).mean)
    assert statistics.median(scores) >= 450, scores


def test_pendulum_in_100k_steps():
    # without normalisation: with scaled rewards this setting fails on most seeds, Stable-Baselines3's PPO included
    scores = []
    for seed in range(3):
        agent = make(
            "ppo", "Pendulum-v1", seed=seed, n_envs=4, n_steps=1024, epochs=10, learning_rate=1e-3, gamma=0.9,
            normalize_obs=False, normalize_reward=False, backend="sync", eval_every=None,
        )  # fmt: skip
        agent.learn(100_000, root=None, progress=False)
        scores.append(agent.evaluate(100).mean)
    assert statistics.median(scores) > -250, scores
