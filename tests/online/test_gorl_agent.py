"""GoRL: stops in any phase, saved agents, settings that cannot be, the command line."""

import dataclasses

import numpy as np
import pytest
from helpers.agents import NOISY, assert_same_tensors, quiet
from test_gorl import SMALL, Stages, make

from ctrlrl import api
from ctrlrl.engine import checkpoint
from ctrlrl.engine.config import ConfigError
from ctrlrl.losses import base as losses
from ctrlrl.online.gorl import PRESETS, StagesConfig
from ctrlrl.online.gorl_agent import GoRL
from ctrlrl.run import cli

# -- stopping and going on ------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings",
    [
        {},
        pytest.param(
            {"collect_with": "best", "eval_every": 40, "eval_episodes": 1, "later_eps": 0.3}, marks=pytest.mark.slow
        ),
    ],
)
def test_a_run_stopped_in_any_phase_goes_on_as_if_it_had_not_been(tmp_path, settings):
    common = {"checkpoint_every": 1, "refine_epochs": 12, "refine_patience": 50, "refine_steps": 320, "n_steps": 8}
    whole = make(**common | settings)
    seen = Stages()
    quiet(whole, 1300, callbacks=[seen])
    borders = range(10, len(seen.rows), 10)
    phases = {seen.rows[b][:2] for b in borders}
    assert {p for _, p in phases} == {0.0, 1.0, 2.0}  # a checkpoint falls into each
    for border in borders:

        class Stop:
            def on_checkpoint(self, agent, steps, path, border=border):
                return agent.iteration < border

        run = tmp_path / f"{border}"
        quiet(make(**common | settings), 1300, run_dir=run, root=None, callbacks=[Stop()])
        again = api.load(run)
        again.resume(run, progress=False, tensorboard=False)
        assert_same_tensors(again.tensors(), whole.tensors())
        assert (again.stage, again.phase, again.steps) == (whole.stage, whole.phase, whole.steps)


def test_a_saved_policy_acts_as_before_in_every_stage(tmp_path):
    agent = make()
    quiet(agent, 500)
    assert agent.policy.decoding
    obs = np.stack([agent.observation_space.sample() for _ in range(5)])
    agent.save(tmp_path / "saved")
    loaded = api.load(tmp_path / "saved")
    np.testing.assert_array_equal(loaded.predict(obs, deterministic=True)[0], agent.predict(obs, deterministic=True)[0])


# -- settings -------------------------------------------------------------------------------------


@pytest.mark.parametrize("preset", sorted(PRESETS))
def test_presets_build_and_say_what_they_change(preset):
    agent = api.make("gorl", NOISY, preset=preset, device="cpu", n_envs=2)
    found = dataclasses.asdict(agent.config)
    flat = {**found, **{k: v for group in found.values() if isinstance(group, dict) for k, v in group.items()}}
    flat |= dataclasses.asdict(agent.loss)
    for name, value in PRESETS[preset].items():
        assert flat[name] == value, name


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"stages": (0.5, 0.6)}, "must make 1"),
        ({"stages": ()}, "one or more"),
        ({"latent": "mdpo", "later_eps": 0.3}, "has no eps"),
        ({"latent": "flow_grpo"}, "Gaussian latents"),
        ({"collect_with": "best", "reset_latent": False}, "goes back"),
        ({"preset": "papers"}, "known: paper, released"),
        ({"refine_held_out": 1.0}, "refine_held_out"),
        ({"later_max_grad_norm": -1.0}, "second stage on"),
        ({"refine_latents": "used", "decoder": "gaussian"}, "draws none"),
    ],
)
def test_settings_that_contradict_are_refused_with_the_reason(settings, words):
    with pytest.raises(ConfigError, match=words):
        make(**settings)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"refine_steps": 90}, "over before its first update"),
        ({"collect_with": "best", "eval_every": None}, "needs evaluations"),
    ],
)
def test_a_run_that_could_not_work_is_refused_before_it_begins_and_leaves_nothing(settings, words):
    agent = make(**settings)
    with pytest.raises(ConfigError, match=words):
        quiet(agent, 300)
    assert agent.ends == [] and agent.steps == 0


def test_a_frozen_decoder_is_taken_over_with_its_shape_or_refused(tmp_path):
    run = tmp_path / "run"
    first = make(decoder="diffusion", decoder_steps=3)
    quiet(first, 500, run_dir=run, root=None)
    small = {k: v for k, v in SMALL.items() if not k.startswith("decoder_")} | {"stages": (1.0,)}
    agent = api.make("gorl", NOISY, decoder_from=str(run), decoder_checkpoint="stage_1", **small)
    assert (agent.config.decoding.decoder, agent.config.decoding.decoder_steps) == ("diffusion", 3)
    tensors, _ = checkpoint.read(run / "checkpoints" / "stage_1.safetensors")
    before = {k: v.clone() for k, v in agent.policy.decoder.state_dict().items()}
    assert_same_tensors(before, {k: tensors[f"policy/decoder.{k}"] for k in before})
    quiet(agent, 100, run_dir=tmp_path / "second", root=None)
    assert_same_tensors(dict(agent.policy.decoder.state_dict()), before)
    assert agent.policy.decoding and api.load(tmp_path / "second").policy.decoding
    with pytest.raises(ConfigError, match=r"decoder='flow' \(it has 'diffusion'\)"):
        api.make("gorl", NOISY, decoder_from=str(run), decoder="flow", **small)


def test_the_command_line_takes_defaults_from_the_loss_the_decoders_run_and_the_actions(tmp_path):
    first = make(decoder="diffusion", decoder_steps=3)
    quiet(first, 500, run_dir=tmp_path / "run", root=None)

    def settings(*words):
        return cli._parse_training(GoRL, ["--env", NOISY, *words], cli.Train)[1]

    assert settings("--latent", "bpo")["max_grad_norm"] == losses.get("bpo").loop_defaults["max_grad_norm"]
    taken = settings("--decoder-from", str(tmp_path / "run"))
    assert (taken["decoder"], taken["decoder_steps"]) == ("diffusion", 3)
    assert cli._parse_training(GoRL, ["--env", "ctrlrl/OneStateBump-v0"], cli.Train)[1]["action_map"] == "clip"
    assert cli._parse_training(GoRL, ["--env", "Pendulum-v1"], cli.Train)[1]["action_map"] == "tanh"


def test_an_unknown_loss_is_named():
    with pytest.raises(KeyError, match="ppoo"):
        make(latent="ppoo")


def test_discrete_actions_are_refused():
    with pytest.raises((TypeError, ConfigError)):
        make(env="CartPole-v1")


def test_shares_of_the_default_are_the_papers():
    assert StagesConfig().ends(0, 180) == [60, 120, 150, 180]
