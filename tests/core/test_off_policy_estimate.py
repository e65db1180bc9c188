"""The estimators against enumeration: every trajectory of a small decision process with its probability."""

import itertools
import math

import numpy as np
import pytest
import torch

from ctrlrl.core import off_policy_estimate as ope
from ctrlrl.core import ratio

F64 = torch.float64
GAMMA, STEPS = 0.9, 3
END = 2
"""The state in which an episode has ended."""
MEANS = (ope.importance_sampling, ope.per_decision)
SHARES = (ope.weighted_importance_sampling, ope.weighted_per_decision)


class Process:
    """Three states of which the last ends the episode, two actions, probabilities in quarters."""

    def __init__(self, deterministic=False):
        self.start = np.array([0.5, 0.5, 0.0]) if not deterministic else np.array([1.0, 0.0, 0.0])
        self.next = np.array([[[0.5, 0.25, 0.25], [0.0, 0.5, 0.5]], [[0.25, 0.5, 0.25], [0.75, 0.25, 0.0]]])
        if deterministic:
            self.next = np.eye(3)[[[1, 0], [0, 2]]]
        self.reward = np.array([[1.0, -2.0], [3.0, 0.5]])
        self.behaviour = np.array([[0.5, 0.5], [0.25, 0.75]])
        self.policy = np.array([[0.9, 0.1], [0.6, 0.4]])

    def exact(self):
        """Q [STEPS, S, A] of the policy by steps gone, from the last one backwards."""
        q, value = np.zeros((STEPS, 2, 2)), np.zeros(3)
        for t in reversed(range(STEPS)):
            q[t] = self.reward + GAMMA * self.next @ value
            value = np.r_[(self.policy * q[t]).sum(1), 0.0]
        return q, float(self.start @ value)

    def trajectories(self, q=None):
        """Probability under the behaviour policy [E], and columns [E, STEPS] of every trajectory."""
        found = []
        for states in itertools.product(range(3), repeat=STEPS + 1):
            for actions in itertools.product(range(2), repeat=STEPS):
                found += [self._one(states, actions)]
        found = [one for one in dict.fromkeys(found) if one is not None]
        chance = torch.tensor([one[0] for one in found], dtype=F64)
        columns = {k: torch.zeros(len(found), STEPS, dtype=F64) for k in ("l", "r", "q", "v", "v_t")}
        mask = torch.zeros(len(found), STEPS, dtype=torch.bool)
        for e, (_, path) in enumerate(found):
            for t, (s, a, after) in enumerate(path):
                mask[e, t] = True
                columns["l"][e, t] = math.log(self.policy[s, a] / self.behaviour[s, a])
                columns["r"][e, t] = self.reward[s, a]
                if q is not None:
                    values = np.concatenate([(self.policy * q).sum(-1), np.zeros((STEPS, 1))], 1)
                    columns["q"][e, t], columns["v"][e, t] = q[t, s, a], values[t, s]
                    columns["v_t"][e, t] = values[t + 1, after] if t + 1 < STEPS else 0.0
        return chance, columns, mask

    def _one(self, states, actions):
        p, path = self.start[states[0]], []
        for t, a in enumerate(actions):
            s, after = states[t], states[t + 1]
            if s == END:  # one trajectory stands for all that differ after the end
                if any(actions[t:]) or any(x != END for x in states[t:]):
                    return None
                break
            p *= self.behaviour[s, a] * self.next[s, a, after]
            path.append((s, a, after))
        return (p, tuple(path)) if p > 0 else None


@pytest.fixture(scope="module")
def process():
    return Process()


def spoilt(x, mask):
    """``x`` with NaN where nothing is to be looked at."""
    return torch.where(mask, x, torch.full_like(x, torch.nan))


def some_q(seed=0):
    return np.random.default_rng(seed).normal(size=(STEPS, 2, 2)) * 3.0


