"""The learner: Adam on flat vectors, copies, state, and the wrappers around an update."""

from dataclasses import dataclass

import pytest
import torch
from helpers.off_policy import drawn, learner, transitions
from torch import nn

from ctrlrl.data.transitions import Transitions
from ctrlrl.engine import algorithm as algorithms
from ctrlrl.engine.algorithm import Algorithm, Networks
from ctrlrl.engine.config import ConfigError
from ctrlrl.engine.errors import CheckpointError
from ctrlrl.engine.learner import Learner, part
from ctrlrl.engine.off_policy_config import OffPolicyConfig

CPU = torch.device("cpu")
METHODS = ("sac", "td3", "mdpo_off")


class Buffered(nn.Module):
    """A layer with a buffer beside its parameters."""

    def __init__(self, inputs, outputs):
        super().__init__()
        self.layer = nn.Linear(inputs, outputs)
        self.register_buffer("offset", torch.ones(outputs))

    def forward(self, x):
        return self.layer(x) + self.offset


@dataclass(frozen=True)
class Toy(Algorithm):
    """Two regressions of different sizes and learning rates, one with a slow copy."""

    def networks(self, spaces, config, encoder):
        return Networks(Buffered(3, 2), {"critic": nn.Linear(3, 1)}, {"slow": "critic"})

    def learning_rate(self, network, config):
        return {"actor": 3e-3, "critic": 1e-2}[network]

    def update(self, nets, batch, noise, knobs, phase):
        def actor_loss(actor):
            value = (actor(batch.obs) - batch.action).square().sum(1).mean()
            return value, {"actor_loss": value.detach()}

        def critic_loss(critic):
            value = 100.0 * (critic(batch.obs)[:, 0] - batch.reward_t).square().mean()
            return value, {"critic_loss": value.detach()}

        metrics = nets.descend("actor", actor_loss) | nets.descend("critic", critic_loss)
        nets.track("slow", "critic", knobs["tau"])
        return metrics


def toy(seed=0, **settings):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        actor, trained, copies = Toy().networks(None, None, None)
    config = OffPolicyConfig(**{"tau": 0.25} | settings)
    return Learner(Toy(), {"actor": actor, **trained}, copies, config, CPU, False)


# -- Adam -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("settings", [{}, {"adam_eps": 1e-2}, {"max_grad_norm": 0.5}, {"max_grad_norm": 1e3}], ids=str)
def test_five_steps_equal_torchs_adam_with_a_rate_and_a_norm_for_each_network(settings):
    mine = toy(**settings)
    actor, critic = Buffered(3, 2), nn.Linear(3, 1)
    actor.load_state_dict(mine.modules["actor"].state_dict())
    critic.load_state_dict(mine.modules["critic"].state_dict())
    groups = [{"params": actor.parameters(), "lr": 3e-3}, {"params": critic.parameters(), "lr": 1e-2}]
    adam = torch.optim.Adam(groups, eps=settings.get("adam_eps", 1e-8))
    cut = []
    for i in range(5):
        batch = transitions(8, seed=i)
        found = mine.run(batch, {}, 1)
        losses = {
            "actor_loss": (actor(batch.obs) - batch.action).square().sum(1).mean(),
            "critic_loss": 100.0 * (critic(batch.obs)[:, 0] - batch.reward_t).square().mean(),
        }
        adam.zero_grad()
        for name, loss in losses.items():
            torch.testing.assert_close(found[name][0], loss.detach(), rtol=1e-5, atol=1e-6)
            loss.backward()
        if "max_grad_norm" in settings:
            norms = [nn.utils.clip_grad_norm_(m.parameters(), settings["max_grad_norm"]) for m in (actor, critic)]
            cut.append([bool(n > settings["max_grad_norm"]) for n in norms])
        adam.step()
        for ours, theirs in ((mine.modules["actor"], actor), (mine.modules["critic"], critic)):
            for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
                torch.testing.assert_close(a, b, rtol=0, atol=1e-6)
    if settings == {"max_grad_norm": 0.5}:
        assert all(both == [True, True] for both in cut)


def test_learning_rates_go_to_actor_and_critics():
    config = OffPolicyConfig(learning_rate=1e-3)
    for name in METHODS:
        assert algorithms.get(name)().learning_rate("critic", config) == 1e-3
    own = OffPolicyConfig(learning_rate=1e-3, critic_learning_rate=5e-3)
    for name in METHODS:
        method = algorithms.get(name)()
        assert (method.learning_rate("actor", own), method.learning_rate("critic", own)) == (1e-3, 5e-3)
        assert learner(name, learning_rate=1e-3, critic_learning_rate=5e-3).knobs["lr/critic"] == torch.tensor(5e-3)


# -- copies ---------------------------------------------------------------------------------------


def test_tracking_goes_a_part_of_the_way_after_the_step():
    mine = toy(tau=0.25)
    start = mine.state["critic"].clone()
    assert torch.equal(mine.state["slow"], start)
    mine.run(transitions(8), {}, 1)
    first = mine.state["critic"].clone()
    assert not torch.equal(first, start)
    torch.testing.assert_close(mine.state["slow"], 0.75 * start + 0.25 * first, rtol=0, atol=1e-7)
    mine.run(transitions(8, 1), {}, 1)
    expected = 0.75 * (0.75 * start + 0.25 * first) + 0.25 * mine.state["critic"]
    torch.testing.assert_close(mine.state["slow"], expected, rtol=0, atol=1e-7)


