"""Generated rows from the run of a model: which runs do, how it is found, and what is refused."""

import gymnasium as gym
import numpy as np
import pytest
import torch
from helpers.agents import NOISY, Recorder, quiet
from helpers.offline import names, recorded, tiny, watch
from test_augment import LEARNERS, keep

from ctrlrl import api
from ctrlrl.engine import algorithm as algorithms
from ctrlrl.engine.augment import AugmentConfig, PolicyGuidedDataset
from ctrlrl.engine.config import ConfigError, field_names
from ctrlrl.engine.guidance import GuidanceConfig
from ctrlrl.engine.offline import OfflineAgent
from ctrlrl.nets.edm import SamplerConfig
from ctrlrl.nets.trajectory_codec import Steps
from ctrlrl.offline.td3_bc import TD3BC


class Maker(OfflineAgent):
    """An agent that generates: two trajectories' steps, of which the last is no transition."""

    asked: list = []  # noqa: RUF012 - what every one of them was asked

    def generate(self, trajectories, policy=None, guidance=None, sampler=None, generator=None, batch_size=256):
        self.asked.append((trajectories, policy, guidance, sampler))
        n, t = trajectories, 5
        obs = torch.randn(n, t, self.observation_space.shape[0], generator=generator)
        action = torch.rand(n, t, self.action_space.shape[0], generator=generator) * 2 - 1
        known = torch.ones(n, t, dtype=torch.bool)
        known[:, -1] = False
        steps = Steps(obs, action, torch.arange(n * t).reshape(n, t).float(), torch.zeros(n, t), obs.roll(-1, 1))
        return steps, known


class Model(TD3BC):
    """A method whose agent generates."""

    @classmethod
    def agent_class(cls):
        return Maker


def model(folder, **kwargs):
    """A run folder of one."""
    api.make(f"{__name__}:Model", dataset=recorded(**kwargs), **tiny("td3_bc")).save(folder)
    Maker.asked.clear()
    return str(folder)


def test_a_run_generates_first_unguided_and_then_for_the_policy(tmp_path):
    run = model(tmp_path / "model")
    settings = {"augment": run, "augment_every": 3, "augment_trajectories": 6, "kappa": 0.5, "sampler_steps": 4}
    agent, log = api.make("td3_bc", dataset=recorded(), **tiny("td3_bc") | settings), Recorder()
    seen = watch(agent)
    quiet(agent, 6, callbacks=[log])
    (n, none, guidance, sampler), (_, policy, *_) = Maker.asked
    assert (n, none, guidance, sampler) == (6, None, GuidanceConfig(kappa=0.5), SamplerConfig(sampler_steps=4))
    assert policy is agent.policy and len(Maker.asked) == 2
    lines = [metrics for _, metrics in log.of("update")]
    assert [line["augment/rows"] for line in lines] == [24.0, 24.0]  # four of five steps
    assert all(line["augment/log_prob"] < 0.0 for line in lines)
    drawn = torch.cat([batch.reward_t for batch in seen])
    whole = drawn[drawn == drawn.round()]
    assert len(whole) and not (whole % 5 == 4).any()


def test_without_kappa_no_set_is_guided(tmp_path):
    agent = api.make("iql", dataset=recorded(), augment=model(tmp_path / "model"), augment_every=3, **tiny("iql"))
    quiet(agent, 6)
    assert [policy for _, policy, *_ in Maker.asked] == [None, None]


def test_log_prob_is_that_of_the_generated_actions_under_the_policy(tmp_path):
    """The policy's action is 0 everywhere: the mean of ln N(a; 0, 0.5^2) over the transitions."""
    agent = api.make("td3_bc", dataset=recorded(), **tiny("td3_bc"))
    with torch.no_grad():
        for parameter in agent.policy.parameters():
            parameter.zero_()
    found = api.load(model(tmp_path / "model"))
    guidance = GuidanceConfig(kappa=1.0, kernel_std=0.5)
    source = PolicyGuidedDataset(found, 3, guidance, SamplerConfig())
    steps = source.rows(agent.policy, True, torch.Generator().manual_seed(0))
    z = steps.action / 0.5
    expected = (-0.5 * z**2 - 0.5 * np.log(2 * np.pi) - np.log(0.5)).sum(1).mean()
    assert source.statistics["log_prob"] == pytest.approx(float(expected), rel=1e-5)


