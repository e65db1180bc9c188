"""The run of MOPO: the fit, the sets of rollouts, what is mixed, and resuming."""

import dataclasses
import logging

import numpy as np
import pytest
import torch
from contracts.test_methods import KillAt, Killed, lines
from helpers.agents import NOISY, Recorder, assert_same_tensors, quiet
from helpers.offline import recorded, trace, watch
from test_mopo import WARNING, make

from ctrlrl import api
from ctrlrl.data import d4rl
from ctrlrl.engine import checkpoint
from ctrlrl.types import EnvSpec

# -- the run ---------------------------------------------------------------------------------------


def test_the_model_is_fitted_first_an_epoch_to_an_iteration():
    seen = Recorder()
    agent = make(model_max_epochs=3, model_patience=9)
    assert agent.fit is not None
    before = agent.ensemble.body[0].weight.clone()
    quiet(agent, 6, callbacks=[seen])
    rows = seen.of("update")
    assert [step for step, _ in rows] == [0, 0, 0, 3, 6]
    for step, values in rows:
        names = {name for name in values if name.partition("/")[0] in ("model", "train", "augment")}
        if step == 0:
            assert names == {"model/train_loss", "model/held_out_error"}
        else:
            assert "train/critic_loss" in names and not any(name.startswith("model") for name in names)
    assert "augment/uncertainty" in rows[3][1] and rows[3][1]["augment/dropped"] >= 0.0
    assert agent.fit is None and agent.learner.updates == 6 and agent.iteration == 5
    assert not torch.equal(before, agent.ensemble.body[0].weight)


def test_a_later_training_goes_on_with_the_model_as_it_is():
    agent = quiet(make(), 6)
    fitted = {k: v.clone() for k, v in agent.ensemble.state_dict().items()}
    quiet(agent, 6)
    assert_same_tensors(fitted, dict(agent.ensemble.state_dict()))
    assert agent.iteration == 2 + 4 and agent.learner.updates == 12


def test_sets_are_made_as_often_as_asked_for_each_from_other_starts():
    agent = make(rollouts_every=6, rollout_length=1)
    agent._prepare()
    source, calls = agent.generated.source, []
    rows = source.rows

    def noted(policy, first, generator):
        steps = rows(policy, first, generator)
        calls.append((agent.steps, first, steps.obs))
        assert policy is agent.policy
        return steps

    source.rows = noted
    quiet(agent, 21)
    assert [(step, first) for step, first, _ in calls] == [(0, True), (6, False), (12, False), (18, False)]
    starts = [trace(agent.data, obs) for *_, obs in calls]  # raises where one is no recorded observation
    assert all(len(rows) == 12 for rows in starts) and not np.array_equal(starts[0], starts[1])


def test_of_each_batch_the_real_share_is_recorded_and_the_rest_rolled_out():
    agent = make(real_share=0.25, batch_size=40, rollout_length=1)
    seen = watch(agent)
    quiet(agent, 6)
    assert len(seen) == 6
    for batch in seen:
        rows = trace(agent.data, batch.obs)
        known = np.isclose(batch.action.numpy(), agent.data.actions[rows], atol=1e-6).all(1)
        rewarded = np.isclose(batch.reward_t.numpy(), agent.data.rewards[rows], atol=1e-5)
        assert (known & rewarded).sum() == 10 and not (known[:30] & rewarded[:30]).any()


def test_the_model_sees_the_environments_own_rewards_and_the_learner_scaled_ones():
    data = recorded()
    data = dataclasses.replace(data, rewards=np.full_like(data.rewards, 2.0))
    agent = quiet(make(data, reward_scale=10.0, reward_shift=-3.0, penalty=0.0), 3)
    torch.testing.assert_close(agent.ensemble.target_mean[-1], torch.tensor(2.0))
    made = agent.generated.replay.columns["reward"]
    assert made.mean().item() == pytest.approx(17.0, abs=8.0)  # 10 x 2 - 3; of rewards scaled twice it would be 167
    torch.testing.assert_close(agent._recorded(torch.arange(9)).reward, torch.full((9,), 2.0))


def test_the_penalty_lowers_what_is_learned_from():
    free, paid = (quiet(make(penalty=penalty), 3) for penalty in (0.0, 50.0))
    rewards = [agent.generated.replay.columns["reward"] for agent in (free, paid)]
    obs, action = (free.generated.replay.columns[k] for k in ("obs", "action"))
    unsure = free.ensemble.uncertainty(obs, action)
    torch.testing.assert_close(rewards[0] - rewards[1], 50.0 * unsure, rtol=1e-3, atol=1e-3)
    assert free.world_model.penalty == 0.0 and paid.world_model.penalty == 50.0


def at_once(obs, action, following):
    return torch.ones(len(obs), dtype=torch.bool)


