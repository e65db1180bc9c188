"""Turn-PPO's golden table: one ratio per turn, and a gradient that spreads over the turn."""

import math

import torch
from losses.golden import batch_of, weights

from ctrlrl.losses.gspo import GSPO
from ctrlrl.losses.ppo import PPO
from ctrlrl.losses.turn_ppo import TurnPPO

F64 = torch.float64
TURN = TurnPPO(eps=0.2, standardize_advantage=False)


def rollout(log_ratios, advantage, turn, mask=None):
    log_ratios = torch.tensor(log_ratios, dtype=F64)
    batch, out = batch_of(log_ratios.exp(), torch.tensor(advantage, dtype=F64), mask)
    return batch._replace(turn=torch.tensor(turn)), out


def test_golden_table():
    """Log-ratios (.2, 0) in one turn: e^.2 = 1.2214 would be clipped, the turn's e^.1 = 1.1052 is not."""
    batch, out = rollout([[0.2, 0.0]], [[1.0, 1.0]], [[0, 0]])
    w = math.exp(0.1) / 2  # mean over the sequence's two positions
    torch.testing.assert_close(weights(TURN, batch, out), torch.tensor([[w, w]], dtype=F64))
    assert weights(PPO(standardize_advantage=False), batch, out)[0, 0] == 0


def test_the_gradient_is_the_ratio_times_the_mean_advantage_of_the_turn():
    batch, out = rollout([[0.2, 0.0, -0.1]], [[1.0, 3.0, -2.0]], [[0, 0, 1]])
    expected = [math.exp(0.1) * 2 / 3, math.exp(0.1) * 2 / 3, -math.exp(-0.1) * 2 / 3]
    torch.testing.assert_close(weights(TURN, batch, out), torch.tensor([expected], dtype=F64))


def test_a_clipped_turn_is_silent_and_its_neighbour_is_not():
    batch, out = rollout([[0.5, 0.1, 0.1, 0.1]], [[1.0, 1.0, 1.0, 1.0]], [[0, 0, 1, 1]])
    got = weights(TURN, batch, out)[0]
    assert got[:2].tolist() == [0, 0] and (got[2:] > 0).all()


def test_turns_of_one_position_are_ppo():
    g = torch.Generator().manual_seed(0)
    log_ratios, advantage = 0.4 * torch.randn(2, 6, 5, generator=g, dtype=F64)
    batch, out = rollout(log_ratios.tolist(), advantage.tolist(), torch.arange(5).expand(6, 5).tolist())
    # equal lengths, so both averages agree up to the denominators 6 and 30
    ppo = weights(PPO(standardize_advantage=False), batch, out) / 30
    torch.testing.assert_close(weights(TURN, batch, out) / 6, ppo, atol=1e-9, rtol=0)


def test_one_turn_is_gspos_ratio():
    g = torch.Generator().manual_seed(0)
    log_ratios = 0.4 * torch.randn(6, 5, generator=g, dtype=F64)
    mask = torch.arange(5) < torch.tensor([[5], [3], [1], [5], [2], [4]])
    advantage = torch.randn(6, 1, generator=g, dtype=F64).expand(6, 5)
    batch, out = rollout(log_ratios.tolist(), advantage.tolist(), torch.where(mask, 0, -1).tolist(), mask)
    torch.testing.assert_close(weights(TURN, batch, out), weights(GSPO(eps_low=0.2, eps_high=0.2), batch, out))


def test_clip_fraction_is_of_turns():
    batch, out = rollout([[0.5, 0.1, 0.2, 0.0]], [[1.0, 1.0, 1.0, 1.0]], [[0, 0, 1, 1]])
    assert TURN.metrics(batch, out, {})["clip_fraction"].tolist() == [[1.0, 1.0, 0.0, 0.0]]
