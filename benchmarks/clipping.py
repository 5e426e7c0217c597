"""Adaptive and automatic clipping against fixed thresholds, of a head over frozen features at ε = 2.

    python benchmarks/clipping.py [--steps T] [--runs R]

Needs `make demo` to have run once, for its data. Prints held-out accuracy: the mean, and each run's.
"""

from __future__ import annotations

import argparse
from typing import Any

import numpy as np

from demo import CLIPPING_AT_512, Demo, Watch

TUNED = CLIPPING_AT_512
VARIANTS: list[tuple[str, dict[str, Any]]] = [
    ("fixed, tuned C", {"clipping_threshold": TUNED}),
    ("fixed, C / 10", {"clipping_threshold": TUNED / 10}),
    ("fixed, 10 C", {"clipping_threshold": TUNED * 10}),
    ("adaptive, from C", {"clipping": "adaptive", "clipping_threshold": TUNED}),
    ("adaptive, from C / 10", {"clipping": "adaptive", "clipping_threshold": TUNED / 10}),
    ("adaptive, from 10 C", {"clipping": "adaptive", "clipping_threshold": TUNED * 10}),
    ("automatic, to C", {"clipping": "automatic", "clipping_threshold": TUNED}),
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--runs", type=int, default=2)
    options = parser.parse_args()
    demo = Demo()
    for name, settings in VARIANTS:
        found = [
            demo.run(options.steps, Watch(), target_epsilon=2.0, num_directions=512, **settings)
            for _ in range(options.runs)
        ]
        print(f"{name:24s} {np.mean(found):.1%}   ({', '.join(f'{a:.1%}' for a in found)})", flush=True)


if __name__ == "__main__":
    main()
