"""The comparison of losses: short runs, what is measured of them, and the merging of shards."""

import importlib
import json
import math
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from ctrlrl.engine.runfolder import write_json
from ctrlrl.losses import base
from ctrlrl.nets.heads import Categorical
from ctrlrl.types import SequenceBatch

SCRIPT = Path(__file__).parents[2] / "scripts" / "bench_losses.py"


@pytest.fixture(scope="module")
def bench():
    """The script and the two files it is made of, as one."""
    sys.path.insert(0, str(SCRIPT.parent))
    try:
        parts = [importlib.import_module(name) for name in ("losses_runs", "losses_claims", "bench_losses")]
    finally:
        sys.path.remove(str(SCRIPT.parent))
    return SimpleNamespace(**{k: v for part in parts for k, v in vars(part).items()})


@pytest.fixture(scope="module")
def runs(bench, tmp_path_factory):
    """Shards of two iterations each."""
    out = tmp_path_factory.mktemp("losses")
    jobs = [("sort", bench.PLAIN, 0), ("sort", bench.PLAIN, 1), ("sort", "d3s", 0), ("sort", "awm", 0),
            ("balance", bench.PLAIN, 0), ("balance", "bapo", 0), ("cartpole", "ppo", 0)]  # fmt: skip
    return out, {job: bench.run(bench.Job(*job), str(out), steps=600) for job in jobs}


def shard(bench, out, *job):
    return json.loads(bench.shard(out, bench.Job(*job)).read_text())


def test_settings_may_hold_commas(bench):
    assert bench.parse('gdpo,weights="0.6,0.2,0.2",epochs=3') == ("gdpo", {"weights": "0.6,0.2,0.2", "epochs": 3})


def test_every_arm_and_headline_loss_exists(bench):
    arms = {bench.parse(arm)[0] for claim in bench.CLAIMS.values() for arm in claim.arms}
    assert arms | {bench.parse(m)[0] for m in bench.HEADLINE} <= set(base.names())


def test_what_a_method_demands_of_the_loop_comes_before_the_tasks_settings(bench, monkeypatch):
    asked = {}
    monkeypatch.setattr("ctrlrl.api.make", lambda name, env, **settings: asked.update(settings))
    task = bench.Task("CartPole-v1", 1, "ppo", {"n_envs": 2}, {"batch_size": 8, "n_groups": 3}, {"n_steps": 5})
    bench.build(task, "rloo", 0)
    assert "batch_size" not in asked and asked["n_groups"] == 3 and "n_steps" not in asked
    asked.clear()
    bench.build(task, "ppo,n_envs=4", 0)
    assert asked["n_steps"] == 5 and asked["n_envs"] == 4 and "n_groups" not in asked


def test_runs_are_scored(bench, runs):
    out, outcomes = runs
    assert {k: v for k, v in outcomes.items() if v != "ran" and k[1] != "awm"} == {}
    assert outcomes["sort", "awm", 0].startswith("not here (awm cannot run on token sequences")
    record = shard(bench, out, "sort", bench.PLAIN, 0)
    assert record["steps"] >= 600 and record["settings"]["n_groups"] == 16
    score = record["score"]
    assert 0.0 < score["reward"] < 1.0 and score["length"] == 4.0 and score["channels"] == [score["reward"]]
    assert 1.5 < score["entropy"] < math.log(6)
    assert shard(bench, out, "cartpole", "ppo", 0)["score"]["reward"] > 5.0


def test_positions_with_a_gradient_are_counted(bench, runs):
    out, _ = runs
    d3s, grpo = (shard(bench, out, "sort", m, 0) for m in ("d3s", bench.PLAIN))
    # a tenth to a third of the positions of half of the rows or more
    assert 0.04 < d3s["used"] / d3s["seen"] < 0.25 and grpo["used"] / grpo["seen"] > 0.5


def uniform(bench, task, certain=()):
    """Scores of a policy that is uniform, but certain at some numbers of written tokens."""
    agent = bench.build(bench.TASKS[task], "grpo", 0)
    size = agent.policy.vocabulary

    def distribution(obs):
        written = (obs > 0).sum(-1)
        peak = torch.tensor([99.0 * (int(n) in certain) for n in written])
        return Categorical(torch.cat([peak.unsqueeze(1), torch.zeros(len(obs), size - 1)], 1))

    agent.policy.distribution = distribution
    return bench.score_tokens(agent, answers=4096)


def test_the_uniform_policy_scores_what_the_task_says(bench):
    # a prompt of four tokens, two of the policy, four of the environment, two of the policy
    score = uniform(bench, "arithmetic", certain=(6, 7, 8, 9))
    assert score["reward"] == pytest.approx(1 / 7, abs=0.01) and score["entropy"] == pytest.approx(math.log(7))
    assert score["length"] == 8.0 and score["channels"] == pytest.approx([1 / 7, 1 / 7], abs=0.02)


def test_responses_of_different_lengths(bench):
    score = uniform(bench, "channels")
    # one token in seven ends the response, the eighth token does in any case
    assert score["length"] == pytest.approx(7 * (1 - (6 / 7) ** 8), abs=0.15)
    both = score["success"] * (score["right_length"] or 0.0) + (1 - score["success"]) * score["wrong_length"]
    assert both == pytest.approx(score["length"]) and 0.0 < score["success"] < 0.02


