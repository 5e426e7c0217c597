"""A GPU: first checks of what it computes, then the same comparison as on a CPU, on random OPT-1.3B, 6.7B and 13B.

    python benchmarks/gpu.py [--only bits 1.3b …] [--seconds 500] [--output FILE.json]
    python benchmarks/gpu.py --only bits tiny opacus --device cpu --length 64 --vocab-size 500    # to see that it runs

`bits`, `contributions` and `strangers` are the checks of `device_checks.py`: what the device makes has the CPU's bits,
and rows are strangers to each other.

Each shape is measured in bfloat16 with LoRA and full-parameter: a step's time over the floor's, its peak memory over
inference's, and both against the reference's step. `opacus` is ghost clipping, and `compiled` torch.compile, both on
the first shape's LoRA. The output is written after each part, and other parts' results stay in it. A part that fails or
takes longer than its share is recorded as such, and one for which no time is left is not begun.
"""

from __future__ import annotations

import argparse
import gc
import json
import re
import signal
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import send_to_device
from peft_dpzero.estimation.losses import Losses, Shortcuts
from transformers import OPTConfig, OPTForCausalLM

import device_checks
from floor import Floor
from ours import Batches, Ours, no_grad_evaluation
from reference import Reference
from timing import Contender, ratios, seconds, spread
from workloads import ROOT, Workload, causal_lm

# hidden size, layers, heads (OPT, arXiv 2205.01068, table 1); the feed-forward layers are four times as wide.
SHAPES = {
    "tiny": (64, 2, 4),
    "125m": (768, 12, 12),
    "1.3b": (2048, 24, 32),
    "6.7b": (4096, 32, 32),
    "13b": (5120, 40, 40),
}
# What is measured of each shape: LoRA's K, full-parameter's K.
DIRECTIONS = {"1.3b": ((1, 16, 64), (1,)), "6.7b": ((1, 16), (1,)), "13b": ((1, 16), (1,)), "tiny": ((1, 4), (1,))}
FLOORS = ("equal", "sorted", "packed 512")
CHECKS = {
    "bits": device_checks.bits,
    "contributions": device_checks.contributions,
    "strangers": device_checks.strangers_everywhere,
}
# What comes first matters most.
PARTS = ["bits", "1.3b", "contributions", "6.7b", "opacus", "13b", "strangers", "compiled"]
# Seconds that one part may take at most.
LIMITS = {"bits": 60, "1.3b": 125, "contributions": 40, "6.7b": 110, "opacus": 40, "strangers": 60, "compiled": 60}
GIB = 1 << 30


class Overtime(BaseException):
    """A part took longer than its share: no `Exception`, which a step would withhold."""