def test_the_enumeration_is_complete_and_has_episodes_of_every_length(process):
    chance, columns, mask = process.trajectories()
    assert chance.sum().item() == pytest.approx(1.0, abs=1e-12)
    assert set(mask.sum(1).tolist()) == {1, 2, 3}
    assert (chance * columns["l"].sum(1).exp()).sum().item() == pytest.approx(1.0, abs=1e-12)


@pytest.mark.parametrize("estimator", MEANS)
def test_importance_sampling_is_unbiased(process, estimator):
    chance, c, mask = process.trajectories()
    found = estimator(spoilt(c["l"], mask), spoilt(c["r"], mask), mask, GAMMA)
    assert (chance @ found.parts).item() == pytest.approx(process.exact()[1], abs=1e-12)
    assert found.value.item() == pytest.approx(found.parts.mean().item(), abs=1e-12)


@pytest.mark.parametrize("seed", range(3))
def test_doubly_robust_is_unbiased_whatever_the_model(process, seed):
    chance, c, mask = process.trajectories(some_q(seed))
    found = ope.doubly_robust(spoilt(c["l"], mask), spoilt(c["r"], mask), c["q"], c["v"], c["v_t"], mask, GAMMA)
    assert (chance @ found.parts).item() == pytest.approx(process.exact()[1], abs=1e-12)


def test_doubly_robust_with_the_exact_model_has_no_variance_in_a_deterministic_process():
    process = Process(deterministic=True)
    q, value = process.exact()
    _, c, mask = process.trajectories(q)
    assert len(mask) > 3
    parts = ope.doubly_robust(c["l"], c["r"], c["q"], c["v"], c["v_t"], mask, GAMMA).parts
    assert torch.allclose(parts, torch.full_like(parts, value), atol=1e-12)
    assert ope.per_decision(c["l"], c["r"], mask, GAMMA).parts.std() > 0.1


def test_doubly_robust_without_a_model_is_per_decision_importance_sampling(process):
    _, c, mask = process.trajectories(np.zeros((STEPS, 2, 2)))
    for robust, plain in (
        (ope.doubly_robust, ope.per_decision), (ope.weighted_doubly_robust, ope.weighted_per_decision)
    ):  # fmt: skip
        a = robust(c["l"], c["r"], c["q"], c["v"], c["v_t"], mask, GAMMA)
        b = plain(c["l"], c["r"], mask, GAMMA)
        assert torch.allclose(a.value, b.value, atol=1e-12)
        assert (a.parts is None) == (b.parts is None)
        assert a.parts is None or torch.allclose(a.parts, b.parts, atol=1e-12)


def population(process, q=None):
    """Every trajectory as often as the behaviour policy makes it: probabilities are multiples of 1 / 2^15."""
    chance, c, mask = process.trajectories(q)
    count = chance * 2**15
    assert torch.equal(count, count.round())
    rows = torch.arange(len(chance)).repeat_interleave(count.long())
    return {k: v[rows] for k, v in c.items()}, mask[rows]


def test_normalised_forms_give_the_exact_value_on_the_whole_population(process):
    c, mask = population(process, some_q())
    value = process.exact()[1]
    for estimator in SHARES:
        found = estimator(spoilt(c["l"], mask), spoilt(c["r"], mask), mask, GAMMA)
        assert found.value.item() == pytest.approx(value, abs=1e-9)
        assert found.parts is None
    robust = ope.weighted_doubly_robust(c["l"], spoilt(c["r"], mask), c["q"], c["v"], c["v_t"], mask, GAMMA)
    assert robust.value.item() == pytest.approx(value, abs=1e-9)


# -- by hand ------------------------------------------------------------------------------------------


RATIOS = [[2.0, 0.5], [1.0, 1.0], [3.0, 1.0]]
"""The last episode ends after one step."""
REWARDS = [[1.0, 4.0], [0.0, 2.0], [6.0, 0.0]]


def by_hand():
    mask = torch.tensor([[True, True], [True, True], [True, False]])
    return torch.tensor(RATIOS, dtype=F64).log(), torch.tensor(REWARDS, dtype=F64), mask


