"""D-eta-N against an implementation of its own, and its stocks against the wrapper's."""

import copy

import numpy as np
import pytest
import torch
from helpers.envs import Counter
from helpers.off_policy import CHOICES, CHOOSY, OBS, Double, adam, assert_like, learner, make, plain, polyak

from ctrlrl.data.transitions import Transitions
from ctrlrl.engine.learner import part
from ctrlrl.engine.stock import Stock, stocked_space

GAMMA, TAU, RATE, B, M = 0.5, 0.1, 1e-2, 6, 4
SPACE = stocked_space(OBS)
SMALL = {"quantiles": M, "stock_low": -2.0, "stock_high": 2.0, "stock_edits": 2, "stock_knots": 3, "gamma": GAMMA}


@pytest.fixture
def double():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def rows(n, seed=0):
    """Transitions at steps 0, 1, 2, ... of episodes that began with some stock; every third one ends."""
    g = torch.Generator().manual_seed(seed)
    discount = GAMMA ** (torch.arange(n) % 4).to(torch.get_default_dtype()).unsqueeze(1)
    initial, stock, reward = (torch.randn(n, generator=g) for _ in range(3))
    told = [torch.randn(n, 3, generator=g).float() for _ in range(2)]
    after = stock.unsqueeze(1) + discount * reward.unsqueeze(1)
    return Transitions(
        {"observation": told[0], "stock": stock.unsqueeze(1), "discount": discount},
        torch.randint(3, (n,), generator=g),
        reward,
        (torch.arange(n) % 3 == 1).to(torch.get_default_dtype()),
        {"observation": told[1], "stock": after, "discount": GAMMA * discount},
        {"initial": initial},
    )


def small(encoder=None, **settings):
    return learner("d_eta_n", encoder, obs=SPACE, actions=CHOICES, **SMALL | settings)


class Plain:
    """The method row by row: stock C itself, not gamma^t C, and one stock at a time."""

    def __init__(self, modules, objective, kappa):
        layers = {k: [*modules[k].body, modules[k].head] for k in ("actor", "actor_target")}
        self.network, self.target = (plain(layers[k]) for k in ("actor", "actor_target"))
        self.optimiser, self.objective, self.kappa = adam(self.network, lr=RATE), objective, kappa

    def law(self, network, observation, stock, discount):
        """[3, M] quantiles of the return-to-go; the network sees gamma^t C, gamma^t and three steps of the former."""
        steps = [torch.tanh((stock - knot) / (4 / 3)) for knot in (-4 / 3, 0.0, 4 / 3)]
        return network(torch.cat([observation.double(), torch.stack([stock / 2.0, discount, *steps])])).reshape(3, M)

    def worth(self, x):
        return {"cvar": min(x, 0.0), "target": -abs(x), "exceedance": float(x >= 0)}[self.objective]

    def loss(self, batch, shift):
        losses = []
        for b in range(len(batch.reward_t)):
            for move in shift[b]:
                with torch.no_grad():
                    discount, stock = batch.next_obs["discount"][b, 0], batch.next_obs["stock"][b, 0] + move
                    law = self.law(self.target, batch.next_obs["observation"][b], stock, discount)
                    utilities = [np.mean([self.worth((stock / discount + y).item()) for y in row]) for row in law]
                    best = [a for a in range(3) if utilities[a] >= max(utilities) - 1e-12]
                    going_on = 0.0 if batch.terminated_t[b] else GAMMA
                    atoms = [batch.reward_t[b] + going_on * y for a in best for y in law[a]]
                discount, stock = batch.obs["discount"][b, 0], batch.obs["stock"][b, 0] + move
                quantiles = self.law(self.network, batch.obs["observation"][b], stock, discount)[batch.action[b]]
                total = torch.zeros(())
                for i, q in enumerate(quantiles):
                    for y in atoms:
                        level = (i + 0.5) / M
                        size = torch.nn.functional.huber_loss(q, y, delta=self.kappa) / self.kappa
                        total = total + (level if y >= q else 1.0 - level) * size / len(atoms)
                losses.append(total)
        return torch.stack(losses).mean()


@pytest.mark.parametrize("objective", ["cvar", "target", "exceedance"])
def test_two_updates_equal_an_independent_implementation(objective, double):
    """Ties and all: with a flat utility many actions are equally good, and their laws are mixed."""
    mine = small(
        Double, objective=objective, tau=TAU, learning_rate=RATE, adam_eps=1e-8, target_steps=None, tie_tolerance=1e-12
    )
    with torch.no_grad():
        g = torch.Generator().manual_seed(5)
        mine.state["actor_target"].add_(0.3 * torch.randn(mine.state["actor_target"].shape, generator=g))
    theirs = Plain(copy.deepcopy(mine.modules), objective, 0.1)
    for i in range(2):
        batch, noise = rows(B, i), torch.rand(1, B, 2, generator=torch.Generator().manual_seed(i))
        shift = [
            [0.0, *(-2.0 + 4.0 * u - c for u in row)] for row, c in zip(noise[0], batch.extras["initial"], strict=True)
        ]
        expected = theirs.loss(batch, shift)
        found = mine.run(batch, {"stock": noise}, 1)
        torch.testing.assert_close(found["critic_loss"][0], expected.detach(), rtol=0, atol=1e-7)
        theirs.optimiser.zero_grad()
        expected.backward()
        theirs.optimiser.step()
        polyak(theirs.target, theirs.network, TAU)
    assert_like(theirs.network, [*mine.modules["actor"].body, mine.modules["actor"].head])


