"""``ctrlrl data`` as a user types it: sets are made, looked at, converted and checked; nothing half-written stays."""

import json
import os
import re
import signal

import gymnasium as gym
import numpy as np
import pytest
from helpers import agents, off_policy

from ctrlrl.data import d4rl, minari
from ctrlrl.data.dataset import DatasetError
from ctrlrl.engine.data_making import from_run
from ctrlrl.run import data_cli

pytest.importorskip("minari", reason="minari is not installed")
pytest.importorskip("h5py", reason="h5py is not installed")


@pytest.fixture(autouse=True)
def roots(tmp_path, monkeypatch):
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "minari"))
    monkeypatch.setenv("D4RL_DATASET_DIR", str(tmp_path / "d4rl"))
    monkeypatch.setenv("COLUMNS", "200")


@pytest.fixture
def run(capsys):
    """(exit status, standard output, standard error) of ``ctrlrl data ...``."""

    def call(*words):
        try:
            status = data_cli.main([str(w) for w in words])
        except SystemExit as stop:  # tyro ends the process itself for --help and wrong flags
            status = stop.code or 0
        out, err = capsys.readouterr()
        return status, out, err

    return call


class Still(gym.Env):
    """The smaller the action, the better; a new policy's mode is almost zero."""

    observation_space = gym.spaces.Box(-np.inf, np.inf, (3,), np.float32)
    action_space = gym.spaces.Box(-1.0, 1.0, (1,), np.float32)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return self.np_random.normal(size=3).astype(np.float32), {}

    def step(self, action):
        obs, end = self.np_random.normal(size=3).astype(np.float32), self.np_random.random(2) < 0.1
        return obs, -float(action[0] ** 2), bool(end[0]), bool(end[1]), {}


if "data_cli/Still-v0" not in gym.registry:
    gym.register("data_cli/Still-v0", f"{__name__}:Still")
STILL = f"{__name__}:data_cli/Still-v0"


@pytest.fixture(scope="module")
def policy(tmp_path_factory):
    """The folder of a run with a replay of 40 steps."""
    folder = tmp_path_factory.mktemp("runs") / "hers"
    agents.quiet(off_policy.make("sac", STILL, seed=1), 40, run_dir=folder)
    return folder


def shown(out):
    """The rows of the table that ``info`` prints."""
    rows = (re.split(r"\s{2,}", line.strip(), maxsplit=1) for line in out.splitlines())
    return {row[0]: row[1] for row in rows if len(row) == 2}


def assert_same(a, b):
    mine, theirs = a.columns(), b.columns()
    assert mine.keys() == theirs.keys()
    for name in mine:
        np.testing.assert_array_equal(mine[name], theirs[name], err_msg=name)
    words = {"algorithm_name", "normalized_mean_return"}
    assert {k: v for k, v in a.info.about.items() if k not in words} == {
        k: v for k, v in b.info.about.items() if k not in words
    }
    assert a.info.env == b.info.env and a.info.ref_max_score == b.info.ref_max_score


def everything_below(folder):
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*"))


# -- help -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("words", [[], ["-h"], ["--help"]])
def test_help_lists_every_verb(run, words):
    status, out, _ = run(*words)
    assert status == 0 and all(re.search(rf"^  {verb}\s", out, re.M) for verb in data_cli.VERBS)


@pytest.mark.parametrize("verb", sorted(data_cli.VERBS))
def test_every_verb_has_help(run, verb):
    status, out, _ = run(verb, "--help")
    assert status == 0 and f"ctrlrl data {verb}" in out


def test_an_unknown_verb_names_the_nearest(run):
    status, _, err = run("maek")
    assert status == 2 and "Did you mean make?" in err and len(err.splitlines()) == 1


# -- making ---------------------------------------------------------------------------------------


def test_making_writes_both_formats_with_one_content(run, policy, tmp_path):
    target = tmp_path / "new" / "medium.hdf5"
    words = ["make", "--kind", "medium", "--policy", policy, "--steps", "50", "--out", target, "--seed", "3", "--quiet"]
    words += ["--minari", "ctrlrl/noisy/medium-v0", "--expert", policy, "--reference-episodes", "4", "--author", "A B"]
    status, out, err = run(*words)
    assert status == 0, err
    file, own = d4rl.read(target, env=STILL), minari.read("ctrlrl/noisy/medium-v0", env=STILL)
    assert_same(file, own)
    assert len(own) == 50 and "action_log_probs" in own.infos
    assert d4rl.read(target).info.about["env_left_out"] == STILL  # a module of others
    about = own.info.about
    assert about["kind"] == "medium" and about["behaviour"]["run"] == "hers" and about["author"] == "A B"
    assert about["algorithm_name"] == about["algorithm"] == "sac" and len(about["expert"]["sha256"]) == 64
    assert own.info.ref_min_score < own.info.ref_max_score
    rows = shown(out)
    assert rows["steps"] == "50" and rows["behaviour policy"] == "log-probabilities" and rows["author"] == "A B"
    assert rows["environment"] == STILL and "normalized_mean_return" in about and rows["behaviour method"] == "sac"
    score = own.normalized(own.returns.mean())
    assert rows["scores"].startswith(f"mean {score:.1f};") and "No reference" not in out


