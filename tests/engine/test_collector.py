"""The collector: every number of a rollout worked out by hand, for every autoreset mode."""

from __future__ import annotations

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium.vector import AsyncVectorEnv, AutoresetMode, SyncVectorEnv
from helpers import envs
from helpers.policies import FeedbackPolicy, NoisePolicy, gen

from ctrlrl.engine.collector import Collector, border_seeds, next_values
from ctrlrl.engine.errors import NonFiniteError, ObservationError
from ctrlrl.engine.replay import replay
from ctrlrl.types import EnvSpec

N = 2


def make(source: str, name: str, n_steps: int, length: int = 3, policy=None, **kwargs) -> Collector:
    """A collector on ``name``, from a spec or from Gymnasium's own vector environments in the given mode."""
    kind, _, mode = source.partition(":")
    if kind == "spec":
        env = EnvSpec(envs.env_id(name), {"length": length}, n_envs=N, backend=mode)
    else:
        cls = SyncVectorEnv if kind == "gym" else AsyncVectorEnv
        env = cls([lambda: getattr(envs, name)(length)] * N, autoreset_mode=AutoresetMode[mode])
    return Collector(env, policy or NoisePolicy(), n_steps, **kwargs)


def column(x, n: int = 0):
    return x[:, n].reshape(len(x)).tolist()


def identity(obs):
    return obs.flatten(1)[:, 0]


AT_ONCE = ["spec:sync", "spec:async", "gym:SAME_STEP", "gym:DISABLED", "gym-async:SAME_STEP", "gym-async:DISABLED"]


@pytest.mark.parametrize("source", AT_ONCE)
def test_truncation_with_reset_at_once(source):
    collector = make(source, "OnlyTruncates", 5)
    try:
        c = collector.collect(gen())
        value, value_t = next_values(identity, c)
        for n in range(N):
            assert column(c.obs, n) == [10, 11, 12, 20, 21]
            assert column(c.reward_t, n) == [1, 2, 3, 1, 2]
            assert column(c.truncated_t, n) == [False, False, True, False, False]
            assert not c.terminated_t.any() and c.valid_t.all()
            assert column(value, n) == [10, 11, 12, 20, 21]
            assert column(value_t, n) == [11, 12, 13, 21, 22]
        assert c.last_obs.tolist() == [[22], [22]]
        assert c.final_t.tolist() == [2, 2] and c.final_n.tolist() == [0, 1] and c.final_obs.tolist() == [[13], [13]]
        assert c.episodes == [(6.0, 3)] * N
        c = collector.collect(gen())
        assert column(c.obs) == [22, 30, 31, 32, 40]
        assert column(c.reward_t) == [3, 1, 2, 3, 1]
        assert column(next_values(identity, c)[1]) == [23, 31, 32, 33, 41]
        assert c.episodes == [(6.0, 3)] * (2 * N)
    finally:
        collector.close()


@pytest.mark.parametrize("source", ["gym:NEXT_STEP", "gym-async:NEXT_STEP"])
def test_truncation_with_reset_in_the_next_step(source):
    collector = make(source, "OnlyTruncates", 5)
    c = collector.collect(gen())
    assert column(c.obs) == [10, 11, 12, 13, 20]
    assert column(c.reward_t) == [1, 2, 3, 0, 1]
    assert column(c.valid_t) == [True, True, True, False, True]
    assert column(c.truncated_t) == [False, False, True, False, False]
    value_t = next_values(identity, c)[1]
    assert [v for v, ok in zip(column(value_t), column(c.valid_t), strict=True) if ok] == [11, 12, 13, 21]
    assert c.episodes == [(6.0, 3)] * N
    collector.env.close()