def fixed(mine, name, values):
    """Make the quantiles of the network ``name`` these [3][M] everywhere."""
    with torch.no_grad():
        mine.state[name].zero_()
        mine.modules[name].head.bias.copy_(torch.tensor(values).flatten())


@pytest.mark.parametrize(
    "stock,expected",
    [
        (1.0, (1.75 + 0.0 + 0.5) / 3),  # nothing is lost by any of them
        (-0.5, 0.5),  # (1, 1) alone loses nothing
        (-2.0, (1.75 + 0.5) / 2),  # -1 by the first and the third
        (-6.0, 1.75),  # -6 or -2 half the time each, against -5
    ],
)
def test_the_next_action_is_the_best_for_the_next_stock_and_ties_are_mixed(stock, expected):
    """Returns-to-go of (0, 8), (0, 0) or (2, 2) after reward 0, at discount 1/2 and gamma 1/2.

    Targets are (0, 4), (0, 0) or (1, 1), whose mean Huber losses from 0 are 1.75, 0 and 0.5; their average law would
    lose 0.61 in the first row. The levels 1/4 and 3/4 of the two quantiles add up to 1.
    """
    mine = small(quantiles=2, kappa=1.0, learning_rate=0.0, stock_edits=0)
    fixed(mine, "actor", [[0.0] * 2] * 3)
    fixed(mine, "actor_target", [[0.0, 8.0], [0.0, 0.0], [2.0, 2.0]])
    one = part(rows(1), slice(0, 1))
    batch = one._replace(
        reward_t=torch.zeros(1), terminated_t=torch.zeros(1),
        next_obs=one.next_obs | {"stock": torch.tensor([[stock]]), "discount": torch.tensor([[0.5]])},
    )  # fmt: skip
    noise = {"stock": torch.zeros(1, 1, 0)}
    assert mine.run(batch, noise, 1)["critic_loss"].item() == pytest.approx(expected)
    assert mine.run(batch._replace(terminated_t=torch.ones(1)), noise, 1)["critic_loss"].item() == 0.0


def test_an_edited_stock_is_what_the_wrapper_would_have_shown():
    mine = small()
    traces = []
    for initial in (-1.5, 0.75):
        env = Stock(Counter(), initial=initial, gamma=GAMMA)
        traces.append([env.reset()[0]["stock"]] + [env.step(np.zeros(1))[0]["stock"] for _ in range(3)])
    noise = torch.tensor([[(0.75 + 2.0) / 4.0, 0.0]])
    (shift,) = mine.algorithm.shifts(torch.tensor([-1.5]), noise)
    assert shift.tolist() == pytest.approx([0.0, 2.25, -0.5])
    assert np.concatenate(traces[0]) + shift[1].item() == pytest.approx(np.concatenate(traces[1]))


def test_other_stocks_at_once_are_as_one_after_the_other():
    actor = small().modules["actor"]
    obs, stocks = rows(B).obs, torch.randn(B, 5)
    at_once = actor(obs, stocks)
    assert at_once.shape == (B, 5, 3, M)
    for e in range(5):
        torch.testing.assert_close(at_once[:, e], actor(obs | {"stock": stocks[:, e : e + 1]}))


# -- acting -----------------------------------------------------------------------------------------


def told(stock, discount=1.0):
    return {
        "observation": np.zeros(3, np.float32), "stock": np.float32([stock]), "discount": np.float32([discount]),
    }  # fmt: skip


LAWS = [[-3.0, -3.0, 3.0, 9.0], [0.0] * 4, [-1.0, 1.0, 1.0, 1.0]]


@pytest.mark.parametrize(
    "objective,choices",
    [
        # stock and what is best at it
        ("mean", {-5.0: 5, 0.0: 5, 5.0: 5}),
        ("cvar", {-1.0: 7, 0.0: 6, 1.0: 7, 2.0: 7, 3.0: 5, 5.0: 5}),
        ("target", {0.0: 6, -1.0: 7, -8.0: 5}),
        ("exceedance", {0.0: 6, -1.0: 7, -2.0: 5, 1.0: 7, 3.0: 5}),
    ],
)
def test_the_action_depends_on_the_stock_and_ties_go_to_the_better_mean(objective, choices):
    """Means 1.5, 0 and 0.5. With cvar a stock of 1 makes the second and the third safe, one of 3 all of them."""
    agent = make("d_eta_n", CHOOSY, objective=objective, **SMALL)
    fixed(agent.learner, "actor", LAWS)
    found = {stock: int(agent.predict(told(stock), deterministic=True)[0]) for stock in choices}
    assert found == choices
    # the same in the money of step 0, at gamma^t = 1/4
    assert {s: int(agent.predict(told(s / 4.0, 0.25), deterministic=True)[0]) for s in choices} == choices
