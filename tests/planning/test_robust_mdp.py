"""Sets of models: what they accept, what they refuse, and when they are rectangular."""

from itertools import product

import gymnasium as gym
import numpy as np
import pytest

from ctrlrl.planning import robust_mdp
from ctrlrl.planning.model import Model
from ctrlrl.planning.robust_mdp import RobustMDP
from ctrlrl.planning.robust_value_iteration import evaluate, robust_value_iteration, value_iteration, worst_case

LEFT, RIGHT = [1.0, 0.0], [0.0, 1.0]
FREE = np.zeros((2, 1))


def chains(*models):
    """Models of two states and one action, each given by its two rows."""
    return np.array(models, dtype=float)[:, :, None, :]


def sparse(rows):
    """The pair (next_state, probability) of dense rows, successors in reverse order and one of them split in two."""
    states = rows.shape[-1]
    to = np.broadcast_to(np.arange(states)[::-1], rows.shape)
    to = np.concatenate([to, to[..., :1]], -1)
    probability = rows[..., ::-1]
    half = probability[..., :1] / 2
    return to, np.concatenate([half, probability[..., 1:], half], -1)


PRODUCT = chains([LEFT, LEFT], [LEFT, RIGHT], [RIGHT, LEFT], [RIGHT, RIGHT])


@pytest.mark.parametrize(
    ("models", "expected"),
    [
        (PRODUCT, True),
        (PRODUCT[[2, 0, 3, 1]], True),
        (PRODUCT[[2, 0, 3, 1, 2, 2]], True),
        (PRODUCT[:3], False),
        (PRODUCT[[0, 3]], False),
        (PRODUCT[[0, 3, 0, 3]], False),
        (PRODUCT[:2], True),
        (PRODUCT[:1], True),
    ],
    ids=["product", "shuffled", "with duplicates", "one missing", "diagonal", "diagonal twice", "one pair", "one"],
)
@pytest.mark.parametrize("kind", ["dense", "sparse", "mixed", "in blocks"])
def test_a_list_is_rectangular_exactly_when_it_is_the_product_of_its_rows(models, expected, kind, monkeypatch):
    if kind == "in blocks":
        monkeypatch.setattr(robust_mdp, "BLOCK_NUMBERS", 1)
    if kind in ("sparse", "mixed"):
        models = [sparse(one) if kind == "sparse" or m % 2 else one for m, one in enumerate(models)]
    assert RobustMDP.models(models, FREE, gamma=0.9).is_rectangular is expected


def test_rectangular_by_trying_every_subset_of_a_product():
    """Random subsets of 2 x 3 x 2 choices against the definition."""
    rng = np.random.default_rng(0)
    rows = rng.dirichlet(np.ones(3), size=(3, 3))
    every = list(product(range(2), range(3), range(2)))
    seen = set()
    for _ in range(300):
        kept = [member for member in every if rng.random() < rng.choice([0.5, 0.9])] or every[:1]
        wanted = len(kept) == np.prod([len({member[s] for member in kept}) for s in range(3)])
        models = np.array([[rows[s, member[s]] for s in range(3)] for member in kept])[:, :, None, :]
        assert RobustMDP.models(models, np.zeros((3, 1)), gamma=0.5).is_rectangular == wanted
        seen.add(bool(wanted))
    assert seen == {True, False}


def test_rewards_that_differ_make_rows_differ():
    twice = PRODUCT[[0, 0]]
    one_pair, two_pairs = np.zeros((2, 2, 2, 1))
    one_pair[1, 0] = two_pairs[1] = 1.0
    assert RobustMDP.models(twice, one_pair, gamma=0.9).is_rectangular
    assert not RobustMDP.models(twice, two_pairs, gamma=0.9).is_rectangular