def test_three_episodes_by_hand():
    logs, r, mask = by_hand()
    # products 1, 1, 3 at the end and 2, 1, 3 after the first step; returns 1 + 4/2, 2/2, 6
    assert ope.discounted_return(r, mask, 0.5).tolist() == [3.0, 1.0, 6.0]
    assert ope.importance_sampling(logs, r, mask, 0.5).value.item() == pytest.approx((3 + 1 + 18) / 3)
    assert ope.weighted_importance_sampling(logs, r, mask, 0.5).value.item() == pytest.approx((3 + 1 + 18) / 5)
    assert ope.per_decision(logs, r, mask, 0.5).value.item() == pytest.approx((2 + 2 + 0 + 1 + 18) / 3)
    # the ended episode stays in the second step's denominator: 1 + 1 + 3
    expected = (2 * 1 + 1 * 0 + 3 * 6) / 6 + 0.5 * (1 * 4 + 1 * 2) / 5
    assert ope.weighted_per_decision(logs, r, mask, 0.5).value.item() == pytest.approx(expected)


def test_weighted_doubly_robust_by_hand():
    logs, r, mask = by_hand()
    q = torch.tensor([[1.0, 2.0], [3.0, 1.0], [2.0, 9.0]], dtype=F64)
    v = torch.tensor([[2.0, 4.0], [2.0, 6.0], [5.0, 9.0]], dtype=F64)
    v_t = torch.tensor([[4.0, 0.0], [6.0, 8.0], [0.0, 9.0]], dtype=F64)  # the second episode was cut: 8 follows
    first = (2 * (1 + 2 - 1) + 1 * (0 + 3 - 3) + 3 * (6 + 0 - 2)) / 6
    second = 0.5 * (1 * (4 + 0 - 2) + 1 * (2 + 4 - 1)) / 5
    found = ope.weighted_doubly_robust(logs, r, q, v, v_t, mask, 0.5).value.item()
    assert found == pytest.approx((2 + 2 + 5) / 3 + first + second)
    parts = ope.doubly_robust(logs, r, q, v, v_t, mask, 0.5).parts.tolist()
    assert parts == pytest.approx([2 + 4 + 0.5 * 2, 2 + 0 + 0.5 * 5, 5 + 12])


def test_the_first_value_counts_where_the_first_step_is_masked():
    one = torch.tensor([[7.0]], dtype=F64)
    mask = torch.zeros(1, 1, dtype=torch.bool)
    for robust in (ope.doubly_robust, ope.weighted_doubly_robust):
        assert robust(one, one, one, one, one, mask, 0.5).value.item() == 7.0


def test_effective_sample_size_of_known_weights():
    weights = torch.tensor([[1.0, 1.0, 1e-300, 0.0], [1.0, 3.0, 1.0, 0.0]], dtype=F64)
    found = ope.effective_sample_size(weights.log())
    assert found.tolist() == pytest.approx([2.0, 16 / 10, 1.0, 0.0])


# -- properties ---------------------------------------------------------------------------------------


def test_a_constant_factor_on_all_weights_changes_no_normalised_form(process):
    _, c, mask = process.trajectories(some_q())
    shifted = c["l"].clone()
    shifted[:, 0] += 5.0
    model = (c["q"], c["v"], c["v_t"])
    for estimator in SHARES:
        a, b = (estimator(logs, c["r"], mask, GAMMA).value for logs in (c["l"], shifted))
        assert torch.allclose(a, b, atol=1e-12)
    a, b = (ope.weighted_doubly_robust(logs, c["r"], *model, mask, GAMMA).value for logs in (c["l"], shifted))
    assert torch.allclose(a, b, atol=1e-12)
    for estimator in MEANS:
        a, b = (estimator(logs, c["r"], mask, GAMMA).value for logs in (c["l"], shifted))
        assert torch.allclose(a * math.exp(5.0), b, atol=1e-9)


