"""``ctrlrl eval RUN --robust`` as a user types it: the lines, the files, the picture, and what is refused."""

import io
import json
import re

import gymnasium as gym
import matplotlib
import numpy as np
import pytest
from helpers.agents import make
from rich.console import Console

from ctrlrl import api
from ctrlrl.run import cli, robust_figures


class Product(gym.Env):
    """One step, which pays 1 - z^2 y x w of as many parameters as asked for, each in [0, 3], nominally 4; plus
    ``bonus`` times a number drawn at the reset."""

    observation_space = action_space = gym.spaces.Box(-1.0, 1.0, (1,), np.float32)

    def __init__(self, parameters=2, bonus=0.0):
        names = "zyxw"[:parameters]
        self.parameter_space = gym.spaces.Dict([(name, gym.spaces.Box(0.0, 3.0, (), np.float64)) for name in names])
        self.nominal = dict.fromkeys(names, 4.0)
        self.params, self.bonus = dict(self.nominal), bonus

    def set_params(self, params):
        self.params |= params

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.drawn = self.bonus * self.np_random.normal()
        return np.zeros(1, np.float32), {}

    def product(self):
        return self.params["z"] * np.prod(list(self.params.values()))

    def step(self, action):
        return np.zeros(1, np.float32), 1 - self.product() + self.drawn, True, False, {}


class Plain(Product):
    """The same without parameters."""

    def __init__(self):
        super().__init__()
        del self.parameter_space, self.nominal


for _name in ("Product", "Plain"):
    gym.register(f"eval/{_name}-v0", f"{__name__}:{_name}")
PRODUCT, PLAIN = (f"{__name__}:eval/{name}-v0" for name in ("Product", "Plain"))


@pytest.fixture
def run(capsys):
    def call(*words):
        try:
            status = cli.main([str(w) for w in words])
        except SystemExit as stop:  # tyro ends the process itself for wrong flags
            status = stop.code or 0
        out, err = capsys.readouterr()
        assert "Traceback" not in out + err
        return status, out, err

    return call


@pytest.fixture
def saved(tmp_path):
    return make(PRODUCT).save(tmp_path / "run")


def result_of(parameters, points=4, episodes=1):
    agent = make(PRODUCT, env_kwargs={"parameters": parameters, "bonus": 0.5})
    return agent.evaluate_robust(points, episodes)


def drawn(monkeypatch, draw, *arguments):
    """The figure itself, in place of its bytes."""
    monkeypatch.setattr(robust_figures, "_png", lambda figure: figure)
    return draw(*arguments)


def marks(axes):
    return {
        line.get_label(): (line.get_xdata()[0], line.get_ydata()[0])
        for line in axes.lines
        if line.get_label()[0] != "_"
    }


# -- the command line -----------------------------------------------------------------------------


def test_it_prints_worst_case_mean_spread_and_nominal_and_writes_both_files(run, saved):
    status, out, err = run("eval", saved, "--robust", "--grid-points", "4")
    assert status == 0, err
    lines = out.splitlines()
    assert lines[0] == (
        f"ppo on {PRODUCT}, last checkpoint at 0 steps, grid of 4 x 4 (m2td3), 1 deterministic episode in each cell"
    )
    assert lines[1] == "  worst case -26.00 at z 3, y 3"
    # the means of z^2, y, z^4 and y^2 are 14 / 4, 6 / 4, 98 / 4 and 14 / 4
    assert lines[2] == f"  mean -4.25, standard deviation over cells {np.sqrt(24.5 * 3.5 - 5.25**2):.2f}"
    assert lines[3] == "  nominal -63.00 at z 4, y 4"
    assert lines[-2:] == [f"Picture: {saved / 'robust.png'}", f"Returns: {saved / 'robust.json'}"]
    data = json.loads((saved / "robust.json").read_text())
    assert np.array(data["returns"]).shape == (16, 1) and data["nominal_mean"] == -63
    assert data["worst"] == -26 and data["worst_params"] == {"z": 3, "y": 3}
    assert (data["env"], data["checkpoint"], data["steps"], data["grid_convention"]) == (PRODUCT, "last", 0, "m2td3")
    assert data["axes"] == [[0, 1, 2, 3]] * 2 and data["deterministic"] is True
    assert matplotlib.image.imread(saved / "robust.png").std() > 0.05


def test_the_table_is_laid_out_as_the_picture(run, saved):
    out = run("eval", saved, "--robust", "--grid-points", "4")[1].replace("\N{MINUS SIGN}", "-")
    rows = [line.split() for line in out.splitlines()[5:10]]
    assert rows == [
        ["3", "1", "-2", "-11", "*-26"],
        ["2", "1", "-1", "-7", "-17"],
        ["1", "1", "0", "-3", "-8"],
        ["0", "1", "1", "1", "1"],
        ["0", "1", "2", "3"],
    ]
    assert out.splitlines()[4] == "  across: z, upwards: y, *: worst case"


