"""MDPO's golden tables: gain r A, and the gradient of KL(new || old) / t_k in the right direction."""

import torch
from losses.golden import batch_of, categorical_output, column, weights

from ctrlrl.losses.mdpo import MDPO
from ctrlrl.types import PolicyOutput


def test_golden_table_of_the_gain():
    rows = [(0.5, 1.0, 0.5), (1.0, 1.0, 1.0), (3.0, 1.0, 3.0), (0.5, -2.0, -1.0), (3.0, -1.0, -3.0)]  # never clipped
    batch, out = batch_of(column(*[r for r, _, _ in rows]), column(*[a for _, a, _ in rows]))
    got = weights(MDPO(standardize_advantage=False), batch, out)
    torch.testing.assert_close(got, column(*[w for _, _, w in rows]))


def table(loss, logits, old, advantage, step_size):
    """Exact expected objective of a softmax table: every action weighted by its old probability."""
    k = logits.shape[-1]
    action = torch.arange(k).unsqueeze(-1)
    old = torch.log_softmax(old, -1)
    out = categorical_output(logits.expand(k, 1, k), action)
    batch, _ = batch_of(torch.ones(k, 1, dtype=torch.float64), advantage.unsqueeze(-1))
    batch = batch._replace(logp_old=old.unsqueeze(-1), dist_old={"logits": old.expand(k, 1, k)})
    knobs = {"step_size": torch.tensor(step_size, dtype=torch.float64)}
    prepared = loss.prepare(batch, knobs)
    batch = batch._replace(coef=prepared.coef, weight=old.exp().unsqueeze(-1))
    return loss.loss(batch, PolicyOutput(out.logp, out.entropy, {}, out.dist), knobs).policy


def test_many_steps_reach_the_closed_form_of_mirror_descent():
    generator = torch.Generator().manual_seed(0)
    old = torch.randn(5, generator=generator, dtype=torch.float64)
    advantage = torch.randn(5, generator=generator, dtype=torch.float64)
    for step_size in (0.1, 1.0, 3.0):
        logits = old.clone().requires_grad_()
        optimiser = torch.optim.LBFGS(
            [logits], max_iter=2000, tolerance_grad=1e-14, tolerance_change=1e-16, line_search_fn="strong_wolfe"
        )
        loss = MDPO(standardize_advantage=False)

        def closure(loss=loss, logits=logits, step_size=step_size, optimiser=optimiser):
            optimiser.zero_grad()
            value = table(loss, logits, old, advantage, step_size)
            value.backward()
            return value

        optimiser.step(closure)
        expected = torch.softmax(old + step_size * advantage, -1)  # pi_k exp(t A) / Z
        torch.testing.assert_close(torch.softmax(logits, -1).detach(), expected, atol=2e-7, rtol=0)


def test_first_step_is_a_plain_policy_gradient():
    generator = torch.Generator().manual_seed(1)
    old = torch.randn(5, generator=generator, dtype=torch.float64)
    advantage = torch.randn(5, generator=generator, dtype=torch.float64)
    probability = torch.softmax(old, -1)
    expected = -(probability * (advantage - (probability * advantage).sum()))
    for step_size in (0.1, 1.0, 10.0):
        logits = old.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(
            table(MDPO(standardize_advantage=False), logits, old, advantage, step_size), logits
        )
        torch.testing.assert_close(gradient, expected, atol=1e-14, rtol=0)


def test_step_size_falls_linearly_and_is_floored():
    controller = MDPO().controllers()["step_size"]
    state = controller.initial()
    seen = []
    for progress in (0.0, 0.25, 0.5, 0.9995, 1.0):
        state, knobs = controller.step(state, {"progress": progress})
        seen.append(knobs["step_size"])
    assert seen == [1.0, 0.75, 0.5, 1e-3, 1e-3]
