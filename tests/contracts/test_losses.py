"""One suite over the loss registry: what every policy-optimisation loss must keep."""

import copy
import dataclasses
import inspect
import pathlib
import re

import pytest
import torch
from losses.golden import begun, case_of, knobs_of, objective

from ctrlrl.data.rows import rows, split
from ctrlrl.engine.config import build, from_dict, to_dict
from ctrlrl.losses import base
from ctrlrl.losses.needs import NEEDS, SLOTS
from ctrlrl.types import PolicyOutput

LOSSES = base.names()
EVERY = pytest.mark.parametrize("name", LOSSES)

SPEAKS_WITHOUT_ADVANTAGE: dict[str, str] = {
    "reinforce": "no baseline by default",
    "sft": "demonstrations always teach",
    "precision_diversity": "demonstrations always teach",
    "super_hf": "the first of equals is imitated",
    "empg": "the bonus for clear next steps does not depend on outcomes",
    "epo": "the entropy term",
    "dcpo": "the pull to the tempered policy",
}
"""Losses with a gradient although no outcome differs from another, and why."""
NOT_REINFORCE_AT_ONE: dict[str, str] = {
    "awm": "the likelihood is the matching loss",
    "capo": "positions are rejected",
    "copg": "pairs of the regularised return",
    "copo": "a blend of two losses",
    "diffusion_opd": "a teacher, no advantage",
    "dpo": "pairs",
    "epo": "the entropy term",
    "flow_grpo": "its KL to the reference is that of the steps' means",
    "fpo": "one ratio for all positions of a row, which share an advantage",
    "hpt": "demonstrations take the place of groups that fail",
    "gbpo": "the target's sign, and its own KL",
    "grpo_guard": "the ratio is centred and rescaled",
    "mhpo": "0.265 of it: the hazard at ratio one",
    "nlpo": "the policy on its support",
    "p3o": "pairs",
    "precision_diversity": "likelihood",
    "real": "labels",
    "rover": "twice it, and a next value",
    "rpo": "pairs",
    "sft": "likelihood",
    "st_ppo": "averaged over the turn",
    "steer": "reweighted by the entropy that each position changes",
    "super_hf": "likelihood",
    "turn_ppo": "averaged over the turn",
}
"""Losses whose gradient on the collecting policy is not sum weight x advantage x grad logp, and why."""
SEEN_ELSEWHERE: dict[str, set[str]] = {
    "adora": {"one_sided"},
    "bapo": {"low_step", "high_step", "ratio_low_max", "ratio_high_max"},
    "dcpo": {"hot_temp"},
    "knapsack": {"size_max"},
    "qwen_long": {"entropy_low"},
    "v0": {"start_value"},
    "nlpo": {"mask_top_p", "mask_every", "mask_min_keep"},
    "risk_po": {"eps_high"},  # its advantages are never positive, see its own tests
}
"""Fields that act in the loop or in a selector, outside what this file looks at; each has a test of its own."""


def gradient(loss, case, leaf=None, batch=None):
    """[B, T, K] of the objective by the leaf, after ``begin``."""
    leaf = (case.leaf if leaf is None else leaf).detach().requires_grad_()
    batch = begun(loss, case.batch) if batch is None else batch
    (found,) = torch.autograd.grad(objective(loss, batch, case.output(leaf)), leaf)
    return found


def poisoned(batch):
    """``batch`` with NaN in every floating entry at masked positions."""

    def one(x):
        if isinstance(x, dict):
            return {k: one(v) for k, v in x.items()}
        if isinstance(x, torch.Tensor) and x.is_floating_point() and x.shape[:2] == batch.mask.shape:
            mask = batch.mask.view(*batch.mask.shape, *[1] * (x.ndim - 2))
            return torch.where(mask, x, torch.nan)
        return x

    return type(batch)(*(one(x) for x in batch))


@EVERY
def test_masked_positions_get_no_gradient_even_if_they_hold_nan(name):
    loss = base.get(name)()
    case = case_of(loss)
    batch = poisoned(case.batch)
    mask = batch.mask
    assert not mask.all()

    def output(leaf):
        """NaN in all that the policy says of masked positions; what it says elsewhere keeps its gradient."""
        out = case.output(leaf)
        dist = copy.copy(out.dist)
        for key, value in vars(dist).items():
            setattr(dist, key, torch.where(mask.unsqueeze(-1), value, torch.nan))
        logp, entropy = (torch.where(mask, x, torch.nan) for x in (out.logp, out.entropy))
        return PolicyOutput(logp, entropy, {k: torch.where(mask, v, torch.nan) for k, v in out.values.items()}, dist)

    got = gradient(loss, case._replace(output=output), batch=begun(loss, batch))
    assert got.isfinite().all()
    assert (got[~batch.mask] == 0).all()
    assert (got[batch.mask] != 0).any()


