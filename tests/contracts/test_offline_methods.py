"""One suite over the registry of offline methods: what a method declares, it keeps."""

import ast
import dataclasses
import inspect
import itertools
import os
import signal
from typing import NamedTuple

import numpy as np
import pytest
import test_methods
import torch
from helpers.agents import NOISY, assert_same_tensors, quiet
from helpers.offline import names, recorded, samples, tiny
from test_methods import KillAt, Killed, lines

import ctrlrl
from ctrlrl import api
from ctrlrl.data import d4rl
from ctrlrl.data.dataset import DatasetError
from ctrlrl.engine import algorithm as algorithms
from ctrlrl.engine import hooks
from ctrlrl.engine.config import ConfigError, field_names, nested
from ctrlrl.engine.off_policy_config import OffPolicyConfig
from ctrlrl.engine.offline import OfflineAgent
from ctrlrl.offline.mopo import MOPO

EVERYTHING = frozenset(["resume", "vector", "box", "dict_obs", "image_obs", "gpu", "compile"])
CRITICS = frozenset({"actor", "critic", "critic_target"})


class Row(NamedTuple):
    """What a method must declare and keep. Taking something away is a decision, not an accident."""

    cls: str
    """Name of its class."""
    networks: frozenset[str]
    """All it has, copies included."""
    declared: frozenset[str] = EVERYTHING
    """Capabilities."""
    presets: frozenset[str] = frozenset()
    stochastic: bool = False
    """Its policy is a distribution."""
    bootstraps: bool = True
    """It learns from the value of the next observation."""
    looks_beyond: bool = False
    """It asks its policy about the next observation also where the episode ended."""
    every_cut: bool = True
    """A step at which an episode was cut is learned from where the next observation is known."""
    steps: bool = True
    """Its batches are single recorded steps, and nothing else."""
    policy: bool = True
    """It learns to act; others learn what the data are like."""
    before: int = 0
    """Iterations before the first update, with the settings of the tests."""


TABLE = {
    "bc": Row("BC", frozenset({"actor"}), presets=frozenset({"top10"}), bootstraps=False),
    "cdsa": Row(
        "CDSA", frozenset({"actor"}), frozenset(["resume", "box", "gpu", "compile"]),
        bootstraps=False, steps=False, policy=False,
    ),
    "cql": Row("CQL", CRITICS | {"temperature"}, stochastic=True, looks_beyond=True),
    "decision_transformer": Row("DecisionTransformer", frozenset({"actor"}), bootstraps=False, steps=False),
    "edac": Row("EDAC", CRITICS | {"temperature"}, stochastic=True),
    "iql": Row("IQL", CRITICS | {"value"}, stochastic=True),
    "mopo": Row(
        "MOPO", CRITICS | {"temperature"}, EVERYTHING - {"dict_obs", "image_obs"}, frozenset(MOPO.presets),
        stochastic=True, steps=False, before=4,
    ),
    "policy_guided_diffusion": Row(
        "PolicyGuidedDiffusion", frozenset({"actor", "actor_ema"}), EVERYTHING - {"dict_obs", "image_obs"},
        frozenset({"released", "synther"}), stochastic=True, bootstraps=False, steps=False, policy=False,
    ),
    "rebrac": Row("ReBRAC", CRITICS | {"actor_target"}, every_cut=False),
    "sac_n": Row("SACN", CRITICS | {"temperature"}, stochastic=True),
    "td3_bc": Row("TD3BC", CRITICS | {"actor_target"}),
}  # fmt: skip
EVERY = pytest.mark.parametrize("name", names())
STEPS = pytest.mark.parametrize("name", [n for n in names() if n not in TABLE or TABLE[n].steps])
POLICIES = pytest.mark.parametrize("name", [n for n in names() if n not in TABLE or TABLE[n].policy])


def row(name):
    """The table's row of ``name``."""
    if name not in TABLE:
        pytest.fail(f"{name} is registered, but has no row in TABLE of {__file__}: say there what it must keep")
    return TABLE[name]


def having(capability):
    """Parametrise over the methods that the table says have it."""
    return pytest.mark.parametrize("name", [n for n in names() if n not in TABLE or capability in TABLE[n].declared])


def everything(name, **settings):
    """Whatever has state or moves during a run, at once."""
    return tiny(
        name, eval_every=12, eval_episodes=2, max_grad_norm=5.0, actor_schedule="cosine", scale_by_returns=True,
        reward_shift=-0.5, normalize_obs=True, updates_per_graph=2, **settings,
    )  # fmt: skip


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    """A recorded set as a file."""
    path = tmp_path_factory.mktemp("data") / "toy.hdf5"
    d4rl.write(recorded(), path)
    return path


