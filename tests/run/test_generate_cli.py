"""``ctrlrl data generate`` as a user types it, and ``ctrlrl train --augment``."""

import numpy as np
import pytest
import torch
from helpers.offline import recorded, tiny

from ctrlrl import api
from ctrlrl.data import d4rl, load, minari
from ctrlrl.engine.guidance import GuidanceConfig
from ctrlrl.engine.runfolder import find_runs, read_lines
from ctrlrl.engine.seeding import generator
from ctrlrl.nets.edm import SamplerConfig
from ctrlrl.run import cli

pytest.importorskip("h5py", reason="h5py is not installed")
pytest.importorskip("diffusers", reason="diffusers is not installed")

DIFFUSION = {
    "batch_size": 8, "iteration_steps": 10, "learning_rate": 1e-2, "device": "cpu", "threads": 1, "window_length": 4,
    "window_stride": 1, "denoiser_channels": (8,), "held_out": 0.0,
}  # fmt: skip


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A folder with a file of data, a run of a model of it, and one of a policy."""
    folder = tmp_path_factory.mktemp("home")
    d4rl.write(recorded(), folder / "toy.hdf5")
    model = api.make("policy_guided_diffusion", dataset=folder / "toy.hdf5", **DIFFUSION)
    model.learn(10, run_dir=folder / "model", progress=False, tensorboard=False)
    api.make("iql", dataset=folder / "toy.hdf5", **tiny("iql")).save(folder / "policy")
    return folder


@pytest.fixture
def run(capsys, monkeypatch):
    """(exit status, standard output, standard error) of ``ctrlrl ...``."""
    monkeypatch.setenv("COLUMNS", "200")

    def call(*words):
        try:
            status = cli.main([str(w) for w in words])
        except SystemExit as stop:
            status = stop.code or 0
        return status, *capsys.readouterr()

    return call


def test_a_set_is_what_the_model_generates_with_its_words(run, home, tmp_path):
    out = tmp_path / "made.hdf5"
    words = ("--trajectories", 7, "--batch-size", 4, "--seed", 3, "--sampler-steps", 3, "--policy", home / "policy")
    status, text, err = run("data", "generate", home / "model", "--out", out, "--kappa", 0.5, *words)
    assert (status, err) == (0, "")
    assert "28" in text and "policy_guided_diffusion" in text
    made = load.load(out)
    model, policy = api.load(home / "model"), api.load(home / "policy")
    steps, known = model.generate(
        7, policy, GuidanceConfig(kappa=0.5), SamplerConfig(sampler_steps=3), generator(3, "generate"), batch_size=4
    )
    assert np.array_equal(made.observations, steps.obs.flatten(0, 1).numpy())
    assert np.array_equal(made.rewards, steps.reward.flatten().numpy())
    assert np.array_equal(made.usable, known.flatten().numpy())
    about = made.info.about
    assert about["kind"] == "generated" and about["trajectories"] == 7 and about["seed"] == 3
    assert about["guidance"]["kappa"] == 0.5 and about["sampler"]["sampler_steps"] == 3
    assert about["behaviour"]["run"] == "model" and about["policy"] == {**about["policy"], "method": "iql"}


def test_minari_holds_every_transition(run, home, tmp_path, monkeypatch):
    pytest.importorskip("minari", reason="minari is not installed")
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path))
    words = ("--trajectories", 5, "--sampler-steps", 3)
    assert run("data", "generate", home / "model", "--out", "ctrlrl/made-v0", *words)[0] == 0
    made = minari.read("ctrlrl/made-v0")
    steps, known = api.load(home / "model").generate(
        5, sampler=SamplerConfig(sampler_steps=3), generator=generator(0, "generate")
    )
    assert len(made) == int(known.sum()) and made.usable.all()
    np.testing.assert_array_equal(made.rewards, steps.reward[known].numpy())


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (("--kappa", 1), "--policy RUN and --kappa above 0"),
        (("--policy", "policy"), "--policy RUN and --kappa above 0"),
        (("--trajectories", 0), "must be at least 1"),
        (("--out", "made.npz"), "neither a D4RL file"),
    ],
)
def test_what_cannot_be_is_refused_before_the_work(run, home, tmp_path, monkeypatch, words, complaint):
    monkeypatch.chdir(home)
    out = () if "--out" in words else ("--out", tmp_path / "made.hdf5")
    status, _, err = run("data", "generate", "model", *out, *words)
    assert status == 1 and complaint in err
    assert not list(tmp_path.iterdir())


def test_a_run_that_generates_nothing_is_refused(run, home, tmp_path):
    status, _, err = run("data", "generate", home / "policy", "--out", tmp_path / "made.hdf5")
    assert status == 1 and "a run of iql, which generates nothing" in err


def test_a_learner_is_augmented_by_flags(run, home, tmp_path):
    words = ("--dataset", home / "toy.hdf5", "--augment", home / "model", "--augment-every", 3, "--kappa", 1.0)
    words += ("--augment-trajectories", 8, "--sampler-steps", 3, "--no-normalize", "--iteration-steps", 3)
    words += ("--actor-hidden", 8, "--critic-hidden", 8, "--batch-size", 16, "--device", "cpu", "--quiet")
    status, _, err = run("train", "td3_bc", *words, "--steps", 6, "--root", tmp_path)
    assert status == 0, err
    (folder,) = find_runs([tmp_path])
    config = api.load(folder).config
    assert config.augmentation.augment == str(home / "model") and config.augmentation.augment_every == 3
    assert config.guiding == GuidanceConfig(kappa=1.0, normalize=False) and config.sampling.sampler_steps == 3
    lines = [row for row in read_lines(folder / "metrics.jsonl") if "train/critic_loss" in row]
    assert all(24 <= row["augment/rows"] <= 32 for row in lines) and len(lines) == 2
    assert torch.isfinite(torch.tensor([row["train/critic_loss"] for row in lines])).all()
