"""One suite over the loss registry: what every policy-optimisation loss must keep."""

import dataclasses
import pathlib
import re

import pytest
import torch
from losses.golden import batch_of, column, weights

from ctrlrl.data.rows import rows, split
from ctrlrl.engine.config import from_dict, to_dict
from ctrlrl.losses import base

LOSSES = base.names()
KNOBS = {"step_size": torch.tensor(1.0, dtype=torch.float64)}

# ratio one gives REINFORCE with the loss's own advantage for these; BPO's pull has size |A| and the target's sign,
# which is the same thing as long as value and median agree, as they do in batch_of
ZERO_ADVANTAGE_IS_SILENT = {"ppo", "spo", "bpo", "bpo_mean", "mdpo"}
REINFORCE_AT_ONE = {"ppo", "spo", "bpo", "bpo_mean", "mdpo"}


def random_batch(rows_=12, length=5, dtype=torch.float64):
    g = torch.Generator().manual_seed(3)
    ratios = torch.exp(0.3 * torch.randn(rows_, length, generator=g, dtype=torch.float64))
    advantage = torch.randn(rows_, length, generator=g, dtype=torch.float64)
    lengths = torch.randint(1, length + 1, (rows_, 1), generator=g)
    mask = torch.arange(length) < lengths
    value = torch.randn(rows_, length, generator=g, dtype=torch.float64)
    batch, out = batch_of(ratios, advantage, mask, value)
    group = torch.arange(rows_) // 3
    return batch._replace(group=group), out


def plain(name):
    """The loss without standardisation where it has the choice."""
    cls = base.get(name)
    fields = {f.name for f in dataclasses.fields(cls)}
    return cls(standardize_advantage=False) if "standardize_advantage" in fields else cls()


@pytest.mark.parametrize("name", LOSSES)
def test_masked_positions_get_no_gradient_even_if_they_hold_nan(name):
    batch, out = random_batch()
    poisoned = torch.where(batch.mask, out.logp, torch.nan).detach().requires_grad_()
    got = weights(base.get(name)(), batch, out._replace(logp=poisoned), KNOBS)
    assert got.isfinite().all()
    assert (got[~batch.mask] == 0).all()
    assert (got[batch.mask] != 0).any()


@pytest.mark.parametrize("name", LOSSES)
def test_zero_advantage_gives_zero_gradient(name):
    if name not in ZERO_ADVANTAGE_IS_SILENT:
        pytest.skip("the paper gives this loss a gradient without advantage")
    batch, out = random_batch()
    zero = torch.zeros_like(batch.advantage)
    batch = batch._replace(advantage=zero, value_target=batch.value_old)
    assert weights(base.get(name)(), batch, out, KNOBS).abs().max() == 0


@pytest.mark.parametrize("name", LOSSES)
def test_ratio_one_is_reinforce(name):
    if name not in REINFORCE_AT_ONE:
        pytest.skip("the paper's gradient at ratio one is not REINFORCE")
    advantage = column(1.5, -0.5, 0.25, -2.0)
    batch, out = batch_of(torch.ones_like(advantage), advantage)
    torch.testing.assert_close(weights(plain(name), batch, out, KNOBS), advantage, atol=1e-12, rtol=0)


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("parts", [2, 3, 4])
def test_splitting_an_update_batch_changes_nothing(name, parts):
    batch, out = random_batch()
    loss = base.get(name)()
    whole = weights(loss, batch, out, KNOBS)
    prepared = loss.prepare(batch, KNOBS)
    batch = batch._replace(coef=prepared.coef, weight=prepared.weight)
    index = batch._replace(advantage=torch.arange(12.0).unsqueeze(-1).expand(12, 5))
    total = torch.zeros_like(out.logp)
    for piece in split(index, parts, loss.together(batch) if loss.together(batch) is not None else batch.group):
        which = piece.advantage[:, 0].long()
        part = rows(batch, which)
        logp = out.logp.detach()[which].requires_grad_()
        values = {k: v[which] for k, v in out.values.items()}
        dist = type(out.dist)(out.dist.mean[which], out.dist.log_std[which])
        one = out._replace(logp=logp, entropy=out.entropy[which], values=values, dist=dist)
        (gradient,) = torch.autograd.grad(loss.loss(part, one, KNOBS).policy, logp)
        total[which] -= gradient
    torch.testing.assert_close(total, whole, atol=1e-12, rtol=0)


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("log_ratio", [200.0, -200.0])
def test_a_log_ratio_of_200_stays_finite_in_float32(name, log_ratio):
    advantage = torch.tensor([[1.0], [-1.0]])
    batch, out = batch_of(torch.ones(2, 1, dtype=torch.float64), advantage.double())
    batch = batch._replace(
        **{k: v.float() for k, v in batch._asdict().items() if isinstance(v, torch.Tensor) and v.is_floating_point()}
    )
    out = out._replace(
        logp=(batch.logp_old + log_ratio).requires_grad_(), values={k: v.float() for k, v in out.values.items()}
    )
    knobs = {"step_size": torch.tensor(1.0)}
    loss = base.get(name)()
    assert weights(loss, batch, out, knobs).isfinite().all()
    prepared = loss.prepare(batch, knobs)
    sums = loss.loss(batch._replace(coef=prepared.coef, weight=prepared.weight), out, knobs)
    assert all(v.isfinite() for v in (sums.policy, *sums.metrics.values()))