def assert_same_run(a, b, name="td3_bc"):
    test_methods.assert_same_run(a, b, ("last", "best") if row(name).policy else ("last",))


def learn(agent, steps, folder, **options):
    return agent.learn(steps, run_dir=folder, progress=False, tensorboard=False, **options)


def resume(folder, **options):
    return api.load(folder).resume(folder, progress=False, tensorboard=False, **options)


def seen_by(agent, n, seed=0):
    """``n`` observations of the kind that ``agent`` takes."""
    return samples(agent.observation_space, n, np.random.default_rng(seed), 0.0, 1.0)


# -- what is declared -----------------------------------------------------------------------------


def test_every_method_has_a_row_in_the_table_and_every_row_a_method():
    missing, gone = sorted(set(names()) - set(TABLE)), sorted(set(TABLE) - set(names()))
    assert not missing, f"no row in TABLE for {missing}: say there what they must keep"
    assert not gone, f"TABLE has rows for {gone}, which are not registered"


@EVERY
def test_a_method_has_one_name_everywhere(name):
    own, method, wanted = algorithms.get(name), api.methods()[name], row(name)
    assert own.name == method.name == name == method.agent.method and method.family == "offline"
    assert own.__name__ == method.agent.__name__ == wanted.cls
    assert getattr(ctrlrl, wanted.cls) is method.agent is api.get_method(name)
    assert wanted.cls in dir(ctrlrl) and name in ctrlrl.available("methods")
    assert issubclass(method.agent, OfflineAgent) and method.agent.capabilities == own.capabilities == wanted.declared
    assert method.paper and method.paper in (method.agent.__doc__ or "") and own.differs


@EVERY
def test_the_networks_are_those_of_the_paper(name):
    agent = api.make(name, dataset=recorded(), **tiny(name))
    assert agent.learner.modules.keys() == row(name).networks
    assert agent.learner.modules["actor"] is agent.policy and agent.policy.stochastic == row(name).stochastic


@EVERY
def test_every_setting_is_documented_and_has_a_name_of_its_own(name):
    own = algorithms.get(name)
    found = {}
    for base in own.__mro__:
        if dataclasses.is_dataclass(base):
            body = ast.parse(inspect.getsource(base)).body[0].body
            for before, after in itertools.pairwise(body):
                if isinstance(before, ast.AnnAssign) and isinstance(after, ast.Expr):
                    found.setdefault(before.target.id, after.value.value)
    for setting in field_names(own):
        words = found.get(setting)
        assert isinstance(words, str) and len(words) > 10 and words.rstrip().endswith("."), f"{setting} has no words"
    for loop in (own.agent_class().loop, OffPolicyConfig):
        taken = {n for group in (loop, *nested(loop).values()) for n in field_names(group)}
        assert not taken & set(field_names(own))
        assert loop is OffPolicyConfig or set(own.loop_defaults) <= taken


@EVERY
def test_presets_are_known_build_and_change_something(name):
    assert set(algorithms.get(name).presets) == set(api.methods()[name].presets) == row(name).presets
    plain = api.make(name, dataset=recorded(), **tiny(name))
    for preset in row(name).presets:
        agent = api.make(name, dataset=recorded(), preset=preset, **tiny(name))
        assert (agent.config, agent.algorithm) != (plain.config, plain.algorithm)
        assert quiet(agent, 3).learner.updates == 3
    with pytest.raises(ConfigError, match="nonsense"):
        api.make(name, dataset=recorded(), preset="nonsense")


@EVERY
def test_unknown_settings_name_the_nearest_known_ones(name):
    for wrong, right in (("bach_size", "batch_size"), ("actor_schedul", "actor_schedule"), ("datasett", "dataset")):
        with pytest.raises(ConfigError, match=rf"{name}.*{wrong}.*{right}"):
            api.make(name, dataset=recorded(), **{wrong: 1})
    own = field_names(algorithms.get(name))[0]
    with pytest.raises(ConfigError, match=own):
        api.make(name, dataset=recorded(), **{own + "x": 1})


# -- same seed, same run --------------------------------------------------------------------------


@EVERY
def test_the_same_seed_gives_the_same_run_bit_for_bit(name, file, tmp_path):
    """Whatever other code did to the global generators before, and without touching them."""
    for k, folder in enumerate(("a", "b")):
        torch.manual_seed(100 + k)
        np.random.seed(100 + k)
        before = torch.get_rng_state(), np.random.get_state()[1].copy()
        learn(api.make(name, env=NOISY, dataset=file, seed=7, **everything(name)), 24, tmp_path / folder)
        assert torch.equal(before[0], torch.get_rng_state()) and (before[1] == np.random.get_state()[1]).all()
    assert_same_run(tmp_path / "a", tmp_path / "b", name)


