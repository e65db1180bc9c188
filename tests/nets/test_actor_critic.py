"""The policy network: spaces, encoders, the two ways of acting, and what is shared."""

import gymnasium as gym
import numpy as np
import pytest
import torch
from helpers.policies import gen
from torch import nn

from ctrlrl.nets.actor_critic import ActorCritic, NetworkConfig, is_image

BOX = gym.spaces.Box(-np.inf, np.inf, (3,), np.float32)
ACTIONS = {
    "bounded": gym.spaces.Box(-1, 1, (2,), np.float32),
    "unbounded": gym.spaces.Box(-np.inf, np.inf, (2,), np.float32),
    "half": gym.spaces.Box(np.float32([-1, -np.inf]), np.float32([np.inf, 1]), dtype=np.float32),
    "shaped": gym.spaces.Box(-1, 1, (2, 2), np.float32),
    "discrete": gym.spaces.Discrete(3, start=2),
    "multi": gym.spaces.MultiDiscrete([2, 3], start=[1, 0]),
}
OBS = {
    "vector": BOX,
    "matrix": gym.spaces.Box(-1, 1, (2, 3), np.float32),
    "double": gym.spaces.Box(-np.inf, np.inf, (3,), np.float64),
    "integers": gym.spaces.Box(0, 50, (3,), np.int64),
    "choice": gym.spaces.Discrete(4, start=3),
    "choices": gym.spaces.MultiDiscrete([2, 3], start=[1, 4]),
    "bits": gym.spaces.MultiBinary(4),
    "image": gym.spaces.Box(0, 255, (3, 8, 8), np.uint8),
    "image_last": gym.spaces.Box(0, 255, (8, 8, 1), np.uint8),
    "dict": gym.spaces.Dict(
        {"image": gym.spaces.Box(0, 255, (8, 8, 3), np.uint8), "vector": BOX, "mode": gym.spaces.Discrete(5)}
    ),
}
SMALL = NetworkConfig(actor_hidden=(8,), critic_hidden=(6,), image_features=5)


def observations(space, n=16, seed=0):
    """``n`` raw observations as the collector stores them: float32, integers as they are."""
    space.seed(seed)
    drawn = [space.sample() for _ in range(n)]

    def tensor(values):
        array = np.stack(values)
        return torch.from_numpy(array.astype(np.float32) if array.dtype == np.float64 else array)

    if isinstance(space, gym.spaces.Dict):
        return {k: tensor([d[k] for d in drawn]) for k in space.spaces}
    return tensor(drawn)


def build(obs=BOX, action=None, normalized=True, config=SMALL, **kwargs):
    torch.manual_seed(0)
    policy = ActorCritic(obs, action or ACTIONS["bounded"], config, **kwargs)
    if normalized and policy.preprocess.normalizer is not None:
        policy.preprocess.normalizer.update(
            torch.randn(50, policy.preprocess.normalizer.shift.numel(), generator=gen(5)) * 3 + 1
        )
    return policy


@pytest.mark.parametrize("normalized", [True, False])
@pytest.mark.parametrize(
    ("activation", "std"), [("tanh", "free"), ("relu", "free"), ("elu", "free"), ("silu", "free"), ("silu", "state")]
)
@pytest.mark.parametrize("name", ACTIONS)
def test_the_sampler_equals_act_and_to_env_bit_for_bit(name, activation, std, normalized):
    config = NetworkConfig(
        actor_hidden=(8, 8), critic_hidden=(6,), activation=activation, log_std_init=0.7, std=std, head_gain=1.0
    )
    policy = build(action=ACTIONS[name], config=config, normalized=normalized, normalize_obs=normalized)
    obs, noise = observations(BOX) * 20, policy.noise(1, 16, gen(1))[0]
    with torch.inference_mode():
        action, sent = policy.sampler()(obs, noise)
        expected = policy.act(obs, noise)
        assert torch.equal(action, expected) and torch.equal(sent, policy.to_env(obs, expected))
        assert action.dtype == policy.action_dtype


@pytest.mark.parametrize("normalized", [True, False])
@pytest.mark.parametrize("name", OBS)
def test_the_sampler_equals_act_for_every_observation_space(name, normalized):
    policy = build(OBS[name], normalize_obs=normalized)
    obs, noise = observations(OBS[name]), policy.noise(1, 16, gen(1))[0]
    with torch.inference_mode():
        action, sent = policy.sampler()(obs, noise)
        assert torch.equal(action, policy.act(obs, noise)) and torch.equal(sent, policy.to_env(obs, action))


