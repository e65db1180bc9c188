"""What policy-guided diffusion generates, as steps and as a dataset, and that it learns what there is to learn."""

import gymnasium as gym
import numpy as np
import pytest
import torch
from helpers.agents import NOISY, quiet
from helpers.linear_gaussian import A, B, K, LinearGaussian
from helpers.offline import recorded, tiny
from offline.test_policy_guided_diffusion import TINY, T, make

from ctrlrl import api
from ctrlrl.data import d4rl, minari, minari_write
from ctrlrl.data.dataset import Dataset, DatasetInfo
from ctrlrl.data.windows import windows
from ctrlrl.engine.guidance import GuidanceConfig
from ctrlrl.nets.edm import SamplerConfig
from ctrlrl.nets.trajectory_codec import Steps

FEW = SamplerConfig(sampler_steps=4)


@pytest.fixture(scope="module")
def agent():
    return quiet(make(), 9)


@pytest.fixture(scope="module")
def learner():
    return api.make("td3_bc", dataset=recorded(), **tiny("td3_bc"))


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip([*a[0], a[1]], [*b[0], b[1]], strict=True))


# -- steps -----------------------------------------------------------------------------------------


def test_trajectories_have_steps_of_the_environments_shapes(agent):
    steps, known = agent.generate(5, sampler=FEW, batch_size=2)
    shapes = {name: tuple(x.shape) for name, x in steps._asdict().items()}
    assert shapes == {"obs": (5, T, 3), "action": (5, T, 1), "reward": (5, T), "done": (5, T), "next_obs": (5, T, 3)}
    assert all(x.dtype == torch.float32 and x.isfinite().all() and not x.is_inference() for x in steps)
    assert known.shape == (5, T) and known.dtype == torch.bool
    assert known[:, :-1].all() and known[:, -1].equal(steps.done[:, -1] > 0.5)
    assert steps.action.abs().max() <= 1.0 and set(steps.done.unique().tolist()) <= {0.0, 1.0}
    assert len(steps.obs[:, 0, 0].unique()) == 5


def test_draws_are_those_of_the_generator_and_by_default_go_on_from_the_agents_seed(agent, tmp_path):
    assert same(
        agent.generate(3, sampler=FEW, generator=generator()), agent.generate(3, sampler=FEW, generator=generator())
    )
    agent.save(tmp_path / "run")
    loaded = [api.load(tmp_path / "run") for _ in range(2)]
    first, second = (a.generate(3, sampler=FEW) for a in loaded)
    assert same(first, second)
    assert not same(first, loaded[0].generate(3, sampler=FEW))


def test_a_loaded_model_generates_the_same_without_its_data(tmp_path):
    d4rl.write(recorded(), tmp_path / "toy.hdf5")
    agent = quiet(make(str(tmp_path / "toy.hdf5"), env=NOISY), 6)
    agent.save(tmp_path / "run")
    (tmp_path / "toy.hdf5").unlink()
    loaded = api.load(tmp_path / "run")
    found = [a.generate(4, sampler=FEW, generator=generator(3)) for a in (agent, loaded)]
    assert same(*found)
    assert loaded.to_dataset(*found[1]).info.about["generated"]["run"] == str(tmp_path / "run")


def test_what_generates_is_the_average_and_not_the_trained_network():
    agent = quiet(make(), 6)
    before = agent.generate(3, sampler=FEW, generator=generator())
    agent.learner.state["actor"].add_(0.5)
    assert same(before, agent.generate(3, sampler=FEW, generator=generator()))
    agent.learner.state["actor_ema"].add_(0.5)
    assert not same(before, agent.generate(3, sampler=FEW, generator=generator()))


def test_an_agent_and_its_policy_guide_alike(agent, learner):
    found = [
        agent.generate(4, policy, GuidanceConfig(kappa=1.0), FEW, generator()) for policy in (learner, learner.policy)
    ]
    assert same(*found) and not same(found[0], agent.generate(4, sampler=FEW, generator=generator()))


def test_no_policy_or_no_strength_is_no_guidance_bit_for_bit(agent, learner):
    plain = agent.generate(4, sampler=FEW, generator=generator())
    for policy, guidance in ((learner, None), (learner, GuidanceConfig()), (None, GuidanceConfig(kappa=1.0))):
        assert same(plain, agent.generate(4, policy, guidance, FEW, generator()))


def test_guidance_moves_actions_towards_the_policy(agent, learner):
    def distance(kappa):
        steps, _ = agent.generate(64, learner, GuidanceConfig(kappa=kappa), generator=generator())
        wanted = learner.policy.mode(steps.obs.flatten(0, 1))
        return float((steps.action.flatten(0, 1) - wanted).square().mean())

    with torch.no_grad():
        assert distance(3.0) < 0.5 * distance(0.0)