def test_a_run_is_found_from_another_folder_and_only_when_training(tmp_path, monkeypatch):
    model(tmp_path / "model")
    monkeypatch.chdir(tmp_path)
    agent = api.make("td3_bc", dataset=recorded(), augment="model", **tiny("td3_bc"))
    assert agent.config.augmentation.augment == str(tmp_path / "model")
    agent.save(tmp_path / "learner")
    monkeypatch.chdir("/")
    (tmp_path / "model").rename(tmp_path / "gone")
    agent = api.load(tmp_path / "learner")
    assert agent.predict(np.zeros(3, np.float32))[0].shape == (1,)


def wide(shape):
    return gym.spaces.Box(-np.inf, np.inf, shape, np.float32)


@pytest.mark.parametrize(
    ("spaces", "words"),
    [
        ({"observation": wide((4,))}, r"generates observations of .*\(4,\)"),
        ({"action": gym.spaces.Box(-2.0, 2.0, (1,), np.float32)}, "generates actions of .*another one"),
        ({"action": gym.spaces.Box(-1.0, 1.0, (2,), np.float32)}, "generates actions of "),
    ],
)
def test_a_model_of_other_spaces_is_refused_before_anything_is_written(spaces, words, tmp_path):
    run = model(tmp_path / "model", env=None, **spaces)
    agent = api.make("td3_bc", dataset=recorded(), augment=run, **tiny("td3_bc"))
    with pytest.raises(ConfigError, match=words):
        keep(agent, 3, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_run_that_generates_nothing_is_refused(tmp_path):
    for name, made in (("iql", {"dataset": recorded()}), ("ppo", {"env": NOISY})):
        api.make(name, **made, device="cpu", threads=1).save(tmp_path / name)
        agent = api.make("td3_bc", dataset=recorded(), augment=str(tmp_path / name), **tiny("td3_bc"))
        with pytest.raises(ConfigError, match=f"a run of {name}, which generates nothing"):
            quiet(agent, 3)


def test_learners_of_pieces_of_episodes_are_refused(tmp_path):
    run = model(tmp_path / "model")
    with pytest.raises(ConfigError, match=r"pieces of episodes|no setting 'augment'"):
        quiet(api.make("decision_transformer", dataset=recorded(), augment=run, **tiny("decision_transformer")), 3)


def test_learners_offer_it_and_models_do_not():
    offer = {n for n in names() if "augmentation" in field_names(algorithms.get(n).agent_class().loop)}
    assert set(LEARNERS) <= offer and not offer & {"policy_guided_diffusion", "mopo"}


# -- settings -------------------------------------------------------------------------------------


def test_defaults_are_the_released_mixture():
    config = AugmentConfig()
    assert round(config.augment_share * 256) == 240 and config.augment_every == 10_000


def test_a_learner_of_the_best_episodes_is_not_given_rows_of_all(tmp_path):
    agent = api.make("bc", dataset=recorded(), augment=model(tmp_path / "model"), preset="top10", **tiny("bc"))
    with pytest.raises(ConfigError, match="leave best_share or augment out"):
        quiet(agent, 3)


def test_wrong_settings_are_refused():
    for wrong in ({"augment_share": 1.1}, {"augment_every": 0}, {"augment_trajectories": 0}, {"augment_share": -0.1}):
        with pytest.raises(ConfigError, match=next(iter(wrong))):
            api.make("td3_bc", dataset=recorded(), **tiny("td3_bc") | wrong)
    for alone in ({"kappa": 1.0}, {"sampler_steps": 8}, {"augment_every": 5}):
        with pytest.raises(ConfigError, match="--augment"):
            api.make("td3_bc", dataset=recorded(), **tiny("td3_bc") | alone)
