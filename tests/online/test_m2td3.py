"""M2TD3: the worst candidate and the actor under critics known in closed form, restarts, and episodes' parameters."""

import numpy as np
import pytest
import torch
from gymnasium.spaces import Box
from helpers.agents import assert_same_tensors
from online.dials import DIALS, TINY, quiet, rows
from torch import nn

import ctrlrl
from ctrlrl import api
from ctrlrl.data.transitions import Transitions
from ctrlrl.engine.algorithm import Spaces
from ctrlrl.engine.config import ConfigError
from ctrlrl.engine.learner import Learner
from ctrlrl.engine.off_policy_config import OffPolicyConfig
from ctrlrl.online.m2td3 import M2TD3, logits
from ctrlrl.types import EnvSpec


def make(env=DIALS, **settings):
    return api.make("m2td3", env, **TINY | settings)


class Known(nn.Module):
    """A pair of critics that say ``value(obs, action, params)`` and, so that only the first can be meant, minus it."""

    def __init__(self, value):
        super().__init__()
        self.value, self.shift = value, nn.Parameter(torch.zeros(()))

    def forward(self, obs, action, params):
        q = self.value(obs, action, params) + self.shift + 0.0 * action[:, 0]
        return torch.stack([q, -q])


def learner(value, points, chances=None, rate=0.5, learning_rate=0.1, **settings):
    """A learner whose critic is fixed, with candidates at ``points`` [K, d] of [-1, 1]^d."""
    config = OffPolicyConfig(critic_learning_rate=0.0, learning_rate=learning_rate, device="cpu")
    points = torch.tensor(points)
    algorithm = M2TD3(**{"policy_delay": 1, "candidates": len(points)} | settings)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        spaces = Spaces(Box(-1.0, 1.0, (1,), np.float32), Box(-1.0, 1.0, (1,), np.float32), points.shape[1])
        actor, trained, copies = algorithm.networks(spaces, config, None)
    modules = {"actor": actor, **trained, "critic": Known(value)}
    made = Learner(algorithm, modules, copies, config, torch.device("cpu"), False)
    algorithm.prepare(made)
    table(made)[:, : points.shape[1]] = logits((points + 1.0) / 2.0)
    if chances is not None:
        table(made)[:, -1] = torch.tensor(chances)
    made.knobs["chance_rate"].fill_(rate)
    return made


def table(learner):
    """[K, 3 d + 2]: logits, two moments, clock, chance."""
    return learner.modules["candidates"].table


def update(learner, obs=1.0, noise=None):
    size = learner.modules["candidates"].dims
    one, zero = torch.ones(4, 1), torch.zeros(4)
    batch = Transitions(obs * one, 0.3 * one, zero + 2.0, zero, obs * one, {"params": torch.full((4, size), 0.5)})
    noise = noise or {"next_action": torch.zeros(1, 4, 1), "next_params": torch.zeros(1, 4, size)}
    return {k: float(v[0]) for k, v in learner.run(batch, noise, 1).items()}


def points(learner):
    return learner.modules["candidates"]().detach().clone()


# -- max and min ----------------------------------------------------------------------------------


def test_the_worst_candidate_goes_to_the_minimising_corner_and_the_others_stay():
    player = learner(lambda o, a, w: 3.0 * w[:, 0] - 2.0 * w[:, 1], [[0.5, 0.5], [0.0, 0.2], [0.9, 0.0]])
    start = points(player)
    for _ in range(200):
        update(player)
    assert points(player)[1].tolist() == pytest.approx([-1.0, 1.0], abs=2e-2)
    assert torch.equal(points(player)[[0, 2]], start[[0, 2]])


def test_candidates_stay_in_the_set_whatever_the_step():
    player = learner(lambda o, a, w: 1e6 * w[:, 0], [[0.5], [0.4]], learning_rate=50.0)
    for _ in range(20):
        update(player)
        assert points(player).abs().max() <= 1.0


