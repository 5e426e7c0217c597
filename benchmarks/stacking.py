"""What stacking points buys above a shared trunk: seconds a step against how many entries may be stacked at once.

    python benchmarks/stacking.py [--rounds R]

MiniLM with LoRA in its upper third, 64 directions, as in the demo. Limits alternate; 0 stacks none.
"""

from __future__ import annotations

import argparse
from statistics import median

from peft_dpzero.estimation import losses as passes

from ours import Batches, Ours
from timing import alternate, ratios
from workloads import Row, minilm

LIMITS = (0, 1 << 19, 1 << 20, 1 << 21, 1 << 22, 1 << 23)


class Limited:
    """A step in which at most so many entries are stacked."""

    def __init__(self, step: Ours, limit: int) -> None:
        self.step = step
        self.limit = limit

    def prepare(self, number: int, rows: list[Row]) -> None:
        self.step.prepare(number, rows)

    def __call__(self, number: int, rows: list[Row]) -> None:
        passes.STACKED_ENTRIES_ABOVE_TRUNK = self.limit
        self.step(number, rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    workload = minilm("upper", 64, 16)
    step = Ours(workload, 64)
    limited = {f"{limit}": Limited(step, limit) for limit in LIMITS}
    times = alternate(limited, Batches(workload), options.rounds)
    for limit, found in times.items():
        faster = median(ratios(times, "0", limit))
        print(f"entries at once {limit:>8}   {median(found):.2f} s a step   {faster:.2f} × as fast as none")


if __name__ == "__main__":
    main()
