"""How Decision Transformer acts: by the last steps, and towards a return."""

import numpy as np
import pytest
import torch
from helpers.agents import quiet
from helpers.envs import env_id
from helpers.offline import recorded
from helpers.trajectories import PAID, WIDTH, K, Paid, actor, dataset, make, steps

from ctrlrl import api
from ctrlrl.engine import wrappers
from ctrlrl.engine.wrappers import aimed, target_of
from ctrlrl.offline.decision_transformer_agent import DecisionTransformerAgent
from ctrlrl.types import EnvSpec

# -- by the last steps -----------------------------------------------------------------------------


def episode(length, seed=0):
    """Observations of a whole episode, step by step, as the wrapper tells them."""
    rng = np.random.default_rng(seed)
    return [
        {
            "observation": rng.normal(size=3).astype(np.float32),
            "return_to_go": rng.normal(size=1).astype(np.float32),
            "timestep": np.array([t]),
        }
        for t in range(length)
    ]


def acting():
    """An agent whose network is no longer as good as blind."""
    agent = make(dataset([3, 5]))
    agent.policy.load_state_dict(actor(timesteps=8).state_dict(), strict=False)
    return agent


def unit(action):
    return (torch.as_tensor(action) - torch.tensor([0, 1.5])) / torch.tensor([2, 1.5])


def test_step_by_step_it_acts_as_one_pass_over_the_last_steps():
    agent, seen = acting(), episode(7)
    state, actions = None, []
    for obs in seen:
        action, state = agent.predict(obs, state)
        assert action.shape == (2,) and agent.action_space.contains(action)
        actions.append(unit(action).float())
    apart = set()
    for t in range(7):
        first = max(0, t + 1 - K)
        window = seen[first : t + 1]
        obs = {k: torch.from_numpy(np.stack([o[k] for o in window])) for k in window[0]}
        there = torch.ones(1, len(window), dtype=torch.bool)
        with torch.no_grad():
            found = agent.policy(obs, torch.stack(actions[first : t + 1]), there)[0]
        torch.testing.assert_close(actions[t], found[-1], atol=2e-5, rtol=1e-4)
        if t == K - 1:  # within the first K steps one pass over the whole episode gives all of its actions
            torch.testing.assert_close(torch.stack(actions[:K]), found, atol=2e-5, rtol=1e-4)
        alone = unit(agent.predict(seen[t])[0])
        apart.add(bool((alone - actions[t]).abs().max() > 1e-3))
    assert apart == {True, False}  # what was before matters, but for the first step


def test_a_session_acts_as_predict_with_its_state_and_forgets_at_an_episodes_first_step():
    agent = acting()
    seen = [episode(9, 1), episode(4, 2) + episode(5, 3)]
    act, state, alone = agent.session(), None, [None, None]
    for t in range(9):
        both = {k: np.stack([s[t][k] for s in seen]) for k in seen[0][0]}
        found = act(both, np.array([0, 1 if t < 4 else 2]))
        batched, state = agent.predict(both, state)
        np.testing.assert_array_equal(found, batched)
        for n in range(2):
            if n == 1 and t == 4:
                alone[n] = None
            single, alone[n] = agent.predict(seen[n][t], alone[n])
            np.testing.assert_allclose(found[n], single, atol=1e-5)


def test_the_start_of_an_episode_can_also_be_told():
    agent, seen = acting(), episode(3)
    _, state = agent.predict(seen[0])
    _, state = agent.predict(seen[1], state)
    going_on, _ = agent.predict(seen[2], state, np.array([False]))
    afresh, _ = agent.predict(seen[2], state, np.array([True]))
    np.testing.assert_array_equal(afresh, agent.predict(seen[2])[0])
    assert not np.allclose(afresh, going_on, atol=1e-4)


def test_a_state_of_another_step_of_an_episode_does_not_count():
    agent, seen = acting(), episode(4)
    _, state = agent.predict(seen[0])
    np.testing.assert_array_equal(agent.predict(seen[2], state)[0], agent.predict(seen[2])[0])


def test_predict_says_what_does_not_fit():
    agent, seen = acting(), episode(2)
    _, state = agent.predict(seen[0])
    two = {k: np.stack([o[k] for o in seen]) for k in seen[0]}
    with pytest.raises(ValueError, match="give what predict returned for a batch of 2"):
        agent.predict(two, state)
    with pytest.raises(ValueError, match=r"episode_start has shape \(3,\); expected \(1,\)"):
        agent.predict(seen[1], state, np.zeros(3, bool))
    with pytest.raises(ValueError, match="return_to_go"):
        agent.predict(np.zeros(3, np.float32))


def test_a_policy_without_memory_looks_at_the_present_alone():
    net = actor(context=1)
    obs, action, there = steps(1, 1)
    found, after = net.step(obs, net.nothing(1))
    torch.testing.assert_close(found, net(obs, action, there)[0])
    assert after.tokens.shape == (1, 0, 3, WIDTH)


# -- the target ------------------------------------------------------------------------------------


def test_it_aims_at_the_highest_return_of_the_data_or_at_the_one_that_is_set():
    data = dataset([2, 1], rewards=[1, 2, 2.5], obs=np.zeros((3, 1), np.float32), space=Paid.observation_space,
                   action_space=Paid.action_space, env=PAID)  # fmt: skip
    assert [target_of(make(data, **s).env_spec) for s in ({}, {"target_return": 40})] == [3.0, 40.0]
    assert target_of(make(data, EnvSpec(PAID, wrappers=((wrappers.PATH, {}),))).env_spec) == 3.0
    own = aimed(EnvSpec(PAID, wrappers=(("gymnasium.wrappers:TimeLimit", {"max_episode_steps": 2}),)), 7.0)
    kept = make(data, own, target_return=40.0)
    assert kept.env_spec.wrappers == own.wrappers and kept.algorithm.target_return == 40.0
    assert aimed(own, 9.0).wrappers == (*own.wrappers[:1], (wrappers.PATH, {"target_return": 9.0}))


def test_a_loaded_agent_aims_where_it_did_and_keeps_its_spaces(tmp_path):
    data = recorded()
    agent = make(data, target_return=40.0)
    agent.save(tmp_path)
    loaded = api.load(tmp_path)
    assert isinstance(loaded, DecisionTransformerAgent)
    assert loaded.env_spec == agent.env_spec and target_of(loaded.env_spec) == 40.0
    assert loaded.observation_space == agent.observation_space
    assert target_of(api.load(tmp_path, env=env_id("Noisy")).env_spec) == 40.0
    assert target_of(api.load(tmp_path, env=aimed(env_id("Noisy"), 3.0)).env_spec) == 3.0
    assert loaded.info == agent.info == data.info
    before = agent.evaluate(3)
    np.testing.assert_array_equal(loaded.evaluate(3).returns, before.returns)


def test_another_target_holds_for_its_evaluation_alone():
    agent = make()
    told = []

    def act(obs, _):
        told.append(float(obs["return_to_go"][0, 0]))
        return np.zeros((len(obs["timestep"]), 1), np.float32)

    agent.session = lambda noise=None: act
    agent.evaluate(1, target_return=-123.0)
    first = told[0]
    told.clear()
    agent.evaluate(1)
    assert (first, told[0]) == (-123.0, np.float32(target_of(agent.env_spec)))


def test_without_an_environment_it_trains_and_predicts():
    agent = quiet(make(dataset([3, 4])), 3)
    assert agent.env_spec is None
    assert agent.predict(episode(1)[0])[0].shape == (2,)
