"""From an id, an EnvSpec or a live environment to the vector environment that the collector steps."""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import importlib
import json
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any, Literal, TypeAlias

import gymnasium as gym
import torch
from gymnasium.envs.registration import find_highest_version, parse_env_id
from gymnasium.error import DependencyNotInstalled
from gymnasium.vector import AsyncVectorEnv, AutoresetMode

from ctrlrl import names
from ctrlrl.engine import envpool
from ctrlrl.engine.errors import UnknownEnvironment
from ctrlrl.engine.spaces import check_observation, space_from_json, space_to_json
from ctrlrl.engine.sync import LeanSyncVectorEnv
from ctrlrl.types import Backend, EnvSpec

__all__ = [
    "UnknownEnvironment", "build_env", "concrete", "listed", "make_vector", "resolve", "set_params", "space_from_json",
    "space_to_json", "spaces", "spec_of", "start", "torch_threads", "width", "wrap_live",
]  # fmt: skip

BACKENDS = ("auto", "sync", "async", "envpool")
Live: TypeAlias = gym.Env | gym.vector.VectorEnv

# packages that register their ids when they are imported, and what to install for them
_NAMESPACES = {"ctrlrl": ("ctrlrl_envs", "ctrlrl"), "ALE": ("ale_py", "gymnasium[atari]")}
# the same for ids without a namespace, by how they begin
_FAMILIES = dict.fromkeys(
    ("AdroitHand", "AntMaze_", "Fetch", "FrankaKitchen", "HandManipulate", "HandReach", "PointMaze_"),
    ("gymnasium_robotics", "ctrlrl[robotics]"),
)
_EXTRAS = {"mujoco": "mujoco", "box2d": "box2d", "classic_control": "classic-control", "toy_text": "toy-text"}


def resolve(
    env: str | EnvSpec | Live,
    *,
    n_envs: int | None = None,
    backend: Backend | None = None,
    env_kwargs: Mapping[str, Any] | None = None,
) -> EnvSpec | Live:
    """Check what the user gave as ``env`` and make it definite.

    An id becomes an EnvSpec with its version filled in and a concrete backend: EnvPool where it is installed, there
    are several environments, the id is known to agree with Gymnasium's (``envpool.VERIFIED``) and there are neither
    kwargs nor wrappers; else ``sync``. Tasks of the DeepMind control suite are EnvPool's for one environment too. A
    live environment comes back as it is.

    Args:
        env: Gymnasium id (``ctrlrl/...``, ``module:Id`` and those of gymnasium-robotics import their package), EnvSpec,
            or live environment.
        n_envs: Environments side by side; overrides the EnvSpec's.
        backend: Overrides the EnvSpec's.
        env_kwargs: Added to the EnvSpec's kwargs; JSON values.

    Raises:
        UnknownEnvironment: No such id; names near ones.
        ValueError: Settings that contradict each other.
        TypeError: ``env`` is something else.
    """
    if isinstance(env, gym.Env | gym.vector.VectorEnv):
        for name, value in (("n_envs", n_envs), ("backend", backend), ("env_kwargs", env_kwargs)):
            if value is not None and value != width(env) and value != {}:
                raise ValueError(f"{name}={value!r} cannot be set for a live environment; give an id or an EnvSpec")
        return env
    if isinstance(env, str):
        env = EnvSpec(env)
    if not isinstance(env, EnvSpec):
        raise TypeError(f"env must be an id, an EnvSpec or a Gymnasium environment, found {type(env).__name__}")
    changes: dict[str, Any] = {"kwargs": {**env.kwargs, **(env_kwargs or {})}}
    if n_envs is not None:
        changes["n_envs"] = n_envs
    if backend is not None:
        changes["backend"] = backend
    # JSON turns the tuples of a saved spec into lists
    changes["wrappers"] = tuple((path, dict(kwargs)) for path, kwargs in env.wrappers)
    return concrete(dataclasses.replace(env, **changes))


def concrete(spec: EnvSpec) -> EnvSpec:
    """``spec`` checked, with its version and backend filled in; see :func:`resolve`."""
    if not isinstance(spec.n_envs, int) or spec.n_envs < 1:
        raise ValueError(f"n_envs={spec.n_envs!r} must be an integer of at least 1")
    if spec.backend not in BACKENDS:
        raise ValueError(f"backend={spec.backend!r} is unknown; expected one of {', '.join(BACKENDS)}")
    try:
        json.dumps([spec.kwargs, spec.wrappers])
    except TypeError as error:
        raise ValueError(
            f"the arguments of {spec.id} and its wrappers must be JSON values, so that a run can be rebuilt: {error}"
        ) from None
    if spec.backend == "envpool":
        envpool.check_spec(spec)
        return spec
    full = _registered(spec.id)
    if envpool.control_suite(full):
        fits = full in envpool.ids() and full not in envpool.DISAGREE
    else:
        # one environment is faster in this process than handed to a thread and back
        fits = spec.n_envs > 1 and envpool.agrees(full)
    fits = fits and not spec.kwargs and not spec.wrappers
    backend: Backend = spec.backend if spec.backend != "auto" else "envpool" if fits else "sync"
    return dataclasses.replace(spec, id=full, backend=backend)


