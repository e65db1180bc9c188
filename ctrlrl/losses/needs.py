"""What a loss may need, what each world provides, and which parts of the estimator there are to fill."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal, TypeAlias

from ctrlrl.types import World

Slot: TypeAlias = Literal["mask", "ratio", "advantage", "likelihood", "regulariser", "selection"]
SLOTS: tuple[Slot, ...] = ("mask", "ratio", "advantage", "likelihood", "regulariser", "selection")

Need: TypeAlias = Literal[
    "values", "dist", "dist_old", "step_dist", "whole_rows", "routes", "groups", "sequence_return", "score",
    "success", "rewards", "answers", "preferences", "turns", "tasks", "logp_ref", "logp_behaviour",
    "demonstrations", "hints", "retries", "tempered", "replay", "support", "categorical", "plain_action", "tree",
    "gaussian", "teacher", "denoising", "matching",
]  # fmt: skip

NEEDS: dict[Need, str] = {
    "values": "a value function and advantages along time",
    "dist": "the policy's whole action distribution",
    "whole_rows": "rows that are whole episodes, one for each member of a group",
    "routes": "the branches that a mixture policy chose",
    "dist_old": "the collecting policy's whole action distribution",
    "step_dist": "the action distribution of each step of an episode, known before updating begins",
    "groups": "several sequences from the same prompt or reset seed",
    "sequence_return": "the return of the whole sequence",
    "score": "an outcome in [0, 1]",
    "success": "whether the sequence solved its task",
    "rewards": "the outcome by reward channel",
    "answers": "an id of the final answer or terminal outcome",
    "preferences": "a chosen and a rejected sequence of each group",
    "turns": "turns: stretches of several actions between which the environment speaks",
    "tasks": "a task id for each sequence",
    "logp_ref": "log-probabilities of a frozen reference policy",
    "logp_behaviour": "log-probabilities as the sampler computed them",
    "demonstrations": "a solution of each prompt by an expert",
    "hints": "sequences that begin with a part of the expert's solution",
    "retries": "sequences that retry another one from one of its positions",
    "tempered": "sequences sampled at another temperature",
    "replay": "sequences of earlier iterations",
    "support": "the actions allowed when sampling, by a lagged copy of the policy",
    "categorical": "one choice among finitely many actions, with all their probabilities",
    "plain_action": "a categorical or a Gaussian action, not several choices at once",
    "tree": "states that remember the whole history, so that the states form a tree",
    "gaussian": "Gaussian actions or denoising steps",
    "teacher": "a teacher's policy (--reference RUN)",
    "denoising": "a policy that acts by denoising, with each step's likelihood",
    "matching": "a policy that acts by denoising, with the flow-matching loss as likelihood",
}

_EVERYWHERE: frozenset[Need] = frozenset(
    ["values", "dist", "dist_old", "step_dist", "whole_rows", "routes", "plain_action", "groups",
     "sequence_return", "score", "success", "rewards", "answers", "preferences", "tasks", "logp_ref",
     "logp_behaviour", "retries", "tempered", "replay"]
)  # fmt: skip
_TOKENS: frozenset[Need] = frozenset({"turns", "demonstrations", "hints", "support", "categorical", "tree"})
_DISCRETE: frozenset[Need] = frozenset({"support", "categorical"})
_CONTINUOUS: frozenset[Need] = frozenset({"gaussian"})
_FLOW: frozenset[Need] = frozenset({"gaussian", "denoising", "matching"})
# a sequence is the denoising of one action there: nothing that restarts or tempers an episode applies
_NOT_FLOW: frozenset[Need] = frozenset(
    ["step_dist", "whole_rows", "routes", "logp_behaviour", "retries", "tempered", "replay"]
)
PROVIDES: dict[World, frozenset[Need]] = {
    "tokens": _EVERYWHERE | _TOKENS,
    "discrete": _EVERYWHERE | _DISCRETE,
    "continuous": _EVERYWHERE | _CONTINUOUS,
    "flow": _EVERYWHERE - _NOT_FLOW | _FLOW,
}
"""What the on-policy loop can put before a loss in each world; a teacher is there when the user names one."""

FLAT: frozenset[Need] = frozenset({"values", "dist_old"})
"""What single transitions can carry: a loss that asks for more is given whole episodes."""


def missing(required: Iterable[Need], world: World, teacher: bool = False) -> list[Need]:
    """Which of ``required`` the loop cannot provide in ``world``, sorted."""
    return sorted(need for need in required if need not in PROVIDES[world] and not (teacher and need == "teacher"))


WORLDS: dict[World, str] = {
    "tokens": "token sequences",
    "discrete": "discrete control",
    "continuous": "continuous control",
    "flow": "a flow policy",
}
