"""The report on generative policies: their actions known by hand, where their decoders were fitted, and runs that
cannot be looked at."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from helpers.agents import NOISY, make, quiet
from helpers.envs import env_id
from run.test_report import make_run, page
from scipy.special import ndtri
from torch import nn

from ctrlrl import api
from ctrlrl.engine import runfolder
from ctrlrl.run import report
from ctrlrl.run import report_actions as actions
from ctrlrl.run import report_figures as figures
from ctrlrl.run.report_page import Image
from ctrlrl.run.report_runs import Run, load, stage_starts

TINY = {
    "n_steps": 8, "batch_size": 8, "epochs": 1, "actor_hidden": (4,), "critic_hidden": (4,), "device": "cpu",
    "threads": 1, "eval_every": None, "n_envs": 2, "diagnose_every": None,
}  # fmt: skip
GORL = TINY | {
    "decoder_hidden": (4,), "decoder_steps": 2, "refine_epochs": 1, "refine_steps": 8, "stages": (0.5, 0.5),
}  # fmt: skip
FREE = gym.spaces.Box(-np.inf, np.inf, (1,), np.float32)


class Two(gym.Env):
    """One state, one step, two unbounded actions."""

    observation_space = FREE
    action_space = gym.spaces.Box(-np.inf, np.inf, (2,), np.float32)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return np.zeros(1, np.float32), {}

    def step(self, action):
        return np.zeros(1, np.float32), 0.0, True, False, {}


gym.register("test/ReportTwo-v0", Two)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two seeds of gorl in the second stage, and one each of fpo and ppo."""
    root = tmp_path_factory.mktemp("runs")
    first = quiet(api.make("gorl", NOISY, seed=0, **GORL), 64, root=root).run_dir
    second = Path(shutil.copytree(first, first.with_name("second")))
    runfolder.write_json(second / runfolder.CONFIG, runfolder.read_config(second) | {"seed": 1})
    quiet(api.make("fpo", NOISY, denoising_steps=2, matching_times=2, **TINY), 16, root=root)
    quiet(api.make("ppo", NOISY, **TINY), 16, root=root)
    return root


def shown(folder: Path) -> tuple[Any, list[Image]]:
    """The section on the runs below ``folder``, and its images."""
    found = load([folder])
    labels = sorted({run.label for run in found})
    keys = sorted({(run.env, run.label) for run in found})
    by_group = {key: [run for run in found if (run.env, run.label) == key] for key in keys}
    section = actions.section(
        by_group, labels, lambda name, png, alt, caption: Image(name, str(len(png)), alt, caption)
    )
    return section, [] if section is None else section.images


def copied(runs: Path, method: str, to: Path) -> Path:
    run = next(run.path for run in load([runs]) if run.method == method)
    return Path(shutil.copytree(run, to / method))


def gaussian_ppo(mean: float, std: float, space: gym.spaces.Box = FREE) -> Any:
    """An agent that acts by N(mean, std^2), cut at the bounds of ``space``, in every state."""
    env = SimpleEnv(space)
    agent = api.make("ppo", env, **{k: v for k, v in TINY.items() if k != "n_envs"})
    with torch.no_grad():
        agent.policy.head.linear.weight.zero_()
        agent.policy.head.linear.bias.fill_(mean)
        agent.policy.head.log_std.fill_(math.log(std))
    return agent


class SimpleEnv(Two):
    def __init__(self, space: gym.spaces.Box) -> None:
        self.action_space = space


# -- stages on the curve --------------------------------------------------------------------------


