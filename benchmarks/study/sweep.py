"""Our choice of η and C beside a grid of both, for the same passes.

The grid's runs have all else as ours chose it with the same seed: sizes, λ, directions and their basis. C is fixed, in
multiples of the usual norm, from which ours adapts it. The whole grid runs with few seeds, and the best of it with all:
what was best of few seeds was lucky, too, so that the seeds that did not choose it tell more.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import statistics
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import tables

from .cells import Budget, Cell
from .methods import SWEPT
from .results import Result, missing, path_of
from .summary import NOTHING, Spread

RATES, NORMS = (3e-3, 1e-2, 3e-2, 1e-1), (0.25, 0.5, 1.0, 2.0)
POINTS = tuple({"learning_rate": rate, "usual_norms": norms} for rate, norms in itertools.product(RATES, NORMS))
BUDGET, EPSILON, SEEDS, SCREENING_SEEDS, FINALISTS = Budget.of("200000p"), 2.0, (0, 1, 2, 3, 4), (0,), 5
MARK = "sweep"


def chosen_cells(tasks: Sequence[str]) -> list[Cell]:
    """Ours as it chooses."""
    return [Cell(task, "minilm", "ours", BUDGET, EPSILON, seed) for seed in SEEDS for task in tasks]


def screening_cells(tasks: Sequence[str]) -> list[Cell]:
    """The whole grid with few seeds."""
    return [
        dataclasses.replace(cell, method=SWEPT.name, settings=number)
        for cell in chosen_cells(tasks)
        if cell.seed in SCREENING_SEEDS
        for number in range(len(POINTS))
    ]


def final_cells(tasks: Sequence[str], folder: Path) -> list[Cell]:
    """The best of the grid with the other seeds; none of a task whose grid has not been run."""
    found = []
    for task in tasks:
        screened = screening_cells([task])
        if missing(screened, folder):
            continue
        results = [json.loads(path_of(cell, folder).read_text()) for cell in screened]
        ranked = sorted(range(len(POINTS)), key=lambda number: -statistics.fmean(_of(results, number)))
        found += [
            dataclasses.replace(cell, method=SWEPT.name, settings=number)
            for cell in chosen_cells([task])
            if cell.seed not in SCREENING_SEEDS
            for number in ranked[:FINALISTS]
        ]
    return found


def stages(tasks: Sequence[str], folder: Path) -> Iterator[list[Cell]]:
    """What is run, one after another: each is known when those before it have results."""
    yield chosen_cells(tasks)
    yield screening_cells(tasks)
    yield final_cells(tasks, folder)


def settings_of(cell: Cell, folder: Path) -> dict[str, Any]:
    """A grid's point beside what ours chose with the cell's seed."""
    assert cell.settings is not None
    chosen = dataclasses.replace(cell, method="ours", settings=None)
    settings = json.loads(path_of(chosen, folder).read_text())["settings"]
    point = POINTS[cell.settings]
    return {
        "learning_rate": point["learning_rate"],
        "clipping_threshold": point["usual_norms"] * settings["clipping_threshold"],
        "like": settings,
        "basis_in": folder / "runs" / chosen.name,
    }


def rendered(results: Iterable[Result]) -> str:
    """Markdown: a table for each task, of accuracies in per cent by η and C, and ours beside the best."""
    parts = []
    swept: list[Result] = []
    ours: list[Result] = []
    for result in results:
        cell = Cell.of(result["cell"])
        if cell.method == SWEPT.name:
            swept.append(result)
        elif (cell.model, cell.method, cell.budget, cell.epsilon) == ("minilm", "ours", BUDGET, EPSILON):
            ours.append(result)
    for task in sorted({result["cell"]["task"] for result in swept}):
        of_task = [result for result in swept if result["cell"]["task"] == task]
        rows = [
            [f"{rate:g}", *(_shown(_of(of_task, row * len(NORMS) + column)) for column in range(len(NORMS)))]
            for row, rate in enumerate(RATES)
        ]
        header = [f"{task}: η", *(f"C = {norms:g} × usual" for norms in NORMS)]
        parts += [tables.table(header, rows), _verdict(of_task, [r for r in ours if r["cell"]["task"] == task])]
    return "\n\n".join(parts) or NOTHING


def _verdict(swept: list[Result], ours: list[Result]) -> str:
    """Ours, and the grid's best by the mean over all its seeds and over those that did not choose it."""
    own = Spread.of(result["accuracy"] for result in ours)
    whole = [number for number in range(len(POINTS)) if len(_of(swept, number)) == len(SEEDS)]
    said = f"Ours as it chooses: **{own.shown(100)}**"
    if not whole:
        return said + "."
    best = max(whole, key=lambda number: statistics.fmean(_of(swept, number)))
    fresh = [r for r in swept if r["cell"]["seed"] not in SCREENING_SEEDS]
    point = POINTS[best]
    return (
        f"{said}. The grid's best, η = {point['learning_rate']:g} and C = {point['usual_norms']:g} × usual: "
        f"**{_shown(_of(swept, best))}**, and {_shown(_of(fresh, best))} with the seeds that did not choose it."
    )


def _of(results: Iterable[Result], number: int) -> list[float]:
    return [result["accuracy"] for result in results if result["cell"]["settings"] == number]


def _shown(accuracies: list[float]) -> str:
    return Spread.of(accuracies).shown(100) if accuracies else "–"
