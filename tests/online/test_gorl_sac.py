"""GoRL on SAC: what its first stage equals, what goes to the environment, and what a fit keeps."""

import gymnasium as gym
import numpy as np
import pytest
import torch
from helpers.agents import NOISY, assert_same_tensors, quiet
from helpers.envs import Noisy, env_id
from torch import nn

from ctrlrl import api
from ctrlrl.engine.config import ConfigError
from ctrlrl.engine.seeding import generator
from ctrlrl.nets.actors import QNetworkConfig, SquashedGaussianActor
from ctrlrl.online.gorl_sac import GoRLSAC, LatentActor

SAC = {
    "replay_size": 400, "batch_size": 8, "learning_starts": 8, "iteration_steps": 8, "learning_rate": 1e-2,
    "replay_ratio": 0.25, "actor_hidden": (8,), "critic_hidden": (8,), "device": "cpu", "threads": 1,
    "eval_every": None, "n_envs": 2,
}  # fmt: skip
OWN = {
    "decoder_hidden": (8, 8), "decoder_steps": 2, "refine_epochs": 3, "refine_steps": 20,
    "refine_learning_rate": 3e-2,
}  # fmt: skip
STEPS = 240
"""Of which the stages have 120, 60 and 60."""
LOPSIDED = gym.spaces.Box(np.float32([-0.1, -2.0]), np.float32([0.3, 7.0]))


class Echo(gym.Env):
    """The observation is the action received, with the step; its bounds are lopsided."""

    observation_space = gym.spaces.Box(-np.inf, np.inf, (3,), np.float32)
    action_space = LOPSIDED

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.t = 0
        return np.zeros(3, np.float32), {}

    def step(self, action):
        self.t += 1
        return np.float32([*action, self.t]), float(action[0]), False, self.t == 9, {}


class Plain(Noisy):
    """A dict of a vector and an integer."""

    observation_space = gym.spaces.Dict(
        {"vector": gym.spaces.Box(-np.inf, np.inf, (3,), np.float32), "mode": gym.spaces.Discrete(4, start=2)}
    )

    def reset(self, **options):
        obs, info = super().reset(**options)
        return {"vector": obs, "mode": 2}, info

    def step(self, action):
        obs, *rest = super().step(action)
        return {"vector": obs, "mode": int(self.np_random.integers(2, 6))}, *rest


for _cls in (Echo, Plain):
    gym.register(f"gorl_sac/{_cls.__name__}-v0", _cls)
ECHO, DICT = (f"gorl_sac/{name}-v0" for name in ("Echo", "Plain"))


def make(env=NOISY, **settings):
    settings = SAC | OWN | settings
    if not isinstance(env, str):
        settings.pop("n_envs")
    return api.make("gorl_sac", env, **settings)


class Watch:
    """Calls ``note(agent, metrics)`` after every iteration; an answer of False ends the run."""

    def __init__(self, note):
        self.note = note

    def on_update(self, agent, steps, metrics):
        return self.note(agent, metrics)


def rows_of(agent):
    return agent.replay.rows(agent.replay.oldest, agent.replay.added)


# -- the policy -----------------------------------------------------------------------------------


class Affine(nn.Module):
    """g(s, eps) = s + (3, 0.5) eps."""

    def features(self, obs):
        return obs

    def forward(self, features, noise):
        return features + torch.tensor([3.0, 0.5]) * noise


def actor(space=LOPSIDED):
    network = QNetworkConfig(actor_hidden=(8,))
    return LatentActor(gym.spaces.Box(-1.0, 1.0, (2,)), space, network)


def test_the_environment_gets_what_the_decoder_makes_of_the_latent_through_the_tanh_map():
    policy = actor()
    latent, obs = torch.tensor([[0.3, -1.0], [-2.0, 0.5]]), torch.tensor([[0.4, 1.0], [5.0, -0.5]])
    low, high = LOPSIDED.low, LOPSIDED.high

    def mapped(u):
        return low + (high - low) * (np.tanh(u) + 1) / 2

    sent = policy.to_env(obs, latent.tanh()).numpy()
    np.testing.assert_allclose(sent, mapped(latent.numpy()), atol=1e-5)
    policy.decoder, policy.decoding = Affine(), True
    sent = policy.to_env(obs, latent.tanh()).numpy()
    np.testing.assert_allclose(sent, mapped(obs.numpy() + [3.0, 0.5] * latent.numpy()), atol=1e-5)


