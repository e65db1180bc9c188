"""GoRL on SAC: stops in any phase, saved agents, spaces, settings, the command line."""

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium.vector import AutoresetMode, SyncVectorEnv
from helpers.agents import assert_same_tensors, quiet
from helpers.envs import OnlyTruncates, env_id
from helpers.off_policy import STOPPING, Stopping
from test_gorl_sac import DICT, ECHO, LOPSIDED, STEPS, Stages, Watch, actor, make, rows_of

import ctrlrl
from ctrlrl import api
from ctrlrl.data.dataset import DatasetError
from ctrlrl.engine import algorithm as algorithms
from ctrlrl.engine import checkpoint, hooks
from ctrlrl.engine.config import ConfigError
from ctrlrl.engine.policy_density import AgentPolicy, NoDensityError
from ctrlrl.engine.replay_data import from_run
from ctrlrl.nets.decoders import DecoderConfig
from ctrlrl.online.gorl_sac import GoRLSAC
from ctrlrl.run import cli

# -- stopping and going on ------------------------------------------------------------------------


def test_a_run_stopped_in_any_phase_goes_on_as_if_it_had_not_been(tmp_path):
    # ten iterations between two checkpoints, and about as many in every phase
    settings = {
        "checkpoint_every": 1, "refine_epochs": 12, "refine_patience": 50, "refine_steps": 80, "replay_ratio": 0.15,
        "stages": (0.3, 0.35, 0.35), "eval_every": 100, "eval_episodes": 1, "seed": 3,
    }  # fmt: skip
    seen, whole = Stages(), make(**settings)
    quiet(whole, 480, run_dir=tmp_path / "whole", callbacks=[seen])
    borders = {seen.rows[b][:2]: b for b in range(10, len(seen.rows), 10)}
    assert set(borders) == {(0, 0), (0, 1), (0, 2), (1, 0), (1, 1), (1, 2), (2, 0)}  # a checkpoint falls into each
    for border in (borders[kind] for kind in ((0, 1), (1, 2), (2, 0))):

        class Stop:
            def on_checkpoint(self, agent, steps, path, border=border):
                return agent.iteration < border

        run = tmp_path / f"{border}"
        quiet(make(**settings), 480, run_dir=run, callbacks=[Stop()])
        again = api.load(run)
        again.resume(run, progress=False, tensorboard=False)
        assert_same_tensors(again.tensors(), whole.tensors())
        assert again.counters() | {"replay": 0} == whole.counters() | {"replay": 0}
        assert_same_tensors(rows_of(again), rows_of(whole))
        for name in ("stage_1", "stage_2"):
            files = [folder / "checkpoints" / f"{name}.safetensors" for folder in (run, tmp_path / "whole")]
            assert_same_tensors(*(checkpoint.read(f)[0] for f in files))


def test_ctrl_c_while_collecting_saves_and_resuming_goes_on_from_the_border(tmp_path):
    def train(folder, at):
        Stopping.steps, Stopping.at = 0, at
        agent = make(STOPPING, seed=5, n_envs=1, checkpoint_every=1)
        return quiet(agent, STEPS, run_dir=folder)

    whole = train(tmp_path / "whole", None)
    with pytest.raises(hooks.Interrupted):
        train(tmp_path / "run", 125)
    stopped, last = api.load(tmp_path / "run", "interrupted"), api.load(tmp_path / "run")
    assert stopped.phase == "collect" and stopped.steps == 128 and last.steps == 80
    Stopping.at = None
    resumed = last.resume(tmp_path / "run", progress=False, tensorboard=False)
    assert_same_tensors(resumed.tensors(), whole.tensors())
    assert_same_tensors(rows_of(resumed), rows_of(whole))


def test_a_saved_agent_acts_as_before_and_learns_on_like_it(tmp_path):
    agent = make()
    quiet(agent, STEPS)
    assert agent.policy.decoding
    obs = np.random.default_rng(0).normal(size=(50, 3)).astype(np.float32)
    agent.save(tmp_path / "saved")
    loaded = api.load(tmp_path / "saved")
    assert type(loaded) is type(agent) and (loaded.config, loaded.own) == (agent.config, agent.own)
    for deterministic in (True, False, False):
        actions = [a.predict(obs, deterministic=deterministic)[0] for a in (agent, loaded)]
        np.testing.assert_array_equal(*actions)
    assert np.array_equal(*(a.evaluate(3).returns for a in (agent, loaded)))
    for each in (agent, loaded):
        quiet(each, 16)
    assert_same_tensors(agent.tensors(), loaded.tensors())


def test_the_deterministic_action_decodes_the_most_probable_latent():
    agent = make(ECHO)
    quiet(agent, STEPS)
    obs = torch.randn(5, 3)
    with torch.no_grad():
        mean = agent.policy(obs).mean
        expected = agent.policy.decoder(obs, mean).tanh().numpy()
    middle, half = ((LOPSIDED.high + s * LOPSIDED.low) / 2 for s in (1, -1))
    found = agent.predict(obs.numpy(), deterministic=True)[0]
    np.testing.assert_allclose(found, middle + half * expected, atol=1e-5)


# -- spaces and devices ---------------------------------------------------------------------------


