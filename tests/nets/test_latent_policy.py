"""The latent policy: decoding in its place and nowhere else."""

import gymnasium as gym
import numpy as np
import pytest
import torch

from ctrlrl import api
from ctrlrl.engine.policy_density import AgentPolicy, NoDensityError
from ctrlrl.engine.roll_out import roll_out
from ctrlrl.nets.actor_critic import NetworkConfig
from ctrlrl.nets.decoders import DecoderConfig
from ctrlrl.nets.latent_policy import LatentPolicy
from ctrlrl.types import EnvSpec

OBS = {
    "box": gym.spaces.Box(-1.0, 1.0, (3,), np.float32),
    "dict": gym.spaces.Dict({"a": gym.spaces.Box(-1.0, 1.0, (2,), np.float32), "n": gym.spaces.Discrete(3)}),
}
ACTIONS = gym.spaces.Box(-0.4, 0.4, (2,), np.float32)


def build(space, action_map="tanh", fitted=True):
    torch.manual_seed(0)
    network = NetworkConfig(
        actor_hidden=(8,), critic_hidden=(8,), activation="silu", std="state", head_gain=1.0, action_map=action_map
    )
    policy = LatentPolicy(space, ACTIONS, network, decoding=DecoderConfig(decoder_hidden=(8,), decoder_steps=3))
    for parameter in policy.decoder.parameters():
        parameter.normal_(generator=torch.Generator().manual_seed(1))
    policy.decoding = fitted
    return policy


def observations(space, n=16):
    drawn = [space.sample() for _ in range(n)]
    if isinstance(space, gym.spaces.Dict):
        return {k: torch.as_tensor(np.stack([d[k] for d in drawn])) for k in space.spaces}
    return torch.from_numpy(np.stack(drawn))


@pytest.mark.parametrize("fitted", [True, False])
@pytest.mark.parametrize("action_map", ["tanh", "clip"])
@pytest.mark.parametrize("name", OBS)
def test_the_sampler_equals_act_and_to_env_bit_for_bit(name, action_map, fitted):
    policy, obs = build(OBS[name], action_map, fitted), observations(OBS[name])
    noise = policy.noise(1, 16, torch.Generator().manual_seed(2))[0]
    with torch.inference_mode():
        latent, sent = policy.sampler()(obs, noise)
        assert torch.equal(latent, policy.act(obs, noise))
        assert torch.equal(sent, policy.to_env(obs, latent))


def test_actions_are_the_decoded_latents_squashed_and_the_mode_is_decoded_too():
    policy, obs = build(OBS["box"]), observations(OBS["box"])
    latent = torch.randn(16, 2)
    with torch.inference_mode():
        decoded = policy.decoder(policy.decoder.features(obs), latent)
        assert torch.allclose(policy.to_env(obs, latent), 0.4 * torch.tanh(decoded), atol=1e-6)
        mean = policy.distribution(obs).params()["mean"]
        assert torch.allclose(policy.deterministic(obs), policy.to_env(obs, mean))
        assert not torch.allclose(policy.deterministic(obs), 0.4 * torch.tanh(mean), atol=1e-2)


def test_the_density_is_that_of_the_latent_whatever_the_decoder():
    policy, obs = build(OBS["box"]), observations(OBS["box"])
    latent = torch.randn(16, 2)
    before = policy(obs.unsqueeze(1), latent.unsqueeze(1)).logp
    for parameter in policy.decoder.parameters():
        parameter.zero_()
    assert torch.equal(policy(obs.unsqueeze(1), latent.unsqueeze(1)).logp, before)


def test_a_decoder_that_was_never_fitted_is_left_out():
    policy, obs = build(OBS["box"], fitted=False), observations(OBS["box"])
    latent = torch.randn(16, 2)
    assert torch.equal(policy.to_env(obs, latent), policy.head.to_env(latent))


def test_discrete_actions_and_images_are_refused():
    with pytest.raises(TypeError, match="Box of floats"):
        LatentPolicy(OBS["box"], gym.spaces.Discrete(3))
    with pytest.raises(TypeError, match="images"):
        LatentPolicy(gym.spaces.Box(0, 255, (36, 36, 3), np.uint8), ACTIONS)


def fitted_agent(env, **settings):
    """A GoRL agent whose decoder is not the identity."""
    small = {"actor_hidden": (8,), "critic_hidden": (8,), "decoder_hidden": (8,), "decoder_steps": 3}
    agent = api.make("gorl", env, seed=1, device="cpu", threads=1, eval_every=None, **small | settings)
    generator = torch.Generator().manual_seed(1)
    for parameter in agent.policy.decoder.parameters():
        parameter.copy_(0.4 * torch.randn(parameter.shape, generator=generator))
    agent.policy.decoding = True
    return agent


def test_the_density_of_decoded_actions_is_one_over_all_actions():
    agent = fitted_agent("Pendulum-v1", head_gain=1.0)
    policy = AgentPolicy(agent)
    action = torch.linspace(-1.9999, 1.9999, 8001).unsqueeze(1)
    obs = torch.tensor([0.3, -0.9, 1.5]).expand(8001, 3)
    density = policy.log_prob(obs, action).logp.exp()
    assert torch.trapezoid(density, action.squeeze(1).double()).item() == pytest.approx(1.0, abs=0.01)
    drawn = policy.act(obs, torch.Generator().manual_seed(0)).squeeze(1)
    mean = torch.trapezoid(density * action.squeeze(1), action.squeeze(1).double()).item()
    assert drawn.mean().item() == pytest.approx(mean, abs=4 * drawn.std().item() / 8001**0.5 + 0.01)
    identity = api.make("gorl", "Pendulum-v1", seed=1, device="cpu", eval_every=None, head_gain=1.0, actor_hidden=(8,))
    assert not torch.allclose(AgentPolicy(identity).log_prob(obs, action).logp.exp(), density, atol=0.05)


def test_recorded_log_probabilities_are_those_of_the_composed_policy():
    agent = fitted_agent("Pendulum-v1")
    data = roll_out(agent, EnvSpec("Pendulum-v1"), 60, seed=4)
    found = AgentPolicy(agent).log_prob(torch.from_numpy(data.observations), torch.from_numpy(data.actions))
    exact = found.exact.numpy()
    assert exact.sum() > 30
    np.testing.assert_allclose(data.infos["action_log_probs"][exact], found.logp.numpy()[exact], atol=1e-2)


def test_decoded_actions_that_are_cut_off_have_no_density():
    agent = fitted_agent("Pendulum-v1", action_map="clip")
    with pytest.raises(NoDensityError, match="cut off"):
        AgentPolicy(agent).log_prob(torch.zeros(2, 3), torch.tensor([[0.0], [2.0]]))
    assert "action_log_probs" not in roll_out(agent, EnvSpec("Pendulum-v1"), 10, seed=4).infos
