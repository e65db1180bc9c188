"""The package as a whole: version, weight, file sizes, layers, documentation of settings."""

import ast
import dataclasses
import importlib.metadata
import inspect
import itertools
import pathlib
import re
import shutil
import subprocess
import sys
import tomllib

import pytest

import ctrlrl

ROOT = pathlib.Path(__file__).parents[1]
SOURCES = [p for folder in ("ctrlrl", "envs", "scripts", "tests") for p in sorted((ROOT / folder).rglob("*.py"))]
TEXTS = [
    *SOURCES,
    *(p for name in ("README.md", "constraints.txt", "pyproject.toml", ".gitignore", ".ci/run") if (p := ROOT / name)),
    *(p for folder in ("docs", "assets") for p in sorted((ROOT / folder).rglob("*")) if p.suffix in {".md", ".json"}),
]
MAX_LINES = 450


def relative(path):
    return path.relative_to(ROOT).as_posix()


def test_version():
    assert re.fullmatch(r"\d+\.\d+\.\d+", ctrlrl.__version__)
    try:
        installed = importlib.metadata.version("ctrlrl")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("ctrlrl is not installed, only on the path")
    assert installed == ctrlrl.__version__


@pytest.mark.parametrize("marker", ["ctrlrl/py.typed", "envs/ctrlrl_envs/py.typed"])
def test_is_typed(marker):
    assert (ROOT / marker).is_file()


def test_import_is_light():
    heavy = ["torch", "numpy", "gymnasium", "mujoco", "pandas", "matplotlib", "tyro"]
    code = "import sys, ctrlrl; print([name for name in sys.argv[1:] if name in sys.modules])"
    command = [sys.executable, "-c", code, *heavy]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert ast.literal_eval(done.stdout) == []


def test_every_public_name_is_there():
    for name in dir(ctrlrl):
        assert getattr(ctrlrl, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'PP0'"):
        _ = ctrlrl.PP0


def test_declared_names_are_the_lazy_ones():
    """What type checkers see under TYPE_CHECKING is what __getattr__ gives."""
    tree = ast.parse((ROOT / "ctrlrl/__init__.py").read_text())
    (block,) = (n for n in tree.body if isinstance(n, ast.If))
    declared = {a.asname or a.name for n in block.body if isinstance(n, ast.ImportFrom) for a in n.names}
    classes = {n.name for n in block.body if isinstance(n, ast.ClassDef)}
    from ctrlrl.api import agent_classes

    agents = {"OnPolicyAgent", "OffPolicyAgent", "OfflineAgent"}
    assert declared - agents - set(agent_classes()) == {*ctrlrl._LAZY, *ctrlrl._MODULES}
    # an agent with a signature of its own is declared as an import
    assert classes | (declared & set(agent_classes())) == set(agent_classes())


@pytest.mark.parametrize("path", SOURCES, ids=relative)
def test_no_file_is_long(path):
    assert len(path.read_text().splitlines()) < MAX_LINES


def test_no_machine_paths():
    places = ["/" + name for name in ("work/", "root/", "home/", "Users/")]
    for path in TEXTS:
        text = path.read_text()
        assert not [p for p in places if re.search(rf"(?<![\w.]){p}", text)], relative(path)


def test_the_library_never_imports_its_environments():
    for path in (ROOT / "ctrlrl").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not [n for n in names if n.split(".")[0] == "ctrlrl_envs"], relative(path)


def configurations():
    from ctrlrl.engine import algorithm
    from ctrlrl.engine.config import EpisodesConfig, OnPolicyConfig
    from ctrlrl.engine.off_policy_config import OffPolicyConfig
    from ctrlrl.inventory.hdpo_config import HDPOConfig, HDPOSettings
    from ctrlrl.inventory.policies.base import InventoryPolicyConfig
    from ctrlrl.losses import base
    from ctrlrl.nets.actor_critic import NetworkConfig
    from ctrlrl.nets.actors import QNetworkConfig
    from ctrlrl.planning.distributional_dp_agent import DistributionalDPSettings
    from ctrlrl.run import cli
    from ctrlrl.types import EnvSpec

    verbs = [c for c in vars(cli).values() if dataclasses.is_dataclass(c) and c.__module__ == cli.__name__]
    loops = [OnPolicyConfig, NetworkConfig, EpisodesConfig, OffPolicyConfig, QNetworkConfig, EnvSpec]
    composed = [HDPOConfig, HDPOSettings, InventoryPolicyConfig, DistributionalDPSettings]
    return [*loops, *composed, *verbs, *map(base.get, base.names()), *map(algorithm.get, algorithm.names())]


@pytest.mark.parametrize("cls", configurations(), ids=lambda c: c.__name__)
def test_every_setting_is_frozen_and_explained(cls):
    assert cls.__dataclass_params__.frozen
    bases = [base for base in cls.__mro__ if dataclasses.is_dataclass(base)]
    explained = {
        one.target.id
        for base in bases
        for one, following in itertools.pairwise(ast.parse(inspect.getsource(base)).body[0].body)
        if isinstance(one, ast.AnnAssign)
        and isinstance(following, ast.Expr)
        and isinstance(following.value, ast.Constant)
        and isinstance(following.value.value, str)
    }
    assert not {f.name for f in dataclasses.fields(cls)} - explained


def test_every_setting_has_one_meaning():
    """The flags of the run, the loop, the network and the loss share one flat space."""
    from ctrlrl.engine.algorithm import Algorithm
    from ctrlrl.engine.config import EpisodesConfig, OnPolicyConfig
    from ctrlrl.engine.off_policy_config import OffPolicyConfig
    from ctrlrl.losses.base import PolicyLoss
    from ctrlrl.nets.actor_critic import NetworkConfig
    from ctrlrl.nets.actors import QNetworkConfig
    from ctrlrl.run.cli import Train

    loops = {PolicyLoss: (OnPolicyConfig, NetworkConfig, EpisodesConfig), Algorithm: (OffPolicyConfig, QNetworkConfig)}
    for method in configurations():
        for kind, loop in loops.items():
            if issubclass(method, kind):
                names = [f.name for c in (Train, *loop, method) for f in dataclasses.fields(c)]
                assert len(names) == len(set(names)), method.__name__


def test_constraints_cover_what_the_project_asks_for():
    pins = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
    names = [line.split("==")[0] for line in pins]
    assert names == sorted(set(names))
    assert all(re.fullmatch(r"[a-z0-9-]+==[0-9][0-9a-z.]*", line) for line in pins)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = [*project["dependencies"], *(d for extra in project["optional-dependencies"].values() for d in extra)]
    # the official d4rl needs an old gym and a simulator binding that fit beside nothing else here
    wanted = {re.split(r"[\[<>=!~; ]", d)[0].lower() for d in wanted} - {"ctrlrl", "d4rl"}
    assert wanted <= set(names)


def test_layers():
    tool = shutil.which("lint-imports", path=str(pathlib.Path(sys.executable).parent))
    if tool is None:
        pytest.skip("import-linter is not installed")
    done = subprocess.run([tool, "--no-cache"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
