"""RARL: whose turn it is, on which side, and what the environment is given at every step."""

import gymnasium as gym
import numpy as np
import pytest
import torch
from helpers.agents import assert_same_tensors
from online.dials import DIALS, SADDLE, TINY, quiet, rows
from torch import nn

from ctrlrl import api
from ctrlrl.data.transitions import Transitions
from ctrlrl.engine import checkpoint
from ctrlrl.engine.algorithm import Spaces
from ctrlrl.engine.learner import Learner
from ctrlrl.engine.off_policy_config import OffPolicyConfig
from ctrlrl.engine.runfolder import read_lines
from ctrlrl.online.rarl import RARL


def make(env=DIALS, **settings):
    return api.make("rarl", env, **TINY | settings)


class Constant(nn.Module):
    def __init__(self, value):
        super().__init__()
        self.value = nn.Parameter(torch.tensor(value))

    def forward(self, obs, *inputs):
        return self.value.expand(2, obs.shape[0])


def learner(critics=None, **settings):
    config = OffPolicyConfig(device="cpu")
    algorithm = RARL(**settings)
    box = gym.spaces.Box(-1.0, 1.0, (1,), np.float32)
    actor, trained, copies = algorithm.networks(Spaces(box, box, 2), config, None)
    trained = {**trained, **{k: Constant(v) for k, v in (critics or {}).items()}}
    return Learner(algorithm, {"actor": actor, **trained}, copies, config, torch.device("cpu"), False)


def update(learner, reward=0.0, terminated=1.0):
    one = torch.ones(4, 1)
    batch = Transitions(
        one, 0.1 * one, torch.full((4,), reward), torch.full((4,), terminated), one, {"params": torch.full((4, 2), 0.2)}
    )
    noise = learner.algorithm.noise(1, 4, 1, torch.Generator().manual_seed(0), 1)
    return {k: float(v[0]) for k, v in learner.run(batch, noise, 1).items()}


def test_the_adversary_is_paid_minus_the_reward():
    """Critics that say 1 where the episode ends with reward 1: the protagonist's is right, the adversary's off by 2."""
    player = learner({"critic": 1.0, "adversary_critic": 1.0}, adversary_every=1)
    found = update(player, reward=1.0)
    assert found["critic_loss"] == 0.0 and found["adversary_critic_loss"] == pytest.approx(2 * 2.0**2)


def test_the_adversarys_future_is_added_to_its_pay_with_its_own_sign():
    player = learner({"critic": 3.0, "adversary_critic": 5.0}, adversary_every=1)
    found = update(player, reward=1.0, terminated=0.0)
    assert found["critic_loss"] == pytest.approx(2 * (3.0 - (1.0 + 0.99 * 3.0)) ** 2, rel=1e-4)
    assert found["adversary_critic_loss"] == pytest.approx(2 * (5.0 - (-1.0 + 0.99 * 5.0)) ** 2, rel=1e-4)


@pytest.mark.parametrize("every", [1, 2, 3])
def test_one_turn_of_every_so_many_is_the_adversarys_and_ends_with_its_actor(every):
    player = learner(adversary_every=every, policy_delay=2)
    assert player.algorithm.period == 2 * every
    moved = []
    for _ in range(4 * every):
        before = {k: player.state[k].clone() for k in player.modules}
        update(player)
        moved.append({k for k in before if not torch.equal(before[k], player.state[k])})
    protagonist = [{"critic"}, {"critic", "critic_target", "actor", "actor_target"}]
    adversary = [{"adversary_critic"}, {"adversary_critic", "adversary_critic_target", "adversary", "adversary_target"}]
    cycle = protagonist * (every - 1) + adversary
    if every == 1:
        cycle = [p | a for p, a in zip(protagonist, adversary, strict=True)]
    assert moved == cycle * 2


