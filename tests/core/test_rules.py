"""The rules of the core, read from its source."""

import ast
import re
import sys
from pathlib import Path

import pytest
import torch

from ctrlrl.core import advantage, gate, head, penalty, ratio, reduce, weight

ROOT = Path(__file__).resolve().parents[2] / "ctrlrl"
CORE = sorted((ROOT / "core").glob("*.py"))
LOSSES = sorted((ROOT / "losses").glob("*.py"))
SUBTRACTION = re.compile(r"\blogp\w*(\.detach\(\))?\s*-\s*(\w+\.)*\w*logp")


def functions(path):
    tree = ast.parse(path.read_text())
    return [n for n in tree.body if isinstance(n, ast.FunctionDef) and not n.name.startswith("_")]


def code_only(path):
    """Source without docstrings, comments and string literals."""
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            node.value = ""
    return ast.unparse(tree)


def test_there_is_something_to_check():
    assert len(CORE) >= 9 and LOSSES


@pytest.mark.parametrize("path", CORE, ids=lambda p: p.name)
def test_source(path):
    text = path.read_text()
    assert not re.search(r"\bdone\b", text, re.IGNORECASE)
    assert ".item(" not in text and ".cpu(" not in text and "print(" not in text and "import logging" not in text
    assert text.count("\n") < 300 and max(map(len, text.splitlines())) <= 120
    assert path.name == "__init__.py" or "from __future__ import annotations" in text


@pytest.mark.parametrize("path", CORE + LOSSES, ids=lambda p: f"{p.parent.name}/{p.name}")
def test_a_log_ratio_is_formed_in_one_place(path):
    found = SUBTRACTION.findall(code_only(path))
    assert not found or path == ROOT / "core" / "ratio.py"


def test_the_search_for_log_ratios_finds_them():
    for text in ("logp - logp_old", "out.logp - batch.logp_ref", "logp_new.detach() - self.logp", "logp-logp_old"):
        assert SUBTRACTION.search(text), text


@pytest.mark.parametrize("path", CORE, ids=lambda p: p.name)
def test_the_clamp_of_a_log_ratio_is_in_one_place(path):
    assert path.name == "ratio.py" or "LOG_RATIO_CLAMP" not in path.read_text()


@pytest.mark.parametrize("path", CORE, ids=lambda p: p.name)
def test_imports(path):
    allowed = set(sys.stdlib_module_names) | {"torch"}
    if path.name in ("distribution.py", "functional.py"):  # laws in fractions are object arrays
        allowed.add("numpy")
    for node in ast.walk(ast.parse(path.read_text())):
        modules = []
        if isinstance(node, ast.Import):
            modules = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0
            modules = [node.module or ""]
        for module in modules:
            assert (
                module.split(".")[0] in allowed
                or module in ("ctrlrl.core", "ctrlrl.types")
                or module.startswith("ctrlrl.core.")
            ), module


@pytest.mark.parametrize("path", [p for p in CORE if p.name not in ("__init__.py", "control.py")], ids=lambda p: p.name)
def test_every_function_is_typed_and_has_a_table(path):
    for f in functions(path):
        doc = ast.get_docstring(f) or ""
        assert doc.count("====") >= 3, f.name
        assert f.returns is not None and all(a.annotation for a in f.args.args), f.name
        table = doc[doc.index("====") :]
        for a in f.args.args:
            assert a.arg in table, (f.name, a.arg)


def everything(logp, old, mask, turn, group, a):
    """One pass through nearly all of the core."""
    l1 = ratio.log_ratio(logp, old, mask, "turn", turn) + ratio.log_ratio(logp, old, mask, "sequence")
    r = ratio.ratio(l1)
    scaled = advantage.standardise(advantage.gae(a, 0.9 * mask, ~mask, a, a, 0.95), mask)
    centred = advantage.center_scale(a.sum(-1), group, "leave_one_out", "batch")[:, None]
    threshold = weight.solve_threshold(a, torch.softmax(a, -1), 0.1, iterations=3)[:, None]
    target = weight.tanh_target(a - threshold, 0.2, 0.1) + weight.lp_ratio(a, torch.softmax(a, -1), 0.1)
    x = head.clipped_surrogate(r, scaled + centred, 0.2, 0.3) * gate.clip_gate(r, a, 0.2, 0.2)
    x = x + head.ratio_target(r, target, a.abs(), gate=gate.target_gate(r, target, a)) + penalty.kl_k3(l1)
    w, denominator = reduce.sequence_mean_token_mean(mask)
    return reduce.weighted_sum(x, w) / denominator


def test_compiles_without_a_graph_break():
    g = torch.Generator().manual_seed(0)
    logp, old, a = torch.randn(3, 6, 5, generator=g)
    mask = torch.rand(6, 5, generator=g) < 0.8
    args = (logp, old, mask, torch.randint(-1, 3, (6, 5), generator=g), torch.randint(0, 3, (6,), generator=g), a)
    compiled = torch.compile(everything, fullgraph=True, backend="eager")
    assert torch.allclose(compiled(*args), everything(*args), atol=1e-6)
