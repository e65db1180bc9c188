"""Recorded demand: the weekly sales of a grocer, and series of a user's own."""

from __future__ import annotations

import csv
import io
import os
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ctrlrl_envs.inventory.demand import Split

SALES, DATES = "favorita-21-stores-weekly-sales.npz", "favorita-21-stores-dates.csv"

FAVORITA_SPLITS = {"train": Split(95, 16, 16), "dev": Split(37, 16, 104), "test": Split(37, 16, 134)}
"""Weeks 0 to 111, 88 to 141 and 118 to 171: of each, 16 are only looked back on, and 16 more are ignored."""

_SKIPPED = ("date", "week", "period")


class Sales(NamedTuple):
    """Weekly sales of products in stores."""

    values: Tensor
    """[288, 21, 171] by product, store and week; below 0 are returns."""
    time: Tensor
    """[171, 1]: days from the nearest Christmas, as the study's policies see them."""


def favorita(data: str | Path | None = None) -> Sales:
    """The sales of 21 stores of the grocer Favorita, as the authors of arXiv:2306.11246 prepared them.

    Args:
        data: Folder with the two files; by default that of the environment variable ``CTRLRL_DATA``.

    Raises:
        FileNotFoundError: A file is not there; the message says where to get it.
    """
    values = read_series(_found(SALES, data))
    return Sales(values, read_features(_found(DATES, data), ["days_from_christmas"], values.shape[2]))


def _found(name: str, data: str | Path | None) -> Path:
    folder = data if data is not None else os.environ.get("CTRLRL_DATA")
    if folder is not None and (path := Path(folder) / name).is_file():
        return path
    tried = "no folder was given" if folder is None else f"it is not in {folder}"
    raise FileNotFoundError(
        f"{name} is needed, and {tried}. Give its folder as data=..., or by the environment variable CTRLRL_DATA. It "
        "holds the file data_files/favorita_21_stores/weekly_sales.pt of github.com/MatiasAlvo/Neural_inventory_control"
        " as an npz with the key weekly_sales (288 products, 21 stores, 171 weeks); dates_with_info.csv, next to it, "
        f"is {DATES}"
    )


# -- series of any kind ---------------------------------------------------------------------------


def read_series(source: str | Path | np.ndarray | Tensor, stores: Sequence[str] | None = None) -> Tensor:
    """Series of demand [K, S, W] by series (a product), store and period, float32.

    - An array [K, S, W], [S, W] (one series) or [W] (of one store); a file of one, ``.npy`` or ``.npz`` with one key.
    - A file ``.csv``: a header, then a row per period; a column per store. Columns ``date``, ``week`` and ``period``
      are left out. With a column ``series``, rows belong to the series that it names, each with as many periods.

    Args:
        source: One of these.
        stores: Columns of a CSV that are meant, in this order; all by default.

    Raises:
        ValueError: Other shapes, something that is no finite number; a CSV's message says where.
    """
    if isinstance(source, Tensor):
        values = source.detach().cpu().numpy()
    elif isinstance(source, np.ndarray):
        values = source
    else:
        values = _read(Path(source), stores)
    what = "the array" if isinstance(source, np.ndarray | Tensor) else str(source)
    if values.ndim not in (1, 2, 3) or not values.size or values.dtype.kind not in "fiu":
        raise ValueError(
            f"{what} has {values.dtype} of shape {values.shape}; expected numbers by (series, store, period)"
        )
    if not np.isfinite(values).all():
        raise ValueError(f"{what} holds numbers that are not finite; fill gaps first")
    return torch.from_numpy(values.astype(np.float32).reshape((1,) * (3 - values.ndim) + values.shape))


def _read(path: Path, stores: Sequence[str] | None) -> np.ndarray:
    kind = path.suffix.lower()
    if kind == ".csv":
        return _read_csv(path, stores)
    if kind not in (".npy", ".npz"):
        raise ValueError(f"{path}: series are read from files .csv, .npy and .npz")
    try:
        loaded = np.load(path, allow_pickle=False)
        if isinstance(loaded, np.ndarray):
            return loaded
        with loaded:
            keys = loaded.files
            if len(keys) == 1:
                return loaded[keys[0]]
    except (ValueError, EOFError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path} is no array of numbers as NumPy saves them: {error}") from None
    raise ValueError(f"{path} has the keys {', '.join(keys) or 'none'}; expected one")


