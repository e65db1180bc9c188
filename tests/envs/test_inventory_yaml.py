"""Networks from files: what they say, and how a wrong one is refused."""

from importlib.resources import files

import numpy as np
import pytest
import torch
from ctrlrl_envs.inventory import Link, NetworkError, Normal, Poisson, Series, Split, Store, Warehouse, read_network

GOOD = """\
unmet_demand: lost
stores:
  a: {holding_cost: 1, unmet_cost: 9}
  b: {holding_cost: 1.5, unmet_cost: 8}
warehouses:
  depot: {holding_cost: 0.3}
links:
  - {from: supplier, to: depot, lead_time: 3}
  - {from: depot, to: a, lead_time: 2, cost: 0.1}
  - {from: depot, to: b, lead_time: 1}
demand:
  distribution: normal
  mean: {b: 7, a: 5}
  std: 2
"""


def read(tmp_path, text):
    path = tmp_path / "net.yaml"
    path.write_text(text)
    return read_network(path)


def test_a_file_is_read_as_it_is_written(tmp_path):
    problem = read(tmp_path, GOOD)
    network = problem.network
    assert network.stores == (Store("a", 1.0, 9.0), Store("b", 1.5, 8.0))
    assert network.warehouses == (Warehouse("depot", 0.3),)
    assert network.links == (Link("supplier", "depot", 3), Link("depot", "a", 2, 0.1), Link("depot", "b", 1))
    assert (network.unmet_demand, network.objective) == ("lost", "cost")
    demand = problem.demand
    assert isinstance(demand, Normal) and demand.clip and demand.correlation == 0.0
    assert demand.mean.tolist() == [5, 7] and demand.std.tolist() == [2, 2]
    assert problem.name == "net" and problem.splits["test"] == Split(5000, 3000)


def test_the_example_is_a_good_file():
    assert read_network(files("ctrlrl_envs.inventory") / "example.yaml").initial == (0.0, 1.0)
    problem = read_network(str(files("ctrlrl_envs.inventory") / "example.yaml"))
    assert problem.network.names == ("north", "south", "depot")
    assert problem.demand.correlation == 0.5 and problem.splits["dev"] == Split(100, 60)


def test_all_that_can_be_said(tmp_path):
    text = GOOD.replace("unmet_demand: lost", "unmet_demand: backlogged\nobjective: profit")
    text = text.replace("0.3}", "0.3, holds: false}").replace("std: 2", "std: {a: 1, b: 0}\n  clip: false\n")
    text += (
        "  correlation: -0.5\nperiods:\n  train: {length: 9}\n  dev: {length: 9, ignored: 3}\n  test: {length: 50}\n"
    )
    problem = read(tmp_path, text)
    assert problem.network.unmet_demand == "backlogged" and problem.network.objective == "profit"
    assert not problem.network.warehouses[0].holds and not problem.demand.clip
    assert problem.demand.correlation == -0.5 and problem.demand.std.tolist() == [1, 0]
    assert problem.splits == {"train": Split(9), "dev": Split(9, 3), "test": Split(50)}


def test_correlations_as_a_matrix_in_the_order_of_the_stores(tmp_path):
    third = GOOD.replace("warehouses:", "  c: {holding_cost: 1, unmet_cost: 9}\nwarehouses:").replace(
        "\ndemand:", "\n  - {from: depot, to: c, lead_time: 1}\ndemand:"
    )
    rows = [[1, 0.8, -0.3], [0.8, 1, 0.1], [-0.3, 0.1, 1]]
    demand = read(tmp_path, third.replace("{b: 7, a: 5}", "9") + f"  correlation: {rows}\n").demand
    assert demand.correlation.tolist() == rows
    drawn = demand.draw(5000, Split(5), torch.Generator().manual_seed(0)).demand.flatten(0, 1)
    np.testing.assert_allclose(np.corrcoef(drawn.T), rows, atol=0.03)


def test_stock_at_the_start(tmp_path):
    assert read(tmp_path, GOOD).initial == (0.0, 1.0)
    assert read(tmp_path, GOOD + "initial: [0.5, 2]\n").initial == (0.5, 2.0)


