"""The policy as an ONNX file: it acts as the agent does, and says what it is."""

import gymnasium as gym
import numpy as np
import pytest
import torch
from helpers import off_policy, offline
from helpers.agents import NOISY, assert_same_tensors, quiet, tiny
from helpers.envs import env_id
from helpers.onnx import GORL, UNEVEN, VECTOR, Box, Still, about, assert_acts_as, infer, linear_agent, make, rows, shake

from ctrlrl import api
from ctrlrl.engine import onnx_export
from ctrlrl.engine.onnx_export import typical_inputs
from ctrlrl.engine.spaces import space_to_json

# -- what it computes -------------------------------------------------------------------------------


def mean_by_hand(agent, obs):
    moments = agent.policy.preprocess.normalizer.moments
    scaled = (obs - moments.mean.numpy()) / np.sqrt(moments.var.numpy() + 1e-8)
    return np.clip(scaled, -10.0, 10.0) @ np.array([[0.5], [-1.0], [0.25]]) + 0.125


def state_of(agent):
    """All that an export could disturb."""
    random = agent.observation_space.np_random.bit_generator.state, torch.get_rng_state().tolist()
    return {k: v.clone() for k, v in agent.tensors().items()}, random


def assert_same_state(a, b):
    assert_same_tensors(a[0], b[0])
    assert a[1] == b[1]


@pytest.fixture(scope="module")
def linear(tmp_path_factory):
    """The agent above, left as it was, and its file."""
    agent = linear_agent()
    before = state_of(agent)
    path = agent.export(tmp_path_factory.mktemp("linear") / "policy.onnx")
    assert_same_state(state_of(agent), before)
    return agent, path


def test_normaliser_and_bounds_are_inside(linear):
    agent, path = linear
    obs = rows(300, 3) * 5.0 + 100.0
    obs[0] = [1e6, 100.0, 100.0]  # far beyond what the normaliser lets through
    expected = np.clip(mean_by_hand(agent, obs.astype(np.float64)), -1.0, 1.0)
    assert (np.abs(expected) < 1.0).sum() > 100 and (np.abs(expected) == 1.0).sum() > 20
    np.testing.assert_allclose(infer(path, obs=obs), expected, atol=1e-5)
    np.testing.assert_allclose(infer(path, obs=obs[:1]), expected[:1], atol=1e-5)


def test_the_noise_that_selects_an_action_can_be_an_input(tmp_path):
    agent = linear_agent()
    path = agent.export(tmp_path / "policy.onnx", deterministic=False)
    obs, noise = rows(300, 3) * 5.0 + 100.0, rows(300, 1, seed=2)
    expected = np.clip(mean_by_hand(agent, obs.astype(np.float64)) + 0.5 * noise, -1.0, 1.0)
    np.testing.assert_allclose(infer(path, obs=obs, noise=noise), expected, atol=1e-5)
    assert about(path)["noise"] == "normal" and about(path)["deterministic"] is False
    assert set(about(path)["test"]["inputs"]) == {"obs", "noise"}


def test_discrete_actions_have_the_environments_numbers(tmp_path):
    agent = api.make("ppo", env_id("Choice"), **tiny("ppo", actor_hidden=()))
    with torch.no_grad():  # logits -x, 0, x, and a handicap of 1 for the one in the middle
        agent.policy.head.linear.weight.copy_(torch.tensor([[-1.0], [0.0], [1.0]]))
        agent.policy.head.linear.bias.copy_(torch.tensor([0.0, 1.0, 0.0]))
    path = agent.export(tmp_path / "policy.onnx")
    found = infer(path, obs=np.float32([[-3.0], [-0.9], [0.9], [3.0]]))
    assert found.dtype == np.int64 and found.tolist() == [5, 6, 6, 7]


def test_an_off_policy_actor(tmp_path):
    agent = off_policy.make("sac", Still(VECTOR, UNEVEN))
    shake(agent.policy)
    assert_acts_as(agent, agent.export(tmp_path / "policy.onnx"), obs=rows(300, 3))


def gorl(decoder):
    """After a whole stage and the fit of its decoder, made to matter more than such a short fit can."""
    agent = api.make("gorl", NOISY, decoder=decoder, **GORL)
    quiet(agent, 320)
    assert agent.policy.decoding
    shake(agent.policy)
    return agent


