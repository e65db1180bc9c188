"""The simulator of inventory networks: periods worked by hand, derivatives, what is possible, what is seen."""

import math

import pytest
import torch
from ctrlrl_envs.inventory.demand import Drawn, Normal, Series, Split
from ctrlrl_envs.inventory.network import SUPPLIER, Link, Network, Store, Warehouse
from ctrlrl_envs.inventory.simulator import InventorySimulator, Problem

DOUBLE = torch.float64


def simulator(network, dtype=DOUBLE, **more):
    mean = torch.full((len(network.stores),), 5.0)
    return InventorySimulator(Problem("test", network, more.pop("demand", Normal(mean, mean / 3)), **more), dtype=dtype)


def started(sim, inventory, demand):
    """A state with these places (lists of slots) and demand [T][S], for one system."""
    filled = torch.zeros(1, sim.places, sim.slots, dtype=sim.dtype)
    for place, slots in enumerate(inventory):
        filled[0, place, : len(slots)] = torch.tensor(slots, dtype=sim.dtype)
    return sim.reset(None, Drawn(torch.tensor([demand], dtype=sim.dtype)), inventory=filled)


def sent(sim, *amounts):
    return torch.tensor([amounts], dtype=sim.dtype)


def one_store(lead_time, unmet_demand="backlogged", objective="cost"):
    link = Link(SUPPLIER, "a", lead_time)
    return Network((Store("a", 1.0, 9.0),), (), (link,), unmet_demand, objective)


def two_stores(unmet_demand="lost", objective="cost", charge=(0.0, 0.0, 0.0), holds=True):
    links = (("w", "a", 1), ("w", "b", 3), (SUPPLIER, "w", 2))
    return Network(
        (Store("a", 1.0, 9.0), Store("b", 2.0, 5.0)),
        (Warehouse("w", 0.5, holds),),
        tuple(Link(*x, cost) for x, cost in zip(links, charge, strict=True)),
        unmet_demand,
        objective,
    )


def tangled(unmet_demand="lost", objective="cost", charged=True, holds=True):
    """Three stores; v and w share two of them, one at the same lead time; u supplies v; links in no order."""
    ways = [("v", "a", 2), (SUPPLIER, "u", 3), ("w", "b", 1), ("v", "b", 1), ("u", "v", 2), ("w", "c", 4),
            (SUPPLIER, "w", 1), ("w", "a", 3), (SUPPLIER, "c", 2)]  # fmt: skip
    return Network(
        (Store("a", 1.0, 9.0), Store("b", 0.7, 4.0), Store("c", 1.3, 6.0)),
        (Warehouse("u", 0.1), Warehouse("v", 0.2, holds), Warehouse("w", 0.4)),
        tuple(Link(*way, 0.3 * i * charged) for i, way in enumerate(ways)),
        unmet_demand,
        objective,
    )


KINDS = [(u, o) for u in ("lost", "backlogged") for o in ("cost", "profit")]


def drawn_tangled(unmet_demand="lost", objective="cost", batch=5, **more):
    """A simulator with inventory, action and demand of a few systems, some of whose stores run out."""
    sim = simulator(tangled(unmet_demand, objective, **more))
    draw = torch.Generator().manual_seed(3)
    inventory = 8.0 * torch.rand(batch, sim.places, sim.slots, generator=draw, dtype=DOUBLE)
    inventory[:, sim.stores :, 0] += 20.0
    action = 5.0 * torch.rand(batch, len(sim.network.links), generator=draw, dtype=DOUBLE)
    demand = 8.0 * torch.rand(batch, 1, sim.stores, generator=draw, dtype=DOUBLE)
    return sim, inventory, action, demand


# -- the order of events --------------------------------------------------------------------------


def test_backlog_waits_and_orders_join_the_end_of_the_pipeline():
    sim = simulator(one_store(2))
    state = started(sim, [[5.0, 3.0]], [[7.0], [0.0]])
    state, cost = sim.step(state, sent(sim, 4.0))
    assert cost.tolist() == [18.0] and state.inventory.tolist() == [[[1.0, 4.0]]] and state.period == 1
    state, cost = sim.step(state, sent(sim, 0.0))
    assert cost.tolist() == [1.0] and state.inventory.tolist() == [[[5.0, 0.0]]]