def test_the_sampler_keeps_tanh_actions():
    policy = build(config=NetworkConfig(actor_hidden=(8,), action_map="tanh", log_std_init=1.0))
    obs, noise = observations(BOX), policy.noise(1, 16, gen(1))[0]
    with torch.inference_mode():
        action, sent = policy.sampler()(obs, noise)
        assert torch.equal(sent, policy.to_env(obs, policy.act(obs, noise))) and sent.abs().max() <= 1.0
        assert action.abs().max() > 1.0


def test_deviations_of_the_state_are_softplus_and_begin_where_they_are_told():
    """softplus(0.5413) = 1: the standard normal that GoRL resets to, less the least deviation of 0.001."""
    policy = build(config=NetworkConfig(actor_hidden=(8,), std="state", head_gain=0.0))
    params = policy.distribution(observations(BOX)).params()
    assert params["log_std"].shape == params["mean"].shape
    assert torch.allclose(params["log_std"].exp(), torch.ones(()), atol=1e-6) and params["mean"].abs().max() == 0.0
    assert policy.head.spread is not None
    assert torch.allclose(torch.nn.functional.softplus(policy.head.spread.bias), torch.tensor(0.999), atol=1e-6)
    wide = build(config=NetworkConfig(actor_hidden=(8,), std="state", head_gain=1.0, log_std_init=-0.5))
    stds = wide.distribution(100.0 * observations(BOX)).params()["log_std"].exp()
    assert stds.std() > 0.0 and stds.min() >= 0.001 and stds.max() <= 10.0
    nn = torch.nn.functional
    features = wide.actor(wide._features(observations(BOX)))
    expected = (nn.softplus(features @ wide.head.spread.weight.T + wide.head.spread.bias) + 1e-3).clamp(max=10.0)
    assert torch.allclose(wide.head(features).params()["log_std"].exp(), expected, rtol=1e-5)


@pytest.mark.parametrize("log_std_init", [-7.0, 2.5])
def test_a_deviation_beyond_what_a_state_can_have_is_refused(log_std_init):
    with pytest.raises(ValueError, match="log_std_init"):
        build(config=NetworkConfig(std="state", log_std_init=log_std_init))


@pytest.mark.parametrize("name", OBS)
def test_learning_and_acting_see_the_same_distribution(name):
    """forward() takes [B, T, ...], act() takes [N, ...]: the log-probability must be that of the action drawn."""
    policy = build(OBS[name], critics=("value", "median"))
    obs = observations(OBS[name], 12)
    with torch.no_grad():
        action = policy.act(obs, policy.noise(1, 12, gen(1))[0])
        direct = policy.distribution(obs).log_prob(action)
        fold = lambda x: x.unflatten(0, (4, 3))  # noqa: E731
        sequence = {k: fold(v) for k, v in obs.items()} if isinstance(obs, dict) else fold(obs)
        out = policy(sequence, fold(action))
        values = policy.values(obs)
    assert out.logp.shape == out.entropy.shape == (4, 3)
    torch.testing.assert_close(out.logp.flatten(), direct)
    assert set(out.values) == set(values) == {"value", "median"}
    for key in values:
        torch.testing.assert_close(out.values[key].flatten(), values[key])


@pytest.mark.parametrize("name", ["vector", "matrix", "dict", "integers"])
def test_the_normaliser_sees_every_box_value_and_only_valid_rows(name):
    policy = build(OBS[name], normalized=False)
    obs = observations(OBS[name], 12)
    fold = lambda x: x.unflatten(0, (6, 2))  # noqa: E731
    valid = torch.arange(12).view(6, 2) % 3 != 0
    policy.update_normalizer({k: fold(v) for k, v in obs.items()} if isinstance(obs, dict) else fold(obs), valid)
    flat = (obs["vector"] if isinstance(obs, dict) else obs).flatten(1).double()[valid.flatten()]
    moments = policy.preprocess.normalizer.moments
    assert moments.count == int(valid.sum())
    torch.testing.assert_close(moments.mean, flat.mean(0))
    torch.testing.assert_close(moments.var, flat.var(0, correction=0))


@pytest.mark.parametrize("name", ["choice", "bits", "image", "choices"])
def test_only_box_numbers_are_normalised(name):
    assert build(OBS[name]).preprocess.normalizer is None


def test_integers_become_one_hot_from_their_start():
    policy = build(OBS["choices"])
    flat = policy.preprocess(torch.tensor([[1, 4], [2, 6]]))["flat"]
    assert flat.tolist() == [[1, 0, 1, 0, 0], [0, 1, 0, 0, 1]]
    assert build(OBS["choice"]).preprocess(torch.tensor([3, 6]))["flat"].tolist() == [[1, 0, 0, 0], [0, 0, 0, 1]]