def test_statistics_of_recorded_demand_are_those_of_the_train_periods(tmp_path, recorded):
    # of periods 0 to 24: 2 to look back on, 16 ignored, and 3/5 of the rest, 18 to 31
    problem = read(tmp_path, recorded)
    train = problem.splits["train"]
    assert train.first + train.periods == 31 and problem.demand.mean.tolist() == [150, 15]
    parts = "".join(f"  {name}: {{first: 2, length: {n}}}\n" for name, n in (("train", 7), ("dev", 30), ("test", 38)))
    demand = read(tmp_path, recorded + "periods:\n" + parts).demand
    assert demand.mean.tolist() == [40, 4] and float(demand.std[1]) == pytest.approx(7.5**0.5)


def test_poisson_demand(tmp_path):
    problem = read(tmp_path, GOOD.replace("normal", "poisson").replace("  std: 2\n", ""))
    assert isinstance(problem.demand, Poisson) and problem.demand.mean.tolist() == [5, 7]


SERIES = """\
demand:
  distribution: series
  file: sales.csv
  window: 2
  features: {file: days.csv, columns: [day]}
"""


@pytest.fixture
def recorded(tmp_path):
    (tmp_path / "sales.csv").write_text("b,a\n" + "".join(f"{i},{10 * i}\n" for i in range(40)))
    (tmp_path / "days.csv").write_text("day\n" + "".join(f"{i}\n" for i in range(40)))
    return GOOD[: GOOD.index("demand:\n")] + SERIES


def test_recorded_demand_by_names_of_stores(tmp_path, recorded):
    demand = read(tmp_path, recorded).demand
    assert isinstance(demand, Series) and demand.window == 2 and demand.features == 1
    # the columns are those of the stores, in the order of the stores
    assert demand.values[0, :, 3].tolist() == [30, 3] and demand.time[3].tolist() == [3]
    parts = (("train", 2), ("dev", 14), ("test", 28))
    lines = [f"  {name}: {{first: {first}, length: 12, ignored: 2}}\n" for name, first in parts]
    text = recorded + "periods:\n" + "".join(lines)
    problem = read(tmp_path, text)
    assert problem.splits["test"] == Split(12, 2, 28)
    drawn = problem.demand.draw(None, problem.splits["test"])
    assert drawn.past[0, :, 1].tolist() == [26, 27] and drawn.time[:, 0].tolist() == list(range(28, 40))
    np.savez(tmp_path / "sales.npz", values=np.zeros((5, 2, 40)))
    assert read(tmp_path, recorded.replace("csv\n  w", "npz\n  w")).demand.values.shape == (5, 2, 40)


