"""python -m study: runs what is missing and writes the report."""

from __future__ import annotations

import argparse
import dataclasses
import os
from collections.abc import Iterator
from pathlib import Path

from rich.console import Console

from workloads import REVIEWS, ROOT

from . import sweep
from .cells import QUICK, Cell
from .grid import BUDGETS, EPSILONS, Grid, quick_cells
from .methods import METHODS
from .models import MODELS
from .report import write_report
from .results import PAGE
from .runner import run_all
from .tasks import TASKS

# What is in the first is reported in docs/study.md.
FOLDER, QUICK_FOLDER = ROOT / "runs" / "study", ROOT / "runs" / "study-quick"


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m study", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="every method once, for seconds: to see that all runs")
    parser.add_argument("--tune", action="store_true", help="run methods' grids on the sets that others are tuned on")
    parser.add_argument("--sweep", action="store_true", help="run η and C on a grid beside our choice of them")
    parser.add_argument("--report", action="store_true", help="write docs/study.md from what has been run, run nothing")
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS), metavar="NAME")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=["minilm"], metavar="NAME")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS), metavar="NAME")
    parser.add_argument("--budgets", nargs="+", default=list(BUDGETS), metavar="B", help="such as 90s, 2m, 500000p")
    parser.add_argument("--epsilons", nargs="+", type=float, default=list(EPSILONS), metavar="E")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], metavar="SEED")
    parser.add_argument("--jobs", type=int, default=1, help="runs side by side")
    parser.add_argument("--threads", type=int, help="of each run; by default the cores over the jobs")
    parser.add_argument("--folder", type=Path, help="for results, records, journals and a report of them")
    chosen = parser.parse_args()
    if not REVIEWS.exists():
        parser.error(f"{REVIEWS.relative_to(ROOT)} is missing: make study fetches it.")
    return chosen


def stages(chosen: argparse.Namespace, grid: Grid, folder: Path) -> Iterator[list[Cell]]:
    """What is run, one after another."""
    if chosen.quick:
        yield [cell for cell in quick_cells() if cell.method in chosen.methods]
    elif chosen.tune:
        yield grid.tuning_cells()
    elif chosen.sweep:
        yield from sweep.stages(chosen.tasks, folder)
    else:
        yield grid.cells()


def main() -> None:
    chosen, console = options(), Console()
    names = [field.name for field in dataclasses.fields(Grid) if hasattr(chosen, field.name)]
    grid = Grid(**{name: tuple(getattr(chosen, name)) for name in names})
    if not grid.cells():
        raise SystemExit("There is nothing to run: endings take --models gemma.")
    folder = (chosen.folder or (QUICK_FOLDER if chosen.quick else FOLDER)).resolve()
    threads = chosen.threads or max(1, (os.cpu_count() or 1) // chosen.jobs)
    failed: list[Cell] = []
    size = QUICK if chosen.quick else grid.size
    if not chosen.report:
        for cells in stages(chosen, grid, folder):
            failed += run_all(cells, size, folder, chosen.jobs, threads)
    page = PAGE if folder == FOLDER else folder / "study.md"
    if not chosen.tune:
        write_report(folder, page)
        console.print(f"Report: {page}")
    if failed:
        console.print(f"{len(failed)} runs failed; {folder / 'logs'} says why.")
        raise SystemExit(1)


if __name__ == "__main__":
    main()
