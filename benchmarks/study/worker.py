"""One run, in a process of its own."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import shutil
import sys
import threading
import time
import traceback
import warnings
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from transformers.utils import logging

from memory import reset_peak, resident_mib

from .cells import Cell, Size
from .clock import Clock
from .grid import settings_for
from .methods import ALL_METHODS
from .methods.base import DoesNotFit, Outcome
from .models import started
from .results import path_of, save

PACKAGES = ("torch", "transformers", "peft", "opacus", "dp-accounting")


def run(cell: Cell, size: Size, folder: Path, threads: int) -> None:
    """Trains and measures `cell`, and writes its result."""
    torch.set_num_threads(threads)
    start = started(cell.model, cell.task, cell.seed, size, folder)
    before = start.accuracy()
    own = folder / "runs" / cell.name
    shutil.rmtree(own, ignore_errors=True)  # of a run that was killed: its clock cannot go on
    settings, why = settings_for(cell, folder)
    torch.manual_seed(cell.seed)
    loaded, peaks = resident_mib("VmRSS"), reset_peak()
    clock = Clock(cell.budget)
    cpu = time.process_time()
    fits = True
    try:
        outcome = ALL_METHODS[cell.method].train(start, clock, cell.epsilon, cell.seed, own, **settings)
    except DoesNotFit:
        outcome, fits = Outcome(), False
    seconds, cpu = clock.seconds, time.process_time() - cpu
    peak = resident_mib("VmHWM") if peaks else None
    result: dict[str, Any] = {
        "cell": cell.to_dict(),
        "accuracy": start.accuracy() if fits else None,
        "accuracy_before": before,
        "held_out": len(start.held_out),
        "rows": len(start.train),
        "seconds": round(seconds, 3),
        "cpu_seconds": round(cpu, 3),
        "steps": outcome.steps,
        "passes": outcome.passes,
        "extra_mib": None if peak is None or loaded is None else round(peak - loaded, 1),
        "privacy": outcome.privacy,
        "settings": outcome.settings,
        "settings_from": why,
        "machine": {
            "cores": os.cpu_count(),
            "threads": threads,
            "instructions": torch.backends.cpu.get_cpu_capability(),
            "python": ".".join(map(str, sys.version_info[:3])),
            **{name: version(name) for name in PACKAGES},
        },
    }
    save(result, path_of(cell, folder))


def prepare(cell: Cell, size: Size, folder: Path, threads: int) -> None:
    """Makes the start that a cell shares with others."""
    torch.set_num_threads(threads)
    started(cell.model, cell.task, cell.seed, size, folder)


def guarded(work: Any, cell: Cell, size: Size, folder: Path, threads: int) -> None:
    """Does `work` with its output in a file, and ends when the study does."""
    _end_with_parent()
    warnings.filterwarnings("ignore")
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    log = folder / "logs" / f"{cell.name}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("w") as file, contextlib.redirect_stdout(file), contextlib.redirect_stderr(file):
        try:
            work(cell, size, folder, threads)
        except BaseException:
            traceback.print_exc()
            file.flush()
            raise SystemExit(1) from None


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is None:
        return

    def watch() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
