"""Diagnoses: numbers known by hand, slices that change nothing, and a training that does not notice."""

import math

import pytest
import torch
from helpers.agents import NOISY, TINY, make, quiet, same
from losses import golden

from ctrlrl import api
from ctrlrl.engine import diagnose, runfolder
from ctrlrl.losses import base
from ctrlrl.losses.ppo import PPO
from ctrlrl.types import DEMONSTRATION, ON_POLICY, REPLAYED, PolicyOutput


def policy_of(batch, output):
    """A policy that knows each row of ``batch`` again; returns it and the batch with which to ask."""
    rows, length = batch.mask.shape
    number = torch.arange(rows, dtype=torch.float64).view(-1, 1, 1).expand(rows, length, 1)

    def policy(obs, action):
        index = obs[:, 0, 0].long()
        dist = type(output.dist)(*(v[index] for v in output.dist.params().values()))
        values = {k: v[index] for k, v in output.values.items()}
        return PolicyOutput(output.logp[index], output.entropy[index], values, dist)

    return policy, batch._replace(obs=number)


def found(loss, batch, output, knobs=None):
    policy, batch = policy_of(batch, output)
    return diagnose.diagnose(policy, loss, batch, golden.knobs_of(loss) if knobs is None else knobs)


def case_of(name, **settings):
    loss = base.get(name)(**settings)
    case = golden.case_of(loss)
    return loss, golden.begun(loss, case.batch), case.output(case.leaf)


def bins(counts):
    """The bins that hold something, by their lower border."""
    lower = (-math.inf, *diagnose.WEIGHT_EDGES)
    return {low: n for low, n in zip(lower, counts.tolist(), strict=True) if n}


RATIOS, ADVANTAGE = (0.5, 0.9, 1.0, 1.5, 2.0), (-1.0, -1.0, 1.0, 1.0, 2.0)


def test_numbers_by_hand():
    batch, out = golden.batch_of(golden.column(*RATIOS), golden.column(*ADVANTAGE))
    out = out._replace(entropy=golden.column(0.1, 0.2, 0.3, 0.4, 0.5))
    scalars, histograms = found(PPO(eps=0.2, standardize_advantage=False), batch, out)
    logs = [math.log(r) for r in RATIOS]
    # A < 0: 0.5 is below 0.8, 0.9 is not; A > 0: 1.5 and 2 are above 1.2, 1 is not
    # gradient weights r A of what is not clipped: 0, -0.9, 1, 0, 0
    expected = {
        "entropy": 0.3,
        "kl_k1": -sum(logs) / 5,
        "kl_k2": sum(x * x for x in logs) / 10,
        "kl_k3": (sum(RATIOS) - 5 - sum(logs)) / 5,
        "ratio_q01": 0.516,
        "ratio_q05": 0.58,
        "ratio_q25": 0.9,
        "ratio_q50": 1.0,
        "ratio_q75": 1.5,
        "ratio_q95": 1.9,
        "ratio_q99": 1.98,
        "clip_share_positive": 2 / 3,
        "clip_share_negative": 1 / 2,
        "advantage_positive_share": 4 / 6,
        "weight_positive_share": 1 / 1.9,
    }
    assert {k: float(v) for k, v in scalars.items()} == pytest.approx(expected)
    assert bins(histograms["gradient_weight"]) == {-1.0: 1, -(2.0**-20): 3, 1.0: 1}


def test_bins_hold_everything_once():
    edges = diagnose.WEIGHT_EDGES
    assert list(edges) == sorted(edges) and edges[-1] == 64.0 and len(edges) == 54
    x = torch.tensor([-1e9, -64.0, 0.0, 1e-7, 1.0, 1.999, 2.0, 64.0, 1e9])
    counts = diagnose.histogram(x, edges)
    assert counts.shape == (55,) and counts.sum() == len(x)
    assert bins(counts) == {-math.inf: 1, -64.0: 1, -(2.0**-20): 2, 1.0: 2, 2.0: 1, 64.0: 2}


def test_quantiles_are_torchs():
    x = torch.randn(37, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).sort().values
    for level in (0.0, 0.01, 0.3, 0.5, 0.99, 1.0):
        torch.testing.assert_close(diagnose.quantile(x, level), torch.quantile(x, level))


