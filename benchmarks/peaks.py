"""Peak memory of each contender above the loaded weights, each in a process of its own.

    python benchmarks/peaks.py --contender ours --workload minilm

prints one line of JSON: the resident set once the model and rows are loaded, and its peak over two steps.
"""

from __future__ import annotations

import argparse
import importlib
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft_dpzero.checks.freed import return_freed_memory

import workloads
from memory import reset_peak, resident_mib
from ours import Batches, Ours, no_grad_evaluation
from reference import Reference
from workloads import Row, Workload

CONTENDERS = ("evaluate", "ours", "reference", "opacus hooks", "opacus ghost")
# The same 100M causal LM, LoRA and micro-batch as in memory.py, with fewer passes.
LLAMA = ("--batch", "4", "--length", "256", "--num-directions", "2")


def contender(name: str, workload: Workload) -> Callable[[int, list[Row]], None]:
    if name == "evaluate":
        return lambda number, rows: no_grad_evaluation(workload, rows)
    if name == "ours":
        return Ours(workload, num_directions=1)
    if name == "reference":
        return Reference(workload)
    from opacus_step import Opacus

    return Opacus(workload, name.removeprefix("opacus "))


def measure(options: argparse.Namespace) -> dict[str, float]:
    """Loaded and peak resident set, in MiB."""
    torch.set_num_threads(options.threads)
    if "opacus" in options.contender:
        importlib.import_module("opacus_step")  # what an import needs is not the step's
    sizes = {"minilm": (64, 16), "gemma": (8, 8)}[options.workload]
    workload = getattr(workloads, options.workload)("lora", *sizes)
    draw = Batches(workload)
    batches = [draw(number) for number in range(2)]
    for parameter in workload.model.parameters():
        parameter.data = parameter.data.clone()  # weights mapped from a file are not resident before they are read
    return_freed_memory()  # it would hide what a step needs
    loaded = resident_mib("VmRSS")
    if loaded is None or not reset_peak():
        raise SystemExit("This system does not tell a process's peak over a section.")
    run = contender(options.contender, workload)
    for number, rows in enumerate(batches):
        run(number, rows)
    peak = resident_mib("VmHWM")
    assert peak is not None
    return {"loaded_mib": loaded, "peak_mib": peak, "extra_mib": peak - loaded}


def in_process(name: str, workload: str, threads: int) -> dict[str, Any]:
    """`measure` in a new process."""
    command = [sys.executable, __file__, "--contender", name, "--workload", workload, "--threads", str(threads)]
    return _last_line(command)


def llama_in_process(section: str) -> dict[str, Any]:
    """A section of memory.py in a new process."""
    return _last_line([sys.executable, str(Path(__file__).with_name("memory.py")), *LLAMA, "--section", section])


def _last_line(command: list[str]) -> dict[str, Any]:
    output = subprocess.run(command, check=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True).stdout
    return dict(json.loads(output.splitlines()[-1]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--contender", choices=CONTENDERS, required=True)
    parser.add_argument("--workload", choices=["minilm", "gemma"], default="minilm")
    parser.add_argument("--threads", type=int, default=2)
    print(json.dumps(measure(parser.parse_args())))


if __name__ == "__main__":
    main()