def test_given_by_choices_the_product_is_never_enumerated():
    rng = np.random.default_rng(0)
    choices = [[rng.dirichlet(np.ones(30), size=9) for _ in range(4)] for _ in range(30)]
    mdp = RobustMDP.rectangular(choices, rng.random((30, 4)), gamma=0.9)
    assert mdp.is_rectangular and mdp.n_models == 9**120
    found = worst_case(mdp, np.zeros(30, dtype=int))
    assert found.values == pytest.approx(evaluate(mdp.model(found.model), np.zeros(30, dtype=int), 0.9))


def test_pairs_may_have_different_numbers_of_choices():
    choices = [[[LEFT], [LEFT, RIGHT, [0.5, 0.5]]], [[RIGHT], [RIGHT, LEFT]]]
    mdp = RobustMDP.rectangular(choices, [[1.0, 1.0], [0.0, 0.0]], gamma=0.5)
    assert mdp.n_models == 6
    q, rows = mdp.worst_rows(np.array([1.0, 0.0]))
    assert rows.tolist() == [[0, 1], [0, 0]] and q.tolist() == [[1.5, 1.0], [0.0, 0.0]]
    # all rows but the first would be tempting, yet no pair may take a row it does not have
    assert mdp.worst_rows(np.array([0.0, 0.0]))[1].tolist() == [[0, 0], [0, 0]]
    made = mdp.model(((0, 2), (0, 1)))
    assert made.probability.tolist() == [[LEFT, [0.5, 0.5]], [RIGHT, LEFT]]


def test_rewards_may_be_given_in_three_ways_that_agree():
    rng = np.random.default_rng(0)
    models = rng.dirichlet(np.ones(3), size=(2, 3, 2))
    by_successor = rng.standard_normal((2, 3, 2, 3))
    expected = (models * by_successor).sum(-1)
    a = RobustMDP.models(models, by_successor, gamma=0.9)
    b = RobustMDP.models(models, expected, gamma=0.9)
    c = RobustMDP.models(models[:1], expected[0], gamma=0.9)
    d = RobustMDP.models([sparse(one) for one in models], by_successor, gamma=0.9)
    for m in range(2):
        assert np.allclose(a.model(m).reward, expected[m]) and np.allclose(d.model(m).reward, expected[m])
        assert (b.model(m).reward == expected[m]).all()
    assert (c.model(0).reward == expected[0]).all()
    choices = [[models[:, s, a] for a in range(2)] for s in range(3)]
    e = RobustMDP.rectangular(choices, by_successor[0], gamma=0.9)
    assert np.allclose(e.model(((1, 1),) * 3).reward, (models[1] * by_successor[0]).sum(-1))


@pytest.mark.parametrize("kind", ["dense", "sparse", "rectangular"])
def test_terminal_states_absorb_without_reward(kind):
    """Reward 1 per step in state 0, which leaves for the terminal state 1 with probability 1/2: V = 1 / (1 - .45)."""
    rows = chains([[0.5, 0.5], LEFT])
    if kind == "rectangular":
        mdp = RobustMDP.rectangular([[rows[:, 0, 0]], [[LEFT, RIGHT]]], [[1.0], [5.0]], gamma=0.9, terminal=[1])
        assert mdp.n_models == 1
    else:
        models = rows if kind == "dense" else [(np.tile([0, 1], (2, 1, 1)), rows[0])]
        mdp = RobustMDP.models(models, [[1.0], [5.0]], gamma=0.9, terminal=[1])
    values = evaluate(mdp.model(mdp.first()), [0, 0], 0.9)
    assert values == pytest.approx([1 / 0.55, 0.0])


class Lazy:
    def __init__(self, models):
        self.models, self.made = models, 0

    def __len__(self):
        return len(self.models)

    def __getitem__(self, m):
        self.made += 1
        return self.models[m]


