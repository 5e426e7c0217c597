"""What a step costs over W workers: the tables of docs/scaling.md.

    python benchmarks/workers.py [--measure] [--quick] [--output FILE.json]

Prints the tables from the constants in the output, and writes them to the page with the default output. `--measure`
first fits the constants to what steps of one worker take of a core, then times 1, 2 and 4 workers on this machine,
and sets them against the model: some minutes, on an idle machine. `--quick`: sizes for seconds and one worker, to see
that it runs.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft_dpzero import Estimate
from scipy.optimize import nnls
from transformers import OPTConfig, OPTForCausalLM

import cost_model
import one_worker
import tables
from cost_model import Network, Worker
from gpu import SHAPES
from ours import Ours
from timing import spread
from workloads import ROOT, causal_lm

MODES = {"upper": "LoRA in the upper third", "full": "all parameters"}
# Rows, directions, repeats and workers that are measured.
MEASURED = {"rows": (32, 64, 128), "directions": (1, 2, 4), "repeats": 4, "workers": (1, 2, 4), "steps": 8}
QUICK = {"rows": (4, 8), "directions": (1, 2), "repeats": 1, "workers": (1,), "steps": 1}
# What the tables are of: B and K by mode, and W.
SIZES = {"upper": (1024, 64), "full": (1024, 4)}
WORKERS = (1, 8, 64, 1000)
# Assumed, not measured: two hosts of a data centre, 10 Gbit/s.
NETWORK = Network(latency=50e-6, bandwidth=1.25e9)
TOGETHER = 8
OUTPUT = ROOT / "docs" / "benchmarks" / "workers.json"
PAGE = ROOT / "docs" / "scaling.md"


# ---- Measuring ----


def constants(mode: str, sizes: dict[str, Any]) -> tuple[Worker, float]:
    """A core's seconds for one worker, by least squares over steps of several sizes; and the fit's R²."""
    steps: list[Ours] = []
    for batch_size in sizes["rows"]:
        made = one_worker.workload(mode, batch_size)
        first = Ours(made, sizes["directions"][0])
        steps += [first, *(Ours(made, directions, like=first) for directions in sizes["directions"][1:])]
    taken: list[tuple[int, int, float]] = []
    updates: list[float] = []
    # All sizes take turns, so that what else the machine does meets them alike. The first round warms up.
    for number in range(sizes["repeats"] + 1):
        for ours in steps:
            ours.prepare(number, [])
            directions = ours.step.config.num_directions
            spent = core_seconds(lambda ours=ours, number=number: ours(number, []))
            if number:
                taken.append((one_worker.rows_of(ours, number), directions, spent))
                updates.append(_update_seconds(ours) / directions)
    updating = statistics.median(updates)
    design = np.array([(1, k, rows, rows * k) for rows, k, _ in taken], dtype=float)
    times = np.array([spent for *_, spent in taken])
    (fixed, perturbing, row, row_direction), residual = nnls(design, times - updating * design[:, 1])
    explained = 1 - residual**2 / float(((times - times.mean()) ** 2).sum())
    return Worker(fixed, perturbing, updating, row, row_direction), explained


def _update_seconds(ours: Ours) -> float:
    """The optimizer's part of a step."""
    ours.prepare(0, [])
    estimate: Estimate = ours.step(0).estimate
    return core_seconds(lambda: ours.optimizer.step(estimate))


def core_seconds(work: Callable[[], Any]) -> float:
    """What `work` takes of a core, however many others want it."""
    start = time.process_time()
    work()
    return time.process_time() - start


def launched(workers: int, mode: str, batch_size: int, directions: int, steps: int) -> dict[str, Any]:
    """What `one_worker.py` finds when `workers` of it run on this machine."""
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "found.json"
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={workers}"]
        command += [str(Path(one_worker.__file__)), mode, *map(str, (batch_size, directions, steps, output))]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
        subprocess.run(command, env=environment, check=True, capture_output=True)
        return dict(json.loads(output.read_text()))


def checked(got: dict[str, Any], worker: Worker, directions: int, cores: int) -> dict[str, Any]:
    """Steps of some workers against the model: by the clock, and what the busiest worker takes of its core."""
    predicted = [cost_model.predicted_seconds(rows, directions, worker, cores) for rows in got["rows"]]
    busiest = [cost_model.predicted_seconds(rows, directions, worker, len(rows)) for rows in got["rows"]]
    return {
        "workers": got["workers"],
        "rows": statistics.fmean(sum(rows) for rows in got["rows"]),
        "directions": directions,
        "seconds": statistics.median(got["seconds"]),
        "predicted": statistics.median(predicted),
        "seconds_ratio": spread([a / b for a, b in zip(got["seconds"], predicted, strict=True)]),
        "core_ratio": spread([a / b for a, b in zip(got["core"], busiest, strict=True)]),
        "sums": got["sums"],
    }


def measure(sizes: dict[str, Any]) -> dict[str, Any]:
    """Constants of this machine, and how its steps with several workers agree with them."""
    torch.set_num_threads(1)
    cores = os.cpu_count() or 1
    found: dict[str, Any] = {"cores": cores, "torch": torch.__version__, "modes": {}}
    batch_size, directions, steps = sizes["rows"][-1], sizes["directions"][-1], sizes["steps"]
    for mode in MODES:
        worker, explained = constants(mode, sizes)
        entries = sum(p.numel() for p in one_worker.workload(mode, 1).model.parameters() if p.requires_grad)
        run: dict[str, Any] = {"constants": asdict(worker), "r_squared": explained, "trained": entries, "checked": []}
        for workers in sizes["workers"]:
            run_of = (mode, batch_size, directions, steps)
            got = one_worker.measured(*run_of) if workers == 1 else launched(workers, *run_of)
            run["checked"].append(checked(got, worker, directions, cores))
            print(mode, json.dumps(run["checked"][-1]), flush=True)
        found["modes"][mode] = run
    return found


