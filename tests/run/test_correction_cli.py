"""``ctrlrl eval RUN --correct CDSA_RUN`` as a user types it: the table, the files, and what is refused."""

import io
import json

import gymnasium as gym
import matplotlib.image
import numpy as np
import pytest
from helpers.agents import quiet
from helpers.offline import recorded, tiny

from ctrlrl import api
from ctrlrl.engine.evaluate import Evaluation
from ctrlrl.run import correction_cli
from ctrlrl.run.correction_cli import Row, picture


class Pays(gym.Env):
    """The action, for four steps."""

    observation_space = gym.spaces.Box(-np.inf, np.inf, (3,), np.float32)
    action_space = gym.spaces.Box(-1.0, 1.0, (1,), np.float32)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.t = 0
        return self.np_random.normal(size=3).astype(np.float32), {}

    def step(self, action):
        self.t += 1
        return self.np_random.normal(size=3).astype(np.float32), float(action[0]), False, self.t == 4, {}


gym.register("correction_cli/Pays-v0", f"{__name__}:Pays")
PAYS = f"{__name__}:correction_cli/Pays-v0"


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Run folders by method."""
    root = tmp_path_factory.mktemp("runs")
    for name in ("cdsa", "bc", "td3_bc"):
        quiet(api.make(name, dataset=recorded(env=PAYS), **tiny(name)), 6).save(root / name)
    return root


@pytest.fixture
def command(monkeypatch, capsys, runs):
    monkeypatch.setenv("COLUMNS", "200")

    def run(*words, policy="td3_bc"):
        status = correction_cli.main([str(runs / policy), "--correct", str(runs / "cdsa"), *map(str, words)])
        return status, capsys.readouterr()

    return run


NAMES = ("uncorrected", "corrected", "bc")


def lines(out):
    """First column and the others of the table's rows."""
    found = [line.split() for line in out.splitlines()]
    return [line for line in found if line[:1] and (line[0] in NAMES or line[1:2] == ["of"])]


def test_a_sweep_shows_every_pair_after_the_policy_itself(command, runs, tmp_path):
    status, said = command(
        "--eta-action", 0, 0.5, "--eta-state", 0, 1, "--episodes", 4, "--no-skip-in-data", "--out", tmp_path / "r.json"
    )
    assert status == 0 and "td3_bc on" in said.out and "VaR 10" in said.out and "score" in said.out
    table = lines(said.out)
    assert [line[0] for line in table] == ["uncorrected"] + ["corrected"] * 4
    assert [line[1:3] for line in table[1:]] == [["0", "0"], ["0", "1"], ["0.5", "0"], ["0.5", "1"]]
    # of strength 0 it is the policy, on the same episodes
    plain = api.load(runs / "td3_bc").evaluate(4)
    assert table[0][1:] == table[1][3:]
    numbers = [plain.mean, plain.std / 2, plain.value_at_risk(0.1), plain.conditional_value_at_risk(0.1)]
    assert [float(x) for x in table[0][1:5]] == pytest.approx(numbers, abs=0.006)
    rows = json.loads((tmp_path / "r.json").read_text())["rows"]
    assert rows[0]["returns"] == plain.returns.tolist() and rows[0]["eta_action"] is None
    assert [row["seeds"] for row in rows] == [plain.seeds.tolist()] * 5
    assert rows[4]["returns"] != plain.returns.tolist() and rows[4]["eta_state"] == 1.0
    assert matplotlib.image.imread(runs / "td3_bc" / "correction.png").std() > 0.01


def test_one_strength_needs_no_picture_and_controls_stand_in_the_same_table(command, runs, tmp_path):
    (runs / "td3_bc" / "correction.png").unlink(missing_ok=True)
    status, said = command("--episodes", 3, "--blend", 0.5, 1, "--blend-with", runs / "bc", "--controls", runs / "bc")
    assert status == 0 and "Picture" not in said.out and not (runs / "td3_bc" / "correction.png").exists()
    table = lines(said.out)
    assert [line[0] for line in table] == ["uncorrected", "corrected", "0.5", "1", "bc"]
    assert table[1][1:3] == ["0.5", "0"]
    assert table[3][3:] == table[4][1:]  # all of bc is bc
    status, said = command("--episodes", 2, "--plot", tmp_path / "p.png")
    assert status == 0 and (tmp_path / "p.png").exists()


def test_an_onnx_file_can_be_corrected(command, runs):
    pytest.importorskip("onnxscript")
    api.load(runs / "td3_bc").export(runs / "policy.onnx")
    status, said = command("--episodes", 3, "--seed", 7, "--eta-state", 0, 1, policy="policy.onnx")
    assert status == 0 and "policy.onnx on" in said.out and (runs / "correction.png").exists()
    _, other = command("--episodes", 3, "--seed", 7)
    assert lines(said.out)[0] == lines(other.out)[0]


def test_what_makes_no_sense_is_refused(command, runs, tmp_path):
    for words, told in (
        (["--blend", 0.5], "--blend-with"),
        (["--blend-with", runs / "bc"], "--blend-with"),
        (["--risk", 0], "--risk"),
        (["--episodes", 0], "--episodes"),
        (["--out", tmp_path / "no" / "r.json"], "does not exist"),
        (["--eta-state", 0, 1, "--plot", tmp_path / "no" / "p.png"], "does not exist"),
    ):
        status, said = command(*words)
        assert status in (1, 2) and told in said.err
    with pytest.raises(ValueError, match="a run of bc, expected one of cdsa"):
        correction_cli.main([str(runs / "td3_bc"), "--correct", str(runs / "bc")])


def test_the_picture_has_a_panel_for_each_strength_of_the_action(monkeypatch):
    from matplotlib.figure import Figure

    drawn = []
    keep = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, *a, **k: (drawn.append(self), keep(self, *a, **k))[1])

    def result(mean):
        return Evaluation(mean + np.arange(10.0), np.ones(10, int), np.arange(10))

    rows = [Row("uncorrected", None, None, result(0.0)), Row("bc", None, None, result(9.0))]
    rows += [Row("corrected", x, y, result(10 * x + y)) for x in (0.5, 0.0) for y in (2.0, 0.0, 1.0)]
    assert picture(rows, 0.1, "title").startswith(b"\x89PNG")
    (figure,) = drawn
    assert [a.get_title() for a in figure.axes] == ["eta-action 0", "eta-action 0.5"]
    for axes, x in zip(figure.axes, (0.0, 0.5), strict=True):
        mean, dashed = axes.lines[0], axes.lines[1]
        assert mean.get_xdata().tolist() == [0.0, 1.0, 2.0] and axes.get_xlabel() == "eta-state"
        assert mean.get_ydata().tolist() == [10 * x + y + 4.5 for y in (0.0, 1.0, 2.0)]
        assert list(dashed.get_ydata()) == [4.5, 4.5]
    drawn.clear()
    picture([row for row in rows if row.eta_state in (None, 1.0)], 0.1, "title")
    assert drawn[0].axes[0].get_xlabel() == "eta-action" and len(drawn[0].axes) == 1
    assert io.BytesIO(picture(rows, 0.1, "title")).getvalue() == picture(rows, 0.1, "title")
