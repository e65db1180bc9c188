"""Routing replay: a mixture policy gets back the branches that it chose when its data were collected."""

import torch
from torch import nn

from ctrlrl.data.episodes import Episodes
from ctrlrl.engine.config import OnPolicyConfig
from ctrlrl.engine.episode_estimate import estimate_episodes
from ctrlrl.engine.update import Updater
from ctrlrl.losses.mini_rl import MiniRL
from ctrlrl.nets.heads import Categorical
from ctrlrl.types import PolicyOutput


class Mixture(nn.Module):
    """Two experts; a gate picks one for each position."""

    def __init__(self):
        super().__init__()
        self.gate = nn.Linear(1, 2)
        self.experts = nn.Parameter(torch.tensor([[1.0, -1.0], [-2.0, 2.0]]))

    def route(self, obs):
        return self.gate(obs).argmax(-1)

    def forward(self, obs, action, route=None):
        dist = Categorical(self.experts[self.route(obs) if route is None else route])
        return PolicyOutput(dist.log_prob(action), dist.entropy(), {}, dist)


def collected(policy, wanted):
    g = torch.Generator().manual_seed(0)
    shape = (4, 3)
    mask, none = torch.ones(shape, dtype=torch.bool), torch.zeros(shape, dtype=torch.bool)
    last = none.clone()
    last[:, -1] = True
    rows = torch.zeros(4, dtype=torch.long)
    episodes = Episodes(
        torch.randn(*shape, 1, generator=g), torch.randint(2, shape, generator=g), mask, torch.rand(shape, generator=g),
        last, none, torch.zeros(4, 1), torch.full((4,), 3), rows, 0.0, logp_behaviour=torch.zeros(shape),
    )  # fmt: skip
    return estimate_episodes(
        policy, None, frozenset(wanted), OnPolicyConfig(), episodes, rows, rows, torch.rand(4, generator=g), None
    )


def test_a_gate_that_moves_does_not_move_the_ratio_where_routes_are_replayed():
    torch.manual_seed(0)
    policy, loss = Mixture(), MiniRL()
    assert "routes" in loss.uses
    batches = [collected(policy, wanted) for wanted in (loss.needs | loss.uses, loss.needs)]
    assert batches[0].route.tolist() == policy.route(batches[0].obs).tolist() and batches[0].route.unique().numel() == 2
    assert batches[1].route is None
    kl = []
    for batch in batches:
        updater = Updater(policy, loss, OnPolicyConfig(batch_size=None, epochs=1), compile=False)
        policy.gate.weight.data.neg_()  # every position now goes to the other expert
        policy.gate.bias.data.neg_()
        knobs = {"learning_rate": torch.tensor(0.0)}
        metrics = updater.run(loss.begin(batch, knobs, {}).batch, knobs, torch.Generator().manual_seed(0))
        policy.gate.weight.data.neg_()
        policy.gate.bias.data.neg_()
        kl.append(float(metrics["approx_kl"][0]))
    assert kl[0] == 0.0 and kl[1] > 0.5
