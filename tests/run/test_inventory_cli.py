"""``ctrlrl eval RUN`` of runs on inventory networks as a user types it: the lines, the files, and what is refused."""

import json

import gymnasium as gym
import matplotlib.image
import numpy as np
import pytest
from ctrlrl_envs.inventory import InventorySimulator, problems
from helpers.agents import NOISY, make, quiet

from ctrlrl import api
from ctrlrl.inventory import optimal
from ctrlrl.inventory.comparison import Figures, compare
from ctrlrl.run import cli, inventory_cli, inventory_figures
from ctrlrl.types import EnvSpec

BACKLOGGED, LOST = "ctrlrl/OneStoreBacklogged-v0", "ctrlrl/OneStoreLost-v0"


@pytest.fixture
def run(capsys):
    def call(*words):
        status = cli.main([str(w) for w in words])
        out, err = capsys.readouterr()
        assert "Traceback" not in out + err
        return status, out, err

    return call


@pytest.fixture
def no_picture(monkeypatch):
    """Pictures take a second each; what would be drawn."""
    asked = []
    monkeypatch.setattr(inventory_figures, "picture", lambda *arguments: asked.append(arguments) or b"png")
    return asked


def hdpo(tmp_path, policy="base_stock", env=BACKLOGGED, **env_kwargs):
    agent = api.make("hdpo", env, policy=policy, env_kwargs=env_kwargs, device="cpu", threads=1)
    return agent, agent.save(tmp_path / "run")


def figures(**changes):
    given = {
        "split": "test", "periods": 200, "costs": np.array([6.0, 7.0]), "holding": 5.0, "unmet": 1.5, "links": 0.0,
        "known": {}, "clairvoyant": None,
    }  # fmt: skip
    return Figures(**given | changes)


# -- the command line -----------------------------------------------------------------------------


def test_it_prints_the_cost_and_the_gap_and_draws_the_picture(run, tmp_path):
    agent, folder = hdpo(tmp_path, lead_time=2)
    status, out, err = run("eval", folder, "--episodes", 1, "--scenarios", 40, "--out", tmp_path / "r.json")
    assert status == 0, err
    found = compare(agent, InventorySimulator(problems.one_store_backlogged(lead_time=2)), scenarios=40, seed=0)
    lines = out.splitlines()[-4:]
    assert lines[0] == "  test split of one store, backlogged: 40 scenarios, the last 200 of 500 periods"
    assert lines[1] == (
        f"  cost per store and period {found.cost:.5g}, standard error {found.standard_error:.2g} "
        f"(holding {found.holding:.5g}, unmet demand {found.unmet:.5g})"
    )
    # the best of a backlogged store, from the table of its method: 10 phi(z) 1.6 sqrt(3), a little less by clipping
    assert lines[2].startswith("  gap to the optimum of 4.86") and lines[2].endswith(f"{found.gap_error:.2g} %")
    assert lines[3] == f"Picture: {folder / 'inventory.png'}"
    assert matplotlib.image.imread(folder / "inventory.png").std() > 0.05
    data = json.loads((tmp_path / "r.json").read_text())["inventory"]
    assert data["cost"] == pytest.approx(found.cost) and data["scenarios"] == 40 and data["known"]["optimum"] > 4.8


def test_an_agent_of_another_method_gets_the_same_lines(run, tmp_path, no_picture):
    folder = make(LOST, env_kwargs={"lead_time": 1}).save(tmp_path / "run")
    status, out, err = run("eval", folder, "--episodes", 1, "--scenarios", 5, "--plot", tmp_path / "p.png")
    assert status == 0, err
    assert "5 scenarios, the last 200 of 500 periods, orders rounded to whole units" in out
    assert "gap to the optimum of 5.4382: " in out
    assert out.splitlines()[-1] == f"Picture: {tmp_path / 'p.png'}" and (tmp_path / "p.png").read_bytes() == b"png"
    assert not (folder / "inventory.png").exists()