def test_made_twice_with_one_seed_the_files_hold_the_same(run, policy, tmp_path):
    for name, seed in (("a", 4), ("b", 4), ("c", 5)):
        words = ["--kind", "medium", "--policy", policy, "--steps", "40", "--seed", seed, "--quiet"]
        assert run("make", *words, "--out", tmp_path / f"{name}.hdf5")[0] == 0
    one, again, other = (d4rl.read(tmp_path / f"{name}.hdf5") for name in "abc")
    assert_same(one, again)
    assert not np.array_equal(one.observations, other.observations)


def test_random_data_need_no_policy_and_medium_replay_no_steps(run, policy, tmp_path):
    words = ["make", "--kind", "random", "--env", STILL, "--steps", "30", "--minari", "random-v0", "--quiet"]
    status, out, _ = run(*words)
    assert status == 0 and len(minari.read("random-v0")) == 30 and "give --expert RUN" in out
    target = tmp_path / "replay.hdf5"
    assert run("make", "--kind", "medium-replay", "--policy", policy, "--out", target)[0] == 0
    np.testing.assert_array_equal(d4rl.read(target).observations, from_run(policy).observations)


def test_progress_goes_to_the_other_stream(run, tmp_path):
    words = ["make", "--kind", "random", "--env", STILL, "--steps", "30", "--out", tmp_path / "x.hdf5"]
    status, out, err = run(*words)
    assert status == 0 and "100%" in err and "100%" not in out


def test_targets_are_looked_at_before_the_work(run, policy, tmp_path, monkeypatch):
    monkeypatch.setattr("ctrlrl.engine.data_making.make", lambda *a, **k: pytest.fail("the work was begun"))
    there = tmp_path / "there.hdf5"
    there.write_bytes(b"")
    (tmp_path / "minari" / "taken-v0").mkdir(parents=True)
    words = ["make", "--kind", "random", "--env", STILL, "--steps", "30"]
    assert run(*words)[0] == 2
    for target, message in [
        (["--out", there], "there.hdf5 exists"),
        (["--out", tmp_path / "x.npz"], r"ends in '.npz'; expected .hdf5 or .h5"),
        (["--minari", "taken-v0"], "raise the version"),
        (["--minari", "noversion"], "neither a D4RL file .* nor a Minari id"),
    ]:
        with pytest.raises(DatasetError, match=message):
            run(*words, *target)


def test_spaces_that_the_format_cannot_hold_are_refused_before_the_work(run, tmp_path, monkeypatch):
    monkeypatch.setattr("ctrlrl.engine.data_making.make", lambda *a, **k: pytest.fail("the work was begun"))
    env, target = "helpers.envs:test/DictObs-v0", tmp_path / "x.hdf5"
    with pytest.raises(DatasetError, match="no Dict observations; write it as a Minari set"):
        run("make", "--kind", "random", "--env", env, "--steps", "9", "--out", target)
    agents.quiet(off_policy.make("sac", env), 8, run_dir=tmp_path / "run")
    with pytest.raises(DatasetError, match="no Dict observations; write it as a Minari set"):
        run("make", "--kind", "medium", "--policy", tmp_path / "run", "--steps", "9", "--out", target)


def test_arguments_of_the_environment_are_added_to_the_policys_own(run, tmp_path):
    target = tmp_path / "x.hdf5"
    folder = tmp_path / "runs"
    env = "helpers.envs:test/OnlyTruncates-v0"
    agents.quiet(off_policy.make("sac", env, env_kwargs={"length": 4}), 16, run_dir=folder)
    words = ["make", "--kind", "expert", "--policy", folder, "--steps", "9", "--out", target, "--quiet"]
    status, out, _ = run(*words, "--reference-episodes", "2")
    assert status == 0 and "the expert is no better than random actions" in out
    data = d4rl.read(target)
    assert data.returns.tolist() == [10, 10, 1] and data.info.ref_min_score is data.info.ref_max_score is None
    assert data.info.about["references"] == {"episodes": 2, "seed": 0, "random": 10, "expert": 10}
    target.unlink()
    words = ["make", "--kind", "medium", "--policy", folder, "--steps", "9", "--out", target, "--quiet"]
    assert run(*words, "--env-kwargs", '{"length": 2}', "--env", env)[0] == 0
    assert len(d4rl.read(target).episodes) == 5
    for wrong in ("{", "3"):
        with pytest.raises(ValueError, match="--env-kwargs is"):
            run(*words[:-3], "--out", tmp_path / "y.hdf5", "--env-kwargs", wrong)
    with pytest.raises(ValueError, match="--env ID"):
        run("make", "--kind", "random", "--steps", "3", "--out", tmp_path / "y.hdf5")


