"""Store-periods per second, forward and backward, of the inventory simulator.

Ten stores of one warehouse, lost sales, 1,024 systems over 50 periods, in float32. The policy is fixed and cheap: every
place orders up to a level, and the warehouse shares what it has in proportion to the wishes; the gradient is that of
the mean cost by the levels. A second part leaves the policy out: actions are recorded, and the gradient is by them.

    stacking   the simulator written out plainly: clones, one torch.stack of the slots per period
    eager      ctrlrl_envs.inventory
    compiled   the same, policy and steps of a few periods through torch.compile (not where there is no compiler)
    floor      what the tensors that a step must read and write take at the speed of a copy of the same size, without
               those of the policy

Costs and gradients of all must agree before anything is timed. Contestants alternate in one process with one thread,
then in another with two, and each counts with its better one. Ratios are taken round by round; medians are shown.

    python scripts/bench_inventory_speed.py --minutes 5 --out bench/inventory_speed.json
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from ctrlrl_envs.inventory.demand import Drawn, Normal, Split
from ctrlrl_envs.inventory.network import SUPPLIER, Link, Network, Store, Warehouse
from ctrlrl_envs.inventory.simulator import InventorySimulator, Problem, State
from torch import Tensor

BATCH, PERIODS, STORES = 1024, 50, 10
LEAD_TIMES = [2, 3] * (STORES // 2) + [3]  # of each place
CLOCKS: dict[str, Callable[[], float]] = {"wall": time.perf_counter, "cpu": time.process_time}
Step = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
"""Inventory, action and demand to the next inventory and the cost."""


def problem() -> Problem:
    links = [Link("warehouse", f"store {i}", LEAD_TIMES[i]) for i in range(STORES)]
    network = Network(
        tuple(Store(f"store {i}", 0.8 + 0.04 * i, 7.0 + 0.4 * i) for i in range(STORES)),
        (Warehouse("warehouse", 0.3),),
        (*links, Link(SUPPLIER, "warehouse", LEAD_TIMES[-1])),
        unmet_demand="lost",
    )
    demand = Normal(torch.full((STORES,), 5.0), torch.full((STORES,), 2.0), 0.5)
    return Problem("speed", network, demand, {"train": Split(PERIODS)})


class Bench:
    """All contestants on the same scenarios."""

    def __init__(self, unroll: int, compiled: bool) -> None:
        self.simulator = InventorySimulator(problem())
        self.state = self.simulator.reset(BATCH, generator=torch.Generator().manual_seed(0))
        self.demand = self.state.drawn.demand
        times = torch.tensor(LEAD_TIMES, dtype=torch.float32)
        start = 5.0 * (times + 1.0) + 2.0
        start[STORES] = 5.0 * STORES * (times[-1] + 1.0)
        self.levels = start.requires_grad_()
        self.from_warehouse = torch.tensor([1.0] * STORES + [0.0])
        self.arrives = torch.nn.functional.one_hot(torch.tensor(LEAD_TIMES) - 1).float()  # [E, L]
        self.actions = self._record()
        self.arms = {
            "stacking": lambda: self.roll(self.stacking, self.state.inventory.contiguous()),
            "eager": lambda: self.roll(self.ours, self.state.inventory),
            "stacking, no policy": lambda: self.roll(self.stacking, self.state.inventory.contiguous(), self.actions),
            "eager, no policy": lambda: self.roll(self.ours, self.state.inventory, self.actions),
        }
        if compiled:
            stretch = torch.compile(self.stretch, fullgraph=True, dynamic=False)
            self.arms["compiled"] = lambda: self.roll_compiled(stretch, unroll)

    # -- one period ---------------------------------------------------------------------------

    def policy(self, inventory: Tensor) -> Tensor:
        """[B, E] orders up to the levels, of the warehouse's stock in proportion."""
        wish = (self.levels - inventory.sum(2)).relu()
        there, asked = inventory[:, STORES, 0].relu(), wish[:, :STORES].sum(1)
        share = there / torch.maximum(asked, there).clamp_min(1e-15)
        return wish * (1.0 + self.from_warehouse * (share - 1.0).unsqueeze(1))

    def ours(self, inventory: Tensor, action: Tensor, demand: Tensor) -> tuple[Tensor, Tensor]:
        after, cost = self.simulator.step(State(inventory, 0, Drawn(demand.unsqueeze(1))), action)
        return after.inventory, cost

    def stacking(self, inventory: Tensor, action: Tensor, demand: Tensor) -> tuple[Tensor, Tensor]:
        """As one would write it down first."""
        stock = inventory.clone()
        stores = stock[:, :STORES, 0] - demand
        warehouse = stock[:, STORES, 0] - action[:, :STORES].sum(1)
        holding = self.simulator.holding_cost
        cost = (self.simulator.unmet_cost * torch.relu(-stores)).sum(1)
        cost = cost + (holding[:, :STORES] * torch.relu(stores)).sum(1)
        cost = cost + holding[0, STORES] * torch.relu(warehouse)
        left = torch.cat([torch.relu(stores), torch.relu(warehouse).unsqueeze(1)], 1)
        later = [stock[:, :, k].clone() for k in range(2, stock.shape[2])]
        slots = [left + stock[:, :, 1], *later, torch.zeros_like(left)]
        return torch.stack(slots, 2) + action.unsqueeze(2) * self.arrives, cost

    # -- horizons -----------------------------------------------------------------------------

    def _record(self) -> list[Tensor]:
        inventory, found = self.state.inventory, []
        with torch.no_grad():
            for t in range(PERIODS):
                # not all there is: at the kink of the warehouse's holding cost rounding would choose the derivative
                found.append(0.99 * self.policy(inventory))
                inventory, _ = self.ours(inventory, found[-1], self.demand[:, t])
        return [a.contiguous().requires_grad_() for a in found]

    def roll(self, step: Step, inventory: Tensor, actions: list[Tensor] | None = None) -> Tensor:
        total = torch.zeros(())
        for t in range(PERIODS):
            action = self.policy(inventory) if actions is None else actions[t]
            inventory, cost = step(inventory, action, self.demand[:, t])
            total = total + cost
        return total

    def stretch(self, inventory: Tensor, demand: Tensor) -> tuple[Tensor, Tensor]:
        total = torch.zeros(())
        for t in range(demand.shape[1]):
            inventory, cost = self.ours(inventory, self.policy(inventory), demand[:, t])
            total = total + cost
        return inventory, total

    def roll_compiled(self, stretch: Callable[..., tuple[Tensor, Tensor]], unroll: int) -> Tensor:
        inventory, total = self.state.inventory, torch.zeros(())
        for t in range(0, PERIODS, unroll):
            inventory, cost = stretch(inventory, self.demand[:, t : t + unroll])
            total = total + cost
        return total

    def run(self, arm: str) -> tuple[Tensor, list[Tensor], dict[str, list[float]]]:
        """Costs, gradients, and seconds forward and backward by each clock."""
        leaves = self.actions if "no policy" in arm else [self.levels]
        for leaf in leaves:
            leaf.grad = None
        stamps = [{k: f() for k, f in CLOCKS.items()}]
        costs = self.arms[arm]()
        stamps.append({k: f() for k, f in CLOCKS.items()})
        costs.mean().backward()
        stamps.append({k: f() for k, f in CLOCKS.items()})
        took = {k: [b[k] - a[k] for a, b in itertools.pairwise(stamps)] for k in CLOCKS}
        return costs.detach(), [leaf.grad.clone() for leaf in leaves], took

    def check(self) -> None:
        """Everyone's costs and gradients are the same, to rounding; compiles what is to be compiled."""
        for arm in self.arms:
            known, derived, _ = self.run("stacking, no policy" if "no policy" in arm else "stacking")
            costs, grads, _ = self.run(arm)
            torch.testing.assert_close(costs, known, rtol=1e-4, atol=1e-2)
            for mine, theirs in zip(grads, derived, strict=True):
                torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-3 * theirs.abs().max().item())

    def floor(self) -> dict[str, float]:
        """Bytes of a horizon, and seconds that a copy of as many takes by each clock."""
        places, slots = STORES + 1, max(LEAD_TIMES)
        inventory, action, demand, row, cost = places * slots, places, STORES, places, 1
        forward = 2 * inventory + action + demand + row + cost
        backward = 2 * inventory + action + row + cost
        moved = 4 * BATCH * PERIODS * (forward + backward)
        source = torch.rand(PERIODS, slots, places, BATCH)
        target = torch.empty_like(source)
        share = moved / (2 * source.nbytes)
        found: dict[str, list[float]] = {k: [] for k in CLOCKS}
        for _ in range(20):
            before = {k: f() for k, f in CLOCKS.items()}
            target.copy_(source)
            for k, f in CLOCKS.items():
                found[k].append(share * (f() - before[k]))
        return {"bytes": moved} | {k: statistics.median(v) for k, v in found.items()}