def test_the_seed_chooses_the_scenarios(run, tmp_path, no_picture):
    folder = hdpo(tmp_path, lead_time=1)[1]
    words = ("eval", folder, "--episodes", 1, "--scenarios", 5)
    first, again, other = (run(*words, "--seed", s)[1].splitlines()[-3] for s in (0, 0, 1))
    assert first.startswith("  cost per store") and first == again != other


def test_wrappers_that_rescale_actions_are_no_obstacle_and_others_are_named(run, tmp_path, no_picture):
    rescale = ("gymnasium.wrappers:RescaleAction", {"min_action": -1.0, "max_action": 1.0})
    agent = make(EnvSpec(BACKLOGGED, {"lead_time": 1}, (rescale,)))
    found, why = inventory_cli.network_of(agent)
    assert why == "" and found is not None
    # the middle of the range, by a policy that has not learned yet, is not 0
    asked = found.actor.session(None)(np.zeros((1, 1), np.float32), np.zeros(1))
    low, high = agent.session(None)(np.zeros((1, 1), np.float32), np.zeros(1)), 4 * (5 + 3 * 1.6)
    assert asked == pytest.approx((low + 1) / 2 * high, abs=1e-3)
    folder = make(EnvSpec(BACKLOGGED, {}, (("gymnasium.wrappers:NormalizeObservation", {}),))).save(tmp_path / "run")
    status, out, _ = run("eval", folder, "--episodes", 1)
    assert status == 0 and "no cost per store and period: NormalizeObservation stands between" in out
    status, _, err = run("eval", folder, "--scenarios", 3)
    assert status == 2 and "--scenarios is for runs on inventory networks; NormalizeObservation stands" in err


def test_losses_on_whole_episodes_train_without_a_horizon_and_scaled_actions_are_compared(
    run, tmp_path, monkeypatch, no_picture
):
    monkeypatch.chdir(tmp_path)
    small = ("--n-groups", 2, "--group-size", 2, "--actor-hidden", 8, "--device", "cpu", "--quiet")
    kwargs = {"lead_time": 1, "scale_actions": True}
    words = ("--env", LOST, "--env-kwargs", json.dumps(kwargs), "--steps", 400, "--root", tmp_path / "runs")
    status, out, err = run("train", "reinforce", *words, *small)
    assert status == 0, err
    (folder,) = (p.parent for p in (tmp_path / "runs").rglob("config.json"))
    status, out, err = run("eval", folder, "--episodes", 1, "--scenarios", 5)
    assert status == 0, err
    found = compare(api.load(folder), gym.make(LOST, **kwargs), scenarios=5)
    assert f"cost per store and period {found.cost:.5g}, " in out
    # at 0 it orders about the mean demand of 5; of orders of about 0 nearly all of 45 is unmet
    assert found.unmet < 15.0


def test_episodes_without_any_limit_are_refused_with_the_setting_that_gives_one(run, tmp_path):
    words = ("--env", "ctrlrl/OneStateBump-v0", "--steps", 100, "--root", tmp_path, "--device", "cpu")
    status, _, err = run("train", "reinforce", *words)
    assert status != 0 and "set horizon, the longest episode (on the command line --horizon" in err


def test_a_live_vector_of_networks_says_its_limit():
    many = gym.make_vec(LOST, num_envs=4, vectorization_mode="vector_entry_point", max_episode_steps=7)
    agent = api.make("reinforce", many, n_groups=2, group_size=2, actor_hidden=(8,), device="cpu", eval_every=None)
    quiet(agent, 28)
    assert agent.steps == 4 * 7


