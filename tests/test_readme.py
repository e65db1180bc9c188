"""The README tells the truth: its code runs, its commands parse, its files and methods exist."""

import pathlib
import re
import shlex
import sys

import pytest
import tyro

from ctrlrl.api import available, methods
from ctrlrl.run import cli, correction_cli, data_cli, eval_cli, export_cli, generate_cli, ope_cli, tuning_cli

ROOT = pathlib.Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
VISIBLE = re.sub(r"<!--.*?-->", "", README, flags=re.DOTALL)
FENCED = re.findall(r"^```(\w*)\n(.*?)^```$", VISIBLE, flags=re.DOTALL | re.MULTILINE)
SHELL = [line for language, block in FENCED if language == "sh" for line in block.strip().splitlines()]
PROSE = re.sub(r"^```.*?^```$", "", VISIBLE, flags=re.DOTALL | re.MULTILINE)
INLINE = re.findall(r"`([^`\n]+)`", PROSE)
COMMANDS = [
    match[1]
    for line in [part for shell in SHELL for part in shell.split(" && ")] + INLINE
    if (match := re.match(r"(?:\S*/)?(?:python -m )?ctrlrl (\w+ .*)", line))
]


OPTIONS = {
    "eval": eval_cli.Eval, "play": cli.Play, "report": cli.Report, "ope": ope_cli.Ope, "tuning": tuning_cli.Tuning,
    "export": export_cli.Export,
}  # fmt: skip


def section(title):
    return re.search(rf"^## {title}\n(.*?)(?=^## |\Z)", VISIBLE, flags=re.DOTALL | re.MULTILINE)[1]


def test_the_two_commands_come_first_and_are_one_line_each():
    install = "python3 -m venv .venv && .venv/bin/pip install -q -c constraints.txt "
    assert [line.startswith(install) for line in SHELL] == [True, True] + [False] * (len(SHELL) - 2)
    assert README.index(SHELL[1]) < README.index("\n## ")


def test_ci_runs_the_readmes_test_command():
    assert SHELL[1].replace(".venv", ".ci-venv") in (ROOT / ".ci/run").read_text()


