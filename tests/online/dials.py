"""Environments with parameters that can be read off what they return."""

import gymnasium as gym
import numpy as np

ONE = gym.spaces.Box(-1.0, 1.0, (1,), np.float32)


class Dials(gym.Env):
    """Observation [step, gain, tilt] with the parameters as they are now; the reward is the gain. Ends at random."""

    observation_space = gym.spaces.Box(-np.inf, np.inf, (3,), np.float32)
    action_space = ONE

    def __init__(self):
        self.nominal = {"gain": 20.0, "tilt": 0.0}  # the gain outside its range
        # in an order that is not the alphabet's
        scalar = [("tilt", gym.spaces.Box(-3.0, 1.0, (), np.float64)), ("gain", gym.spaces.Box(2.0, 10.0, (), float))]
        self.parameter_space = gym.spaces.Dict(scalar)
        self.now = dict(self.nominal)

    def set_params(self, params):
        for name, value in params.items():
            box = self.parameter_space[name]
            if not (box.low <= value <= box.high or value == self.nominal[name]):
                raise ValueError(f"{name}={value} outside")
        self.now.update(params)

    def obs(self):
        return np.array([self.t, self.now["gain"], self.now["tilt"]], np.float32)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.t = 0
        return self.obs(), {}

    def step(self, action):
        self.t += 1
        terminated, truncated = self.np_random.random() < 0.1, self.np_random.random() < 0.1 or self.t == 30
        return self.obs(), self.now["gain"], bool(terminated), bool(truncated), {}


class Saddle(gym.Env):
    """One step; reward -(a - .4)^2 + (u + .2)^2 + a u with u = w / 5 in [-1, 1].

    Concave in a and convex in u: the saddle is where 2 (a - .4) = u and 2 (u + .2) = -a, at a = .24, u = -.32. Without
    an adversary (u = 0) the best action is .4; an adversary that maximises goes to u = 1.
    """

    observation_space = gym.spaces.Box(-1.0, 1.0, (1,), np.float32)
    action_space = ONE
    parameter_space = gym.spaces.Dict({"w": gym.spaces.Box(-5.0, 5.0, (), np.float64)})

    def __init__(self):
        self.nominal, self.u = {"w": 0.0}, 0.0

    def set_params(self, params):
        self.u = params["w"] / 5.0

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return np.zeros(1, np.float32), {}

    def step(self, action):
        a, u = float(action[0]), self.u
        return np.zeros(1, np.float32), -((a - 0.4) ** 2) + (u + 0.2) ** 2 + a * u, True, False, {}


for _env in (Dials, Saddle):
    if f"test/{_env.__name__}-v0" not in gym.registry:
        gym.register(f"test/{_env.__name__}-v0", _env)

DIALS, SADDLE = "test/Dials-v0", "test/Saddle-v0"
TINY = {
    "actor_hidden": (8,), "critic_hidden": (8,), "batch_size": 8, "learning_starts": 20, "iteration_steps": 10,
    "device": "cpu", "threads": 1, "eval_every": None,
}  # fmt: skip


def quiet(agent, steps, **options):
    return agent.learn(steps, **{"root": None, "progress": False, "tensorboard": False} | options)


def rows(agent):
    """What the replay holds, and the parameters it says each step was taken under, in the environment's units."""
    found = agent.replay.rows(0, agent.replay.added)
    share = (found["extras/params"].double() + 1.0) / 2.0
    return found, {"tilt": -3.0 + 4.0 * share[:, 0], "gain": 2.0 + 8.0 * share[:, 1]}