def test_float32_gives_latents_back_and_none_is_infinite():
    policy, latent = actor(), torch.linspace(-5.0, 5.0, 20_001)
    assert (policy.latent(latent.tanh()) - latent).abs().max() < 4e-4
    assert policy.latent(torch.tensor([-1.0, 1.0])).tolist() == pytest.approx([-8.66, 8.66], abs=0.01)


def test_until_it_is_fitted_the_policy_is_that_of_sac():
    torch.manual_seed(0)
    mine = actor()
    torch.manual_seed(0)
    theirs = SquashedGaussianActor(gym.spaces.Box(-1.0, 1.0, (2,)), LOPSIDED, QNetworkConfig(actor_hidden=(8,)))
    obs, noise = torch.randn(64, 2), 3.0 * torch.randn(64, 2)
    for a, b in ((mine.act(obs, noise), theirs.act(obs, noise)), (mine.mode(obs), theirs.mode(obs))):
        assert torch.equal(a, b)
        assert torch.equal(mine.to_env(obs, a), theirs.to_env(obs, b))
    u = theirs(obs).pre_tanh(noise)
    assert torch.equal(mine(obs).log_prob(u), theirs(obs).log_prob(u))


# -- the first stage ------------------------------------------------------------------------------


def curve(agent, count):
    seen = []

    def note(agent, metrics):
        seen.append({k: v for k, v in metrics.items() if k.startswith("train/")})
        return len(seen) < count

    quiet(agent, STEPS, callbacks=[Watch(note)])
    return seen


@pytest.mark.parametrize("decoder", ["flow", "diffusion", "gaussian"])
def test_the_first_stage_is_sac_bit_for_bit_warm_up_included(decoder):
    mine, plain = make(decoder=decoder), api.make("sac", NOISY, **SAC)
    curves = [curve(each, 14) for each in (mine, plain)]
    assert len(curves[0]) == 14 and "train/actor_loss" in curves[0][-1]
    assert curves[0] == curves[1]
    theirs = plain.tensors()
    found = {k: v for k, v in mine.tensors().items() if k in theirs}
    assert_same_tensors(found, theirs)
    assert all(k.startswith("policy/decoder.") for k in mine.tensors().keys() - theirs.keys())
    assert_same_tensors(rows_of(mine), rows_of(plain))


# -- between two stages ---------------------------------------------------------------------------


def fitted(**settings):
    """What tanh(eps), eps ~ N(0, 1), becomes after a fit to a policy of mean 0.8 and deviation 0.4, before the map."""
    agent = make(
        env_id("ActionEcho"), refine_steps=2000, refine_epochs=20, refine_batch_size=100, refine_learning_rate=3e-3,
        decoder_hidden=(32, 32), decoder_steps=10, iteration_steps=400, **settings,
    )  # fmt: skip
    with torch.no_grad():
        agent.policy.begin_at_prior()
        agent.policy.mean.bias.fill_(0.8)
        agent.policy.log_std.bias.fill_(np.log(0.4))
    agent.phase, agent.refine_steps = "collect", 2000
    agent._border()
    while agent.stage == 0:
        agent._iterate()
    obs = torch.full((4000, 1), 0.66)
    noise = torch.randn(4000, 1, generator=torch.Generator().manual_seed(0))
    return agent.policy.to_env(obs, agent.policy.act(obs, noise)).atanh()


def test_a_fresh_latent_policy_keeps_what_the_stage_learnt_through_the_new_decoder():
    actions = fitted()
    assert float(actions.mean()) == pytest.approx(0.8, abs=0.06)
    assert float(actions.std()) == pytest.approx(0.4, abs=0.1)  # ten Euler steps narrow it