def test_lost_demand_does_not_wait():
    sim = simulator(one_store(2, "lost"))
    state, cost = sim.step(started(sim, [[5.0, 3.0]], [[7.0]]), sent(sim, 4.0))
    assert cost.tolist() == [18.0] and state.inventory.tolist() == [[[3.0, 4.0]]]


def test_with_a_lead_time_of_one_an_order_meets_the_next_demand_but_not_this():
    sim = simulator(one_store(1, "lost"))
    state, cost = sim.step(started(sim, [[0.0]], [[3.0], [4.0]]), sent(sim, 10.0))
    assert cost.tolist() == [27.0] and state.inventory.tolist() == [[[10.0]]]
    state, cost = sim.step(state, sent(sim, 0.0))
    assert cost.tolist() == [6.0] and state.inventory.tolist() == [[[6.0]]]


@pytest.mark.parametrize("lead_time", range(1, 7))
def test_an_order_is_on_hand_after_its_lead_time(lead_time):
    sim = simulator(one_store(lead_time))
    state = started(sim, [[0.0]], [[0.0]] * 8)
    seen = []
    for period in range(8):
        seen.append(state.inventory[0, 0, 0].item())
        state, _ = sim.step(state, sent(sim, float(period == 0)))
    assert seen == [0.0] * lead_time + [1.0] * (8 - lead_time)


MIXED = [[4.0], [1.0, 2.0, 3.0], [10.0, 6.0]], [[6.0, 1.0]], (3.0, 4.0, 7.0)


@pytest.mark.parametrize("unmet_demand, first", [("lost", 3.0), ("backlogged", 1.0)])
def test_mixed_lead_times_of_a_warehouse_and_its_stores(unmet_demand, first):
    sim = simulator(two_stores(unmet_demand))
    state, cost = sim.step(started(sim, *MIXED[:2]), sent(sim, *MIXED[2]))
    # a lacks 2 at 9; b has nothing left; of 10 the warehouse keeps 3 at 0.5
    assert cost.tolist() == [19.5]
    assert state.inventory.tolist() == [[[first, 0.0, 0.0], [2.0, 3.0, 4.0], [9.0, 7.0, 0.0]]]


def test_links_charge_what_is_sent_along_them():
    sim = simulator(two_stores(charge=(0.25, 0.5, 1.0)))
    _, cost = sim.step(started(sim, *MIXED[:2]), sent(sim, *MIXED[2]))
    assert cost.tolist() == [19.5 + 0.75 + 2.0 + 7.0]


def test_profit_is_the_price_of_what_is_sold_less_holding():
    sim = simulator(two_stores(objective="profit"))
    _, cost = sim.step(started(sim, *MIXED[:2]), sent(sim, *MIXED[2]))
    assert cost.tolist() == [-9.0 * 4.0 - 5.0 * 1.0 + 1.5]
    _, cost = sim.step(started(sim, [[4.0], [7.0], [0.0]], [[6.0, 1.0]]), sent(sim, 0.0, 0.0, 0.0))
    assert cost.tolist() == [-9.0 * 4.0 - 5.0 * 1.0 + 2.0 * 6.0]


def test_what_is_on_its_way_costs_nothing():
    sim = simulator(two_stores())
    state = started(sim, [[0.0, 50.0, 60.0], [0.0, 70.0, 80.0], [0.0, 900.0]], [[0.0, 0.0]])
    assert sim.step(state, sent(sim, 0.0, 0.0, 100.0))[1].tolist() == [0.0]


def by_hand(network, inventory, action, demand):
    """One period of one system in plain Python."""
    places, cost = [list(p) for p in inventory], 0.0
    after = [[*p[1:], 0.0] for p in places]
    for place, spot in enumerate(network.places):
        left = places[place][0] - sum(a for a, s in zip(action, network.sources, strict=True) if s == place)
        if place < len(network.stores):
            left -= demand[place]
            sold = min(places[place][0], demand[place])
            cost += -spot.unmet_cost * sold if network.objective == "profit" else spot.unmet_cost * max(-left, 0.0)
        cost += spot.holding_cost * max(left, 0.0)
        after[place][0] += max(left, 0.0) if network.unmet_demand == "lost" else left
    for link, amount, target in zip(network.links, action, network.targets, strict=True):
        cost += link.cost * amount
        after[target][link.lead_time - 1] += amount
    return after, cost


