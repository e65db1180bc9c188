"""ONNX files that are not written, with the reason; and the command."""

import sys

import gymnasium as gym
import numpy as np
import pytest
import torch
from helpers import off_policy, offline
from helpers.agents import NOISY, quiet, tiny
from helpers.envs import env_id
from helpers.onnx import Box, about, infer, make, rows
from torch import nn

from ctrlrl import api
from ctrlrl.engine import onnx_export
from ctrlrl.engine.onnx_export import ExportError
from ctrlrl.run import cli

# -- what is not written ----------------------------------------------------------------------------


class TwoFaced(nn.Module):
    """An encoder that is not the same when it is not being trained, as the graph is not."""

    out_features = 3

    def __init__(self, space):
        super().__init__()

    def forward(self, x):
        return x if self.training else x * 1.001


class Branching(TwoFaced):
    """An encoder whose path hangs on its numbers."""

    def forward(self, x):
        return x if x.sum() > 0 else -x


def test_a_graph_that_differs_from_the_policy_is_refused_with_the_numbers(tmp_path):
    path = tmp_path / "policy.onnx"
    path.write_text("older")
    with pytest.raises(ExportError, match=r"at \d+ of 256 observations, by up to [\d.e-]+ of .* 1e-05 is allowed"):
        make(encoder=TwoFaced).export(path)
    assert path.read_text() == "older" and list(tmp_path.iterdir()) == [path]


def test_a_network_that_is_no_graph_is_refused_in_one_line(tmp_path):
    with pytest.raises(ExportError, match="ppo cannot be written as an ONNX graph: ") as caught:
        make(encoder=Branching).export(tmp_path / "policy.onnx")
    assert "\n" not in str(caught.value) and not list(tmp_path.iterdir())


def test_a_policy_that_acts_with_nan_is_refused(tmp_path):
    agent = make()
    with torch.no_grad():
        agent.policy.head.linear.bias.fill_(np.nan)
    with pytest.raises(ExportError, match="not finite"):
        agent.export(tmp_path / "policy.onnx")


def compare(found, wanted, space, decided=None):
    found, wanted = np.asarray(found), torch.as_tensor(np.asarray(wanted))
    decided = np.ones(len(found), bool) if decided is None else decided
    onnx_export._compare(found, wanted, decided, space)


def test_differences_count_by_the_range_of_each_action():
    space = Box(np.float32([-1.0, 0.0, -np.inf]), np.float32([1.0, 100.0, np.inf]))
    wanted = np.float32([[0.0, 50.0, 20.0], [0.0, 50.0, -40.0]])
    for error in ([1.9e-5, 0.0, 0.0], [0.0, 9e-4, 0.0], [0.0, 0.0, 3.9e-4]):
        compare(wanted + np.float32(error), wanted, space)
    for error in ([2.1e-5, 0.0, 0.0], [0.0, 1.1e-3, 0.0], [0.0, 0.0, 4.2e-4], [np.nan, 0.0, 0.0]):
        with pytest.raises(ExportError, match="at 2 of 2 observations"):
            compare(wanted + np.float32(error), wanted, space)
    with pytest.raises(ExportError, match="float64"):
        compare(wanted.astype(np.float64), wanted, space)
    with pytest.raises(ExportError, match="shape"):
        compare(wanted[:, :2], wanted, space)


def test_another_choice_is_a_difference_unless_it_is_as_good():
    space = gym.spaces.Discrete(3, start=5)
    with pytest.raises(ExportError, match="at 1 of 2 observations"):
        compare([5, 6], [5, 5], space)
    compare([5, 6], [5, 5], space, decided=np.array([True, False]))
    agent = api.make("ppo", env_id("Choice"), **tiny("ppo", actor_hidden=()))
    with torch.no_grad():
        agent.policy.head.linear.weight.copy_(torch.tensor([[0.0], [1.0], [0.0]]))
        agent.policy.head.linear.bias.zero_()
    graph = onnx_export.Graph(agent.policy, agent.observation_space, True)
    # above 0 the second is best; at 0 all are; below it the others are, as good as each other
    assert onnx_export._decided(graph, {"obs": torch.tensor([[1.0], [0.0], [-1.0]])}).tolist() == [True, False, False]
    graph = onnx_export.Graph(agent.policy, agent.observation_space, False)
    noise = torch.tensor([[0.0, 0.0, 0.0], [0.0, 0.0, 1.0], [0.0, 1.0, 0.0]])
    named = {"obs": torch.tensor([[1.0], [1.0], [-1.0]]), "noise": noise}
    assert onnx_export._decided(graph, named).tolist() == [True, False, False]


def test_policies_that_are_more_than_a_function_of_the_observation_are_refused(tmp_path):
    path = tmp_path / "policy.onnx"
    remembering = api.make("decision_transformer", dataset=offline.recorded(), **offline.tiny("decision_transformer"))
    with pytest.raises(ValueError, match=r"decision_transformer acts by what it remembers .* not supported"):
        remembering.export(path)
    writing = api.make("ppo", "ctrlrl/TokenPattern-v0", policy="tabular", device="cpu")
    with pytest.raises(ValueError, match="token"):
        writing.export(path)
    with pytest.raises(ValueError, match="deterministic, there is no noise"):
        off_policy.make("td3").export(path, deterministic=False)
    assert not list(tmp_path.iterdir())


def test_wrong_places_are_said_before_any_work(tmp_path):
    agent = make()
    with pytest.raises(ValueError, match=r"does not end in \.onnx"):
        agent.export(tmp_path / "policy.pt")
    with pytest.raises(FileNotFoundError, match="nowhere does not exist"):
        agent.export(tmp_path / "nowhere" / "policy.onnx")


@pytest.mark.parametrize("package", ["onnx", "onnxscript", "onnxruntime"])
def test_without_the_extra_the_error_names_it(package, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ImportError, match=rf"needs {package}: pip install 'ctrlrl\[onnx\]'"):
        make().export(tmp_path / "policy.onnx")


# -- the command ------------------------------------------------------------------------------------


def test_the_command_writes_a_runs_policy_into_its_folder(tmp_path, capsys):
    agent = api.make("ppo", NOISY, **tiny("ppo"))
    quiet(agent, 32, run_dir=tmp_path / "run")
    capsys.readouterr()
    assert cli.main(["export", str(tmp_path / "run")]) == 0
    path = tmp_path / "run" / "exports" / "policy.onnx"
    out, err = capsys.readouterr()
    for part in ("ppo on", "last checkpoint at 32 steps", "obs: float [batch, 3]", "action: float [batch, 1]", path):
        assert str(part) in out
    assert not err and about(path)["steps"] == 32
    np.testing.assert_allclose(infer(path, obs=rows(9, 3)), agent.predict(rows(9, 3), deterministic=True)[0], atol=1e-5)
    assert cli.main(["export", str(tmp_path / "run"), "--out", str(tmp_path / "policy.pt")]) != 0
    assert "does not end in .onnx" in capsys.readouterr().err