def fresh(spec: EnvSpec, n_envs: int) -> EnvSpec:
    """``spec`` with ``n_envs`` environments and the backend for episodes that start from given seeds.

    That is ``sync``; but ``envpool``, which takes its seeds at construction, for what was trained there and is a task
    of the DeepMind control suite or has no other backend.

    Raises:
        UnknownEnvironment: No such id, in EnvPool neither.
    """
    plain = dataclasses.replace(spec, n_envs=n_envs, backend="sync")
    pooled = dataclasses.replace(plain, backend="envpool")
    if spec.backend != "envpool" or spec.id not in envpool.ids():
        return concrete(plain)
    if envpool.control_suite(spec.id):
        return concrete(pooled)
    try:
        return concrete(plain)
    except UnknownEnvironment:
        return concrete(pooled)


def _registered(env_id: str) -> str:
    """Import what registers ``env_id`` and return it with its version.

    Raises:
        UnknownEnvironment: With the registered ids closest to it.
    """
    module, _, name = env_id.rpartition(":")
    namespace = name.partition("/")[0] if "/" in name else ""
    package, extra = _NAMESPACES.get(namespace) or _family(module, name)
    for wanted in filter(None, (module, package)):
        try:
            importlib.import_module(wanted)
        except ModuleNotFoundError as error:
            if error.name != wanted.partition(".")[0] and error.name != wanted:
                raise
            hint = f" (pip install '{extra}')" if wanted == package else ""
            message = f"{env_id!r} is registered by the package {wanted!r}, which is not installed{hint}"
            raise UnknownEnvironment(message) from None
    if name not in gym.registry:
        # the control suite has no namespace
        with contextlib.suppress(ImportError):
            importlib.import_module("ctrlrl_envs")
    if name in gym.registry:
        return env_id
    try:
        ns, base, version = parse_env_id(name)
        newest = find_highest_version(ns, base)
    except gym.error.Error:
        version, newest, base, ns = None, None, name, None
    if version is None and newest is not None:
        return f"{env_id}-v{newest}"
    known = sorted(gym.registry)
    versions = [k for k in known if k.rpartition("-v")[0] == name.rpartition("-v")[0]]
    folded = {k.lower(): k for k in known}
    near = versions or [folded[k] for k in difflib.get_close_matches(name.lower(), folded, n=3, cutoff=0.6)]
    hint = f" Did you mean {' or '.join(near)}?" if near else " See `ctrlrl list envs`."
    if name in envpool.ids():
        hint = " EnvPool has it: use backend='envpool'."
    raise UnknownEnvironment(f"no environment {env_id!r} is registered.{hint}")


def _family(module: str, name: str) -> tuple[str, str]:
    """The package that registers ``name`` and what to install for it; empty where another one is asked for."""
    found = next((known for start, known in _FAMILIES.items() if name.startswith(start)), ("", ""))
    return found if module in ("", found[0]) else ("", "")


def build_env(spec: EnvSpec) -> gym.Env:
    """One environment of ``spec``, wrapped, without Gymnasium's checker.

    Raises:
        DependencyNotInstalled: With the pip command that installs what is missing.
        ValueError: A wrapper that cannot be imported.
    """
    _registered(spec.id)
    try:
        env = gym.make(spec.id, disable_env_checker=True, **spec.kwargs)
    except DependencyNotInstalled as error:
        found = gym.registry.get(spec.id.rpartition(":")[2])
        part = str(found.entry_point).split(".") if found is not None else []
        extra = next((_EXTRAS[p] for p in part if p in _EXTRAS), None)
        command = f": pip install 'gymnasium[{extra}]'" if extra else ""
        raise DependencyNotInstalled(f"{spec.id} needs a package that is not installed{command} ({error})") from error
    for path, kwargs in spec.wrappers:
        env = names.load(path, "wrapper")(env, **kwargs)
    return env


