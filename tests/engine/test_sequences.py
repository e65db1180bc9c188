"""The lock-step collector of token sequences, against single environments stepped one by one."""

import copy

import ctrlrl_envs  # noqa: F401 - registers the tasks
import gymnasium as gym
import numpy as np
import pytest
import torch
from helpers.policies import gen

from ctrlrl.core.support import top_p_support
from ctrlrl.engine.errors import NonFiniteError
from ctrlrl.engine.sequences import run_sequences
from ctrlrl.nets.heads import Categorical
from ctrlrl.nets.token_policy import TabularPolicy, TransformerPolicy

SEEDS = [5, 5, 9, 9, 9, 2, 7]
GROUP = torch.tensor([0, 0, 1, 1, 1, 2, 3])


def vector(name, n, **kwargs):
    return gym.make_vec(f"ctrlrl/Token{name}-v0", num_envs=n, vectorization_mode="vector_entry_point", **kwargs)


def build(env, scale=6.0, kind=TransformerPolicy):
    torch.manual_seed(0)
    policy = kind(env.single_observation_space, env.single_action_space, env.metadata["tokens"], width=16, heads=2)
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.mul_(scale)
    return policy


def run(env, policy, seed=0, **kwargs):
    return run_sequences(env, policy, SEEDS, GROUP, gen(seed), **kwargs)


def same(a, b, exact=True):
    for name, x, y in zip(a._fields, a, b, strict=True):
        if isinstance(x, torch.Tensor):
            torch.testing.assert_close(x, y, atol=0 if exact or x.dtype != torch.float32 else 1e-5, rtol=0, msg=name)
        elif name != "simulation_s":
            assert x is None and y is None, name


