"""Corrections by scores and dynamics that are known exactly: what a step is, in which order, and for which policies."""

import dataclasses
import math

import gymnasium as gym
import numpy as np
import pytest
import torch
from helpers.agents import NOISY

from ctrlrl import api
from ctrlrl.data.dataset import DatasetInfo
from ctrlrl.engine.corrected import BlendedAgent, CorrectedAgent, CorrectionConfig, OnnxPolicy, PolicyAgent
from ctrlrl.nets.actors import QNetworkConfig
from ctrlrl.nets.score import CorrectionModel
from ctrlrl.types import EnvSpec

OBS = gym.spaces.Box(-np.inf, np.inf, (2,), np.float32)
ACTIONS = gym.spaces.Box(np.array([-2.0, 0.0]), np.array([6.0, 1.0]), dtype=np.float64)  # units differ by dimension
MIDDLE, SCALE = torch.tensor([2.0, 0.5]), torch.tensor([4.0, 0.5])
GAIN = torch.tensor([[0.3, -0.1], [0.2, 0.4]])  # the data's action at s, standardised: GAIN s


class Given:
    """A policy of somebody else: always the same environment's action."""

    def __init__(self, action):
        self.action = np.asarray(action)

    def predict(self, obs, deterministic=False):
        assert isinstance(obs, np.ndarray) and obs.ndim == 2
        return np.broadcast_to(self.action, (len(obs), *self.action.shape[-1:])), None


def model(**scores):
    """Units in which nothing is 1, the action a function of the state, and the given scores or dynamics."""
    found = CorrectionModel(OBS, ACTIONS, QNetworkConfig(actor_hidden=(4,)))
    found.fit("obs", torch.tensor([1.0, -2.0]), torch.tensor([2.0, 0.5]))
    found.fit("action", torch.tensor([0.1, -0.2]), torch.tensor([0.5, 0.25]))
    exact = {
        "conditional": lambda a, sigma, s: -(a - s @ GAIN.T) / sigma**2,
        "marginal": lambda s, sigma: -s / sigma**2,
        "joint": lambda z, sigma: -z / (1 + sigma**2),
    }
    for name, net in (exact | scores).items():
        delattr(found, name)
        setattr(found, name, net)
    return found


def corrected(policy, net=None, **settings):
    settings = {"skip_in_data": False} | settings
    return CorrectedAgent(
        policy, net or model(), CorrectionConfig(**settings), observation_space=OBS, action_space=ACTIONS
    )


def observations(n=5):
    s = 0.3 * np.random.default_rng(0).normal(size=(n, 2))
    return (s * [2.0, 0.5] + [1.0, -2.0]).astype(np.float32), torch.tensor(s, dtype=torch.float32)


def environment_action(a):
    """Of standardised actions."""
    return (a * torch.tensor([0.5, 0.25]) + torch.tensor([0.1, -0.2])) * SCALE + MIDDLE


# -- the action's steps ---------------------------------------------------------------------------


@pytest.mark.parametrize("sigma", [0.03, 0.1, 0.3, 1.0])
@pytest.mark.parametrize("eta,count", [(0.5, 1), (0.3, 4), (1.0, 1)])
def test_each_step_leaves_one_minus_eta_of_the_distance_at_every_level(sigma, eta, count):
    """The action is a function of the state: its score is the distance by sigma^2. In the environment's own units."""
    obs, s = observations()
    start = torch.tensor([[2.7, 0.45]]).expand(5, 2)
    agent = corrected(Given(start[0].numpy()), eta_action=eta, sigma_start=sigma, sigma_end=sigma, steps=(count,))
    target = environment_action(s @ GAIN.T)
    expected = target + (1 - eta) ** count * (start - target)
    found, _ = agent.predict(obs, deterministic=True)
    np.testing.assert_allclose(found, expected.numpy(), atol=1e-5)
    assert found.dtype == np.float64 and np.abs(found - start.numpy()).max() > 0.05


def test_levels_fall_from_the_largest_to_the_smallest_with_their_own_numbers_of_steps():
    seen = []

    def noted(a, sigma, s):
        seen.append(float(sigma))
        return torch.zeros_like(a)

    corrected(Given([2.0, 0.5]), model(conditional=noted)).predict(observations()[0])
    ratio = 0.12 ** (1 / 3)
    assert seen == pytest.approx([1.0] * 2 + [ratio] * 3 + [ratio**2] * 4 + [0.12] * 5)
    assert CorrectionConfig(steps=(7,)).levels() == [0.12]


