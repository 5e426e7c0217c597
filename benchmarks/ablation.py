"""What each shortcut buys: a step with it switched off over the step that a run takes.

    python benchmarks/ablation.py [--rounds N] [--only NAME …] [--threads N]

Both alternate in one process on the same rows; the JSON has the median, smallest and largest ratio. A shortcut that the
probe does not choose for a model has no entry. Writes docs/benchmarks/ablation.json and a table in docs/benchmarks.md.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import json
import os
from collections.abc import Callable
from typing import Any

import torch
from peft_dpzero.estimation.losses import Shortcuts

from ours import Batches, Ours
from tables import insert, table
from timing import alternate, ratios, spread
from workloads import ROOT, Workload, gemma, llama, minilm

OUTPUT = ROOT / "docs" / "benchmarks" / "ablation.json"
# `positions` bounds one of them.
NAMES = [field.name for field in dataclasses.fields(Shortcuts) if field.name != "positions"]
# (title, workload, K)
CASES: dict[str, tuple[str, Callable[[], Workload], int]] = {
    "minilm": ("MiniLM, LoRA, B = 256, K = 1", lambda: minilm("lora", 256, 64), 1),
    "minilm_k16": ("MiniLM, LoRA, B = 16, K = 16", lambda: minilm("lora", 16, 16), 16),
    "minilm_upper_k1": ("MiniLM, LoRA in the upper third, B = 256, K = 1", lambda: minilm("upper", 256, 64), 1),
    "minilm_upper": ("MiniLM, LoRA in the upper third, B = 16, K = 16", lambda: minilm("upper", 16, 16), 16),
    "gemma": ("Gemma, LoRA, B = 16, K = 1", lambda: gemma("lora"), 1),
    "llama": ("Llama, LoRA, B = 4, K = 1", lambda: llama("lora"), 1),
}


def ablated(workload: Workload, num_directions: int, rounds: int) -> dict[str, dict[str, float]]:
    """The ratio for each shortcut that the run takes."""
    whole = Ours(workload, num_directions)
    taken = [name for name in NAMES if getattr(whole.shortcuts, name)]
    lacking = {name: Ours(workload, num_directions, without=name) for name in taken}
    times = alternate({"all": whole, **lacking}, Batches(workload), rounds, first=10)
    return {name: spread(ratios(times, name, "all"), digits=3) for name in taken}


def written(results: dict[str, Any]) -> str:
    """The table, a row for each case."""
    rows = []
    for name, (title, _, _) in CASES.items():
        if name in results:
            cells = [results[name]["ratios"].get(shortcut) for shortcut in NAMES]
            rows.append([title, *("–" if c is None else f"{c['median']:.2f}" for c in cells)])
    return table(["step's time without it, over with it", *(f"`{name}`" for name in NAMES)], rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", nargs="+", choices=list(CASES), default=list(CASES), metavar="NAME")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    results = json.loads(OUTPUT.read_text()) if OUTPUT.exists() else {}
    for name in options.only:
        title, make, num_directions = CASES[name]
        found = ablated(make(), num_directions, options.rounds)
        results[name] = {"ratios": found, "rounds": options.rounds, "threads": options.threads}
        print(title, {key: value["median"] for key, value in found.items()}, flush=True)
        OUTPUT.write_text(json.dumps(results, indent=1) + "\n")
        gc.collect()
    insert(ROOT / "docs" / "benchmarks.md", "ablation", written(results))


if __name__ == "__main__":
    main()