def work(threads: int, seconds: float, unroll: int, compiled: bool) -> dict:
    """Rounds of all contestants with so many threads: seconds of each, forward and backward."""
    torch.set_num_threads(threads)
    bench = Bench(unroll, compiled)
    bench.check()
    rounds: list[dict] = []
    begin = time.monotonic()
    while len(rounds) < 3 or time.monotonic() - begin < seconds:
        rounds.append({arm: bench.run(arm)[2] for arm in bench.arms} | {"floor": bench.floor()})
    return {"threads": threads, "rounds": rounds}


def summary(found: list[dict], clock: str) -> dict:
    """Seconds per horizon of everyone with its best number of threads, and how many times faster than stacking."""
    medians = {}
    for part in found:
        for arm in part["rounds"][0]:
            took = [r[arm][clock] for r in part["rounds"]]
            forward, backward = ([t[i] if arm != "floor" else t / 2 for t in took] for i in (0, 1))
            whole = [a + b for a, b in zip(forward, backward, strict=True)]
            mine = {
                "threads": part["threads"], "seconds": statistics.median(whole), "rounds": whole,
                "forward": statistics.median(forward), "backward": statistics.median(backward),
            }  # fmt: skip
            if arm not in medians or mine["seconds"] < medians[arm]["seconds"]:
                medians[arm] = mine
    for arm, mine in medians.items():
        base = medians["stacking, no policy" if "no policy" in arm else "stacking"]["rounds"]
        mine["times_stacking"] = statistics.median(b / m for b, m in zip(base, mine["rounds"], strict=False))
        mine["times_floor"] = mine["seconds"] / medians["floor"]["seconds"]
        mine["store_periods_per_s"] = BATCH * PERIODS * STORES / mine["seconds"]
    return {arm: {k: v for k, v in mine.items() if k != "rounds"} for arm, mine in medians.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=5.0, help="of timing; compiling comes on top")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--unroll", type=int, default=5, help="periods compiled as one; 50 is the whole horizon")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=shutil.which("g++") is not None)
    parser.add_argument("--clock", choices=CLOCKS, default="wall", help="cpu: fair on a busy machine, for one thread")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--worker", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    seconds = 60.0 * args.minutes / len(args.threads)
    if args.worker:
        print(json.dumps(work(args.worker, seconds, args.unroll, args.compile)))
        return
    found = []
    for threads in args.threads:
        words = [sys.executable, __file__, *sys.argv[1:], "--worker", str(threads)]
        done = subprocess.run(words, stdout=subprocess.PIPE, text=True, check=True,
                              env=os.environ | {"OMP_NUM_THREADS": str(threads)})  # fmt: skip
        found.append(json.loads(done.stdout.splitlines()[-1]))
    result = summary(found, args.clock)
    print(f"{'':24}threads   store-periods/s   forward ms  backward ms   x stacking   x floor")
    for arm, row in result.items():
        print(
            f"{arm:24}{row['threads']:7}{row['store_periods_per_s']:18,.0f}{1e3 * row['forward']:13.1f}"
            f"{1e3 * row['backward']:13.1f}{row['times_stacking']:13.2f}{row['times_floor']:10.1f}"
        )
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        about = {"batch": BATCH, "periods": PERIODS, "stores": STORES, "unroll": args.unroll, "clock": args.clock}
        rounds = {str(f["threads"]): len(f["rounds"]) for f in found}
        args.out.write_text(
            json.dumps(about | {"torch": torch.__version__, "rounds": rounds, "arms": result}, indent=1)
        )


if __name__ == "__main__":
    main()