def test_a_step_scales_with_the_level_squared_and_climbs():
    """A constant score of 1 (standardised) moves by eta sigma^2."""
    agent = corrected(
        Given([2.0, 0.5]), model(conditional=lambda a, sigma, s: torch.ones_like(a)), eta_action=0.7, sigma_end=0.2,
        steps=(1,),
    )  # fmt: skip
    moved = agent.predict(observations()[0])[0] - np.array([2.0, 0.5])
    np.testing.assert_allclose(
        moved, np.broadcast_to(0.7 * 0.04 * np.array([0.5 * 4.0, 0.25 * 0.5]), (5, 2)), rtol=1e-3
    )


@pytest.mark.parametrize("every", [True, False])
def test_actions_are_cut_after_every_step(every):
    """A step far beyond the bound, then one back by a quarter of the range: from the bound, or from far outside."""

    def there_and_back(a, sigma, s):
        return torch.tensor([1000.0 if float(sigma) > 0.5 else -4.0 * 0.5 / 0.5, 0.0]).expand_as(a) / sigma**2

    agent = corrected(
        Given([2.0, 0.5]), model(conditional=there_and_back), steps=(1, 1), clip_steps=every, eta_action=0.25
    )
    found = agent.predict(observations()[0])[0]
    # -1 in standardised units: half of the scale 4
    np.testing.assert_allclose(found[:, 0], 4.0 if every else 6.0, atol=1e-5)
    np.testing.assert_allclose(found[:, 1], 0.5, atol=1e-6)


def test_the_joint_score_is_smoothed_over_states_and_the_conditional_is_not():
    """s ~ N(0, 1), a = 0.8 s + N(0, 0.2^2), each standardised: fixed points rho s / (1 + sigma^2) and rho s."""
    rho = 0.8 / math.sqrt(0.68)

    def joint(z, sigma):
        s, a, total = z[:, :2], z[:, 2:], 1 + sigma**2
        det = total**2 - rho**2
        return torch.cat([-(total * s - rho * a), -(total * a - rho * s)], 1) / det

    conditional = lambda a, sigma, s: -(a - rho * s) / (1 - rho**2 + sigma**2)  # noqa: E731
    net, (obs, s) = model(joint=joint, conditional=conditional), observations()
    settings = {"sigma_end": 0.5, "steps": (200,), "eta_action": 0.5}
    for score_on, target in (("joint", rho * s / 1.25), ("conditional", rho * s)):
        found = corrected(Given([2.0, 0.5]), net, score_on=score_on, **settings).predict(obs)[0]
        np.testing.assert_allclose(found, environment_action(target).numpy(), atol=1e-4)


def test_a_step_is_left_out_where_the_gradient_is_usual_in_the_data():
    net = model()
    net.typical.fill_(2.0)  # sigma |g|: at sigma = 0.5 a norm of 4, which is a distance of 1
    obs, s = observations(2)
    near, far = environment_action(s @ GAIN.T + 0.6), environment_action(s @ GAIN.T + 0.8)
    start = torch.stack([near[0], far[1]]).double().numpy()  # norms 0.85 and 1.13 of the distance

    class Rows(Given):
        def predict(self, obs, deterministic=False):
            return self.action, None

    settings = {"sigma_start": 0.5, "sigma_end": 0.5, "steps": (1,), "eta_action": 0.5}
    found = corrected(Rows(start), net, skip_in_data=True, **settings).predict(obs)[0]
    np.testing.assert_allclose(found[0], start[0], atol=1e-5)
    np.testing.assert_allclose(found[1], environment_action(s @ GAIN.T + 0.4)[1].numpy(), atol=1e-5)
    everywhere = corrected(Rows(start), net, **settings).predict(obs)[0]
    np.testing.assert_allclose(everywhere, environment_action(s @ GAIN.T + torch.tensor([[0.3], [0.4]])), atol=1e-5)


# -- the state's step -----------------------------------------------------------------------------


