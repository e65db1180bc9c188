"""A causal transformer over the last steps of an episode, each told as return-to-go, observation and action."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple, cast

import gymnasium as gym
import torch
from torch import Tensor, nn

from ctrlrl import names
from ctrlrl.nets.actors import BoxActor, QNetworkConfig
from ctrlrl.types import Obs

OBSERVATION, RETURN_TO_GO, TIMESTEP = "observation", "return_to_go", "timestep"
"""Entries of what a trajectory policy sees. An observation that is a Dict itself keeps its own entries instead of the
first one."""


class Kept(NamedTuple):
    """What dropout leaves, for tensors of ``S`` tokens; drawn by the caller, so that it can be drawn again."""

    features: Tensor
    """[B, 1 + 2 layers, S, width] bool: after the embedding, and after both halves of every layer."""
    attention: Tensor
    """[B, layers, heads, S, S] bool: of the attention weights."""


class Context(NamedTuple):
    """What a trajectory policy remembers of ``N`` episodes."""

    tokens: Tensor
    """[N, K - 1, 3, width] embedded steps, the last one at the end."""
    there: Tensor
    """[N, K - 1] bool: steps that exist."""
    timestep: Tensor
    """[N] int64: number of the last step in its episode."""


class CausalBlock(nn.Module):
    """One layer of GPT-2, with ReLU: attention, then two linear layers, both behind a normalisation."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor, allowed: Tensor, drop: Callable[[Tensor, int], Tensor]) -> Tensor:
        """[B, S, width] to the same; token ``i`` sees ``j`` where ``allowed`` [B, 1, S, S].

        ``drop(x, place)`` is the dropout of the attention weights (0) and of both halves' results (1, 2).
        """
        q, k, v = self.qkv(self.norm1(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        # spelled out: the fused kernels draw their dropout from torch's own generator
        scores = q @ k.mT / math.sqrt(q.shape[-1])
        weights = drop(scores.masked_fill(~allowed, -torch.inf).softmax(-1), 0)
        x = x + drop(self.out((weights @ v).transpose(1, 2).flatten(2)), 1)
        return x + drop(self.down(torch.relu(self.up(self.norm2(x)))), 2)


class TrajectoryActor(BoxActor):
    """Deterministic actions from the last K steps of an episode (Chen et al. 2021, figure 1 and algorithm 1).

    A step is three tokens, return-to-go, observation and action; its action is read off the second. The place of a
    token is told by its step's number in the episode alone.

    Args:
        observation_space: Dict with return_to_go (in the environment's units) and timestep.
        action_space: Bounded Box.
        network: How observations are preprocessed and encoded.
        encoder: The user's own; it is built for the observation without the two entries.
        context: K.
        width: Features of a token.
        layers: Layers of the transformer.
        heads: Attention heads; must divide ``width``.
        dropout: Share of features that :class:`Kept` leaves out.
        return_scale: Divides returns-to-go.
        timesteps: Rows of the table of timesteps; later steps share the last one.
    """

    stochastic = False
    causal: Tensor

    def __init__(
        self,
        observation_space: gym.spaces.Dict,
        action_space: gym.Space,
        network: QNetworkConfig,
        encoder: Callable[..., nn.Module] | None = None,
        *,
        context: int,
        width: int,
        layers: int,
        heads: int,
        dropout: float,
        return_scale: float,
        timesteps: int,
    ) -> None:
        own = {k: s for k, s in observation_space.spaces.items() if k not in (RETURN_TO_GO, TIMESTEP)}
        seen = own[OBSERVATION] if set(own) == {OBSERVATION} else gym.spaces.Dict(own)
        build = encoder or (None if network.encoder is None else names.load(network.encoder, "encoder"))
        super().__init__(
            gym.spaces.Dict(own), action_space, replace(network, actor_hidden=(), encoder=None),
            None if build is None else lambda _: build(seen),
        )  # fmt: skip
        self.observation_space = observation_space
        self.context, self.dropout = context, dropout
        self.return_scale, self.timesteps = return_scale, timesteps
        self.embed = nn.ModuleDict(
            {
                "return_to_go": nn.Linear(1, width),
                "observation": nn.Linear(self.features.out_features, width),
                "action": nn.Linear(self.action_shape[0], width),
                "timestep": nn.Embedding(timesteps, width),
            }
        )
        self.norm, self.last_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.blocks = nn.ModuleList(CausalBlock(width, heads) for _ in range(layers))
        self.out = nn.Linear(width, self.action_shape[0])
        for part in (self.embed, self.blocks, self.out):
            part.apply(_initialise)
        size = 3 * context - 1
        self.register_buffer("causal", torch.ones(size, size, dtype=torch.bool).tril(), persistent=False)

    # -- learning -----------------------------------------------------------------------------

    def forward(self, obs: Obs, action: Tensor, there: Tensor, kept: Kept | None = None) -> Tensor:
        """The actions [B, K, A] in [-1, 1] of every step.

        Args:
            obs: [B * K, ...] steps of ``B`` windows one after the other.
            action: [B * K, A] in [-1, 1].
            there: [B, K] bool: steps that exist; the others are padding, whose actions mean nothing.
            kept: Dropout; None leaves everything.
        """
        tokens = torch.stack([*self._seen(cast(dict[str, Tensor], obs)), self._acted(obs, action)], 1)
        return self._decide(tokens.unflatten(0, there.shape), there, kept)

    def _seen(self, obs: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Tokens [M, width] of the return-to-go and of the observation."""
        when = self._when(obs)
        wanted = self.embed["return_to_go"](obs[RETURN_TO_GO] / self.return_scale)
        return wanted + when, self.embed["observation"](self.features(obs)) + when

    def _acted(self, obs: Obs, action: Tensor) -> Tensor:
        return self.embed["action"](action) + self._when(obs)

    def _when(self, obs: Obs) -> Tensor:
        timestep = cast(dict[str, Tensor], obs)[TIMESTEP].squeeze(-1)
        return self.embed["timestep"](timestep.clamp(max=self.timesteps - 1))

    def _decide(self, tokens: Tensor, there: Tensor, kept: Kept | None = None) -> Tensor:
        """The actions [B, K, A] from tokens [B, K, 3, width]; the last step's own action is not looked at."""

        def drop(x: Tensor, mask: Tensor | None) -> Tensor:
            return x if mask is None else x * mask / (1.0 - self.dropout)

        x = self.norm(tokens.flatten(1, 2)[:, :-1])
        x = drop(x, None if kept is None else kept.features[:, 0])
        exists = there.unsqueeze(-1).expand(-1, -1, 3).flatten(1)[:, None, :-1]
        size = x.shape[1]
        # padding sees itself: a row without any weight would be NaN
        itself = torch.eye(size, dtype=torch.bool, device=x.device)
        allowed = (self.causal[:size, :size] & (exists | itself)).unsqueeze(1)
        for i, block in enumerate(self.blocks):

            def drop_here(x: Tensor, place: int, i: int = i) -> Tensor:
                if kept is None:
                    return x
                return drop(x, kept.attention[:, i] if place == 0 else kept.features[:, 2 * i + place])

            x = block(x, allowed, drop_here)
        return torch.tanh(self.out(self.last_norm(x[:, 1::3])))

    # -- acting -------------------------------------------------------------------------------

    def nothing(self, n: int) -> Context:
        """The memory of ``n`` episodes that are to begin."""
        device, width = self.out.weight.device, self.out.in_features
        return Context(
            torch.zeros(n, self.context - 1, 3, width, device=device),
            torch.zeros(n, self.context - 1, dtype=torch.bool, device=device),
            torch.full((n,), -1, device=device),
        )

    def step(self, obs: Obs, before: Context) -> tuple[Tensor, Context]:
        """The actions [N, A] in [-1, 1], and the memory for the next step.

        An episode's memory goes on only where its step follows on the one remembered.
        """
        seen = cast(dict[str, Tensor], obs)
        timestep = seen[TIMESTEP].squeeze(-1)
        there = before.there & (timestep == before.timestep + 1).unsqueeze(-1)
        there = torch.cat([there, torch.ones_like(timestep, dtype=torch.bool).unsqueeze(-1)], 1)
        wanted, observed = self._seen(seen)
        now = torch.stack([wanted, observed, torch.zeros_like(wanted)], 1)
        action = self._decide(torch.cat([before.tokens, now.unsqueeze(1)], 1), there)[:, -1]
        now = torch.stack([wanted, observed, self._acted(obs, action)], 1)
        tokens = torch.cat([before.tokens, now.unsqueeze(1)], 1)
        return action, Context(tokens[:, 1:], there[:, 1:], timestep)

    def act(self, obs: Obs, noise: Tensor) -> Tensor:
        return self.mode(obs)

    def mode(self, obs: Obs) -> Tensor:
        """The actions [N, A] in [-1, 1] of episodes of which nothing else is known."""
        return self.step(obs, self.nothing(len(cast(dict[str, Tensor], obs)[TIMESTEP])))[0]


def _initialise(module: nn.Module) -> None:
    """GPT-2's: deviation 0.02, biases zero."""
    if isinstance(module, nn.Linear | nn.Embedding):
        nn.init.normal_(module.weight, std=0.02)
    if isinstance(module, nn.Linear):
        nn.init.zeros_(module.bias)
