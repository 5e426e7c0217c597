"""Our step against the bare forward passes, the reference's step and Opacus, on the CPU.

    python benchmarks/run.py [--quick] [--only NAME …] [--rounds N] [--threads N] [--output FILE]

Contenders alternate in one process on the same rows, ratios are taken round by round, and peaks are those of separate
processes. Sections that are run replace their part of the output; the others' stay. The plot lies beside it, and the
tables of docs/benchmarks.md are written anew with the default output.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import platform
import statistics
import time
import warnings
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

import peaks
import plot
import scaling
import tables
from floor import Floor, candidates
from headlines import headlines
from ours import Batches, Ours
from reference import Reference
from stacks import profiled, table
from timing import Contender, alternate, ratios, spread
from workloads import REVIEWS, ROOT, Workload, gemma, llama, minilm

SLOW = 3
PACKAGES = ("torch", "transformers", "peft", "opacus")


class Bench:
    """What the sections share: how often to repeat, and the choice of the floor."""

    def __init__(self, rounds: int, quick: bool, threads: int) -> None:
        self.rounds = 2 if quick else rounds
        self.quick = quick
        self.threads = threads

    def compare(
        self,
        workload: Workload,
        others: dict[str, Contender],
        num_directions: int = 1,
        rounds: int | None = None,
    ) -> dict[str, Any]:
        """Ours, the floor and `others` in alternation: their seconds and the ratios of each to ours.

        At most `rounds` rounds, for what is slow.
        """
        draw = Batches(workload)
        rounds = min(self.rounds, rounds or self.rounds)
        floors = self.best_floors(workload, num_directions)
        contenders: dict[str, Contender] = {"ours": Ours(workload, num_directions)}
        contenders |= {f"floor {floor.name}": floor for floor in floors}
        times = alternate(contenders | others, draw, rounds, first=10)
        floor = min((name for name in times if name.startswith("floor")), key=lambda n: statistics.median(times[n]))
        found: dict[str, Any] = {
            "num_directions": num_directions,
            "batch_size": workload.batch_size,
            "micro_batch_size": workload.micro_batch_size,
            "tokens": [sum(len(r["input_ids"]) for r in draw(10 + 1 + n)) for n in range(rounds)],
            "floor_layout": floor.removeprefix("floor "),
            "seconds": {name: spread(values) for name, values in times.items()},
            "ours_over_floor": spread(ratios(times, "ours", floor)),
        }
        for name in others:
            found[f"{name}_over_ours"] = spread(ratios(times, name, "ours"))
        report(workload.title, found)
        return found

    def best_floors(self, workload: Workload, num_directions: int) -> list[Floor]:
        """The two fastest layouts over one direction's passes; both then take part in the rounds."""
        draw = Batches(workload)
        tried = {floor.name: floor for floor in candidates(workload, passes=2)}
        times = alternate(tried, draw, rounds=1, first=1, warm_up=0)
        best = sorted(tried, key=lambda name: statistics.median(times[name]))[:2]
        return [Floor(workload, tried[n].layout_name, tried[n].doubled, 2 * num_directions) for n in best]


def minilm_lora(bench: Bench) -> dict[str, Any]:
    """MiniLM with LoRA: also against Opacus, and at K = 16."""
    from opacus_step import Opacus

    workload = minilm("lora", batch_size=256, micro_batch_size=64)
    opacus = {f"opacus {mode}": Opacus(minilm("lora", 256, 64), mode) for mode in ("hooks", "ghost")}
    found = {"k1": bench.compare(workload, {"reference": Reference(workload), **opacus})}
    if not bench.quick:
        smaller = minilm("lora", batch_size=16, micro_batch_size=16)
        found["k16"] = bench.compare(smaller, {}, 16, SLOW)
    return found


def minilm_full(bench: Bench) -> dict[str, Any]:
    workload = minilm("full", batch_size=256, micro_batch_size=64)
    return {"k1": bench.compare(workload, {"reference": Reference(workload)})}


def gemma_lora(bench: Bench) -> dict[str, Any]:
    """Gemma with LoRA: also at K = 16."""
    workload = gemma("lora")
    others = {"reference": Reference(workload), "reference one row": Reference(workload, candidates=False)}
    found = {"k1": bench.compare(workload, others, rounds=SLOW)}
    if not bench.quick:
        found["k16"] = bench.compare(workload, {}, 16, SLOW)
    return found


def gemma_full(bench: Bench) -> dict[str, Any]:
    workload = gemma("full")
    return {"k1": bench.compare(workload, {"reference": Reference(workload)}, rounds=SLOW)}


def llama_lora(bench: Bench) -> dict[str, Any]:
    workload = llama("lora")
    return {"k1": bench.compare(workload, {"reference": Reference(workload)}, rounds=SLOW)}


