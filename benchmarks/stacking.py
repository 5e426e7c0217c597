"""What stacking points buys on the demo's step (K = 512): seconds a step against how many go through at once.

    python benchmarks/stacking.py [--rounds R]

Needs `make demo` to have run once, for its data. Limits alternate; 0 stacks none.
"""

from __future__ import annotations

import argparse
from statistics import median

from peft_dpzero.estimation import losses as passes

from demo import CLIPPING_AT_512, Demo, Watch

LIMITS = (0, 1 << 19, 1 << 20, 1 << 21, 1 << 22, 1 << 23)
STEPS = 6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    demo = Demo()
    seconds: dict[int, list[float]] = {limit: [] for limit in LIMITS}
    for _ in range(options.rounds):
        for limit in LIMITS:
            passes.STACKED_ENTRIES_ABOVE_TRUNK = limit
            watch = Watch()
            demo.run(STEPS, watch, noise_multiplier=1.0, num_directions=512, clipping_threshold=CLIPPING_AT_512)
            seconds[limit].append(watch.seconds_a_step)
    for limit, found in seconds.items():
        ratios = [plain / one for plain, one in zip(seconds[0], found, strict=True)]
        print(f"entries at once {limit:8d}   {median(found):.2f} s a step   {median(ratios):.2f} × as fast as none")


if __name__ == "__main__":
    main()
