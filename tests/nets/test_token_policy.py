"""Token policies: one pass against position by position, the cache, gradients, the table's rows."""

import copy
import functools
import itertools
import pickle
import sys

import ctrlrl_envs  # noqa: F401 - registers the tasks
import gymnasium as gym
import pytest
import torch
from helpers.policies import gen

from ctrlrl.nets.token_policy import TabularPolicy, TransformerPolicy

V, P, L = 5, 2, 7
OBS, ACT = gym.spaces.MultiDiscrete([V + 1] * L), gym.spaces.Discrete(V)
TOKENS = {"vocabulary": V, "prompt": P, "length": L}
KINDS = pytest.mark.parametrize("kind", [TransformerPolicy, TabularPolicy])


def build(kind=TransformerPolicy, seed=0, scale=8.0, **kwargs):
    torch.manual_seed(seed)
    policy = kind(OBS, ACT, TOKENS, **({"width": 16, "heads": 2} | kwargs))
    with torch.no_grad():  # far from uniform, so that differences show
        for parameter in policy.parameters():
            parameter.copy_(
                torch.randn(parameter.shape, generator=gen(seed)) * 0.2 if kind is TabularPolicy else parameter * scale
            )
    return policy


def sequences(b=6, seed=0):
    """Observations [b, L - P, L] and tokens [b, L - P] of whole answers to the prompt 0 1."""
    action = torch.randint(V, (b, L - P), generator=gen(seed))
    full = torch.cat([torch.tensor([[0, 1]]).expand(b, 2), action], 1) + 1
    seen = torch.arange(L) < P + torch.arange(L - P).unsqueeze(1)
    return full.unsqueeze(1) * seen, action


@KINDS
def test_one_pass_equals_position_by_position(kind):
    policy, (obs, action) = build(kind), sequences()
    out = policy(obs, action)
    assert out.logp.shape == out.entropy.shape == out.values["value"].shape == (6, L - P)
    assert out.dist.params()["logits"].shape == (6, L - P, V)
    for t in range(L - P):
        one = policy(obs[:, t : t + 1], action[:, t : t + 1])
        torch.testing.assert_close(one.logp[:, 0], out.logp[:, t], atol=1e-6, rtol=0)
        dist = policy.distribution(obs[:, t])
        torch.testing.assert_close(dist.logits, out.dist.params()["logits"][:, t], atol=1e-6, rtol=0)
        torch.testing.assert_close(policy.values(obs[:, t])["value"], out.values["value"][:, t], atol=1e-6, rtol=0)
        assert torch.equal(policy.deterministic(obs[:, t]), dist.logits.argmax(-1))
    # any selection of positions, in any order
    order = torch.tensor([3, 0, 2])
    torch.testing.assert_close(policy(obs[:, order], action[:, order]).logp, out.logp[:, order], atol=1e-6, rtol=0)
    assert out.logp.std() > 0.1


@KINDS
def test_a_position_sees_what_is_before_it_and_nothing_else(kind):
    policy, (obs, action) = build(kind), sequences()
    logits = policy(obs, action).dist.params()["logits"]
    for k in range(L - P - 1):
        other = obs.clone()
        other[:, :, P + k] = torch.where(obs[:, :, P + k] > 0, obs[:, :, P + k] % V + 1, 0)
        changed = (policy(other, action).dist.params()["logits"] - logits).abs().amax(-1)
        assert (changed[:, : k + 1] == 0).all() and (changed[:, k + 1 :] > 1e-6).all()


@KINDS
def test_padding_gives_finite_numbers_and_changes_nothing(kind):
    policy, (obs, action) = build(kind), sequences()
    out = policy(obs, action)
    length = torch.tensor([1, 2, 3, 4, 5, 3])
    there = torch.arange(L - P) < length.unsqueeze(1)
    for padding in (torch.zeros_like(obs), obs[torch.arange(6), length.clamp_max(L - P - 1)].unsqueeze(1)):
        cut = torch.where(there.unsqueeze(-1), obs, padding)
        got = policy(cut, torch.where(there, action, 0))
        assert got.logp.isfinite().all() and got.entropy.isfinite().all() and got.values["value"].isfinite().all()
        torch.testing.assert_close(got.logp[there], out.logp[there], atol=1e-6, rtol=0)
    nothing = policy(torch.zeros_like(obs), torch.zeros_like(action))
    assert nothing.logp.isfinite().all()
    sum(v.sum() for v in (nothing.logp, nothing.entropy)).backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in policy.parameters())
    last = obs[:, -1].clone()
    last[:, -1] = 1
    assert policy.values(last)["value"].isfinite().all()


