"""The kinds of data in D4RL's protocol, and their reference scores."""

import dataclasses
import hashlib
import json

import numpy as np
import pytest
import torch
from engine.data_making_parts import HIGH, LOPSIDED, assert_same, counted, sac
from helpers import agents, off_policy
from helpers.envs import env_id

from ctrlrl import api
from ctrlrl.engine import data_making
from ctrlrl.engine.data_making import Source, concatenate, make, measure_references
from ctrlrl.types import EnvSpec


def saved(folder, **settings):
    agent = sac(**settings)
    agents.quiet(agent, 8, run_dir=folder)
    return Source(api.load(folder), folder)


def test_medium_expert_is_half_and_half_in_this_order(tmp_path):
    medium, expert = saved(tmp_path / "medium"), Source(off_policy.make("td3", LOPSIDED))
    data = make("medium-expert", EnvSpec(LOPSIDED), medium, 41, expert=expert, seed=1, reference_episodes=3)
    assert len(data) == 41 and data.timeouts[19] | data.terminals[19]
    mode = medium.agent.predict(data.observations, deterministic=True)[0]
    assert (np.abs(data.actions - mode) > 1e-3).any(1)[:20].all()  # sampled
    np.testing.assert_allclose(data.actions[20:], expert.agent.predict(data.observations[20:])[0], atol=1e-6)
    assert data.infos == {}  # TD3 has no density
    assert data.info.about["behaviour"]["method"] == "sac" and data.info.about["expert"]["method"] == "td3"


@pytest.mark.parametrize("kind", ["medium", "expert", "random"])
def test_the_set_says_what_it_is_and_scores_itself(tmp_path, kind):
    source = saved(tmp_path / "run")
    source = dataclasses.replace(source, agent=api.load(source.run))
    env = EnvSpec(LOPSIDED, n_envs=5)
    data = make(kind, env, source, 60, expert=source, seed=2, reference_episodes=10)
    again = make(kind, env, source, 60, expert=source, seed=2, reference_episodes=10)
    assert_same(data, again)
    other = make(kind, env, source, 60, seed=3)
    assert not np.isclose(data.observations, other.observations).any()
    assert data.info == again.info and len(data) == 60 and "action_log_probs" in data.infos
    assert data.info.env == EnvSpec(LOPSIDED)
    about = data.info.about
    file = source.run / "checkpoints" / "last.safetensors"
    described = {
        "method": "sac", "steps": 8, "run": "run", "checkpoint": "last",
        "sha256": hashlib.sha256(file.read_bytes()).hexdigest(),
    }  # fmt: skip
    assert about["expert"] == described and about["kind"] == kind and about["seed"] == 2
    assert about.get("behaviour") == (None if kind == "random" else described)
    assert about["algorithm"] == ("uniform" if kind == "random" else "sac")
    assert about["versions"]["torch"] == torch.__version__
    assert str(tmp_path) not in json.dumps(about)
    low, high = measure_references(env, source.agent, 10, seed=2)
    assert low < high and (data.info.ref_min_score, data.info.ref_max_score) == (low, high)
    assert about["references"] == {"episodes": 10, "seed": 2, "random": low, "expert": high}
    assert about["normalized_mean_return"] == pytest.approx(100 * (data.returns.mean() - low) / (high - low))


def test_without_an_expert_there_are_no_reference_scores(tmp_path):
    data = make("medium", EnvSpec(LOPSIDED), saved(tmp_path / "run"), 10)
    assert data.info.ref_min_score is None and data.info.ref_max_score is None
    assert "normalized_mean_return" not in data.info.about
    assert (
        "references" in make("expert", EnvSpec(LOPSIDED), saved(tmp_path / "r2"), 10, reference_episodes=2).info.about
    )


def test_an_expert_no_better_than_random_gives_no_reference_scores():
    agent = off_policy.make("sac", env_id("OnlyTruncates"), n_envs=1)
    data = make("expert", EnvSpec(env_id("OnlyTruncates")), Source(agent), 9, reference_episodes=4)
    assert data.info.ref_min_score is None and data.info.ref_max_score is None
    assert data.info.about["references"] == {"episodes": 4, "seed": 0, "random": 6.0, "expert": 6.0}


def test_reference_scores_are_those_of_random_actions_and_of_the_experts_mode():
    class Best(type(sac())):
        def session(self, noise=None):
            assert noise is None
            return lambda obs, index: np.broadcast_to(HIGH, (len(index), 2)).astype(np.float32)

    expert = Best(LOPSIDED, **off_policy.TINY)
    low, high = measure_references(EnvSpec(LOPSIDED), expert, 200, seed=1)
    # every step ends it with probability 0.19
    assert high == pytest.approx(0.3 / 0.19, rel=0.2) and high / 0.3 * 200 == pytest.approx(round(high / 0.3 * 200))
    # the rewards of random actions are uniform in [-0.1, 0.3], in episodes of the same lengths
    assert low / high == pytest.approx(0.1 / 0.3, rel=0.25)


def test_what_a_kind_needs_is_said(tmp_path):
    source = saved(tmp_path / "run")
    for kind, given, message in [
        ("medium", {"steps": 5}, "trained policy"),
        ("medium", {"source": source}, "number of steps"),
        ("medium-expert", {"source": source, "steps": 5}, "expert's run"),
        ("medium-expert", {"source": source, "steps": 1, "expert": source}, "cannot be halved"),
        ("medium-replay", {"source": Source(source.agent)}, "give its folder"),
        ("medium-replay", {}, "trained policy"),
    ]:
        with pytest.raises(ValueError, match=message):
            make(kind, EnvSpec(LOPSIDED), **given)
    with pytest.raises(ValueError, match=r"was trained in .*Lopsided-v0, not in Hopper-v5"):
        make("medium-replay", EnvSpec("Hopper-v5"), source)


def test_progress_counts_to_the_end(tmp_path):
    source, seen = saved(tmp_path / "run"), []
    make("medium-expert", EnvSpec(LOPSIDED), source, 30, expert=source, reference_episodes=1, progress=seen.append)
    assert seen == sorted(seen) and seen[-1] == 30 and 15 in seen


def test_sets_are_put_together_with_the_columns_that_both_have():
    one, two = counted("OnlyTruncates", 4), counted("OnlyTerminates", 3)
    one = dataclasses.replace(one, infos={"a": np.arange(4), "b": np.arange(4)})
    two = dataclasses.replace(two, infos={"a": np.arange(3)})
    both = concatenate([one, two])
    assert both.rewards.tolist() == [1, 2, 3, 1, 1, 2, 3] and both.infos["a"].tolist() == [0, 1, 2, 3, 0, 1, 2]
    assert set(both.infos) == {"a"} and len(both.episodes) == 3


def test_names_of_the_kinds():
    assert data_making.KINDS == ("random", "medium", "expert", "medium-replay", "medium-expert")