def test_a_policy_for_other_actions_is_refused(agent):
    other = api.make(
        "td3_bc", dataset=recorded(action=gym.spaces.Box(-2, 2, (1,), np.float32), env=None), **tiny("td3_bc")
    )
    with pytest.raises(ValueError, match="the same action would mean another one"):
        agent.generate(2, other, GuidanceConfig(kappa=1.0), FEW)
    for settings in ({"trajectories": 0}, {"trajectories": 1, "batch_size": 0}):
        with pytest.raises(ValueError, match="must be at least 1"):
            agent.generate(**settings)


# -- as a dataset ----------------------------------------------------------------------------------


def by_hand():
    """Two trajectories: one that is done at its second step, one that is done at its last."""
    obs = torch.arange(18.0).view(2, T, 3)
    following = torch.cat([obs[:, 1:], obs[:, -1:]], 1)
    done = torch.tensor([[0.0, 1.0, 0.0], [0.0, 0.0, 1.0]])
    action = torch.tensor([[-1.0, 0.0, 0.5], [1.0, 0.25, -0.5]]).unsqueeze(-1)
    transitions = torch.tensor([[True, True, False], [True, True, True]])
    return Steps(obs, action, torch.arange(6.0).view(2, T), done, following), transitions


def test_a_dataset_of_steps_has_its_ends_where_they_are_done_or_cut():
    space = gym.spaces.Box(np.float32([-3]), np.float32([1]))
    agent = make(recorded(action=space, env=None))
    data = agent.to_dataset(*by_hand(), kappa=0.7)
    assert data.terminals.tolist() == [False, True, False, False, False, True]
    assert data.timeouts.tolist() == [False, False, True, False, False, False]
    assert data.next_known.tolist() == [True, False, False, True, True, False]
    assert data.usable.tolist() == [True, True, False, True, True, True]  # the transitions
    assert [tuple(e) for e in data.episodes] == [(0, 2), (2, 3), (3, 6)]
    np.testing.assert_array_equal(data.observations, np.arange(18.0).reshape(6, 3))
    np.testing.assert_array_equal(data.next_observations[3:5], data.observations[4:6])
    np.testing.assert_allclose(data.actions[:, 0], [-3, -1, 0, 1, -0.5, -2])  # middle -1, half the range 2
    assert data.rewards.tolist() == [0, 1, 2, 3, 4, 5]
    assert data.observation_space == agent.observation_space and data.action_space == space
    assert (data.info.ref_min_score, data.info.ref_max_score, data.info.env) == (-10.0, 10.0, None)
    generated = data.info.about["generated"]
    assert generated["kappa"] == 0.7 and generated["data"] == "toy" and generated["updates"] == 0
    assert generated["run"] is None and "policy_guided_diffusion" in generated["method"]


def test_single_transitions_are_episodes_whose_next_observation_is_known():
    agent = quiet(make(window_length=1), 3)
    steps, transitions = agent.generate(40, sampler=FEW)
    assert transitions.all() and steps.next_obs.shape == (40, 1, 3)
    data = agent.to_dataset(steps, transitions)
    assert data.next_known.all() and data.ends.all() and len(data.episodes) == 40
    np.testing.assert_array_equal(data.terminals, steps.done.flatten() > 0.5)
    np.testing.assert_array_equal(data.next_observations, steps.next_obs.flatten(0, 1))


def test_a_generated_set_is_written_and_learned_from(agent, tmp_path):
    data = agent.to_dataset(*agent.generate(6, sampler=FEW), kappa=0.0)
    d4rl.write(data, tmp_path / "made.hdf5")
    again = d4rl.read(tmp_path / "made.hdf5")
    for name, column in data.columns().items():
        rows = data.next_known if name == "next_observations" else slice(None)  # anything where it is not known
        np.testing.assert_array_equal(again.columns()[name][rows], column[rows])
    assert again.info.about["generated"] == data.info.about["generated"] and data.info.env.id == NOISY
    folder = minari_write.write(data, "made/toy-v0", root=tmp_path)
    kept = minari.read(folder)
    assert kept.info.about["generated"]["kappa"] == 0.0 and kept.usable.all()
    assert len(kept) == int(data.usable.sum())
    assert quiet(api.make("td3_bc", dataset=kept, **tiny("td3_bc")), 3).steps == 3


# -- no policy -------------------------------------------------------------------------------------


def test_it_is_no_policy_and_says_what_to_call(agent, tmp_path):
    assert not agent.can_evaluate
    obs = np.zeros(3, np.float32)
    for call in (lambda: agent.predict(obs), lambda: agent.evaluate(1), lambda: agent.session(),
                 lambda: agent.export(tmp_path / "x.onnx")):  # fmt: skip
        with pytest.raises(ValueError, match=r"no policy.*agent\.generate"):
            call()


@pytest.mark.parametrize("env", [None, NOISY, "missing_package:Nowhere-v0"])
def test_nothing_is_said_of_evaluations_that_it_could_not_have(env, caplog):
    data = recorded(env=env)
    assert quiet(make(data), 3).steps == 3
    assert "evaluation" not in caplog.text


