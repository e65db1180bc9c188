"""What a data file states about itself, read with care: it may come from anywhere."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from ctrlrl.data.dataset import DatasetError
from ctrlrl.types import EnvSpec, check_types

ENVIRONMENTS = ("gymnasium", "gymnasium_robotics", "ctrlrl_envs")
"""Packages whose modules the id of an environment may import: a file must not choose what code is run."""
WRAPPERS = (*ENVIRONMENTS, "ctrlrl")
"""Packages that wrappers may come from."""
LEFT_OUT = "env_left_out"
"""Entry of ``DatasetInfo.about``: the id of an environment that a file names and that is not taken from it."""


def is_from(path: str, packages: tuple[str, ...]) -> bool:
    """Whether the module of ``module:Name`` is in one of the ``packages``."""
    return path.rpartition(":")[0].partition(".")[0] in packages


def environment(data: Any, about: dict[str, Any], where: str) -> EnvSpec | None:
    """The environment that :func:`dataclasses.asdict` gave as ``data``.

    One whose id would import a module from outside of :data:`ENVIRONMENTS` is left out and noted in ``about``.

    Raises:
        DatasetError: It is none, or has a wrapper from elsewhere; begins with ``where`` (file and key).
    """
    if data is None:
        return None
    try:
        fields = dict(data)
        wrappers = tuple((name, dict(kwargs)) for name, kwargs in fields.pop("wrappers", ()))
        spec = EnvSpec(**fields, wrappers=wrappers)
        check_types(spec)
        if not isinstance(spec.kwargs, dict) or not all(isinstance(name, str) for name, _ in wrappers):
            raise TypeError("expected names and values as its kwargs, and names of wrappers")
    except (AttributeError, TypeError, ValueError) as error:
        raise DatasetError(f"{where} has an env that is none ({error}); give env= yourself") from error
    foreign = [name for name, _ in wrappers if not is_from(name, WRAPPERS)]
    if foreign:
        raise DatasetError(f"{where}: its environment has the wrapper {foreign[0]}; give env= yourself if you trust it")
    return spec if taken(spec.id, about, where) else None


def taken(env_id: Any, about: dict[str, Any], where: str) -> str | None:
    """``env_id`` if it may be taken from a file; otherwise None, and it is noted in ``about``.

    Raises:
        DatasetError: It is no id.
    """
    if not isinstance(env_id, str) or not env_id:
        raise DatasetError(f"{where} has the environment id {env_id!r}; expected words. Give env= yourself")
    if ":" in env_id and not is_from(env_id, ENVIRONMENTS):
        about[LEFT_OUT] = env_id
        return None
    return env_id


def references(document: Mapping[str, Any], where: str) -> tuple[float | None, float | None]:
    """``ref_min_score`` and ``ref_max_score`` of ``document``.

    Raises:
        DatasetError: One is no finite number; begins with ``where`` (the file).
    """
    found = []
    for key in ("ref_min_score", "ref_max_score"):
        value = document.get(key)
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if value is not None and not (number and math.isfinite(value)):
            raise DatasetError(f"{where}: {key} is {value!r}; expected a number")
        found.append(value)
    return found[0], found[1]