def staged(root: Path, seed: int, rows: list[tuple[int, int, int]], **options: Any) -> Path:
    """A run with a log row (step, stage, phase) each, a tenth of a second per step."""
    folder = make_run(root, "gorl", seed=seed, **options)
    lines = [
        {"step": s, "time_s": s / 10, "rollout/ep_rew_mean": 1.0, "stage/index": float(k), "stage/phase": float(p)}
        for s, k, p in rows
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


FIRST = [(50, 0, 0), (60, 0, 1), (60, 0, 2), (60, 0, 2), (100, 1, 0), (120, 1, 1), (120, 1, 2), (200, 2, 0)]
SECOND = [(50, 0, 0), (70, 0, 1), (70, 0, 2), (110, 1, 0)]
THIRD = [(50, 0, 0), (200, 0, 0)]


def test_a_stage_begins_where_the_decoder_before_it_was_fitted(tmp_path: Path) -> None:
    for seed, rows in enumerate((FIRST, SECOND, THIRD)):
        staged(tmp_path, seed, rows)
    found = load([tmp_path])
    assert [run.stages for run in found] == [{1: (60, 6.0), 2: (120, 12.0)}, {1: (70, 7.0)}, {}]
    assert stage_starts(found, 0) == [65.0, 120.0]  # the median of 60 and 70; one run only has a third stage
    assert stage_starts(found, 1) == [6.5, 12.0]
    assert load([make_run(tmp_path / "other")])[0].stages == {}


def test_the_curves_show_the_median_fit_of_each_group(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    staged(tmp_path / "runs", 0, FIRST)
    staged(tmp_path / "runs", 1, SECOND)
    make_run(tmp_path / "runs", "ppo")
    seen = []
    monkeypatch.setattr(figures, "learning_curves", lambda *a: seen.append(a[4]) or b"png")
    section = report._Page(load([tmp_path / "runs"]), tmp_path, {}, 9).curves()
    assert seen == [{"gorl": [65.0, 120.0], "ppo": []}, {"gorl": [pytest.approx(6.5 / 60), 0.2], "ppo": []}]
    assert all("Fits of decoders: the median over runs." in image.caption for image in section.images)


def test_fits_are_dashed_verticals_with_one_entry_in_the_legend(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(figures, "_png", lambda figure: figure)
    line = figures.Curve([], np.array([0.0, 9.0]), np.ones(2), np.ones(2), np.ones(2), False)
    curves = {"a": line, "b": line, "c": line}
    figure: Any = figures.learning_curves(curves, ["a", "b", "c"], "x", "y", {"a": [3.0, 6.0], "b": [3.0], "c": []})
    axes = figure.axes[0]
    verticals = [one for one in axes.lines if len(set(one.get_xdata())) == 1]
    assert [one.get_xdata()[0] for one in verticals] == [3.0, 6.0, 3.0]
    assert all(one.is_dashed() for one in verticals)
    assert verticals[0].get_color() == verticals[1].get_color() != verticals[2].get_color()
    texts = [text.get_text() for text in axes.get_legend().get_texts()]
    assert texts.count("a decoder was fitted here") == 1 and len(texts) == 4
    without: Any = figures.learning_curves(curves, ["a", "b", "c"], "x", "y", {"a": []})
    assert len(without.axes[0].get_legend().get_texts()) == 3


# -- the actions ----------------------------------------------------------------------------------


def test_samples_have_the_moments_of_a_known_gaussian() -> None:
    agent = gaussian_ppo(0.3, 0.5)
    states = [np.zeros((1, 1), np.float32), np.ones((1, 1), np.float32)]
    drawn = actions.sample(agent, states, 20_000)
    assert drawn.shape == (2, 20_000, 1)
    assert drawn.mean(1) == pytest.approx(0.3, abs=0.02) and drawn.std(1) == pytest.approx(0.5, abs=0.01)
    assert not np.array_equal(drawn[0], drawn[1])  # noise of its own in every state
    assert np.array_equal(drawn, actions.sample(agent, states, 20_000))


def test_samples_are_the_environments_actions_after_the_bounds() -> None:
    agent = gaussian_ppo(1.0, 1.0, gym.spaces.Box(-1.0, 1.0, (1,), np.float32))
    drawn = actions.sample(agent, [np.zeros((1, 1), np.float32)], 20_000)
    assert drawn.max() == 1.0 and drawn.min() == -1.0
    assert (drawn == 1.0).mean() == pytest.approx(0.5, abs=0.015)


def test_samples_of_a_decoder_are_what_it_decodes() -> None:
    class Sign(nn.Module):
        def features(self, obs: torch.Tensor) -> torch.Tensor:
            return obs

        def forward(self, features: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
            return noise.sign() + features[:, :1]

    agent = api.make("gorl", NOISY, **GORL)
    agent.policy.decoder, agent.policy.decoding = Sign(), True
    one = np.array([[0.5, 0.0, 0.0]], np.float32)
    drawn = actions.sample(agent, [one])[0, :, 0]
    assert sorted(set(drawn.round(5))) == [round(math.tanh(-0.5), 5), round(math.tanh(1.5), 5)]
    assert (drawn > 0).mean() == pytest.approx(0.5, abs=0.05)


def test_actions_that_are_not_finite_are_refused() -> None:
    with pytest.raises(ValueError, match="not finite"):
        actions.sample(gaussian_ppo(math.nan, 1.0), [np.zeros((1, 1), np.float32)], 5)


def test_states_are_spread_from_the_first_to_the_last_of_one_episode(monkeypatch: pytest.MonkeyPatch) -> None:
    counter = api.make("ppo", env_id("OnlyTruncates"), env_kwargs={"length": 10}, **TINY)
    seen = actions.visit(counter)
    assert list(seen.steps) == [0, 3, 6, 9]
    assert [obs.item() % 10 for obs in seen.observations] == [0.0, 3.0, 6.0, 9.0]
    short = api.make("ppo", env_id("OnlyTruncates"), env_kwargs={"length": 2}, **TINY)
    assert list(actions.visit(short).steps) == [0, 1]
    monkeypatch.setattr(actions, "LONGEST", 7)
    endless = api.make("ppo", env_id("ActionEcho"), **TINY)
    seen = actions.visit(endless)
    assert list(seen.steps) == [0, 2, 4, 6]
    # it observes its actions: they are sampled, and the same again
    assert len({obs.item() for obs in seen.observations[1:]}) == 3
    assert actions.visit(endless).observations == seen.observations


def test_the_dimensions_shown_are_the_least_gaussian_within_their_bounds() -> None:
    n = 400
    normal = ndtri((np.arange(n) + 0.5) / n)
    sign = np.where(np.arange(n) % 2, 1.0, -1.0)
    # W1 of +-c to N(0, c^2) is c E||z| - 1|, of a Gaussian 0; by the width of the bounds: 0, .1, .25, .5 of that
    drawn = np.stack([9 * normal + 4, 2 * sign, sign / 2, sign], 1)[None].repeat(8, 0)
    space = gym.spaces.Box(np.float32([-9, -10, -1, -1]), np.float32([9, 10, 1, 1]))
    assert actions.least_gaussian(drawn, space) == (2, 3)
    free = gym.spaces.Box(-np.inf, np.inf, (4,), np.float32)
    assert actions.least_gaussian(drawn, free) == (1, 3)
    drawn[1:, :, 3] = normal  # .5 in one of eight states
    assert actions.least_gaussian(drawn, space) == (1, 2)


@pytest.mark.parametrize(
    ("method", "policy", "expected"),
    [("gorl", "auto", True), ("gorl_sac", None, True), ("fpo", "auto", True), ("dppo", "auto", True),
     ("flow_grpo", "auto", True), ("ppo", "flow", True), ("ppo", "auto", False), ("sac", None, False),
     ("mine:Loss", "flow", True), ("unknown", "auto", False)],
)  # fmt: skip
def test_which_runs_have_a_generative_policy(tmp_path: Path, method: str, policy: str | None, expected: bool) -> None:
    config = {} if policy is None else {"network": {"policy": policy}}
    run = load([make_run(tmp_path, method, config=config)])[0]
    assert actions.generative(run) is expected


def test_a_gaussian_is_told_from_flows_and_latents() -> None:
    assert actions.gaussian(make())
    assert not actions.gaussian(api.make("gorl", NOISY, **GORL))
    assert not actions.gaussian(api.make("fpo", NOISY, **TINY))
    assert not actions.gaussian(api.make("ppo", "CartPole-v1", **TINY))


# -- the page -------------------------------------------------------------------------------------


def test_the_figures_hold_the_first_run_next_to_the_gaussian(runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[Any, ...]] = []
    monkeypatch.setattr(figures, "action_histograms", lambda *a: seen.append(a) or b"png")
    asked: list[Any] = []
    real = actions.sample
    monkeypatch.setattr(actions, "sample", lambda agent, obs: asked.append((agent, obs)) or real(agent, obs))
    section, images = shown(runs)
    assert section.title == "What the policy does" and not section.notes
    assert [image.name.split("-")[-1] for image in images] == ["fpo", "gorl"]
    assert [agent.method for agent, _ in asked] == ["fpo", "gorl", "ppo"]
    assert all(obs is asked[0][1] for _, obs in asked)  # the same states for all
    assert asked[1][0].seed == 0 and asked[1][0].stage == 1
    for (titles, own, other, order), label in zip(seen, ("fpo", "gorl"), strict=True):
        assert own[0] == label and other[0] == "ppo" and order == ["fpo", "gorl", "ppo"]
        assert own[1].shape == other[1].shape == (len(titles), actions.SAMPLES, 1)
    assert not np.array_equal(seen[0][1][1], seen[1][1][1])
    assert "gorl (seed 0): 2,000 actions per state" in images[1].caption and "fpo (seed 0) played" in images[1].caption
    assert "ppo, mean at step 0" in images[1].alt


def test_the_page_has_the_figure_or_a_sentence_where_the_environment_is_gone(runs: Path, tmp_path: Path) -> None:
    here, gone = copied(runs, "gorl", tmp_path / "here"), copied(runs, "gorl", tmp_path / "gone")
    document = runfolder.read_config(gone)
    document["env"]["id"] = "test/Gone-v0"
    runfolder.write_json(gone / runfolder.CONFIG, document)
    source, text = page([here, gone], tmp_path / "out")
    assert "What the policy does" in text and "gorl (seed 0): 2,000 actions per state" in text
    assert "test/Gone-v0: there is no figure of what gorl does. UnknownEnvironment: no environment" in text
    assert len(list((tmp_path / "out").glob("actions-*.png"))) == 1
    assert str(tmp_path) not in source


def test_without_a_gaussian_the_one_of_the_same_moments_is_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(figures, "_png", lambda figure: figure)
    rng = np.random.default_rng(0)
    points = rng.normal(size=(1, 4000, 2)) @ np.array([[2.0, 1.0], [0.0, 0.5]]) + 3.0
    drawn: Any = figures.action_scatters(["step 0"], ("gorl", points), None, ("action 0", "action 1"), ["gorl"])
    borders = [one.get_xydata() for one in drawn.axes[0].lines if one.get_linestyle() == "--"]
    assert len(borders) == 2
    inverse = np.linalg.inv(np.cov(points[0].T))
    for border, part in zip(borders, (0.5, 0.95), strict=True):
        away = border - points[0].mean(0)
        squared = np.einsum("ni,ij,nj->n", away, inverse, away)
        assert squared == pytest.approx(-2 * math.log(1 - part))  # of chi-square with two degrees of freedom
    assert [t.get_text() for t in drawn.legends[0].get_texts()] == ["gorl", figures.MATCHED]
    lone: Any = figures.action_histograms(["step 0"], ("gorl", points[..., :1]), None, ["gorl"])
    mine, outline = (patch.get_data() for patch in lone.axes[0].patches)
    assert mine.values.sum() == pytest.approx(1.0)
    middles = (outline.edges[1:] + outline.edges[:-1]) / 2
    mean = (outline.values * middles).sum() / outline.values.sum()
    assert mean == pytest.approx(points[0, :, 0].mean(), abs=0.02)
    assert np.abs(outline.values - mine.values).max() < 0.02


def test_actions_that_are_always_the_same_can_be_drawn() -> None:
    for size, draw in ((1, figures.action_histograms), (2, figures.action_scatters)):
        same = np.ones((3, 50, size))
        names = (("a", "b"),) if size == 2 else ()
        assert draw(["x", "y", "z"], ("gorl", same), None, *names, ["gorl"]).startswith(b"\x89PNG")  # type: ignore[operator]


def test_three_dimensions_are_shown_by_two_and_the_caption_says_which(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    agent = SimpleNamespace(
        observation_space=FREE, action_space=gym.spaces.Box(-1.0, 1.0, (3,), np.float32), policy=SimpleNamespace()
    )
    sign = np.where(np.arange(100) % 2, 1.0, -1.0)
    drawn = np.stack([0.5 * sign, 0 * sign, sign], 1)[None]
    monkeypatch.setattr(api, "load", lambda *a, **k: agent)
    monkeypatch.setattr(actions, "visit", lambda _: actions.Visit([None], [0]))
    monkeypatch.setattr(actions, "sample", lambda *_: drawn)
    seen: list[tuple[Any, ...]] = []
    monkeypatch.setattr(figures, "action_scatters", lambda *a: seen.append(a) or b"png")
    make_run(tmp_path, "gorl")
    _, images = shown(tmp_path)
    assert np.array_equal(seen[0][1][1], drawn[..., [0, 2]]) and seen[0][2] is None
    assert seen[0][3] == ("action 0", "action 2")
    assert "Of its 3 dimensions, 0 and 2 are the least Gaussian" in images[0].caption
    assert "Ellipses hold 50 % and 95 %" in images[0].caption


# -- runs that cannot be looked at ----------------------------------------------------------------


def test_a_damaged_checkpoint_gives_a_sentence_and_the_others_their_figures(runs: Path, tmp_path: Path) -> None:
    for method in ("fpo", "gorl", "ppo"):
        copied(runs, method, tmp_path)
    for method in ("fpo", "ppo"):
        file = tmp_path / method / "checkpoints" / "last.safetensors"
        file.write_bytes(file.read_bytes()[:-40])
    section, images = shown(tmp_path)
    assert [image.name.split("-")[-1] for image in images] == ["gorl"]
    assert len(section.notes) == 2
    assert "no figure of what fpo does. CheckpointError: fpo" in section.notes[0]
    assert "the actions of ppo are not shown. CheckpointError: ppo" in section.notes[1]
    assert not any(str(tmp_path) in note for note in section.notes)
    assert "gorl (seed 0) played" in images[0].caption


def test_a_run_with_other_spaces_is_not_compared(runs: Path, tmp_path: Path) -> None:
    copied(runs, "gorl", tmp_path)
    api.make("ppo", "test/ReportTwo-v0", **TINY).save(tmp_path / "two")
    found = load([tmp_path / "gorl", tmp_path / "two"])
    groups: dict[tuple[str, str], list[Run]] = {("X", run.label): [run] for run in found}
    section = actions.section(groups, ["gorl", "ppo"], lambda *a: Image(a[0], "", a[2], a[3]))
    assert section is not None and "its observation_space" in section.notes[0] and "ppo" not in section.images[0].alt


def test_a_first_stage_is_told(tmp_path: Path) -> None:
    quiet(api.make("gorl", NOISY, **GORL | {"stages": (1.0,)}), 16, root=tmp_path)
    section, images = shown(tmp_path)
    assert "gorl is in its first stage, without a decoder" in section.notes[0] and len(images) == 1


def test_a_report_without_generative_policies_has_no_such_section(tmp_path: Path) -> None:
    make_run(tmp_path, "ppo")
    assert shown(tmp_path) == (None, [])
