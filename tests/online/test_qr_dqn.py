"""QR-DQN against an implementation of its own with torch's optimiser, and against laws whose quantiles are known."""

import pytest
import torch
from helpers.off_policy import CHOICES, Double, adam, assert_like, learner, plain, polyak
from test_dqn import GAMMA, RATE, TAU, B, double, fixed, layers, rows, train  # noqa: F401 - double is a fixture

from ctrlrl.engine.config import ConfigError
from ctrlrl.online.qr_dqn import QRDQN

M = 4


@pytest.mark.parametrize("kappa,target_steps", [(1.0, 500), (0.1, None)])
def test_three_updates_equal_an_independent_implementation(kappa, target_steps, double):  # noqa: F811
    mine, before, found, batches = train("qr_dqn", quantiles=M, kappa=kappa, target_steps=target_steps, adam_eps=1e-8)
    network, target = plain(layers(before["actor"])), plain(layers(before["actor_target"]))
    optimiser = adam(network, lr=RATE)
    for i, batch in enumerate(batches):
        losses = []
        for k in range(B):
            with torch.no_grad():
                following = target(batch.next_obs[k].double()).reshape(3, M)
                best = max(range(3), key=lambda a, law=following: law[a].mean().item())
                going_on = 0.0 if batch.terminated_t[k] else GAMMA
                atoms = [batch.reward_t[k] + going_on * following[best, j] for j in range(M)]
            quantiles = network(batch.obs[k].double()).reshape(3, M)[batch.action[k]]
            loss = torch.zeros(())
            for level, q in zip((0.125, 0.375, 0.625, 0.875), quantiles, strict=True):
                for y in atoms:
                    weight = level if y >= q else 1.0 - level
                    loss = loss + weight * torch.nn.functional.huber_loss(q, y, delta=kappa) / kappa / M
            losses.append(loss)
        loss = torch.stack(losses).mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        if target_steps is None:
            polyak(target, network, TAU)
        torch.testing.assert_close(found[i]["critic_loss"][0], loss.detach(), rtol=0, atol=1e-7)
    assert_like(network, layers(mine.modules["actor"]))
    assert_like(target, layers(mine.modules["actor_target"]))


def test_the_target_takes_the_action_with_the_best_mean_not_the_best_quantile(double):  # noqa: F811
    """Laws (9, -9), (1, 2) and (0, 0): the second has the best mean. Targets 0.5 x (1, 2) = (0.5, 1), quantiles at 0.

    At levels 1/4 and 3/4 of kappa 1: (1/4 + 3/4)(0.125 + 0.5) / 2 = 0.3125.
    """
    mine = learner("qr_dqn", Double, actions=CHOICES, gamma=0.5, learning_rate=0.0, quantiles=2)
    fixed(mine, "actor", [0.0] * 6)
    fixed(mine, "actor_target", [9.0, -9.0, 1.0, 2.0, 0.0, 0.0])
    batch = rows(1)._replace(reward_t=torch.zeros(1), terminated_t=torch.zeros(1))
    assert mine.run(batch, {}, 1)["critic_loss"].item() == pytest.approx(0.3125)
    ended = batch._replace(terminated_t=torch.ones(1))
    assert mine.run(ended, {}, 1)["critic_loss"].item() == 0.0


def test_learns_the_quantiles_of_a_coin():
    """Rewards 1 and, one time in four, -1, at the end: the lower quarter of the quantiles is -1, the rest 1."""
    mine = learner("qr_dqn", actions=CHOICES, quantiles=8, kappa=0.0, learning_rate=2e-2)
    batch = rows(64)._replace(
        obs=torch.zeros(64, 3), action=torch.arange(64) % 2, terminated_t=torch.ones(64),
        reward_t=torch.where(torch.arange(64) % 8 < 2, -1.0, 1.0),
    )  # fmt: skip
    for _ in range(250):
        mine.run(batch, {}, 1)
    law = mine.modules["actor"](torch.zeros(1, 3))[0, :2]
    torch.testing.assert_close(law, torch.tensor([[-1.0] * 2 + [1.0] * 6] * 2), atol=0.1, rtol=0)


def test_the_preset_sb3_has_the_defaults_of_sb3_contrib():
    """Of sb3-contrib 2.9 and, but for the start of learning and how often it updates, of the paper."""
    assert dict(QRDQN.presets["sb3"]) == {
        "learning_rate": 5e-5, "replay_size": 1_000_000, "learning_starts": 100, "batch_size": 32,
        "replay_ratio": 0.25, "target_steps": 10_000, "epsilon_end": 0.01, "epsilon_share": 0.005, "quantiles": 200,
        "adam_eps": 0.01 / 32, "critic_hidden": (64, 64),
    }  # fmt: skip
    assert QRDQN().kappa == 1.0 and QRDQN().epsilon_start == 1.0


def test_a_single_quantile_is_refused():
    with pytest.raises(ConfigError, match="quantiles=1 must be at least 2"):
        learner("qr_dqn", actions=CHOICES, quantiles=1)