def test_the_reset_step_is_masked_across_the_rollout_border():
    collector = make("gym:NEXT_STEP", "OnlyTruncates", 3)
    first, second, third = (collector.collect(gen()) for _ in range(3))
    assert column(first.obs) == [10, 11, 12] and first.valid_t.all() and first.last_obs[0] == 13
    assert column(next_values(identity, first)[1]) == [11, 12, 13]
    assert column(second.obs) == [13, 20, 21] and column(second.valid_t) == [False, True, True]
    assert column(second.reward_t) == [0, 1, 2] and second.episodes == []
    assert column(third.obs) == [22, 23, 30] and column(third.valid_t) == [True, False, True]
    assert third.episodes == [(6.0, 3)] * N


@pytest.mark.parametrize("source", [*AT_ONCE, "gym:NEXT_STEP"])
@pytest.mark.parametrize("name", ["OnlyTerminates", "BothAtOnce"])
def test_no_bootstrap_where_it_terminated(source, name):
    collector = make(source, name, 5)
    c = collector.collect(gen())
    collector.close()
    assert column(c.terminated_t) == [False, False, True, False, False]
    assert not c.truncated_t.any() and len(c.final_t) == 0 and len(c.final_obs) == 0
    assert column(next_values(identity, c)[1])[:3] == [11, 12, 0]


def test_actions_reach_their_environment_unchanged_by_later_ones():
    collector = Collector(EnvSpec(envs.env_id("ActionEcho"), n_envs=3), NoisePolicy(), 4)
    c = collector.collect(gen(3))
    sent = c.action.clamp(-1, 1)
    assert torch.equal(c.obs[1:], sent[:-1]) and torch.equal(c.last_obs, sent[-1])
    assert torch.equal(c.reward_t, sent[..., 0])
    assert torch.equal(c.action, NoisePolicy().noise(4, 3, gen(3)))
    kept = c.obs.clone()
    collector.collect(gen(4))
    assert torch.equal(c.obs, kept), "a later rollout overwrote an earlier one"


def test_discrete_actions_and_start():
    collector = Collector(EnvSpec(envs.env_id("Choice"), n_envs=2), NoisePolicy(choices=3, start=5), 6)
    c = collector.collect(gen())
    assert c.action.dtype == torch.int64 and c.action.shape == (6, 2)
    assert torch.equal(c.reward_t, (c.action + 5).float())


@pytest.mark.parametrize("source", ["spec:sync", "spec:async", "gym:SAME_STEP", "gym:DISABLED", "gym:NEXT_STEP"])
def test_dict_observations(source):
    collector = make(source, "DictObs", 4)
    c = collector.collect(gen())
    collector.close()
    assert c.obs["image"].shape == (4, N, 2, 2, 1) and c.obs["image"].dtype == torch.uint8
    assert c.obs["vector"].dtype == torch.float32 and c.obs["mode"].dtype == torch.int64
    assert column(c.obs["vector"])[:3] == [10, 11, 12] and c.obs["image"][2, 0].unique().tolist() == [12]
    assert column(next_values(lambda o: o["vector"][:, 0], c)[1])[:3] == [11, 12, 13]
    assert column(next_values(lambda o: o["image"].float().mean((1, 2, 3)), c)[1])[:3] == [11, 12, 13]


def test_images_stay_bytes():
    collector = make("spec:sync", "Image", 4)
    c = collector.collect(gen())
    assert c.obs.dtype == torch.uint8 and c.obs.shape == (4, N, 3, 4, 4)
    assert c.final_obs.dtype == torch.uint8 and c.final_obs[0].unique().tolist() == [13]


def test_a_single_live_environment():
    collector = Collector(envs.OnlyTruncates(2), NoisePolicy(), 3)
    c = collector.collect(gen())
    assert column(c.obs) == [10, 11, 20] and column(next_values(identity, c)[1]) == [11, 12, 21]


def test_a_vector_environment_must_declare_its_autoreset():
    env = SyncVectorEnv([lambda: envs.OnlyTruncates(2)])
    env.metadata = {k: v for k, v in env.metadata.items() if k != "autoreset_mode"}
    with pytest.raises(ValueError, match=r"metadata\['autoreset_mode'\] is None.*SAME_STEP"):
        Collector(env, NoisePolicy(), 3)


