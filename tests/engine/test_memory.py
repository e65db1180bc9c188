"""What a policy with a memory takes back."""

from typing import NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor

from ctrlrl.engine.memory import recalled


class Seen(NamedTuple):
    obs: Tensor
    there: Tensor


NOTHING = Seen(torch.zeros(3, 2), torch.zeros(3, dtype=torch.bool))
STATE = (np.arange(6, dtype=np.float32).reshape(3, 2), np.ones(3, bool))
CPU = torch.device("cpu")


def test_without_a_state_there_is_nothing():
    assert recalled(NOTHING, None, None, CPU) is NOTHING


def test_a_state_comes_back_but_for_where_an_episode_begins():
    found = recalled(NOTHING, STATE, np.array([False, True, False]), CPU)
    assert found.obs.tolist() == [[0, 1], [2, 3], [4, 5]] and found.there.tolist() == [True, False, True]
    assert recalled(NOTHING, STATE, np.array(True), CPU).there.tolist() == [False] * 3


def test_a_beginning_clears_every_place_of_a_longer_memory():
    long = Seen(torch.zeros(3, 4, 2), torch.ones(3, 4, dtype=torch.bool))
    assert recalled(long, None, np.array([True, False, False]), CPU).there.sum(1).tolist() == [0, 4, 4]


def test_another_batch_is_refused():
    with pytest.raises(ValueError, match="give what predict returned for a batch of 3"):
        recalled(NOTHING, (STATE[0][:2], STATE[1][:2]), None, CPU)
    with pytest.raises(ValueError, match=r"episode_start has shape \(2,\); expected \(3,\)"):
        recalled(NOTHING, STATE, np.zeros(2, bool), CPU)