def dynamics(**scores):
    """s' = s + 0.1 a in standardised units, known exactly; the actions' own inverse adds 0.05 that cancels in 'add'."""
    net = model(**scores)
    net.fit("change", torch.tensor([0.2, 0.3]), torch.tensor([0.7, 0.6]))
    change = lambda s, a: 0.1 * a * net.obs_std  # noqa: E731 - raw
    del net.forward_dynamics, net.inverse
    net.forward_dynamics = lambda x: (change(x[:, :2], x[:, 2:]) - net.change_mean) / net.change_std
    net.inverse = lambda x: 10.0 * (x[:, 2:] * net.change_std + net.change_mean) / net.obs_std + 0.05
    return net


@pytest.mark.parametrize("at", ["state", "next_state"])
@pytest.mark.parametrize("combine", ["add", "replace"])
@pytest.mark.parametrize("eta", [0.02, 0.05])
def test_the_state_climbs_by_the_action_that_leads_there(at, combine, eta):
    """The score -s / sigma^2 asks for a change of -eta s (or s'), which the action makes by ten times of it."""
    obs, s = observations()
    a = torch.tensor([0.2, 0.3])
    agent = corrected(
        Given(environment_action(a).numpy()), dynamics(), eta_action=0.0, eta_state=eta, state_grad_at=at,
        combine=combine,
    )  # fmt: skip
    place = s if at == "state" else s + 0.1 * a
    expected = a - 10.0 * eta * place + (0.0 if combine == "add" else 0.05)
    found = agent.predict(obs)[0]
    np.testing.assert_allclose(found, environment_action(expected).numpy(), atol=1e-4)


def test_the_state_step_has_a_level_of_its_own_and_follows_the_actions_steps():
    order = []

    def marginal(s, sigma):
        order.append(("state", round(float(sigma), 3)))
        return torch.zeros_like(s)

    def conditional(a, sigma, s):
        order.append(("action", round(float(sigma), 3)))
        return torch.zeros_like(a)

    net = dynamics(marginal=marginal, conditional=conditional)
    corrected(Given([2.0, 0.5]), net, eta_state=1.0, sigma_state=0.7, steps=(1, 1)).predict(observations()[0])
    assert order == [("action", 1.0), ("action", 0.12), ("state", 0.7)]
    order.clear()
    corrected(Given([2.0, 0.5]), net, eta_action=0.0, eta_state=0.0).predict(observations()[0])
    assert order == []


def test_replacing_leaves_the_action_where_the_state_is_usual():
    net = dynamics()
    net.typical.fill_(1e6)
    start = environment_action(torch.tensor([0.2, 0.3])).double().numpy()
    agent = corrected(Given(start), net, eta_action=0.0, eta_state=3.0, combine="replace", skip_in_data=True)
    np.testing.assert_allclose(agent.predict(observations()[0])[0], np.broadcast_to(start, (5, 2)), atol=1e-5)


# -- policies of all kinds ------------------------------------------------------------------------

BOX3, ONE = gym.spaces.Box(-np.inf, np.inf, (3,), np.float32), gym.spaces.Box(-1.0, 1.0, (1,), np.float32)
ABOUT = {"observation_space": BOX3, "action_space": ONE, "env_spec": EnvSpec(NOISY), "seed": 3}


@pytest.fixture(scope="module")
def sac():
    return api.make("sac", NOISY, actor_hidden=(8,), critic_hidden=(8,), device="cpu", seed=5)


def halved():
    """A model of [3] observations whose correction halves actions."""
    net = CorrectionModel(BOX3, ONE, QNetworkConfig(actor_hidden=(4,)))
    del net.conditional
    net.conditional = lambda a, sigma, s: -a / sigma**2
    return net, CorrectionConfig(0.5, steps=(1,), skip_in_data=False)


@pytest.mark.parametrize("deterministic", [True, False])
def test_an_agent_of_ours_acts_and_evaluates_as_before_but_for_the_correction(sac, deterministic):
    obs = np.random.default_rng(0).normal(size=(4, 3)).astype(np.float32)
    agent = CorrectedAgent(sac, *halved(), **ABOUT)
    if deterministic:
        plain, _ = sac.predict(obs, deterministic=True)
        np.testing.assert_allclose(agent.predict(obs, deterministic=True)[0], plain / 2, atol=1e-6)
        single, state = agent.predict(obs[1], deterministic=True)
        np.testing.assert_allclose(single, plain[1] / 2, atol=1e-6)
        assert single.shape == (1,) and state is None
    same = PolicyAgent(sac, **ABOUT).evaluate(3, deterministic)
    plain = sac.evaluate(3, deterministic)
    np.testing.assert_array_equal(plain.returns, same.returns)
    np.testing.assert_array_equal(plain.seeds, agent.evaluate(3, deterministic).seeds)
    assert agent.method.startswith("sac, corrected by cdsa") and agent.seed == 5