@KINDS
def test_the_cache_agrees(kind):
    log = functools.partial(torch.log_softmax, dim=-1)
    policy, (obs, action) = build(kind), sequences(b=9)
    with torch.inference_mode():
        state = policy.prefill(obs[:, 0])
        for t in range(L - P):
            torch.testing.assert_close(log(state.logits), policy.distribution(obs[:, t]).logits, atol=1e-5, rtol=0)
            state = policy.extend(state, action[:, t]) if t + 1 < L - P else state
    # from the middle, and with rows that have ended
    state = policy.prefill(obs[:, 2])
    ended = torch.arange(9) % 2 == 0
    state = policy.extend(state, torch.where(ended, -1, action[:, 2]))
    assert state.logits.isfinite().all()
    torch.testing.assert_close(
        log(state.logits)[~ended], policy.distribution(obs[:, 3]).logits[~ended], atol=1e-5, rtol=0
    )
    with pytest.raises(ValueError, match="equally many"):
        policy.prefill(obs[0])
    with pytest.raises(ValueError, match="at least 1"):
        policy.prefill(torch.zeros_like(obs[:, 0]))


@KINDS
def test_acting(kind):
    policy, (obs, _) = build(kind), sequences()
    noise = policy.noise(3, 6, gen(1))
    assert noise.shape == (3, 6, V) and torch.equal(noise, policy.noise(3, 6, gen(1)))
    action = policy.act(obs[:, 1], noise[0])
    assert action.dtype == policy.action_dtype and action.shape == (6, *policy.action_shape)
    assert torch.equal(action, (policy.distribution(obs[:, 1]).logits + noise[0]).argmax(-1))
    ours, theirs = policy.sampler()(obs[:, 1], noise[0])
    assert torch.equal(ours, action) and torch.equal(theirs, policy.to_env(obs[:, 1], action))
    policy.update_normalizer(obs, None)
    many = policy.act(obs[:1, 1].expand(20_000, L), policy.noise(1, 20_000, gen(2))[0])
    share = torch.bincount(many, minlength=V) / 20_000
    torch.testing.assert_close(share, policy.distribution(obs[:1, 1]).logits.exp()[0], atol=0.015, rtol=0)


@KINDS
def test_functional_call_gives_the_gradient_of_autograd(kind):
    policy, (obs, action) = build(kind, scale=1.0), sequences()
    params = {k: p.detach() for k, p in policy.named_parameters()}

    def total(p):
        out = torch.func.functional_call(policy, p, (obs, action), tie_weights=False)
        return out.logp.sum() + 0.1 * out.entropy.sum() + (out.values["value"] - 1.0).square().sum()

    found = torch.func.grad(total)(params)
    total(dict(policy.named_parameters())).backward()
    for name, parameter in policy.named_parameters():
        torch.testing.assert_close(found[name], parameter.grad, atol=1e-5, rtol=1e-5)
    assert found["critics.value.weight" if kind is TabularPolicy else "critics.value.0.weight"].abs().sum() > 0


@KINDS
def test_critics_leave_the_actor_alone(kind):
    policy, (obs, action) = build(kind, critics=("value", "cost")), sequences()
    assert {n.split(".")[1] for n, _ in policy.named_parameters() if n.startswith("critics.")} == {"value", "cost"}
    out = policy(obs, action)
    (out.values["value"] + out.values["cost"]).sum().backward()
    for name, parameter in policy.named_parameters():
        assert (parameter.grad is not None and parameter.grad.abs().sum() > 0) == name.startswith("critics.")
    assert build(kind, critics=())(obs, action).values == {}


def test_second_derivatives_exist():
    policy, (obs, action) = build(scale=1.0), sequences()
    parameter = policy.head.weight
    (first,) = torch.autograd.grad(policy(obs, action).logp.sum(), parameter, create_graph=True)
    (second,) = torch.autograd.grad(first.square().sum(), policy.body.wte.weight)
    assert second.isfinite().all() and second.abs().sum() > 0


def test_exact_in_double_precision():
    """Finite differences, which single precision could not confirm."""
    policy, (obs, action) = build(scale=2.0).double(), sequences(b=2)
    parameter = policy.body.wpe.weight
    (gradient,) = torch.autograd.grad(policy(obs, action).logp.sum(), parameter)
    step = 1e-6 * torch.randn(parameter.shape, generator=gen(3), dtype=torch.float64)
    with torch.no_grad():
        parameter += step
        high = policy(obs, action).logp.sum()
        parameter -= 2 * step
        low = policy(obs, action).logp.sum()
    torch.testing.assert_close(high - low, 2 * (gradient * step).sum(), rtol=1e-6, atol=0)