def test_the_policy_itself_is_worth_its_mean_return(process):
    _, c, mask = process.trajectories()
    zero, mean = torch.zeros_like(c["l"]), ope.discounted_return(c["r"], mask, GAMMA).mean()
    for estimator in (*MEANS, *SHARES):
        assert torch.allclose(estimator(zero, c["r"], mask, GAMMA).value, mean, atol=1e-12)


def test_leading_dimensions_are_independent_sets(process):
    _, c, mask = process.trajectories(some_q())
    index = torch.randint(len(mask), (4, 11), generator=torch.Generator().manual_seed(0))
    model = ("q", "v", "v_t")
    for estimator in (*MEANS, *SHARES, ope.doubly_robust, ope.weighted_doubly_robust):
        names = ("l", "r", *(model if "robust" in estimator.__name__ else ()))
        many = estimator(*(c[k][index] for k in names), mask[index], GAMMA)
        each = [estimator(*(c[k][i] for k in names), mask[i], GAMMA) for i in index]
        assert many.value.shape == (4,)
        assert torch.allclose(many.value, torch.stack([one.value for one in each]), atol=1e-12)
        assert many.parts is None or torch.allclose(many.parts, torch.stack([one.parts for one in each]), atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_enormous_and_vanishing_ratios_stay_finite(dtype):
    logs = torch.tensor([[200.0] * 40, [-200.0] * 40, [-torch.inf] * 40], dtype=dtype)
    r = torch.tensor([[1.0] * 20 + [0.0] * 20, [-2.0] * 40, [5.0] * 40], dtype=dtype)
    mask = torch.ones_like(logs, dtype=torch.bool)
    for estimator in MEANS:
        found = estimator(logs, r, mask, 0.9)
        assert found.parts.isfinite().all() and found.value > 1e30
        assert abs(found.parts[1].item()) < 2.1 and found.parts[2].item() == 0.0
        both = estimator(logs.abs().clamp(max=200.0), r * torch.tensor([[1.0], [-1.0], [-1.0]], dtype=dtype), mask, 0.9)
        assert both.value.isfinite()
    # the first episode has all the weight
    g = float(ope.discounted_return(r, mask, 0.9)[0])
    for estimator in SHARES:
        assert estimator(logs, r, mask, 0.9).value.item() == pytest.approx(g, rel=1e-5)
    assert ope.effective_sample_size(ope.log_weight(logs, mask)).tolist() == pytest.approx([1.0] * 40)


def test_a_reward_of_zero_is_zero_under_any_weight():
    logs = torch.tensor([[1e5, 1e5]], dtype=F64)
    mask = torch.ones_like(logs, dtype=torch.bool)
    for estimator in MEANS:
        assert estimator(logs, torch.zeros_like(logs), mask, 1.0).value.item() == 0.0


def test_it_works_from_the_only_log_ratio_there_is(process):
    _, c, mask = process.trajectories()
    logp, behaviour = c["l"] - 1.0, torch.full_like(c["l"], -1.0)
    logs = ratio.log_ratio(spoilt(logp, mask), spoilt(behaviour, mask), mask)
    a, b = (ope.per_decision(x, c["r"], mask, GAMMA).value for x in (logs, c["l"]))
    assert torch.allclose(a, b, atol=1e-12)


def test_compiles_without_a_graph_break(process):
    _, c, mask = process.trajectories(some_q())

    def everything(logs, r, q, v, v_t, mask):
        model = ope.doubly_robust(logs, r, q, v, v_t, mask, 0.9).value
        return (
            model
            + ope.weighted_per_decision(logs, r, mask, 0.9).value
            + ope.importance_sampling(logs, r, mask, 0.9).value
        )

    args = (c["l"], c["r"], c["q"], c["v"], c["v_t"], mask)
    compiled = torch.compile(everything, fullgraph=True, backend="eager")
    assert torch.allclose(compiled(*args), everything(*args))