@EVERY
def test_outcomes_that_all_agree_are_silent(name):
    if name in SPEAKS_WITHOUT_ADVANTAGE:
        pytest.skip(SPEAKS_WITHOUT_ADVANTAGE[name])
    loss = base.get(name)()
    case = case_of(loss, spread=0.0)
    batch = case.batch
    same = torch.full_like(batch.score, 0.7)
    batch = batch._replace(
        advantage=torch.zeros_like(batch.advantage),
        value_target=batch.value_old,
        sequence_return=same,
        score=same,
        success=torch.ones_like(batch.success),
        rewards=same.unsqueeze(-1).expand_as(batch.rewards),
        logp_ref=batch.logp_old,
        dist_ref=batch.dist_old,
        preference=torch.zeros_like(batch.preference),
    )
    assert gradient(loss, case, batch=begun(loss, batch)).abs().max() < 1e-14


@EVERY
def test_at_the_collecting_policy_the_gradient_is_reinforce(name):
    if name in NOT_REINFORCE_AT_ONE:
        pytest.skip(NOT_REINFORCE_AT_ONE[name])
    loss = base.get(name)()
    case = case_of(loss, spread=0.0)
    batch = begun(loss, case.batch._replace(logp_behaviour=case.batch.logp_old, logp_ref=case.batch.logp_old))
    prepared = loss.prepare(batch, knobs_of(loss))
    leaf = case.leaf.detach().requires_grad_()
    logp = torch.where(batch.mask, case.output(leaf).logp, 0.0)
    total = (prepared.weight * prepared.coef["advantage"].detach() * logp).sum() / prepared.denominator
    (expected,) = torch.autograd.grad(-total, leaf)
    assert expected.abs().max() > 0
    torch.testing.assert_close(gradient(loss, case, batch=batch), expected, atol=1e-12, rtol=1e-9)


@EVERY
@pytest.mark.parametrize("parts", [2, 3])
def test_splitting_an_update_batch_changes_nothing(name, parts):
    loss = base.get(name)()
    case = case_of(loss)
    batch, knobs = begun(loss, case.batch), knobs_of(loss)
    whole = gradient(loss, case, batch=batch)
    prepared = loss.prepare(batch, knobs)
    batch = batch._replace(coef=prepared.coef, weight=prepared.weight)
    index = torch.arange(12.0, dtype=torch.float64).unsqueeze(-1).expand(12, 4)
    total = torch.zeros_like(whole)
    for piece in split(batch._replace(value_old=index), parts, loss.together(batch)):
        which = piece.value_old[:, 0].long()
        leaf = case.leaf.detach().requires_grad_()
        out = case.output(leaf)
        params = {k: v[which] for k, v in out.dist.params().items()}
        dist = type(out.dist)(**params)
        values = {k: v[which] for k, v in out.values.items()}
        part = PolicyOutput(out.logp[which], out.entropy[which], values, dist)
        (found,) = torch.autograd.grad(loss.loss(rows(batch, which), part, knobs).policy / prepared.denominator, leaf)
        total += found
    torch.testing.assert_close(total, whole, atol=1e-12, rtol=1e-9)


@EVERY
@pytest.mark.parametrize("log_ratio", [200.0, -200.0])
def test_a_log_ratio_of_200_stays_finite_in_float32(name, log_ratio):
    loss = base.get(name)()
    case = case_of(loss, dtype=torch.float32)
    batch = case.batch
    out = case.output(case.leaf)
    # the old, reference and sampling policies alike are that far away
    shifted = out.logp.detach() - log_ratio
    batch = batch._replace(logp_old=shifted, logp_ref=shifted, logp_behaviour=shifted)
    knobs = {k: v.float() for k, v in knobs_of(loss).items()}
    batch = begun(loss, batch, knobs)
    prepared = loss.prepare(batch, knobs)
    leaf = case.leaf.detach().requires_grad_()
    sums = loss.loss(batch._replace(coef=prepared.coef, weight=prepared.weight), case.output(leaf), knobs)
    (found,) = torch.autograd.grad(sums.policy, leaf)
    assert found.isfinite().all()
    assert all(v.isfinite() for v in (sums.policy, *sums.metrics.values()))