@pytest.mark.parametrize("width", [7, 3, 12])
@pytest.mark.parametrize("name", ["Sort", "Arithmetic", "Format", "Ladder", "Pattern"])
def test_equals_single_environments_stepped_one_by_one(name, width):
    env = vector(name, width)
    policy = build(env)
    e = run(env, policy, seed=3)
    tokens = env.metadata["tokens"]
    prompt, steps = tokens["prompt"], tokens["length"] - tokens["prompt"]
    noise = policy.noise(steps, 7, gen(3))
    one = gym.make(f"ctrlrl/Token{name}-v0")
    assert e.obs.shape == (7, steps, tokens["length"]) and e.action.shape == e.mask.shape == (7, steps)
    for k, seed in enumerate(SEEDS):
        obs, info = one.reset(seed=seed)
        assert e.solution[k].tolist() == info["solution"].tolist() and int(e.task[k]) == info["task"]
        for t in range(steps):
            seen = torch.from_numpy(obs)
            dist = policy.distribution(seen.unsqueeze(0))
            action = policy.act(seen.unsqueeze(0), noise[t, k : k + 1])
            assert torch.equal(e.obs[k, t], seen)
            assert int(e.turn[k, t]) == info["turn"] and bool(e.mask[k, t]) == (info["turn"] >= 0)
            mine = info["turn"] >= 0
            obs, reward, terminated, _, info = one.step(int(action))
            assert int(e.action[k, t]) == obs[prompt + t] - 1 and (not mine or int(e.action[k, t]) == int(action))
            expected = dist.log_prob(action)[0] if mine else torch.tensor(0.0)
            torch.testing.assert_close(e.logp_behaviour[k, t], expected.detach(), atol=1e-5, rtol=0)
            assert float(e.reward_t[k, t]) == pytest.approx(reward) and bool(e.terminated_t[k, t]) == terminated
            if terminated:
                break
        n = t + 1
        assert int(e.length[k]) == n and e.last_obs[k].tolist() == obs.tolist()
        for x in (e.obs, e.action, e.mask, e.reward_t, e.terminated_t, e.logp_behaviour):
            assert not x[k, n:].any()
        assert (e.turn[k, n:] == -1).all()
        assert bool(e.success[k]) == info["success"] and int(e.answer[k]) == info["answer"]
        assert e.rewards[k].tolist() == pytest.approx(info["rewards"].tolist())
        if name == "Arithmetic":
            assert e.void[k].tolist() == info["void"].tolist()
    assert (e.void is not None) == (name == "Arithmetic") and e.support is None
    assert not e.truncated_t.any() and torch.equal(e.group, GROUP) and e.simulation_s > 0
    assert e.returns().tolist() == pytest.approx(e.reward_t.amax(1).tolist())
    if name in ("Format", "Ladder"):
        assert len(set(e.length.tolist())) > 1
    # what a loss computes of them is what the sampler computed
    out = policy(e.obs, e.action)
    torch.testing.assert_close(out.logp.detach()[e.mask], e.logp_behaviour[e.mask], atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", ["Format", "Arithmetic"])
def test_a_seed_gives_the_same_episodes_in_however_many_places(name):
    policy = build(vector(name, 1))
    first = run(vector(name, 7), policy)
    same(first, run(vector(name, 7), policy))
    env = vector(name, 7)
    run(env, policy, seed=9)
    same(first, run(env, policy))
    for width in (1, 2, 5):
        same(first, run(vector(name, width), policy), exact=False)
    assert not torch.equal(first.action, run(vector(name, 7), policy, seed=1).action)
    # equal seeds have equal prompts and noise of their own
    assert torch.equal(first.obs[0, 0], first.obs[1, 0]) and not torch.equal(first.action[0], first.action[1])
    assert first.obs.requires_grad is False and not first.logp_behaviour.is_inference()


def test_turns_and_mask_of_a_task_of_several_turns():
    e = run(vector("Arithmetic", 7), build(vector("Arithmetic", 1)))
    turns = [0, 0, -1, -1, -1, -1, 1, 1, -1, -1, -1, -1, 2, 2]
    assert e.turn.tolist() == [turns] * 7 and torch.equal(e.mask, e.turn >= 0)
    assert (e.length == 14).all()


def test_a_forced_beginning_is_written_and_is_not_the_policys():
    env = vector("Arithmetic", 7)
    policy = build(env)
    free = run(env, policy)
    length = torch.tensor([0, 1, 2, 5, 8, 14, 13])
    # the answers of other rows, whose tokens at the environment's positions must not be taken over
    forced = free.action[[6, 5, 4, 3, 2, 1, 0]].masked_fill(torch.arange(14) >= length.unsqueeze(1), -1)
    e = run(env, policy, forced=forced)
    held = (forced >= 0) & (free.turn >= 0)
    assert torch.equal(e.action[held], forced[held]) and not torch.equal(e.action[5], forced[5])
    assert torch.equal(e.mask, (free.turn >= 0) & ~held) and torch.equal(e.turn, free.turn)
    assert torch.equal(e.action[0], free.action[0])
    # the policy went on from what was written, and its probability of that is told
    torch.testing.assert_close(e.logp_behaviour, torch.where(e.turn >= 0, policy(e.obs, e.action).logp.detach(), 0.0),
                               atol=1e-5, rtol=0)  # fmt: skip
    same(run(env, policy, forced=forced[:, :9].masked_fill(torch.arange(9) >= 9, -1)),
         run(env, policy, forced=forced.masked_fill(torch.arange(14) >= 9, -1)))  # fmt: skip


def test_the_solution_forced_is_the_optimum():
    for name in ("Sort", "Copy", "Arithmetic", "Format", "Ladder", "Pattern"):
        env = vector(name, 4)
        policy = build(env)
        e = run(env, policy, forced=run(env, policy).solution)
        assert (e.returns() == 1.0).all() and e.success.all() and not e.mask.any()
        assert torch.equal(e.solution >= 0, e.turn >= 0)


def test_a_retry_goes_on_from_a_pivot():
    env = vector("Arithmetic", 7)
    policy = build(env)
    base = run(env, policy)
    again = run(env, policy, seed=1, forced=base.action.masked_fill(torch.arange(14) >= 6, -1))
    assert torch.equal(again.obs[:, 6], base.obs[:, 6]) and not torch.equal(again.action[:, 6:], base.action[:, 6:])


@pytest.mark.parametrize("kind", [TransformerPolicy, TabularPolicy])
def test_temperature(kind):
    env = vector("Pattern", 500)
    policy = build(env, kind=kind)
    if kind is TabularPolicy:
        with torch.no_grad():
            policy.table.copy_(torch.randn(85, 4, generator=gen(1)))
    seeds, group = [0] * 2000, torch.zeros(2000, dtype=torch.int64)
    logits = policy.distribution(torch.tensor([[1, 0, 0, 0, 0]])).logits[0].detach()
    for temperature in (0.5, 1.0, 3.0):
        e = run_sequences(env, policy, seeds, group, gen(4), temperature=temperature)
        expected = torch.softmax(logits / temperature, -1)
        share = torch.bincount(e.action[:, 0], minlength=4) / 2000
        torch.testing.assert_close(share, expected, atol=0.05, rtol=0)
        torch.testing.assert_close(e.logp_behaviour[:, 0], expected.log()[e.action[:, 0]], atol=1e-5, rtol=0)
    cold = run_sequences(env, policy, seeds[:3], group[:3], gen(4), temperature=1e-4)
    greedy = policy.deterministic(cold.obs.flatten(0, 1)).view(3, 4)
    assert torch.equal(cold.action, greedy)


def test_a_support_restricts_the_draw_and_renormalises_it():
    env = vector("Arithmetic", 7)
    policy, other = build(env, scale=8.0), build(env, scale=5.0)
    forced = torch.full((7, 14), -1)
    forced[3, :2] = torch.tensor([13, 12])
    e = run(env, policy, temperature=1.5, support=(other, lambda logits: top_p_support(logits, 0.6)), forced=forced)
    allowed = top_p_support(other(e.obs, e.action).dist.params()["logits"], 0.6)
    assert e.support.shape == (7, 14, 14) and e.support[~e.mask].all()
    assert torch.equal(e.support[e.mask], allowed[e.mask]) and not allowed[e.mask].all(-1).any()
    assert e.support.gather(-1, e.action.unsqueeze(-1)).all()
    logits = policy(e.obs, e.action).dist.params()["logits"].detach() / 1.5
    expected = Categorical(logits.masked_fill(~e.support, -torch.inf)).log_prob(e.action)
    mine = e.turn >= 0
    torch.testing.assert_close(e.logp_behaviour[mine], expected[mine], atol=1e-5, rtol=0)
    assert e.action[3, :2].tolist() == [13, 12] and e.logp_behaviour.isfinite().all()
    with pytest.raises(ValueError, match="leaves no token to draw at position 0"):
        run(env, policy, support=(other, lambda logits: torch.zeros_like(logits, dtype=torch.bool)))


def test_a_rounded_sampler_differs_a_little_and_leaves_the_policy_alone():
    env = vector("Sort", 7)
    policy = build(env)
    before = copy.deepcopy(policy.state_dict())
    e = run(env, policy, behaviour_dtype=torch.bfloat16)
    gap = (policy(e.obs, e.action).logp.detach() - e.logp_behaviour).abs()
    assert e.logp_behaviour.dtype == torch.float32 and 1e-4 < gap.max() < 0.5
    assert all(torch.equal(before[k], v) and v.dtype == before[k].dtype for k, v in policy.state_dict().items())


def test_what_the_caller_can_get_wrong_is_said():
    env = vector("Sort", 2)
    policy = build(env)
    with pytest.raises(ValueError, match="no native vector environment"):
        run_sequences(gym.make_vec("CartPole-v1", 2), policy, [1], GROUP[:1], gen())
    with pytest.raises(ValueError, match="0 seeds"):
        run_sequences(env, policy, [], GROUP[:0], gen())
    with pytest.raises(ValueError, match="every episode needs one each"):
        run_sequences(env, policy, [1, 2], GROUP[:1], gen())
    with pytest.raises(ValueError, match="temperature=0"):
        run_sequences(env, policy, [1], GROUP[:1], gen(), temperature=0.0)
    for forced in (torch.zeros(2, 5, dtype=torch.int64), torch.zeros(1, 6, dtype=torch.int64), torch.full((1, 5), 12)):
        with pytest.raises(ValueError, match="forced must be tokens below 12"):
            run_sequences(env, policy, [1], GROUP[:1], gen(), forced=forced)
    with torch.no_grad():
        policy.head.weight[0, 0] = torch.nan
    with pytest.raises(NonFiniteError, match="logits"):
        run_sequences(env, policy, [1], GROUP[:1], gen())


def test_places_beyond_the_last_episode_are_dropped():
    env = vector("Ladder", 50)
    e = run(env, build(env))
    assert len(e.length) == 7 and e.rewards.shape == (7, 1) and np.isfinite(e.simulation_s)
