"""Watch an agent: run whole episodes in one environment, in a window or into a video."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import gymnasium as gym
import numpy as np

from ctrlrl.engine.checkpoint import atomic_path
from ctrlrl.engine.environments import build_env
from ctrlrl.engine.seeding import derive

if TYPE_CHECKING:
    from ctrlrl.types import EnvSpec

DEFAULT_FPS = 30.0


class Plays(Protocol):
    """What :func:`play` needs of an agent."""

    @property
    def env_spec(self) -> EnvSpec | None: ...

    def predict(self, observation: Any, *, deterministic: bool) -> tuple[Any, Any]:
        """Action and recurrent state at one observation."""
        ...


class RenderError(RuntimeError):
    """The environment could not draw; the message says what to install or set."""


def play(
    agent: Plays,
    episodes: int = 1,
    video: str | os.PathLike[str] | None = None,
    deterministic: bool = True,
    seed: int = 0,
    fps: float | None = None,
) -> list[float]:
    """Run ``episodes`` whole episodes and return their undiscounted returns.

    Without ``video`` a window opens where there is a display and the environment can draw into one; elsewhere the
    episodes run unseen. Episode ``k`` starts from the reset seed that evaluation with the same ``seed`` gives it.

    Args:
        agent: Anything with ``env_spec`` and ``predict``.
        episodes: How many, at least 1.
        video: Path of an ``.mp4`` that gets every frame, the first observation of each episode included. It appears
            when it is complete; its folder is made if needed.
        deterministic: Act by the mode or by sampling.
        seed: Seed of the episodes.
        fps: Frames per second; the environment's ``render_fps`` by default, 30 where it has none.

    Raises:
        ValueError: An argument out of range, or an agent whose environment has no description.
        DependencyNotInstalled: The environment needs a package that is missing, with the pip command.
        RenderError: Drawing failed; no video is left behind.
    """
    if episodes < 1:
        raise ValueError(f"episodes={episodes} must be at least 1")
    if fps is not None and not fps > 0:
        raise ValueError(f"fps={fps} must be above 0")
    if agent.env_spec is None:
        raise ValueError(
            "this agent was built from a live environment, so there is nothing to build another from; "
            "build it from an id or an EnvSpec to play it"
        )
    seed = derive(seed, "evaluate")  # the stream Agent.evaluate draws its episodes from
    if video is None:
        env = _build(agent.env_spec, "human" if _can_show(agent.env_spec) else None)
        with contextlib.closing(env):
            return [_episode(agent, env, derive(seed, "evaluation", k), deterministic) for k in range(episodes)]
    target = Path(video)
    if target.suffix.lower() != ".mp4":
        raise ValueError(f"video={str(video)!r} must end in .mp4")
    return _record(agent, episodes, target, deterministic, seed, fps)


def _record(
    agent: Plays, episodes: int, target: Path, deterministic: bool, seed: int, fps: float | None
) -> list[float]:
    try:
        from imageio_ffmpeg import write_frames
    except ImportError as error:
        raise ImportError("videos need imageio-ffmpeg: pip install 'imageio[ffmpeg]', or play without video") from error
    assert agent.env_spec is not None
    env = _build(agent.env_spec, "rgb_array")
    rate = fps if fps is not None else float(env.metadata.get("render_fps") or DEFAULT_FPS)
    target.parent.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as stack:
        # An environment whose renderer failed often fails again on closing, which would hide the first error.
        stack.callback(_close_quietly, env)
        temporary = stack.enter_context(atomic_path(target, suffix=".mp4"))
        sink: Any = None

        def draw() -> None:
            nonlocal sink
            frame = _frame(env)
            if sink is None:
                height, width = frame.shape[:2]
                size = (width, height)
                sink = write_frames(str(temporary), size, fps=rate, macro_block_size=1, quality=8)  # type: ignore[arg-type]
                sink.send(None)
                stack.callback(sink.close)  # finishes the file before atomic_path takes it over
            sink.send(frame)

        return [_episode(agent, env, derive(seed, "evaluation", k), deterministic, draw) for k in range(episodes)]


def _episode(
    agent: Plays, env: gym.Env, seed: int, deterministic: bool, draw: Callable[[], None] | None = None
) -> float:
    """Return of one episode; ``draw`` is called once per observation."""
    try:
        obs, _ = env.reset(seed=seed)
    except Exception as error:
        if env.render_mode == "human":  # windows open on the first reset
            raise RenderError(_advice(env, error)) from error
        raise
    if draw is not None:
        draw()
    total, state, over = 0.0, None, False
    while not over:
        recurrent = {} if state is None else {"state": state}
        action, state = agent.predict(obs, deterministic=deterministic, **recurrent)
        if isinstance(action, np.ndarray) and action.ndim == 0:
            action = action.item()  # tabular environments look actions up in a dict
        obs, reward, terminated, truncated, _ = env.step(action)
        total += float(reward)
        over = bool(terminated or truncated)
        if draw is not None:
            draw()
    return total


def _frame(env: gym.Env) -> np.ndarray:
    """[H, W, 3] uint8 picture of the environment, padded by a row or column to even sizes, as H.264 asks for."""
    try:
        frame: Any = env.render()
    except Exception as error:  # every graphics library raises its own
        raise RenderError(_advice(env, error)) from error
    if not isinstance(frame, np.ndarray) or frame.ndim != 3 or frame.shape[2] != 3:
        found = f"shape {frame.shape}" if isinstance(frame, np.ndarray) else type(frame).__name__
        raise RenderError(f"{_name(env)} drew {found}, expected an array [height, width, 3]; it cannot be filmed")
    even = np.pad(frame, ((0, frame.shape[0] % 2), (0, frame.shape[1] % 2), (0, 0)), mode="edge")
    return np.ascontiguousarray(even, dtype=np.uint8)


def _build(spec: EnvSpec, render_mode: str | None) -> gym.Env:
    # not every environment has the argument, and one that is not drawn does not need it
    drawing = {} if render_mode is None else {"render_mode": render_mode}
    return build_env(dataclasses.replace(spec, kwargs={**spec.kwargs, **drawing}))


def _can_show(spec: EnvSpec) -> bool:
    """Whether there is a screen and the environment knows how to draw on it."""
    if sys.platform.startswith("linux") and not (os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY")):
        return False
    with contextlib.closing(_build(spec, None)) as env:
        return "human" in (env.metadata.get("render_modes") or ())


def _advice(env: gym.Env, error: Exception) -> str:
    """What failed, and what to set or install for the graphics the environment uses."""
    said = f"{_name(env)} could not draw ({type(error).__name__}: {error}). "
    if isinstance(error, gym.error.DependencyNotInstalled | ImportError) and "mujoco" not in str(error).lower():
        return (
            said
            + "Install what it draws with: pip install 'gymnasium[classic-control]' (pygame), or play without video"
        )
    if "mujoco" in type(env.unwrapped).__module__ or "mujoco" in type(error).__module__:
        now = os.environ.get("MUJOCO_GL")
        return said + (
            f"MUJOCO_GL is {repr(now) if now else 'not set'}: without a screen set MUJOCO_GL=egl (GPU drivers or Mesa) "
            "or MUJOCO_GL=osmesa (software, needs libosmesa6), before starting Python"
        )
    return said + "Without a screen set SDL_VIDEODRIVER=dummy (pygame) or MUJOCO_GL=egl (MuJoCo), or play without video"


def _name(env: gym.Env) -> str:
    return env.spec.id if env.spec is not None else type(env.unwrapped).__name__


def _close_quietly(env: gym.Env) -> None:
    with contextlib.suppress(Exception):
        env.close()