def test_a_lazy_sequence_is_made_when_needed_and_gives_the_same_answers(monkeypatch):
    rng = np.random.default_rng(0)
    models, reward = rng.dirichlet(np.ones(3), size=(5, 3, 2)), rng.standard_normal((3, 2))
    eager, source = RobustMDP.models(models, reward, gamma=0.9), Lazy(models)
    lazy = RobustMDP.models(source, reward, gamma=0.9)
    assert source.made == 1 and lazy.n_models == 5
    policy = np.array([0, 1, 0])
    for numbers in (robust_mdp.BLOCK_NUMBERS, 1, 40):
        monkeypatch.setattr(robust_mdp, "BLOCK_NUMBERS", numbers)
        for one in (eager, lazy):
            single = [evaluate(Model.of(rows, reward), policy, 0.9) for rows in models]
            assert worst_case(one, policy).model == int(np.argmin([values[0] for values in single]))
            assert worst_case(one, policy).value == pytest.approx(min(values[0] for values in single))
            solved = robust_value_iteration(one)
            backups = np.array([reward + 0.9 * rows @ solved.values for rows in models])
            assert np.abs(solved.q - backups.min(0)).max() < 1e-9
            assert (solved.rows == backups.argmin(0)).all()
    assert source.made > 5


def test_a_lazy_model_of_another_shape_is_refused_when_it_is_made():
    lazy = RobustMDP.models(Lazy([np.eye(2)[:, None], np.eye(3)[:, None]]), [[0.0], [0.0]], gamma=0.9)
    with pytest.raises(ValueError, match="model 1"):
        worst_case(lazy, [0, 0])


BAD_ROWS = [
    ([[0.5, 0.4], LEFT], r"model 0: row \(0, 0\) sums to 0.9"),
    ([[1.5, -0.5], LEFT], r"model 0: row \(0, 0\) sums to 1, least -0.5"),
    ([LEFT, [np.nan, 1.0]], r"model 0: row \(1, 0\) has NaN or infinity"),
]


@pytest.mark.parametrize(("rows", "message"), BAD_ROWS)
def test_rows_that_are_no_distributions_are_named(rows, message):
    with pytest.raises(ValueError, match=message):
        RobustMDP.models(chains(rows), FREE, gamma=0.9)
    place = message.split(r"row \(")[1][0]
    with pytest.raises(ValueError, match=rf"choices\[{place}\]\[0\]: row \(0,\)"):
        RobustMDP.rectangular([[[row]] for row in rows], FREE, gamma=0.9)


GOOD = {"transitions": PRODUCT, "rewards": FREE, "gamma": 0.9}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"gamma": 1.0}, "gamma=1.0; expected 0 <= gamma < 1"),
        ({"gamma": -0.1}, "gamma=-0.1"),
        ({"gamma": float("nan")}, "gamma=nan"),
        ({"transitions": PRODUCT[0]}, r"shape \[2, 1, 2\]; expected \[M, S, A, S\]"),
        ({"transitions": [PRODUCT]}, r"model 0 has shape \[4, 2, 1, 2\]"),
        ({"transitions": PRODUCT[:0]}, "there is no model"),
        ({"transitions": [np.eye(2)[:, None], np.eye(3)[:, None]]}, r"model 1: rewards have shape \[2, 1\]"),
        ({"transitions": [(np.zeros((2, 1, 3)), np.ones((2, 1, 3)) / 3)]}, "must hold integers from 0 to 1"),
        ({"transitions": [(np.full((2, 1, 1), 2), np.ones((2, 1, 1)))]}, "must hold integers from 0 to 1"),
        ({"transitions": [(np.zeros((2, 1, 1), int), np.ones((2, 1, 2)))]}, "expected both"),
        ({"rewards": np.zeros((2, 2))}, r"rewards have shape \[2, 2\]; expected \[2, 1\] or \[2, 1, 2\]"),
        ({"rewards": np.zeros((3, 2, 1))}, r"rewards have shape \[3, 2, 1\], for 4 models"),
        ({"rewards": np.zeros(2)}, r"rewards have shape \[2\]"),
        ({"rewards": [[np.inf], [0.0]]}, "rewards contain NaN or infinity"),
        ({"rewards": np.full((4, 2, 1, 2), np.nan)}, "rewards contain NaN or infinity"),
        ({"start": 2}, "start=2; expected a state from 0 to 1"),
        ({"start": -1}, "start=-1"),
        ({"start": [0.5, 0.6]}, "start: row"),
        ({"terminal": [2]}, r"terminal=\[2\]; expected indices of states"),
        ({"terminal": [0.5]}, "expected indices of states"),
    ],
)
def test_what_does_not_fit_is_refused(change, message):
    RobustMDP.models(**GOOD)
    with pytest.raises(ValueError, match=message):
        RobustMDP.models(**{**GOOD, **change})