@EVERY
def test_another_seed_gives_another_run(name):
    agents = [api.make(name, dataset=recorded(), seed=seed, **tiny(name)) for seed in (0, 1)]
    start = [{k: a.learner.state[k].clone() for k in a.learner.modules} for a in agents]
    for agent in agents:
        quiet(agent, 12)
    for key in start[0]:
        for before, agent in zip(start, agents, strict=True):
            assert not torch.equal(before[key], agent.learner.state[key]), f"{key} did not learn"
        assert not torch.equal(agents[0].learner.state[key], agents[1].learner.state[key])
        assert key == "temperature" or not torch.equal(start[0][key], start[1][key])


@EVERY
def test_updates_unrolled_into_one_call_are_the_same_updates(name):
    """As many at once as a compiled graph would have, and as the last iteration leaves over."""
    settings = tiny(name, iteration_steps=6, actor_schedule="constant")
    single, at_once = (quiet(api.make(name, dataset=recorded(), updates_per_graph=k, **settings), 9) for k in (1, 4))
    assert single.learner.updates == at_once.learner.updates == 9
    if row(name).steps and not algorithms.get(name)().noise(1, 1, 1, torch.Generator()):
        assert_same_tensors(single.tensors(), at_once.tensors())  # otherwise noise is drawn in another order
    assert all(v.isfinite().all() for v in at_once.tensors().values())


# -- stopped and resumed --------------------------------------------------------------------------

STEPS_OF_A_RUN = 74
"""Twenty-five iterations, the last one shorter; borders after the tenth and the twentieth."""


@pytest.fixture(scope="module")
def whole(file, tmp_path_factory):
    """The folder of the run that was never stopped, by method."""
    folders = {}

    def get(name):
        if name not in folders:
            folder = tmp_path_factory.mktemp(name) / "whole"
            agent = learn(api.make(name, env=NOISY, dataset=file, seed=3, **everything(name)), STEPS_OF_A_RUN, folder)
            folders[name] = folder, agent.counters()
        return folders[name]

    return get


@having("resume")
def test_killed_and_resumed_equals_never_killed(name, file, whole, tmp_path):
    """Death before the first border, right after it, between two, and after both."""
    expected, counters = whole(name)
    folder = tmp_path / "run"
    third = KillAt(16, "on_evaluation") if row(name).policy else KillAt(16)
    for k, kill in enumerate([KillAt(4), KillAt(10, "on_checkpoint"), third, KillAt(22)]):
        with pytest.raises(Killed):
            if k == 0:
                agent = api.make(name, env=NOISY, dataset=file, seed=3, **everything(name))
                learn(agent, STEPS_OF_A_RUN, folder, callbacks=[kill])
            else:
                resume(folder, callbacks=[kill])
    resumed = resume(folder)
    assert_same_run(expected, folder, name)
    assert resumed.counters() == counters and resumed.learner.updates == STEPS_OF_A_RUN
    # the comparison is worth something only if all of it was in use
    every = [r for r in lines(expected / "metrics.jsonl") if "time/iterations" in r]
    rows = every[row(name).before :]
    assert [r["step"] for r in rows] == [*range(3, 74, 3), 74] and not any(r["step"] for r in every[: -len(rows)])
    key = next(k for k in rows[0] if k.startswith("train/") and "loss" in k)
    assert len({r[key] for r in rows if key in r}) == len(rows)
    if row(name).policy:
        assert len(lines(expected / "evaluations.jsonl")) == STEPS_OF_A_RUN // 12 + 1
    assert resumed.learner.knobs["lr/actor"] < 1e-4  # nearly through its half cosine