@pytest.mark.slow
def test_in_a_game_with_a_saddle_both_players_find_their_side():
    """a = .24, u = -.32. Alone the protagonist would play .4; a friendly 'adversary' would be at 1."""
    agent = api.make(
        "rarl", SADDLE, seed=0, actor_hidden=(16,), critic_hidden=(32,), batch_size=64, learning_starts=100,
        replay_size=300, learning_rate=1e-2, exploration_noise=0.3, iteration_steps=100, eval_every=None, threads=1,
        device="cpu",
    )  # fmt: skip
    quiet(agent, 1_300)
    zero = torch.zeros(1, 1)
    assert float(agent.policy.mode(zero)) == pytest.approx(0.24, abs=0.1)
    assert float(agent.learner.modules["adversary"].mode(zero)) == pytest.approx(-0.32, abs=0.1)


# -- what the environment is given ----------------------------------------------------------------


@pytest.mark.parametrize("n_envs", [1, 3])
def test_the_replay_knows_the_parameters_of_every_step(n_envs):
    agent = make(n_envs=n_envs, iteration_steps=30, learning_rate=0.0)
    agent.learner.state["adversary"].zero_()  # away from the bounds, where choices would be equal
    quiet(agent, 90)
    found, params = rows(agent)
    for k, name in ((1, "gain"), (2, "tilt")):
        torch.testing.assert_close(found["next_obs"][:, k].double(), params[name], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(found["reward"].double(), params["gain"], rtol=1e-6, atol=1e-6)
    gain = params["gain"].view(-1, n_envs)
    assert (gain[1:] != gain[:-1]).all(), "another choice at every step"
    assert n_envs == 1 or (gain[:, 0] != gain[:, 1]).all(), "and in every environment"


def test_random_parameters_fill_the_set_during_the_warm_up():
    agent = quiet(make(learning_starts=1_000, iteration_steps=1_000), 1_000)
    column = agent.replay.rows(0, 1_000)["extras/params"]
    assert column.min() < -0.98 and column.max() > 0.98 and column.abs().max() <= 1.0
    assert float(column.mean().abs()) < 0.05 and float(column.std()) == pytest.approx(3**-0.5, abs=0.03)


def test_the_adversary_answers_what_its_own_environment_shows_now():
    agent = quiet(make(n_envs=2, learning_rate=0.0, exploration_noise=0.0), 80)
    found, _ = rows(agent)
    late = slice(20, None)
    answer = agent.learner.modules["adversary"].mode(found["obs"][late])
    torch.testing.assert_close(found["extras/params"][late], answer, rtol=1e-5, atol=1e-6)


def test_the_adversary_explores():
    agent = make(learning_rate=0.0, exploration_noise=0.1, replay_ratio=0.01)
    agent.learner.state["adversary"].zero_()
    chosen = rows(quiet(agent, 400))[0]["extras/params"][20:]
    assert float(chosen.std()) == pytest.approx(0.1, abs=0.01) and float(chosen.mean()) == pytest.approx(0.0, abs=0.02)


def test_the_means_of_the_parameters_are_logged(tmp_path):
    agent = quiet(make(), 10, run_dir=tmp_path / "run")
    _, params = rows(agent)
    logged = read_lines(tmp_path / "run" / "metrics.jsonl")[0]
    for name, values in params.items():
        assert logged[f"params/{name}"] == pytest.approx(float(values.mean()), rel=1e-5)


def test_a_run_that_was_killed_and_resumed_equals_one_that_was_not(tmp_path):
    class Killed(Exception):
        pass

    class Kill:
        def on_update(self, agent, step, metrics):
            if agent.iteration == 13:
                raise Killed

    settings = {"checkpoint_every": 1, "n_envs": 2, "seed": 3, "learning_rate": 1e-2}
    whole = quiet(make(**settings), 220, run_dir=tmp_path / "whole")
    with pytest.raises(Killed):
        quiet(make(**settings), 220, run_dir=tmp_path / "killed", callbacks=[Kill()])
    agent = api.load(tmp_path / "killed").resume(tmp_path / "killed", progress=False, tensorboard=False)
    assert_same_tensors(whole.tensors(), agent.tensors())
    for name in ("tilt", "gain"):
        assert torch.equal(rows(whole)[1][name], rows(agent)[1][name])
    last = [checkpoint.read(tmp_path / k / "checkpoints" / "last.safetensors")[1]["steps"] for k in ("whole", "killed")]
    assert last == [220, 220]