def memory(bench: Bench) -> dict[str, Any]:
    """Peaks of separate processes."""
    repeats = 1 if bench.quick else 3
    found: dict[str, Any] = {}
    for name in peaks.CONTENDERS:
        measured = [peaks.in_process(name, "minilm", bench.threads) for _ in range(repeats)]
        found[f"minilm {name}"] = [round(m["extra_mib"], 1) for m in measured]
        print(f"  minilm {name:15} {found[f'minilm {name}']} MiB above the loaded weights", flush=True)
    for name in ("evaluate", "ours", "reference"):
        found[f"gemma {name}"] = [round(peaks.in_process(name, "gemma", bench.threads)["extra_mib"], 1)]
        print(f"  gemma {name:16} {found[f'gemma {name}']} MiB above the loaded weights", flush=True)
    for section in ("evaluate", "train"):
        measured = [peaks.llama_in_process(section) for _ in range(repeats)]
        found[f"llama {section} peak"] = [round(m["peak_mib"], 1) for m in measured]
        print(f"  llama {section:16} {found[f'llama {section} peak']} MiB in all", flush=True)
    return found


def scales(bench: Bench) -> dict[str, Any]:
    """Growth with tokens, K and vocabulary."""
    found = scaling.fits(bench.rounds)
    for name in ("tokens", "directions"):
        print(f"  {name}: {found[name]['slope']:.3g} s each, R² = {found[name]['r_squared']:.4f}")
    found["vocabulary"] = scaling.vocabulary(bench.rounds)
    print(f"  vocabulary: {found['vocabulary']['seconds_ratio']}")
    return found


def profiles(bench: Bench) -> dict[str, Any]:
    """Where a step's time goes."""
    found: dict[str, Any] = {}
    numbers = range(1, 2 if bench.quick else 6)
    for mode, num_directions in (("upper", 64), ("lora", 1), ("full", 1)):
        workload = minilm(mode, 64, 16)
        step, draw = Ours(workload, num_directions), Batches(workload)
        step(0, draw(0))
        profile = profiled(lambda step=step, draw=draw: [step(number, draw(number)) for number in numbers])
        print(f"\nminilm {mode}\n{table(profile['shares'])}\n", flush=True)
        found[f"minilm {mode}"] = profile
    return found


SECTIONS: dict[str, Callable[[Bench], dict[str, Any]]] = {
    "minilm_lora": minilm_lora,
    "minilm_full": minilm_full,
    "gemma_lora": gemma_lora,
    "gemma_full": gemma_full,
    "llama_lora": llama_lora,
    "memory": memory,
    "scaling": scales,
    "profile": profiles,
}


def report(title: str, found: dict[str, Any]) -> None:
    layout = found["floor_layout"]
    print(
        f"  {title}, K = {found['num_directions']}: ours {found['seconds']['ours']['median']:.3g} s (floor: {layout})"
    )
    for name, value in found.items():
        if name.endswith(("_over_floor", "_over_ours")):
            print(f"    {name:28} {value['median']:6.2f}  ({value['min']:.2f} to {value['max']:.2f})")


def machine(threads: int) -> dict[str, Any]:
    """Public facts of the machine."""
    return {
        "cores": os.cpu_count(),
        "threads": threads,
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "python": platform.python_version(),
        **{name: version(name) for name in PACKAGES},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="two rounds, fewer processes: to see that it runs")
    parser.add_argument("--only", nargs="+", choices=list(SECTIONS), default=list(SECTIONS), metavar="NAME")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--output", type=Path, default=ROOT / "docs" / "benchmarks" / "cpu.json")
    options = parser.parse_args()
    if not REVIEWS.exists():
        parser.error(f"{REVIEWS.relative_to(ROOT)} is missing: make bench fetches it.")
    warnings.filterwarnings("ignore", category=FutureWarning)
    torch.set_num_threads(options.threads)

    results = json.loads(options.output.read_text()) if options.output.exists() else {}
    sections = results.get("sections", {})
    bench = Bench(options.rounds, options.quick, options.threads)
    for name in options.only:
        print(name, flush=True)
        start = time.perf_counter()
        found = SECTIONS[name](bench)
        sections[name] = found | {"rounds": bench.rounds, "machine": machine(options.threads)}
        print(f"  took {time.perf_counter() - start:.0f} s", flush=True)
        gc.collect()
        options.output.parent.mkdir(parents=True, exist_ok=True)
        results = headlines(sections) | {"sections": sections}
        options.output.write_text(json.dumps(results, indent=1, ensure_ascii=False) + "\n")
    plot.draw(results, options.output.with_suffix(".svg"))
    page = ROOT / "docs" / "benchmarks.md"
    if options.output.resolve().parent == page.with_suffix("").resolve():
        tables.write(results, page)
    print()
    for name, value in results.items():
        if name != "sections":
            print(f"{name:28} {value['median']:6.2f}  ({value['min']:.2f} to {value['max']:.2f})")


if __name__ == "__main__":
    main()
