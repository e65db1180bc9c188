"""GoRL: what its decoder keeps of a stage, what an exact fit cannot make, and stages that a stop cannot disturb."""

from collections import deque

import gymnasium as gym
import numpy as np
import pytest
import torch
from ctrlrl_envs.multimodal import hidden_bit
from helpers.agents import NOISY, assert_same_tensors, quiet

from ctrlrl import api
from ctrlrl.losses import base as losses
from ctrlrl.online.gorl_agent import GoRL

SMALL = {
    "n_steps": 16, "batch_size": 16, "epochs": 2, "actor_hidden": (8,), "critic_hidden": (8,), "device": "cpu",
    "threads": 1, "eval_every": None, "decoder_hidden": (8, 8), "decoder_steps": 2, "refine_epochs": 3,
    "refine_steps": 40, "n_envs": 2, "stages": (0.4, 0.3, 0.3),
}  # fmt: skip


class Bump(gym.Env):
    """One state, one step, reward exp(-(a - 2.5)^2 / (2 x 0.3^2))."""

    observation_space = gym.spaces.Box(-1.0, 1.0, (1,), np.float32)
    action_space = gym.spaces.Box(-np.inf, np.inf, (1,), np.float32)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return np.zeros(1, np.float32), {}

    def step(self, action):
        return np.zeros(1, np.float32), float(bump(action[0])), True, False, {}


def bump(action):
    return np.exp(-((action - 2.5) ** 2) / (2 * 0.3**2))


gym.register("test/Bump-v0", Bump)
BUMP = {
    "n_envs": 32, "n_steps": 64, "batch_size": 2048, "epochs": 4, "learning_rate": 3e-2, "eps": 0.2,
    "action_map": "clip", "actor_hidden": (8,), "critic_hidden": (8,), "entropy_coef": 0.0, "device": "cpu",
    "decoder_hidden": (64, 64, 64, 64), "stages": (0.75, 0.25), "refine_steps": 20_000, "refine_epochs": 20,
    "threads": 1, "eval_every": None,
}  # fmt: skip


def make(env=NOISY, **settings):
    return api.make("gorl", env, **SMALL | settings)


def mean_reward(agent):
    """Expected reward of the policy on Bump, from 20,000 actions."""
    obs = torch.zeros(20_000, 1)
    noise = agent.policy.noise(1, 20_000, torch.Generator().manual_seed(0))[0]
    with torch.inference_mode():
        action = agent.policy.to_env(obs, agent.policy.act(obs, noise))
    return float(bump(action.numpy()).mean())


class Watch:
    """What the policy was worth at the end of the first stage and after it; stops there."""

    def __init__(self):
        self.before = self.after = None

    def on_update(self, agent, steps, metrics):
        if metrics["stage/phase"] == 0.0 and agent.phase == "collect":
            self.before = mean_reward(agent)
        if agent.stage == 1:
            self.after = mean_reward(agent)
            return False
        return None


def consolidated(**settings):
    watch = Watch()
    agent = api.make("gorl", "test/Bump-v0", **BUMP | settings)
    quiet(agent, 160 * 2048, callbacks=[watch])
    return watch


# -- G1: the anchor and the reset are one mechanism -----------------------------------------------


@pytest.mark.slow
def test_a_fresh_latent_policy_keeps_what_the_stage_learnt_through_the_new_decoder():
    watch = consolidated()
    assert watch.before > 0.98
    assert watch.after > 0.95


@pytest.mark.slow
def test_a_decoder_fitted_to_the_latents_in_use_loses_the_stage_with_the_reset_and_only_with_it():
    lost = consolidated(refine_latents="used")
    assert lost.before > 0.98
    assert lost.after < 0.1
    assert consolidated(refine_latents="used", reset_latent=False).after > 0.95


# -- G3: closure ----------------------------------------------------------------------------------


@pytest.mark.slow
def test_modes_do_not_come_out_of_a_gaussian_in_one_state():
    """One state, two goals at -1 and 1 of which one pays: the best Gaussian wins half of the episodes (0.500), a policy
    with two modes 0.9375. The decoder of a Gaussian is affine, and so the composed policy stays a Gaussian."""
    settings = {**BUMP, "learning_rate": 1e-2, "stages": (0.4, 0.3, 0.3), "refine_steps": 5000, "entropy_coef": 0.01}
    rates = []

    class Rate:
        def on_update(self, agent, steps, metrics):
            obs = torch.zeros(20_000, *agent.observation_space.shape)
            noise = agent.policy.noise(1, 20_000, torch.Generator().manual_seed(0))[0]
            with torch.inference_mode():
                action = agent.policy.to_env(obs, agent.policy.act(obs, noise))
            rates.append((agent.stage, hidden_bit.win_rate(action.numpy().ravel(), 4, 0.2)))

    agent = api.make("gorl", "ctrlrl/HiddenBit-v0", **settings)
    quiet(agent, 60 * 2048, callbacks=[Rate()])
    assert {stage for stage, _ in rates} == {0, 1, 2}
    assert max(rate for _, rate in rates) <= 0.52


