"""Where every loss runs, pinned: token sequences, discrete control, continuous control, a flow policy."""

from collections.abc import Sequence

import pytest
from helpers.agents import home

from ctrlrl import api
from ctrlrl.engine.config import ConfigError
from ctrlrl.losses import base
from ctrlrl.losses.needs import NEEDS, WORLDS, missing

EVERYWHERE = (
    "adora bapo bnpo bpo bpo_mean c3po cispo copo dagrpo dapo direct_advantage dr_grpo etr g2rpo gbpo gdpo grpo gspo "
    "knapsack mdpo mhpo pf_ppo ppo r2vpo reinforce risk_po rloo s_ppo spear spo super_hf v0 vas "
).split()
DECLINED: dict[str, dict[str, Sequence[str]]] = {
    # the sampling of episodes is what these change; a sequence of denoising steps is not sampled like that
    "aepo": {"flow": ["tempered"]},
    "mini_rl": {"flow": ["logp_behaviour"]},
    "r3l": {"flow": ["retries"]},
    # the distribution over an action, not over its denoising steps
    "capo": {"flow": ["step_dist"]},
    "d3s": {"flow": ["step_dist"]},
    "dcpo": {"flow": ["step_dist"]},
    "empg": {"flow": ["step_dist"]},
    "epo": {"flow": ["step_dist"]},
    "qwen_long": {"flow": ["step_dist"]},
    "steer": {"flow": ["step_dist"]},
    "obl_rpo": {"flow": ["step_dist"]},  # norm="length" lifts it
    # rows there are actions, of which a group's member has as many as its episode has steps
    "copg": {"flow": ["whole_rows"]},
    "dpo": {"flow": ["whole_rows"]},
    "p3o": {"flow": ["whole_rows"]},
    "real": {"flow": ["whole_rows"]},
    "rpo": {"flow": ["whole_rows"]},
    # one choice among finitely many, with all its probabilities
    "nlpo": {"continuous": ["categorical", "support"], "flow": ["categorical", "support"]},
    # assume_tree=True lifts the tree, which control has only by accident
    "rover": {"discrete": ["tree"], "continuous": ["categorical", "tree"], "flow": ["categorical", "tree"]},
    # the environment speaks between turns
    "simple_tir": dict.fromkeys(("discrete", "continuous", "flow"), ("turns",)),
    "st_ppo": dict.fromkeys(("discrete", "continuous", "flow"), ("turns",)),
    "turn_ppo": dict.fromkeys(("discrete", "continuous", "flow"), ("turns",)),
    # an expert's solution
    "ghpo": dict.fromkeys(("discrete", "continuous", "flow"), ("hints",)),
    "hpt": dict.fromkeys(("discrete", "continuous", "flow"), ("demonstrations",)),
    "sft": dict.fromkeys(("discrete", "continuous", "flow"), ("demonstrations",)),
    "precision_diversity": {
        "discrete": ["demonstrations"],
        "continuous": ["categorical", "demonstrations"],
        "flow": ["categorical", "demonstrations"],
    },
    # the denoising of an action is their sequence
    "awm": dict.fromkeys(("tokens", "discrete", "continuous"), ("matching",)),
    "dppo": dict.fromkeys(("tokens", "discrete", "continuous"), ("denoising",)),
    "flow_grpo": dict.fromkeys(("tokens", "discrete", "continuous"), ("denoising",)),
    "fpo": dict.fromkeys(("tokens", "discrete", "continuous"), ("matching",)),
    "grpo_guard": dict.fromkeys(("tokens", "discrete", "continuous"), ("denoising",)),
    "diffusion_opd": {
        "tokens": ["gaussian", "teacher"],
        "discrete": ["gaussian", "teacher"],
        "continuous": ["teacher"],
        "flow": ["teacher"],
    },
}
ENVIRONMENTS = {
    "tokens": "ctrlrl/TokenSort-v0",
    "discrete": "CartPole-v1",
    "continuous": "Pendulum-v1",
    "flow": "Pendulum-v1",
}


def test_the_table_is_complete():
    assert sorted([*EVERYWHERE, *DECLINED]) == base.names()
    for name in base.names():
        found = {w: lacking for w in WORLDS if (lacking := missing(base.get(name).needs, w))}
        assert found == {w: list(needs) for w, needs in DECLINED.get(name, {}).items()}, name


def test_only_the_kinds_that_may_decline_do():
    """Tokens turn away flow policies alone; discrete control what needs turns, an expert, or a tree."""
    for name, worlds in DECLINED.items():
        assert set(worlds.get("tokens", [])) <= {"denoising", "matching", "gaussian", "teacher"}, name
        flows = {"denoising", "matching", "gaussian", "teacher"}
        assert set(worlds.get("discrete", [])) <= {"turns", "demonstrations", "hints", "tree"} | flows, name


def make(name, world, **more):
    settings = home(name)[1] | {"horizon": 5, "epochs": 1, "n_steps": 8}
    if world == "tokens":
        del settings["horizon"]
    if world == "flow":
        settings["policy"] = "flow"
    return api.make(name, ENVIRONMENTS[world], seed=0, **settings | more)


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("name", base.names())
def test_runs_or_names_what_is_missing(name, world, tmp_path):
    lacking = DECLINED.get(name, {}).get(world, [])
    if not lacking:
        agent = make(name, world)
        assert agent.world == world
        agent.learn(1, root=None, progress=False)
        assert agent.iteration == 1
        return
    with pytest.raises(ConfigError, match="it needs") as error:
        # these would have a flow policy by themselves
        make(name, world, **({"policy": "mlp"} if world == "continuous" else {}))
    for need in lacking:
        assert f"{need} ({NEEDS[need]})" in str(error.value)


def test_settings_that_lift_a_need():
    make("rover", "discrete", assume_tree=True).learn(1, root=None, progress=False)
    make("obl_rpo", "flow", norm="length").learn(1, root=None, progress=False)


@pytest.mark.parametrize("world", ["continuous", "flow"])
def test_a_named_run_is_the_teacher(world, tmp_path):
    """The student moves towards the run that it is given, and comes to rest on it."""
    settings = {"policy": "flow" if world == "flow" else "mlp"}
    teacher = make("ppo", world, **settings)
    teacher.learn(64, run_dir=tmp_path / "teacher", progress=False, tensorboard=False)
    student = make("diffusion_opd", world, reference=str(tmp_path / "teacher"), learning_rate=3e-3, **settings)
    losses = []
    student.learn(400, root=None, progress=False, callbacks=[Note(losses)])
    assert losses[-1] < 0.5 * losses[0]


class Note:
    def __init__(self, into):
        self.into = into

    def on_update(self, agent, step, metrics):
        self.into.append(metrics["train/policy_gradient_loss"])


def test_several_choices_at_once_are_not_one_categorical():
    for name in ("nlpo", "steer", "capo", "dcpo", "obl_rpo", "aepo"):
        with pytest.raises(ConfigError, match=r"plain_action|categorical|tempered"):
            _switches(name)
    _switches("grpo").learn(1, root=None, progress=False)


def _switches(name):
    from helpers.envs import env_id

    return api.make(name, env_id("Switches"), **home(name)[1] | {"horizon": 5})