def test_rollouts_end_where_the_users_function_says():
    path = f"{__name__}:at_once"
    whole, cut = (quiet(make(rollout_length=4, **ends), 3).generated.replay for ends in ({}, {"model_ends": path}))
    assert 40 < len(whole) <= 48 and not whole.columns["terminated"].any()
    assert len(cut) == 12 and cut.columns["terminated"].all()
    with pytest.raises(ValueError, match="termination function"):
        quiet(make(model_ends="no.such:thing"), 3)


def test_that_ends_are_not_known_is_said_where_it_matters(caplog):
    endless = recorded()
    endless = dataclasses.replace(
        endless, terminals=np.zeros_like(endless.terminals), timeouts=endless.terminals | endless.timeouts
    )
    known = recorded(env=None)
    known = dataclasses.replace(known, info=dataclasses.replace(known.info, env=EnvSpec("HalfCheetah-v2")))
    for data, settings, said in (
        (recorded(), {}, True), (recorded(env=None), {}, True), (endless, {}, False),
        (recorded(), {"model_ends": "none"}, False), (recorded(), {"model_ends": f"{__name__}:at_once"}, False),
        (known, {}, False),
    ):  # fmt: skip
        caplog.clear()
        agent = make(data, **settings)
        with caplog.at_level(logging.WARNING, "ctrlrl"):
            agent._prepare()
        assert (WARNING in caplog.text) == said, settings


# -- stopped, resumed, loaded ----------------------------------------------------------------------

RUN = {"model_max_epochs": 13, "model_patience": 13, "eval_every": 12, "eval_episodes": 2, "rollouts_every": 7}


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "toy.hdf5"
    d4rl.write(recorded(), path)
    return path


def test_killed_in_the_fit_and_after_it_and_resumed_equals_never_killed(file, tmp_path):
    """Thirteen epochs and fourteen iterations; borders after ten and twenty."""
    quiet(make(file, NOISY, 3, **RUN), 42, root=None, run_dir=tmp_path / "whole")
    for k, kill in enumerate([KillAt(4), KillAt(12), KillAt(23)]):
        with pytest.raises(Killed):
            if k == 0:
                quiet(make(file, NOISY, 3, **RUN), 42, run_dir=tmp_path / "run", callbacks=[kill])
            else:
                agent = api.load(tmp_path / "run")
                assert agent.fit is not None and agent.fit.epochs == (0, 0, 10)[k]
                agent.resume(tmp_path / "run", progress=False, tensorboard=False, callbacks=[kill])
    agent = api.load(tmp_path / "run")
    assert agent.fit is None and agent.iteration == 20
    agent.resume(tmp_path / "run", progress=False, tensorboard=False)
    for name in ("last", "best"):
        found, expected = (checkpoint.read(tmp_path / k / f"checkpoints/{name}.safetensors") for k in ("run", "whole"))
        assert found[1] == expected[1]
        assert_same_tensors(found[0], expected[0])
    # epochs that were repeated stand twice in the log: all are of one step
    found, expected = (
        {r["time/iterations"]: r for r in lines(tmp_path / k / "metrics.jsonl") if "time/iterations" in r}
        for k in ("run", "whole")
    )
    assert found == expected and len(expected) == 27


def test_what_was_saved_is_loaded_without_the_data_in_the_fit_and_after_it(file, tmp_path):
    copied = tmp_path / "toy.hdf5"
    copied.write_bytes(file.read_bytes())
    agent = make(copied, **RUN)
    with pytest.raises(Killed):
        quiet(agent, 3, callbacks=[KillAt(2)])
    agent.save(tmp_path / "early")
    quiet(agent, 3)
    agent.save(tmp_path / "late")
    copied.unlink()
    early, late = (api.load(tmp_path / name) for name in ("early", "late"))
    assert early.fit.epochs == 2 and late.fit is None
    assert_same_tensors(late.tensors(), agent.tensors())
    start, act = torch.randn(4, 3), lambda obs, t: obs[:, :1].clamp(-1, 1)
    a, b = (x.world_model.open_loop(act, start, 5, torch.Generator().manual_seed(0)) for x in (agent, late))
    assert a.next_obs.shape == (4, 5, 3) and torch.equal(a.next_obs, b.next_obs)


def test_rows_in_files_are_the_same_rows(file, tmp_path):
    a, b = (
        quiet(make(file, memory_map=mapped, checkpoint_every=3, **{"rollouts_every": 3}), 9, run_dir=tmp_path / str(k))
        for k, mapped in enumerate((False, True))
    )
    assert_same_tensors(a.tensors(), b.tensors())
    quiet(a, 3)
    quiet(b, 3)
    assert_same_tensors(a.tensors(), b.tensors())