@pytest.mark.parametrize("name", ["ppo", "bpo", "grpo", "dpo", "copg"])
def test_weights_are_those_of_the_golden_tables_whatever_the_slices(name, monkeypatch):
    loss, batch, out = case_of(name)
    batch = batch._replace(group=torch.arange(12) % 3)  # rows of a group do not lie side by side
    leaf = out.logp.detach().requires_grad_()
    weight = golden.weights(loss, batch, out._replace(logp=leaf), golden.knobs_of(loss))[batch.mask]
    whole = found(loss, batch, out)
    assert whole.histograms["gradient_weight"].equal(diagnose.histogram(weight, diagnose.WEIGHT_EDGES))
    assert whole.histograms["gradient_weight"].sum() == batch.mask.sum()
    torch.testing.assert_close(whole.scalars["weight_positive_share"], diagnose.positive_share(weight))
    monkeypatch.setattr(diagnose, "POSITIONS", 8)
    sliced = found(loss, batch, out)
    torch.testing.assert_close(sliced.scalars, whole.scalars, equal_nan=True)
    assert sliced.histograms["gradient_weight"].equal(whole.histograms["gradient_weight"])


def test_clipping_is_looked_at_where_the_loss_forms_its_ratio():
    loss, batch, out = case_of("grpo")
    assert type(loss).level == "token"
    by_sequence = type("Sequence", (type(loss),), {"level": "sequence"})()
    log_ratio = by_sequence.log_ratio(batch, out)[batch.mask]
    torch.testing.assert_close(found(by_sequence, batch, out).scalars["ratio_q50"], log_ratio.exp().quantile(0.5))
    assert not torch.allclose(
        found(loss, batch, out).scalars["ratio_q01"], found(by_sequence, batch, out).scalars["ratio_q01"]
    )


def test_without_a_band_there_are_no_clip_shares():
    assert "clip_share_positive" not in found(*case_of("copg")).scalars


def test_groups_that_do_not_vary_and_lengths_by_hand():
    loss, batch, out = case_of("grpo")
    length = torch.tensor([4, 1, 2, 3, 4, 4, 1, 1, 2, 2, 2, 2])
    batch = batch._replace(
        mask=torch.arange(4) < length.unsqueeze(1),
        # the first group varies, the second does not; the third has one sequence of its own, so it cannot
        sequence_return=torch.tensor([0.0, 1, 0, 0, 1, 1, 1, 1, 1, 0, 0, 0], dtype=torch.float64),
        success=torch.tensor([0, 1, 0, 0, 1, 1, 1, 1, 1, 0, 0, 0]).bool(),
        group=torch.tensor([5, 5, 5, 5, 9, 9, 9, 9, 7, 7, 7, 7]),
        source=torch.tensor([ON_POLICY] * 9 + [REPLAYED, DEMONSTRATION, REPLAYED]),
    )
    scalars = found(loss, batch, out).scalars
    assert scalars["zero_variance_share"] == 0.5
    # of the sequences sampled just now: 1, 4, 4, 1, 1, 2 solved and 4, 2, 3 not
    assert scalars["length_correct"] == pytest.approx(13 / 6) and scalars["length_incorrect"] == 3.0


def test_the_policy_is_judged_on_what_it_sampled_itself():
    loss, batch, out = case_of("grpo")
    source = torch.where(torch.arange(12) < 6, ON_POLICY, REPLAYED)
    changed = out._replace(logp=out.logp - 3.0 * (source == REPLAYED).unsqueeze(1), entropy=out.entropy + 1.0)
    changed.entropy[:6] -= 1.0
    a, b = (found(loss, batch._replace(source=source), o).scalars for o in (out, changed))
    for name in ("entropy", "kl_k1", "kl_k2", "kl_k3"):
        assert a[name] == b[name]
    assert a["ratio_q01"] != b["ratio_q01"]  # the update sees the others as well


@pytest.mark.parametrize("name", ["grpo_guard", "diffusion_opd"])
def test_where_no_gradient_passes_through_logp_there_are_no_weights(name):
    scalars, histograms = found(*case_of(name))
    assert histograms == {} and "weight_positive_share" not in scalars and "entropy" in scalars


def test_a_matching_loss_is_no_likelihood():
    scalars, histograms = found(*case_of("awm"))
    assert not {"entropy", "kl_k1", "kl_k3"} & set(scalars) and "ratio_q50" in scalars and histograms


def test_what_is_masked_is_not_looked_at():
    loss, batch, out = case_of("grpo")
    spoilt = out._replace(
        logp=out.logp.masked_fill(~batch.mask, torch.nan), entropy=out.entropy.masked_fill(~batch.mask, torch.nan)
    )
    torch.testing.assert_close(found(loss, batch, spoilt), found(loss, batch, out))


@pytest.mark.parametrize("shift", [-200.0, 200.0])
def test_huge_ratios_stay_finite_in_single_precision(shift):
    loss = base.get("ppo")()
    case = golden.case_of(loss, dtype=torch.float32)
    out = case.output(case.leaf)
    scalars, histograms = found(loss, case.batch, out._replace(logp=case.batch.logp_old + shift))
    assert all(v.isfinite() for k, v in scalars.items() if not k.startswith("weight"))
    assert histograms["gradient_weight"].sum() == case.batch.mask.sum()