@EVERY
def test_a_batch_without_valid_positions_is_zero(name):
    loss = base.get(name)()
    case = case_of(loss)
    batch = case.batch._replace(mask=torch.zeros_like(case.batch.mask))
    leaf = case.leaf.detach().requires_grad_()
    value = objective(loss, begun(loss, batch), case.output(leaf))
    (found,) = torch.autograd.grad(value, leaf, allow_unused=True)
    assert value.item() == 0.0 and (found is None or (found == 0).all())


@EVERY
def test_config_round_trips_and_is_validated(name):
    loss = base.get(name)()
    assert from_dict(type(loss), to_dict(loss)) == loss
    assert base.get(name)(**to_dict(loss)) == loss
    for field in dataclasses.fields(loss):
        if field.name.startswith("eps") or field.name == "lam":
            with pytest.raises(ValueError, match="must be positive"):
                dataclasses.replace(loss, **{field.name: -0.1})
    for field in dataclasses.fields(loss):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(loss, field.name, 3)


def other_values(field, value):
    """Values to try in the place of a default: until one has an effect."""
    choices = re.findall(r"""["'](\w+)["']""", str(field.type))
    if choices:
        return [c for c in choices if c != value]
    if isinstance(value, bool):
        return [not value]
    if isinstance(value, str):
        return []
    if isinstance(value, int):
        return [value + 1, max(0, value - 1), value * 3 + 2, 1]
    if value is None:
        return [0.37, 2, 1]
    return [value * 1.7 + 0.05, value * 0.3, value * 10 + 1.0, 0.5]


def binary(batch):
    """``batch`` with outcomes 0 and 1: a group that fails, one that is solved, one in between."""
    score = torch.tensor([0.0] * 4 + [1.0] * 4 + [0.0, 1.0, 0.0, 0.0], dtype=batch.score.dtype)
    return batch._replace(
        score=score, success=score > 0.5, sequence_return=score, rewards=torch.stack([score, 1.0 - score], -1)
    )


TOGETHER = {
    "dppo": {"eps_rate": {"eps_first": 0.01}},
    "fpo": {"difference_max": {"ratio_of": "sample"}},
    "dapo": {"overlong_cache": {"overlong_length": 3}},
    "precision_diversity": {"top_k": {"top_reward": 0.1}},
    "gdpo": {"weights": {}},
}
"""Settings without which a field has nothing to act on."""
TEXTS = {"gdpo.weights": "1,2"}
"""Values of fields that are text."""


def selected(loss):
    """What the loss's selector chooses after it has seen some outcomes."""
    selector = loss.selector()
    if selector is None:
        return []
    features = torch.linspace(-1.0, 1.0, 8).unsqueeze(-1)
    state = selector.initial(8, features)
    seen = []
    for k in range(3):
        index = torch.arange(8).repeat_interleave(4)
        score = ((torch.arange(32) * 7 + k) % 8 < index).float()
        state = selector.learn(state, index, score, features[index])
        chosen = selector.select(state, 6, 8, 0.5, torch.Generator().manual_seed(0))
        assert int(chosen.size.sum()) == 48 and int(chosen.size.min()) >= 1 and len(chosen.index) == 6
        seen += [chosen.index.tolist(), chosen.size.tolist()]
    return [*seen, {k: v.tolist() for k, v in state.items()}]