def test_a_decoder_fitted_to_the_latents_in_use_loses_the_stage_with_the_reset():
    assert float(fitted(refine_latents="used").std()) > 0.7


def test_a_stage_begins_at_the_prior_with_nothing_learnt_and_an_empty_replay():
    seen, ends = [], {}

    def note(agent, metrics):
        if agent.phase == "collect" and metrics["stage/phase"] == 0.0:
            assert agent.replay is None and agent.debt == 0.0
            ends[agent.stage] = {k: v.clone() for k, v in agent.learner.state.items()}
        if agent.phase == "latent" and metrics["stage/phase"] == 2.0:
            modules, state, old = agent.learner.modules, agent.learner.state, ends[agent.stage - 1]
            policy = agent.policy(torch.randn(32, 3))
            assert policy.mean.abs().max() == policy.log_std.abs().max() == 0.0
            assert float(modules["temperature"]()) == 0.0 != float(old["temperature"])
            for name in ("actor", "critic", "temperature"):
                assert not any(state[f"{name}/{k}"].any() for k in ("m", "v", "clock"))
                assert old[f"{name}/m"].any() and not torch.equal(state[name], old[name])
            assert torch.equal(state["critic"], state["critic_target"])
            assert agent.replay is None and agent.policy.decoding and not agent.recent
            seen.append(state["critic"].clone())

    quiet(make(), STEPS, callbacks=[Watch(note)])
    assert len(seen) == 2 and not torch.equal(*seen)


def test_a_stages_warm_up_draws_latents_from_the_prior_and_trains_nothing():
    agent = make(ECHO, learning_starts=24)
    noted = {}

    def note(agent, metrics):
        if (agent.stage, agent.phase, metrics["stage/phase"]) == (1, "latent", 2.0):
            noted["updates"] = agent.learner.updates
        elif agent.stage == 1 and "rows" not in noted and agent.replay is not None:
            assert len(agent.replay) == 8
            noise = generator(agent.seed, "act", agent.iteration - 1)
            prior = torch.cat([torch.randn(1, 2, 2, generator=noise)[0] for _ in range(4)])
            noted["rows"] = torch.equal(rows_of(agent)["action"], prior.tanh())
        elif agent.stage == 1 and agent.replay is not None and len(agent.replay) == 24:
            noted["none yet"] = agent.learner.updates == noted["updates"]
            return False
        return None

    quiet(agent, 400, callbacks=[Watch(note)])
    assert noted["updates"] > 0 and noted["rows"] and noted["none yet"]


def test_the_replay_holds_the_stages_latents_and_the_environment_got_their_decoded_actions():
    agent = make(ECHO)
    began = []
    quiet(agent, STEPS, callbacks=[Watch(lambda a, m: began.append(a.steps) if a.stage < 2 else None)])
    assert agent.replay.added == agent.steps - began[-1]
    rows = rows_of(agent)
    assert_same_tensors(
        dict(agent.policy.decoder.state_dict()), dict(agent.learner.modules["actor"].decoder.state_dict())
    )
    middle, half = ((LOPSIDED.high + s * LOPSIDED.low) / 2 for s in (1, -1))

    def sent(u):
        return middle + half * torch.tanh(u).numpy()

    latent = rows["action"].double().atanh().float()
    decoded = agent.policy.decoder(rows["obs"], latent)
    np.testing.assert_allclose(rows["next_obs"][:, :2].numpy(), sent(decoded), atol=1e-4)
    assert np.abs(rows["next_obs"][:, :2].numpy() - sent(latent)).max() > 0.05