# -- G4: exactness --------------------------------------------------------------------------------


@pytest.mark.parametrize("decoder", ["flow", "diffusion", "gaussian"])
def test_the_first_stage_is_ppo_with_the_same_settings_bit_for_bit(decoder):
    agent = make(stages=(0.5, 0.5), decoder=decoder)
    plain = api.make("ppo", NOISY, preset="gorl", **{k: v for k, v in SMALL.items() if k in PLAIN})
    curves = []
    for each in (agent, plain):
        seen = []
        quiet(each, 320, callbacks=[Losses(seen, 5)])
        curves.append(seen)
    assert len(curves[0]) == 5
    assert curves[0] == curves[1]
    theirs = plain.policy.state_dict()
    assert_same_tensors({k: v for k, v in agent.policy.state_dict().items() if k in theirs}, theirs)


PLAIN = {
    "n_steps",
    "batch_size",
    "epochs",
    "actor_hidden",
    "critic_hidden",
    "device",
    "threads",
    "eval_every",
    "n_envs",
}


class Losses:
    """Keeps the loss of each iteration; stops after ``count``."""

    def __init__(self, seen, count):
        self.seen, self.count = seen, count

    def on_update(self, agent, steps, metrics):
        self.seen.append((metrics["train/loss"], metrics["train/value_loss"], metrics["time/episodes"]))
        return False if len(self.seen) == self.count else None


def test_every_stage_begins_at_the_prior_with_nothing_of_the_last_one_but_the_decoder():
    begun = []

    class Begin:
        def on_update(self, agent, steps, metrics):
            if agent.stage > len(begun):
                state = agent.updater.state
                params = agent.policy.distribution(torch.randn(64, *agent.observation_space.shape)).params()
                assert params["mean"].abs().max() == 0.0 and params["log_std"].abs().max() < 1e-6
                assert not any(part.any() for part in (state.m, state.v, state.clock))
                assert agent.policy.preprocess.normalizer.moments.count == 0
                begun.append({k: v.clone() for k, v in agent.policy.state_dict().items()})

    agent = make()
    first = {k: v.clone() for k, v in agent.policy.state_dict().items()}
    quiet(agent, 400, callbacks=[Begin()])
    assert len(begun) == 2
    for name in first:  # weights drawn anew, and another decoder
        if name.endswith("weight") and "head" not in name:
            assert not torch.equal(first[name], begun[0][name]) and not torch.equal(begun[0][name], begun[1][name])


def test_training_the_latent_policy_leaves_the_decoder_alone_and_the_fit_the_latent_policy():
    changes = {"latent": set(), "collect": set(), "fit": set()}

    class Compare:
        def __init__(self):
            self.last, self.phase, self.stage = None, "latent", 0

        def on_update(self, agent, steps, metrics):
            now = {k: v.clone() for k, v in agent.policy.state_dict().items()}
            if self.last is not None and self.stage == agent.stage:
                changes[self.phase] |= {k for k in now if not torch.equal(now[k], self.last[k])}
            self.last, self.phase, self.stage = now, agent.phase, agent.stage

    quiet(make(), 600, callbacks=[Compare()])
    assert changes["collect"] == changes["fit"] == set()
    assert changes["latent"]
    assert not any(k.startswith("decoder.") for k in changes["latent"])


def test_no_gradient_reaches_the_decoder_and_its_parameters_are_not_the_optimisers():
    agent = make()
    assert not any(p.requires_grad for p in agent.policy.decoder.parameters())
    assert agent.updater.flat.flat.numel() == sum(p.numel() for p in agent.policy.parameters() if p.requires_grad)
    assert all(not name.startswith("decoder.") for name in agent.updater.flat.names)


# -- stages ---------------------------------------------------------------------------------------


class Stages:
    """(stage, phase, steps) of every iteration."""

    def __init__(self):
        self.rows = []

    def on_update(self, agent, steps, metrics):
        self.rows.append((metrics["stage/index"], metrics["stage/phase"], agent.steps))


def test_stages_follow_one_another_with_a_fit_between_and_the_shares_of_the_steps():
    seen = Stages()
    agent = make()
    quiet(agent, 1000, callbacks=[seen])
    kinds = [(int(s), int(p)) for s, p, _ in seen.rows]
    assert sorted(set(kinds)) == [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1), (1, 2), (2, 0)]
    assert kinds == sorted(kinds)
    ends = {kind: max(n for s, p, n in seen.rows if (s, p) == kind) for kind in set(kinds)}
    assert agent.ends == [400, 700, 1000]
    assert 400 <= ends[0, 0] < 400 + 32
    assert 700 <= ends[1, 0] < 700 + 32
    # collecting takes what is asked for, rounded up to both environments' steps
    assert ends[0, 1] - ends[0, 0] == 40
    assert sum(kind == (0, 2) for kind in kinds) == 3  # refine_epochs
    assert agent.steps >= 1000


