"""The optimiser step: against torch's own Adam, compiled against eager, split against whole."""

import dataclasses
from dataclasses import dataclass

import gymnasium as gym
import numpy as np
import pytest
import torch
from torch import nn

from ctrlrl.data.rows import shuffled
from ctrlrl.engine.config import ConfigError, build
from ctrlrl.engine.graphs import CudaGraph, compiler_available
from ctrlrl.engine.update import Updater
from ctrlrl.losses import base
from ctrlrl.losses.ppo import PPO
from ctrlrl.nets.actor_critic import ActorCritic
from ctrlrl.types import SequenceBatch

OBS, ACT = gym.spaces.Box(-np.inf, np.inf, (7,)), gym.spaces.Box(-1.0, 1.0, (3,))


def make(name="ppo", rows=96, compile=False, seed=0, loss=None, **settings):
    config, built = build(base.get(name), settings)
    loss = loss or built
    torch.manual_seed(seed)
    policy = ActorCritic(OBS, ACT, config.network, loss.critics)
    g = torch.Generator().manual_seed(seed + 1)
    obs, action = torch.randn(rows, 1, 7, generator=g), torch.randn(rows, 1, 3, generator=g)
    with torch.no_grad():
        out = policy(obs, action)
    target = torch.randn(rows, 1, generator=g)
    batch = SequenceBatch(
        obs, action, torch.ones(rows, 1, dtype=torch.bool), out.logp, target - out.values["value"], target,
        out.values["value"], dist_old={k: v.clone() for k, v in out.dist.params().items()},
    )  # fmt: skip
    knobs = {"learning_rate": torch.tensor(3e-4), "step_size": torch.tensor(0.7), "dual": torch.tensor(1.0)}
    updater = Updater(policy, loss, config, compile)
    return policy, updater, batch, knobs


def run(updater, batch, knobs, times=1):
    generator = torch.Generator().manual_seed(5)
    for _ in range(times):
        metrics = updater.run(batch, knobs, generator)
        updater.accept()
    return metrics


def test_equals_a_plain_torch_loop_with_adam_and_clip_grad_norm():
    policy, updater, batch, knobs = make(batch_size=32, epochs=2, value_coef=0.5, entropy_coef=0.01, max_grad_norm=0.3)
    reference = ActorCritic(OBS, ACT)
    reference.load_state_dict(policy.state_dict())
    run(updater, batch, knobs)
    optimiser = torch.optim.Adam(reference.parameters(), lr=3e-4, eps=1e-5)
    generator = torch.Generator().manual_seed(5)
    for _ in range(2):
        order = torch.randperm(96, generator=generator)
        for index in order.split(32):
            out = reference(batch.obs[index], batch.action[index])
            advantage = batch.advantage[index]
            advantage = (advantage - advantage.mean()) / (advantage.std() + 1e-8)
            r = (out.logp - batch.logp_old[index]).exp()
            surrogate = torch.min(r * advantage, r.clamp(0.8, 1.2) * advantage).mean()
            value = ((out.values["value"] - batch.value_target[index]) ** 2).mean()
            optimiser.zero_grad()
            (-surrogate + 0.5 * value - 0.01 * out.entropy.mean()).backward()
            nn.utils.clip_grad_norm_(reference.parameters(), 0.3)
            optimiser.step()
    for ours, theirs in zip(policy.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, atol=2e-6, rtol=0)


@pytest.mark.skipif(not compiler_available(), reason="torch.compile needs a C++ compiler")
@pytest.mark.parametrize("name", ["ppo", *(pytest.param(name, marks=pytest.mark.slow) for name in ("bpo", "mdpo"))])
def test_compiled_agrees_with_eager(name):
    settings = {"epochs": 2} if name == "mdpo" else {"batch_size": 32, "epochs": 2, "target_kl": 0.5}
    settings |= {"value_batch_size": 48} if name == "mdpo" else {}
    results = []
    for compile in (False, True):
        policy, updater, batch, knobs = make(name, compile=compile, steps_per_graph=2, **settings)
        metrics = run(updater, batch, knobs, times=2)
        results.append((updater.flat.flat.clone(), {k: v.mean() for k, v in metrics.items()}))
    torch.testing.assert_close(results[0][0], results[1][0], atol=2e-6, rtol=0)
    for key in results[0][1]:
        torch.testing.assert_close(results[0][1][key], results[1][1][key], atol=1e-4, rtol=1e-3)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("compile", [False, True])
@pytest.mark.parametrize("name", ["ppo", "bpo", "mdpo"])
def test_cuda_graph_agrees_with_eager(name, compile):
    results = []
    for cudagraphs in (False, True):
        config, loss = build(base.get(name), {"batch_size": 32, "epochs": 2, "cudagraphs": cudagraphs})
        _, _, batch, knobs = make(name, batch_size=32, epochs=2)
        torch.manual_seed(0)
        policy = ActorCritic(OBS, ACT, critics=loss.critics).cuda()
        updater = Updater(policy, loss, config, compile and cudagraphs)
        cuda = torch.utils._pytree.tree_map(lambda x: x.cuda() if isinstance(x, torch.Tensor) else x, (batch, knobs))
        run(updater, *cuda, times=2)
        results.append(updater.flat.flat.cpu())
    torch.testing.assert_close(results[0], results[1], atol=5e-6, rtol=0)


def test_cuda_graph_is_refused_without_a_gpu():
    if torch.cuda.is_available():
        pytest.skip("this machine has one")
    with pytest.raises(ConfigError, match="needs a CUDA device"):
        make(cudagraphs=True)
    assert CudaGraph(lambda *a: a).graphs == {}