def test_every_candidate_has_an_adam_of_its_own():
    """Which is the worst alternates with the sign of the observation; each moves as torch.optim.Adam alone would."""
    start = [[-0.5], [0.1], [0.6]]
    player = learner(lambda o, a, w: (o * w)[:, 0], start)
    expected = [logits((torch.tensor(x) + 1.0) / 2.0).requires_grad_() for x in start]
    optimisers = [torch.optim.Adam([x], lr=0.1) for x in expected]
    for sign in (1, 1, -1, 1, -1, -1, -1, 1, -1, 1):
        update(player, float(sign))
        k = min(range(3), key=lambda i: sign * float(expected[i].detach()))
        optimisers[k].zero_grad()
        (sign * (2.0 * torch.sigmoid(expected[k]) - 1.0)).sum().backward()
        optimisers[k].step()
        torch.testing.assert_close(table(player)[:, :1].detach(), torch.stack(expected).detach())


@pytest.mark.parametrize(("soft", "slope"), [(False, -0.4), (True, 0.2 * -0.4 + 0.8 * 0.9)])
def test_the_actor_climbs_at_the_worst_candidate_or_at_the_weighted_mean(soft, slope):
    """Q = (a + 2) w with candidates at -.4 and .9: the worst pulls the action down, the mean with .2 and .8 up."""
    player = learner(lambda o, a, w: ((a + 2.0) * w)[:, 0], [[-0.4], [0.9]], [0.2, 0.8], learning_rate=1e-2, soft=soft)
    obs = torch.ones(1, 1)
    before = float(player.modules["actor"](obs))
    found = update(player)
    assert found["actor_loss"] == pytest.approx(-slope * (before + 2.0), rel=1e-5), "at candidates and chances as found"
    assert found["worst_q"] == pytest.approx(-0.4 * (before + 2.0), rel=1e-5), "at the actor as it was"
    assert (float(player.modules["actor"](obs)) - before) * slope > 0.0
    assert points(player)[0] < -0.4 and points(player)[1] == pytest.approx(0.9), "the worst alone descends"


def test_the_chances_follow_the_worst_candidate():
    player = learner(lambda o, a, w: w[:, 0], [[0.5], [-0.5]], [0.6, 0.4], rate=0.1)
    update(player)
    assert table(player)[:, -1].tolist() == pytest.approx([0.54, 0.46])


def test_the_chances_move_at_one_over_the_length_of_the_last_episode():
    player = learner(lambda o, a, w: w[:, 0], [[0.5], [-0.5]])
    player.algorithm.ended(player, [(1.0, 10), (2.0, 40)])
    assert float(player.knobs["chance_rate"]) == pytest.approx(1 / 40)
    player.algorithm.ended(player, [])
    assert float(player.knobs["chance_rate"]) == pytest.approx(1 / 40)


def test_the_agent_tells_the_length_of_every_episode():
    agent = quiet(make(), 60)
    assert float(agent.learner.knobs["chance_rate"]) == pytest.approx(1 / agent.recent[-1][1])


def test_the_target_takes_noisy_parameters_near_those_of_the_transition():
    """Q = 10 w: r + gamma * min over the pair, w = clip(.5 + clip(.2 * noise, -.5, .5), -1, 1)."""
    for drawn, near in ((1.0, 0.7), (-1.0, 0.3), (9.0, 1.0), (-9.0, 0.0)):
        player = learner(lambda o, a, w: 10.0 * w[:, 0], [[0.5], [-0.5]])
        noise = {"next_action": torch.zeros(1, 4, 1), "next_params": torch.full((1, 4, 1), drawn)}
        target = 2.0 + 0.99 * -abs(10.0 * near)
        expected = (5.0 - target) ** 2 + (-5.0 - target) ** 2
        assert update(player, noise=noise)["critic_loss"] == pytest.approx(expected, rel=1e-4)


def test_actor_and_candidates_wait_for_every_second_update():
    player = learner(lambda o, a, w: (a * w)[:, 0], [[0.5], [-0.5]], policy_delay=2)
    for found in (update(player), update(player), update(player)):
        assert ("actor_loss" in found) == ("worst_q" in found)
    assert float(player.state["actor/clock"]) == 1.0 and float(table(player)[:, 3].sum()) == 1.0


# -- restarts and choices -------------------------------------------------------------------------


def restarted(where, chances, **settings):
    player = learner(lambda o, a, w: w[:, 0], where, chances, **settings)
    size = len(where[0])
    memory = table(player)[:, size:-1]
    memory.fill_(7.0)
    before = points(player)
    done = player.algorithm.restart(player, torch.Generator().manual_seed(0))
    stays = [i for i in range(len(where)) if i not in done]
    assert torch.equal(points(player)[stays], before[stays])
    assert all(not torch.equal(points(player)[i], before[i]) for i in done)
    assert (memory[done] == 0.0).all() and (memory[stays] == 7.0).all() and memory.shape[1] == 2 * size + 1
    return done, table(player)[:, -1].tolist()