def test_groups_that_vary_are_counted_without_what_is_sampled_beside_them(bench):
    loss = base.get("grpo")()
    found = SimpleNamespace(
        group=torch.tensor([5, 5, 9, 9, 9]), sequence_return=torch.tensor([1.0, 1.0, 0.0, 1.0, 0.0]),
        source=torch.tensor([0, 0, 0, 0, 0]), mask=torch.ones(5, 1, dtype=torch.bool),
        advantage=torch.zeros(5, 1),
    )  # fmt: skip
    watched = bench.Watched(loss)
    watched.loss = SimpleNamespace(begin=lambda batch, knobs, memory: base.Start(batch, memory, {}))
    assert float(watched.begin(found, {}, {}).stats["varied"]) == 0.5
    found.source = torch.tensor([0, 0, 0, 1, 0])
    assert float(watched.begin(found, {}, {}).stats["varied"]) == 0.0


def test_shares_of_the_positive_advantages(bench, runs):
    out, _ = runs
    shares = shard(bench, out, "balance", "bapo", 0)["shares"]
    assert all(0.6 <= s["low"] <= 0.9 and 1.2 <= s["high"] <= 3.0 for s in shares)
    assert all(s["after"] >= s["before"] - 1e-6 for s in shares if s["before"] is not None)
    assert all(s["before"] == s["after"] for s in shard(bench, out, "balance", bench.PLAIN, 0)["shares"])


def test_the_searched_band_is_told_from_the_one_it_starts_with(bench):
    one = torch.ones(2, 1)
    watched = bench.Watched(base.get("bapo")(positive_share=0.9))
    watched.batch = SequenceBatch(
        obs=one, action=one, mask=one.bool(), logp_old=-one, advantage=torch.tensor([[1.0], [-1.0]]),
        value_target=one, value_old=one,
    )  # fmt: skip
    out = SimpleNamespace(logp=torch.tensor([[math.log(2.0) - 1.0], [-1.0]]))
    found = watched.shares(lambda obs, action: out)
    # r = 2 counts 1.2 in the first band, 2 in the widest; r = 1 counts 1
    assert found["before"] == pytest.approx(1.2 / 2.2) and found["after"] == pytest.approx(2 / 3)


def test_merging(bench, runs, tmp_path, capsys):
    out, _ = runs
    target, picture = tmp_path / "losses.json", tmp_path / "losses.png"
    bench.main(["--minutes", "0", "--out", str(out), "--json", str(target), "--plot", str(picture), "--markdown"])
    document = json.loads(target.read_text())
    rows = document["table"]["sort"]
    own = [shard(bench, out, "sort", bench.PLAIN, k)["score"]["reward"] for k in range(2)]
    assert rows[bench.PLAIN]["reward"]["runs"] == pytest.approx(own, abs=1e-4) and rows[bench.PLAIN]["seeds"] == 2
    assert rows[bench.PLAIN]["reward"]["low"] <= sum(own) / 2 <= rows[bench.PLAIN]["reward"]["high"]
    assert document["table"]["cartpole"]["ppo"]["reward"]["low"] is None
    assert [a[1] for a in document["absent"]] == ["awm"] and len(document["runs"]) == 7
    assert {"samples", "balance"} == set(document["claims"])
    assert picture.stat().st_size > 10_000
    text = capsys.readouterr().out
    assert f"| `{bench.PLAIN}` |" in text and "| `d3s` | " in text


def records_of(entropies, target=None):
    settings = {"loss": {} if target is None else {"entropy_target": target}}
    return [{"score": {"entropy": e, "success": 0.5}, "settings": settings} for e in entropies]


def test_entropy_is_judged_by_the_target_or_against_grpo(bench):
    found = {
        bench.PLAIN: records_of([0.1, 0.3]), "aepo": records_of([0.5, 0.6], 0.5), "dcpo": records_of([0.3], 0.5),
        "epo": records_of([0.29]), "steer": records_of([0.31]),
    }  # fmt: skip
    assert {w: h for w, h, _ in bench.judge_entropy(found)} == {
        "aepo": True, "dcpo": False, "epo": False, "steer": True
    }  # fmt: skip


def test_claims_compare_the_seeds_that_all_arms_have(bench, tmp_path):
    for method, seeds in ((bench.PLAIN, (0, 1, 2)), ("d3s", (0, 1))):
        for seed in seeds:
            job = bench.Job("sort", method, seed)
            record = {"task": "sort", "method": method, "seed": seed, "outcome": "ran", "steps": 100,
                      "used": 90 if method == bench.PLAIN else 9, "score": {"reward": 0.5 if seed < 2 else 0.9},
                      "curve": [{"step": 50, "reward": 0.5}, {"step": 100, "reward": 0.9}]}  # fmt: skip
            bench.shard(tmp_path, job).parent.mkdir(exist_ok=True)
            write_json(bench.shard(tmp_path, job), record)
    found = bench.judge(tmp_path)
    assert found["samples"]["seeds"] == 2 and found["samples"]["verdicts"][0]["held"]
    # half of GRPO's 90 positions for the same reward
    assert (
        "reward 0.500 after 9 positions with a gradient, for which GRPO took 45"
        in found["samples"]["verdicts"][0]["numbers"]
    )


def test_the_queue_gives_every_method_a_run_before_the_second_seed(bench):
    args = SimpleNamespace(
        seeds=2, tasks=["sort"], methods=["grpo", "d3s"], claims=True, claim_seeds=1, only=["length"], all=True
    )
    jobs = bench.queue_of(args)
    assert jobs[:4] == [
        ("sort", "grpo", 0), ("sort", "d3s", 0), ("length", bench.PLAIN, 0), ("length", "dr_grpo", 0),
    ]  # fmt: skip
    assert jobs[-2:] == [("sort", "grpo", 1), ("sort", "d3s", 1)]
    assert sum(j.seed == 0 and j.task == "sort" for j in jobs) == len(base.names()) and len(jobs) == len(set(jobs))