@pytest.mark.parametrize("unmet_demand, objective", KINDS)
def test_a_tangled_network_is_as_in_plain_python(unmet_demand, objective):
    sim, inventory, action, demand = drawn_tangled(unmet_demand, objective)
    state, cost = sim.step(sim.reset(None, Drawn(demand), inventory=inventory), action)
    for i in range(len(cost)):
        after, paid = by_hand(sim.network, inventory[i].tolist(), action[i].tolist(), demand[i, 0].tolist())
        torch.testing.assert_close(state.inventory[i], torch.tensor(after, dtype=DOUBLE))
        assert cost[i].item() == pytest.approx(paid)


def test_systems_of_a_batch_do_not_touch_each_other():
    sim, inventory, action, demand = drawn_tangled()
    inventory.requires_grad_()
    state, cost = sim.step(sim.reset(None, Drawn(demand), inventory=inventory), action)
    alone, paid = sim.step(sim.reset(None, Drawn(demand[2:3]), inventory=inventory[2:3]), action[2:3])
    assert torch.equal(alone.inventory[0], state.inventory[2]) and paid[0] == cost[2]
    (grad,) = torch.autograd.grad(cost[2] + state.inventory[2].sum(), inventory)
    assert grad[2].any() and not grad[[0, 1, 3, 4]].any()


# -- derivatives ----------------------------------------------------------------------------------


@pytest.mark.parametrize("unmet_demand, objective", KINDS)
def test_derivatives_are_those_of_finite_differences(unmet_demand, objective):
    sim, inventory, action, demand = drawn_tangled(unmet_demand, objective, batch=2)
    price = torch.tensor([[3.0, 5.0, 7.0], [2.0, 4.0, 8.0]], dtype=DOUBLE)

    def two_periods(inventory, action, demand, price):
        # the second without orders
        state = sim.reset(None, Drawn(demand.expand(2, 2, 3), unmet_cost=price), inventory=inventory)
        state, cost = sim.step(state, action)
        state, later = sim.step(state, torch.zeros_like(action))
        return state.inventory, cost, later

    given = (inventory.requires_grad_(), action.requires_grad_(), demand, price)
    assert torch.autograd.gradcheck(two_periods, given)
    assert torch.autograd.gradgradcheck(two_periods, given)
    # by demand and prices, too, for those who want to know
    given = (inventory.detach(), action.detach(), demand.requires_grad_(), price.requires_grad_())
    assert torch.autograd.gradcheck(two_periods, given)


@pytest.mark.parametrize("unmet_demand, objective", KINDS)
def test_where_exactly_nothing_is_left_derivatives_are_those_of_relu(unmet_demand, objective):
    sim = simulator(two_stores(unmet_demand, objective))
    for demand_derived in (False, True):  # by hand, and by autograd
        state = started(sim, [[3.0], [2.0], [5.0]], [[3.0, 2.0]])
        state.inventory.requires_grad_()
        state.drawn.demand.requires_grad_(demand_derived)
        after, cost = sim.step(state, sent(sim, 2.0, 3.0, 0.0))
        (grad,) = torch.autograd.grad(cost.sum(), state.inventory, retain_graph=True)
        assert not grad.any()
        (grad,) = torch.autograd.grad(after.inventory[0, :, 0].sum(), state.inventory)
        assert grad[0, :, 0].tolist() == [float(unmet_demand == "backlogged")] * 3


