"""Networks from YAML files that people write, checked line by line."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch
import yaml
from torch import Tensor

from ctrlrl_envs.inventory.demand import Demand, Normal, Poisson, Series, Split
from ctrlrl_envs.inventory.network import SUPPLIER, Link, Network, NetworkError, Store, Warehouse
from ctrlrl_envs.inventory.series import cut, read_features, read_series, read_text
from ctrlrl_envs.inventory.simulator import Problem

_TOP = ("stores", "links", "demand"), ("unmet_demand", "objective", "warehouses", "periods", "initial")
_DEMANDS = {
    "normal": (("mean", "std"), ("correlation", "clip")),
    "poisson": (("mean",), ()),
    "series": (("file",), ("window", "features")),
}


_LARGEST = 3e38  # of float32

# what PyYAML raises on scalars that are not what their tag, or their looks, say: "2020-13-45", "!!int x"
_UNREADABLE = yaml.YAMLError, ValueError, LookupError, AttributeError, TypeError, OverflowError


def read_network(network: str | Path | None = None) -> Problem:
    """The problem that a YAML file describes; ``example.yaml``, beside this module, shows all there is to say.

    Files are plain data: no tags, no anchors that build objects. Paths in it are relative to it.

    Raises:
        FileNotFoundError: There is no such file, or not the series that it names.
        NetworkError: Something unknown, missing, of another kind, or impossible; it names file, line and place.
    """
    if not isinstance(network, str | Path) or not str(network):
        raise NetworkError(f"network={network!r} must be the path of a YAML file that describes a network")
    path = Path(network)
    if path.is_dir():
        raise NetworkError(f"{path} is a folder; expected a YAML file that describes a network")
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}, which network= names")
    try:
        text = read_text(path)
    except ValueError as error:
        raise NetworkError(str(error)) from None
    try:
        root = yaml.compose(text, yaml.SafeLoader)
    except yaml.reader.ReaderError as error:  # characters that YAML does not know
        line = text.count("\n", 0, error.position) + 1
        raise NetworkError(f"{path}, line {line}: this is no YAML: {error.reason}") from None
    except yaml.MarkedYAMLError as error:
        line = 1 if error.problem_mark is None else error.problem_mark.line + 1
        raise NetworkError(f"{path}, line {line}: this is no YAML: {error.problem}") from None
    if root is None:
        raise NetworkError(f"{path}, line 1: the file is empty; it needs {', '.join(_TOP[0])}")
    return _Reader(path).problem(root)


class _Reader:
    """Turns nodes of a file into parts of a problem; every refusal says where."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.lines: dict[str, int] = {}  # of places, and of links as "a -> b"
        self._make = yaml.constructor.SafeConstructor()

    def fail(self, where: yaml.Node | int, text: str) -> NoReturn:
        line = where if isinstance(where, int) else where.start_mark.line + 1
        raise NetworkError(f"{self.path}, line {line}: {text}")

    # -- kinds of nodes -----------------------------------------------------------------------

    def entries(self, node: yaml.Node, what: str) -> dict[str, tuple[yaml.Node, yaml.Node]]:
        """Keys and values of a mapping by name."""
        if not isinstance(node, yaml.MappingNode):
            self.fail(node, f"{what} must be written as 'name: value', found {_shown(node)}")
        found: dict[str, tuple[yaml.Node, yaml.Node]] = {}
        for key, value in node.value:
            name = self.text(key, f"a name in {what}")
            if name in found:
                self.fail(key, f"{what}: {name!r} is given twice")
            found[name] = key, value
        return found

    def fields(
        self, node: yaml.Node, what: str, needed: Sequence[str], optional: Sequence[str] = ()
    ) -> dict[str, yaml.Node]:
        """Values of a mapping with these keys and no others."""
        found = self.entries(node, what)
        known = (*needed, *optional)
        for name, (key, _) in found.items():
            if name not in known:
                self.fail(key, f"{what}: {name!r} is unknown; known here: {', '.join(known)}")
        for name in needed:
            if name not in found:
                self.fail(node, f"{what}: {name} is missing")
        return {name: value for name, (_, value) in found.items()}

    def scalar(self, node: yaml.Node, what: str, expected: str, test: Callable[[Any], bool]) -> Any:
        value = None
        if isinstance(node, yaml.ScalarNode):
            try:
                value = self._make.construct_object(node)
            except _UNREADABLE:
                value = None
        if not test(value):
            self.fail(node, f"{what} must be {expected}, found {_shown(node)}")
        return value

    def text(self, node: yaml.Node, what: str) -> str:
        expected = "text (in quotes, if it looks like a number or a date)"
        return self.scalar(node, what, expected, lambda v: isinstance(v, str) and v != "")

    def number(self, node: yaml.Node, what: str) -> float:
        return float(self.scalar(node, what, "a number", lambda v: _number(v) and abs(v) < _LARGEST))

    def amount(self, node: yaml.Node, what: str) -> float:
        return float(self.scalar(node, what, "a number of at least 0", lambda v: _number(v) and 0 <= v < _LARGEST))

    def numbers(self, node: yaml.Node, what: str, count: int) -> list[float]:
        if not isinstance(node, yaml.SequenceNode) or len(node.value) != count:
            found = f"a list of {len(node.value)}" if isinstance(node, yaml.SequenceNode) else _shown(node)
            self.fail(node, f"{what} must be a list of {count} numbers, found {found}")
        return [self.number(part, what) for part in node.value]

    def count(self, node: yaml.Node, what: str, least: int) -> int:
        expected = f"a whole number of at least {least}"
        return self.scalar(node, what, expected, lambda v: _number(v) and isinstance(v, int) and v >= least)

    def choice(self, node: yaml.Node, what: str, choices: Sequence[str]) -> str:
        return self.scalar(node, what, " or ".join(choices), lambda v: v in choices)

    # -- parts of a problem -------------------------------------------------------------------

    def problem(self, root: yaml.Node) -> Problem:
        top = self.fields(root, "the file", *_TOP)
        network = self.network(root, top)
        demand = self.demand(top["demand"], [s.name for s in network.stores])
        more: dict[str, Any] = {}
        if "periods" in top:
            more["splits"] = self.periods(top["periods"], demand)
        elif isinstance(demand, Series):
            try:
                more["splits"] = cut(demand.values.shape[2], demand.window)
            except ValueError as error:
                self.fail(top["demand"], str(error))
        if isinstance(demand, Series):
            train: Split = more["splits"]["train"]
            demand = replace(demand, training=train.first + train.periods)
        if "initial" in top:
            low, high = self.numbers(top["initial"], "initial", 2)
            if not 0 <= low <= high:
                self.fail(top["initial"], f"initial must be [low, high] with 0 <= low <= high, found [{low}, {high}]")
            more["initial"] = low, high
        return Problem(self.path.stem, network, demand, **more)

    def network(self, root: yaml.Node, top: dict[str, yaml.Node]) -> Network:
        stores = tuple(self.store(*entry) for entry in self.entries(top["stores"], "stores").values())
        given = self.entries(top["warehouses"], "warehouses") if "warehouses" in top else {}
        warehouses = tuple(self.warehouse(*entry) for entry in given.values())
        nodes = top["links"]
        if not isinstance(nodes, yaml.SequenceNode) or not nodes.value:
            self.fail(nodes, "links must be a list of '- {from: a, to: b, lead_time: 2}'")
        links = tuple(self.link(node) for node in nodes.value)
        kinds = {}
        for key, choices in (("unmet_demand", ("backlogged", "lost")), ("objective", ("cost", "profit"))):
            if key in top:
                kinds[key] = self.choice(top[key], key, choices)
        try:
            return Network(stores, warehouses, links, **kinds)
        except NetworkError as error:
            text = str(error)
            named = (name for name in self.lines if re.search(rf"(?<!\w){re.escape(name)}(?!\w)", text))
            part = max(named, key=len, default=None)  # the longest, so that a link is found before its ends
            self.fail(root if part is None else self.lines[part], text)

    def store(self, key: yaml.Node, node: yaml.Node) -> Store:
        name = self.named(key)
        found = self.fields(node, f"store {name}", ("holding_cost", "unmet_cost"))
        return Store(name, *(self.amount(found[k], f"store {name}: {k}") for k in ("holding_cost", "unmet_cost")))

    def warehouse(self, key: yaml.Node, node: yaml.Node) -> Warehouse:
        name = self.named(key)
        found = self.fields(node, f"warehouse {name}", ("holding_cost",), ("holds",))
        holds = True
        if "holds" in found:
            what = f"warehouse {name}: holds"
            holds = self.scalar(found["holds"], what, "true or false", lambda v: isinstance(v, bool))
        return Warehouse(name, self.amount(found["holding_cost"], f"warehouse {name}: holding_cost"), holds)

    def named(self, key: yaml.Node) -> str:
        name = self.text(key, "a name")
        if name == SUPPLIER:
            self.fail(key, f"{SUPPLIER!r} is the source outside of the network; give this place another name")
        self.lines[name] = key.start_mark.line + 1
        return name

    def link(self, node: yaml.Node) -> Link:
        found = self.fields(node, "a link", ("from", "to", "lead_time"), ("cost",))
        ends = self.text(found["from"], "a link: from"), self.text(found["to"], "a link: to")
        here = f"link {ends[0]} -> {ends[1]}"
        self.lines[f"{ends[0]} -> {ends[1]}"] = node.start_mark.line + 1
        time = self.scalar(found["lead_time"], f"{here}: lead_time", "a whole number of periods", _number)
        return Link(*ends, time, self.amount(found["cost"], f"{here}: cost") if "cost" in found else 0.0)

    def demand(self, node: yaml.Node, stores: Sequence[str]) -> Demand:
        entry = self.entries(node, "demand").get("distribution")
        if entry is None:
            self.fail(node, f"demand: distribution is missing; known are {', '.join(_DEMANDS)}")
        kind = self.choice(entry[1], "demand: distribution", tuple(_DEMANDS))
        needed, optional = _DEMANDS[kind]
        found = self.fields(node, f"demand ({kind})", ("distribution", *needed), optional)
        if kind == "series":
            return self.series(found, stores)
        mean = self.per_store(found["mean"], "mean", stores)
        if kind == "poisson":
            return Poisson(mean)
        std, clip = self.per_store(found["std"], "std", stores), True
        if "clip" in found:
            clip = self.scalar(found["clip"], "demand: clip", "true or false", lambda v: isinstance(v, bool))
        if "correlation" not in found:
            return Normal(mean, std, clip=clip)
        try:
            return Normal(mean, std, self.correlation(found["correlation"], len(stores)), clip)
        except ValueError as error:
            if isinstance(error, NetworkError):
                raise
            self.fail(found["correlation"], f"demand: {error}")

    def correlation(self, node: yaml.Node, stores: int) -> float | np.ndarray:
        if not isinstance(node, yaml.SequenceNode):
            return self.number(node, "demand: correlation")
        if len(node.value) != stores:
            self.fail(node, f"demand: correlation has {len(node.value)} rows; expected one for each of {stores} stores")
        return np.array([self.numbers(row, "demand: a row of correlation", stores) for row in node.value])

    def per_store(self, node: yaml.Node, key: str, stores: Sequence[str]) -> Tensor:
        """[S] of one number for all, or of a mapping with each store."""
        if isinstance(node, yaml.MappingNode):
            found = self.fields(node, f"demand: {key}", stores)
            return torch.tensor([self.amount(found[name], f"demand: {key} of {name}") for name in stores])
        return torch.full((len(stores),), self.amount(node, f"demand: {key}"))

    def series(self, found: dict[str, yaml.Node], stores: Sequence[str]) -> Series:
        window = self.count(found["window"], "demand: window", 0) if "window" in found else 16
        values = self.loaded(found["file"], "demand: file", lambda path: read_series(path, stores))
        if values.shape[1] != len(stores):
            text = f"demand: the series are of {values.shape[1]} stores, the network has {len(stores)}"
            self.fail(found["file"], text)
        time = None
        if "features" in found:
            part = self.fields(found["features"], "demand: features", ("file", "columns"))
            names = part["columns"]
            if not isinstance(names, yaml.SequenceNode) or not names.value:
                self.fail(names, f"demand: columns must be a list of names, found {_shown(names)}")
            columns = [self.text(name, "demand: a column") for name in names.value]
            time = self.loaded(
                part["file"], "demand: features", lambda path: read_features(path, columns, values.shape[2])
            )
        return Series(values, window, time)

    def loaded(self, node: yaml.Node, what: str, read: Callable[[Path], Tensor]) -> Tensor:
        path = self.path.parent / self.text(node, what)
        if not path.is_file():
            raise FileNotFoundError(f"{self.path}, line {node.start_mark.line + 1}: {what}: there is no file {path}")
        try:
            return read(path)
        except ValueError as error:
            self.fail(node, f"{what}: {error}")

    def periods(self, node: yaml.Node, demand: Demand) -> dict[str, Split]:
        recorded = isinstance(demand, Series)
        splits = {}
        for name, part in self.fields(node, "periods", ("train", "dev", "test")).items():
            what = f"periods of {name}"
            found = self.fields(part, what, ("length", *(("first",) * recorded)), ("ignored",))
            length = self.count(found["length"], f"{what}: length", 1)
            ignored = self.count(found["ignored"], f"{what}: ignored", 0) if "ignored" in found else 0
            if ignored >= length:
                self.fail(part, f"{what}: all {length} periods are ignored; leave one or more for the figures")
            first = 0
            if isinstance(demand, Series):
                first, end = self.count(found["first"], f"{what}: first", 0), demand.values.shape[2]
                if first < demand.window or first + length > end:
                    self.fail(
                        part,
                        f"{what}: {first} to {first + length} do not fit series of {end} periods, the first "
                        f"{demand.window} of which are only looked back on",
                    )
            splits[name] = Split(length, ignored, first)
        return splits


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _shown(node: yaml.Node) -> str:
    if isinstance(node, yaml.ScalarNode):
        return repr(node.value) if node.value else "nothing"
    return "a list" if isinstance(node, yaml.SequenceNode) else "names with values"
