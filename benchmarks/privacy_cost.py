"""The share of the demo's step that privacy costs: integer clipping, exact noise and the journal's entry.

    python benchmarks/privacy_cost.py [--steps T]

Needs `make demo` to have run once, for its data. All times are of one run.
"""

from __future__ import annotations

import argparse
import time
from collections import defaultdict
from collections.abc import Callable
from typing import Any

from peft_dpzero.mechanism.contribution import Contributions
from peft_dpzero.mechanism.noise import ExactNoise
from peft_dpzero.release.journal import Journal
from peft_dpzero.step import PrivateStep

from demo import CLIPPING_AT_512, Demo, Watch

PARTS: dict[str, tuple[type, str]] = {
    "integer clipping": (Contributions, "rows"),
    "exact noise": (ExactNoise, "sample"),
    "journal": (Journal, "record"),
    "step": (PrivateStep, "__call__"),
}


def timed(function: Callable[..., Any], part: str, seconds: dict[str, float]) -> Callable[..., Any]:
    """`function`, whose time is added to `seconds[part]`."""

    def call(*args: Any, **kwargs: Any) -> Any:
        start = time.perf_counter()
        try:
            return function(*args, **kwargs)
        finally:
            seconds[part] += time.perf_counter() - start

    return call


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=10)
    options = parser.parse_args()
    demo = Demo()
    seconds: dict[str, float] = defaultdict(float)
    for part, (owner, name) in PARTS.items():
        setattr(owner, name, timed(getattr(owner, name), part, seconds))
    demo.run(options.steps, Watch(), noise_multiplier=1.0, num_directions=512, clipping_threshold=CLIPPING_AT_512)
    whole = seconds.pop("step")
    for part, spent in seconds.items():
        print(f"{part:18s} {spent / whole:6.2%} of a step")
    print(f"{'together':18s} {sum(seconds.values()) / whole:6.2%}")


if __name__ == "__main__":
    main()