class _Worker(gym.Wrapper):
    """Outermost wrapper in a process of its own: checks the first observation, and takes parameters by attribute,
    as ``AsyncVectorEnv.call`` can only send the same arguments to all."""

    def __init__(self, env: gym.Env, name: str) -> None:
        super().__init__(env)
        self._name, self._checked = name, False

    def reset(self, **kwargs: Any) -> tuple[Any, dict[str, Any]]:
        obs, info = self.env.reset(**kwargs)
        if not self._checked:
            check_observation(self.observation_space, obs, self._name)
            self._checked = True
        return obs, info

    @property
    def params_mailbox(self) -> bool:
        return self.env.has_wrapper_attr("set_params")

    @params_mailbox.setter
    def params_mailbox(self, params: Mapping[str, float]) -> None:
        self.env.get_wrapper_attr("set_params")(params)


def _build_worker(spec: EnvSpec) -> gym.Env:
    return _Worker(build_env(spec), spec.id)


def make_vector(
    spec: EnvSpec,
    seeds: Sequence[int] | None = None,
    autoreset: Literal["same_step", "disabled"] = "same_step",
    *,
    copy: bool = True,
    keep_infos: bool = False,
) -> gym.vector.VectorEnv:
    """The vector environment of ``spec``, not yet reset (see :func:`start`).

    Args:
        spec: With backend "auto", it is resolved first.
        seeds: One per environment. Only EnvPool is seeded here; the others take them in ``reset``.
        autoreset: What happens after an end. EnvPool always uses NEXT_STEP.
        copy: False lets observations be overwritten by the next step, for callers that copy them anyway.
        keep_infos: Return the environments' infos too (async always does).

    Raises:
        ValueError: EnvPool with autoreset disabled.
    """
    spec = concrete(spec)
    if spec.backend == "envpool":
        if autoreset == "disabled":
            raise ValueError(f"{spec.id}: EnvPool cannot run with autoreset disabled; use backend='sync' or 'async'")
        return envpool.EnvPoolVector(spec, seeds, keep_infos=keep_infos)
    mode = AutoresetMode.SAME_STEP if autoreset == "same_step" else AutoresetMode.DISABLED
    if spec.backend == "async":
        return AsyncVectorEnv([partial(_build_worker, spec)] * spec.n_envs, copy=copy, autoreset_mode=mode)
    fns = [partial(build_env, spec)] * spec.n_envs
    return LeanSyncVectorEnv(fns, mode, copy=copy, keep_infos=keep_infos, name=spec.id)


def start(env: gym.vector.VectorEnv, seeds: Sequence[int] | None) -> Any:
    """Reset ``env`` with one seed each (EnvPool: as it was built) and return the observations [N, ...]."""
    if seeds is None or isinstance(env, envpool.EnvPoolVector):
        return env.reset()[0]
    each: Any = list(seeds)  # Gymnasium's vector environments take lists, which its base class does not say
    return env.reset(seed=each)[0]


def wrap_live(env: Live) -> gym.vector.VectorEnv:
    """A live environment as a vector environment whose autoreset is known.

    A single environment is wrapped into one that resets within the step; a vector environment must declare
    ``metadata["autoreset_mode"]``.

    Raises:
        ValueError: The mode is missing or unknown.
    """
    if not isinstance(env, gym.vector.VectorEnv):
        return LeanSyncVectorEnv([lambda: env], AutoresetMode.SAME_STEP, copy=False)
    mode = env.metadata.get("autoreset_mode")
    if not isinstance(mode, AutoresetMode):
        raise ValueError(
            f"the vector environment {type(env).__name__} does not say how it resets: metadata['autoreset_mode'] is "
            f"{mode!r}. Set env.metadata = {{**env.metadata, 'autoreset_mode': gymnasium.vector.AutoresetMode.X}} with "
            "X = SAME_STEP (last observation in infos['final_obs']), NEXT_STEP (the step after an end resets and "
            "ignores its action) or DISABLED (the caller resets)."
        )
    return env


def width(env: EnvSpec | Live) -> int:
    """How many environments run side by side."""
    if isinstance(env, EnvSpec):
        return env.n_envs
    return env.num_envs if isinstance(env, gym.vector.VectorEnv) else 1


def describe(env: EnvSpec | Live) -> tuple[gym.Space, gym.Space, dict[str, Any] | None]:
    """Observation space and action space of one environment, and what it says of its tokens (``metadata["tokens"]``,
    None where it is none of token sequences); a spec is built for a moment."""
    if not isinstance(env, EnvSpec):
        tokens = (env.metadata or {}).get("tokens")
        return *spaces(env), None if tokens is None else dict(tokens)
    env = concrete(env)
    probe = envpool.EnvPoolVector(dataclasses.replace(env, n_envs=1)) if env.backend == "envpool" else build_env(env)
    try:
        return describe(probe)
    finally:
        probe.close()