class Halves:
    """Anything that predicts; keeps a memory where it is given one."""

    def predict(self, obs, state=None, episode_start=None, deterministic=False):
        return np.full((len(obs), 1), 0.8 if deterministic else 0.4), None if state is None else state + 1


def test_a_policy_without_a_memory_is_not_asked_about_one():
    """As Stable-Baselines3's evaluate_policy asks every policy."""

    class Forgetful:
        def predict(self, obs, deterministic=False):
            return np.full((len(obs), 1), 0.8), None

    agent = CorrectedAgent(Forgetful(), *halved(), **ABOUT)
    found, _ = agent.predict(np.zeros((2, 3)), state=None, episode_start=np.ones(2, bool), deterministic=True)
    assert found == pytest.approx(0.4)


def test_anything_that_predicts_can_be_corrected():
    agent = CorrectedAgent(Halves(), *halved(), **ABOUT)
    assert agent.predict(np.zeros(3))[0] == pytest.approx(0.2)
    assert agent.predict(np.zeros((2, 3)), deterministic=True)[0] == pytest.approx(0.4)
    assert agent.predict(np.zeros((1, 3)), np.array(4), np.array([False]))[1] == 5
    act = agent.session(torch.Generator())
    assert act(np.zeros((2, 3), np.float32), np.arange(2)) == pytest.approx(0.2)
    assert len(agent.evaluate(2).returns) == 2 and agent.seed == 3
    assert agent.method == "Halves, corrected by cdsa (eta_action 0.5, eta_state 0)"


def test_a_model_of_stable_baselines_can_be_corrected():
    sb3 = pytest.importorskip("stable_baselines3")
    theirs = sb3.TD3("MlpPolicy", gym.make(NOISY), policy_kwargs={"net_arch": [4]}, device="cpu", buffer_size=10)
    agent, obs = CorrectedAgent(theirs, *halved(), **ABOUT), np.ones((2, 3), np.float32)
    np.testing.assert_allclose(
        agent.predict(obs, deterministic=True)[0], theirs.predict(obs, deterministic=True)[0] / 2
    )
    assert len(agent.evaluate(1).returns) == 1


@pytest.mark.parametrize("deterministic", [True, False])
def test_an_onnx_policy_can_be_corrected(sac, tmp_path, deterministic):
    pytest.importorskip("onnxscript")
    path = sac.export(tmp_path / "policy.onnx", deterministic=deterministic)
    agent, obs = CorrectedAgent(path, *halved(), **ABOUT), np.random.default_rng(1).normal(size=(4, 3))
    plain = sac.predict(obs, deterministic=True)[0]
    np.testing.assert_allclose(agent.predict(obs, deterministic=True)[0], plain / 2, atol=1e-5)
    sampled = OnnxPolicy(path).predict(obs, deterministic=False)[0]
    assert np.allclose(sampled, plain, atol=1e-5) == deterministic
    session = CorrectedAgent(OnnxPolicy(path).session, *halved(), **ABOUT)
    np.testing.assert_allclose(session.predict(obs, deterministic=True)[0], plain / 2, atol=1e-5)


def test_an_onnx_file_of_another_form_is_refused():
    class Node:
        def __init__(self, name):
            self.name, self.type, self.shape = name, "tensor(double)", ["batch", 3]

    class Session:
        def __init__(self, inputs, outputs):
            self.names = inputs, outputs

        def get_inputs(self):
            return [Node(n) for n in self.names[0]]

        def get_outputs(self):
            return [Node(n) for n in self.names[1]]

        def run(self, names, feed):
            assert names == ["y"] and feed["x"].dtype == np.float64
            return [feed["x"][:, :1]]

    for inputs, outputs in ((["obs", "goal"], ["action"]), (["obs"], ["mean", "std"])):
        with pytest.raises(ValueError, match="expected observations alone"):
            OnnxPolicy(Session(inputs, outputs))
    foreign = CorrectedAgent(Session(["x"], ["y"]), *halved(), **ABOUT)
    assert foreign.predict(np.full(3, 0.5, np.float32))[0] == pytest.approx(0.25)


