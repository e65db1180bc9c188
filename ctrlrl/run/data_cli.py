"""``ctrlrl data list | info | make | convert | verify | generate``: datasets on the command line."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import tyro
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from ctrlrl import names
from ctrlrl.data.dataset import Dataset, DatasetError
from ctrlrl.types import EnvSpec

VERBS = {
    "list": "D4RL's sets, and those of Minari on this machine: ctrlrl data list [WORD]",
    "info": "what is in a set: ctrlrl data info ID_OR_PATH",
    "make": "make a set from a run: ctrlrl data make --policy RUN --kind medium --steps 100_000 --out medium.hdf5",
    "convert": "another format, or a run's replay as data: ctrlrl data convert SRC DST",
    "verify": "everything that is wrong with a set: ctrlrl data verify PATH",
    "generate": "draw a set from a model of data: ctrlrl data generate RUN --trajectories 1_000 --out made.hdf5",
}
ENDINGS = (".hdf5", ".h5")
Unfinished = Literal["error", "cut"]


@dataclass(frozen=True)
class List:
    """D4RL's sets with their reference scores, and the Minari sets on this machine."""

    word: Annotated[str, tyro.conf.Positional] = ""
    """Only ids with this in them."""
    here: bool = False
    """Only sets that are on this machine."""


@dataclass(frozen=True)
class Info:
    """What is in a set."""

    data: Annotated[str, tyro.conf.Positional]
    """D4RL or Minari id, file, folder, or the folder of an off-policy run."""
    like: str | None = None
    """D4RL id whose reference scores are used for a file."""
    unfinished: Unfinished = "error"
    """cut: an episode without an end is taken as cut there."""


@dataclass(frozen=True)
class Make:
    """Make a set in D4RL's protocol: random, medium, expert, medium-replay, medium-expert."""

    kind: Literal["random", "medium", "expert", "medium-replay", "medium-expert"]
    """random: uniform actions. medium: sampled actions of --policy, a checkpoint at about a third of the expert's
    score. expert: sampled actions of --policy, trained to the end. medium-replay: the replay of the run --policy up to
    its checkpoint. medium-expert: half of each."""
    policy: Path | None = None
    """Run folder of the policy; not for random."""
    checkpoint: str = "last"
    """Its checkpoint: last, best or interrupted."""
    steps: int | None = None
    """Environment steps; for medium-replay the first of the training, all by default."""
    expert: Path | None = None
    """Run folder of the expert: for medium-expert, and to measure the reference scores."""
    expert_checkpoint: str = "last"
    """Its checkpoint."""
    env: str | None = None
    """Gymnasium id; the policy's own environment by default."""
    env_kwargs: str = "{}"
    """Arguments of the environment as JSON, added to those of the policy's own."""
    out: Path | None = None
    """D4RL HDF5 file to write."""
    minari: str | None = None
    """Minari id to write, such as ctrlrl/hopper/medium-v0."""
    seed: int = 0
    """Seed of everything."""
    n_envs: int = 8
    """Environments side by side."""
    reference_episodes: int = 100
    """Episodes of the random and of the expert policy for the reference scores."""
    author: str | None = None
    """Noted in the set."""
    code_permalink: str | None = None
    """Address of the code that made it, noted in the set."""
    quiet: bool = False
    """No progress display."""


@dataclass(frozen=True)
class Convert:
    """D4RL HDF5 to Minari or back, or the replay of an off-policy run as either."""

    source: Annotated[str, tyro.conf.Positional]
    """D4RL or Minari id, file, folder, or the folder of an off-policy run."""
    target: Annotated[str, tyro.conf.Positional]
    """A file that ends in .hdf5 or .h5 (D4RL), or a Minari id, [namespace/]name-v0."""
    checkpoint: str = "last"
    """Of a run: only what it had collected when this checkpoint was written."""
    steps: int | None = None
    """Of a run: only the first so many steps of its training."""
    like: str | None = None
    """D4RL id whose reference scores and environment are used for a file."""
    unfinished: Unfinished = "error"
    """cut: an episode without an end is taken as cut there."""


@dataclass(frozen=True)
class Verify:
    """Print everything that is wrong with a set; the exit status is 1 if something is."""

    data: Annotated[str, tyro.conf.Positional]
    """D4RL HDF5 file, Minari folder or id, or the id of a D4RL set that has been fetched."""
    like: str | None = None
    """D4RL id whose sizes and time limit a file must have."""
    unfinished: Unfinished = "error"
    """cut: an episode without an end is none of the faults."""