def test_python_runs(tmp_path, monkeypatch):
    """All blocks in order, in one folder, with few steps and episodes; a block headed ``# name.py`` is that file."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    blocks = [block for language, block in FENCED if language == "python"]
    assert len(blocks) >= 3
    scope = {}
    for block in blocks:
        if name := re.match(r"# (\w+\.py)\n", block):
            (tmp_path / name[1]).write_text(block)
            monkeypatch.delitem(sys.modules, name[1].removesuffix(".py"), raising=False)
            continue
        block = re.sub(r"learn\([\d_]+\)", "learn(64, progress=False)", block)
        block = re.sub(r"episodes=\d+", "episodes=2", block)
        block = re.sub(r"(ctrlrl\.make\([^)]*)\)", r"\1, n_steps=64, epochs=1, eval_every=None)", block)
        exec(compile(block, "README.md", "exec"), scope)
    assert len(scope["result"].returns) == 2
    assert scope["agent"].steps == 64
    assert sorted(p.name for p in (tmp_path / "runs").iterdir()) == ["HalfCheetah-v5", "Pendulum-v1"]
    run = next((tmp_path / "runs/Pendulum-v1").glob("*/*"))
    assert cli.main(["eval", str(run), "--episodes", "1"]) == 0


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_parse(command, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    for language, block in FENCED:
        if language == "python" and (name := re.match(r"# (\w+\.py)\n", block)):
            (tmp_path / name[1]).write_text(block)
    monkeypatch.setattr("ctrlrl.engine.prior.settings_of", lambda folder: {})
    verb, *words = shlex.split(command.replace("RUN...", "RUN"))
    assert verb in cli.VERBS
    if "--help" in words:
        assert words == [words[0], "--help"] and words[0] in available("methods")
    elif verb == "train" and "--resume" in words:
        tyro.cli(cli.Resume, args=words)
    elif verb == "train":
        assert ":" in words[0] or words[0] in available("methods")
        from ctrlrl.api import get_method

        offline = "--dataset" in words
        words = [w.replace("--from", "--start-from") for w in words]
        if "--published" not in words:
            cls = get_method(words[0], "--start-from" in words and not offline)
            cli._parse_training(cls, words[1:], cli.TrainOffline if offline else cli.Train)
    elif verb == "list":
        assert cli.main([verb, *words]) == 0
    elif verb == "data":
        kind = generate_cli.Options if words[0] == "generate" else getattr(data_cli, words[0].capitalize())
        tyro.cli(kind, args=words[1:])
    elif "--correct" in words:
        tyro.cli(correction_cli.EvalCorrected, args=words)
    else:
        tyro.cli(OPTIONS[verb], args=words)


def test_every_verb_is_shown():
    assert {command.split()[0] for command in COMMANDS} == set(cli.VERBS)


def test_flags_in_the_text_exist(capsys):
    offline = ("td3_bc", "policy_guided_diffusion")
    for name in ("bpo", "gorl", "sac", "distributional_dp", *offline):
        with pytest.raises(SystemExit):
            cli._parse_training(methods()[name].agent, ["--help"], cli.TrainOffline if name in offline else cli.Train)
    with pytest.raises(SystemExit):
        tyro.cli(eval_cli.Eval, args=["--help"])
    known = set(re.findall(r"--[a-z][a-z-]*", capsys.readouterr().out)) | {"--from"}
    named = {flag for code in INLINE if code.startswith("--") for flag in re.findall(r"--[a-z][a-z-]*", code)}
    assert named and named <= known


def test_extras_exist():
    text = (ROOT / "pyproject.toml").read_text()
    for extra in re.findall(r"\.\[(\w+)\]", VISIBLE):
        assert re.search(rf"^{extra} = \[", text, flags=re.MULTILINE), extra


def test_files_in_the_table_exist():
    paths = [code for code in re.findall(r"`([^`]+)`", section("Where things are")) if "/" in code]
    assert len(paths) > 10
    for path in paths:
        assert (ROOT / path.removeprefix("bash ")).exists(), path
    for path in re.findall(r"`((?:ctrlrl|tests|scripts)/[\w/.]+)`", VISIBLE):
        assert (ROOT / path).exists(), path
    for target in re.findall(r"\]\(([^)]+)\)", VISIBLE):
        assert target.startswith("https://") or (ROOT / target).exists(), target


def test_methods_in_the_tables_are_the_methods_there_are():
    text = section("Methods")
    rows = dict(re.findall(r"^\| `(\w+)` \|(.*)\|$", text, flags=re.MULTILINE))
    for name, row in rows.items():
        paper = methods()[name].paper
        found = re.search(r"arXiv:(\d{4}\.\d{5})", paper)
        assert (found[1] if found else paper) in row
    families = re.findall(r"^\| [\w, ]+ \| ((?:`\w+` ?)+)\|$", text, flags=re.MULTILINE)
    others = [name for family in families for name in re.findall(r"`(\w+)`", family)]
    assert sorted([*rows, *others]) == available("methods")


def test_the_page_of_losses_is_what_the_program_prints():
    """If this fails: ctrlrl list losses --markdown > docs/losses.md"""
    from ctrlrl.run.listing import markdown

    assert (ROOT / "docs/losses.md").read_text() == markdown()


def test_the_run_folder_is_as_shown():
    from ctrlrl.engine import runfolder

    listed = set(re.findall(r"^ {8}(\S+?)/? ", section("What a run holds"), flags=re.MULTILINE))
    assert listed == {
        runfolder.CONFIG, runfolder.VERSIONS, runfolder.METRICS, runfolder.EVALUATIONS, runfolder.TENSORBOARD,
        runfolder.CHECKPOINTS,
    }  # fmt: skip


def test_figures_of_the_text_are_the_defaults():
    from ctrlrl.engine.config import OnPolicyConfig

    config = OnPolicyConfig()
    assert f"Every {config.checkpoint_every:,} steps (`--checkpoint-every`" in README
    assert f"{config.eval_episodes} every {config.eval_every:,} steps and at the end" in README