@pytest.mark.parametrize("name", [n for n in base.names() if base.get(n).needs <= {"values", "dist_old"}])
def test_micro_batches_change_nothing(name):
    settings = {"value_epochs": None, "value_batch_size": None} if name == "mdpo" else {}
    flats = []
    for parts in (1, 3):
        _, updater, batch, knobs = make(name, batch_size=48, epochs=1, micro_batches=parts, **settings)
        run(updater, batch, knobs)
        flats.append(updater.flat.flat.clone())
    torch.testing.assert_close(flats[0], flats[1], atol=2e-6, rtol=0)


def test_target_kl_stops_the_update_but_keeps_the_steps_before_it():
    _, free, batch, knobs = make(batch_size=32, epochs=5)
    knobs["learning_rate"] = torch.tensor(0.01)
    start = free.flat.flat.clone()
    everything = run(free, batch, knobs)
    _, stopped, batch, knobs = make(batch_size=32, epochs=5, target_kl=1e-3)
    knobs["learning_rate"] = torch.tensor(0.01)
    metrics = run(stopped, batch, knobs)
    kls = everything["approx_kl"]
    first = int((kls > 1.5e-3).nonzero()[0])
    assert 0 < first < 15
    assert int(stopped.state.clock[0]) == first, "exactly the steps before the first excess are taken"
    assert len(metrics["approx_kl"]) < len(kls)
    assert not torch.equal(stopped.flat.flat, start)
    assert bool(stopped.state._replace(alive=torch.tensor(True)).alive)


def test_once_stopped_an_update_stays_stopped():
    # a later batch may have a small KL again (here 0: nothing has moved), which must not wake the update up
    _, updater, batch, knobs = make(batch_size=None, target_kl=1.0)
    (step,) = updater.steps.values()
    stopped = updater.state._replace(alive=torch.tensor(False))
    after, metrics = step(stopped, batch, knobs)
    assert metrics["approx_kl"] < 1e-6 and not after.alive
    torch.testing.assert_close(after.params, stopped.params, atol=0, rtol=0)
    assert step(updater.state, batch, knobs)[0].alive


def test_separate_value_phase_leaves_the_other_parameters_alone():
    policy, updater, batch, knobs = make("mdpo", epochs=1)
    before = {k: v.clone() for k, v in policy.named_parameters()}
    updater.steps = {"value": updater.steps["value"]}
    run(updater, batch, knobs)
    changed = {k for k, v in policy.named_parameters() if not torch.equal(v, before[k])}
    assert changed and all(k.startswith("critics.") for k in changed)
    assert updater.state.clock.tolist() == [0.0, 5.0]
    policy, updater, batch, knobs = make("mdpo", epochs=3)
    before = {k: v.clone() for k, v in policy.named_parameters()}
    updater.steps = {"policy": updater.steps["policy"]}
    run(updater, batch, knobs)
    changed = {k for k, v in policy.named_parameters() if not torch.equal(v, before[k])}
    assert changed and not any(k.startswith("critics.") for k in changed)
    assert updater.state.clock.tolist() == [3.0, 0.0]


def test_value_clip_bounds_the_step_of_the_value():
    policy, updater, batch, knobs = make(epochs=1, batch_size=None, value_clip=1e-9)
    # every prediction is beyond the clip after one step away, so a second pass has the larger, clipped error
    metrics = run(updater, batch, knobs, times=2)
    error = ((batch.value_old - batch.value_target) ** 2).mean()
    assert metrics["value_loss"].mean() >= error - 1e-6


@dataclass(frozen=True)
class Halved(PPO):
    """A loss that acts on the gradient: g / 2 + 0 x the gradient of another objective."""

    def grad_transform(self, grad, gradient_of, knobs):
        other = gradient_of(lambda batch, out: out.logp)
        assert other.shape == grad.shape and other.abs().max() > 0
        return 0.5 * grad


def test_a_loss_may_act_on_the_gradient():
    norms = []
    for loss in (PPO(), Halved()):
        _, updater, batch, knobs = make(loss=loss, batch_size=None, epochs=1, max_grad_norm=None)
        norms.append(float(run(updater, batch, knobs)["grad_norm"][0]))
    assert norms[1] == pytest.approx(norms[0] / 2, rel=1e-6)


@dataclass(frozen=True)
class Paired(PPO):
    """A pairwise loss: neighbours of one group are compared, so rows of a group must stay together."""

    needs = frozenset({"values", "groups"})

    def together(self, batch):
        return batch.group

    def loss(self, batch, out, knobs):
        sums = super().loss(batch, out, knobs)
        assert batch.group.unique(return_counts=True)[1].eq(4).all(), "a group was torn apart"
        return sums


def test_rows_of_a_group_stay_together():
    _, updater, batch, knobs = make(loss=Paired(), batch_size=32, epochs=2, micro_batches=2)
    run(updater, batch._replace(group=torch.arange(96) % 24), knobs)
    with pytest.raises(ValueError, match="would split groups"):
        shuffled(96, torch.arange(96) // 4, 30, torch.Generator())


def test_non_finite_updates_are_not_taken():
    policy, updater, batch, knobs = make(batch_size=32, epochs=1)
    before = updater.flat.flat.clone()
    bad = batch.value_target.clone()
    bad[7] = torch.nan
    metrics = updater.run(batch._replace(value_target=bad), knobs, torch.Generator().manual_seed(0))
    assert not metrics["value_loss"].isfinite().all()
    torch.testing.assert_close(updater.flat.flat, before, atol=0, rtol=0)
    assert dataclasses.is_dataclass(updater.config)