@EVERY
def test_every_field_changes_something(name):
    """No dead options: each field, changed, alters the gradient, a critic's loss, what is remembered or a knob."""
    cls = base.get(name)

    def observe(loss):
        seen = [*selected(loss), sorted(loss.required())]
        for progress, spread, outcome in (
            (0.1, 0.3, None),
            (0.9, 1.2, None),
            (0.5, 0.6, "binary"),
            (0.3, 0.9, "long"),
            (0.7, 0.5, "sure"),
        ):
            case = case_of(loss, 40 if outcome == "long" else 12, spread=spread, peak=8.0 if outcome == "sure" else 1.0)
            if outcome == "long":
                case = case._replace(batch=case.batch._replace(success=case.batch.score > 0.5))
            if outcome == "binary":
                case = case._replace(batch=binary(case.batch))
            knobs = knobs_of(loss, progress) | {"progress": torch.tensor(progress, dtype=torch.float64)}
            memory = loss.memory()
            for _ in range(2):
                start = loss.begin(case.batch, knobs, memory)
                memory = start.memory
            leaf = case.leaf.detach().requires_grad_()
            out = case.output(leaf)
            median = (out.values["median"] + 0.3).detach().requires_grad_()
            out = out._replace(values=out.values | {"median": median})
            prepared = loss.prepare(start.batch, knobs)
            batch = start.batch._replace(coef=prepared.coef, weight=prepared.weight)
            sums = loss.loss(batch, out, knobs)
            (grad,) = torch.autograd.grad(sums.policy / prepared.denominator, leaf, retain_graph=True)

            def gradient_of(f, batch=batch, leaf=leaf, out=out, prepared=prepared):
                total = (torch.where(prepared.weight > 0, f(batch, out), 0.0) * prepared.weight).sum()
                return torch.autograd.grad(total / prepared.denominator, leaf, retain_graph=True)[0].flatten()

            seen += [sums.policy.item() / prepared.denominator.item()]
            seen += [loss.grad_transform(grad.flatten(), gradient_of, knobs).tolist(), sums.policy.item()]
            seen += [v.item() for v in sums.critics.values()]
            seen += [v.tolist() for v in memory.values()] + [loss.keep(start.batch).tolist()]
            for controller in loss.controllers().values():
                state = controller.initial()
                for stat in (0.0, 0.4, 0.6, 5.0):
                    names = re.findall(r"stat='(\w+)'", repr(controller))
                    state, found = controller.step(state, dict.fromkeys(names, stat) | {"progress": progress})
                    seen.append(found)
        return seen

    for field in dataclasses.fields(cls):
        if field.name in SEEN_ELSEWHERE.get(name, set()):
            continue
        found = []
        companions = TOGETHER.get(name, {}).get(field.name, {})
        reference = observe(cls(**companions))
        values = other_values(field, getattr(cls(), field.name))
        if (text := TEXTS.get(f"{name}.{field.name}")) is not None:
            values = [text]
        for value in values:
            try:
                loss = cls(**companions | {field.name: value})
            except ValueError:
                continue
            found.append(observe(loss) != reference)
            if found[-1]:
                break
        assert any(found), f"{name}.{field.name} has no effect"


@EVERY
def test_registry_entry_is_complete(name):
    cls = base.get(name)
    assert cls.name == name == pathlib.Path(cls.__module__.replace(".", "/")).name
    assert re.search(r"arXiv:\d{4}\.\d{5}|github\.com/\w+|\b(19|20)\d\d\b", cls.paper), cls.paper
    assert cls.__doc__ and not cls.__doc__.startswith(f"{cls.__name__}(")
    assert cls.slots and set(cls.slots) <= set(SLOTS)
    assert cls.needs | cls.uses <= set(NEEDS) and not cls.needs & cls.uses
    assert cls.required(cls()) <= cls.needs
    source = pathlib.Path(__import__(cls.__module__, fromlist=["x"]).__file__).read_text()
    for field in dataclasses.fields(cls):
        if field.name in inspect.get_annotations(cls):
            assert re.search(rf'    {field.name}: (.*\n(?=    """)|.*\n)    """', source), f"{name}.{field.name}"
    for preset in cls.presets:
        build(cls, {}, preset)


def test_unknown_names_suggest_near_ones():
    with pytest.raises(KeyError, match=r"bpo_men.*Did you mean bpo_mean"):
        base.get("bpo_men")
    with pytest.raises(KeyError, match="cannot load"):
        base.get("no.such.module:Loss")


def test_no_name_of_a_loss_is_compared_outside_the_losses():
    root = pathlib.Path(base.__file__).parents[1]
    # short common words among the names (real, ppo...) are looked for next to a comparison only
    pattern = re.compile(r"""(==|!=|\bin\b)\s*[\(\[\{]?\s*["'](NAMES)["']""".replace("NAMES", "|".join(LOSSES)))
    for path in root.rglob("*.py"):
        assert not pattern.search(path.read_text()), path


def test_two_losses_of_one_name_are_refused():
    with pytest.raises(ValueError, match="registered already"):
        base.register(dataclasses.dataclass(frozen=True)(type("PPO", (base.PolicyLoss,), {"__module__": "other.ppo"})))
