"""The sets of D4RL as data: addresses, reference scores, episode lengths, and where to evaluate today.

Sources: Fu et al. 2020 (arXiv:2004.07219); ``d4rl/infos.py`` and the environment registrations of the package d4rl 1.1.
Every id of locomotion, Adroit, maze2d, antmaze and kitchen that the package registers is here.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import product
from typing import NamedTuple

from ctrlrl.data.dataset import DatasetError
from ctrlrl.names import hint
from ctrlrl.types import EnvSpec

ROOT = "http://rail.eecs.berkeley.edu/datasets/offline_rl/"
"""Where the files lie; plain http and no checksums, hence the record of ctrlrl.data.download."""


@dataclass(frozen=True)
class Entry:
    """One set of D4RL."""

    id: str
    """As D4RL names it."""
    url: str
    """Address of the HDF5 file. Several ids may share one."""
    ref_min_score: float
    """Mean return that scores 0."""
    ref_max_score: float
    """Mean return that scores 100."""
    max_episode_steps: int
    """Time limit of D4RL's environment; it also cuts the episodes of files without ``timeouts``."""
    observation_size: int
    action_size: int
    env: EnvSpec | None
    """To evaluate in; None where no environment of today has D4RL's observations."""
    difference: str
    """How :attr:`env` differs from D4RL's, or why there is none."""


class _Family(NamedTuple):
    """What the sets of one environment share; the fields are those of :class:`Entry`."""

    ref_min_score: float
    ref_max_score: float
    observation_size: int
    action_size: int
    max_episode_steps: int
    env: EnvSpec | None
    difference: str

    def entry(self, id: str, folder: str, file: str) -> Entry:
        return Entry(id=id, url=f"{ROOT}{folder}/{file}.hdf5", **self._asdict())


_MUJOCO_2 = "D4RL ran MuJoCo 2.0 through mujoco-py (Gym's v2); v4 keeps its rules and rewards, v5 does not."
_ANT = f"{_MUJOCO_2} Its 84 contact forces were always zero (D4RL issue 143): their range is zero here."
_ANT_ENV = EnvSpec("Ant-v4", {"use_contact_forces": True, "contact_force_range": [0.0, 0.0]})
_LOCOMOTION = {
    "halfcheetah": _Family(-280.178953, 12135.0, 17, 6, 1000, EnvSpec("HalfCheetah-v4"), _MUJOCO_2),
    "hopper": _Family(-20.272305, 3234.3, 11, 3, 1000, EnvSpec("Hopper-v4"), _MUJOCO_2),
    "walker2d": _Family(1.629008, 4592.3, 17, 6, 1000, EnvSpec("Walker2d-v4"), _MUJOCO_2),
    "ant": _Family(-325.6, 3879.7, 111, 8, 1000, _ANT_ENV, _ANT),
}
_KINDS_V0 = {  # the files of v0 have names of their own
    "random": "random", "medium": "medium", "expert": "expert", "medium-replay": "mixed",
    "medium-expert": "medium_expert",
}  # fmt: skip
_KINDS = ("random", "medium", "expert", "medium-replay", "full-replay", "medium-expert")

_HAND = (
    "D4RL ran MuJoCo 2.0 with mjrl. gymnasium-robotics 1.2.1 to 1.4.2 give +0.1 instead of -0.1 times the distance of "
    "the hand to the object in each step (its pull request 220): a few units to a few tens of the return."
)
_DOOR = "D4RL ran MuJoCo 2.0 with mjrl. gymnasium-robotics has another reward; the wrapper computes D4RL's."
_PEN = "D4RL ran MuJoCo 2.0 with mjrl and ended an episode when the pen fell; gymnasium-robotics goes on."


def _hand(name: str, steps: int, *wrappers: str) -> EnvSpec:
    kwargs = {"max_episode_steps": steps}
    return EnvSpec(f"gymnasium_robotics:AdroitHand{name}-v1", kwargs, tuple((w, {}) for w in wrappers))


_DOOR_ENV = _hand("Door", 200, "ctrlrl.engine.adroit:DoorReward")