def main(words: Sequence[str]) -> int:
    """``ctrlrl data ...``; returns the exit status."""
    if not words or words[0] in ("-h", "--help"):
        print("usage: ctrlrl data VERB ...\n")
        print("\n".join(f"  {verb:9} {text}" for verb, text in VERBS.items()))
        print("\nctrlrl data VERB --help shows every option.")
        return 0
    verb, rest = words[0], list(words[1:])
    if verb not in VERBS:
        print(f"ctrlrl: no verb data {verb!r}.{names.hint(verb, VERBS)} Verbs: {', '.join(VERBS)}", file=sys.stderr)
        return 2
    verbs: dict[str, tuple[Any, Callable[[Any], int]]] = {
        "list": (List, _list), "info": (Info, _info), "make": (Make, _make), "convert": (Convert, _convert),
        "verify": (Verify, _verify),
    }  # fmt: skip
    if verb == "generate":
        from ctrlrl.run import generate_cli

        verbs[verb] = (generate_cli.Options, generate_cli.run)
    kind, run = verbs[verb]
    options = tyro.cli(kind, args=rest, prog=f"ctrlrl data {verb}")
    try:
        return run(options)
    except KeyboardInterrupt:
        print("ctrlrl: stopped; of a set that was not finished nothing is left", file=sys.stderr)
        return 130


# -- looking --------------------------------------------------------------------------------------


def _list(options: List) -> int:
    from ctrlrl.data import minari
    from ctrlrl.data.d4rl_catalogue import CATALOGUE
    from ctrlrl.data.download import cache_folder

    here = cache_folder()
    table = _table("D4RL id", "score 0", "score 100", "evaluated in", "here", right=(1, 2))
    for entry in CATALOGUE.values():
        fetched = (here / entry.url.rpartition("/")[2]).is_file()
        if options.word not in entry.id or (options.here and not fetched):
            continue
        env = "-" if entry.env is None else entry.env.id.rpartition(":")[2]
        table.add_row(entry.id, f"{entry.ref_min_score:g}", f"{entry.ref_max_score:g}", env, "yes" if fetched else "")
    local = [name for name in minari.local_ids() if options.word in name]
    sets = _table("Minari id")
    for name in local:
        sets.add_row(name)
    console = Console()
    if table.row_count:
        console.print(table)
        print(f"\nfiles of D4RL are kept in {here}")
    console.print(sets) if local else print("no Minari set", end=" ")
    print(f"in {minari.local_root()}")
    return 0


def _info(options: Info) -> int:
    data = _open(options.data, options.like, options.unfinished)
    Console().print(described(data))
    return 0


def _open(
    name: str, like: str | None, unfinished: Unfinished, checkpoint: str = "last", steps: int | None = None
) -> Dataset:
    """A dataset by any of its names, a run's folder among them."""
    from ctrlrl.data.load import load
    from ctrlrl.engine import runfolder
    from ctrlrl.engine.data_making import from_run

    if runfolder.is_run(name):
        return from_run(name, checkpoint, steps)
    if checkpoint != "last" or steps is not None:
        raise DatasetError(f"--checkpoint and --steps are for runs; {name} is none")
    return load(name, like=like, unfinished=unfinished)


def described(data: Dataset) -> Table:
    """What is in a set, one line for each thing."""
    info, ends = data.info, data.ends
    lengths = np.diff(np.r_[0, np.flatnonzero(ends) + 1])
    table = _table("", "")
    rows: dict[str, str] = {
        "id": info.id,
        "file": info.path or "-",
        "steps": f"{len(data):,}",
        "episodes": f"{len(data.episodes):,}, of {_spread(lengths, '{:,.0f}')} steps",
        "ends": f"{int(data.terminals.sum()):,} terminals, {int((data.timeouts & ~data.terminals).sum()):,} timeouts, "
        f"{int((ends & ~data.usable).sum()):,} without a known next observation",
        "returns": _spread(data.returns, "{:,.2f}"),
    }
    scores = data.normalized(data.returns)
    if scores is not None:
        rows["scores"] = f"{_spread(scores, '{:.1f}')} (0 is {info.ref_min_score:g}, 100 is {info.ref_max_score:g})"
    else:
        rows["scores"] = "no reference scores"
    rows["observations"], rows["actions"] = _space(data.observation_space), _space(data.action_space)
    rows["further columns"] = ", ".join(sorted(data.infos)) or "none"
    rows["behaviour policy"] = "log-probabilities" if "action_log_probs" in data.infos else "not recorded"
    rows["environment"] = "not recorded" if info.env is None else _environment(info.env)
    if info.sha256:
        rows["SHA-256"] = info.sha256
    rows |= {key: json.dumps(value) if not isinstance(value, str) else value for key, value in _words(info.about)}
    for key, value in rows.items():
        table.add_row(key, escape(value))
    return table


