"""The policy inside a D4RL file, against the same network and distribution in torch."""

import warnings

import h5py
import numpy as np
import pytest
import torch
from data.d4rl_files import door
from torch.distributions import Independent, Normal, TanhTransform, TransformedDistribution

from ctrlrl.data.dataset import DatasetError
from ctrlrl.interop import d4rl_policy

N, OBS, HIDDEN, ACTION = 400, 5, 8, 2


def network(nonlinearity=torch.relu, low=-1.0):
    """mean and log standard deviation in torch, and their weights by D4RL's names."""
    torch.manual_seed(0)
    layers = {
        "fc0": torch.nn.Linear(OBS, HIDDEN),
        "fc1": torch.nn.Linear(HIDDEN, HIDDEN),  # square: its shape does not tell which way it lies
        "last_fc": torch.nn.Linear(HIDDEN, ACTION),
        "last_fc_log_std": torch.nn.Linear(HIDDEN, ACTION),
    }
    layers["last_fc_log_std"].bias.data += low

    def forward(obs):
        x = nonlinearity(layers["fc1"](nonlinearity(layers["fc0"](torch.as_tensor(obs)))))
        return layers["last_fc"](x), layers["last_fc_log_std"](x).clamp(-20, 2)

    weights = {}
    for name, layer in layers.items():
        weights |= {f"{name}/weight": layer.weight.detach().numpy(), f"{name}/bias": layer.bias.detach().numpy()}
    return forward, weights


def save(path, weights, nonlinearity="relu", distribution="tanh_gaussian", **columns):
    with h5py.File(path, "w") as file:
        file["observations"] = columns.pop("observations", np.zeros((3, OBS), np.float32))
        for key, value in columns.items():
            file[key.replace("infos_", "infos/")] = value
        for key, value in weights.items():
            file[f"metadata/policy/{key}"] = value
        if nonlinearity:
            file["metadata/policy/nonlinearity"] = np.bytes_(nonlinearity)
        if distribution:
            file["metadata/policy/output_distribution"] = np.bytes_(distribution)
    return path


@pytest.fixture
def path(tmp_path):
    return tmp_path / "set.hdf5"


@pytest.fixture
def obs():
    return np.random.default_rng(1).normal(size=(N, OBS)).astype(np.float32)


def squashed(forward, obs):
    mean, log_std = forward(obs)
    base = Independent(Normal(mean.double(), log_std.double().exp()), 1)
    return TransformedDistribution(base, [TanhTransform()])


def test_the_density_of_a_squashed_gaussian_is_that_of_torch(path, obs):
    forward, weights = network()
    policy = d4rl_policy.load(save(path, weights))
    torch.manual_seed(1)
    actions = squashed(forward, obs).sample()
    actions = actions[(actions.abs() < 0.999).all(-1)]
    kept = obs[: len(actions)]
    found = policy.log_prob(kept, actions.numpy())
    assert found.shape == (len(actions),) and len(actions) > 200
    assert np.allclose(found, squashed(forward, kept).log_prob(actions).detach().numpy(), atol=1e-5)


def test_the_density_of_a_squashed_gaussian_is_one_over_all_actions(path):
    _, weights = network()
    policy = d4rl_policy.load(save(path, weights))
    edges = np.tanh(np.linspace(-6, 6, 301))
    middle = (edges[1:] + edges[:-1]) / 2
    grid = np.stack(np.meshgrid(middle, middle, indexing="ij"), -1).reshape(-1, 2)
    area = np.outer(np.diff(edges), np.diff(edges)).reshape(-1)
    one = np.broadcast_to(np.linspace(-1, 1, OBS), (len(grid), OBS))
    assert (np.exp(policy.log_prob(one, grid)) * area).sum() == pytest.approx(1.0, abs=5e-3)


