"""The same comparison on a GPU: random weights in the shapes of OPT-1.3B, 6.7B and 13B, bfloat16.

    python benchmarks/gpu.py [--shape 1.3b 6.7b 13b] [--rounds 5] [--output docs/benchmarks/DEVICE.json]
    python benchmarks/gpu.py --shape tiny --device cpu --dtype float32      # to see that it runs

Each shape is measured with LoRA and full-parameter: a step's time over the floor's, its peak memory over inference's,
and both against the reference's step and (LoRA, where it fits) Opacus's DP-SGD. A contender that runs out of memory
is recorded as such. The output is written after each shape.
"""

from __future__ import annotations

import argparse
import gc
import json
import re
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from transformers import OPTConfig, OPTForCausalLM

from floor import Floor
from ours import Batches, Ours, no_grad_evaluation
from reference import Reference
from timing import Contender, alternate, ratios, spread
from workloads import ROOT, Row, Workload, causal_lm

# hidden size, layers, heads (OPT, arXiv 2205.01068, table 1); the feed-forward layers are four times as wide.
SHAPES = {
    "tiny": (64, 2, 4),
    "125m": (768, 12, 12),
    "1.3b": (2048, 24, 32),
    "6.7b": (4096, 32, 32),
    "13b": (5120, 40, 40),
}
LAYOUTS = (("equal", False), ("sorted", False), ("sorted", True), ("packed 512", False))
GIB = 1 << 30