def _words(about: Mapping[str, Any], above: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in about.items():
        if isinstance(value, Mapping):
            if key != "versions":  # a screen of its own
                yield from _words(value, f"{above}{key} ")
        else:
            yield f"{above}{key}", value


def _spread(values: np.ndarray, form: str) -> str:
    low, first, middle, third, high = (form.format(v) for v in np.quantile(values, (0, 0.25, 0.5, 0.75, 1)))
    return f"mean {form.format(np.mean(values))}; {low} | {first} | {middle} | {third} | {high}"


def _space(space: Any) -> str:
    if hasattr(space, "spaces"):
        return ", ".join(f"{k}: {_space(s)}" for k, s in space.spaces.items())
    if hasattr(space, "n"):
        return f"Discrete {space.start} to {space.start + space.n - 1}"
    return f"{tuple(space.shape)} {space.dtype} in [{np.min(space.low):g}, {np.max(space.high):g}]"


def _environment(env: EnvSpec) -> str:
    words = [env.id, *([json.dumps(env.kwargs)] if env.kwargs else []), *(path for path, _ in env.wrappers)]
    return ", ".join(words)


def _table(*columns: str, right: tuple[int, ...] = ()) -> Table:
    table = Table(box=None, pad_edge=False, show_header=any(columns))
    for k, column in enumerate(columns):
        table.add_column(
            column, style="bold" if k == 0 else "", no_wrap=k == 0, justify="right" if k in right else "left",
            overflow="fold",
        )  # fmt: skip
    return table


def _verify(options: Verify) -> int:
    from ctrlrl.data import checks, minari, minari_checks
    from ctrlrl.data.d4rl_catalogue import CATALOGUE

    path = Path(options.data)
    if options.data in CATALOGUE and not path.exists():
        found = _verify_fetched(options.data)
    elif minari.is_folder(path) or (not path.exists() and path.suffix not in ENDINGS and minari.is_id(options.data)):
        found = minari_checks.problems(options.data, unfinished=options.unfinished)
    else:
        found = checks.problems(path, like=options.like, unfinished=options.unfinished)
    for problem in found:
        print(f"{problem.severity}: {problem}")
    errors = sum(problem.severity == "error" for problem in found)
    if errors:
        print(f"{options.data}: {errors} error{'s' if errors > 1 else ''}")
        return 1
    print(f"{options.data} is sound")
    return 0


def _verify_fetched(name: str) -> list[Any]:
    """What is wrong with the file of the D4RL set ``name`` in the cache, as it would be loaded."""
    from ctrlrl.data import checks, download
    from ctrlrl.data.d4rl_catalogue import CATALOGUE

    file = download.cache_folder() / CATALOGUE[name].url.rpartition("/")[2]
    if not file.is_file():
        text = f"{name} has not been fetched yet; ctrlrl data info {name} does it"
        return [checks.Problem("error", str(file), "", None, text)]
    found = checks.problems(file, like=name, unfinished="cut")
    if not any(problem.severity == "error" for problem in found):
        try:
            download.verified(file)
        except DatasetError as error:
            found.append(checks.Problem("error", str(file), "", None, str(error).removeprefix(f"{file} ")))
    return found


# -- making ---------------------------------------------------------------------------------------


def _make(options: Make) -> int:
    from ctrlrl.engine.data_making import make

    if options.out is None and options.minari is None:
        print("ctrlrl: say where the set goes: --out FILE.hdf5, --minari ID, or both", file=sys.stderr)
        return 2
    targets = [str(target) for target in (options.out, options.minari) if target is not None]
    if options.out is not None and options.out.suffix not in ENDINGS:
        raise DatasetError(f"--out {options.out} ends in {options.out.suffix!r}; expected {' or '.join(ENDINGS)}")
    for target in targets:  # before the work, not after it
        check_target(target)
    source = _source(options.policy, options.checkpoint) if options.kind != "random" else None
    expert = _source(options.expert, options.expert_checkpoint)
    env = _make_env(options, source)
    _check_spaces(env, source, targets)
    with _progress(options) as advance:
        data = make(
            options.kind, env, source, options.steps, expert=expert, seed=options.seed,
            n_envs=options.n_envs, reference_episodes=options.reference_episodes, progress=advance,
        )  # fmt: skip
    about = {"author": options.author, "code_permalink": options.code_permalink}
    about = {**data.info.about, "algorithm_name": data.info.about["algorithm"], **{k: v for k, v in about.items() if v}}
    data = dataclasses.replace(data, info=dataclasses.replace(data.info, about=about))
    for target in targets:
        write(data, target)
    Console().print(described(data))
    if "references" not in about:
        print("No reference scores: give --expert RUN to measure them.")
    elif data.info.ref_max_score is None:
        print("No reference scores: the expert is no better than random actions.")
    return 0


def _make_env(options: Make, source: Any) -> EnvSpec:
    try:
        kwargs = json.loads(options.env_kwargs)
    except ValueError as error:
        raise ValueError(f"--env-kwargs is not JSON ({error})") from None
    if not isinstance(kwargs, dict):
        raise ValueError(f"--env-kwargs is {options.env_kwargs}, expected names and values in braces")
    own = None if source is None else source.agent.env_spec
    if own is not None and options.env in (None, own.id, own.id.rpartition("-v")[0]):
        return dataclasses.replace(own, kwargs={**own.kwargs, **kwargs})
    if options.env is None:
        raise ValueError("say which environment: --env ID")
    return EnvSpec(options.env, kwargs)


def _check_spaces(env: EnvSpec, source: Any, targets: Sequence[str]) -> None:
    """Refuse targets that cannot hold what the policy, or the environment, sees and does."""
    from ctrlrl.data import d4rl, minari_write
    from ctrlrl.engine import environments

    if source is not None:
        spaces = source.agent.observation_space, source.agent.action_space
    else:
        spaces = environments.describe(environments.resolve(env, backend="sync"))[:2]
    for target in targets:
        check = d4rl.check_spaces if target.endswith(ENDINGS) else minari_write.check_spaces
        check(*spaces, env.id)


def _source(run: Path | None, checkpoint: str) -> Any:
    from ctrlrl import api
    from ctrlrl.engine.data_making import Source

    return None if run is None else Source(api.load(run, checkpoint), run, checkpoint)


@contextlib.contextmanager
def _progress(options: Make) -> Iterator[Callable[[int], None] | None]:
    if options.quiet or options.steps is None:
        yield None
        return
    from rich.progress import Progress

    with Progress(console=Console(stderr=True)) as bar:
        task = bar.add_task(f"{options.kind}, steps", total=options.steps)
        yield lambda done: bar.update(task, completed=done)


def _convert(options: Convert) -> int:
    check_target(options.target)
    data = _open(options.source, options.like, options.unfinished, options.checkpoint, options.steps)
    left_out = write(data, options.target)
    print(f"{options.target}: {len(data) - left_out:,} steps in {len(data.episodes):,} episodes")
    if left_out:
        print(
            f"{left_out:,} steps were left out: the last of cut episodes, whose next observation is not in the source"
        )
    return 0


def check_target(target: str) -> None:
    """Refuse a file or Minari id that cannot be written, or would replace something."""
    from ctrlrl.data import minari

    if target.endswith(ENDINGS):
        if Path(target).exists():
            raise DatasetError(f"{target} exists; remove it, or choose another name")
        return
    if not minari.is_id(target) or "://" in target:
        raise DatasetError(
            f"{target!r} is neither a D4RL file ({' or '.join(ENDINGS)}) nor a Minari id ([namespace/]name-v0)"
        )
    minari.library()
    if (folder := minari.local_root() / target).exists():
        raise DatasetError(f"{folder} exists; raise the version, or remove that folder")


def write(data: Dataset, target: str) -> int:
    """Write ``data`` and return how many of its steps the format has no place for."""
    from ctrlrl.data import d4rl, minari

    if target.endswith(ENDINGS):
        d4rl.write(data, target)
        return 0
    minari.write(data, target)
    return int((data.ends & ~data.usable).sum())
