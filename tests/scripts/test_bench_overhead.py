"""The benchmark of the losses' overhead: both sides compute the same, and its table is whole."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest
import torch

SCRIPT = Path(__file__).parents[2] / "scripts" / "bench_overhead.py"


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("bench_overhead", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules["bench_overhead"] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_a_short_run_writes_a_row_for_every_contest(script, tmp_path, monkeypatch):
    out = tmp_path / "overhead.json"
    arguments = ["--minutes", "0", "--rows", "16", "--length", "8", "--modes", "eager", "--out", str(out)]
    monkeypatch.setattr(sys, "argv", ["bench_overhead.py", *arguments])
    script.main()
    document = json.loads(out.read_text())
    assert [(r["loss"], r["metrics"]) for r in document["table"]] == [
        (n, m) for n in script.LOSSES for m in (False, True)
    ]
    assert all(r["ratio"] > 0 and r["rounds"] == 1 for r in document["table"])
    assert document["arguments"]["rows"] == 16 and document["versions"]["torch"] == torch.__version__


@pytest.mark.parametrize("name", ["ppo", "grpo", "gspo", "mhpo"])
def test_a_formula_that_differs_may_not_race(script, name):
    batch, logp = script.batch_of(16, 8, seed=1)
    loss = script.base.get(name)()
    begun = loss.begin(batch, {}, loss.memory()).batch
    pair = script.library(loss, begun, True), script.by_hand(name, loss, begun, True)
    script.compare(name, *pair, logp)

    def off(x):
        value, metrics = pair[1](x)
        return 1.01 * value, metrics

    with pytest.raises(AssertionError, match=name):
        script.compare(name, pair[0], off, logp)


def test_padding_is_not_looked_at_on_either_side(script):
    """Else the library would be compared with something that does less."""
    batch, logp = script.batch_of(16, 8, seed=2)
    dirty = torch.where(batch.mask, logp, torch.nan)
    for name in script.LOSSES:
        loss = script.base.get(name)()
        begun = loss.begin(batch, {}, loss.memory()).batch
        for run in (script.library(loss, begun, True), script.by_hand(name, loss, begun, True)):
            (_, (value, _)) = script.differentiated(run, compiled=False)(dirty)
            assert torch.isfinite(value)
