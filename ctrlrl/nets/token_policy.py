"""Policies over token sequences: a small transformer, and a table for tasks whose answers can be listed.

An observation is the context so far, ``[..., L]`` int64: token id + 1 at every written position and 0 where nothing is
written yet. ``metadata["tokens"]`` of the environment tells the sizes: ``vocabulary``, ``prompt`` and ``length``.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, NamedTuple

import gymnasium as gym
import torch
from torch import Tensor, nn

from ctrlrl.nets.heads import Categorical, gumbel
from ctrlrl.nets.sampler import Sampler
from ctrlrl.types import PolicyOutput


class SequenceState(NamedTuple):
    """Where sequences that grow in step stand. ``extend`` uses it up: go on with what that returns."""

    logits: Tensor
    """[B, V] of the next token, not normalised."""
    memory: Any
    """What the policy keeps of the context."""


class TokenPolicy(nn.Module, ABC):
    """What both policies share: everything that follows from logits and values at the positions of a context."""

    action_shape: tuple[int, ...] = ()
    action_dtype: torch.dtype = torch.int64

    def __init__(self, observation_space: gym.Space, action_space: gym.Space, tokens: Mapping[str, int]) -> None:
        super().__init__()
        self.observation_space, self.action_space = observation_space, action_space
        self.vocabulary, self.prompt, self.length = (int(tokens[k]) for k in ("vocabulary", "prompt", "length"))
        shape = (self.length,)
        if not isinstance(action_space, gym.spaces.Discrete) or int(action_space.n) != self.vocabulary:
            raise ValueError(f"actions must be Discrete({self.vocabulary}), one per token, found {action_space}")
        if not isinstance(observation_space, gym.spaces.MultiDiscrete) or observation_space.shape != shape:
            raise ValueError(f"observations must be MultiDiscrete of shape {shape}, found {observation_space}")

    @abstractmethod
    def _evaluate(self, obs: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Logits [B, T, V] and values, each [B, T], at observations [B, T, L] of ``B`` growing sequences."""

    # -- learning -----------------------------------------------------------------------------

    def forward(self, obs: Tensor, action: Tensor) -> PolicyOutput:
        """Everything a loss needs about ``action`` [B, T] at ``obs`` [B, T, L].

        The observations of a row must be those of one growing sequence, in any order; rows of zeros are padding.
        """
        logits, values = self._evaluate(obs)
        dist = Categorical(logits)
        return PolicyOutput(dist.log_prob(action), dist.entropy(), values, dist)

    def update_normalizer(self, *_: Any) -> None:
        """Tokens need no normalisation."""

    # -- acting -------------------------------------------------------------------------------

    def noise(self, n_steps: int, n_envs: int, generator: torch.Generator) -> Tensor:
        """Gumbel noise for whole sequences, [n_steps, n_envs, V]."""
        return gumbel((n_steps, n_envs, self.vocabulary), generator)

    def distribution(self, obs: Tensor) -> Categorical:
        """Of the next token at observations [N, L]."""
        return Categorical(self._evaluate(obs.unsqueeze(1))[0].squeeze(1))

    def act(self, obs: Tensor, noise: Tensor) -> Tensor:
        """The tokens [N] that ``noise`` [N, V] selects at observations [N, L]."""
        return self.distribution(obs).sample(noise)

    def deterministic(self, obs: Tensor) -> Tensor:
        """The most probable tokens [N] at observations [N, L]."""
        return self.distribution(obs).mode()

    def to_env(self, obs: Tensor, action: Tensor) -> Tensor:
        """The environment's actions are the tokens."""
        return action

    def sampler(self) -> Sampler:
        """``act`` and ``to_env`` in one call."""

        def sample(obs: Any, noise: Tensor) -> tuple[Tensor, Tensor]:
            action = self.act(obs, noise)
            return action, action

        return sample

    def values(self, obs: Tensor) -> dict[str, Tensor]:
        """All critics at observations [M, L], each [M]."""
        return {name: value.squeeze(1) for name, value in self._evaluate(obs.unsqueeze(1))[1].items()}

    # -- acting token by token ----------------------------------------------------------------

    def prefill(self, obs: Tensor) -> SequenceState:
        """Begin with observations [B, L] that all have the same number of written tokens, at least one."""
        context = _written(obs)
        return self._stand(context)

    def extend(self, state: SequenceState, token: Tensor) -> SequenceState:
        """Append ``token`` [B] to every sequence; -1 pads one that has ended, whose logits then mean nothing."""
        return self._stand(torch.cat([state.memory, token.unsqueeze(1) + 1], 1))

    def _stand(self, context: Tensor) -> SequenceState:
        whole = nn.functional.pad(context, (0, self.length - context.shape[1]))
        return SequenceState(self._evaluate(whole.unsqueeze(1))[0].squeeze(1), context)


def _written(obs: Tensor) -> Tensor:
    """[B, n] the written part of observations [B, L]."""
    count = (obs > 0).sum(-1)
    n = int(count[0])
    if n < 1 or bool((count != n).any()):
        raise ValueError(f"sequences that grow in step need equally many written tokens, at least 1; found {count}")
    return obs[:, :n]