def test_convention_episodes_seed_and_sampling_are_passed_on(run, saved):
    words = ("--grid-points", 3, "--grid-convention", "rrls", "--episodes", 2, "--seed", 9, "--stochastic")
    kwargs = ("--env-kwargs", '{"bonus": 1.0}')
    status, out, err = run("eval", saved, "--robust", *words, *kwargs)
    assert status == 0, err
    assert "grid of 3 x 3 (rrls), 2 stochastic episodes in each cell" in out
    data = json.loads((saved / "robust.json").read_text())
    expected = make(PRODUCT, env_kwargs={"bonus": 1.0}).evaluate_robust(3, 2, "rrls", seed=9)
    assert np.allclose(data["returns"], expected.returns) and data["axes"] == [[0, 1, 2]] * 2
    assert data["deterministic"] is False and data["env_kwargs"] == {"bonus": 1.0}


def test_out_and_plot_choose_the_files(run, saved, tmp_path):
    words = ("--out", tmp_path / "r.json", "--plot", tmp_path / "p.png")
    status, out, err = run("eval", saved, "--robust", "--grid-points", "2", *words)
    assert status == 0, err
    assert (tmp_path / "r.json").is_file() and (tmp_path / "p.png").read_bytes()[:4] == b"\x89PNG"
    assert not list(saved.glob("robust*"))


@pytest.mark.parametrize("parameters", [1, 3, 4])
def test_other_numbers_of_parameters_get_a_picture_and_no_table(run, saved, parameters):
    kwargs = json.dumps({"parameters": parameters})
    status, out, err = run("eval", saved, "--robust", "--grid-points", 3, "--env-kwargs", kwargs)
    assert status == 0, err
    assert f"grid of {' x '.join('3' * parameters)} " in out and "across" not in out
    assert (saved / "robust.png").read_bytes()[:4] == b"\x89PNG"


def test_a_run_on_the_plain_task_needs_env(run, tmp_path):
    folder = make(PLAIN).save(tmp_path / "plain")
    status, _, err = run("eval", folder, "--robust")
    assert status == 1 and "has no uncertainty set" in err and "ctrlrl/RobustHopper-v0" in err
    assert err.count("\n") == 1 and not list(folder.glob("robust*"))
    status, out, err = run("eval", folder, "--robust", "--env", PRODUCT, "--grid-points", 2)
    assert status == 0 and f"ppo on {PRODUCT}" in out and "worst case -26.00" in out


def test_runs_of_off_policy_methods_are_evaluated_too(run, tmp_path):
    agent = api.make("sac", PRODUCT, device="cpu", actor_hidden=(8,), critic_hidden=(8,), eval_every=None)
    status, out, err = run("eval", agent.save(tmp_path / "sac"), "--robust", "--grid-points", 2)
    assert status == 0, err
    assert out.startswith(f"sac on {PRODUCT}") and "worst case -26.00 at z 3, y 3" in out


def test_without_robust_a_plain_evaluation_has_a_hundred_episodes(run, saved):
    status, out, _ = run("eval", saved)
    assert status == 0 and "100 deterministic episodes" in out and not list(saved.glob("robust*"))


