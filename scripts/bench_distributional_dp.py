"""Speed and memory of distributional dynamic programming on a gridworld, against plain Python.

Cells of meadow (reward 0) and gravel (-1), one goal that ends the episode, moves that slip to either side. Utility
min(x, 0), gamma = 1; laws of the return in float32, values in float64.

    library   ctrlrl.planning.distributional_dp, engine "lattice": the whole problem
    plain     the same arithmetic in Python loops over lists, on a small grid for a few steps

The two must agree on the small grid before anything is timed. A cell is a (state, stock, atom) of one sweep, and the
ratio is that of seconds per cell. Plain Python is timed before and after the library, and its better time counts.

    python scripts/bench_distributional_dp.py --out bench/distributional_dp.json
"""

from __future__ import annotations

import argparse
import json
import resource
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from ctrlrl.planning.distributional_dp import LatticePlan, OutcomeTable, cvar, solve

CLOCKS: dict[str, Callable[[], float]] = {"wall": time.perf_counter, "cpu": time.process_time}
MOVES = ((-1, 0), (0, 1), (1, 0), (0, -1))


def gridworld(side: int, slip: float, seed: int = 0) -> OutcomeTable:
    """Side x side cells; slips go to either side of the move with half the chance each."""
    gravel = np.random.default_rng(seed).random((side, side)) < 0.5
    goal = (side - 1, side - 1)

    def outcome(cell: tuple[int, int], move: tuple[int, int], chance: float) -> tuple[float, int, int, bool]:
        row, column = (min(max(x + d, 0), side - 1) for x, d in zip(cell, move, strict=True))
        return chance, row * side + column, -int(gravel[row, column]), (row, column) == goal

    def outcomes(cell: tuple[int, int], a: int) -> list[tuple[float, int, int, bool]]:
        ways = ((a, 1.0 - slip), ((a + 1) % 4, slip / 2), ((a - 1) % 4, slip / 2))
        return [outcome(cell, MOVES[to], chance) for to, chance in ways]

    cells = [(row, column) for row in range(side) for column in range(side)]
    return OutcomeTable.of({s: {a: outcomes(cell, a) for a in range(4)} for s, cell in enumerate(cells)})