def test_a_compiled_step_is_the_same():
    sim, inventory, action, demand = drawn_tangled()

    def stretch(inventory, action):
        state = sim.reset(None, Drawn(demand.expand(5, 2, 3)), inventory=inventory)
        state, cost = sim.step(state, action)
        state, later = sim.step(state, action)
        return state.inventory, cost + later

    found = []
    for function in (stretch, torch.compile(stretch, backend="aot_eager", fullgraph=True)):
        given = inventory.clone().requires_grad_(), action.clone().requires_grad_()
        after, cost = function(*given)
        found.append([after, cost, *torch.autograd.grad(cost.sum() + (after**2).sum(), given)])
    for mine, theirs in zip(*found, strict=True):
        torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize("level, known, slope", [
    (26.0, 10.827, -2.899), (28.0, 7.016, -1.009), (29.585, 6.279, 0.0), (31.0, 6.692, 0.531),
])  # fmt: skip
def test_cost_of_a_base_stock_level_and_its_derivative_are_known_in_closed_form(level, known, slope):
    # demand of lead time and one period more: N(25, 5 * 1.6^2); slope: (h + p) Phi((S - 25) / 3.578) - p
    assert 10.0 * (0.5 + 0.5 * math.erf((level - 25.0) / math.sqrt(10.0 * 1.6**2))) - 9.0 == pytest.approx(
        slope, abs=2e-3
    )
    demand = Normal(torch.tensor([5.0]), torch.tensor([1.6]), clip=False)
    sim = simulator(one_store(4), torch.float32, demand=demand, splits={"train": Split(30)})
    state = sim.reset(8192, generator=torch.Generator().manual_seed(1))
    order_up_to = torch.tensor(level, requires_grad=True)
    total = torch.zeros(())
    for period in range(30):
        state, cost = sim.step(state, (order_up_to - state.inventory.sum(2)).relu())
        total = total + cost.mean() * (period >= 10)
    (total / 20.0).backward()
    assert total.item() / 20.0 == pytest.approx(known, abs=0.08)
    assert order_up_to.grad.item() == pytest.approx(slope, abs=0.1)


# -- what is possible -----------------------------------------------------------------------------


def feasible(sim, on_hand, *amounts):
    inventory = torch.zeros(1, sim.places, sim.slots, dtype=sim.dtype)
    inventory[0, sim.stores :, 0] = torch.tensor(on_hand, dtype=sim.dtype)
    inventory[0, sim.stores :, 1] = 100.0  # on its way: not there yet
    return sim.feasible(inventory, sent(sim, *amounts))[0].tolist()


def test_too_much_is_cut_in_proportion_and_the_supplier_never_runs_out():
    sim = simulator(two_stores())
    assert feasible(sim, 6.0, 4.0, 8.0, 1000.0) == [2.0, 4.0, 1000.0]
    assert feasible(sim, 12.0, 4.0, 8.0, 7.0) == [4.0, 8.0, 7.0]
    assert feasible(sim, 50.0, 0.1, 0.7, 0.3) == [0.1, 0.7, 0.3]
    assert feasible(sim, 6.0, -4.0, 8.0, -1.0) == [0.0, 6.0, 0.0]
    assert feasible(sim, -3.0, 4.0, 8.0, 1.0) == [0.0, 0.0, 1.0]


def test_a_warehouse_that_cannot_hold_sends_all_it_has():
    sim = simulator(two_stores(holds=False))
    assert feasible(sim, 6.0, 1.0, 2.0, 5.0) == [2.0, 4.0, 5.0]
    assert feasible(sim, 6.0, 4.0, 8.0, 5.0) == [2.0, 4.0, 5.0]
    assert feasible(sim, 6.0, 0.0, 0.0, 5.0) == [3.0, 3.0, 5.0]


def test_each_warehouse_of_a_tangled_network_is_cut_by_itself():
    sim = simulator(tangled(holds=False))
    # v: a, b get 1, 3 of 8; u: 5 to v, of 10; w: b, c, a get 4, 4, 8 of 4; links as in tangled()
    found = feasible(sim, [10.0, 8.0, 4.0], 1.0, 9.0, 4.0, 3.0, 5.0, 4.0, 9.0, 8.0, 9.0)
    assert found == [2.0, 9.0, 1.0, 6.0, 5.0, 1.0, 9.0, 2.0, 9.0]


@pytest.mark.parametrize("dtype", [torch.float32, DOUBLE])
@pytest.mark.parametrize("holds", [True, False])
@pytest.mark.parametrize("stock", [0.0, 1e-30, 5.0])
@pytest.mark.parametrize("wish", [0.0, 1e-38, 1e-30, 1e-12, 2.0])
def test_of_nothing_exactly_nothing_is_sent_and_gradients_are_finite(stock, wish, holds, dtype):
    sim = simulator(two_stores(holds=holds), dtype)
    inventory = torch.zeros(1, 3, 3, dtype=dtype)
    inventory[0, 2, 0] = stock
    action = sent(sim, wish, wish, 1.0)
    inventory.requires_grad_(), action.requires_grad_()
    found = sim.feasible(inventory, action)
    if stock == 0.0:
        assert found[0, :2].tolist() == [0.0, 0.0]
    assert found[0, :2].sum() <= stock * (1.0 + 1e-6)
    if not holds:
        assert found[0, :2].sum().item() == pytest.approx(stock)
    for grad in torch.autograd.grad((found * torch.tensor([1.0, 2.0, 3.0])).sum(), (inventory, action)):
        assert grad.isfinite().all()


