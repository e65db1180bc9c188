"""Recorded demand: arrays and files of a user's own, windows, and what is refused."""

import numpy as np
import pytest
import torch
from ctrlrl_envs.inventory import Series, Split, problems
from ctrlrl_envs.inventory.series import cut, favorita, read_features, read_series

CSV = """week,north,south,series
1,1,10,jam
2,2,20,jam
1,5,50,tea
2,6.5,-3,tea
"""


@pytest.fixture
def csv(tmp_path):
    path = tmp_path / "sales.csv"
    path.write_text(CSV)
    return path


def test_a_table_becomes_series_by_store_and_period(csv):
    values = read_series(csv)
    assert values.dtype == torch.float32
    assert values.tolist() == [[[1, 2], [10, 20]], [[5, 6.5], [50, -3]]]
    # chosen columns, in the order that is asked for
    assert read_series(csv, ["south", "north"])[1].tolist() == [[50, -3], [5, 6.5]]
    assert read_series(csv, ["south"]).shape == (2, 1, 2)


def test_a_table_without_names_of_series_is_one(tmp_path):
    path = tmp_path / "one.csv"
    path.write_text("\ufeffdate,shop\n2020-01-01,3\n2020-01-08,4\n")
    assert read_series(path).tolist() == [[[3, 4]]]


def test_arrays_and_their_files(tmp_path):
    array = np.arange(24, dtype=np.int64).reshape(2, 3, 4)
    assert read_series(array).shape == (2, 3, 4) and read_series(array).dtype == torch.float32
    assert read_series(array[0]).tolist() == [array[0].tolist()]
    assert read_series(torch.arange(5)).tolist() == [[[0, 1, 2, 3, 4]]]
    np.save(tmp_path / "a.npy", array)
    np.savez(tmp_path / "a.npz", sales=array)
    for name in ("a.npy", "a.npz"):
        assert read_series(tmp_path / name).tolist() == array.tolist()
    np.savez(tmp_path / "two.npz", sales=array, other=array)
    with pytest.raises(ValueError, match="has the keys sales, other; expected one"):
        read_series(tmp_path / "two.npz")


@pytest.mark.parametrize(
    ("old", "new", "text"),
    [
        ("6.5", "many", "line 5, column north: 'many' is no number"),
        ("2,20", "2", "line 3: 3 fields; the header has 4"),
        ("2,6.5,-3,tea\n", "", "series 'jam' has 2 periods, 'tea' has 1"),
        ("20", "nan", "not finite"),
        ("north,south", "week,date", "line 1: there is no column of a store"),
        (CSV[CSV.index("1,1") :], "", "has no rows"),
    ],
)
def test_a_wrong_table_is_refused_with_its_line(csv, old, new, text):
    csv.write_text(CSV.replace(old, new))
    with pytest.raises(ValueError, match=text):
        read_series(csv)


def test_what_is_no_series_is_refused(csv, tmp_path):
    with pytest.raises(ValueError, match="no column 'west'; columns are week, north, south, series"):
        read_series(csv, ["north", "west"])
    with pytest.raises(ValueError, match=r"shape \(1, 1, 1, 1\)"):
        read_series(np.zeros((1, 1, 1, 1)))
    with pytest.raises(ValueError, match="the array has"):
        read_series(np.array(["a"]))
    with pytest.raises(ValueError, match="not finite"):
        read_series(np.array([1.0, np.inf]))
    with pytest.raises(ValueError, match=r"read from files \.csv"):
        read_series(tmp_path / "sales.pt")


def test_features_of_periods(tmp_path):
    path = tmp_path / "dates.csv"
    path.write_text("date,days,sun\na,7,0\nb,14,1\nc,21,0\n")
    assert read_features(path, ["sun", "days"], 2).tolist() == [[0, 7], [1, 14]]
    with pytest.raises(ValueError, match="3 rows, for 4 periods"):
        read_features(path, ["days"], 4)
    with pytest.raises(ValueError, match="line 2, column date: 'a' is no number"):
        read_features(path, ["date"], 2)
    with pytest.raises(ValueError, match="no column 'moon'"):
        read_features(path, ["moon"], 2)