# -- what it learns --------------------------------------------------------------------------------


def linear_gaussian(length, trajectories, seed=0):
    """Trajectories of the system whose every conditional is known; actions a = tanh(u / 4) of its u, cut at the end."""
    system = LinearGaussian(steps=length)
    g = generator(seed)
    values, vectors = torch.linalg.eigh(system.covariance)
    drawn = (
        torch.randn(trajectories, len(values), generator=g, dtype=torch.float64)
        @ (vectors * values.clamp(min=0).sqrt()).T
    )
    raw = (drawn.view(trajectories, length, 3) * system.scale).float()
    obs, action = raw[..., :2], torch.tanh(raw[..., 2:] / 4)
    following = obs @ A.float().T + raw[..., 2:] * B.float()
    timeouts = np.zeros((trajectories, length), bool)
    timeouts[:, -1] = True
    n = trajectories * length
    return system, Dataset(
        obs.reshape(n, 2).numpy(), action.reshape(n, 1).numpy(), np.zeros(n, np.float32), np.zeros(n, bool),
        timeouts.ravel(), following.reshape(n, 2).numpy(), np.ones(n, bool),
        gym.spaces.Box(-np.inf, np.inf, (2,), np.float32), gym.spaces.Box(-1, 1, (1,), np.float32),
        DatasetInfo("linear"),
    )  # fmt: skip


def laws(steps):
    """Share of the variance of s' - s and of u that the dynamics and the policy leave open: 0 and 0.3^2 / var(u)."""
    obs, u, following = (
        steps.obs.flatten(0, 1),
        4 * torch.atanh(steps.action.flatten(0, 1)),
        steps.next_obs.flatten(0, 1),
    )
    miss = following - (obs @ A.float().T + u * B.float())
    return float(miss.var(0).sum() / (following - obs).var(0).sum()), float((u[:, 0] - obs @ K.float()).std())


def test_single_transitions_of_a_linear_system_are_learned():
    """s' = A s + B u and u ~ N(K s, 0.3^2), of states and actions of the right spread."""
    _, data = linear_gaussian(4, 1000)
    agent = api.make(
        "policy_guided_diffusion", dataset=data,
        **TINY | {"window_length": 1, "batch_size": 256, "learning_rate": 3e-3, "denoiser_width": 64,
                  "denoiser_blocks": 2, "iteration_steps": 100},
    )  # fmt: skip
    quiet(agent, 900)
    steps, _ = agent.generate(1000, batch_size=1000, generator=generator())
    open_dynamics, policy_std = laws(steps)
    assert open_dynamics < 0.05
    assert policy_std == pytest.approx(0.3, abs=0.06)
    for found, wanted in ((steps.obs.flatten(0, 1), data.observations), (steps.action.flatten(0, 1), data.actions)):
        np.testing.assert_allclose(found.std(0), wanted.std(0), rtol=0.15)
        np.testing.assert_allclose(found.mean(0), wanted.mean(0), atol=0.15)
    assert steps.done.max() == 0 and steps.reward.abs().max() < 0.1


@pytest.mark.slow
def test_trajectories_of_a_linear_system_are_denoised_nearly_as_well_as_can_be():
    """The learned D beside the exact one, on the three channels that vary: its error is that plus a little."""
    system, data = linear_gaussian(8, 4000)
    agent = api.make(
        "policy_guided_diffusion", dataset=data,
        **TINY | {"window_length": 8, "window_stride": 8, "batch_size": 128, "learning_rate": 3e-3,
                  "denoiser_channels": (16, 32), "iteration_steps": 100},
    )  # fmt: skip
    quiet(agent, 1200)
    assert len(windows(data, 8, 8)) == 4000
    _, fresh = linear_gaussian(8, 500, seed=1)
    rows = Steps(
        *(torch.from_numpy(x.reshape(500, 8, *x.shape[1:])) for x in (
            fresh.observations, fresh.actions, fresh.rewards, fresh.terminals.astype(np.float32),
            fresh.next_observations)),
    )  # fmt: skip
    model = agent.averaged
    with torch.no_grad():
        x = model.codec.encode(rows)
        for sigma in (0.3, 1.0, 3.0):
            level = torch.tensor(sigma)
            noisy = x + sigma * torch.randn(x.shape, generator=generator(2))
            exact = system.denoise(noisy[:, :3].double(), level.double()).float()
            errors = [(d[:, :3] - x[:, :3]).square().mean() for d in (model.denoise(noisy, level), exact)]
            assert errors[0] < 1.25 * errors[1], sigma
        steps, _ = agent.generate(500, batch_size=500, generator=generator())
    inner = Steps(*(p[:, :-1] for p in steps))
    open_dynamics, policy_std = laws(inner)
    assert open_dynamics < 0.5 and policy_std == pytest.approx(0.3, abs=0.1)