def test_the_density_of_a_plain_gaussian_is_that_of_torch(path, obs):
    forward, weights = network(torch.tanh)
    policy = d4rl_policy.load(save(path, weights, "tanh", "gaussian"))
    mean, log_std = forward(obs)
    dist = Independent(Normal(mean, log_std.exp()), 1)
    actions = dist.sample()
    assert np.allclose(policy.log_prob(obs, actions), dist.log_prob(actions).detach(), atol=1e-4)


def test_an_action_at_a_bound_has_a_finite_density(path, obs):
    policy = d4rl_policy.load(save(path, network()[1]))
    assert np.isfinite(policy.log_prob(obs, np.ones((N, ACTION)))).all()


def test_the_log_standard_deviation_is_kept_between_minus_twenty_and_two(path, obs):
    forward, weights = network(low=50.0)
    policy = d4rl_policy.load(save(path, weights, distribution="gaussian"))
    mean = forward(obs)[0].detach().numpy()
    assert np.allclose(policy.log_prob(obs, mean), -ACTION * (2 + 0.5 * np.log(2 * np.pi)))


def test_the_mode_is_the_squashed_mean_and_samples_have_the_density(path, obs):
    forward, weights = network()
    policy = d4rl_policy.load(save(path, weights), seed=3)
    mode, state = policy.predict(obs, deterministic=True)
    assert np.allclose(mode, torch.tanh(forward(obs)[0]).detach(), atol=1e-6) and mode.dtype == np.float32
    assert state is None and policy.predict(obs[0], state=(1,), deterministic=True)[1] == (1,)
    assert np.allclose(policy.predict(obs[0], deterministic=True)[0], mode[0], atol=1e-6)
    many = np.repeat(obs[:1], 20_000, axis=0)
    drawn = np.arctanh(policy.predict(many)[0].astype(np.float64))
    mean, log_std = (x.detach().numpy()[0] for x in forward(obs[:1]))
    assert np.allclose(drawn.mean(0), mean, atol=0.02)
    assert np.allclose(drawn.std(0), np.exp(log_std), rtol=0.03)


def test_samples_of_a_plain_gaussian_are_clipped_and_repeat_with_the_seed(path, obs):
    save(path, network(low=2.0)[1], distribution="gaussian")
    first, again = (d4rl_policy.load(path, seed=5).predict(obs)[0] for _ in range(2))
    assert np.array_equal(first, again) and np.abs(first).max() == 1.0
    assert not np.array_equal(first, d4rl_policy.load(path, seed=6).predict(obs)[0])


def test_weights_that_lie_the_other_way_are_turned(path, obs):
    weights = network()[1]
    turned = {k: v.T if k.endswith("weight") else v for k, v in weights.items()}
    wanted = d4rl_policy.load(save(path, weights)).predict(obs, deterministic=True)[0]
    assert np.array_equal(d4rl_policy.load(save(path, turned)).predict(obs, deterministic=True)[0], wanted)
    mixed = turned | {"fc0/weight": weights["fc0/weight"]}
    with pytest.raises(DatasetError, match=r"some weights of metadata/policy are \[out, in\] and some"):
        d4rl_policy.load(save(path, mixed))


