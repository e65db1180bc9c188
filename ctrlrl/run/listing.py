"""``ctrlrl list``: methods, losses with the parts of the estimator they fill, environments."""

from __future__ import annotations

import re

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from ctrlrl import api, names
from ctrlrl.losses import base as losses
from ctrlrl.losses.base import PolicyLoss
from ctrlrl.losses.needs import NEEDS, SLOTS, WORLDS, missing

KINDS = ("methods", "losses", "envs")
USAGE = f"ctrlrl list {'|'.join(KINDS)}; ctrlrl list losses --markdown prints the page docs/losses.md"


def show(words: list[str]) -> str:
    """Print what ``words`` ask for. Returns a complaint, or an empty string."""
    if not words or words[0] in ("-h", "--help"):
        print(f"usage: {USAGE}")
        return ""
    kind, *rest = words
    if kind not in KINDS:
        return f"nothing is listed under {kind!r}.{names.hint(kind, KINDS)} Expected {', '.join(KINDS)}"
    if rest and (kind, rest) != ("losses", ["--markdown"]):
        return f"{' '.join(rest)!r} is not understood. Usage: {USAGE}"
    if rest:
        print(markdown(), end="")
        return ""
    Console().print({"methods": _methods, "losses": _losses, "envs": _envs}[kind]())
    return ""


def _methods() -> Table:
    table = _table("name", "family", "paper", "presets")
    for name, method in sorted(api.methods().items()):
        table.add_row(name, method.family, method.paper, ", ".join(method.presets))
    return table


def _losses() -> Table:
    """Two columns: names, and all that is known of each in lines of their own."""
    table = _table("name", "paper; parts of the estimator; needs; worlds; where it differs")
    for name in api.available("losses"):
        loss = losses.get(name)
        lines = [escape(loss.paper), "; ".join(f"[dim]{slot}[/dim] {escape(what)}" for slot, what in _slots(loss))]
        lines.append(f"[dim]needs[/dim] {_needs(loss)}  [dim]runs on[/dim] {_worlds(loss)}")
        if loss.differs:
            lines.append(f"[dim]differs[/dim] {escape(_one_line(loss.differs))}")
        table.add_row(name, "\n".join([*lines, ""]))
    return table


def _envs() -> Table:
    from ctrlrl.engine.environments import listed

    table = _table("id", "backends")
    for name, backends in listed():
        table.add_row(name, ", ".join(backends))
    return table


def _table(*columns: str) -> Table:
    table = Table(box=None, pad_edge=False)
    for k, column in enumerate(columns):
        table.add_column(column, style="bold" if k == 0 else "", no_wrap=k == 0)
    return table


def _slots(loss: type[PolicyLoss]) -> list[tuple[str, str]]:
    return [(slot, loss.slots[slot]) for slot in SLOTS if slot in loss.slots]


def _needs(loss: type[PolicyLoss]) -> str:
    uses = [f"({need})" for need in sorted(loss.uses - loss.needs)]
    return ", ".join([*sorted(loss.needs), *uses])


def _worlds(loss: type[PolicyLoss]) -> str:
    """Where it runs, by the first words of the worlds' names; a teacher is for the user to name."""
    return ", ".join(world for world in WORLDS if not missing(loss.needs, world, teacher=True))


def _one_line(text: str) -> str:
    return re.sub(r"\s+", " ", text).strip()


def markdown() -> str:
    """docs/losses.md: the same table for people who read rather than type."""
    known = losses.names()
    lines = [
        "# Losses",
        "",
        "Every policy-optimisation loss is one estimator, `mask x ratio x advantage x grad log-likelihood`, with parts",
        "of its own. This page is what `ctrlrl list losses` prints, made by `ctrlrl list losses --markdown`.",
        "",
        f"There are {len(known)}. `ctrlrl train NAME --env ENV` trains with one; `ctrlrl train NAME --help` explains",
        "its settings. Each is a file `ctrlrl/losses/NAME.py` with a table of its gradient weights in",
        "`tests/losses/test_NAME.py`.",
        "",
        "**runs on**: " + "; ".join(f"`{key}` is {text}" for key, text in WORLDS.items()) + ".",
        "Needs in brackets are taken where they are there.",
        "",
        "| name | paper | " + " | ".join(SLOTS) + " | needs | runs on |",
        "|---|---|" + "---|" * len(SLOTS) + "---|---|",
    ]
    for name in known:
        loss = losses.get(name)
        filled = dict(_slots(loss))
        cells = [f"[`{name}`](#{name})" if loss.differs else f"`{name}`", _linked(loss.paper)]
        cells += [filled.get(slot, "") for slot in SLOTS]
        lines.append("| " + " | ".join(_cell(c) for c in [*cells, _needs(loss), _worlds(loss)]) + " |")
    lines += ["", "## What each need is", ""]
    lines += [f"- `{need}`: {text}" for need, text in NEEDS.items()]
    lines += ["", "## Where they differ from their papers and from released code", ""]
    for name in known:
        if losses.get(name).differs:
            lines += [f"### {name}", "", _one_line(losses.get(name).differs), ""]
    return "\n".join(lines).rstrip() + "\n"


def _cell(text: str) -> str:
    return _one_line(text).replace("|", "\\|")


def _linked(paper: str) -> str:
    return re.sub(r"arXiv:(\d{4}\.\d{5})", r"[arXiv:\1](https://arxiv.org/abs/\1)", paper)