def test_the_first_of_two_candidates_close_to_each_other_is_drawn_anew():
    """Distances in shares of the range: .18 in [-1, 1] is .09. Its chance becomes the mean of the others'."""
    done, chances = restarted([[0.9], [0.1], [0.28]], [0.5, 0.3, 0.2])
    assert done == [1] and chances == pytest.approx([0.5 / 1.05, 0.35 / 1.05, 0.2 / 1.05])


def test_distances_add_up_over_the_parameters():
    near = [[0.0, 0.0], [0.12, 0.12]]  # .06 + .06
    assert restarted(near, [0.5, 0.5])[0] == []
    assert restarted(near, [0.5, 0.5], restart_distance=0.13)[0] == [0]


def test_a_candidate_that_is_hardly_ever_the_worst_is_drawn_anew():
    done, chances = restarted([[-0.9], [0.0], [0.9]], [0.66, 0.3, 0.04])
    assert done == [2] and chances == pytest.approx([0.66 / 1.44, 0.3 / 1.44, 0.48 / 1.44])
    assert restarted([[-0.9], [0.0], [0.9]], [0.64, 0.3, 0.06])[0] == []
    assert restarted([[-0.9], [0.0], [0.9]], [0.66, 0.3, 0.04], restart_probability=0.0)[0] == []


def test_new_candidates_are_uniform_in_the_set():
    player = learner(lambda o, a, w: w[:, 0], [[0.0], [0.0]])
    drawn = torch.Generator().manual_seed(1)
    found = []
    for _ in range(400):
        table(player)[:, 0] = 0.0
        player.algorithm.restart(player, drawn)
        found.append(float(points(player)[0]))
    assert float(np.mean(found)) == pytest.approx(0.0, abs=0.1)
    assert float(np.std(found)) == pytest.approx(3**-0.5, abs=0.05)


def test_an_episode_takes_a_candidate_by_its_chance_with_noise():
    where, chances = [[-0.5], [0.5], [0.9]], [0.3, 0.7, 0.0]
    kept = {"restart_probability": 0.0, "parameter_noise": 0.0}
    drawn = torch.Generator().manual_seed(0)
    player = learner(lambda o, a, w: w[:, 0], where, chances, **kept)
    taken = player.algorithm.choose(player, 2_000, None, drawn, 0.0)
    assert float((taken < 0).float().mean()) == pytest.approx(0.3, abs=0.04) and float(taken.max()) < 0.6
    noisy = learner(lambda o, a, w: w[:, 0], where, [1.0, 0.0, 0.0], **kept | {"parameter_noise": 0.1})
    taken = noisy.algorithm.choose(noisy, 2_000, None, drawn, 1.0)
    assert float(taken.std()) == pytest.approx(0.1, abs=0.01) and float(taken.mean()) == pytest.approx(-0.5, abs=0.01)
    wild = learner(lambda o, a, w: w[:, 0], where, chances, **kept | {"parameter_noise": 1.0})
    taken = wild.algorithm.choose(wild, 2_000, None, drawn, 0.0)
    assert float(taken.min()) == -1.0 and float(taken.max()) == 1.0


@pytest.mark.parametrize(("progress", "deviation"), [(0.0, 0.2), (0.25, 0.15), (0.5, 0.1), (0.9, 0.1)])
def test_the_noise_on_the_parameters_can_fall_over_the_first_half_of_the_run(progress, deviation):
    settings = {"restart_probability": 0.0, "parameter_noise": 0.2, "parameter_noise_final": 0.1}
    player = learner(lambda o, a, w: w[:, 0], [[0.0], [0.9]], [1.0, 0.0], **settings)
    taken = player.algorithm.choose(player, 4_000, None, torch.Generator().manual_seed(0), progress)
    assert float(taken.std()) == pytest.approx(deviation, rel=0.05)


# -- what the environment is given ----------------------------------------------------------------