@pytest.mark.parametrize("name,shape", [("image", (2, 3, 8, 8)), ("image_last", (2, 1, 8, 8))])
def test_images_become_channels_first_between_zero_and_one(name, shape):
    raw = torch.zeros(2, *OBS[name].shape, dtype=torch.uint8)
    raw[1] = 255
    image = build(OBS[name]).preprocess(raw)["image/"]
    assert image.shape == shape and image[0].max() == 0.0 and image[1].min() == 1.0


def test_a_pixel_moves_with_its_channel():
    raw = torch.zeros(1, 8, 8, 3, dtype=torch.uint8)
    raw[0, 2, 5, 1] = 255
    space = gym.spaces.Box(0, 255, (8, 8, 3), np.uint8)
    assert build(space).preprocess(raw)["image/"].nonzero().tolist() == [[0, 1, 2, 5]]


@pytest.mark.parametrize("side", [4, 8, 35, 36, 84])
def test_images_of_any_size_have_an_encoder(side):
    space = gym.spaces.Box(0, 255, (1, side, side), np.uint8)
    assert is_image(space)
    assert build(space).deterministic(torch.zeros(2, 1, side, side, dtype=torch.uint8)).shape == (2, 2)


def test_actor_and_critics_share_nothing_without_an_encoder():
    policy = build(critics=("value", "median"))
    obs = observations(BOX)
    policy.values(obs)["value"].sum().backward()
    touched = {n for n, p in policy.named_parameters() if p.grad is not None and p.grad.abs().max() > 0}
    assert touched and all(n.startswith("critics.value.") for n in touched)


class MyEncoder(nn.Module):
    """What a user would write."""

    def __init__(self, space):
        super().__init__()
        self.linear = nn.Linear(int(np.prod(space.shape)), 7)
        self.out_features = 7

    def forward(self, x):
        return torch.relu(self.linear(x))


def test_the_users_encoder_by_path_and_by_class_are_the_same():
    by_class = build(encoder=MyEncoder)
    by_path = build(config=NetworkConfig((8,), (6,), encoder=f"{__name__}:MyEncoder"))
    assert type(by_path.encoder).__name__ == "MyEncoder"
    obs = observations(BOX)
    assert torch.equal(by_class.deterministic(obs), by_path.deterministic(obs))
    (by_class.deterministic(obs).sum() + by_class.values(obs)["value"].sum()).backward()
    assert by_class.encoder.linear.weight.grad.abs().max() > 0


@pytest.mark.parametrize("path", ["no.such:Encoder", "helpers.envs:NoSuch", "nonsense"])
def test_an_encoder_that_cannot_be_loaded_says_so(path):
    with pytest.raises(ValueError, match=r"cannot load the encoder.*package\.module:Class"):
        build(config=NetworkConfig(encoder=path))


def test_initialisation_is_what_it_says():
    policy = build(config=NetworkConfig(log_std_init=-0.5))
    weight = policy.actor[0].weight
    torch.testing.assert_close(weight.T @ weight, 2.0 * torch.eye(3), atol=1e-5, rtol=0)
    assert policy.head.linear.weight.norm(dim=1).allclose(torch.tensor(0.01))
    torch.testing.assert_close(policy.critics["value"][-1].weight.norm(), torch.tensor(1.0))
    assert (policy.head.log_std == -0.5).all()
    assert not torch.equal(build(config=NetworkConfig(orthogonal_init=False)).actor[0].weight, weight)


@pytest.mark.parametrize("field,value", [("activation", "tanhh"), ("action_map", "tan")])
def test_unknown_words_are_refused(field, value):
    with pytest.raises(ValueError, match=f"{field}='{value}'"):
        NetworkConfig(**{field: value})


def test_no_hidden_layers_is_a_linear_policy():
    policy = build(config=NetworkConfig(actor_hidden=(), critic_hidden=()), normalize_obs=False)
    a, b = observations(BOX, 2)
    mean = lambda x: policy.distribution(x.unsqueeze(0)).mode() - policy.head.linear.bias  # noqa: E731
    torch.testing.assert_close(mean(a + b), mean(a) + mean(b))


def test_unsupported_observations_are_named():
    nested = gym.spaces.Dict({"a": gym.spaces.Dict({"b": BOX})})
    with pytest.raises(TypeError, match=r"observation a of type Dict is not supported.*FlattenObservation"):
        build(nested)