def library(table: OutcomeTable, args: argparse.Namespace, horizon: int) -> LatticePlan:
    """Stocks and atoms as asked for: returns from -(atoms - 1) to 0, stocks around 0."""
    plan = solve(
        table, "shortfall", horizon, stocks=[-(args.stocks // 2), args.stocks // 2 - 1 + args.stocks % 2],
        engine="lattice", atoms=(1 - args.atoms, 0), max_bytes=2**40,
    )  # fmt: skip
    assert isinstance(plan, LatticePlan)
    return plan


def plain(table: OutcomeTable, args: argparse.Namespace, horizon: int) -> tuple[list, list]:
    """F [S][C] and laws [S][C][X] at time 0, loop by loop."""
    low, count, width = -(args.stocks // 2), args.stocks, args.atoms
    states = table.states
    value = [[float(min(low + j, 0)) for j in range(count)] for _ in range(states + 1)]
    mean = [[0.0] * count for _ in range(states + 1)]
    law = [[[0.0] * (width - 1) + [1.0] for _ in range(count)] for _ in range(states + 1)]
    for _ in range(horizon):
        new_value, new_mean, new_law = [], [], []
        for rows in table.rows:
            values, means, laws = [], [], []
            for j in range(count):
                best = best_mean = 0.0
                chosen = None
                for outcomes in rows:
                    q = m = 0.0
                    for p, n, r in outcomes:
                        at = j + r
                        if at < 0:
                            q += p * (value[n][0] + at)
                            at = 0
                        else:
                            q += p * value[n][at]
                        m += p * (r + mean[n][at])
                    slack = 1e-11 * max(1.0, abs(best))
                    if chosen is None or q > best + slack or (q >= best - slack and m > best_mean + slack):
                        best, best_mean, chosen = q, m, outcomes
                assert chosen is not None
                mixed = [0.0] * width
                for p, n, r in chosen:
                    source = law[n][max(j + r, 0)]
                    mixed[0] += p * sum(source[: 1 - r]) if r else p * source[0]
                    for x in range(1, width + r):
                        mixed[x] += p * source[x - r]
                values.append(best)
                means.append(best_mean)
                laws.append(mixed)
            new_value.append(values)
            new_mean.append(means)
            new_law.append(laws)
        value, mean, law = ([*new, old[-1]] for new, old in ((new_value, value), (new_mean, mean), (new_law, law)))
    return value, law


def timed(run: Callable[[], object]) -> tuple[dict[str, float], object]:
    begin = {name: clock() for name, clock in CLOCKS.items()}
    result = run()
    return {name: clock() - begin[name] for name, clock in CLOCKS.items()}, result


def check(args: argparse.Namespace) -> float:
    """Largest difference of values and laws between the two on the small grid."""
    table = gridworld(args.plain_side, args.slip)
    plan, (value, law) = library(table, args, args.plain_horizon), plain(table, args, args.plain_horizon)
    assert plan.laws is not None
    apart = max(np.abs(plan.values - value[:-1]).max(), np.abs(plan.laws - np.array(law[:-1])).max())
    if apart > 1e-5:
        raise SystemExit(f"library and plain Python differ by {apart}")
    return float(apart)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--side", type=int, default=100, help="cells along each side: side^2 states")
    parser.add_argument("--stocks", type=int, default=101)
    parser.add_argument("--atoms", type=int, default=51)
    parser.add_argument("--horizon", type=int, default=50)
    parser.add_argument("--slip", type=float, default=0.1)
    parser.add_argument("--plain-side", type=int, default=12)
    parser.add_argument("--plain-horizon", type=int, default=4)
    parser.add_argument("--clock", choices=CLOCKS, default="cpu", help="cpu is fair on a busy machine: one thread each")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()

    apart = check(args)
    small, table = gridworld(args.plain_side, args.slip), gridworld(args.side, args.slip)
    before = timed(lambda: plain(small, args, args.plain_horizon))[0]
    took, plan = timed(lambda: library(table, args, args.horizon))
    after = timed(lambda: plain(small, args, args.plain_horizon))[0]
    assert isinstance(plan, LatticePlan)

    cells = table.states * args.stocks * args.atoms * args.horizon
    plain_cells = small.states * args.stocks * args.atoms * args.plain_horizon
    slow = min(before[args.clock], after[args.clock])
    ratio = (slow / plain_cells) / (took[args.clock] / cells)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    answers = {level: cvar(plan, level).value for level in (0.1, 0.5, 1.0)}
    result = {
        "states": table.states, "stocks": args.stocks, "atoms": args.atoms, "horizon": args.horizon, "slip": args.slip,
        "seconds": took, "plain_seconds": [before, after], "plain_states": small.states,
        "plain_horizon": args.plain_horizon, "reckoned_bytes": plan.bytes_used, "peak_bytes": peak,
        "states_stocks_atoms_per_s": cells / took[args.clock], "plain_per_s": plain_cells / slow, "ratio": ratio,
        "clock": args.clock, "differ": apart, "error_bound": plan.error_bound,
        "law_error_bound": float(plan.law_errors.max()),
        "cvar": answers, "numpy": np.__version__,
    }  # fmt: skip
    shape = f"{table.states:,} states x {args.stocks} stocks x {args.atoms} atoms, horizon {args.horizon}"
    print(f"{shape}: {took['wall']:.1f} s wall, {took['cpu']:.1f} s cpu")
    print(f"memory: {plan.bytes_used / 2**20:,.0f} MiB reckoned, {peak / 2**20:,.0f} MiB peak of the process")
    print(f"states x stocks x atoms per second: {result['states_stocks_atoms_per_s']:,.0f}")
    print(f"plain Python: {result['plain_per_s']:,.0f} on {small.states} states; {ratio:.1f} times faster")
    print(f"error bounds: value {plan.error_bound:.3g}, laws {result['law_error_bound']:.3g}; CVaR {answers}")
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