def spaces(env: EnvSpec | Live) -> tuple[gym.Space, gym.Space]:
    """Observation and action space of one environment; a spec is built for a moment."""
    if isinstance(env, gym.vector.VectorEnv):
        return env.single_observation_space, env.single_action_space
    if isinstance(env, gym.Env):
        return env.observation_space, env.action_space
    return describe(env)[:2]


def spec_of(env: Live) -> EnvSpec | None:
    """The EnvSpec that would build a live environment again; None where it cannot be known."""
    found = getattr(env, "spec", None)
    if found is None or isinstance(env, gym.vector.VectorEnv) or found.id not in gym.registry:
        return None
    wrappers = [(w.entry_point, w.kwargs) for w in found.additional_wrappers]
    kwargs = {k: v for k, v in found.kwargs.items() if k != "render_mode"}
    try:
        json.dumps([kwargs, wrappers])
    except TypeError:
        return None
    if any(arguments is None for _, arguments in wrappers):
        return None
    return EnvSpec(found.id, kwargs, tuple((path, dict(arguments or {})) for path, arguments in wrappers), 1, "sync")


def make_native(spec: EnvSpec, n_envs: int) -> gym.vector.VectorEnv:
    """``n_envs`` environments of ``spec`` in the environment's own vector form, with autoreset disabled.

    Raises:
        ValueError: It has none, or the spec has wrappers, which are for single environments.
    """
    spec = concrete(spec)
    registered = gym.registry[spec.id.rpartition(":")[2]]
    if registered.vector_entry_point is None:
        raise ValueError(f"{spec.id} has no vector form (vector_entry_point)")
    if spec.wrappers:
        raise ValueError(f"{spec.id}: wrappers cannot be applied to the vector form of token environments")
    env = gym.make_vec(spec.id, num_envs=n_envs, vectorization_mode="vector_entry_point", **spec.kwargs)
    if env.metadata["autoreset_mode"] != AutoresetMode.DISABLED:
        env.close()
        raise ValueError(f"{spec.id}: its vector form resets by itself; episodes are drawn with autoreset disabled")
    return env


def set_params(env: gym.vector.VectorEnv, params: Mapping[str, float] | Sequence[Mapping[str, float]]) -> None:
    """Set the parameters of ParametricEnv environments: the same for all, or one mapping each.

    Raises:
        ValueError: The environments have no ``set_params``, or the number of mappings is wrong.
    """
    n = env.num_envs
    each = [dict(params)] * n if isinstance(params, Mapping) else [dict(p) for p in params]
    if len(each) != n:
        raise ValueError(f"found {len(each)} parameter mappings for {n} environments; give one each or a single one")
    refusal = (
        f"{getattr(env, 'name', type(env).__name__)} has no set_params: parameters can be set only for environments "
        "with parameter_space, nominal and set_params (ctrlrl.types.ParametricEnv)"
    )
    own = getattr(env, "set_params", None)
    if own is not None:  # a vector form of its own
        own(each)
        return
    if isinstance(env, LeanSyncVectorEnv):
        if not all(e.has_wrapper_attr("set_params") for e in env.envs):
            raise ValueError(refusal)
        for e, p in zip(env.envs, each, strict=True):
            e.get_wrapper_attr("set_params")(p)
    elif isinstance(env, AsyncVectorEnv) and getattr(env.env_fns[0], "func", None) is _build_worker:
        if not all(env.get_attr("params_mailbox")):
            raise ValueError(refusal)
        env.set_attr("params_mailbox", each)
    elif not isinstance(env, envpool.EnvPoolVector) and hasattr(env, "call") and all(p == each[0] for p in each):
        env.call("set_params", each[0])  # type: ignore[attr-defined]
    else:
        raise ValueError(refusal)


@contextlib.contextmanager
def torch_threads(threads: int | None) -> Iterator[None]:
    """Run the block with that many torch threads; None changes nothing."""
    before = torch.get_num_threads()
    if threads is not None:
        torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def listed() -> list[tuple[str, tuple[str, ...]]]:
    """Every environment that can be named, newest versions of Gymnasium's, with the backends that run it."""
    with contextlib.suppress(ImportError):
        importlib.import_module("ctrlrl_envs")
    newest: dict[tuple[Any, str], int | None] = {}
    for name in gym.registry:
        ns, base, version = parse_env_id(name)
        newest[ns, base] = max(version or 0, newest.get((ns, base)) or 0)
    names = [n for n in gym.registry if (parse_env_id(n)[2] or 0) == newest[parse_env_id(n)[:2]]]
    return [(n, ("sync", "async", *(["envpool"] if n in envpool.ids() else []))) for n in sorted(names)]