MISTAKES = {
    "other spaces": (["--robust", "--env", "CartPole-v1"], r"CartPole-v1 has observations in .* its own spaces"),
    "unknown id": (["--robust", "--env", "ctrlrl/RobustHoper-v0"], r"Did you mean ctrlrl/RobustHopper-v0"),
    "kwargs that are not JSON": (["--robust", "--env-kwargs", "a=3"], r"--env-kwargs is not JSON.*example"),
    "kwargs that are not a mapping": (["--robust", "--env-kwargs", "[3]"], "--env-kwargs is .3., expected names"),
    "kwargs the environment does not know": (["--robust", "--env-kwargs", '{"bogus": 3}'], "bogus"),
    "no episodes": (["--robust", "--episodes", "0"], "episodes=0 must be at least 1"),
    "no grid": (["--robust", "--grid-points", "1"], "points=1 must be"),
    "convention": (["--robust", "--grid-convention", "iwocs"], "iwocs"),
    "folder of the picture": (["--robust", "--plot", "no/such/p.png"], "no/such does not exist"),
    "folder of the returns": (["--robust", "--out", "no/such/r.json"], "no/such does not exist"),
    "env alone": (["--env", PRODUCT], "--env is for evaluations over an uncertainty set: add --robust"),
    "plot and points alone": (["--plot", "p.png", "--grid-points", "5"], "--grid-points, --plot .*add --robust"),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_a_mistake_gets_a_short_answer_and_writes_nothing(run, saved, case, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    words, message = MISTAKES[case]
    status, out, err = run("eval", saved, *words)
    assert status != 0 and re.search(message, re.sub(r"[\s│]+", " ", out + err)), out + err
    assert not list(saved.glob("robust*")) and [p.name for p in tmp_path.iterdir()] == ["run"]


def test_a_missing_folder_is_noticed_before_the_work(run, saved, monkeypatch):
    monkeypatch.setattr("ctrlrl.engine.agent.evaluate_grid", lambda *_: pytest.fail("the work was begun"))
    assert run("eval", saved, "--robust", "--plot", "no/such/p.png")[0] == 1


# -- pictures -------------------------------------------------------------------------------------


def test_one_parameter_is_a_line_with_the_range_of_its_episodes(monkeypatch):
    result = result_of(1, 4, 3)
    figure = drawn(monkeypatch, robust_figures.picture, result, "a title")
    (axes,) = figure.axes
    assert np.array_equal(axes.lines[0].get_xydata(), np.stack([result.axes[0], result.by_cell], 1))
    assert marks(axes) == {"worst": (3.0, result.worst), "nominal": (4.0, result.nominal_mean)}
    (band,) = axes.collections
    assert band.get_datalim(axes.transData).y0 == pytest.approx(result.returns.min())
    assert figure.get_suptitle() == "a title" and axes.get_xlabel() == "z"


def test_two_parameters_are_a_heat_map_with_both_marks(monkeypatch):
    result = result_of(2)._replace(nominal={"z": 4.0, "y": 1.0})
    figure = drawn(monkeypatch, robust_figures.picture, result, "")
    axes = figure.axes[0]
    assert np.array_equal(axes.collections[0].get_array(), result.grid.T)
    assert marks(axes) == {"worst": (3.0, 3.0), "nominal": (4.0, 1.0)}
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("z", "y")
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["worst", "nominal"]


def test_three_parameters_are_slices_with_one_scale(monkeypatch):
    result = result_of(3)._replace(nominal={"z": 2.0, "y": 1.5, "x": 1.4})
    figure = drawn(monkeypatch, robust_figures.picture, result, "")
    panels = [axes for axes in figure.axes if axes.get_visible() and axes.get_title()]
    assert [axes.get_title() for axes in panels] == ["x = 0", "x = 1", "x = 2", "x = 3"]
    for k, axes in enumerate(panels):
        assert np.array_equal(axes.collections[0].get_array(), result.grid[:, :, k].T)
        assert axes.collections[0].get_clim() == (result.grid.min(), result.grid.max())
    assert [marks(axes) for axes in panels] == [{}, {"nominal": (2.0, 1.5)}, {}, {"worst": (3.0, 3.0)}]


def test_more_than_a_row_of_slices(monkeypatch):
    figure = drawn(monkeypatch, robust_figures.picture, result_of(3, 7), "")
    assert len([axes for axes in figure.axes if axes.get_visible() and axes.get_title()]) == 7


def test_more_parameters_are_seen_at_their_worst_over_the_others(monkeypatch):
    result = result_of(4, 3)
    axes = drawn(monkeypatch, robust_figures.picture, result, "").axes[0]
    assert np.array_equal(axes.collections[0].get_array(), result.grid.min((2, 3)).T)
    assert axes.get_title() == "lowest over x, w"


def test_methods_are_compared_on_one_scale_in_each_row(monkeypatch):
    high = result_of(2)
    low = high._replace(returns=high.returns - 50)
    figure = drawn(monkeypatch, robust_figures.comparison, {"A": {"sac": high, "iwocs": low}, "B": {"iwocs": high}})
    panels = {axes.get_title(): axes.collections[0] for axes in figure.axes if axes.get_visible() and axes.get_title()}
    assert list(panels) == ["A  sac", "A  iwocs", "B  iwocs"]
    assert panels["A  sac"].get_clim() == panels["A  iwocs"].get_clim() == (low.worst, high.by_cell.max())
    assert panels["B  iwocs"].get_clim() == (high.worst, high.by_cell.max())
    assert np.array_equal(panels["A  iwocs"].get_array(), low.grid.T)


def test_the_table_is_coloured_by_return():
    result = result_of(2)
    cells = [cell for column in robust_figures.table(result).columns for cell in column.cells]
    (worst,) = [cell for cell in cells if "*" in cell]
    assert "#ffffff on #440154" in worst  # the ends of viridis
    assert sum("#000000 on #fde725" in cell for cell in cells) == (result.by_cell == result.by_cell.max()).sum()
    flat = robust_figures.table(result._replace(returns=np.ones((16, 1))))
    Console(file=io.StringIO()).print(flat)


def test_the_table_is_left_out_where_it_does_not_fit():
    assert robust_figures.table(result_of(2, 12)) is not None
    assert robust_figures.table(result_of(2, 13)) is None and robust_figures.table(result_of(1)) is None
