"""Runs cells side by side, each in a process with its own threads, and leaves out those that have a result."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from . import worker
from .cells import Cell, Size
from .results import missing

# The server imports everything once; what it forks starts at once. It is single-threaded until then.
CONTEXT = multiprocessing.get_context("forkserver" if os.name == "posix" else "spawn")
COLUMNS = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
Work = Callable[[Cell, Size, Path, int], None]


def run_all(cells: Sequence[Cell], size: Size, folder: Path, jobs: int, threads: int) -> list[Cell]:
    """Makes the results that `folder` lacks.

    Args:
        cells: the study's.
        size: of it.
        folder: for results, starts, runs and logs.
        jobs: runs side by side. A wall-clock budget is only as good as the cores behind it: jobs × threads should be
            cores that nobody else uses.
        threads: of each.

    Returns:
        The cells that failed; their logs say why.
    """
    CONTEXT.set_forkserver_preload([worker.__name__])
    todo = missing(cells, folder)
    starts = list({(cell.model, cell.task, cell.seed): cell for cell in todo}.values())
    with Progress(*COLUMNS) as progress, ThreadPoolExecutor(jobs) as pool:

        def all_of(title: str, work: Work, some: Sequence[Cell]) -> list[Cell]:
            task = progress.add_task(title, total=len(some))
            failed = []

            def one(cell: Cell) -> None:
                if not _in_process(work, cell, size, folder, threads):
                    failed.append(cell)
                    progress.console.print(f"failed: {cell.name}")
                progress.update(task, advance=1, description=f"{title}, last {cell.name}")

            list(pool.map(one, some))
            return failed

        all_of("starts", worker.prepare, starts)
        return all_of("runs", worker.run, todo)


def _in_process(work: Work, cell: Cell, size: Size, folder: Path, threads: int) -> bool:
    process = CONTEXT.Process(target=worker.guarded, args=(work, cell, size, folder, threads))
    process.start()
    process.join()
    return process.exitcode == 0
