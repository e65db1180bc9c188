"""The command line as a user types it: help that is complete, errors of one line, and the whole way round."""

import dataclasses
import json
import re
import sys
from typing import ClassVar

import pytest
from helpers.envs import env_id

from ctrlrl import api
from ctrlrl.engine import world
from ctrlrl.engine.config import EpisodesConfig, OnPolicyConfig
from ctrlrl.losses import base as losses
from ctrlrl.losses.base import PolicyLoss
from ctrlrl.nets.actor_critic import NetworkConfig
from ctrlrl.run import cli

ENV = env_id("OnlyTruncates")
SMALL = [
    *("--n-envs", "2", "--n-steps", "16", "--batch-size", "16", "--epochs", "1", "--device", "cpu", "--threads", "1"),
    *("--actor-hidden", "8", "--critic-hidden", "8", "--eval-every", "32", "--eval-episodes", "2", "--quiet"),
]


@dataclasses.dataclass(frozen=True)
class Mine(PolicyLoss):
    """Without a paper, as a first try would be."""

    needs: ClassVar = frozenset({"values"})
    pull: float = 1.0
    """Weight of the gain."""

    def per_token(self, batch, out, knobs):
        return -self.pull * out.logp * batch.coef["advantage"]


@pytest.fixture
def run(capsys):
    """Run the command line in this process: (exit status, standard output, standard error)."""

    def call(*words):
        try:
            status = cli.main([str(w) for w in words])
        except SystemExit as stop:  # tyro ends the process itself for --help and wrong flags
            status = stop.code or 0
        out, err = capsys.readouterr()
        assert "Traceback" not in out + err
        return status, out, err

    return call


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The folder of a finished run, and what was printed."""
    import contextlib
    import io

    printed, root = io.StringIO(), tmp_path_factory.mktemp("runs")
    with contextlib.redirect_stdout(printed):
        assert (
            cli.main(["train", "ppo", "--env", ENV, "--steps", "96", "--root", str(root), "--seed", "3", *SMALL]) == 0
        )
    (folder,) = root.glob("*/*/*")
    return folder, printed.getvalue()


def words_of(text):
    """Help text without its frames and line breaks."""
    return re.sub(r"\s+", " ", re.sub(r"[│╭╮╰╯─]", " ", text))


# -- help -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("words", [[], ["-h"], ["--help"]])
def test_help_lists_every_verb(run, words):
    status, out, _ = run(*words)
    assert status == 0 and all(re.search(rf"^  {verb}\s", out, re.M) for verb in cli.VERBS)
    assert {"train", "eval", "play", "report", "list"} <= set(cli.VERBS)


@pytest.mark.parametrize("verb", sorted(cli.VERBS))
def test_every_verb_has_help(run, verb):
    status, out, _ = run(verb, "--help")
    assert status == 0 and f"ctrlrl {verb}" in out


def test_version(run):
    import ctrlrl

    assert run("--version")[:2] == (0, f"{ctrlrl.__version__}\n")


def test_train_without_a_method_lists_them(run):
    status, out, _ = run("train")
    assert status == 0 and all(name in out for name in api.available()) and "ctrlrl train METHOD --help" in out


def documented(cls):
    """Docstrings under the fields of a dataclass, by field."""
    import inspect

    source = "".join(inspect.getsource(base) for base in cls.__mro__ if dataclasses.is_dataclass(base))
    return {
        f.name: re.search(rf'^    {f.name}: .*?\n    """(.*?)"""', source, re.M | re.S).group(1)
        for f in dataclasses.fields(cls)
    }


def shown(value):
    """A default as the help writes it."""
    if isinstance(value, tuple):
        return "default: " + " ".join(map(str, value))
    return f"default: {value}"


@pytest.mark.parametrize("method", ["ppo", "mdpo", "bpo", "grpo"])
def test_train_help_shows_every_hyper_parameter_with_meaning_and_default(run, method, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")  # wider than this, tyro sets two columns
    status, out, _ = run("train", method, "--help")
    text = words_of(out)
    loss = losses.get(method)
    defaults = world.defaults("continuous", loss.needs) | dict(loss.loop_defaults)
    assert status == 0
    for cls in (OnPolicyConfig, NetworkConfig, EpisodesConfig, loss, cli.Train):
        meanings = documented(cls)
        for field in dataclasses.fields(cls):
            if field.name in ("network", "episodes"):  # their fields are flags of their own
                continue
            flag = f"--{field.name.replace('_', '-')}"
            start = re.search(rf"{flag}[ ,]", text)
            assert start, f"{flag} is missing"
            part = text[start.start() :]
            meaning = " ".join(meanings[field.name].split())
            assert meaning[:50] in part[:900], f"{flag} is not explained"
            if field.default is dataclasses.MISSING or isinstance(field.default, bool):
                continue
            value = defaults.get(field.name, field.default)
            found = re.search(r"default: ([^)]*)\)", part).group(0)
            if isinstance(value, float):
                assert float(found[9:-1]) == value, f"{flag}: {found}"
            else:
                assert found.replace("'", "").startswith(shown(value)), f"{flag}: {found} is not {shown(value)}"


def test_help_names_the_paper(run, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")  # wider than this, tyro sets two columns
    assert losses.get("bpo").paper in words_of(run("train", "bpo", "--help")[1])


# -- what is mistyped -----------------------------------------------------------------------------

TRAIN = ["train", "ppo", "--env", ENV, "--steps", "32", "--quiet"]
MISTAKES = {
    "verb": (["trian", "ppo"], r"no verb 'trian'\. Did you mean train\?"),
    "method": (["train", "pppo", "--env", ENV], r"no method named 'pppo'\. Did you mean ppo"),
    "users loss": (["train", "no.such:Loss", "--env", ENV], r"cannot load the loss 'no\.such:Loss'"),
    "environment": (["train", "ppo", "--env", "CartPoel-v1", "--quiet"], r"no environment 'CartPoel-v1'.*CartPole-v1"),
    "case of the environment": (["train", "ppo", "--env", "cartpole-v1", "--quiet"], "CartPole-v1"),
    "version of the environment": (["train", "ppo", "--env", "CartPole-v7", "--quiet"], "CartPole-v1"),
    "flag": ([*TRAIN, "--learning-rat", "1"], "--learning-rate"),
    "value": ([*TRAIN, "--epochs", "many"], "many"),
    "range": ([*TRAIN, "--gamma", "1.5"], r"gamma=1\.5 must lie in \[0, 1\]"),
    "steps": ([*TRAIN[:-2], "0", "--quiet"], "steps=0 must be at least 1"),
    "contradiction": ([*TRAIN, "--value-batch-size", "8"], "value_epochs is not"),
    "preset": ([*TRAIN, "--preset", "relesed"], "no preset 'relesed'"),
    "no environment": (["train", "ppo"], "--env"),
    "flag before the method": (["train", "--env", ENV], "the method comes first"),
    "kwargs that are not JSON": ([*TRAIN, "--env-kwargs", "length=3"], r"--env-kwargs is not JSON.*example"),
    "kwargs that are not a mapping": ([*TRAIN, "--env-kwargs", "[3]"], "env-kwargs"),
    "kwargs the environment does not know": ([*TRAIN, "--env-kwargs", '{"lenght": 3}'], "lenght"),
    "device": ([*TRAIN, "--device", "gpu0"], "gpu0"),
    "run to evaluate": (["eval", "no/such/run"], r"no config\.json in no/such/run"),
    "run to play": (["play", "no/such/run"], r"no config\.json in no/such/run"),
    "run to resume": (["train", "--resume", "no/such/run"], r"no config\.json in no/such/run"),
    "run to report": (["report", "no/such/run"], "no/such/run does not exist"),
    "nothing to report": (["report"], "name one run folder"),
    "thing to list": (["list", "method"], r"Did you mean methods\?"),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_a_mistake_gets_a_short_answer_and_a_status(run, case, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "100")  # wider than this, tyro sets two columns
    words, message = MISTAKES[case]
    status, out, err = run(*words)
    assert status not in (0, None)
    assert re.search(message, words_of(out + err)), out + err
    assert not list(tmp_path.iterdir()), "a mistake leaves no run folder behind"


def test_an_action_space_without_a_density_is_one_line(run, tmp_path):
    import gymnasium as gym
    import numpy as np

    class Bits(gym.Env):
        observation_space, action_space = gym.spaces.Box(-1, 1, (1,), np.float32), gym.spaces.MultiBinary(2)

    gym.register("cli/Bits-v0", Bits)
    status, _, err = run("train", "ppo", "--env", "cli/Bits-v0", "--root", tmp_path)
    assert status == 1 and "MultiBinary are not supported" in err and err.count("\n") == 1


def test_a_nan_is_one_message_that_names_the_dump_and_the_last_state(run, tmp_path):
    words = [
        "train",
        "ppo",
        "--env",
        env_id("NaNAt"),
        "--env-kwargs",
        '{"step": 20}',
        "--steps",
        "96",
        "--root",
        tmp_path,
    ]
    status, _, err = run(*words, *SMALL, "--eval-every", "None")
    assert status == 1
    assert re.search(r"non-finite reward in environment 0, step 20 .*nonfinite-20-0\.npz.*last\.safetensors", err)


# -- the whole way round --------------------------------------------------------------------------


def test_train_says_where_the_run_is_and_how_to_look_at_it(trained):
    folder, out = trained
    assert f"Run folder: {folder}" in out and f"ctrlrl report {folder}" in out
    assert "Last evaluation: mean return 6.0 over 2 deterministic episodes" in out
    document = json.loads((folder / "config.json").read_text())
    assert (document["method"], document["seed"], document["n_envs"], document["total_steps"]) == ("ppo", 3, 2, 96)
    assert document["config"]["network"]["actor_hidden"] == [8] and document["config"]["n_steps"] == 16


def test_the_command_line_and_python_train_the_same(trained, tmp_path):
    folder, _ = trained
    agent = api.make(
        "ppo", ENV, seed=3, n_envs=2, n_steps=16, batch_size=16, epochs=1, actor_hidden=(8,), critic_hidden=(8,),
        device="cpu", threads=1, eval_every=32, eval_episodes=2,
    )  # fmt: skip
    agent.learn(96, run_dir=tmp_path / "run", progress=False)
    assert (tmp_path / "run" / "config.json").read_bytes() == (folder / "config.json").read_bytes()
    cli_tensors, tensors = api.load(folder).tensors(), agent.tensors()
    assert all((cli_tensors[k] == v).all() for k, v in tensors.items())


def test_resuming_a_finished_run_says_so(run, trained):
    status, out, _ = run("train", "--resume", trained[0])
    assert status == 0 and "is finished: 96 of 96 steps" in out


def test_environment_arguments_reach_the_environment(run, tmp_path):
    words = ["train", "ppo", "--env", ENV, "--env-kwargs", '{"length": 4}', "--steps", "32", "--root", tmp_path]
    status, out, _ = run(*words, *SMALL)
    assert status == 0 and "mean return 10.0" in out


def test_a_preset_is_under_the_flags(run, tmp_path):
    words = ["train", "bpo", "--env", ENV, "--preset", "released", "--steps", "32", "--root", tmp_path]
    status, _, err = run(*words, *SMALL)
    assert status == 0, err
    (config,) = tmp_path.glob("*/*/*/config.json")
    document = json.loads(config.read_text())
    released = losses.get("bpo").presets["released"]
    assert document["loss"]["median_temp"] == released["median_temp"] == 1.0
    assert document["config"]["normalize_obs"] is False and document["config"]["normalize_reward"] is False
    assert document["config"]["network"]["activation"] == "relu"
    assert document["config"]["network"]["actor_hidden"] == [8], "the flag comes after the preset"


def test_the_help_of_a_preset_shows_its_defaults(run, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")  # wider than this, tyro sets two columns
    text = words_of(run("train", "bpo", "--preset", "released", "--help")[1])
    assert re.search(r"--actor-hidden .*?default: 256 256", text)


def test_the_users_own_loss_trains_and_can_be_evaluated(run, tmp_path):
    path = f"{__name__}:Mine"
    words = ["train", path, "--env", ENV, "--pull", "0.5", "--steps", "32", "--root", tmp_path]
    status, _, err = run(*words, *SMALL)
    assert status == 0, err
    (config,) = tmp_path.glob("*/*/*/config.json")
    assert json.loads(config.read_text())["loss"] == {"pull": 0.5}
    assert run("eval", config.parent, "--episodes", "2")[0] == 0
    status, out, err = run("train", path, "--help")
    assert status == 0 and "--pull" in out, err


def test_eval_prints_the_returns_and_writes_them(run, trained, tmp_path):
    out_file = tmp_path / "returns.json"
    status, out, err = run("eval", trained[0], "--episodes", "5", "--out", out_file)
    assert status == 0, err
    assert "mean 6.00" in out and "5 deterministic episodes" in out and "96 steps" in out
    data = json.loads(out_file.read_text())
    assert data["returns"] == [6.0] * 5 and data["lengths"] == [3] * 5 and len(set(data["seeds"])) == 5
    assert (data["checkpoint"], data["deterministic"], data["steps"]) == ("last", True, 96)
    status, out, _ = run("eval", trained[0], "--episodes", "2", "--checkpoint", "best", "--stochastic", "--seed", "9")
    assert status == 0 and "best checkpoint" in out and "2 stochastic episodes" in out


def test_eval_shows_the_worst_share_of_the_episodes(run, trained, tmp_path):
    out_file = tmp_path / "returns.json"
    status, out, err = run("eval", trained[0], "--episodes", "5", "--risk", "0.1", "0.5", "--out", out_file)
    assert status == 0, err
    assert "worst 10 %: value at risk 6.00, conditional value at risk 6.00" in out and "worst 50 %" in out
    assert json.loads(out_file.read_text())["risk"]["0.5"] == {"value_at_risk": 6.0, "conditional_value_at_risk": 6.0}
    for words, said in ((["--risk", "1.5"], "1.5 is no share"), (["--risk", "0.1", "--robust"], "--robust out")):
        status, _, err = run("eval", trained[0], *words)
        assert status == 2 and said in err


def test_eval_of_a_checkpoint_that_is_not_there_says_which_are(run, trained):
    status, _, err = run("eval", trained[0], "--checkpoint", "interrupted")
    assert status == 1 and "best.safetensors, last.safetensors" in err


def test_eval_refuses_an_output_in_no_folder_before_the_work(run, trained, tmp_path):
    status, _, err = run("eval", trained[0], "--episodes", "1", "--out", tmp_path / "no" / "such" / "file.json")
    assert status == 1 and "does not exist" in err


def test_play_without_a_display(run, tmp_path, monkeypatch):
    for name in ("DISPLAY", "WAYLAND_DISPLAY"):
        monkeypatch.delenv(name, raising=False)
    agent = api.make("ppo", "CartPole-v1", actor_hidden=(8,), device="cpu")
    agent.save(tmp_path / "agent")
    status, out, err = run("play", tmp_path / "agent", "--episodes", "2", "--seed", "5")
    assert status == 0, err
    assert len(out.splitlines()) == 2
    assert all(re.fullmatch(r"episode \d: return \d+\.00", line) for line in out.splitlines())


def test_report_writes_one_page(run, trained, tmp_path):
    status, out, err = run("report", trained[0], "--out", tmp_path / "page")
    assert status == 0, err
    (page,) = (tmp_path / "page").glob("*.html")
    assert f"Report: {page}" in out and "ppo" in page.read_text()


@pytest.mark.parametrize("kind", ["methods", "losses"])
def test_list_names_everything_with_its_paper(run, kind, monkeypatch):
    monkeypatch.setenv("COLUMNS", "250")
    status, out, _ = run("list", kind)
    assert status == 0
    for name in api.available(kind):
        assert re.search(rf"^{name}\s", out, re.M)
    assert out.count("arXiv:") > 50
    assert kind != "methods" or re.search(r"^bpo\s.*released", out, re.M)


def test_list_envs(run, monkeypatch):
    monkeypatch.setenv("COLUMNS", "250")
    status, out, _ = run("list", "envs")
    assert status == 0 and re.search(r"^CartPole-v1\s+sync, async", out, re.M)
    assert "HalfCheetah-v5" in out and "HalfCheetah-v4" not in out


def test_the_module_is_the_program():
    import subprocess

    done = subprocess.run([sys.executable, "-m", "ctrlrl", "nonsense"], capture_output=True, text=True, check=False)
    assert done.returncode == 2 and "no verb 'nonsense'" in done.stderr and "Traceback" not in done.stderr