@pytest.mark.parametrize("holds", [True, False])
def test_derivatives_of_what_is_possible_are_those_of_finite_differences(holds):
    sim, inventory, action, _ = drawn_tangled(holds=holds)
    inventory[:3, sim.stores :, 0] *= 0.2  # some warehouses run out, some do not
    assert torch.autograd.gradcheck(sim.feasible, (inventory.requires_grad_(), action.requires_grad_()))


def test_what_was_first_observed_in_inference_mode_has_gradients_afterwards():
    sim = simulator(two_stores())
    with torch.inference_mode():
        sim.observe(sim.view(started(sim, [[1.0], [2.0], [3.0]], [[1.0, 1.0]])))
    obs = torch.ones(2, 6, requires_grad=True)
    sim.observe(sim.seen(obs)).square().sum().backward()
    assert obs.grad.tolist() == [[2.0] * 6] * 2


# -- the beginning, and what is seen --------------------------------------------------------------


def test_the_beginning_follows_from_the_generator():
    sim = simulator(two_stores(), torch.float32, splits={"train": Split(4)})
    first, same, other = (sim.reset(16, generator=torch.Generator().manual_seed(s)) for s in (0, 0, 1))
    assert torch.equal(first.inventory, same.inventory) and torch.equal(first.drawn.demand, same.drawn.demand)
    assert not torch.equal(first.inventory, other.inventory)
    assert not torch.equal(first.drawn.demand, other.drawn.demand)


@pytest.mark.parametrize("slots, filled", [(None, [1, 3, 0]), (1, [1, 1, 0]), (2, [1, 2, 0])])
def test_stores_start_with_shares_of_their_mean_demand_and_warehouses_empty(slots, filled):
    sim = simulator(two_stores(), torch.float32, initial=(0.5, 2.0), initial_slots=slots, splits={"train": Split(1)})
    inventory = sim.reset(4000, generator=torch.Generator().manual_seed(0)).inventory
    for place, count in enumerate(filled):
        assert not inventory[:, place, count:].any()
        if count:
            drawn = inventory[:, place, :count]
            assert drawn.min() >= 2.5 and drawn.max() <= 10.0
            assert drawn.mean().item() == pytest.approx(6.25, abs=0.2) and drawn.std().item() == pytest.approx(
                2.17, abs=0.1
            )


def test_all_of_a_recorded_series_come_once_with_their_past_prices_and_features():
    values = torch.arange(3 * 2 * 12, dtype=torch.float32).reshape(3, 2, 12)
    unmet, time = torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]]), torch.arange(12.0)[:, None]
    demand = Series(values, window=4, time=time, unmet=unmet)
    sim = simulator(two_stores(), torch.float32, demand=demand, splits={"train": Split(7, first=5)})
    state = sim.reset(None)
    assert state.inventory.shape == (3, 3, 3) and torch.equal(state.drawn.demand, values[:, :, 5:12].transpose(1, 2))
    for period in range(7):
        view = sim.view(state, clairvoyant=True)
        assert torch.equal(view.past, values[:, :, 1 + period : 5 + period].transpose(1, 2))
        assert torch.equal(view.future, values[:, :, 5 + period :].transpose(1, 2))
        assert view.time.tolist() == [[5.0 + period]] and torch.equal(view.unmet_cost, unmet)
        assert sim.view(state).future is None
        state, _ = sim.step(state, torch.zeros(3, 3))
    empty = sim.reset(None, inventory=torch.zeros(3, 3, 3))
    # demand of the first period at the prices of each
    assert sim.step(empty, torch.zeros(3, 3))[1].tolist() == (values[:, :, 5] * unmet).sum(1).tolist()