def test_recorded_log_probabilities_are_compared(path, obs):
    forward, weights = network()
    torch.manual_seed(1)
    actions = squashed(forward, obs).sample()
    recorded = squashed(forward, obs).log_prob(actions).detach().numpy().astype(np.float32)
    columns = {"observations": obs, "actions": actions.numpy().astype(np.float32)}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        policy = d4rl_policy.load(save(path, weights, **columns, infos_action_log_probs=recorded))
    assert policy.agreement == 1.0
    half = np.where(np.arange(N) < N // 2, recorded, recorded + 1.0)
    with pytest.warns(UserWarning, match=r"its policy gives the recorded infos/action_log_probs in [45]\d%"):
        policy = d4rl_policy.load(save(path, weights, **columns, infos_action_log_probs=half))
    assert policy.agreement == pytest.approx(0.5, abs=0.1)
    assert d4rl_policy.load(path, check=100).agreement == 1.0  # the first rows are right
    assert d4rl_policy.load(save(path, weights)).agreement is None


def test_a_standard_deviation_that_copies_the_mean_is_taken_from_the_recorded_ones(path, obs):
    forward, weights = network(torch.tanh)
    copied = weights | {f"last_fc_log_std/{k}": weights[f"last_fc/{k}"] for k in ("weight", "bias")}
    spread = np.float32([-0.5, -1.5])
    rows = np.repeat(spread[None], 3, axis=0)
    policy = d4rl_policy.load(save(path, copied, "tanh", "gaussian", infos_action_log_std=rows))
    dist = Independent(Normal(forward(obs)[0], torch.as_tensor(spread).exp()), 1)
    actions = dist.sample()
    assert policy.stochastic
    assert np.allclose(policy.log_prob(obs, actions), dist.log_prob(actions).detach(), atol=1e-4)
    rows[1] += 1
    for columns in ({}, {"infos_action_log_std": rows}):
        policy = d4rl_policy.load(save(path, copied, "tanh", "gaussian", **columns))
        assert not policy.stochastic
        with pytest.raises(DatasetError, match="does not tell this policy's standard deviation"):
            policy.log_prob(obs, actions)
        with pytest.raises(DatasetError, match="deterministic=True works"):
            policy.predict(obs)
        assert policy.predict(obs, deterministic=True)[0].shape == (N, ACTION)


def test_a_deterministic_policy_acts_and_has_no_density(path, obs):
    forward, weights = network()
    policy = d4rl_policy.load(save(path, weights, distribution="tanh"))
    assert np.allclose(policy.predict(obs)[0], torch.tanh(forward(obs)[0]).detach(), atol=1e-6)
    with pytest.raises(DatasetError, match="has no density"):
        policy.log_prob(obs, np.zeros((N, ACTION)))


def test_a_file_without_a_policy_says_which_have_one(path):
    with pytest.raises(DatasetError, match=r"holds no policy \(metadata/policy\)"):
        d4rl_policy.load(door())


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"last_fc": None}, "last_fc is missing"),
        ({"fc0": None}, r"layers \['fc1'\]; expected fc0, fc1"),
        ({"fc1/bias": None}, "fc1 is no layer of weight and bias"),
        ({"fc1/bias": np.zeros(3)}, r"fc1 has weight \(8, 8\) and bias \(3,\)"),
        ({"fc0/weight": np.zeros((HIDDEN, 4))}, r"do not fit one another and observations of \(5,\): fc0 \(8, 4\)"),
        ({"fc1/weight": np.full((HIDDEN, HIDDEN), np.nan)}, "fc1 holds NaN"),
        ({"nonlinearity": "gelu"}, "nonlinearity='gelu' is unknown; expected relu or tanh"),
        ({"output_distribution": "beta"}, "output_distribution='beta' is unknown"),
        ({"nonlinearity": None}, "nonlinearity is missing"),
    ],
)
def test_an_incomplete_policy_is_named(path, changes, words):
    weights = network()[1]
    named = {"nonlinearity": "relu", "output_distribution": "tanh_gaussian"}
    for key, value in changes.items():
        if key in named:
            named[key] = value
        elif value is None:
            weights = {k: v for k, v in weights.items() if k != key and not k.startswith(f"{key}/")}
        else:
            weights[key] = value
    save(path, weights, named["nonlinearity"], named["output_distribution"])
    with pytest.raises(DatasetError, match=words):
        d4rl_policy.load(path)


def test_observations_and_actions_of_other_sizes_are_refused(path, obs):
    policy = d4rl_policy.load(save(path, network()[1]))
    with pytest.raises(ValueError, match=r"observation has shape \(4,\); expected \(5,\)"):
        policy.predict(np.zeros(4))
    with pytest.raises(ValueError, match=r"actions has shape \(400, 1\); expected \(400, 2\)"):
        policy.log_prob(obs, np.zeros((N, 1)))