def test_pairs_are_fresh_decoded_actions_before_the_map_with_the_latents_that_led_to_them(monkeypatch):
    kept = []
    original = GoRLSAC.agent_class()._refinement

    def keep(self):
        kept.append(({k: torch.cat(v) for k, v in self._pairs.items()}, self.policy.decoding))
        return original(self)

    monkeypatch.setattr(GoRLSAC.agent_class(), "_refinement", keep)
    agent = make(ECHO)
    decoders = {}

    def note(agent, metrics):
        decoders.setdefault(agent.stage, {k: v.clone() for k, v in agent.policy.decoder.state_dict().items()})

    quiet(agent, STEPS, callbacks=[Watch(note)])
    (first, fitted_first), (second, fitted_second) = kept
    assert (fitted_first, fitted_second) == (False, True)
    assert torch.equal(first["action"], first["latent"])
    agent.policy.decoder.load_state_dict(decoders[1])
    torch.testing.assert_close(second["action"], agent.policy.decoder(second["features"], second["latent"]))
    assert len(first["action"]) == len(second["action"]) == 20
    assert first["action"].abs().max() > 0.3  # the first bound, which the map would not let through


def test_training_the_latent_policy_leaves_the_decoder_alone_and_the_fit_all_else():
    changes = {"latent": set(), "collect": set(), "fit": set()}
    last = {}

    def note(agent, metrics):
        now = {k: v.clone() for k, v in agent.tensors().items() if not k.startswith("refinement/")}
        if last and last["stage"] == agent.stage:
            changes[last["phase"]] |= {k for k in now if not torch.equal(now[k], last["tensors"][k])}
        last.update(stage=agent.stage, phase=agent.phase, tensors=now)

    agent = make()
    quiet(agent, STEPS, callbacks=[Watch(note)])
    assert changes["collect"] == changes["fit"] == set()
    assert {"policy/mean.weight", "learner/critic/m", "learner/temperature/net/log"} <= changes["latent"]
    assert not any("decoder" in k for k in changes["latent"])
    assert not any(name.startswith("decoder") for name in agent.learner.flats["actor"].names)


# -- stages ---------------------------------------------------------------------------------------


class Stages:
    """(stage, phase, steps) of every iteration."""

    def __init__(self):
        self.rows = []

    def on_update(self, agent, steps, metrics):
        self.rows.append((int(metrics["stage/index"]), int(metrics["stage/phase"]), agent.steps))


def test_stages_follow_one_another_with_a_fit_between_and_the_shares_of_the_steps():
    seen, agent = Stages(), make()
    quiet(agent, STEPS, callbacks=[seen])
    kinds = [(s, p) for s, p, _ in seen.rows]
    assert sorted(set(kinds)) == [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1), (1, 2), (2, 0)]
    assert kinds == sorted(kinds)
    ends = {kind: max(n for s, p, n in seen.rows if (s, p) == kind) for kind in set(kinds)}
    assert agent.ends == [120, 180, 240]
    assert ends[0, 0] == 120 and 180 <= ends[1, 0] < 188
    assert ends[0, 1] - ends[0, 0] == ends[1, 1] - ends[1, 0] == 20
    assert kinds.count((0, 2)) == kinds.count((1, 2)) == 3  # refine_epochs
    assert 240 <= agent.steps < 248
    assert agent.collector.n_steps == 1  # collecting for a fit goes in longer rounds
    quiet(agent, 40)
    assert (agent.stage, agent.phase) == (2, "latent") and agent.steps >= 280


def test_one_step_in_a_hundred_is_collected_by_default_and_a_stage_must_outlast_its_warm_up():
    config, own = api.get_method("gorl_sac").blueprint()
    assert own.plan(0, 4_000_000, config, 1000) == ([2_000_000, 3_000_000, 4_000_000], 20_000)
    assert own.plan(0, 62_000, config, 1000)[1] == 310
    for steps in (20_000, 44_000):  # the first stage, and a later one
        with pytest.raises(ConfigError, match=r"stages=.* learning_starts=10,000"):
            own.plan(0, steps, config, 1000)


def test_with_one_stage_it_is_sac_to_the_end():
    agent, plain = make(stages=(1.0,)), api.make("sac", NOISY, **SAC)
    for each in (agent, plain):
        quiet(each, 40)
    assert agent.stage == 0 and not agent.policy.decoding
    assert_same_tensors(rows_of(agent), rows_of(plain))
