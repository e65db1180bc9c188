"""Playing: returns, and videos that are complete or absent."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gymnasium as gym
import imageio_ffmpeg
import numpy as np
import pytest
from gymnasium import spaces

from ctrlrl.run.play import RenderError, play
from ctrlrl.types import EnvSpec

STEPS = 6


class Film(gym.Env[np.ndarray, Any]):
    """Six steps, reward = action, picture = step number as a grey level; ``break_at`` breaks the camera."""

    metadata: dict[str, Any] = {"render_modes": ["rgb_array"], "render_fps": 12}  # noqa: RUF012
    built: list[str | None] = []  # noqa: RUF012

    def __init__(
        self, render_mode: str | None = None, size: tuple[int, int] = (40, 64), break_at: int = 99, drawn: Any = None
    ) -> None:
        self.render_mode, self.size, self.break_at, self.drawn = render_mode, size, break_at, drawn
        self.observation_space, self.action_space = spaces.Box(0, 1, (2,), np.float32), spaces.Discrete(3)
        self.t = 0
        Film.built.append(render_mode)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[np.ndarray, dict]:
        super().reset(seed=seed)
        self.t = 0
        return self.np_random.random(2, dtype=np.float32), {}

    def step(self, action: Any) -> tuple[np.ndarray, float, bool, bool, dict]:
        assert isinstance(action, int)
        self.t += 1
        return np.zeros(2, np.float32), float(action), self.t == STEPS, False, {}

    def render(self) -> Any:
        if self.t >= self.break_at:
            raise OSError("no GL context")
        return self.drawn if self.drawn is not None else np.full((*self.size, 3), 30 * self.t, np.uint8)


gym.register("test/Film-v0", lambda **kwargs: Film(**kwargs), disable_env_checker=True)
gym.register("test/Endless-v0", lambda **kwargs: Film(**kwargs), max_episode_steps=4, disable_env_checker=True)


@dataclass
class Agent:
    env_spec: EnvSpec | None
    seen: list[tuple[np.ndarray, bool]] = field(default_factory=list)

    def predict(self, observation: Any, *, deterministic: bool) -> tuple[Any, Any]:
        self.seen.append((observation, deterministic))
        return np.array(2), None


def read_video(path: Path) -> tuple[dict[str, Any], list[np.ndarray]]:
    reader = imageio_ffmpeg.read_frames(str(path))
    meta: Any = next(reader)
    width, height = meta["size"]
    return meta, [np.frombuffer(raw, np.uint8).reshape(height, width, 3) for raw in reader]


def test_returns_and_seeds() -> None:
    agent = Agent(EnvSpec("test/Film-v0"))
    assert play(agent, episodes=2) == [12.0, 12.0]
    first = [obs for obs, _ in agent.seen if obs.any()]
    assert len(first) == 2 and not np.array_equal(first[0], first[1])
    again = Agent(EnvSpec("test/Film-v0"))
    play(again, episodes=2, deterministic=False)
    assert all(np.array_equal(a, b) for (a, _), (b, _) in zip(agent.seen, again.seen, strict=True))
    assert {d for _, d in agent.seen} == {True} and {d for _, d in again.seen} == {False}


def test_truncation_and_wrappers_are_obeyed() -> None:
    spec = EnvSpec("test/Endless-v0", wrappers=(("gymnasium.wrappers:TransformReward", {"func": lambda r: 10 * r}),))
    assert play(Agent(spec)) == [80.0]


def test_video_has_every_frame_in_order_at_full_size(tmp_path: Path) -> None:
    path = tmp_path / "new" / "film.mp4"
    assert play(Agent(EnvSpec("test/Film-v0")), episodes=2, video=path) == [12.0, 12.0]
    meta, frames = read_video(path)
    assert meta["size"] == (64, 40) and meta["fps"] == 12 and meta["codec"] == "h264"
    assert len(frames) == 2 * (STEPS + 1)
    greys = [frame.mean() for frame in frames]
    assert np.abs(np.array(greys) - [30.0 * t for t in [*range(STEPS + 1)] * 2]).max() < 6
    assert [p.name for p in path.parent.iterdir()] == ["film.mp4"]


def test_odd_sizes_are_padded_and_fps_can_be_chosen(tmp_path: Path) -> None:
    play(Agent(EnvSpec("test/Film-v0", kwargs={"size": (33, 51)})), video=tmp_path / "a.mp4", fps=5)
    meta, frames = read_video(tmp_path / "a.mp4")
    assert meta["size"] == (52, 34) and meta["fps"] == 5 and len(frames) == STEPS + 1


@pytest.mark.parametrize("break_at", [0, 3])
def test_a_failing_camera_leaves_the_old_video(tmp_path: Path, break_at: int) -> None:
    path = tmp_path / "film.mp4"
    path.write_bytes(b"old")
    agent = Agent(EnvSpec("test/Film-v0", kwargs={"break_at": break_at}))
    with pytest.raises(RenderError, match=r"could not draw \(OSError: no GL context\).*MUJOCO_GL=egl"):
        play(agent, video=path)
    assert path.read_bytes() == b"old" and [p.name for p in tmp_path.iterdir()] == ["film.mp4"]


def test_what_is_no_picture_is_refused(tmp_path: Path) -> None:
    agent = Agent(EnvSpec("test/Film-v0", kwargs={"drawn": "ansi art"}))
    with pytest.raises(RenderError, match="drew str, expected an array"):
        play(agent, video=tmp_path / "a.mp4")
    assert not list(tmp_path.iterdir())


def test_mujoco_without_graphics_names_the_variable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("mujoco")
    from gymnasium.envs.mujoco.mujoco_env import MujocoEnv

    def fail(_: MujocoEnv) -> None:
        raise RuntimeError("an OpenGL platform library has not been loaded")

    monkeypatch.setattr(MujocoEnv, "render", fail)
    monkeypatch.delenv("MUJOCO_GL", raising=False)
    with pytest.raises(RenderError, match=r"MUJOCO_GL is not set: .*MUJOCO_GL=egl.*MUJOCO_GL=osmesa"):
        play(Agent(EnvSpec("InvertedPendulum-v5")), video=tmp_path / "a.mp4")
    assert not list(tmp_path.iterdir())


def test_missing_pygame_names_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from gymnasium.envs.classic_control import CartPoleEnv

    def fail(_: CartPoleEnv) -> None:
        raise gym.error.DependencyNotInstalled("pygame is not installed")

    monkeypatch.setattr(CartPoleEnv, "render", fail)
    with pytest.raises(RenderError, match=r"gymnasium\[classic-control\]"):
        play(Agent(EnvSpec("CartPole-v1")), video=tmp_path / "a.mp4")


def test_a_window_is_used_only_where_there_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.platform", "linux")
    monkeypatch.setitem(Film.metadata, "render_modes", ["rgb_array", "human"])
    for display, expected in (("", None), (":0", "human")):
        monkeypatch.setenv("DISPLAY", display)
        monkeypatch.delenv("WAYLAND_DISPLAY", raising=False)
        Film.built.clear()
        assert play(Agent(EnvSpec("test/Film-v0"))) == [12.0]
        assert Film.built[-1] == expected


def test_wrong_arguments_are_named(tmp_path: Path) -> None:
    agent = Agent(EnvSpec("test/Film-v0"))
    with pytest.raises(ValueError, match="episodes=0 must be at least 1"):
        play(agent, episodes=0)
    with pytest.raises(ValueError, match=r"must end in \.mp4"):
        play(agent, video=tmp_path / "a.gif")
    with pytest.raises(ValueError, match="fps=0 must be above 0"):
        play(agent, fps=0)
    with pytest.raises(ValueError, match="live environment"):
        play(Agent(None))
