"""Which rows to keep and how many episodes to spend where: pure functions behind the selectors of core.select."""

from __future__ import annotations

import heapq

import torch
from torch import Tensor


def max_variance_subset(x: Tensor, n: int) -> Tensor:
    """The ``n`` elements of largest variance: some of the smallest and some of the largest, found by one scan.

    argmax {Var(x_S) : |S| = n}

    ======  ===  ================================
    x       [N]  values
    n            how many to keep, 1 <= n <= N
    return  [N]  bool, True for the n kept
    ======  ===  ================================
    """
    total = x.shape[0]
    if not 1 <= n <= total:
        raise ValueError(f"cannot keep {n} of {total} elements")
    ordered, order = (x - x.mean()).sort()
    start = torch.zeros(1, dtype=x.dtype, device=x.device)
    first = torch.cat([start, ordered.cumsum(0)])
    second = torch.cat([start, ordered.square().cumsum(0)])
    low = torch.arange(n + 1, device=x.device)  # how many of the smallest
    high = total - (n - low)
    mean = (first[low] + first[-1] - first[high]) / n
    best = ((second[low] + second[-1] - second[high]) / n - mean.square()).argmax()
    place = torch.arange(total, device=x.device)
    kept = (place < best) | (place >= total - (n - best))
    return torch.zeros_like(kept).scatter(0, order, kept)


def uniform(pool: int, n: int, generator: torch.Generator) -> Tensor:
    """Positions in a pool in random order, none again before all have come.

    =========  ===  =============================
    pool            how many there are
    n               how many to draw
    generator       of the order, on the CPU
    return     [n]  int64 positions in [0, pool)
    =========  ===  =============================
    """
    rounds = [torch.randperm(pool, generator=generator) for _ in range(-(-n // pool))]
    return torch.cat([torch.empty(0, dtype=torch.int64), *rounds])[:n]


def allocate(value: Tensor, low: int, budget: int) -> Tensor:
    """Group sizes for a budget: one episode at a time to the group that gains most by it, from a heap.

    max { sum_g V_g(n_g) : sum_g n_g = budget, low <= n_g <= N }

    Exact where every V_g is concave from ``low`` on, else a greedy approximation. Ties go to the smaller group.

    ======  ==========  =================================================
    value   [G, N + 1]  V_g(n), the value of n episodes of group g
    low                 smallest size, at least 1
    budget              episodes in all
    return  [G]         int64 sizes
    ======  ==========  =================================================
    """
    groups, high = value.shape[0], value.shape[1] - 1
    if not (1 <= low <= high and low * groups <= budget <= high * groups):
        raise ValueError(f"{budget} episodes cannot be split over {groups} groups of {low} to {high} episodes")
    gain = value.diff(dim=1).tolist()
    size = [low] * groups
    heap = [(-gain[g][low], low, g) for g in range(groups)] if low < high else []
    heapq.heapify(heap)
    for _ in range(budget - low * groups):
        _, n, g = heapq.heappop(heap)
        size[g] = n + 1
        if n + 1 < high:
            heapq.heappush(heap, (-gain[g][n + 1], n + 1, g))
    return torch.tensor(size, dtype=torch.int64)


def mixed_outcome_value(p: Tensor, high: int) -> Tensor:
    """What n episodes of a seed are worth: the chance of seeing both outcomes, more for harder seeds.

    V(n) = [1 - p^n - (1 - p)^n] p (1 - p)^2;  concave in n (Knapsack RL, arXiv 2509.25849)

    ======  =============  ==========================
    p       [G]            chance of success
    high                   largest n
    return  [G, high + 1]  V(0), V(1), ..., V(high)
    ======  =============  ==========================
    """
    p = p.double().unsqueeze(-1)
    n = torch.arange(high + 1, dtype=p.dtype)
    both = torch.where(n > 0, 1.0 - p**n - (1.0 - p) ** n, 0.0)
    return both * p * (1.0 - p).square()


def failure_value(p: Tensor, high: int) -> Tensor:
    """What n episodes of a seed are worth: the failures expected, counted once any of the others may succeed.

    U(n) = n (1 - p) [1 - (1 - p)^(n - 1)];  its steps tend to 1 - p, so it needs the bound (V_0, arXiv 2602.03584)

    ======  =============  ==========================
    p       [G]            chance of success
    high                   largest n
    return  [G, high + 1]  U(0), U(1), ..., U(high)
    ======  =============  ==========================
    """
    q = 1.0 - p.double().unsqueeze(-1)
    n = torch.arange(high + 1, dtype=q.dtype)
    return n * q * (1.0 - q ** (n - 1.0).clamp(min=0.0))
