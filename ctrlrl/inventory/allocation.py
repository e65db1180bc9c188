"""Feasibility layers: from what policies wish to send to what there is to send.

Each function takes wishes [..., K] of the links that leave one place, and what it has on hand: [...] or [..., 1]. None
sends a negative amount, or more than there is (to rounding); a place with nothing sends exactly 0, and all gradients
stay finite there. :class:`Fan` lays the links of a whole network out in such rows.

Source: Alvo, Russo, Kanoria, Lee (arXiv:2306.11246), and the released code.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ctrlrl.inventory.problem import Network

EPS = 1e-10
"""Sums of wishes below it are taken for it; the released code adds it to all. Stock over its square is still finite."""


def proportional(wish: Tensor, on_hand: Tensor, keep: Tensor | None = None) -> Tensor:
    """Each wish where there is enough for all; else all are cut by the same factor: ``u * min(1, I / sum u)``.

    Args:
        wish: [..., K], not negative.
        on_hand: [...] or [..., 1].
        keep: [...] or [..., 1], not negative: the wish of the place itself (its self-loop). It enters the sum, and what
            it gets stays.
    """
    on_hand = _stock(on_hand, wish)
    asked = wish.sum(-1, keepdim=True)
    if keep is not None:
        asked = asked + _column(keep, wish)
    return wish * (on_hand / asked.clamp_min(EPS)).clamp_max(1.0)


def full(wish: Tensor, on_hand: Tensor, there: Tensor | None = None) -> Tensor:
    """All there is, in the proportions of the wishes: ``u * I / sum u``; in equal parts where nothing is wished.

    For places that cannot hold (transshipment).

    Args:
        wish: [..., K], not negative.
        on_hand: [...] or [..., 1].
        there: [..., K] bool: links that exist; those of padding must have wishes of 0. All by default.
    """
    on_hand = _stock(on_hand, wish)
    asked = wish.sum(-1, keepdim=True)
    links = torch.ones_like(wish) if there is None else there.to(wish.dtype)
    equal = links / links.sum(-1, keepdim=True).clamp_min(1.0)
    return on_hand * torch.where(asked > EPS, wish / asked.clamp_min(EPS), equal)


def softmax(logit: Tensor, on_hand: Tensor, stay: float | Tensor | None = 1.0) -> Tensor:
    """Shares of what there is by a softmax: ``I * softmax([logits, stay])``, of which the last share stays behind.

    Args:
        logit: [..., K]; minus infinity for a link of padding.
        on_hand: [...] or [..., 1].
        stay: The extra logit: a number, or a tensor that expands to [..., 1]. None leaves it out, so that all there is
            goes out (transshipment); so does minus infinity.
    """
    on_hand = _stock(on_hand, logit)
    if stay is None:
        return on_hand * logit.softmax(-1)
    extra = torch.as_tensor(stay, dtype=logit.dtype, device=logit.device).expand_as(logit[..., :1])
    return on_hand * torch.cat([logit, extra], -1).softmax(-1)[..., :-1]


def _column(given: Tensor, wish: Tensor) -> Tensor:
    return given.unsqueeze(-1) if given.ndim < wish.ndim else given


def _stock(on_hand: Tensor, wish: Tensor) -> Tensor:
    """[..., 1] of what can be sent: rounding leaves a trace of negative stock behind."""
    return _column(on_hand, wish).clamp_min(0.0)


class Fan(nn.Module):
    """The links that leave warehouses, as a row of ``K`` for each of ``W`` warehouses; short rows are padded.

    Attributes:
        there: [W, K] bool: where a row has a link.
        holds: [W] bool of the warehouses.
        supplied: [E] 1 for links that leave from the supplier, else 0.
    """

    there: Tensor
    holds: Tensor
    supplied: Tensor
    _link: Tensor
    _cell: Tensor
    _sent: Tensor

    def __init__(self, network: Network) -> None:
        super().__init__()
        stores = len(network.stores)
        rows = [[e for e, s in enumerate(network.sources) if s == w + stores] for w in range(len(network.warehouses))]
        width = max(map(len, rows), default=0)
        nowhere = len(network.links)
        link = torch.tensor([row + [nowhere] * (width - len(row)) for row in rows], dtype=torch.long)
        link = link.reshape(len(rows), width)
        there = link < nowhere
        buffers = {
            "there": there,
            "holds": torch.tensor([bool(w.holds) for w in network.warehouses], dtype=torch.bool),
            "supplied": torch.tensor([float(s < 0) for s in network.sources]),
            "_link": link.flatten(),  # [W * K] link of each cell
            "_cell": there.flatten().nonzero().squeeze(1),  # cells that have a link
            "_sent": link[there],  # and which
        }
        self._all_hold, self._none_hold = bool(buffers["holds"].all()), not bool(buffers["holds"].any())
        for name, value in buffers.items():  # they follow from the network: no part of the weights
            self.register_buffer(name, value, persistent=False)
        self.stores, self.links = stores, nowhere

    def stock(self, inventory: Tensor) -> Tensor:
        """[..., W] on hand at the warehouses, of an inventory [..., N, L]."""
        return inventory[..., self.stores :, 0]

    def rows(self, values: Tensor, fill: float = 0.0) -> Tensor:
        """[..., W, K] of values by link [..., E]; ``fill`` where there is none."""
        padded = torch.nn.functional.pad(values, (0, 1), value=fill)
        return padded.index_select(-1, self._link).unflatten(-1, self.there.shape)

    def flows(self, rows: Tensor) -> Tensor:
        """[..., E] by link of rows [..., W, K]; 0 for links that leave from the supplier."""
        sent = rows.flatten(-2).index_select(-1, self._cell)
        return sent.new_zeros(*sent.shape[:-1], self.links).index_copy(-1, self._sent, sent)

    def feasible(self, wish: Tensor, inventory: Tensor, keep: Tensor | None = None) -> Tensor:
        """[..., E] of wishes [..., E], not negative: :func:`proportional` where a warehouse holds, :func:`full` where
        it does not; orders to the supplier are met as they are.

        Args:
            wish: [..., E].
            inventory: [..., N, L].
            keep: [..., W], see :func:`proportional`; what cannot hold keeps nothing.
        """
        if not len(self.holds):
            return wish
        rows, stock = self.rows(wish), self.stock(inventory)
        if self._all_hold:
            sent = proportional(rows, stock, keep)
        elif self._none_hold:
            sent = full(rows, stock, self.there)
        else:
            held, passed = proportional(rows, stock, keep), full(rows, stock, self.there)
            sent = torch.where(self.holds[:, None], held, passed)
        return wish * self.supplied + self.flows(sent)