def test_a_latent_policy_its_sampler_and_its_decoder_are_one_graph(tmp_path):
    agent = gorl("flow")
    path = agent.export(tmp_path / "policy.onnx")
    obs = rows(300, 3)
    assert_acts_as(agent, path, obs=obs)
    agent.policy.decoding = False
    assert np.abs(infer(path, obs=obs) - agent.predict(obs, deterministic=True)[0]).max() > 0.1


def test_dictionary_observations_have_an_input_for_each_entry(tmp_path):
    agent = api.make("ppo", env_id("DictObs"), **tiny("ppo"))
    shake(agent.policy)
    path = agent.export(tmp_path / "policy.onnx")
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (64, 2, 2, 1), dtype=np.uint8)
    parts = {"obs/image": image, "obs/mode": rng.integers(0, 50, 64), "obs/vector": rows(64, 1)}
    assert_acts_as(agent, path, **parts)
    assert onnx_export.signature(path) == (
        {"obs/image": "uint8 [batch, 2, 2, 1]", "obs/mode": "int64 [batch]", "obs/vector": "float [batch, 1]"},
        {"action": "float [batch, 1]"},
    )


EVERYTHING = gym.spaces.Dict(
    {
        "image": Box(0, 255, (3, 40, 40), np.uint8),
        "double": Box(-1.0, 1.0, (2, 2), np.float64),
        "bits": gym.spaces.MultiBinary(3),
        "levels": gym.spaces.MultiDiscrete([2, 4], start=[1, -1]),
        "counts": Box(-5, 5, (2,), np.int32),
    }
)


@pytest.mark.slow
def test_every_kind_of_observation_and_actions_of_any_shape(tmp_path):
    agent = make(observation=EVERYTHING, action=Box(-1.0, 1.0, (2, 2), np.float64))
    path = agent.export(tmp_path / "policy.onnx")
    EVERYTHING.seed(0)
    samples = [EVERYTHING.sample() for _ in range(64)]
    parts = {f"obs/{k}": np.stack([s[k] for s in samples]) for k in EVERYTHING}
    parts["obs/double"] = parts["obs/double"].astype(np.float32)
    assert_acts_as(agent, path, **parts)


@pytest.mark.slow
def test_several_choices_at_once_also_with_noise(tmp_path):
    space = gym.spaces.MultiDiscrete([2, 3, 1], start=[0, 7, 4])
    agent = make(action=space)
    assert_acts_as(agent, agent.export(tmp_path / "policy.onnx"), obs=rows(300, 3))
    path = agent.export(tmp_path / "noisy.onnx", deterministic=False)
    assert about(path)["noise"] == "gumbel"
    chosen = infer(
        path, obs=rows(1, 3).repeat(4000, 0), noise=agent.policy.noise(1, 4000, torch.Generator())[0].numpy()
    )
    logits = agent.policy.distribution(torch.from_numpy(rows(1, 3))).params()["logits"][0]
    for k, (part, start) in enumerate(zip(logits.split([2, 3, 1]), space.start, strict=True)):
        frequency = np.bincount(chosen[:, k] - start, minlength=len(part)) / 4000
        np.testing.assert_allclose(frequency, part.exp().detach().numpy(), atol=0.04)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["td3", "iql", "td3_bc"])
def test_more_actors_in_bounds_of_every_kind(method, tmp_path):
    if method == "td3":
        agent = off_policy.make("td3", Still(VECTOR, UNEVEN))
    else:
        agent = api.make(method, dataset=offline.recorded(), **offline.tiny(method, normalize_obs=True))
    shake(agent.policy)
    assert_acts_as(agent, agent.export(tmp_path / "policy.onnx"), obs=rows(300, 3))