_ADROIT = {
    "pen": _Family(96.262799, 3076.8331017826877, 45, 24, 100, _hand("Pen", 100), _PEN),
    "hammer": _Family(-274.856578, 12794.134825156867, 46, 26, 200, _hand("Hammer", 200), _HAND),
    "door": _Family(-56.512833, 2880.5693087298737, 39, 28, 200, _DOOR_ENV, _DOOR),
    "relocate": _Family(-6.425911, 4233.877797728884, 39, 30, 200, _hand("Relocate", 200), _HAND),
}
_LONG_HORIZON = {"pen": 200, "hammer": 600, "door": 300, "relocate": 500}
_ADROIT_V0 = {"human": "{}-v0_demos_clipped", "cloned": "{}-demos-v0-bc-combined", "expert": "{}-v0_expert_clipped"}

# id: steps, smallest and largest return, name of the file
_MAZE2D: dict[str, tuple[int, float, float, str]] = {
    "open-v0": (150, 0.01, 20.66, "open-sparse"),
    "umaze-v0": (150, 0.94, 62.6, "umaze-sparse"),
    "medium-v0": (250, 5.77, 85.14, "medium-sparse"),
    "large-v0": (600, 4.83, 191.99, "large-sparse"),
    "umaze-v1": (300, 23.85, 161.86, "umaze-sparse-v1"),
    "medium-v1": (600, 13.13, 277.39, "medium-sparse-v1"),
    "large-v1": (800, 6.7, 273.99, "large-sparse-v1"),
    "eval-umaze-v1": (300, 36.63, 141.4, "eval-umaze-sparse-v1"),
    "eval-medium-v1": (600, 13.07, 204.93, "eval-medium-sparse-v1"),
    "eval-large-v1": (800, 16.4, 302.22, "eval-large-sparse-v1"),
    "open-dense-v0": (150, 11.17817, 27.166538620695782, "open-dense"),
    "umaze-dense-v0": (150, 23.249793, 81.78995240126592, "umaze-dense"),
    "medium-dense-v0": (250, 19.477620, 96.03474232952358, "medium-dense"),
    "large-dense-v0": (600, 27.388310, 215.09965671563742, "large-dense"),
    "umaze-dense-v1": (300, 68.537689, 193.66285642381482, "umaze-dense-v1"),
    "medium-dense-v1": (600, 44.264742, 297.4552547777125, "medium-dense-v1"),
    "large-dense-v1": (800, 30.569041, 303.4857382709002, "large-dense-v1"),
    "eval-umaze-dense-v1": (300, 56.95455, 178.21373133248397, "eval-umaze-dense-v1"),
    "eval-medium-dense-v1": (600, 42.28578, 235.5658957482388, "eval-medium-dense-v1"),
    "eval-large-dense-v1": (800, 56.95455, 326.09647655082637, "eval-large-dense-v1"),
}
_NO_MAZE2D = (
    "D4RL observes position and velocity in units of its grid and keeps one goal; PointMaze of gymnasium-robotics puts "
    "the origin in the middle of the maze, adds the goal to the observation and draws it anew."
)

# version: folder, name of each maze in the file's name, its ending
_ANTMAZE = {
    "v0": ("ant_maze_new", {"umaze": "u-maze", "medium": "big-maze", "large": "hardest-maze"}, "sparse"),
    "v1": ("ant_maze_v1", {"umaze": "umaze", "medium": "medium", "large": "large"}, "sparse"),
    "v2": ("ant_maze_v2", {"umaze": "u-maze", "medium": "big-maze", "large": "hardest-maze"}, "sparse_fixed"),
}
# task: many starts, many goals
_ANTMAZE_TASKS = {
    "umaze": (False, False), "umaze-diverse": (True, True), "medium-play": (True, False),
    "medium-diverse": (True, True), "large-play": (True, False), "large-diverse": (True, True),
}  # fmt: skip
_ANTMAZE_EVAL = {  # as registered: here play has many goals and diverse one
    "umaze": (True, False), "umaze-diverse": (True, True), "medium-play": (True, True),
    "medium-diverse": (True, False), "large-play": (True, True), "large-diverse": (True, False),
}  # fmt: skip
_NO_ANTMAZE = (
    "D4RL observes the whole state, 15 positions and 14 velocities with the place first; AntMaze of gymnasium-robotics "
    "splits it into a dict of 27 or more numbers, place and goal, on a maze with another origin."
)

