"""A sequence task small enough to enumerate: every sequence, every group of two, no sampling."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

import torch
from losses.golden import knobs_of, objective
from torch import Tensor

from ctrlrl.losses.base import PolicyLoss
from ctrlrl.nets.heads import Categorical
from ctrlrl.types import DEMONSTRATION, PolicyOutput, SequenceBatch

F64 = torch.float64


class Task:
    """All N = vocabulary^length sequences under a tabular softmax policy with one row of logits per prefix.

    ``binary`` pays where the last token repeats the first; ``graded`` the share of tokens that match a target.
    The return is 3 score - 1, so that one cannot pass for the other.
    """

    def __init__(self, vocabulary: int, length: int, reward: str, restricted: bool = False, own_ref: bool = False):
        g = torch.Generator().manual_seed(7)
        self.vocabulary, self.length = vocabulary, length
        sizes = [vocabulary**t for t in range(length + 1)]
        n, states = sizes[-1], sum(sizes[:-1])
        self.sequence = torch.stack([torch.arange(n) // sizes[length - 1 - t] % vocabulary for t in range(length)], -1)
        # a prefix is numbered by its depth's offset and its digits
        self.row = torch.stack([sum(sizes[:t]) + torch.arange(n) // sizes[length - t] for t in range(length)], -1)
        self.theta = 0.8 * torch.randn(states, vocabulary, generator=g, dtype=F64)
        other = 0.0 if own_ref else 0.5 * torch.randn(states, vocabulary, generator=g, dtype=F64)
        self.ref = (self.theta + other).softmax(-1)
        everything = torch.ones(states, vocabulary, dtype=torch.bool)
        self.support = torch.rand(states, vocabulary, generator=g) < 0.6
        self.support[torch.arange(states), torch.arange(states) % vocabulary] = True
        if not restricted:
            self.support = everything
        log_policy = self.table(self.theta)
        self.policy = log_policy.exp()
        """[S, V] the policy, on the support."""
        self.entropy = -torch.xlogy(self.policy, self.policy).sum(-1)
        """[S]"""
        self.logp = log_policy[self.row, self.sequence]
        """[N, T]"""
        self.p = self.logp.sum(-1).exp()
        """[N]"""
        target = torch.arange(length) % vocabulary
        if reward == "binary":
            self.score = (self.sequence[:, 0] == self.sequence[:, -1]).to(F64)
        else:
            self.score = (self.sequence == target).to(F64).mean(-1)
        self.outcome = 3.0 * self.score - 1.0
        """[N] the return."""
        self.success = self.score == 1.0
        self.rewards = torch.stack([self.score, (self.sequence == 0).any(-1).to(F64)], -1)
        self.answer = self.sequence[:, 1]
        self.turn_length = 2 if length % 2 == 0 else length
        self.turn = torch.arange(length) // self.turn_length
        self.void = (self.sequence == 0) & (torch.arange(length) == 1)
        self.demonstration = int(self.success.nonzero()[-1])
        self.value, self.q = self._values()
        order = self.q.argsort(-1)
        half = (self.policy.gather(-1, order).cumsum(-1) >= 0.5).long().argmax(-1, keepdim=True)
        self.median = self.q.gather(-1, order.gather(-1, half)).squeeze(-1)
        """[S] the smallest action value such that half of the probability is at it or below."""

    def table(self, theta: Tensor) -> Tensor:
        """[S, V] log-probabilities, -inf off the support."""
        return torch.where(self.support, theta, -torch.inf).log_softmax(-1)

    def _values(self) -> tuple[Tensor, Tensor]:
        """Exact V [S] and Q [S, V], from the last position backwards."""
        value, q = torch.zeros_like(self.theta[:, 0]), torch.zeros_like(self.theta)
        following = self.outcome
        for t in reversed(range(self.length)):
            rows = self.row[:, t].unique()
            q[rows] = following.view(len(rows), self.vocabulary)
            value[rows] = (self.policy[rows] * q[rows]).sum(-1)
            following = value[rows]
        return value, q

    @property
    def advantage(self) -> Tensor:
        """[N, T] exact advantages."""
        return self.q[self.row, self.sequence] - self.value[self.row]

    # -- exact gradients, none of which goes through a loss ------------------------------------------

    def gradient(self, objective: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        """[S, V] by autograd, of a function of the log-probabilities [N, T] and the table [S, V]."""
        theta = self.theta.clone().requires_grad_()
        table = self.table(theta)
        (found,) = torch.autograd.grad(objective(table[self.row, self.sequence], table), theta)
        return found

    def policy_gradient(self, reward: Tensor) -> Tensor:
        """[S, V] of the expectation of a reward [N]."""
        return self.gradient(lambda logp, _: (logp.sum(-1).exp() * reward).sum())

    def push(self, weight: Tensor) -> Tensor:
        """[S, V] sum of weight x grad log pi(a_t), weights [N] or [N, T]: the chosen action's unit less the policy."""
        weight = weight.unsqueeze(-1).expand(-1, self.length) if weight.ndim == 1 else weight
        score = torch.nn.functional.one_hot(self.sequence, self.vocabulary).to(F64) - self.policy[self.row]
        return torch.zeros_like(self.theta).index_add(
            0, self.row.flatten(), (weight.unsqueeze(-1) * score).flatten(0, 1)
        )

    def visits(self, weight: Tensor) -> Tensor:
        """[S, 1] sum of the weights, [N] or [N, T], by prefix."""
        weight = weight.unsqueeze(-1).expand(-1, self.length) if weight.ndim == 1 else weight
        return torch.zeros_like(self.value).index_add(0, self.row.flatten(), weight.flatten()).unsqueeze(-1)

    def between(self, f: Tensor) -> Tensor:
        """p_a sum_b p_b f_ab, for f [N, N] or [N, N, T]."""
        return torch.einsum("a,b,ab...->a...", self.p, self.p, f)

    # -- what a loss sees ----------------------------------------------------------------------------

    def batch(self, index: Tensor, source: Tensor) -> SequenceBatch:
        """The rows ``index`` [B] as one group, at the collecting policy."""
        mask = torch.ones_like(self.sequence, dtype=torch.bool)[index]
        row, action, outcome = self.row[index], self.sequence[index], self.outcome[index]
        best, worst = outcome == outcome.amax(), outcome == outcome.amin()
        log_policy, log_ref = self.table(self.theta), self.ref.log()
        advantage, value = self.advantage[index], self.value[row]
        return SequenceBatch(
            obs=torch.zeros_like(value).unsqueeze(-1),
            action=action,
            mask=mask,
            logp_old=self.logp[index],
            advantage=advantage,
            value_target=self.q[row, action],
            value_old=value,
            dist_old={"logits": log_policy[row]},
            logp_ref=log_ref[row, action],
            logp_behaviour=self.logp[index],
            sequence_return=outcome,
            group=torch.zeros_like(index),
            task=torch.zeros_like(index),
            turn=self.turn.expand(mask.shape),
            entropy_old=self.entropy[row],
            dist_ref={"logits": log_ref[row]},
            score=self.score[index],
            success=self.success[index],
            rewards=self.rewards[index],
            answer=self.answer[index],
            preference=best.long() - worst.long(),
            source=source,
            pivot=torch.zeros_like(index),
            void=self.void[index],
            support=self.support[row],
        )

    def output(self, theta: Tensor, index: Tensor) -> PolicyOutput:
        """What the policy with the logits ``theta`` says of the rows ``index``."""
        row = self.row[index]
        dist = Categorical(theta[row])
        critics = {"value": self.value[row], "median": self.median[row]}
        return PolicyOutput(dist.log_prob(self.sequence[index]), dist.entropy(), critics, dist)