def test_a_blend_is_between_both():
    agent = BlendedAgent(Halves(), Given([-1.0]), 0.25, **ABOUT)
    assert agent.predict(np.zeros((2, 3)))[0] == pytest.approx(0.75 * 0.4 - 0.25)
    assert agent.session()(np.zeros((2, 3), np.float32), np.arange(2)) == pytest.approx(0.75 * 0.8 - 0.25)
    assert agent.method == "Halves, blended with Given (weight 0.25)"
    with pytest.raises(ValueError, match="weight"):
        BlendedAgent(Halves(), Given([0.0]), 1.5, **ABOUT)


def test_returns_are_normalised_by_the_datas_reference_scores():
    info = DatasetInfo("toy", None, ref_min_score=-10.0, ref_max_score=10.0)
    assert PolicyAgent(Halves(), **ABOUT, info=info).normalized(np.array([0.0])) == pytest.approx(50.0)
    assert PolicyAgent(Halves(), **ABOUT).normalized(np.array([0.0])) is None


# -- what is refused ------------------------------------------------------------------------------


def test_what_does_not_act_or_acts_elsewhere_is_refused(sac):
    for policy in (object(), "runs/td3"):
        with pytest.raises(TypeError, match=r"predict|no ONNX file"):
            PolicyAgent(policy, **ABOUT)
    wide = gym.spaces.Box(-2.0, 2.0, (1,), np.float32)
    with pytest.raises(ValueError, match="action_space"):
        PolicyAgent(sac, **ABOUT | {"action_space": wide})
    with pytest.raises(ValueError, match="observation_space"):
        PolicyAgent(sac, **ABOUT | {"observation_space": gym.spaces.Box(-1, 1, (2,), np.float32)})
    with pytest.raises(TypeError, match="flat observations"):
        PolicyAgent(Halves(), **ABOUT | {"observation_space": gym.spaces.Dict({"a": BOX3})})
    with pytest.raises(ValueError, match="shape"):
        PolicyAgent(Halves(), **ABOUT).predict(np.zeros((2, 4)))


def test_levels_that_were_not_trained_are_refused():
    for settings in ({"sigma_end": 0.01}, {"sigma_start": 2.0}, {"eta_state": 1.0, "sigma_state": 1.5}):
        with pytest.raises(ValueError, match=r"outside those of the training, 0\.03 to 1"):
            corrected(Given([2.0, 0.5]), **settings)
    corrected(Given([2.0, 0.5]), sigma_end=0.03)  # the ends themselves are fine
    net = model()
    net.joint = None
    with pytest.raises(ValueError, match="densities='both'"):
        corrected(Given([2.0, 0.5]), net, score_on="joint")


def test_it_cannot_be_saved_or_exported(tmp_path):
    agent = corrected(Given([2.0, 0.5]))
    for ask in (lambda: agent.save(tmp_path / "x"), lambda: agent.export(tmp_path / "x.onnx"), agent.document):
        with pytest.raises(ValueError, match="Given, corrected"):
            ask()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "settings",
    [
        {"eta_action": -0.1}, {"eta_state": math.inf}, {"sigma_end": 2.0}, {"sigma_end": 0.0}, {"sigma_state": 0.0},
        {"steps": ()}, {"steps": (2, 0)}, {"score_on": "both"}, {"combine": "mix"}, {"state_grad_at": "here"},
    ],
)  # fmt: skip
def test_impossible_settings_are_refused(settings):
    (name,) = settings
    with pytest.raises(ValueError, match=name):
        CorrectionConfig(**settings)


def test_the_defaults_are_those_of_the_reconstruction():
    found = dataclasses.asdict(CorrectionConfig())
    assert (found["eta_action"], found["eta_state"], found["sigma_start"], found["sigma_end"]) == (0.5, 0.0, 1.0, 0.12)
    assert found["steps"] == (2, 3, 4, 5) and found["skip_in_data"] and found["clip_steps"]