_KITCHEN = {
    "complete": "mini_kitchen_microwave_kettle_light_slider-v0",
    "partial": "kitchen_microwave_kettle_light_slider-v0",
    "mixed": "kitchen_microwave_kettle_bottomburner_light-v0",
}
_NO_KITCHEN = (
    "D4RL observes 60 numbers: 9 joints, 21 of the objects and 30 of the goal; FrankaKitchen of gymnasium-robotics "
    "gives a dict whose observation has 59, with velocities and without the goal."
)


def _locomotion() -> Iterator[Entry]:
    for name, family in _LOCOMOTION.items():
        kinds = _KINDS_V0 | ({"random-expert": "random_expert"} if name == "ant" else {})
        for kind, stem in kinds.items():
            file = "walker_mixed" if (name, kind) == ("walker2d", "medium-replay") else f"{name}_{stem}"
            yield family.entry(f"{name}-{kind}-v0", "gym_mujoco", file)
        for version, kind in product(("v1", "v2"), _KINDS):
            file = f"{name}_{kind.replace('-', '_')}-{version}"
            yield family.entry(f"{name}-{kind}-{version}", f"gym_mujoco_{version}", file)


def _adroit() -> Iterator[Entry]:
    for (name, family), (kind, stem) in product(_ADROIT.items(), _ADROIT_V0.items()):
        files = {"v0": ("hand_dapg", stem.format(name)), "v1": ("hand_dapg_v1", f"{name}-{kind}-v1")}
        for version, file in files.items():
            yield family.entry(f"{name}-{kind}-{version}", *file)
            if kind == "human":
                steps = _LONG_HORIZON[name]
                env = None if family.env is None else replace(family.env, kwargs={"max_episode_steps": steps})
                longer = family._replace(max_episode_steps=steps, env=env)
                yield longer.entry(f"{name}-human-longhorizon-{version}", *file)


def _maze2d() -> Iterator[Entry]:
    for task, (steps, low, high, file) in _MAZE2D.items():
        family = _Family(low, high, 4, 2, steps, None, _NO_MAZE2D)
        yield family.entry(f"maze2d-{task}", "maze2d", f"maze2d-{file}")


def _antmaze() -> Iterator[Entry]:
    sets = [("", version, *_ANTMAZE[version], _ANTMAZE_TASKS) for version in _ANTMAZE]
    sets.append(("eval-", "v0", "ant_maze_new", {m: f"{m}_eval" for m in _ANTMAZE["v1"][1]}, "sparse", _ANTMAZE_EVAL))
    for prefix, version, folder, mazes, end, tasks in sets:
        for task, (starts, goals) in tasks.items():
            maze = task.partition("-")[0]
            family = _Family(0.0, 1.0, 29, 8, 700 if maze == "umaze" else 1000, None, _NO_ANTMAZE)
            file = f"Ant_maze_{mazes[maze]}_noisy_multistart_{starts}_multigoal_{goals}_{end}"
            yield family.entry(f"antmaze-{prefix}{task}-{version}", folder, file)


def _kitchen() -> Iterator[Entry]:
    for task, file in _KITCHEN.items():
        yield _Family(0.0, 4.0, 60, 9, 280, None, _NO_KITCHEN).entry(f"kitchen-{task}-v0", "kitchen", file)


CATALOGUE: dict[str, Entry] = {e.id: e for part in (_locomotion, _adroit, _maze2d, _antmaze, _kitchen) for e in part()}
"""Every set by its id."""


def entry(id: str) -> Entry:
    """The set called ``id``.

    Raises:
        DatasetError: D4RL has none of that name; the nearest ones are named.
    """
    if id not in CATALOGUE:
        raise DatasetError(f"D4RL has no set {id!r}.{hint(id, CATALOGUE)}")
    return CATALOGUE[id]