@pytest.fixture
def heeded():
    """Ctrl-C as in a terminal: a shell's background jobs begin with it ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("heeded")
def test_ctrl_c_while_making_leaves_nothing(run, tmp_path, monkeypatch):
    monkeypatch.setattr(off_policy.Stopping, "steps", 0)
    monkeypatch.setattr(off_policy.Stopping, "at", 25)
    words = ["make", "--kind", "random", "--env", off_policy.STOPPING, "--steps", "80", "--quiet"]
    before = everything_below(tmp_path)
    status, out, err = run(*words, "--out", tmp_path / "new" / "x.hdf5", "--minari", "ctrlrl/x-v0")
    assert status == 130 and "nothing is left" in err and len(err.splitlines()) == 1
    assert everything_below(tmp_path) == before


@pytest.mark.parametrize("target", ["x.hdf5", "ctrlrl/x-v0"])
def test_ctrl_c_while_writing_leaves_nothing(run, policy, tmp_path, monkeypatch, target):
    def stop(*words):
        raise KeyboardInterrupt

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(os, "replace", stop)  # the last moment
    status, _, err = run("convert", policy, target)
    assert status == 130
    assert [name for name in everything_below(tmp_path) if "x" in name.rpartition("/")[2]] == []


# -- converting -----------------------------------------------------------------------------------


def test_a_run_becomes_a_set_in_one_command(run, policy, tmp_path):
    expected = from_run(policy)
    for target, read in [(tmp_path / "replay.h5", d4rl.read), ("ctrlrl/noisy/replay-v0", minari.read)]:
        status, out, _ = run("convert", policy, target)
        assert status == 0 and out.startswith(f"{target}: 40 steps in {len(expected.episodes)} episodes")
        assert_same(read(target, env=STILL), expected)
    assert run("convert", policy, "first-v0", "--steps", "24")[0] == 0
    assert len(minari.read("first-v0")) == 24


def test_there_and_back_is_the_same(run, policy, tmp_path):
    first, second = tmp_path / "a.hdf5", tmp_path / "b.hdf5"
    for source, target in [(policy, first), (first, "mid-v0"), ("mid-v0", second)]:
        assert run("convert", source, target)[0] == 0
    assert_same(d4rl.read(first), d4rl.read(second))


def test_steps_that_minari_cannot_hold_are_counted(run, tmp_path):
    import h5py

    with h5py.File(tmp_path / "old.hdf5", "w") as file:
        file["observations"] = np.arange(12, dtype=np.float32).reshape(6, 2)
        file["actions"], file["rewards"] = np.zeros((6, 1), np.float32), np.ones(6, np.float32)
        file["terminals"], file["timeouts"] = np.array([0, 0, 1, 0, 0, 0], bool), np.array([0, 0, 0, 0, 0, 1], bool)
    status, out, _ = run("convert", tmp_path / "old.hdf5", "old-v0")
    assert status == 0 and "old-v0: 5 steps in 2 episodes" in out and "1 steps were left out" in out
    assert minari.read("old-v0").rewards.sum() == 5


def test_what_cannot_be_converted_is_said(run, policy, tmp_path):
    for source, target, message in [
        (tmp_path / "none.hdf5", "x-v0", "none.hdf5"),
        (policy, tmp_path / "x.csv", "neither a D4RL file"),
        (policy, "hf://farama/x-v0", "neither a D4RL file"),
    ]:
        with pytest.raises(DatasetError, match=message):
            run("convert", source, target)
    run("convert", policy, "here-v0")
    with pytest.raises(DatasetError, match="here-v0 is none"):
        run("convert", "here-v0", "y-v0", "--steps", "3")


# -- looking --------------------------------------------------------------------------------------


def test_info_says_what_is_in_a_set(run, tmp_path):
    target = tmp_path / "counted.hdf5"
    env = "helpers.envs:test/OnlyTerminates-v0"
    assert run("make", "--kind", "random", "--env", env, "--steps", "8", "--out", target, "--quiet")[0] == 0
    status, out, _ = run("info", target)
    rows = shown(out)
    assert status == 0 and rows["steps"] == "8" and rows["episodes"] == "3, of mean 3; 2 | 2 | 3 | 3 | 3 steps"
    assert rows["ends"] == "2 terminals, 1 timeouts, 0 without a known next observation"
    assert rows["returns"] == "mean 5.00; 3.00 | 4.50 | 6.00 | 6.00 | 6.00"
    assert rows["scores"] == "no reference scores" and rows["env_left_out"] == env
    assert rows["observations"] == "(1,) float32 in [-inf, inf]" and rows["actions"] == "(1,) float32 in [-1, 1]"
    assert rows["kind"] == "random" and rows["behaviour policy"] == "log-probabilities"
    assert len(rows["SHA-256"]) == 64 and "torch" not in out


def test_info_of_a_run_is_that_of_its_replay(run, policy):
    rows = shown(run("info", policy)[1])
    assert rows["steps"] == "40" and rows["behaviour policy"] == "not recorded" and rows["algorithm"] == "sac"


def test_list_shows_d4rl_and_minari_and_what_is_here(run, policy, tmp_path):
    run("convert", policy, "ctrlrl/noisy/replay-v0")
    from ctrlrl.data.d4rl_catalogue import entry

    (tmp_path / "d4rl").mkdir()
    (tmp_path / "d4rl" / entry("hopper-medium-v2").url.rpartition("/")[2]).write_bytes(b"")
    status, out, _ = run("list", "hopper-medium")
    lines = {line.split()[0]: line for line in out.splitlines() if line.startswith("hopper")}
    assert status == 0 and "hopper-medium-v2" in lines and "-20.2723" in lines["hopper-medium-v2"]
    assert lines["hopper-medium-v2"].split()[-1] == "yes" and lines["hopper-medium-v0"].split()[-1] != "yes"
    assert not any("noisy" in line or "walker" in line for line in out.splitlines())
    out = run("list", "--here")[1]
    assert "ctrlrl/noisy/replay-v0" in out and len(re.findall(r"-v2", out)) == 1 and "3234.3" in out


# -- checking -------------------------------------------------------------------------------------


def test_verify_passes_a_sound_set(run, policy, tmp_path):
    for target in (tmp_path / "a.hdf5", "a-v0"):
        run("convert", policy, target)
        status, out, _ = run("verify", target)
        assert status == 0 and f"{target} is sound" in out


def test_verify_prints_all_errors_of_a_d4rl_file(run, policy, tmp_path):
    import h5py

    target = tmp_path / "a.hdf5"
    run("convert", policy, target)
    with h5py.File(target, "r+") as file:
        file["rewards"][7] = np.nan
        file["observations"][9, 1] = np.inf
    status, out, _ = run("verify", target)
    assert status == 1 and "rewards[7]" in out and "observations[9]" in out and str(target) in out
    assert "errors" in out.splitlines()[-1]


def test_verify_prints_all_errors_of_a_minari_set(run, policy, tmp_path):
    import h5py

    run("convert", policy, "a-v0")
    with h5py.File(tmp_path / "minari" / "a-v0" / "data" / "main_data.hdf5", "r+") as file:
        file["episode_0/rewards"][0] = np.nan
        file["episode_1/truncations"][-1] = file["episode_1/terminations"][-1] = False
    status, out, _ = run("verify", "a-v0")
    assert status == 1 and "episode_0: rewards[0]" in out and "episode_1: has no end" in out
    assert out.splitlines()[-1] == "a-v0: 2 errors"
    assert "1 error" in run("verify", "a-v0", "--unfinished", "cut")[1].splitlines()[-1]


def test_verify_of_a_d4rl_id_looks_at_its_file_in_the_cache(run, tmp_path, monkeypatch):
    from ctrlrl.data import download

    monkeypatch.setattr(minari, "is_id", lambda name: pytest.fail("Minari was asked"))
    status, out, _ = run("verify", "maze2d-umaze-v1")
    assert status == 1 and "maze2d-umaze-v1 has not been fetched yet" in out
    from data.d4rl_files import rows, save

    from ctrlrl.data.d4rl_catalogue import entry

    file = tmp_path / "d4rl" / entry("maze2d-umaze-v1").url.rpartition("/")[2]
    file.parent.mkdir()
    columns = rows((3, 4), "c-", size=4)
    save(file, columns)
    status, out, _ = run("verify", "maze2d-umaze-v1")
    assert status == 0 and out.splitlines()[-1] == "maze2d-umaze-v1 is sound" and str(file) in out
    monkeypatch.setattr(download, "_checked", set())
    save(file, rows((3, 5), "c-", size=4))
    status, out, _ = run("verify", "maze2d-umaze-v1")
    assert status == 1 and "is not the file of its first use" in out
    columns["rewards"][2] = np.nan
    save(file, columns)
    status, out, _ = run("verify", "maze2d-umaze-v1")
    assert status == 1 and "rewards[2]" in out


def test_verify_of_what_is_not_there_is_an_error(run, tmp_path):
    status, out, _ = run("verify", tmp_path / "none.hdf5")
    assert status == 1 and "none.hdf5" in out


def test_about_holds_json_values_only(policy):
    assert json.loads(json.dumps(from_run(policy).info.about)) == from_run(policy).info.about
