"""Networks that count in units of demand."""

import ctrlrl_envs  # noqa: F401 - registers
import pytest
import torch
from inventory.policies import small_networks
from inventory.policies.small_networks import demanded, make, simulator

import ctrlrl
from ctrlrl.inventory.policies.base import Demanded

NETWORKS = ("vanilla", "data_driven", "symmetry_aware", "gnn")


def views(network, n=3):
    """Some views on the way of a policy that always orders the same."""
    sim = simulator(network)
    state = sim.reset(8, None, torch.Generator().manual_seed(0), "train")
    found = []
    for _ in range(n):
        found.append(sim.view(state))
        state = sim.step(state, sim.feasible(found[-1].inventory, torch.full((8, len(network.targets)), 4.0)))[0]
    return found


@pytest.mark.parametrize("name", NETWORKS)
def test_units_of_demand_are_the_raw_network_on_what_is_divided_by_them(name):
    network = small_networks.warehouse()
    known = demanded(network, mean=4.0, std=2.0)
    policy = make(name, network, known, order_units="demand")
    raw = make(name, network, Demanded(known.mean / 4.0, known.std / 4.0))
    raw.load_state_dict(policy.state_dict())
    assert policy.unit == 4.0 and raw.unit == 1.0
    for view in views(network):
        divided = view._replace(inventory=view.inventory / 4.0)
        torch.testing.assert_close(policy(view), 4.0 * raw(divided), rtol=1e-5, atol=1e-5)
        assert not torch.allclose(policy(view), raw(view), rtol=0.05)


@pytest.mark.parametrize("name", NETWORKS)
def test_orders_grow_with_the_units_in_which_demand_is_counted(name):
    network = small_networks.transshipment()
    policies = [make(name, network, demanded(network, mean=5.0 * k, std=2.0 * k), order_units="demand") for k in (1, 7)]
    for view in views(network):
        small, large = (
            p(view._replace(inventory=view.inventory * k)) for p, k in zip(policies, (1.0, 7.0), strict=True)
        )
        torch.testing.assert_close(large, 7.0 * small, rtol=1e-4, atol=1e-4)


def test_a_start_learns_that_ends_at_an_order_that_never_changes_in_raw_units():
    """One store, lead time 1, unmet demand at 4: the optimum is 3.1666. In raw units this start ends above 15."""
    agent = ctrlrl.HDPO(
        "ctrlrl/OneStoreBacklogged-v0", env_kwargs={"lead_time": 1, "unmet_cost": 4.0}, seed=1, learning_rate=3e-3,
        batch_size=32, dev_scenarios=128, eval_every=None,
    )  # fmt: skip
    agent.learn(100, root=None, progress=False, tensorboard=False)
    assert agent.best_cost == pytest.approx(3.1666, rel=0.03)