@having("resume")
def test_stopped_by_ctrl_c_at_any_moment_and_resumed_equals_never_stopped(name, file, whole, tmp_path):
    at = int(np.random.default_rng().integers(1, STEPS_OF_A_RUN // 2))  # calls of two updates and of one alternate
    agent = api.make(name, env=NOISY, dataset=file, seed=3, **everything(name))
    run, calls = agent.learner.run, []

    def counted(*args):
        calls.append(1)
        if len(calls) == at:
            os.kill(os.getpid(), signal.SIGINT)
        return run(*args)

    agent.learner.run = counted
    with pytest.raises(hooks.Interrupted):
        learn(agent, STEPS_OF_A_RUN, tmp_path / "run")
    left = api.load(tmp_path / "run", "interrupted")
    assert left.learner.updates == left.steps == agent.steps == at // 2 * 3 + at % 2 * 2, f"stopped at call {at}"
    resume(tmp_path / "run")
    assert_same_run(whole(name)[0], tmp_path / "run", name)


def test_a_set_in_memory_is_resumed_by_giving_it_again(tmp_path):
    agents = [api.make("td3_bc", dataset=recorded(), seed=3, **everything("td3_bc")) for _ in range(3)]
    learn(agents[0], 37, tmp_path / "whole")
    with pytest.raises(Killed):
        learn(agents[1], 37, tmp_path / "run", callbacks=[KillAt(12)])
    agents[2].resume(tmp_path / "run", progress=False, tensorboard=False)
    assert_same_run(tmp_path / "whole", tmp_path / "run")


def test_resuming_refuses_other_data_and_other_settings(file, tmp_path):
    copied = tmp_path / "toy.hdf5"
    copied.write_bytes(file.read_bytes())
    with pytest.raises(Killed):
        agent = api.make("td3_bc", env=NOISY, dataset=copied, **everything("td3_bc"))
        learn(agent, 74, tmp_path / "run", callbacks=[KillAt(12)])
    for changed in ({"batch_size": 9}, {"reward_shift": 0.0}, {"alpha": 1.0}, {"seed": 5}, {"memory_map": True}):
        other = api.make("td3_bc", env=NOISY, dataset=copied, **everything("td3_bc") | changed)
        with pytest.raises(ValueError, match=next(iter(changed))):
            other.resume(tmp_path / "run")
    for k, other in enumerate((recorded(seed=1), recorded(episodes=17), recorded().take(range(15)))):
        d4rl.write(other, copied)
        with pytest.raises(DatasetError, match="is not the data that this run began with"):
            resume(tmp_path / "run")
        with pytest.raises(DatasetError, match="is not the data that this run began with"):
            api.make("td3_bc", env=NOISY, dataset=copied, **everything("td3_bc")).resume(tmp_path / "run")
        assert api.load(tmp_path / "run").steps == 30, k
    copied.write_bytes(file.read_bytes())
    assert resume(tmp_path / "run").steps == 74


def test_a_finished_run_is_resumed_by_doing_nothing_even_without_its_data(file, tmp_path):
    copied = tmp_path / "toy.hdf5"
    copied.write_bytes(file.read_bytes())
    learn(api.make("td3_bc", env=NOISY, dataset=copied, **everything("td3_bc")), 12, tmp_path / "run")
    copied.unlink()
    before = {p: p.read_bytes() for p in sorted((tmp_path / "run").rglob("*")) if p.is_file()}
    assert resume(tmp_path / "run").steps == 12
    assert {p: p.read_bytes() for p in sorted((tmp_path / "run").rglob("*")) if p.is_file()} == before


# -- save, load, predict --------------------------------------------------------------------------


@POLICIES
def test_a_loaded_agent_acts_like_the_saved_one_without_the_data_and_learns_on_with_it(name, file, tmp_path):
    copied = tmp_path / "toy.hdf5"
    copied.write_bytes(file.read_bytes())
    agent = quiet(api.make(name, env=NOISY, dataset=copied, seed=5, **tiny(name, normalize_obs=True)), 9)
    assert agent.save(tmp_path / "agent") == tmp_path / "agent"
    copied.unlink()
    loaded = api.load(tmp_path / "agent")
    obs = seen_by(agent, 50)
    for deterministic in (True, False, False):
        actions = [a.predict(obs, deterministic=deterministic)[0] for a in (agent, loaded)]
        assert np.array_equal(*actions) and actions[0].dtype == np.float32 and np.unique(actions[0]).size > 10
    assert (loaded.method, loaded.steps, loaded.config, loaded.algorithm) == (name, 9, agent.config, agent.algorithm)
    evaluations = [a.evaluate(3) for a in (agent, loaded)]
    assert np.array_equal(evaluations[0].returns, evaluations[1].returns)
    # D4RL's score, with the reference scores -10 and 10 of the set
    assert loaded.normalized(5.0) == pytest.approx(75.0)
    with pytest.raises(DatasetError, match="there is no such file"):
        quiet(loaded, 6)
    copied.write_bytes(file.read_bytes())
    for a in (agent, loaded):
        quiet(a, 6)
    assert_same_tensors(agent.tensors(), loaded.tensors())


@POLICIES
def test_a_stochastic_policy_samples_and_a_deterministic_one_does_not(name):
    agent = quiet(api.make(name, dataset=recorded(), **tiny(name)), 6)
    one = seen_by(agent, 1)
    many = {k: v.repeat(50, 0) for k, v in one.items()} if isinstance(one, dict) else one.repeat(50, 0)
    assert (np.ptp(agent.predict(many)[0]) > 1e-3) == row(name).stochastic
    assert np.ptp(agent.predict(many, deterministic=True)[0]) < 1e-6