def read_text(path: Path) -> str:
    """Text of a UTF-8 file, with or without a byte order mark.

    Raises:
        ValueError: It is no UTF-8; the message says in which line.
    """
    data = path.read_bytes()
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise ValueError(
            f"{path}, line {line}: byte 0x{data[error.start]:02x} is not UTF-8; save the file as UTF-8 text"
        ) from None


def _read_csv(path: Path, stores: Sequence[str] | None) -> np.ndarray:
    header, rows = _table(path)
    if stores is None:
        stores = [name for name in header if name != "series" and name.lower() not in _SKIPPED]
    columns = _columns(path, header, stores)
    key = header.index("series") if "series" in header else None
    found: dict[str, list[list[float]]] = {}
    for line, row in rows:
        numbers = [_number(path, line, name, row[i]) for name, i in zip(stores, columns, strict=True)]
        found.setdefault("" if key is None else row[key], []).append(numbers)
    lengths = {name: len(periods) for name, periods in found.items()}
    if len(set(lengths.values())) > 1:
        longest, shortest = max(lengths, key=lengths.__getitem__), min(lengths, key=lengths.__getitem__)
        raise ValueError(
            f"{path}: series {longest!r} has {lengths[longest]} periods, {shortest!r} has {lengths[shortest]}; all "
            "must have as many"
        )
    return np.array(list(found.values()), dtype=np.float32).transpose(0, 2, 1)


def read_features(path: str | Path, columns: Sequence[str], periods: int) -> Tensor:
    """[periods, F] float32: columns of a CSV with a row per period; more rows than periods are left.

    Raises:
        ValueError: A column is not there, there are too few rows, or something is no number.
    """
    path = Path(path)
    header, rows = _table(path)
    places = _columns(path, header, columns)
    if len(rows) < periods:
        raise ValueError(f"{path} has {len(rows)} rows, for {periods} periods")
    return torch.tensor(
        [[_number(path, line, name, row[i]) for name, i in zip(columns, places, strict=True)] for line, row in rows]
    )[:periods]


def _table(path: Path) -> tuple[list[str], list[tuple[int, list[str]]]]:
    """Its header, and its rows with their lines."""
    reader = csv.reader(io.StringIO(read_text(path), newline=""))
    try:
        header = [name.strip() for name in next(reader, [])]
        rows = [(reader.line_num, row) for row in reader if row]
    except csv.Error as error:
        raise ValueError(f"{path}, line {reader.line_num}: {error}") from None
    if not rows:
        raise ValueError(f"{path} has no rows; expected a header and a row per period")
    for line, row in rows:
        if len(row) != len(header):
            raise ValueError(f"{path}, line {line}: {len(row)} fields; the header has {len(header)}")
    return header, rows


def _columns(path: Path, header: Sequence[str], names: Sequence[str]) -> list[int]:
    missing = [name for name in names if name not in header]
    if missing or not names:
        wanted = f"there is no column {missing[0]!r}" if missing else "there is no column of a store"
        raise ValueError(f"{path}, line 1: {wanted}; columns are {', '.join(header)}")
    return [header.index(name) for name in names]


def _number(path: Path, line: int, column: str, text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise ValueError(f"{path}, line {line}, column {column}: {text!r} is no number") from None


def cut(periods: int, window: int = 16, ignored: int = 16) -> dict[str, Split]:
    """Splits of series of ``periods``: figures of train, dev and test are of about 3/5, 1/5 and the last 1/5.

    Each begins ``ignored`` periods before its figures do, as in the study of the grocer, and after ``window`` ones.

    Raises:
        ValueError: The series are too short.
    """
    start = window + ignored
    if periods < start + 5:
        raise ValueError(
            f"series of {periods} periods are too short: {window} to look back on, {ignored} to ignore, and 5 or more "
            "to be cut in parts; give periods of your own"
        )
    bounds = [start, start + 3 * (periods - start) // 5, start + 4 * (periods - start) // 5, periods]
    return {
        name: Split(end - begin + ignored, ignored, begin - ignored)
        for name, begin, end in zip(("train", "dev", "test"), bounds[:-1], bounds[1:], strict=True)
    }