def test_trains_on_dict_observations(tmp_path):
    agent = make(DICT)
    quiet(agent, STEPS, run_dir=tmp_path / "run")
    assert agent.stage == 2 and agent.policy.decoder.feature_size == 7
    loaded = api.load(tmp_path / "run")
    obs = {"vector": np.ones((2, 3), np.float32), "mode": np.array([2, 5])}
    np.testing.assert_array_equal(*(a.predict(obs, deterministic=True)[0] for a in (agent, loaded)))


def test_steps_of_a_live_environment_that_only_reset_are_neither_collected_nor_counted():
    env = SyncVectorEnv([OnlyTruncates] * 3, autoreset_mode=AutoresetMode.NEXT_STEP)
    agent, sizes = make(env, refine_steps=40), []

    def note(agent, metrics):
        if agent.phase == "fit":
            sizes.append((agent.stage, len(agent.refinement.pairs["action"]), agent.steps))
            # the last digit is the step, and nobody acts after the third one
            assert (agent.refinement.pairs["features"] % 10 < 3).all()
        elif agent.phase == "collect" and metrics["stage/phase"] == 0.0:
            sizes.append((agent.stage, 0, agent.steps))

    quiet(agent, 320, callbacks=[Watch(note)])
    assert agent.stage == 2
    for stage in (0, 1):
        (_, _, before), (_, collected, after), *_ = [s for s in sizes if s[0] == stage]
        assert 40 <= collected == after - before < 43


def test_trains_on_the_gpu():
    if not torch.cuda.is_available():
        pytest.skip("no GPU here")
    agent = quiet(make(device="cuda"), STEPS)
    assert agent.stage == 2 and agent.learner.state["critic"].is_cuda and agent.replay.columns["obs"].is_cuda
    assert agent.predict(np.zeros(3, np.float32))[0].shape == (1,)


@pytest.mark.slow
def test_compiled_updates_equal_eager_ones_across_a_reset():
    agents = [quiet(make(compile=c, learning_rate=1e-3, replay_ratio=0.1), STEPS) for c in (False, True)]
    for key, value in agents[0].learner.tensors().items():
        torch.testing.assert_close(agents[1].learner.tensors()[key], value, rtol=1e-4, atol=1e-5, msg=key)


# -- settings -------------------------------------------------------------------------------------


def test_it_has_one_name_everywhere_and_its_update_is_that_of_sac():
    method = api.methods()["gorl_sac"]
    assert ctrlrl.GoRLSAC is method.agent is api.get_method("gorl_sac") and method.family == "off-policy"
    assert method.paper in (method.agent.__doc__ or "") and method.presets == ("paper",)
    assert GoRLSAC.update is algorithms.get("sac").update


def test_the_loop_begins_with_the_papers_settings():
    config, own = api.get_method("gorl_sac").blueprint()
    assert own.stages == (0.5, 0.25, 0.25) and config.decoding == DecoderConfig()
    assert (config.batch_size, config.gamma, config.tau, config.learning_rate) == (256, 0.99, 0.005, 3e-4)
    assert config.network.n_critics == 2 and config.replay_ratio == 1.0
    config, _ = api.get_method("gorl_sac").blueprint("paper")
    assert (config.replay_ratio, config.refinement.refine_batch_size) == (20.0, 8192)


@pytest.mark.parametrize(
    "settings, words",
    [
        ({"stages": (0.5, 0.6)}, "must make 1"),
        ({"start_from": "runs/some"}, "train sac from it"),
        ({"refine_held_out": 1.0}, "refine_held_out"),
        ({"decoder_stepss": 3}, "decoder_steps"),
        ({"preset": "papers"}, "paper"),
    ],
)
def test_settings_that_cannot_be_are_refused_with_the_reason(settings, words):
    with pytest.raises(ConfigError, match=words):
        make(**settings)


def test_images_and_choices_and_boundless_actions_are_refused():
    for env, error in (("Image", TypeError), ("Choice", TypeError)):
        with pytest.raises(error, match=r"image|Box"):
            make(env_id(env))
    with pytest.raises(ValueError, match="finite"):
        actor(gym.spaces.Box(-np.inf, np.inf, (1,)))


def test_densities_of_decoded_actions_are_not_made_up():
    agent = make(stages=(1.0,))
    with pytest.raises(NoDensityError, match="gorl_sac"):
        AgentPolicy(agent).log_prob(torch.zeros(2, 3), torch.zeros(2, 1))


def test_a_replay_of_latents_is_not_taken_for_one_of_actions(tmp_path):
    agent = quiet(make(), STEPS, run_dir=tmp_path / "run")
    assert agent.policy.decoding
    with pytest.raises(DatasetError, match="latents"):
        from_run(tmp_path / "run")


def test_it_trains_from_the_command_line(tmp_path):
    words = [
        "train", "gorl_sac", "--env", "Pendulum-v1", "--steps", "90", "--learning-starts", "8", "--iteration-steps",
        "10", "--batch-size", "8", "--actor-hidden", "8", "--critic-hidden", "8", "--decoder", "diffusion",
        "--decoder-hidden", "8", "--refine-epochs", "2", "--stages", "0.5", "0.5", "--root", str(tmp_path), "--quiet",
        "--device", "cpu", "--threads", "1", "--eval-every", "1000", "--eval-episodes", "1",
    ]  # fmt: skip
    assert cli.main(words) == 0
    (run,) = tmp_path.glob("*/*/*")
    agent = api.load(run)
    assert (agent.stage, agent.own.stages, agent.config.decoding.decoder) == (1, (0.5, 0.5), "diffusion")
    assert agent.learner.updates > 0 and agent.policy.decoding