def test_a_run_elsewhere_has_no_such_lines_and_its_options_are_refused(run, tmp_path):
    folder = make(NOISY).save(tmp_path / "run")
    status, out, _ = run("eval", folder, "--episodes", 1)
    assert status == 0 and "per store" not in out and not (folder / "inventory.png").exists()
    for words, message in (
        (("--scenarios", 4), "--scenarios is for runs on inventory networks; "),
        (("--plot", "p.png"), "--plot, without --robust, is for runs on inventory networks; "),
        (("--scenarios", 0), "--scenarios 0 must be at least 1"),
        (("--robust", "--scenarios", 4), "leave it or --robust out"),
    ):
        status, _, err = run("eval", folder, *words)
        assert status == 2 and message in err


def test_a_missing_folder_is_noticed_before_the_work(run, tmp_path, monkeypatch):
    folder = hdpo(tmp_path)[1]
    monkeypatch.setattr("ctrlrl.engine.agent.Agent.evaluate", lambda *_: pytest.fail("the work was begun"))
    status, _, err = run("eval", folder, "--plot", "no/such/p.png")
    assert status == 1 and "no/such does not exist" in err


# -- what is said and drawn -----------------------------------------------------------------------


def test_a_bound_is_called_one_and_links_are_told_where_they_cost():
    simulator = InventorySimulator(problems.many_warehouses(10))
    said = inventory_cli.lines(figures(links=0.25, known={"lower_bound": 5.0}), simulator)
    assert said == [
        f"  test split of {simulator.problem.name}: 2 scenarios, the last 200 of 5,000 periods",
        "  cost per store and period 6.5, standard error 0.5 (holding 5, unmet demand 1.5, links 0.25)",
        "  gap to the lower bound of 5: 30.00 %, standard error 10 %",
    ]


def test_profit_is_told_as_such_with_the_share_of_the_clairvoyant():
    network = problems.many_warehouses(10, "shipments").network
    problem = problems.one_store_lost()
    object.__setattr__(network, "objective", "profit")
    object.__setattr__(problem, "network", network)
    found = figures(costs=np.array([-60.0, -64.0]), holding=8.0, unmet=-75.0, links=5.0, clairvoyant=-80.0)
    said = inventory_cli.lines(found, InventorySimulator(problem))
    assert said[0].endswith("periods, orders rounded to whole units")
    assert said[1:] == [
        "  profit per store and period 62, standard error 2 (sales 75, holding -8, links -5)",
        "  share of the clairvoyant's profit of 80: 77.50 %",
    ]


def test_the_order_function_is_drawn_beside_the_best_one_and_base_stock(tmp_path, no_picture):
    agent, _ = hdpo(tmp_path, lead_time=2)
    found, _ = inventory_cli.network_of(agent)
    inventory_cli.draw(found, tmp_path / "p.png", "title")
    (trace, _, title, learned, best, level) = no_picture.pop()
    assert title == "title" and len(trace.demand) == 500 and len(learned) == 3 and best == []
    assert level == pytest.approx(optimal.backlogged_store(5.0, 1.6, 1.0, 9.0, 2, clip=True).level, abs=1e-4)
    agent, _ = hdpo(tmp_path / "lost", env=LOST, lead_time=1)
    found, _ = inventory_cli.network_of(agent)
    inventory_cli.draw(found, tmp_path / "p.png", "title")
    (_, _, _, (learned,), (best,), level) = no_picture.pop()
    table = optimal.lost_sales_store(5.0, 1.0, 9.0, 1)
    assert np.array_equal(best.position, learned.position)
    assert np.array_equal(best.order, table.order(best.position[:, None])) and best.order.max() > 3
    assert level == pytest.approx(optimal.newsvendor(10.0, 10.0**0.5, 1.0, 9.0).level, abs=1e-4)


def test_networks_of_more_than_a_store_have_no_order_function(tmp_path, no_picture):
    agent, _ = hdpo(tmp_path, "echelon_stock", "ctrlrl/Serial-v0", echelons=3)
    found, _ = inventory_cli.network_of(agent)
    inventory_cli.draw(found, tmp_path / "p.png", "title")
    (trace, _, _, learned, best, level) = no_picture.pop()
    assert trace.inventory.shape[1] == 3 and (learned, best, level) == ([], [], None)