@pytest.mark.parametrize(
    ("choices", "message"),
    [
        ([], "as many actions in every state"),
        ([[[LEFT]], [[LEFT], [LEFT]]], r"2 states with \[1, 2\] actions"),
        ([[[LEFT]], [np.zeros((0, 2))]], r"choices\[1\]\[0\] has shape \[0, 2\]; expected rows \[K, 2\]"),
        ([[[[1.0, 0.0, 0.0]]], [[LEFT]]], r"choices\[0\]\[0\] has shape \[1, 3\]"),
    ],
)
def test_choices_that_do_not_fit_are_refused(choices, message):
    with pytest.raises(ValueError, match=message):
        RobustMDP.rectangular(choices, FREE, gamma=0.9)


@pytest.mark.parametrize("key", [0, ((0,),), ((0,), (2,)), ((0,), (-1,)), ((0, 0), (0, 0))])
def test_a_member_that_is_not_there_is_refused(key):
    mdp = RobustMDP.rectangular([[[LEFT, RIGHT]], [[LEFT, RIGHT]]], FREE, gamma=0.9)
    mdp.model(((0,), (1,)))
    with pytest.raises(ValueError, match="expected a tuple of 2 tuples of 1 rows"):
        mdp.model(key)


def frozen_lake(**kwargs):
    return gym.make("FrozenLake-v1", map_name="4x4", **kwargs).unwrapped


def test_tables_of_gymnasium_have_the_known_values():
    """Six steps on firm ice, reward on the last: gamma^5. Slippery ice at gamma .99: 0.5420, as often published."""
    firm, slippery = frozen_lake(is_slippery=False), frozen_lake(is_slippery=True)
    mdp = RobustMDP.tables([firm.P, slippery.P], gamma=0.99, start=slippery.initial_state_distrib)
    assert (mdp.states, mdp.actions, mdp.n_models) == (17, 4, 2)
    values = [value_iteration(mdp.model(m), 0.99).values for m in range(2)]
    assert values[0] @ mdp.start == pytest.approx(0.99**5, abs=1e-8)
    assert round(float(values[1] @ mdp.start), 4) == 0.5420
    assert values[0][16] == pytest.approx(0.0, abs=1e-9)


def test_a_step_that_terminates_has_no_future_even_in_a_table_that_goes_on():
    table = {0: {0: [(0.5, 0, 1.0, True), (0.5, 0, 2.0, False)]}}
    mdp = RobustMDP.tables([table], gamma=0.9)
    assert evaluate(mdp.model(0), [0, 0], 0.9) == pytest.approx([1.5 / (1 - 0.45), 0.0])


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({1: {0: [(1.0, 0, 0.0, False)]}}, r"tables\[0\]: expected states 0..0"),
        ({0: {0: [(1.0, 0, 0.0, False)]}, 1: {}}, "same actions"),
        ({0: {0: [(1.0, 1, 0.0, False)]}}, "leads to state 1"),
        ({0: {0: [(0.5, 0, 0.0, False)]}}, r"row \(0, 0\) sums to 0.5"),
        ({0: {0: []}}, r"row \(0, 0\) sums to 0"),
        ({}, "expected"),
    ],
)
def test_tables_that_do_not_fit_are_refused(table, message):
    with pytest.raises(ValueError, match=message):
        RobustMDP.tables([table], gamma=0.9)