@contextmanager
def at_most(limit: float) -> Iterator[None]:
    """Raises `Overtime` in the block after `limit` seconds."""

    def stop(*_: object) -> None:
        raise Overtime(f"stopped after {limit:.0f} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, limit)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


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


# ---- Parts: each adds to `found` as it goes ----


def measured(shape: str, found: dict[str, Any], options: argparse.Namespace) -> None:
    """One shape, LoRA and full-parameter, each K."""
    for mode, directions in zip(("lora", "full"), DIRECTIONS.get(shape, ((1,), (1,))), strict=True):
        run = found[mode] = {}
        workload = build(shape, mode, options)
        run["weights_gib"] = _gib("memory_allocated")
        draw = Batches(workload)
        evaluate: Contender = lambda number, rows, workload=workload: no_grad_evaluation(workload, rows)  # noqa: E731
        run["inference"] = timed({"inference": evaluate}, draw, 2)["inference"]
        del run["inference"]["times"]
        if mode == "lora":
            run["strangers"] = device_checks.strangers(workload.model, rows=(2, 8), lengths=(64, 200))
        first: Ours | None = None
        for k in directions:
            run[f"K={k}"], first = compare(workload, k, options, run, first)
            print(f"{shape} {mode} K={k}: {json.dumps(run[f'K={k}'])}", flush=True)
        del workload, draw, evaluate, first
        _empty()


def compare(
    workload: Workload, k: int, options: argparse.Namespace, known: dict[str, Any], first: Ours | None
) -> tuple[dict[str, Any], Ours]:
    """Our step with K directions against the others', in alternation.

    Args:
        known: about the workload, what `measured` has found so far.
        first: the step with K = 1, whose passes are taken; the reference, and floors that were slower, are left out.

    Returns: what was found, and our step.
    """
    begun = time.perf_counter()
    ours = Ours(workload, k, like=first)
    contenders: dict[str, Contender] = {"ours": ours}
    # Directions repeat the floor's passes: it is timed with one.
    singly = (False, True) if workload.mode == "lora" else (False,)
    floors = {one.name: one for one in (Floor(workload, name, twice, 2) for name in FLOORS for twice in singly)}
    found: dict[str, Any] = {}
    if first is None:
        found["start_up_seconds"] = round(time.perf_counter() - begun, 1)
        found["one_row_at_a_time"] = ours.reason
        drawn = ours.step.batches.draw(10).micro_batches
        found["passes"], found["tokens"] = len(drawn), sum(batch["input_ids"].numel() for batch in drawn)
        found["tokens_of_the_data"] = sum(len(row["input_ids"]) for row in Batches(workload)(10))
        found["rows_together"] = {str(length): str(list(counts)) for length, counts in ours.shapes.together.items()}
        found["shortcuts"] = [name for name, value in vars(ours.shortcuts).items() if value and name != "positions"]
        contenders["reference"] = Reference(workload)
        if workload.mode == "full":
            contenders["ours, θ copied whole"] = Ours(workload, k, streams=False, like=ours)
    else:
        floors = {name: floors[name] for name in floors if name == known["K=1"]["floor_layout"]}
    runs = timed(contenders | floors, Batches(workload), options.rounds, warm_up=first is None)
    times = {name: run.pop("times") for name, run in runs.items() if "times" in run}
    layout = min((name for name in floors if name in times), key=lambda name: spread(times[name])["median"])
    found |= {"floor_layout": layout, "runs": runs}
    for name in times.keys() - floors.keys():
        runs[name]["over_floor"] = spread([ratio / k for ratio in ratios(times, name, layout)])
        if name.startswith("ours"):  # Our master copies lie beside the reference's step.
            runs[name]["memory_over_inference"] = round(runs[name]["peak_gib"] / known["inference"]["peak_gib"], 4)
    if {"ours", "reference"} <= times.keys():
        found["reference_over_ours"] = spread(ratios(times, "reference", "ours"))
    return found, ours


def timed(
    contenders: dict[str, Contender], draw: Batches, rounds: int, warm_up: bool = True
) -> dict[str, dict[str, Any]]:
    """Seconds in alternation, and peaks: the order turns each round, and rounds take two batches in turn.

    Each contender warms up on both, so that no kernel is loaded or chosen while it is timed; one that fails takes no
    part. There are fewer rounds, two at least, of steps that take long. Without warm-up there are two.
    """
    found: dict[str, dict[str, Any]] = {}
    running: dict[str, Contender] = {}
    batches = [(number, draw(number)) for number in (10, 11)]
    begun = time.perf_counter()
    for name, run in contenders.items():
        try:
            for batch in batches if warm_up else ():
                seconds(run, *batch)
            running[name], found[name] = run, {"times": [], "peak_gib": _gib("memory_allocated")}
        except Exception as error:
            found[name] = {"failed": _short(error)}
    rounds = max(2, min(rounds, int(40 / (time.perf_counter() - begun)))) if warm_up else 2
    names = list(running)
    for number in range(rounds):
        for name in names[number % len(names) :] + names[: number % len(names)]:
            _reset_peak()
            found[name]["times"].append(seconds(running[name], *batches[number % 2]))
            found[name]["peak_gib"] = max(found[name]["peak_gib"], _gib("max_memory_allocated"))
    for name in names:
        found[name]["seconds"] = spread(found[name]["times"])
    return found


def opacus(shape: str, found: dict[str, Any], options: argparse.Namespace) -> None:
    """Ghost clipping on LoRA, against our step with K = 1 on the same rows, each with a model of its own."""
    from opacus_step import Opacus

    theirs = Opacus(build(shape, "lora", options), "ghost")
    workload = build(shape, "lora", options)
    runs = timed({"ours": Ours(workload, 1), "opacus ghost": theirs}, Batches(workload), options.rounds)
    times = {name: run.pop("times") for name, run in runs.items() if "times" in run}
    found["runs"] = runs
    if len(times) == 2:
        found["opacus_over_ours"] = spread(ratios(times, "opacus ghost", "ours"))
        # The other's weights lie beside each.
        weights = sum(p.numel() * p.element_size() for p in workload.model.parameters()) / GIB
        above = {name: run["peak_gib"] - 2 * weights for name, run in runs.items()}
        found["gib_above_weights"] = {name: round(value, 3) for name, value in above.items()}


def compiled(shape: str, found: dict[str, Any], options: argparse.Namespace) -> None:
    """Passes of a compiled model, with CUDA graphs and without, against those that the probe chooses, K = 1."""
    from peft_dpzero.perturbation.perturbation import Perturbation

    from engines import Passes

    workload = build(shape, "lora", options)
    perturbation = Perturbation(workload.model)
    ours = Ours(workload, 1)
    place = partial(send_to_device, device=options.device)
    head = Shortcuts(label_logits=ours.shortcuts.label_logits)
    contenders: dict[str, Contender] = {
        "chosen": Passes(workload, Losses(workload.model, workload.task, place, ours.shortcuts), perturbation),
        "plain": Passes(workload, Losses(workload.model, workload.task, place), perturbation),
    }
    for name, settings in (("compiled", {"dynamic": True}), ("compiled, CUDA graphs", {"mode": "reduce-overhead"})):
        begun = time.perf_counter()
        model = torch.compile(workload.model, **settings)  # type: ignore[call-overload]
        contenders[name] = Passes(workload, Losses(model, workload.task, place, head), perturbation)
        try:
            with at_most(options.compile_seconds):
                contenders[name](0, [])
                contenders[name](1, [])
            found[name] = {"first_steps_seconds": round(time.perf_counter() - begun, 1)}
        except (Exception, Overtime) as error:
            found[name] = {"failed": _short(error)}
            del contenders[name]
    runs = timed(contenders, Batches(workload), options.rounds)
    times = {name: run.pop("times") for name, run in runs.items() if "times" in run}
    for name, run in runs.items():
        found.setdefault(name, {}).update(run)
        if name in times and "chosen" in times:
            found[name]["over_chosen"] = spread(ratios(times, name, "chosen"))


# ---- The whole ----


def _short(error: BaseException) -> str:
    return f"{type(error).__name__}: {str(error).splitlines()[0][:160] if str(error) else ''}"


def _gib(what: str) -> float:
    """`memory_allocated` or `max_memory_allocated` of the GPU; NaN without one."""
    return round(getattr(torch.cuda, what)() / GIB, 3) if torch.cuda.is_available() else float("nan")


def _reset_peak() -> None:
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()


def _empty() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def device_facts(device: str) -> dict[str, Any]:
    versions = {package: version(package) for package in ("torch", "transformers", "peft", "opacus")}
    if not device.startswith("cuda"):
        return {"device": "CPU", "versions": versions}
    facts = torch.cuda.get_device_properties(0)
    versions["CUDA"] = str(torch.version.cuda)
    return {"device": facts.name, "memory_gib": round(facts.total_memory / GIB, 1), "versions": versions}


def run_part(part: str, options: argparse.Namespace) -> dict[str, Any]:
    """What a part found, whether it came to its end or not."""
    found: dict[str, Any] = {}
    device = torch.device(options.device)
    made = {"opacus": opacus, "compiled": compiled}
    begun = time.perf_counter()
    try:
        with at_most(options.left), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            if part in CHECKS:
                CHECKS[part](found, device)
            elif part in made:
                made[part](options.small, found, options)
            else:
                measured(part, found, options)
    except (Exception, Overtime) as error:
        found["failed"] = _short(error)
    _empty()
    found["part_seconds"] = round(time.perf_counter() - begun, 1)
    return found


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=[*PARTS, *SHAPES], default=PARTS)
    parser.add_argument("--seconds", type=float, default=3600, help="for all parts together")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"])
    parser.add_argument("--batch", type=int, default=32, help="expected logical batch")
    parser.add_argument("--micro-batch", type=int, default=8)
    parser.add_argument("--length", type=int, default=256, help="longest row; the shortest is an eighth of it")
    parser.add_argument("--vocab-size", type=int, default=50_272)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--compile-seconds", type=float, default=90, help="for each way of compiling")
    parser.add_argument("--output", type=Path, help="default: docs/benchmarks/<device>.json")
    options = parser.parse_args(arguments)
    results = device_facts(options.device)
    slug = re.sub(r"[^a-z0-9]+", "-", results["device"].lower()).strip("-")
    output = options.output or ROOT / "docs" / "benchmarks" / f"{slug}.json"
    results["settings"] = {key: getattr(options, key) for key in ("dtype", "batch", "micro_batch", "length", "rounds")}
    options.small = next((part for part in options.only if part in SHAPES), "1.3b")
    if output.exists():
        results = json.loads(output.read_text()) | results
    end = time.perf_counter() + options.seconds
    for part in options.only:
        options.left = min(end - time.perf_counter(), LIMITS.get(part, options.seconds))
        results[part] = run_part(part, options) if options.left > 1 else {"failed": "no time was left"}
        print(f"{part}: {json.dumps(results[part])[:3000]}", flush=True)
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
