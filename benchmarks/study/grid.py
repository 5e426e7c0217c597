"""Which runs a study is made of."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from . import sweep
from .cells import FULL, QUICK, Budget, Cell, Size
from .methods import METHODS, SWEPT
from .models import suits
from .results import PAGE, Result, path_of, reported
from .tasks import TASKS

EPSILONS = (0.5, 1.0, 2.0, 8.0)
BUDGETS = ("2m", "5m", "15m", "500000p", "2000000p")
# Where settings are chosen.
TUNING_EPSILON, TUNING_SEED, TUNING_BUDGET = 2.0, 0, "2m"


@dataclass(frozen=True)
class Grid:
    """All combinations of what it names, of which those without meaning are left out."""

    tasks: Sequence[str] = tuple(TASKS)
    models: Sequence[str] = ("minilm",)
    methods: Sequence[str] = tuple(METHODS)
    budgets: Sequence[str] = BUDGETS
    epsilons: Sequence[float] = EPSILONS
    seeds: Sequence[int] = (0, 1, 2)
    size: Size = FULL

    def cells(self) -> list[Cell]:
        """The runs, the same for what differs in meaningless ways only, in the order of their running: a task's seed
        by seed, so that a study that was cut short has whole seeds."""
        found: dict[Cell, None] = {}
        for seed in self.seeds:
            for task, model in self._pairs(self.tasks):
                for name in self.methods:
                    method = METHODS[name]
                    for budget in map(Budget.of, self.budgets) if method.trains else (None,):
                        for epsilon in self.epsilons if method.private else (None,):
                            found[Cell(task, model, name, budget, epsilon, seed)] = None
        return list(found)

    def tuning_cells(self) -> list[Cell]:
        """What chooses settings: each method's grid on the tasks that others are tuned on, once."""
        tasks = sorted({TASKS[task].tuned_on for task in self.tasks})
        return [
            Cell(
                task,
                model,
                name,
                Budget.of(TUNING_BUDGET),
                TUNING_EPSILON if METHODS[name].private else None,
                TUNING_SEED,
                number,
            )
            for task, model in self._pairs(tasks)
            for name in self.methods
            if len(METHODS[name].grid) > 1
            for number in range(len(METHODS[name].grid))
        ]

    def _pairs(self, tasks: Iterable[str]) -> Iterator[tuple[str, str]]:
        return ((task, model) for task in tasks for model in self.models if suits(model, task))


def quick_cells() -> list[Cell]:
    """Every method on few passes, and those with a rule of their own for time for some seconds."""
    once = Grid(("movies-stars",), budgets=("250p",), epsilons=(0.5,), seeds=(0,), size=QUICK)
    timed = dataclasses.replace(once, tasks=("movies",), budgets=("15s",), methods=("dpzero",))
    return once.cells() + timed.cells()


def settings_for(cell: Cell, folder: Path) -> tuple[dict[str, Any], str]:
    """The settings of a cell's method, and why those."""
    if cell.method == SWEPT.name:
        return sweep.settings_of(cell, folder), "the sweep's grid"
    grid = METHODS[cell.method].grid
    if cell.settings is not None:
        return dict(grid[cell.settings]), "tuning"
    if len(grid) == 1:
        return dict(grid[0]), "the method's own rule"
    number = best_on(TASKS[cell.task].tuned_on, cell, range(len(grid)), folder)
    if number is None:
        return dict(grid[0]), "first of its grid: not tuned"
    return dict(grid[number]), f"tuned on {TASKS[cell.task].tuned_on}"


def best_on(task: str, cell: Cell, numbers: Iterable[int], folder: Path) -> int | None:
    """Which settings were most accurate on another task; None unless all were tried, here or for the report."""
    accuracies: dict[int, float] = {}
    before = {Cell.of(result["cell"]): result for result in reported(PAGE)}
    for number in numbers:
        epsilon = None if cell.epsilon is None else TUNING_EPSILON
        tried = Cell(task, cell.model, cell.method, Budget.of(TUNING_BUDGET), epsilon, TUNING_SEED, number)
        path = path_of(tried, folder)
        result: Result | None = json.loads(path.read_text()) if path.exists() else before.get(tried)
        if result is None:
            return None
        accuracies[number] = result["accuracy"] or 0.0  # None where it did not fit
    return max(accuracies, key=lambda number: accuracies[number])