def test_one_step_in_a_hundred_is_collected_by_default():
    agent = make(refine_steps=None, stages=(0.5, 0.25, 0.25))
    seen = Stages()
    quiet(agent, 4000, callbacks=[seen])
    assert agent.refine_steps == 20
    steps = [n for _, _, n in seen.rows]
    spent = sum(b - a for a, (_, p, b) in zip([0, *steps], seen.rows, strict=False) if p == 1)
    assert spent == 40


def test_a_plateau_ends_a_stage_and_a_rising_return_holds_it_off():
    agent = make(stage_trigger="plateau", plateau_share=0.1)
    quiet(agent, 30, callbacks=[Losses([], 1)])
    assert agent.plateau_steps == 3

    def over(steps, mean):
        agent.steps = steps
        agent.recent.clear()
        agent.recent.append((mean, 5))
        return agent._stage_is_over()

    agent.plateau_steps, agent.begun_at, agent.peak_at, agent.peak = 100, 0, 0, -np.inf
    agent.recent = deque(maxlen=1)
    assert not any(over(steps, float(steps)) for steps in (90, 180, 270))
    assert not over(369, 270.0)  # no higher than at 270, but not for long
    assert over(370, 270.0)
    agent.recent = deque(maxlen=2)
    assert not over(1000, 0.0)  # too few episodes for a mean
    agent.stage, agent.recent = 2, deque(maxlen=1)
    assert not over(10_000, 0.0)  # the last stage goes on to the end


def test_schedules_run_over_each_stage():
    agent = make(learning_rate_schedule="linear", learning_rate=1e-3)
    seen = []

    class Rates:
        def on_update(self, agent, steps, metrics):
            if metrics["stage/phase"] == 0.0:
                seen.append((metrics["stage/index"], metrics["train/learning_rate"]))

    quiet(agent, 1000, callbacks=[Rates()])
    for stage in (0, 1, 2):
        rates = [rate for k, rate in seen if k == stage]
        assert rates[0] > 0.8e-3 and rates[-1] < 0.2e-3 and rates == sorted(rates, reverse=True)


def test_the_best_evaluation_of_a_stage_may_collect():
    """Evaluations fall at the end of each stage too, whose policy counts as well."""
    agent = make(collect_with="best", eval_every=32, eval_episodes=1, refine_steps=16, stages=(0.5, 0.5))
    seen = {}

    class Look:
        def on_evaluation(self, agent, steps, result):
            if agent.stage == 0:
                latent = {k: v.clone() for k, v in agent.policy.state_dict().items()}
                seen.setdefault("all", []).append((result.mean, latent))

        def on_update(self, agent, steps, metrics):
            if metrics["stage/phase"] == 1.0 and "collected" not in seen:
                seen["collected"] = {k: v.clone() for k, v in agent.policy.state_dict().items()}

    quiet(agent, 400, callbacks=[Look()])
    assert len(seen["all"]) >= 6
    best = max(mean for mean, _ in seen["all"])
    expected = next(latent for mean, latent in seen["all"] if mean == best)
    assert_same_tensors(seen["collected"], expected)


def test_the_decoder_learns_actions_before_the_bounds_with_statistics_of_its_own(monkeypatch):
    kept = []
    original = GoRL._refinement

    def keep(self):
        kept.append({k: torch.cat(v) for k, v in self._pairs.items()})
        return original(self)

    monkeypatch.setattr(GoRL, "_refinement", keep)
    agent = make(env="test/Shifted-v0", stages=(0.5, 0.5))
    quiet(agent, 300)
    (pairs,) = kept
    assert torch.equal(pairs["action"], pairs["latent"])  # the first decoder is the identity
    assert pairs["action"].abs().max() > 0.1  # which the map onto the bounds would not let through
    scaling = agent.policy.decoder.scaling
    assert torch.allclose(scaling.shift, -7.0 * scaling.scale, atol=1e-4)
    assert not torch.equal(agent.policy.preprocess.normalizer.scale, scaling.scale)


class Shifted(Bump):
    """Narrow bounds, and an observation that is always 7."""

    observation_space = gym.spaces.Box(-10.0, 10.0, (1,), np.float32)
    action_space = gym.spaces.Box(-0.1, 0.1, (1,), np.float32)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return np.full(1, 7.0, np.float32), {}


gym.register("test/Shifted-v0", Shifted)


def test_later_stages_may_clip_otherwise():
    agent = make(later_eps=0.3, later_moment_coef=1e-3, eps=0.15)
    assert agent.updater.loss.eps == 0.15
    quiet(agent, 600)
    assert agent.stage > 0
    assert (agent.updater.loss.eps, agent.updater.config.moment_coef) == (0.3, 1e-3)
    assert (agent.own.eps, agent.config.moment_coef) == (0.15, 0.0)


@pytest.mark.parametrize("loss", ["bpo", "mdpo", "spo", "grpo"])
def test_any_loss_trains_the_latent_policy(loss):
    settings = {"n_groups": 2, "group_size": 2, "horizon": 8} if loss == "grpo" else {}
    agent = make(latent=loss, **settings)
    assert isinstance(agent.loss, losses.get(loss))
    quiet(agent, 400)
    assert agent.stage > 0
    assert np.isfinite(agent.predict(agent.observation_space.sample())[0]).all()
