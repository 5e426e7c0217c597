"""Results of several seeds as mean, standard deviation and number."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from .cells import Budget
from .results import Result

NOTHING = "Nothing has been run yet."


@dataclass(frozen=True)
class Spread:
    """Mean, standard deviation (None of one value) and number."""

    mean: float
    deviation: float | None
    number: int

    @classmethod
    def of(cls, values: Iterable[float]) -> Spread:
        values = list(values)
        deviation = statistics.stdev(values) if len(values) > 1 else None
        return cls(statistics.fmean(values), deviation, len(values))

    def shown(self, scale: float = 1.0, digits: int = 1) -> str:
        """`mean ± deviation (n)`."""
        apart = "" if self.deviation is None else f" ± {scale * self.deviation:.{digits}f}"
        mean = round(scale * self.mean, digits) + 0.0  # no −0.0
        return f"{mean:.{digits}f}{apart} ({self.number})"


@dataclass(frozen=True)
class Key:
    """What all seeds of a number have in common."""

    model: str
    task: str
    method: str
    budget: Budget | None
    epsilon: float | None

    @classmethod
    def of(cls, result: Result) -> Key:
        cell = result["cell"]
        budget = None if cell["budget"] is None else Budget.of(cell["budget"])
        return cls(cell["model"], cell["task"], cell["method"], budget, cell["epsilon"])


Groups = dict[Key, list[Result]]


def grouped(results: Iterable[Result]) -> Groups:
    """Results by key, without those of tuning."""
    found: Groups = defaultdict(list)
    for result in results:
        if result["cell"]["settings"] is None:
            found[Key.of(result)].append(result)
    return dict(found)


def spread(results: list[Result], value: str | Callable[[Result], Any]) -> Spread | None:
    """Of a field of all `results`; None if one lacks it."""
    values = [result[value] if isinstance(value, str) else value(result) for result in results]
    return None if any(one is None for one in values) else Spread.of(values)