def test_compiles_without_a_graph_break():
    policy, (obs, action) = build(), sequences()
    compiled = torch.compile(policy, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(obs, action).logp, policy(obs, action).logp, atol=1e-6, rtol=0)


@KINDS
def test_copies_and_dtypes(kind):
    policy, (obs, action) = build(kind, scale=4.0), sequences()
    expected = policy(obs, action).logp
    for other in (copy.deepcopy(policy), pickle.loads(pickle.dumps(policy))):
        assert torch.equal(other(obs, action).logp, expected)
    half = copy.deepcopy(policy).to(torch.bfloat16)(obs, action).logp
    assert half.dtype == torch.bfloat16 and 0 < (half.float() - expected).abs().max() < 0.5
    assert torch.equal(policy(obs, action).logp, expected)
    torch.manual_seed(0)
    a = kind(OBS, ACT, TOKENS, width=16, heads=2)
    torch.manual_seed(0)
    b = kind(OBS, ACT, TOKENS, width=16, heads=2)
    assert all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))
    # both begin close to uniform
    assert (a(obs, action).entropy > 0.98 * torch.log(torch.tensor(float(V)))).all()


def test_sizes_that_do_not_fit_are_refused(monkeypatch):
    with pytest.raises(ValueError, match=r"Discrete\(5\)"):
        TransformerPolicy(OBS, gym.spaces.Discrete(4), TOKENS)
    with pytest.raises(ValueError, match=r"shape \(7,\)"):
        TabularPolicy(gym.spaces.MultiDiscrete([6] * 6), ACT, TOKENS)
    with pytest.raises(ValueError, match="heads must divide width"):
        TransformerPolicy(OBS, ACT, TOKENS, width=10, heads=3)
    with pytest.raises(ValueError, match="Use TransformerPolicy"):
        big = {"vocabulary": V, "prompt": P, "length": 14}
        TabularPolicy(gym.spaces.MultiDiscrete([V + 1] * 14), ACT, big)
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ImportError, match=r"ctrlrl\[tokens\]"):
        TransformerPolicy(OBS, ACT, TOKENS)
    TabularPolicy(OBS, ACT, TOKENS)


# -- the table ------------------------------------------------------------------------------


def test_every_beginning_of_an_answer_has_a_row_of_its_own():
    env = gym.make("ctrlrl/TokenPattern-v0")
    policy = TabularPolicy(env.observation_space, env.action_space, env.metadata["tokens"])
    assert policy.rows == 1 + 4 + 16 + 64 == len(policy.table)
    beginnings = [b for n in range(4) for b in itertools.product(range(4), repeat=n)]
    obs = torch.tensor([[1, *(t + 1 for t in b), *[0] * (4 - len(b))] for b in beginnings])
    assert sorted(policy.row(obs).tolist()) == list(range(85))
    assert policy.row(obs[:1]).tolist() == [0] and set(policy.row(obs[1:5]).tolist()) == {1, 2, 3, 4}


def test_exact_return_and_gradient_of_a_tabular_policy():
    """Sum over all 256 answers: the expected reward and its gradient, against one sum per position."""
    env = gym.make("ctrlrl/TokenPattern-v0")
    policy = TabularPolicy(env.observation_space, env.action_space, env.metadata["tokens"]).double()
    with torch.no_grad():
        policy.table.copy_(torch.randn(85, 4, generator=gen(0), dtype=torch.float64))
    answers = torch.tensor(list(itertools.product(range(4), repeat=4)))
    obs = torch.stack([torch.cat([torch.ones(256, 1, dtype=torch.int64), (answers + 1) * (torch.arange(4) < t)], 1)
                       for t in range(4)], 1)  # fmt: skip
    right = (answers == torch.tensor([1, 2, 3, 0])).double()
    logp = policy(obs, answers).logp
    probability = logp.sum(1).exp()
    torch.testing.assert_close(probability.sum(), torch.tensor(1.0, dtype=torch.float64))
    value = (probability * right.mean(1)).sum()
    # the chance to be right at each position, by itself
    alone = sum((p.exp().prod(1) * right[:, t]).sum() / 4 ** (3 - t) for t, p in
                ((t, logp[:, : t + 1]) for t in range(4))) / 4  # fmt: skip
    torch.testing.assert_close(value, alone)
    (exact,) = torch.autograd.grad(value, policy.table, retain_graph=True)
    score = (probability.detach() * right.mean(1) * logp.sum(1)).sum()
    torch.testing.assert_close(torch.autograd.grad(score, policy.table)[0], exact)
    assert exact.abs().sum() > 0