# ---- Tables ----


def constants_table(found: dict[str, Any]) -> str:
    rows = []
    for mode, run in found["modes"].items():
        w = Worker(**run["constants"])
        values = (w.fixed, w.perturbing, w.updating, w.row_point)
        cells = [f"{1e3 * value:.3g}" for value in values]
        rows.append((MODES[mode], f"{run['trained']:,}", *cells, f"{w.trunk_share:.2f}", f"{run['r_squared']:.4f}"))
    return tables.table(("trained", "d", "f, ms", "v, ms", "u, ms", "p, ms", "t", "R²"), rows)


def checked_table(found: dict[str, Any]) -> str:
    rows = []
    for mode, run in found["modes"].items():
        for one in run["checked"]:
            title = f"{MODES[mode]}, K = {one['directions']}"
            seconds = (f"{one['predicted']:.3g}", f"{one['seconds']:.3g}")
            ratios = (tables.spread(one["seconds_ratio"]), tables.spread(one["core_ratio"]))
            rows.append((title, str(one["workers"]), *seconds, *ratios, f"{1e6 * one['sums']:.0f}"))
    header = ("step", "W", "predicted, s", "measured, s", "measured over predicted", "of a core", "sums, µs")
    return tables.table(header, rows)


def workers_table(found: dict[str, Any]) -> str:
    rows = []
    for mode, run in found["modes"].items():
        worker, (batch_size, directions) = Worker(**run["constants"]), SIZES[mode]
        sizes = (batch_size, directions)
        alone = cost_model.data_parallel(*sizes, 1, worker, NETWORK).seconds
        for workers in WORKERS:
            cells = [f"{MODES[mode]}, B = {batch_size:,}, K = {directions}", f"{workers:,}"]
            for model in (cost_model.data_parallel, cost_model.direction_parallel):
                cost = model(*sizes, workers, worker, NETWORK)
                cells += [f"{cost.seconds:.3g}", f"{alone / cost.seconds:.3g}", size(cost.received)]
            by_rows = cost_model.data_parallel(*sizes, workers, worker, NETWORK).seconds
            cells.insert(4, f"{worker.seconds(0, directions, directions) / by_rows:.0%}")
            rows.append(cells)
    header = ("step", "W", "by rows, s", "times faster", "f + K (v + u)", "received")
    header += ("by directions, s", "times faster", "received")
    return tables.table(header, rows)


def rows_table() -> str:
    rows = []
    batch_size = SIZES["upper"][0]
    for workers in WORKERS[1:]:
        mean = batch_size / workers
        most, padded = (cost_model.most_rows(batch_size, workers, together) for together in (1, TOGETHER))
        waits = [cost_model.collective_seconds(workers, NETWORK, tree) for tree in (False, True)]
        cells = [f"{workers:,}", f"{mean:.3g}", f"{most:.3g}", f"{most / mean:.2f}", f"{padded / mean:.2f}"]
        rows.append((*cells, *(f"{1e3 * wait:.3g}" for wait in waits)))
    header = ("W", "rows each", "the most", "over the mean", f"in passes of {TOGETHER}", "ring, ms", "trees, ms")
    return tables.table(header, rows)


def bytes_table() -> str:
    rows = []
    workers, directions = 64, SIZES["upper"][1]
    ours = cost_model.data_parallel(1, directions, workers, Worker(0, 0, 0, 0, 0), NETWORK).received
    for shape in ("1.3b", "13b"):
        for mode, title in (("lora", "LoRA"), ("full", "all parameters")):
            trained = trained_entries(shape, mode)
            gradient = cost_model.gradient_bytes(trained, workers)
            start = cost_model.ENTRY_BYTES * trained
            cells = (f"{trained:,}", size(start), size(ours), size(gradient))
            rows.append((f"OPT-{shape.upper()}, {title}", *cells))
    return tables.table(("model", "d", "start", f"ours, K = {directions}", "gradients"), rows)


def trained_entries(shape: str, mode: str) -> int:
    """d of an OPT, without its memory."""
    hidden, layers, heads = SHAPES[shape]
    sizes = {"hidden_size": hidden, "num_hidden_layers": layers, "num_attention_heads": heads}
    with torch.device("meta"):
        base = OPTForCausalLM(OPTConfig(**sizes, ffn_dim=4 * hidden, word_embed_proj_dim=hidden))
    model = causal_lm("opt", base, mode, count=1).model
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def size(count: float) -> str:
    """Bytes, in the unit that suits."""
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} GB"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--measure", action="store_true")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--output", type=Path, default=OUTPUT)
    options = parser.parse_args(arguments)
    if options.measure or options.quick:
        found = measure(QUICK if options.quick else MEASURED)
        options.output.write_text(json.dumps(found, indent=1) + "\n")
    found = json.loads(options.output.read_text())
    made = {
        "constants": constants_table(found),
        "checked": checked_table(found),
        "workers": workers_table(found),
        "rows": rows_table(),
        "bytes": bytes_table(),
    }
    for name, text in made.items():
        print(f"\n{name}\n{text}")
        if options.output.resolve() == OUTPUT.resolve():
            tables.insert(PAGE, name, text)


if __name__ == "__main__":
    main()
