"""S-PPO's own part: PPO's loss, position by position. The division and its golden table are in test_st_ppo."""

import torch
from losses.golden import batch_of, column, weights

from ctrlrl.losses.ppo import PPO
from ctrlrl.losses.s_ppo import SPPO


def test_the_loss_itself_is_ppos():
    ratios, advantage = column(1.5, 1.0, 0.5, 0.9), column(4.0, 1.0, -6.0, -2.0)
    batch, out = batch_of(ratios, advantage)
    for standardize in (True, False):
        mine, theirs = (weights(c(standardize_advantage=standardize), batch, out) for c in (SPPO, PPO))
        torch.testing.assert_close(mine, theirs)


def test_needs_no_turns():
    batch, out = batch_of(column(1.5), column(4.0))
    assert batch.turn is None and SPPO(standardize_advantage=False).importance(batch, out).item() == 1.5