@pytest.mark.parametrize(
    ("old", "new", "line", "text"),
    [
        # what cannot be supplied
        ("to: a, lead_time: 2", "to: a, lead_time: 0", 9, "link depot -> a: lead time 0 must be a whole number"),
        ("to: a, lead_time: 2", "to: a, lead_time: 1.5", 9, "link depot -> a: lead time 1.5"),
        ("to: a, lead_time: 2", "to: a, lead_time: soon", 9, "lead_time must be a whole number.*'soon'"),
        ("to: b", "to: c", 10, "link depot -> c: there is no place 'c'"),
        ("from: depot, to: b", "from: hub, to: b", 10, "link hub -> b: there is no place 'hub'"),
        ("from: depot, to: b", "from: a, to: b", 10, "a is a store, which sends nothing"),
        ("cost: 0.1", "cost: -0.1", 9, "link depot -> a: cost must be a number of at least 0, found '-0.1'"),
        ("  - {from: depot, to: b, lead_time: 1}\n", "", 4, "nothing ever reaches b"),
        ("  - {from: supplier, to: depot, lead_time: 3}\n", "", 3, "nothing ever reaches a"),
        ("to: b, lead_time: 1}", "to: a, lead_time: 1}", 10, "link depot -> a is given twice"),
        ("depot: {holding_cost: 0.3}", "depot: {holding_cost: 1}\n  hub: {holding_cost: 1}", 7, "nothing .* hub"),
        # costs and places
        ("holding_cost: 1.5", "holding_cost: -1", 4, "store b: holding_cost must be a number of at least 0"),
        ("holding_cost: 0.3", "holding_cost: .nan", 6, "warehouse depot: holding_cost must be .* '.nan'"),
        ("unmet_cost: 8", "unmet_cost: yes", 4, "store b: unmet_cost must be .* 'yes'"),
        ("unmet_cost: 8", "price: 8", 4, "store b: 'price' is unknown; known here: holding_cost, unmet_cost"),
        (", unmet_cost: 8", "", 4, "store b: unmet_cost is missing"),
        ("  b: {h", "  a: {h", 4, "stores: 'a' is given twice"),
        ("  b: {h", "  supplier: {h", 4, "'supplier' is the source outside"),
        ("  b: {h", "  7: {h", 4, "must be text .in quotes.*'7'"),
        ("  depot: {holding_cost: 0.3}", "  a: {holding_cost: 0.3}", 6, "the name 'a' is given 2 times"),
        ("  depot: {holding_cost: 0.3}", "  depot: 0.3", 6, "must be written as 'name: value', found '0.3'"),
        ("0.3}", "0.3, holds: 1}", 6, "holds must be true or false"),
        # the file as a whole
        ("unmet_demand: lost", "unmet_demand: gone", 1, "unmet_demand must be backlogged or lost, found 'gone'"),
        ("unmet_demand: lost", "unmet: lost", 1, "the file: 'unmet' is unknown"),
        ("links:", "routes:", 7, "the file: 'routes' is unknown"),
        (GOOD[GOOD.index("demand:\n") :], "", 1, "the file: demand is missing"),
        ("mean: {b: 7, a: 5}", "mean: {b: 7}", 13, "demand: mean: a is missing"),
        ("mean: {b: 7, a: 5}", "mean: {b: 7, a: 5, c: 1}", 13, "demand: mean: 'c' is unknown"),
        ("mean: {b: 7, a: 5}", "mean: -5", 13, "demand: mean must be a number of at least 0"),
        ("normal", "uniform", 12, "distribution must be normal or poisson or series"),
        ("normal", "poisson", 14, r"demand \(poisson\): 'std' is unknown"),
        ("  distribution: normal\n", "", 12, "distribution is missing"),
        ("  std: 2", "  std: 2\n  correlation: 1", 15, "correlation must be above -1 .with 2 stores. and below 1"),
        ("  std: 2", "  std: 2\n  correlation: 0.5x", 15, "correlation must be a number, found '0.5x'"),
        ("  std: 2", "  std: 2\n  correlation: [1, 0.5]", 15, "a list of 2 numbers, found '1'"),
        ("  std: 2", "  std: 2\n  correlation: [[1, 0.5]]", 15, "correlation has 1 rows; expected .* of 2 stores"),
        ("  std: 2", "  std: 2\n  correlation: [[1, 0.5],\n   [0.5]]", 16, "list of 2 numbers, found a list of 1"),
        ("  std: 2", "  std: 2\n  correlation: [[1, 0.5], [0.4, 1]]", 15, "is not symmetric"),
        ("  std: 2", "  std: 2\n  correlation: [[1, 2], [2, 1]]", 15, "is not positive definite"),
        ("  std: 2", "  std: 2\n  correlation: [[1, 0.5], [0.5, 2]]", 15, "found the diagonal"),
        ("std: 2", "std: 2\ninitial: 3", 15, "initial must be a list of 2 numbers, found '3'"),
        ("std: 2", "std: 2\ninitial: [2, 1]", 15, "0 <= low <= high, found .2.0, 1.0."),
        ("std: 2", "std: 2\ninitial: [-1, 1]", 15, "0 <= low <= high, found .-1.0, 1.0."),
        ("std: 2", "std: 1" + 400 * "0", 14, "demand: std must be a number of at least 0"),
        # what is not what it looks like
        ("  b: {h", "  2020-13-45: {h", 4, "must be text .in quotes.* date.*'2020-13-45'"),
        ("  b: {h", "  2020-12-05: {h", 4, "must be text .in quotes.* date.*'2020-12-05'"),
        ("to: a, lead_time: 2", "to: a, lead_time: !!int x", 9, "lead_time must be a whole number .* found 'x'"),
        ("to: a, lead_time: 2", "to: a, lead_time: !!int ''", 9, "lead_time must be a whole number .* found noth"),
        ("cost: 0.1", "cost: !!float x", 9, "cost must be a number of at least 0, found 'x'"),
        ("0.3}", "0.3, holds: !!bool x}", 6, "holds must be true or false, found 'x'"),
        ("  b: {h", "  !!timestamp b: {h", 4, "must be text"),
        ("std: 2", "std: \x07", 14, "this is no YAML: special characters are not allowed"),
        ("lead_time: 3}", "lead_time: 3", 9, "this is no YAML"),
        ("unmet_demand: lost", "unmet_demand: !!python/name:os.system x", 1, "unmet_demand must be"),
        ("std: 2", "std: 2\nperiods: {train: {length: 5}}", 15, "periods: dev is missing"),
    ],
)  # fmt: skip
def test_a_wrong_file_is_refused_with_its_line(tmp_path, old, new, line, text):
    assert old in GOOD
    with pytest.raises(NetworkError, match=rf"net\.yaml, line {line}: .*{text}"):
        read(tmp_path, GOOD.replace(old, new, 1))