# -- borders --------------------------------------------------------------------------------------


def noisy(backend: str = "sync", n: int = 3, **kwargs) -> Collector:
    return Collector(EnvSpec(envs.env_id("Noisy"), n_envs=n, backend=backend), FeedbackPolicy(), 16, **kwargs)


def same(a, b) -> bool:
    skip = ("simulation_s", "group")
    return all(
        torch.equal(x, y) if isinstance(x, torch.Tensor) else x == y
        for k, x, y in zip(a._fields, a, b, strict=True)
        if k not in skip
    )


def test_everything_after_a_border_is_a_function_of_seed_and_border():
    a, b = noisy(seed=1), noisy(seed=99)
    for k in range(3):
        a.collect(gen(k))
    for collector in (a, b):
        collector.border(7, 4)
    for k in range(3):
        x, y = a.collect(gen(k)), b.collect(gen(k))
        assert same(x, y)
    a.border(7, 5)
    assert not torch.equal(a.collect(gen(0)).obs, x.obs)


def test_a_live_environment_restarts_at_a_border():
    live = [gym.make(envs.env_id("Noisy"), disable_env_checker=True) for _ in range(2)]
    a, b = (Collector(e, FeedbackPolicy(), 16) for e in live)
    a.collect(gen(5))
    for collector in (a, b):
        collector.border(7, 4)
    assert same(a.collect(gen()), b.collect(gen()))


def test_async_equals_sync_bit_for_bit():
    a, b = noisy("sync"), noisy("async")
    for k in range(4):
        assert same(a.collect(gen(k)), b.collect(gen(k)))
    b.close()


def test_lean_equals_gymnasiums_own():
    spec = noisy()
    own = SyncVectorEnv([envs.Noisy] * 3, autoreset_mode=AutoresetMode.SAME_STEP)
    other = Collector(own, FeedbackPolicy(), 16)
    truncations = 0
    for k in range(6):
        x, y = spec.collect(gen(k)), other.collect(gen(k))
        assert same(x, y)
        truncations += len(x.final_t)
    assert truncations > 5


def test_episodes_cut_by_a_border_are_not_reported():
    collector = make("spec:sync", "OnlyTruncates", 2)
    assert collector.collect(gen()).episodes == []
    collector.border(0, 1)
    c = collector.collect(gen())
    assert c.episodes == [] and column(c.obs) == [10, 11]
    assert collector.collect(gen()).episodes == [(6.0, 3)] * N


def test_border_seeds_are_fixed():
    assert border_seeds(0, 0, 2) == border_seeds(0, 0, 5)[:2]
    assert all(0 <= s < 2**31 for s in border_seeds(3, 9, 100)) and len(set(border_seeds(3, 9, 100))) == 100
    assert border_seeds(0, 1, 2) != border_seeds(1, 0, 2)


@pytest.mark.parametrize("backend", ["sync", "async"])
def test_parameters_are_sticky(backend):
    collector = make(f"spec:{backend}", "ParametricToy", 4, length=2)
    assert column(collector.collect(gen()).reward_t) == [1, 1, 1, 1]
    collector.set_params([{"gain": 5.0}, {"gain": 6.0}])
    c = collector.collect(gen())
    assert column(c.reward_t, 0) == [5] * 4 and column(c.reward_t, 1) == [6] * 4
    collector.border(0, 1)
    assert column(collector.collect(gen()).reward_t, 1) == [6] * 4
    collector.set_params({"gain": 2.0})
    assert collector.collect(gen()).reward_t.unique().tolist() == [2]
    collector.close()


@pytest.mark.parametrize("backend", ["sync", "async"])
def test_parameters_of_an_environment_without_any(backend):
    collector = make(f"spec:{backend}", "OnlyTruncates", 2)
    collector.collect(gen())
    with pytest.raises(ValueError, match="has no set_params"):
        collector.set_params({"gain": 2.0})
    collector.collect(gen())
    collector.close()


