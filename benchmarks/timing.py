"""Contenders in alternation: the same rows for all of a round, the order turned each round, ratios within a round."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from workloads import Row

Contender = Callable[[int, list[Row]], None]


def seconds(contender: Contender, number: int, rows: list[Row]) -> float:
    """How long a contender takes over a step's rows."""
    if hasattr(contender, "prepare"):
        contender.prepare(number, rows)
    gc.collect()
    synchronise()
    start = time.perf_counter()
    contender(number, rows)
    synchronise()
    return time.perf_counter() - start


def synchronise() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def alternate(
    contenders: Mapping[str, Contender], draw: Callable[[int], list[Row]], rounds: int, first: int = 0, warm_up: int = 1
) -> dict[str, list[float]]:
    """Seconds of each contender in each round."""
    names = list(contenders)
    times: dict[str, list[float]] = {name: [] for name in names}
    for number in range(warm_up + rounds):
        rows = draw(first + number)
        shift = number % len(names)
        for name in names[shift:] + names[:shift]:
            taken = seconds(contenders[name], first + number, rows)
            if number >= warm_up:
                times[name].append(taken)
    return times


def spread(values: Sequence[float], digits: int = 4) -> dict[str, float]:
    """{median, min, max}, rounded."""
    found = {"median": statistics.median(values), "min": min(values), "max": max(values)}
    return {key: float(f"{value:.{digits}g}") for key, value in found.items()}


def ratios(times: Mapping[str, Sequence[float]], over: str, under: str) -> list[float]:
    """Round by round, `over`'s time divided by `under`'s."""
    return [a / b for a, b in zip(times[over], times[under], strict=True)]


def linear_fit(xs: Sequence[float], ys: Sequence[float]) -> dict[str, Any]:
    """Least squares y = intercept + slope·x, and R²."""
    mean_x, mean_y = statistics.fmean(xs), statistics.fmean(ys)
    slope = sum((x - mean_x) * (y - mean_y) for x, y in zip(xs, ys, strict=True)) / sum((x - mean_x) ** 2 for x in xs)
    intercept = mean_y - slope * mean_x
    residual = sum((y - intercept - slope * x) ** 2 for x, y in zip(xs, ys, strict=True))
    total = sum((y - mean_y) ** 2 for y in ys)
    return {"slope": slope, "intercept": intercept, "r_squared": 1 - residual / total}