@pytest.mark.parametrize("n_envs", [1, 3])
def test_parameters_hold_for_an_episode_and_are_in_the_replay(n_envs):
    agent = quiet(make(n_envs=n_envs, iteration_steps=30, replay_ratio=0.1, parameter_noise=0.1), 300)
    found, params = rows(agent)
    for k, name in ((1, "gain"), (2, "tilt")):
        torch.testing.assert_close(found["next_obs"][:, k].double(), params[name], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(found["reward"].double(), params["gain"], rtol=1e-6, atol=1e-6)
    over = (found["terminated"] + found["truncated"]).view(-1, n_envs).bool()[:-1]
    changed = (params["gain"].view(-1, n_envs).diff(dim=0) != 0) | (params["tilt"].view(-1, n_envs).diff(dim=0) != 0)
    assert over.any() and torch.equal(changed, over)


def test_the_warm_up_draws_uniformly_and_candidates_come_after_it():
    agent = make(
        learning_starts=600, iteration_steps=600, parameter_noise=0.0, learning_rate=0.0, restart_probability=0.0,
        replay_ratio=0.1,
    )  # fmt: skip
    table(agent.learner)[:, 0] = torch.arange(5.0) - 2.0  # far from each other
    agent.adversary.__dict__["ended"] = lambda *_: None  # chances that move slowly
    quiet(agent, 1_200)
    column = agent.replay.rows(0, 1_200)["extras/params"]
    early, late = column[:600].unique(dim=0), column[700:].unique(dim=0)
    assert len(early) > 60 and float(early.min()) < -0.9 and float(early.max()) > 0.9
    assert 1 < len(late) <= 5
    known = {tuple(p) for p in points(agent.learner).tolist()}
    assert {tuple(p) for p in late.tolist()} <= known


class Killed(Exception):
    pass


class KillAt:
    def __init__(self, iteration):
        self.iteration = iteration

    def on_update(self, agent, step, metrics):
        if agent.iteration == self.iteration:
            raise Killed


def test_a_run_that_was_killed_and_resumed_equals_one_that_was_not(tmp_path):
    settings = {"checkpoint_every": 1, "n_envs": 2, "seed": 3, "learning_rate": 1e-1, "parameter_noise_final": 0.1}
    whole = quiet(make(**settings), 250, run_dir=tmp_path / "whole")
    with pytest.raises(Killed):
        quiet(make(**settings), 250, run_dir=tmp_path / "killed", callbacks=[KillAt(13)])
    with pytest.raises(Killed):
        again = api.load(tmp_path / "killed")
        again.resume(tmp_path / "killed", progress=False, tensorboard=False, callbacks=[KillAt(22)])
    agent = api.load(tmp_path / "killed").resume(tmp_path / "killed", progress=False, tensorboard=False)
    assert_same_tensors(whole.tensors(), agent.tensors())
    for name in ("tilt", "gain"):
        assert torch.equal(rows(whole)[1][name], rows(agent)[1][name])
    # the comparison is worth something only if candidates had moved and been restarted
    clock = table(whole.learner)[:, -2]
    assert 0.0 < float(clock.sum()) < 0.5 * whole.learner.updates - 10


def test_training_twice_on_processes_of_their_own(tmp_path):
    agent = make(EnvSpec(DIALS, n_envs=2, backend="async"))
    quiet(quiet(agent, 20), 20)
    found, params = rows(agent)
    torch.testing.assert_close(found["reward"].double(), params["gain"], rtol=1e-6, atol=1e-6)


# -- what is refused ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings",
    [
        {"candidates": 0}, {"restart_probability": 0.2}, {"restart_distance": -0.1},
        {"parameter_noise": -1.0}, {"policy_delay": 0},
    ],
)  # fmt: skip
def test_settings_out_of_range_are_refused(settings):
    with pytest.raises(ConfigError, match=next(iter(settings))):
        make(**settings)


def test_defaults_are_the_published_ones_but_for_the_warm_up():
    assert ctrlrl.M2TD3.method == "m2td3"
    config, own = ctrlrl.M2TD3.blueprint()
    assert (config.batch_size, config.learning_rate, config.learning_starts) == (100, 3e-4, 10_000)
    assert (own.candidates, own.policy_delay, own.restart_probability, own.parameter_noise) == (5, 2, 0.05, 1.0)
    assert ctrlrl.M2TD3.blueprint("published")[0].learning_starts == 100_000
    assert ctrlrl.M2TD3.blueprint("soft")[1].soft
