"""Every loss that runs on token sequences learns a pattern of four tokens out of four, with a table for a policy."""

import numpy as np
import pytest

from ctrlrl import api
from ctrlrl.losses import base
from ctrlrl.losses.needs import missing

SETTINGS = {
    "n_groups": 8, "group_size": 8, "batch_size": None, "epochs": 4, "learning_rate": 0.05, "policy": "tabular",
    "eval_every": None, "diagnose_every": None, "threads": 1, "value_epochs": None, "value_batch_size": None,
}  # fmt: skip
GOALS = {
    "super_hf": 0.5,  # held at a distance from the first policy by its KL
    "risk_po": 0.5,  # never pushes anything up
    "mdpo": 0.5,
}
"""Mean rewards that a loss does not pass for a reason of its own; 0.7 for all others, 0.25 by chance."""


class Rewards(list):
    def on_update(self, agent, step, metrics):
        returns = [r for r, _ in list(agent.recent)[-64:]]
        self.append(float(np.mean(returns)))


@pytest.mark.parametrize("name", [n for n in base.names() if not missing(base.get(n).needs, "tokens")])
def test_improves_on_token_sequences(name):
    settings = dict(SETTINGS)
    if "seed_pool" in base.get(name).loop_defaults:
        settings["seed_pool"] = 8
    agent = api.make(name, env="ctrlrl/TokenPattern-v0", seed=0, **settings)
    rewards = Rewards()
    agent.learn(40 * 64 * 4, root=None, progress=False, callbacks=[rewards])
    assert rewards[0] < 0.4
    assert np.mean(rewards[-5:]) > GOALS.get(name, 0.7), rewards[::5]