def test_copies_are_independent_of_their_source_and_modules_see_the_state():
    mine = toy(tau=0.0)
    start = mine.state["critic"].clone()
    for i in range(3):
        mine.run(transitions(8, i), {}, 1)
    assert torch.equal(mine.state["slow"], start) and not torch.equal(mine.state["critic"], start)
    for name in ("actor", "critic", "slow"):
        seen = torch.cat([p.flatten() for p in mine.modules[name].parameters()])
        assert torch.equal(seen, mine.state[name])
        assert not any(p.requires_grad for p in mine.modules[name].parameters())
    mine.copy("slow", "critic")
    assert torch.equal(mine.state["slow"], mine.state["critic"])
    mine.run(transitions(8, 9), {}, 1)
    assert not torch.equal(mine.state["slow"], mine.state["critic"])


# -- state ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", METHODS)
def test_state_is_restored_exactly_and_training_goes_on_the_same(name):
    """Three updates in, so that TD3 is between two of its policy; the new learner starts from other weights."""
    mine, other = learner(name, learning_rate=1e-2), learner(name, learning_rate=1e-2, seed=1)
    noise = drawn(mine, 6, 8)
    go = lambda x, i: x.run(transitions(8, i), {k: v[i : i + 1] for k, v in noise.items()}, 1)  # noqa: E731
    for i in range(3):
        go(mine, i)
    saved = {k: v.clone() for k, v in mine.tensors().items()}
    other.restore(saved, 3)
    assert other.updates == 3 and other.state.keys() == mine.state.keys()
    assert all(torch.equal(other.state[k], mine.state[k]) for k in mine.state)
    for i in range(3, 6):
        a, b = go(mine, i), go(other, i)
        assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
    assert all(torch.equal(other.state[k], mine.state[k]) for k in mine.state)
    assert not torch.equal(saved["critic/m"], mine.state["critic/m"]), "the saved state moved on with the learner"
    for network in mine.trained:
        assert {f"{network}/m", f"{network}/v", f"{network}/clock"} <= saved.keys()


def test_buffers_are_part_of_the_state():
    mine, other = toy(), toy(seed=1)
    mine.modules["actor"].offset.fill_(7.0)
    other.restore(mine.tensors(), 0)
    assert (other.modules["actor"].offset == 7.0).all()


@pytest.mark.parametrize("change", ["missing", "shape"])
def test_state_that_does_not_fit_is_refused(change):
    mine = learner("sac")
    saved = mine.tensors()
    if change == "missing":
        del saved["critic/m"]
    else:
        saved["critic/m"] = saved["critic/m"][1:]
    with pytest.raises(CheckpointError, match="critic/m"):
        learner("sac").restore(saved, 0)


# -- around the update ----------------------------------------------------------------------------


def four(mine, together):
    """Two times four updates, at once or one by one."""
    noise, found = drawn(mine, 8, 8), []
    batch = transitions(64)
    for start in (0, 4):
        if together:
            rows = {k: v[start : start + 4] for k, v in noise.items()}
            found.append(mine.run(part(batch, slice(8 * start, 8 * start + 32)), rows, 4))
        else:
            for i in range(start, start + 4):
                rows = {k: v[i : i + 1] for k, v in noise.items()}
                found.append(mine.run(part(batch, slice(8 * i, 8 * i + 8)), rows, 1))
    return {k: torch.cat([f[k] for f in found if k in f]) for k in {k for f in found for k in f}}


@pytest.mark.parametrize("name,settings", [("sac", {}), ("td3", {"policy_delay": 3}), ("mdpo_off", {})])
def test_four_updates_at_once_equal_four_single_ones_bit_for_bit(name, settings):
    a, b = (learner(name, learning_rate=1e-2, **settings) for _ in range(2))
    at_once, single = four(a, True), four(b, False)
    assert a.updates == b.updates == 8
    assert all(torch.equal(a.state[k], b.state[k]) for k in a.state)
    assert at_once.keys() == single.keys() and all(torch.equal(at_once[k], single[k]) for k in single)
    assert len(single["critic_loss"]) == 8 and len(single["actor_loss"]) == (2 if name == "td3" else 8)


@pytest.mark.slow
def test_compiled_updates_equal_eager_ones():
    """One compilation of one SAC update, which takes a minute or more."""
    eager, quick = learner("sac", learning_rate=1e-3), learner("sac", learning_rate=1e-3, compile=True)
    expected, found = four(eager, False), four(quick, False)
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-4, atol=1e-6)
    for name in eager.state:
        torch.testing.assert_close(quick.state[name], eager.state[name], rtol=1e-4, atol=1e-6)


def test_parts_of_a_batch_are_rows_of_everything_in_it():
    batch = transitions(6)._replace(obs={"a": torch.arange(6), "b": torch.arange(12).view(6, 2)})
    batch = batch._replace(extras={"p": torch.arange(6.0)})
    middle = part(batch, slice(2, 4))
    assert isinstance(middle, Transitions)
    assert middle.obs["a"].tolist() == [2, 3] and middle.obs["b"].tolist() == [[4, 5], [6, 7]]
    assert middle.extras["p"].tolist() == [2.0, 3.0] and torch.equal(middle.reward_t, batch.reward_t[2:4])


def test_cuda_graphs_without_cuda_are_refused():
    with pytest.raises(ConfigError, match="cuda"):
        learner("sac", cudagraphs=True)
