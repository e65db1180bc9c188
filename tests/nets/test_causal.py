"""The causal transformer over (return-to-go, observation, action) tokens, against torch's own layers."""

import copy

import pytest
import torch
from helpers.trajectories import ACTIONS, OBS, WIDTH, K, actor, steps
from torch import nn

from ctrlrl.engine.wrappers import space_told
from ctrlrl.nets.actors import QNetworkConfig
from ctrlrl.nets.causal import CausalBlock, Kept, TrajectoryActor


def changed(obs, action, where, what):
    obs, action = {k: v.clone() for k, v in obs.items()}, action.clone()
    target = action if what == "action" else obs[what]
    target[where] += 1
    return obs, action


class Fixed(nn.Module):
    """Dropout with a given mask."""

    def __init__(self, kept, share):
        super().__init__()
        self.kept, self.share = kept, share

    def forward(self, x):
        return torch.where(self.kept, x / (1 - self.share), torch.zeros_like(x))


def torchs_layer(block):
    """torch's own transformer layer with the weights of ``block``."""
    layer = nn.TransformerEncoderLayer(WIDTH, block.heads, 4 * WIDTH, 0.0, "relu", batch_first=True, norm_first=True)
    pairs = [(layer.norm1, block.norm1), (layer.norm2, block.norm2), (layer.self_attn.out_proj, block.out),
             (layer.linear1, block.up), (layer.linear2, block.down)]  # fmt: skip
    for theirs, mine in pairs:
        theirs.load_state_dict(mine.state_dict())
    layer.self_attn.in_proj_weight.data.copy_(block.qkv.weight)
    layer.self_attn.in_proj_bias.data.copy_(block.qkv.bias)
    return layer.train()


def test_a_layer_is_torchs_own_with_dropout_behind_both_halves():
    torch.manual_seed(0)
    block, x = CausalBlock(WIDTH, 2), torch.randn(3, 7, WIDTH)
    layer = torchs_layer(block)
    allowed = torch.ones(7, 7, dtype=torch.bool).tril()
    kept = [torch.rand(3, 7, WIDTH) > 0.4 for _ in range(2)]
    layer.dropout1, layer.dropout2 = (Fixed(mask, 0.4) for mask in kept)
    found = block(x, allowed.view(1, 1, 7, 7), lambda v, place: v if place == 0 else Fixed(kept[place - 1], 0.4)(v))
    torch.testing.assert_close(found, layer(x, src_mask=~allowed))