@pytest.mark.slow
@pytest.mark.parametrize("method", ["awm", "dppo"])
def test_flow_policies_follow_the_ode(method, tmp_path):
    agent = make(method, denoising_steps=4, **({"horizon": 6} if method == "awm" else {}))
    assert_acts_as(agent, agent.export(tmp_path / "policy.onnx"), obs=rows(300, 3))
    path = agent.export(tmp_path / "noisy.onnx", deterministic=False)
    obs, noise = rows(300, 3), rows(300, 5, 2, seed=2)
    with torch.no_grad():
        given = torch.from_numpy(obs), torch.from_numpy(noise)
        expected = agent.policy.to_env(given[0], agent.policy.act(*given)).numpy()
    np.testing.assert_allclose(infer(path, obs=obs, noise=noise), expected, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("decoder", ["diffusion", "gaussian"])
def test_other_decoders_with_the_latent_noise_as_an_input(decoder, tmp_path):
    agent = gorl(decoder)
    assert_acts_as(agent, agent.export(tmp_path / "policy.onnx"), obs=rows(300, 3))
    path = agent.export(tmp_path / "noisy.onnx", deterministic=False)
    obs, noise = rows(300, 3), rows(300, 1, seed=2)
    with torch.no_grad():
        expected = agent.policy.sampler()(torch.from_numpy(obs), torch.from_numpy(noise))[1].numpy()
    np.testing.assert_allclose(infer(path, obs=obs, noise=noise), expected, atol=1e-5)


# -- what it says -----------------------------------------------------------------------------------


def test_the_file_says_what_it_is(linear):
    agent, path = linear
    found = about(path)
    assert found["format"] == 1 and found["method"] == "ppo" and found["steps"] == agent.steps
    assert found["env"] == {"id": NOISY, "kwargs": {}, "wrappers": []}
    assert found["observation_space"] == space_to_json(agent.observation_space)
    assert found["action_space"] == space_to_json(agent.action_space)
    assert found["action_low"] == [-1.0] and found["action_high"] == [1.0]
    assert found["deterministic"] is True and found["noise"] is None
    assert {"ctrlrl", "torch", "onnx", "onnxruntime"} <= {k for k, v in found["versions"].items() if v}
    assert onnx_export.signature(path) == ({"obs": "float [batch, 3]"}, {"action": "float [batch, 1]"})


def test_the_files_own_examples_are_what_it_answers(linear):
    agent, path = linear
    test = about(path)["test"]
    obs = np.float32(test["inputs"]["obs"])
    assert obs.shape == (4, 3) and np.abs(obs - 100.0).max() < 30.0
    np.testing.assert_allclose(infer(path, obs=obs), np.float32(test["action"]), atol=1e-5)
    np.testing.assert_allclose(agent.predict(obs, deterministic=True)[0], test["action"], atol=1e-5)


def test_the_file_is_alone_and_names_no_folder_of_this_machine(linear):
    _, path = linear
    assert [p.name for p in path.parent.iterdir()] == ["policy.onnx"]
    for folder in (b"ctrlrl/nets", b"ctrlrl/engine", b"site-packages"):
        assert folder not in path.read_bytes()


# -- what it is compared on -------------------------------------------------------------------------


def typical(agent, count=500, deterministic=True):
    graph = onnx_export.Graph(agent.policy, agent.observation_space, deterministic)
    return typical_inputs(graph, agent.observation_space, count)


def test_it_is_compared_on_observations_of_the_size_that_it_has_seen():
    obs = typical(linear_agent())["obs"]
    assert obs.shape == (500, 3) and obs.dtype == torch.float32
    torch.testing.assert_close(obs.mean(0), torch.full((3,), 100.0), atol=1.0, rtol=0)
    torch.testing.assert_close(obs.std(0), torch.full((3,), 5.0), atol=0.7, rtol=0)


def test_the_parts_of_a_dictionary_have_their_own_size():
    space = gym.spaces.Dict({"a": Box(-3, 3, (1,), np.int32), "b": VECTOR, "c": VECTOR})
    agent = make(observation=space, normalize_obs=True)
    floats = torch.cat([torch.zeros(400, 1), torch.randn(400, 3) + 100, 0.01 * torch.randn(400, 3) - 7], 1)
    agent.policy.preprocess.normalizer.update(floats)
    parts = typical(agent)
    assert parts["obs/a"].dtype == torch.int32 and parts["obs/a"].unique().tolist() == [-3, -2, -1, 0, 1, 2, 3]
    assert abs(parts["obs/b"].mean() - 100.0) < 0.5 and abs(parts["obs/b"].std() - 1.0) < 0.1
    assert abs(parts["obs/c"].mean() + 7.0) < 0.1 and abs(parts["obs/c"].std() - 0.01) < 0.002


def test_without_statistics_it_is_of_size_one_and_within_bounds():
    wide = Box(np.float32([-3e38, -0.5, 0.0]), np.float32([3e38, 0.5, np.inf]))
    obs = typical(make(observation=wide))["obs"]
    assert 0.9 < obs[:, 0].std() < 1.1
    assert obs[:, 1].abs().max() == 0.5 and obs[:, 2].min() == 0.0