def test_figures_of_splits_follow_each_other_and_end_with_the_series():
    splits = cut(132)
    # 100 periods count: 60, 20 and 20, after 16 to look back on and 16 to ignore
    assert splits == {"train": Split(76, 16, 16), "dev": Split(36, 16, 76), "test": Split(36, 16, 96)}
    counted = [range(s.first + s.ignored, s.first + s.periods) for s in splits.values()]
    assert [p for part in counted for p in part] == list(range(32, 132))
    demand = Series(torch.zeros(1, 1, 132), 16)
    assert all(demand.draw(None, s).demand.shape == (1, s.periods, 1) for s in splits.values())
    with pytest.raises(ValueError, match="36 periods are too short"):
        cut(36)
    assert cut(5, 0, 0)["test"] == Split(1, 0, 4)


def test_what_is_told_beforehand_is_that_of_the_training_periods():
    values = torch.tensor([[[1.0, 2.0, 3.0, 100.0], [4.0, 4.0, 4.0, -9.0]], [[3.0, 2.0, 1.0, 500.0], [4.0] * 4]])
    demand = Series(values, 1, training=3)
    # of 1, 2, 3, 3, 2, 1: mean 2, variance 4/5
    assert demand.mean.tolist() == [2, 4] and demand.std.tolist() == pytest.approx([0.8**0.5, 0])
    other = Series(values, 1)
    assert other.mean.tolist() == [76.5, 2.375], "without a part for training, all periods count"
    # what is to come is still drawn
    assert demand.draw(None, Split(2, 0, 2)).demand[1, :, 0].tolist() == [1, 500]
    assert Series(values[:1], 1, training=1).std.tolist() == [0, 0], "one number has no spread"
    for training in (0, 5, -1):
        with pytest.raises(ValueError, match=f"training={training} must be 1 or more periods of the 4"):
            Series(values, 1, training=training)


def test_files_that_are_none_of_numbers(tmp_path):
    (tmp_path / "a.csv").write_bytes("week,x\n1,2\n2,café\n".encode("latin-1"))
    with pytest.raises(ValueError, match=r"a\.csv, line 3: byte 0xe9 is not UTF-8; save"):
        read_series(tmp_path / "a.csv")
    (tmp_path / "a.npz").write_bytes(b"PK\x03\x04 nothing")
    (tmp_path / "a.npy").write_bytes(b"")
    np.save(tmp_path / "b.npy", np.array([{}]), allow_pickle=True)
    for name in ("a.npz", "a.npy", "b.npy"):
        with pytest.raises(ValueError, match=rf"{name} is no array of numbers as NumPy saves them"):
            read_series(tmp_path / name)


def test_sales_that_are_not_there_say_where_to_get_them(tmp_path, monkeypatch):
    monkeypatch.delenv("CTRLRL_DATA", raising=False)
    with pytest.raises(FileNotFoundError, match=r"no folder was given.*CTRLRL_DATA.*Neural_inventory_control"):
        problems.real_stores()
    monkeypatch.setenv("CTRLRL_DATA", str(tmp_path))
    with pytest.raises(FileNotFoundError, match=f"it is not in {tmp_path}"):
        favorita()


def test_sales_are_read_from_the_folder_that_is_named(tmp_path, monkeypatch):
    sales = np.random.default_rng(0).normal(5, 2, (288, 21, 171)).astype(np.float32)
    np.savez(tmp_path / "favorita-21-stores-weekly-sales.npz", weekly_sales=sales)
    days = "\n".join(f"2013-01-{i},{i}" for i in range(200))
    (tmp_path / "favorita-21-stores-dates.csv").write_text(f"date,days_from_christmas\n{days}\n")
    monkeypatch.setenv("CTRLRL_DATA", "/nowhere")
    problem = problems.real_stores(3, products=10, data=tmp_path)
    np.testing.assert_array_equal(problem.demand.values, sales[:10, :3])
    # statistics are of weeks 0 to 110: the train split ends there
    split = problem.splits["train"]
    assert split.first + split.periods == 111
    seen = sales[:10, :3, :111].transpose(1, 0, 2).reshape(3, -1)
    np.testing.assert_allclose(problem.demand.mean, seen.mean(1), rtol=1e-5)
    np.testing.assert_allclose(problem.demand.std, seen.std(1, ddof=1), rtol=1e-5)
    one = problems.real_one_store(series=25, data=tmp_path).demand
    np.testing.assert_allclose(one.mean, sales.reshape(-1, 171)[:25, :111].mean(), rtol=1e-5)
    assert problem.demand.time[:, 0].tolist() == list(range(171))