def test_a_layer_drops_attention_weights_by_head_after_the_softmax():
    torch.manual_seed(0)
    block, x = CausalBlock(WIDTH, 2), torch.randn(3, 7, WIDTH)
    allowed = torch.ones(1, 1, 7, 7, dtype=torch.bool).tril()
    seen = []

    def drop(v, place):
        if place:
            return v
        seen.append(v)
        return v * torch.tensor([2.0, 0.0]).view(1, 2, 1, 1)  # the first head twice, the second not at all

    found = block(x, allowed, drop)
    torch.testing.assert_close(seen[0].sum(-1), torch.ones(3, 2, 7))
    other = copy.deepcopy(block)
    other.out.weight.data[:, : WIDTH // 2] *= 2
    other.out.weight.data[:, WIDTH // 2 :] = 0
    torch.testing.assert_close(found, other(x, allowed, lambda v, _: v))


def by_hand(net, obs, action, there, kept=None, dropout=0.0):
    """The actions by torch's layers, token by token embedded; ``kept`` of the features alone."""
    batch, length = there.shape
    rows = []
    for i in range(batch * length):
        when = net.embed["timestep"].weight[int(obs["timestep"][i])]
        rows += [
            net.embed["return_to_go"](obs["return_to_go"][i] / 10.0) + when,
            net.embed["observation"](obs["observation"][i]) + when,
            net.embed["action"](action[i]) + when,
        ]
    x = net.norm(torch.stack(rows).view(batch, 3 * length, WIDTH)[:, :-1])
    if kept is not None:
        x = Fixed(kept[:, 0], dropout)(x)
    mask = ~torch.ones(3 * length - 1, 3 * length - 1, dtype=torch.bool).tril()
    for i, block in enumerate(net.blocks):
        layer = torchs_layer(block)
        if kept is not None:
            layer.dropout1, layer.dropout2 = (Fixed(kept[:, 1 + 2 * i + j], dropout) for j in (0, 1))
        x = layer(x, src_mask=mask)
    tokens = net.last_norm(x)
    return torch.tanh(net.out(torch.stack([tokens[:, 3 * t + 1] for t in range(length)], 1)))


def test_the_network_is_the_papers_written_out():
    net, inputs = actor(), steps(2, K, first=3)
    torch.testing.assert_close(net(*inputs), by_hand(net, *inputs), atol=1e-5, rtol=1e-5)


def test_dropout_is_after_the_embedding_and_after_both_halves_of_every_layer():
    net, inputs = actor(dropout=0.25), steps(2, K)
    g = torch.Generator().manual_seed(1)
    features = torch.rand(2, 5, 3 * K - 1, WIDTH, generator=g) > 0.25
    # dropout in the attention of nothing, but for the division by 1 - 0.25
    other = copy.deepcopy(net)
    for block in other.blocks:
        block.out.weight.data /= 0.75
    kept = Kept(features, torch.ones(2, 2, 2, 3 * K - 1, 3 * K - 1, dtype=torch.bool))
    torch.testing.assert_close(net(*inputs, kept), by_hand(other, *inputs, features, 0.25), atol=1e-5, rtol=1e-5)


def test_every_layer_has_attention_dropout_of_its_own():
    net, inputs = actor(), steps(2, K)
    full = Kept(
        torch.ones(2, 5, 3 * K - 1, WIDTH, dtype=torch.bool), torch.ones(2, 2, 2, 3 * K - 1, 3 * K - 1, dtype=bool)
    )
    for layer in (0, 1):
        attention = full.attention.clone()
        attention[:, layer] = False
        other = copy.deepcopy(net)
        for i, block in enumerate(other.blocks):
            block.out.weight.data *= 0.0 if i == layer else 1.0
        torch.testing.assert_close(net(*inputs, full._replace(attention=attention)), other(*inputs, full))


def test_an_action_is_not_changed_by_itself_nor_by_anything_later_but_by_all_before():
    net = actor()
    obs, action, there = steps(2, K)
    before = net(obs, action, there)
    for t in range(K):
        for what in ("return_to_go", "observation", "action"):
            moved = (net(*changed(obs, action, [t, K + t], what), there) - before).abs().amax(-1) > 1e-6
            first = t + 1 if what == "action" else t
            assert not moved[:, :first].any() and moved[:, first:].all(), (t, what)


def test_padding_has_no_influence():
    net = actor(context=6)
    obs, action, there = steps(2, 3)
    expected = net(obs, action, there)
    for seed in (5, 6):
        junk = steps(2, 3, seed=seed, first=7)
        obs_padded = {
            k: torch.cat([junk[0][k].view(2, 3, -1), v.view(2, 3, -1)], 1).flatten(0, 1) for k, v in obs.items()
        }
        action_padded = torch.cat([junk[1].view(2, 3, -1), action.view(2, 3, -1)], 1).flatten(0, 1)
        found = net(obs_padded, action_padded, torch.cat([~there, there], 1))
        assert found.isfinite().all()
        torch.testing.assert_close(found[:, 3:], expected)


def test_steps_beyond_the_table_of_timesteps_count_as_its_last():
    net = actor(timesteps=8)
    obs, action, there = steps(1, 1)
    late = [net({**obs, "timestep": torch.tensor([[t]])}, action, there) for t in (6, 7, 8, 5000)]
    assert torch.equal(late[1], late[2]) and torch.equal(late[1], late[3]) and not torch.equal(late[0], late[1])


def test_weights_begin_as_gpt2s():
    torch.manual_seed(0)
    net = TrajectoryActor(
        space_told(OBS), ACTIONS, QNetworkConfig(), context=K, width=128, layers=2, heads=1, dropout=0.1,
        return_scale=1.0, timesteps=100,
    )  # fmt: skip
    for name, parameter in net.named_parameters():
        if "norm" not in name and name.endswith("weight"):
            assert float(parameter.detach().std()) == pytest.approx(0.02, rel=0.2), name
        elif name.endswith("bias"):
            assert not parameter.any(), name
