"""Names that people type: loading what they point to, registering it, and suggesting what was meant."""

from __future__ import annotations

import dataclasses
import difflib
import importlib
import pkgutil
from collections.abc import Iterable
from typing import Any, Generic, TypeVar

C = TypeVar("C", bound=type)
B = TypeVar("B")


def load(path: str, what: str) -> Any:
    """The object that ``package.module:Class`` names.

    Raises:
        ValueError: It cannot be imported; ``what`` (a loss, a wrapper, ...) says what was wanted.
    """
    module, _, name = path.partition(":")
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(f"cannot load the {what} {path!r} (expected 'package.module:Class'): {error}") from error


def hint(name: str, known: Iterable[str]) -> str:
    """`` Did you mean ...?`` with the up to three nearest of ``known``, or nothing."""
    near = difflib.get_close_matches(name, list(known), n=3, cutoff=0.45)
    return f" Did you mean {' or '.join(near)}?" if near else ""


class Registry(Generic[B]):
    """Classes by the name of the file that defines them, and the user's own by ``package.module:Class``.

    Args:
        what: One of them, in words: "loss".
        base: What they derive from.
        packages: Whose modules are imported to find them all.
        skip: Modules of them that define none.
    """

    def __init__(self, what: str, base: type[B], *packages: str, skip: frozenset[str] = frozenset()) -> None:
        self.what, self.base, self.packages, self.skip = what, base, packages, skip
        self._found: dict[str, type[B]] = {}

    def enter(self, cls: C) -> C:
        """Class decorator: enter ``cls`` under its file's name, and tell it. Two of one name are an error."""
        name = cls.__module__.rsplit(".", 1)[-1]
        if name in self._found and self._found[name].__module__ != cls.__module__:
            taken = self._found[name].__module__
            raise ValueError(f"a {self.what} named {name!r} is registered already, by {taken}")
        cls.name = name  # type: ignore[attr-defined]
        self._found[name] = cls  # type: ignore[assignment]
        return cls

    def names(self) -> list[str]:
        """Keys of all of these packages, sorted."""
        for package in self.packages:
            for info in pkgutil.iter_modules(importlib.import_module(package).__path__):
                if info.name not in self.skip:
                    importlib.import_module(f"{package}.{info.name}")
        return sorted(self._found)

    def get(self, name: str) -> type[B]:
        """The class called ``name``; ``package.module:Class`` loads the user's own.

        Raises:
            KeyError: Unknown, with the nearest names; or not a dataclass deriving from the registry's base.
        """
        if ":" in name:
            return self._load(name)
        # looking for them all is slow
        if name not in self._found and name not in (known := self.names()):
            raise KeyError(f"no {self.what} named {name!r}.{hint(name, known)} Known: {', '.join(known)}")
        return self._found[name]

    def holds(self, name: str) -> bool:
        """Whether :meth:`get` would find ``name``."""
        try:
            self.get(name)
        except KeyError:
            return False
        return True

    def _load(self, path: str) -> type[B]:
        try:
            cls = load(path, self.what)
        except ValueError as error:
            raise KeyError(str(error)) from error
        settings = dataclasses.is_dataclass(self.base)  # then so must theirs be
        if not (isinstance(cls, type) and issubclass(cls, self.base) and dataclasses.is_dataclass(cls) >= settings):
            wanted = "dataclass" if settings else "class"
            raise KeyError(f"{path!r} is not a {wanted} deriving from {self.base.__module__}.{self.base.__qualname__}")
        if "name" not in cls.__dict__:
            cls.name = path  # type: ignore[attr-defined]
        return cls