def test_nothing_but_masked_positions():
    loss, batch, out = case_of("grpo")
    batch = batch._replace(mask=torch.zeros_like(batch.mask))
    policy, batch = policy_of(batch, out)
    scalars, histograms = diagnose.look(policy, loss, batch, golden.knobs_of(loss), 1, 0)
    assert scalars == {} and sum(histograms["diagnose/gradient_weight"].counts) == 0


def test_it_is_time_every_so_many_iterations():
    loss, batch, out = case_of("grpo")
    policy, batch = policy_of(batch, out)
    due = [bool(diagnose.look(policy, loss, batch, golden.knobs_of(loss), 3, i)[0]) for i in range(7)]
    assert due == [True, False, False, True, False, False, True]
    assert diagnose.look(policy, loss, batch, golden.knobs_of(loss), None, 0) == ({}, {})


def test_it_draws_nothing_and_leaves_the_batch_and_the_policy_alone():
    agent, seen = make(), {}
    agent.updater.run = lambda batch, knobs, generator: seen.update(batch=batch, knobs=knobs) or 1 / 0
    with pytest.raises(ZeroDivisionError):
        quiet(agent, 32)
    batch, before = seen["batch"], {k: v.clone() for k, v in agent.tensors().items()}
    copies = [v.clone() if isinstance(v, torch.Tensor) else v for v in batch]
    state = torch.get_rng_state()
    first, _ = diagnose.look(agent.policy, agent.loss, batch, seen["knobs"], 1, 0)
    assert torch.equal(torch.get_rng_state(), state) and same(before, agent.tensors())
    assert all(p.grad is None for p in agent.policy.parameters())
    assert all(a.equal(b) for a, b in zip(copies, batch, strict=True) if isinstance(a, torch.Tensor))
    # before the update all ratios are one, and nothing has moved
    assert first["diagnose/ratio_q01"] == first["diagnose/ratio_q99"] == 1.0 and first["diagnose/kl_k3"] == 0.0


SEEN = {
    "ppo": {"diagnose/kl_k3", "diagnose/clip_share_positive", "diagnose/ratio_q05"},
    "grpo": {"diagnose/kl_k3", "diagnose/zero_variance_share", "diagnose/length_incorrect"},
}


@pytest.mark.parametrize("name", sorted(SEEN))
def test_training_is_the_same_bit_for_bit_with_and_without(name, tmp_path):
    agents = {}
    for every in (None, 2):
        settings = {k: v for k, v in TINY.items() if k != "n_steps"} | {"diagnose_every": every}
        if name == "grpo":
            settings |= {"n_groups": 4, "group_size": 4, "horizon": 8}
        else:
            settings |= {"n_steps": 16}
        agent = api.make(name, NOISY, seed=3, n_envs=2, learning_rate=1e-2, **settings)
        agents[every] = agent.learn(128, run_dir=tmp_path / str(every), progress=False, tensorboard=False)
    assert same(agents[None].tensors(), agents[2].tensors()) and agents[None].counters() == agents[2].counters()
    plain, looked = (runfolder.read_lines(tmp_path / n / "metrics.jsonl") for n in ("None", "2"))

    def own(row):
        return {k for k in row if k.startswith("diagnose/")}

    assert not any(own(row) for row in plain)
    assert [bool(own(row)) for row in looked] == [i % 2 == 0 for i in range(len(looked))]
    assert SEEN[name] <= own(looked[0]) and sum(looked[0]["diagnose/gradient_weight"]) > 0
    kept = [{k: v for k, v in r.items() if not k.startswith("diagnose/") and "time" not in k} for r in looked]
    assert kept == [{k: v for k, v in r.items() if "time" not in k} for r in plain]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", ["ppo", "grpo"])
def test_the_gpu_finds_the_same(name):
    loss, batch, out = case_of(name)
    here = found(loss, batch, out)

    def there(x):
        if isinstance(x, dict):
            return {k: there(v) for k, v in x.items()}
        return x.cuda() if isinstance(x, torch.Tensor) else x

    moved = PolicyOutput(*map(there, out[:3]), type(out.dist)(*map(there, out.dist.params().values())))
    policy, batch = policy_of(type(batch)(*map(there, batch)), moved)
    result = diagnose.diagnose(policy, loss, batch._replace(obs=batch.obs.cuda()), there(golden.knobs_of(loss)))
    torch.testing.assert_close(there(here.scalars), result.scalars, equal_nan=True)
    assert result.histograms["gradient_weight"].cpu().equal(here.histograms["gradient_weight"])


def test_settings_are_checked():
    with pytest.raises(ValueError, match="diagnose_every=0 must be positive"):
        make(diagnose_every=0)