@lru_cache
def task(vocabulary: int, length: int, reward: str, restricted: bool = False, own_ref: bool = False) -> Task:
    """The task, made once."""
    return Task(vocabulary, length, reward, restricted, own_ref)


def expected_ascent(
    loss: PolicyLoss,
    world: Task,
    chance: Tensor | None = None,
    others: tuple[int, ...] = (),
    source: tuple[int, ...] = (),
    one_by_one: bool = False,
) -> Tensor:
    """[S, V] minus the expectation of the loss's gradient over all ordered groups of two, each a batch of its own.

    ``chance`` [N] is the probability of each member, the policy's by default. ``others`` are sequences that join
    every group; ``source`` says where all of its rows come from. ``one_by_one`` loops over the groups, applies
    ``grad_transform`` to each and suits losses whose ``begin`` looks at numbers; otherwise all run side by side.
    """
    knobs, n = knobs_of(loss), len(world.p)
    chance = world.p if chance is None else chance
    sources = torch.tensor(source or (0,) * (2 + len(others)))
    groups = torch.cartesian_prod(torch.arange(n), torch.arange(n))
    groups = torch.cat([groups, torch.tensor(others, dtype=torch.long).expand(len(groups), -1)], -1)
    probability = torch.outer(chance, chance).flatten()
    theta = world.theta.clone().requires_grad_()

    if one_by_one:
        total = torch.zeros_like(theta)
        for group, weight in zip(groups, probability, strict=True):
            total += weight * _transformed(loss, world, theta, group, sources, knobs)
        return -total

    def each(group: Tensor) -> Tensor:
        batch = loss.begin(world.batch(group, sources), knobs, loss.memory()).batch
        return objective(loss, batch, world.output(theta, group), knobs)

    (found,) = torch.autograd.grad((torch.func.vmap(each)(groups) * probability).sum(), theta)
    return -found


def _transformed(loss, world, theta, group, sources, knobs) -> Tensor:
    batch = loss.begin(world.batch(group, sources), knobs, loss.memory()).batch
    prepared = loss.prepare(batch, knobs)
    batch = batch._replace(coef=prepared.coef, weight=prepared.weight)

    def gradient_of(f: Callable[[SequenceBatch, PolicyOutput], Tensor]) -> Tensor:
        value = f(batch, world.output(theta, group))
        total = (torch.where(prepared.weight > 0, value, 0.0) * prepared.weight).sum() / prepared.denominator
        return torch.autograd.grad(total, theta, allow_unused=True, materialize_grads=True)[0].flatten()

    total = loss.loss(batch, world.output(theta, group), knobs).policy / prepared.denominator
    (found,) = torch.autograd.grad(total, theta)
    return loss.grad_transform(found.flatten(), gradient_of, knobs).view_as(theta)


def demonstrated(world: Task) -> dict[str, tuple[int, ...]]:
    """Arguments of :func:`expected_ascent` with which an expert's sequence joins every group."""
    return {"others": (world.demonstration,), "source": (0, 0, DEMONSTRATION)}