class TransformerPolicy(TokenPolicy):
    """A causal transformer (GPT-2's layers, learned positions, no dropout) from the transformers library.

    One pass over a row's whole context gives all its positions. The critics are small networks on the final features
    and send no gradient into them: as in ``ActorCritic``, a critic's loss leaves the actor alone.

    Args:
        observation_space: MultiDiscrete of the context's length.
        action_space: Discrete of the vocabulary's size.
        tokens: ``metadata["tokens"]`` of the environment.
        width: Features per position.
        layers: Attention layers.
        heads: Attention heads; must divide ``width``.
        critics: Names of the scalar critics.
    """

    def __init__(
        self,
        observation_space: gym.Space,
        action_space: gym.Space,
        tokens: Mapping[str, int],
        width: int = 64,
        layers: int = 2,
        heads: int = 4,
        critics: tuple[str, ...] = ("value",),
    ) -> None:
        super().__init__(observation_space, action_space, tokens)
        try:
            from transformers import GPT2Config, GPT2Model
        except ImportError as error:
            raise ImportError(
                f"TransformerPolicy needs the transformers library: pip install 'ctrlrl[tokens]' ({error})"
            ) from error
        if width < 1 or layers < 1 or heads < 1 or width % heads:
            raise ValueError(
                f"width={width}, layers={layers}, heads={heads}: each must be at least 1, and heads must divide width"
            )
        # eager attention: the fused kernels have no second derivative, and contexts are short
        config = GPT2Config(
            vocab_size=self.vocabulary + 1, n_positions=self.length, n_embd=width, n_layer=layers, n_head=heads,
            resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=None, eos_token_id=None,
            tie_word_embeddings=False, attn_implementation="eager",  # type: ignore[call-arg]
        )  # fmt: skip
        self.body = GPT2Model(config)
        self.head = nn.Linear(width, self.vocabulary)
        nn.init.normal_(self.head.weight, std=0.02)
        nn.init.zeros_(self.head.bias)
        self.critics = nn.ModuleDict(
            {name: nn.Sequential(nn.Linear(width, width), nn.Tanh(), nn.Linear(width, 1)) for name in critics}
        )
        # added to the attention scores; half precision has room for it too
        blocked = torch.full((self.length, self.length), -1e4).triu(1)
        self.register_buffer("causal", blocked[None, None], persistent=False)

    causal: Tensor

    def _evaluate(self, obs: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        # a context only grows, so the largest entries over time are the last one's; what is behind a position's own
        # last token cannot be seen from there
        context = obs.amax(1)
        # the ready mask keeps the library from building one out of the data
        hidden = self.body(input_ids=context, attention_mask=self.causal, use_cache=False).last_hidden_state
        last = ((obs > 0).sum(-1) - 1).clamp_min(0)
        features = hidden.gather(1, last.unsqueeze(-1).expand(*last.shape, hidden.shape[-1]))
        fixed = features.detach()
        return self.head(features), {name: critic(fixed).squeeze(-1) for name, critic in self.critics.items()}

    def prefill(self, obs: Tensor) -> SequenceState:
        from transformers import DynamicCache

        return self._advance(DynamicCache(config=self.body.config), _written(obs))

    def extend(self, state: SequenceState, token: Tensor) -> SequenceState:
        return self._advance(state.memory, token.unsqueeze(1) + 1)

    def _advance(self, cache: Any, ids: Tensor) -> SequenceState:
        before = cache.get_seq_length()
        seen = before + ids.shape[1]
        mask = self.causal[:, :, before:seen, :seen]
        out = self.body(input_ids=ids, attention_mask=mask, past_key_values=cache, use_cache=True)
        return SequenceState(self.head(out.last_hidden_state[:, -1]), out.past_key_values)


class TabularPolicy(TokenPolicy):
    """A softmax table with one row for every beginning of an answer, for exact checks on tiny tasks.

    The prompt is taken to be always the same. Row 0 is the empty answer, then come all answers of one token, of two,
    and so on; the last token is never followed by a choice. Critics are tables too.

    Args:
        observation_space: MultiDiscrete of the context's length.
        action_space: Discrete of the vocabulary's size.
        tokens: ``metadata["tokens"]`` of the environment.
        width: Not used, like ``layers`` and ``heads``: a table is built with the same arguments as a transformer.
        layers: Not used.
        heads: Not used.
        critics: Names of the scalar critics.
    """

    largest = 1_000_000

    def __init__(
        self,
        observation_space: gym.Space,
        action_space: gym.Space,
        tokens: Mapping[str, int],
        width: int = 64,
        layers: int = 2,
        heads: int = 4,
        critics: tuple[str, ...] = ("value",),
    ) -> None:
        super().__init__(observation_space, action_space, tokens)
        answer = self.length - self.prompt
        counts = [self.vocabulary**n for n in range(answer)]
        self.rows = sum(counts)
        if self.rows > self.largest:
            raise ValueError(
                f"a table needs {self.rows:,} rows for answers of {answer} tokens out of {self.vocabulary}; "
                f"at most {self.largest:,} are allowed. Use TransformerPolicy"
            )
        self.table = nn.Parameter(torch.zeros(self.rows, self.vocabulary))
        self.critics = nn.ModuleDict({name: nn.Embedding(self.rows, 1) for name in critics})
        for critic in self.critics.values():
            nn.init.zeros_(critic.weight)  # type: ignore[arg-type]
        # the row of a beginning of n tokens is (number of shorter ones) + (its tokens read as a number)
        self.register_buffer("first", torch.tensor([0, *counts]).cumsum(0), persistent=False)
        self.register_buffer("place", torch.tensor(counts), persistent=False)

    first: Tensor
    place: Tensor

    def row(self, obs: Tensor) -> Tensor:
        """Row of the table at observations [..., L]; 0 for complete answers, which have none."""
        answer = obs[..., self.prompt :]
        count = (answer > 0).sum(-1)
        # first token in the lowest place, so that a place does not depend on how many follow
        number = ((answer[..., :-1] - 1).clamp_min(0) * self.place[:-1]).sum(-1)
        row = self.first[count] + number
        return torch.where(count < answer.shape[-1], row, 0)

    def _evaluate(self, obs: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        row = self.row(obs)
        return self.table[row], {name: critic(row).squeeze(-1) for name, critic in self.critics.items()}