def build(shape: str, mode: str, options: argparse.Namespace) -> Workload:
    """A random OPT of `shape` on the device, never in float32 at once."""
    hidden, layers, heads = SHAPES[shape]
    sizes = {"hidden_size": hidden, "num_hidden_layers": layers, "num_attention_heads": heads}
    config = OPTConfig(
        **sizes, ffn_dim=4 * hidden, word_embed_proj_dim=hidden, vocab_size=options.vocab_size, dropout=0.0
    )
    default = torch.get_default_dtype()
    torch.set_default_dtype(getattr(torch, options.dtype))
    try:
        with torch.device(options.device):
            base = OPTForCausalLM(config)
    finally:
        torch.set_default_dtype(default)
    lengths = (options.length // 8, options.length)
    return causal_lm("opt", base, mode, options.batch, options.micro_batch, lengths, count=512)


def compare(workload: Workload, options: argparse.Namespace) -> dict[str, Any]:
    """Times in alternation, then peaks one after another."""
    draw = Batches(workload)
    k = options.num_directions
    contenders: dict[str, Contender] = {"ours": Ours(workload, k)}
    contenders |= {f.name: f for f in (Floor(workload, name, twice, 2 * k) for name, twice in LAYOUTS)}
    contenders["reference"] = Reference(workload)
    failed = {name: reason for name, run in contenders.items() if (reason := _failure(run, draw))}
    running = {name: run for name, run in contenders.items() if name not in failed}
    times = alternate(running, draw, options.rounds, first=10)
    floors = [name for name in times if name.startswith(("equal", "sorted", "packed"))]
    floor = min(floors, key=lambda name: sorted(times[name])[len(times[name]) // 2])
    found: dict[str, Any] = {
        "num_directions": k,
        "tokens": [sum(len(row["input_ids"]) for row in draw(11 + n)) for n in range(options.rounds)],
        "floor_layout": floor,
        "seconds": {name: spread(values) for name, values in times.items()},
        "failed": failed,
        "step_over_floor": spread(ratios(times, "ours", floor)) if "ours" in times else None,
    }
    if "reference" in times and "ours" in times:
        found["reference_over_ours"] = spread(ratios(times, "reference", "ours"))
    evaluate: Contender = lambda number, rows: no_grad_evaluation(workload, rows)  # noqa: E731
    kept = {name: run for name, run in running.items() if name in ("ours", "reference")}
    found["peak_gib"] = {name: peak_gib(run, draw(11)) for name, run in (kept | {"inference": evaluate}).items()}
    if found["peak_gib"].get("ours") and found["peak_gib"]["inference"]:
        found["memory_over_inference"] = round(found["peak_gib"]["ours"] / found["peak_gib"]["inference"], 4)
    return found


def against_opacus(shape: str, options: argparse.Namespace, ours: dict[str, Any]) -> dict[str, Any]:
    """Opacus on a model of its own, after ours has left the device: seconds, ratio of medians, peak."""
    from opacus_step import Opacus

    found: dict[str, Any] = {}
    for mode in ("hooks", "ghost"):
        _empty()
        try:
            workload = build(shape, "lora", options)
            draw = Batches(workload)
            step = Opacus(workload, mode)
            times = alternate({mode: step}, draw, options.rounds, first=10)
            found[mode] = {"seconds": spread(times[mode]), "peak_gib": peak_gib(step, draw(11))}
            if ours["seconds"].get("ours"):
                ratio = found[mode]["seconds"]["median"] / ours["seconds"]["ours"]["median"]
                found[mode]["over_ours"] = round(ratio, 3)
        except Exception as error:
            found[mode] = {"failed": _short(error)}
        workload = step = None  # type: ignore[assignment]
    return found


def peak_gib(run: Callable[[int, list[Row]], None], rows: list[Row]) -> float | None:
    """Largest memory that tensors took on the GPU over one step, weights included."""
    if not torch.cuda.is_available():
        return None
    _empty()
    torch.cuda.reset_peak_memory_stats()
    if hasattr(run, "prepare"):
        run.prepare(11, rows)
    run(11, rows)
    torch.cuda.synchronize()
    return round(torch.cuda.max_memory_allocated() / GIB, 3)


def _failure(run: Contender, draw: Batches) -> str | None:
    """Why a contender cannot run here, or None; its first step is its warm-up."""
    try:
        rows = draw(0)
        if hasattr(run, "prepare"):
            run.prepare(0, rows)
        run(0, rows)
    except Exception as error:
        return _short(error)
    return None


def _short(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).splitlines()[0][:120] if str(error) else ''}"


def _empty() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def device_name(device: str) -> str:
    return torch.cuda.get_device_name(0) if device.startswith("cuda") else "CPU"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", nargs="+", choices=list(SHAPES), default=["1.3b", "6.7b", "13b"])
    parser.add_argument("--mode", nargs="+", choices=["lora", "full"], default=["lora", "full"])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"])
    parser.add_argument("--batch", type=int, default=16, help="expected logical batch")
    parser.add_argument("--micro-batch", type=int, default=8)
    parser.add_argument("--length", type=int, default=512, help="longest row; the shortest is an eighth of it")
    parser.add_argument("--vocab-size", type=int, default=50_272)
    parser.add_argument("--num-directions", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--no-opacus", action="store_true")
    parser.add_argument("--output", type=Path, help="default: docs/benchmarks/<device>.json")
    options = parser.parse_args()
    name = device_name(options.device)
    slug = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
    output = options.output or ROOT / "docs" / "benchmarks" / f"{slug}.json"

    settings = {key: getattr(options, key) for key in ("dtype", "batch", "micro_batch", "length", "vocab_size")}
    versions = {package: version(package) for package in ("torch", "transformers", "peft", "opacus")}
    results: dict[str, Any] = {"device": name, "settings": settings, "versions": versions, "runs": {}}
    for shape in options.shape:
        for mode in options.mode:
            _empty()
            run = results["runs"][f"{shape} {mode}"] = compare(build(shape, mode, options), options)
            if mode == "lora" and not options.no_opacus:
                run["opacus"] = against_opacus(shape, options, run)
            print(f"{shape} {mode}: {json.dumps(run, indent=1)}", flush=True)
            output.parent.mkdir(parents=True, exist_ok=True)
            output.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
