"""Episodes in groups that share their start."""

from __future__ import annotations

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium.vector import AutoresetMode, SyncVectorEnv
from helpers import envs
from helpers.policies import FeedbackPolicy, NoisePolicy, gen

from ctrlrl.engine.collector import Collector, next_values
from ctrlrl.engine.errors import NonFiniteError
from ctrlrl.engine.replay import replay
from ctrlrl.types import EnvSpec


def noisy(n_envs: int, backend: str = "sync", policy=None) -> Collector:
    return Collector(EnvSpec(envs.env_id("Noisy"), n_envs=n_envs, backend=backend), policy or FeedbackPolicy(), 4)


def alone(seed: int, actions: np.ndarray) -> tuple[list, list]:
    env = envs.Noisy()
    obs, rewards = [env.reset(seed=seed)[0].copy()], []
    for a in actions:
        o, r, terminated, truncated, _ = env.step(a)
        obs.append(o)
        rewards.append(r)
        if terminated or truncated:
            break
    return obs, rewards


@pytest.mark.parametrize(("n_envs", "backend"), [(1, "sync"), (3, "sync"), (20, "sync"), (4, "async")])
def test_every_episode_is_what_it_would_be_alone(n_envs, backend):
    collector = noisy(n_envs, backend, NoisePolicy())
    c = collector.collect_groups(4, 3, [11, 12, 13, 11], max_steps=15, generator=gen())
    collector.close()
    assert c.group.tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3]
    lengths = c.valid_t.sum(0)
    assert c.obs.shape[0] == lengths.max() and len(set(lengths.tolist())) > 1
    for k in range(12):
        obs, rewards = alone([11, 12, 13, 11][k // 3], c.action[:, k].clamp(-1, 1).numpy())
        n = int(lengths[k])
        assert n == min(len(rewards), 15)
        assert np.array_equal(c.obs[:n, k].numpy(), obs[:n]) and np.array_equal(c.last_obs[k].numpy(), obs[n])
        np.testing.assert_allclose(c.reward_t[:n, k].numpy(), rewards[:n], rtol=1e-6)
        assert c.episodes[k] == (pytest.approx(sum(rewards[:n])), n)
        assert bool(c.terminated_t[n - 1, k]) != bool(c.truncated_t[n - 1, k])
        assert not c.valid_t[n:, k].any() and c.valid_t[:n, k].all()
        assert not (c.terminated_t | c.truncated_t)[n:, k].any()
    assert torch.equal(c.obs[0, 0], c.obs[0, 2]) and torch.equal(c.obs[0, 0], c.obs[0, 9])
    assert not torch.equal(c.obs[0, 0], c.obs[0, 3]) and not torch.equal(c.action[0, 0], c.action[0, 1])


def test_the_number_of_environments_does_not_matter():
    runs = [noisy(n).collect_groups(5, 2, [1, 2, 3, 4, 5], 20, gen(1)) for n in (1, 3, 16)]
    for other in runs[1:]:
        assert torch.equal(runs[0].obs, other.obs) and torch.equal(runs[0].reward_t, other.reward_t)
        assert sorted(runs[0].final_n.tolist()) == sorted(other.final_n.tolist())


def test_values_at_the_ends_and_rows():
    c = Collector(EnvSpec(envs.env_id("OnlyTruncates"), {"length": 3}, n_envs=2), NoisePolicy(), 4).collect_groups(
        2, 2, [0, 1], max_steps=10, generator=gen()
    )
    value, value_t = next_values(lambda o: o[:, 0], c)
    assert value_t[2].tolist() == c.last_obs[:, 0].tolist() and (value_t[:2] == value[1:]).all()
    batch = c.rollout(value=value, value_t=value_t).episodes()
    assert batch.group.tolist() == [0, 0, 1, 1] and batch.sequence_return.tolist() == [6.0] * 4
    assert batch.mask.all() and batch.obs.shape == (4, 3, 1)


def test_max_steps_truncates():
    c = Collector(EnvSpec(envs.env_id("OnlyTerminates"), {"length": 5}, n_envs=2), NoisePolicy(), 4).collect_groups(
        3, 1, [0, 1, 2], max_steps=2, generator=gen()
    )
    assert c.truncated_t[1].all() and not c.terminated_t.any() and [k for _, k in c.episodes] == [2, 2, 2]
    assert len(c.final_obs) == 3


def test_the_registered_limit_is_the_default():
    spec = EnvSpec("Pendulum-v1", n_envs=2, backend="sync")
    c = Collector(spec, NoisePolicy(), 4).collect_groups(1, 2, [0], generator=gen())
    assert [k for _, k in c.episodes] == [200, 200]
    with pytest.raises(ValueError, match="give max_steps"):
        noisy(2).collect_groups(1, 2, [0])


def test_dict_observations():
    collector = Collector(EnvSpec(envs.env_id("DictObs"), {"length": 3}, n_envs=2), FeedbackPolicy(), 4)
    c = collector.collect_groups(2, 2, [0, 1], max_steps=10, generator=gen())
    assert c.obs["image"].shape == (3, 4, 2, 2, 1) and c.last_obs["mode"].tolist() == [3] * 4
    assert c.rollout().episodes().obs["vector"].shape == (4, 3, 1)


def test_collecting_goes_on_undisturbed():
    a, b = noisy(3), noisy(3)
    a.collect(gen(0))
    b.collect(gen(0))
    a.collect_groups(2, 2, [0, 1], 10, gen())
    assert torch.equal(a.collect(gen(1)).obs, b.collect(gen(1)).obs)


def test_parameters_reach_the_groups():
    collector = Collector(EnvSpec(envs.env_id("ParametricToy"), {"length": 2}, n_envs=2), NoisePolicy(), 4)
    collector.set_params({"gain": 7.0})
    assert collector.collect_groups(1, 2, [0], 5, gen()).reward_t.eq(7).all()
    collector.set_params([{"gain": 7.0}, {"gain": 8.0}])
    with pytest.raises(ValueError, match="same parameters"):
        collector.collect_groups(1, 2, [0], 5, gen())


def test_refusals():
    with pytest.raises(ValueError, match="2 seeds for 3 groups"):
        noisy(2).collect_groups(3, 2, [0, 1], 5)
    with pytest.raises(ValueError, match="at least 1"):
        noisy(2).collect_groups(1, 0, [0], 5)
    with pytest.raises(ValueError, match="DISABLED"):
        Collector(envs.Noisy(), NoisePolicy(), 4).collect_groups(1, 2, [0], 5)


def test_a_live_vector_environment_with_autoreset_disabled():
    live = SyncVectorEnv([envs.Noisy] * 3, autoreset_mode=AutoresetMode.DISABLED)
    c = Collector(live, FeedbackPolicy(), 4).collect_groups(4, 2, [1, 2, 3, 4], 12, gen(1))
    own = noisy(3).collect_groups(4, 2, [1, 2, 3, 4], 12, gen(1))
    assert torch.equal(c.obs, own.obs) and torch.equal(c.valid_t, own.valid_t)


def test_non_finite_values_are_replayed(tmp_path):
    spec = EnvSpec(envs.env_id("NaNAt"), {"step": 3}, n_envs=2)
    with pytest.raises(NonFiniteError, match="reward in environment 0, step 3 ") as caught:
        Collector(spec, NoisePolicy(), 4, dump_dir=tmp_path).collect_groups(1, 2, [5], 6, gen())
    again = replay(caught.value.dump)
    assert np.isnan(again.rewards[3]) and again.rewards[:3].tolist() == [1, 2, 3]


def test_envpool_is_refused():
    pytest.importorskip("envpool")
    with pytest.raises(ValueError, match="use backend='sync'"):
        Collector(EnvSpec("Hopper-v5", n_envs=2, backend="envpool"), NoisePolicy(3), 4).collect_groups(1, 2, [0])
    assert "Hopper-v5" in gym.registry