# -- what can go wrong ----------------------------------------------------------------------------


@pytest.mark.parametrize("where", ["reward", "observation"])
@pytest.mark.parametrize("backend", ["sync", "async"])
def test_non_finite_is_found_dumped_and_replayed(tmp_path, where, backend):
    spec = EnvSpec(envs.env_id("NaNAt"), {"step": 21, "where": where}, n_envs=2, backend=backend)
    collector = Collector(spec, NoisePolicy(), 8, dump_dir=tmp_path)
    kept = [collector.collect(gen(k)) for k in range(2)]
    with pytest.raises(NonFiniteError, match=where) as caught:
        collector.collect(gen(2))
    error = caught.value
    assert (error.what, error.env_index, error.step) == (where, 0, 21) and error.dump.parent == tmp_path
    again = replay(error.dump)
    assert len(again.rewards) == 22 and len(again.obs) == 23 and again.what == where
    assert np.isfinite(again.rewards[:21]).all() and np.isfinite(again.obs[:22]).all()
    assert np.isnan(again.rewards[21] if where == "reward" else again.obs[22][0])
    seen = torch.cat([c.obs[:, 0, 0] for c in kept])
    assert torch.equal(torch.tensor(np.array(again.obs))[:16, 0].float(), seen)
    assert [p.name for p in tmp_path.iterdir()] == [error.dump.name]
    with pytest.raises(RuntimeError, match="border"):
        collector.collect(gen())
    collector.border(0, 1)
    collector.collect(gen())
    collector.close()


def test_non_finite_is_reported_also_where_the_environment_then_fails():
    spec = EnvSpec(envs.env_id("NaNAt"), {"step": 3, "fail": True}, n_envs=2)
    with pytest.raises(NonFiniteError, match="reward in environment 0, step 3 "):
        Collector(spec, NoisePolicy(), 8).collect(gen())


def test_errors_of_the_environment_pass_through():
    spec = EnvSpec(envs.env_id("NaNAt"), {"step": -2, "fail": True}, n_envs=2)
    with pytest.raises(RuntimeError, match="the simulation blew up"):
        Collector(spec, NoisePolicy(), 8).collect(gen())


def test_a_non_finite_final_observation_and_action():
    with pytest.raises(NonFiniteError, match="final observation in environment 0, step 2"):
        make("spec:sync", "NaNFinal", 5).collect(gen())

    class Broken(NoisePolicy):
        def to_env(self, obs, action):
            return torch.full_like(action, float("nan"))

    with pytest.raises(NonFiniteError, match="action in environment 0, step 0"):
        Collector(EnvSpec(envs.env_id("ActionEcho")), Broken(), 3).collect(gen())


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("backend", ["sync", "async"])
@pytest.mark.parametrize(("name", "found"), [("WrongShape", r"\(2,\)"), ("WrongKind", "float64")])
def test_observations_that_contradict_their_space(backend, name, found):
    collector = make(f"spec:{backend}", name, 2)
    with pytest.raises(ObservationError, match=f"{name}.*expected.*found {'.*' if found != 'float64' else ''}{found}"):
        collector.collect(gen())
    collector.close()


class OldNames(gym.vector.SyncVectorEnv):
    """A vector environment that resets within the step and keeps the last observation under another name."""

    def step(self, actions):
        obs, reward, terminated, truncated, infos = super().step(actions)
        if "final_obs" in infos:
            infos["final_observation"] = infos.pop("final_obs")
        return obs, reward, terminated, truncated, infos


def test_a_truncation_without_its_last_observation_is_refused():
    live = OldNames([lambda: envs.OnlyTruncates(length=3)], autoreset_mode=gym.vector.AutoresetMode.SAME_STEP)
    with pytest.raises(ValueError, match="no 'final_obs'"):
        Collector(live, NoisePolicy(), 5).collect(gen())