@pytest.mark.parametrize(
    ("old", "new", "line", "text"),
    [
        ("window: 2", "window: -1", 14, "window must be a whole number of at least 0"),
        ("window: 2", "window: 30", 12, "series of 40 periods are too short"),
        ("[day]", "day", 15, "columns must be a list"),
        ("[day]", "[hour]", 15, "no column 'hour'"),
        ("file: sales.csv", "file: days.csv", 13, "no column 'a'"),
        ("columns: [day]}", "columns: [day]}\nperiods: {train: {first: 1, length: 9}, dev: {first: 2, length: 9}, "
         "test: {first: 2, length: 9}}", 16, "periods of train: 1 to 10 do not fit"),
        ("columns: [day]}", "columns: [day]}\nperiods: {train: {first: 2, length: 9}, dev: {first: 32, length: 9}, "
         "test: {first: 2, length: 9}}", 16, "periods of dev: 32 to 41 do not fit series of 40"),
        ("columns: [day]}", "columns: [day]}\nperiods: {train: {length: 9}, dev: {first: 2, length: 9}, "
         "test: {first: 2, length: 9}}", 16, "periods of train: first is missing"),
    ],
)  # fmt: skip
def test_wrong_recorded_demand_is_refused_with_its_line(tmp_path, recorded, old, new, line, text):
    with pytest.raises(NetworkError, match=rf"net\.yaml, line {line}: .*{text}"):
        read(tmp_path, recorded.replace(old, new, 1))


def test_periods_that_leave_no_figures_are_refused(tmp_path):
    part = "{length: 5, ignored: 5}"
    with pytest.raises(NetworkError, match="line 15: periods of train: all 5 periods are ignored"):
        read(tmp_path, GOOD + f"periods: {{train: {part}, dev: {part}, test: {part}}}\n")


def test_files_that_cannot_be_read(tmp_path, recorded):
    with pytest.raises(NetworkError, match=f"{tmp_path} is a folder; expected a YAML file"):
        read_network(tmp_path)
    (tmp_path / "net.yaml").write_bytes(GOOD.replace("  b: {h", "  café: {h").encode("latin-1"))
    with pytest.raises(NetworkError, match=r"net\.yaml, line 4: byte 0xe9 is not UTF-8"):
        read_network(tmp_path / "net.yaml")
    (tmp_path / "net.yaml").write_text("\ufeff" + GOOD)
    assert read_network(tmp_path / "net.yaml").network.names == ("a", "b", "depot")
    (tmp_path / "sales.csv").write_bytes(b"b,a\n1,2\n\xff,3\n")
    with pytest.raises(NetworkError, match=r"net\.yaml, line 13: demand: file: .*sales\.csv, line 3: byte 0xff"):
        read(tmp_path, recorded)


@pytest.mark.parametrize("wrong", [(), (None,), ("",), ({"stores": 3},)])
def test_a_network_must_be_named(wrong):
    with pytest.raises(NetworkError, match=r"network=.* must be the path of a YAML file"):
        read_network(*wrong)


def test_files_that_are_not_there(tmp_path, recorded):
    with pytest.raises(FileNotFoundError, match=r"no\.yaml"):
        read_network(tmp_path / "no.yaml")
    with pytest.raises(FileNotFoundError, match=r"net\.yaml, line 13: demand: file: there is no file"):
        read(tmp_path, recorded.replace("sales.csv", "gone.csv"))
    with pytest.raises(NetworkError, match="line 1: the file is empty"):
        read(tmp_path, "# nothing\n")


def test_a_file_runs_no_code(tmp_path):
    with pytest.raises(NetworkError):
        read(tmp_path, GOOD.replace("std: 2", "std: !!python/object/apply:builtins.exit [3]"))
    assert torch.is_tensor(read(tmp_path, GOOD).demand.mean)