@pytest.mark.parametrize("name", LOSSES)
def test_config_round_trips_and_is_validated(name):
    loss = base.get(name)()
    assert from_dict(type(loss), to_dict(loss)) == loss
    assert base.get(name)(**to_dict(loss)) == loss
    for field in dataclasses.fields(loss):
        if field.name.startswith("eps") or field.name == "lam":
            with pytest.raises(ValueError, match="must be positive"):
                dataclasses.replace(loss, **{field.name: -0.1})
    with pytest.raises(dataclasses.FrozenInstanceError):
        loss.eps = 3


@pytest.mark.parametrize("name", LOSSES)
def test_every_field_changes_something(name):
    """No dead options: each field, changed, alters the gradient, a critic's loss or a controller's knobs."""
    batch, out = random_batch()
    skewed = {"value": out.values["value"], "median": out.values["value"] + 0.3}
    cls = base.get(name)

    def observe(loss):
        median = skewed["median"].detach().requires_grad_()
        now = out._replace(values=skewed | {"median": median})
        knobs = [
            c.step(c.initial(), {"progress": p})[1] for c in loss.controllers().values() for p in (0.1, 0.999, 1.0)
        ]
        prepared = loss.prepare(batch, KNOBS)
        sums = loss.loss(batch._replace(coef=prepared.coef, weight=prepared.weight), now, KNOBS)
        values = [sums.policy.item(), *(v.item() for v in sums.critics.values())]
        return weights(loss, batch, now, KNOBS).tolist(), values, knobs

    reference = observe(cls())
    for field in dataclasses.fields(cls):
        value = getattr(cls(), field.name)
        changed = (not value) if isinstance(value, bool) else 0.37 if value is None else value * 1.7 + 0.05
        assert observe(cls(**{field.name: changed})) != reference, f"{name}.{field.name} has no effect"


@pytest.mark.parametrize("name", LOSSES)
def test_registry_entry_is_complete(name):
    cls = base.get(name)
    assert cls.name == name == pathlib.Path(cls.__module__.replace(".", "/")).name
    assert re.search(r"arXiv:\d{4}\.\d{5}", cls.paper)
    assert cls.__doc__ and not cls.__doc__.startswith(f"{cls.__name__}(")
    source = pathlib.Path(__import__(cls.__module__, fromlist=["x"]).__file__).read_text()
    for field in dataclasses.fields(cls):
        assert re.search(rf'    {field.name}: .*\n    """', source), f"{name}.{field.name} has no docstring"
    for preset in cls.presets:
        from ctrlrl.engine.config import build

        build(cls, {}, preset)


def test_unknown_names_suggest_near_ones():
    with pytest.raises(KeyError, match=r"bpo_men.*Did you mean bpo_mean"):
        base.get("bpo_men")
    with pytest.raises(KeyError, match="cannot load"):
        base.get("no.such.module:Loss")


def test_no_name_of_a_loss_is_compared_outside_the_losses():
    root = pathlib.Path(base.__file__).parents[1]
    pattern = re.compile(r"""(==|!=|\bin\b)\s*[\(\[\{]?\s*["'](NAMES)["']""".replace("NAMES", "|".join(LOSSES)))
    for path in root.rglob("*.py"):
        assert not pattern.search(path.read_text()), path


def test_two_losses_of_one_name_are_refused():
    with pytest.raises(ValueError, match="registered already"):
        base.register(dataclasses.dataclass(frozen=True)(type("PPO", (base.PolicyLoss,), {"__module__": "other.ppo"})))
