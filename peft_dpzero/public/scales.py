"""How steep losses are, and how long passes take: measured on rows that are public or made up."""

from __future__ import annotations

import bisect
import math
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain

import torch
from torch import Tensor

from peft_dpzero.config import DEFAULT_DIFFERENCE, DPZeroConfig
from peft_dpzero.errors import DPZeroError
from peft_dpzero.estimation.differences import losses_at, points_of, slopes_of
from peft_dpzero.estimation.losses import Losses, MicroBatch
from peft_dpzero.estimation.shapes import stacked_rows
from peft_dpzero.perturbation.perturbation import Perturbation

# Directions along which a row's loss is read.
_DIRECTIONS = 4
# λ is one of these or lies between two: half powers of ten.
_MOVES = tuple(10.0 ** (power / 2) for power in range(-8, 1))
# Rows and points of the passes that are timed.
_TIMED_ROWS = 16
_FEW_POINTS, _MOST_POINTS = 2, 128
_TIMED_MOVE = 1e-3
# And how often, unless once takes so many seconds.
_TIMED, _LONG = 3, 2.0
# So many times as long as copies of a usual row take those of a step: of many lengths, padded, few of each (measured).
_UNEVEN = 1.6
# One-sided slopes may be off by this share of their size: the error they add to an estimate is its square.
_BENT = 0.1


@dataclass(frozen=True)
class Slopes:
    """How losses change along a direction.

    Attributes:
        sizes: the root mean square of each row's slopes along directions, ascending.
        smoothing_parameter: λ at which they are told best.
        disagreement: how far the slopes at the two neighboring λ that were compared differ, relative to their size.
        difference: 'central' or 'forward', as they were read.
    """

    sizes: tuple[float, ...]
    smoothing_parameter: float
    disagreement: float
    difference: str = DEFAULT_DIFFERENCE

    @property
    def typical(self) -> float:
        """The mean of `sizes`.

        Of a model that is sure of its outputs, rows with the label that it expects and with another differ so much that
        their median is anywhere between.
        """
        return statistics.fmean(self.sizes)


@dataclass(frozen=True)
class Pace:
    """How long a run's steps take, where what is kept of a row makes it cheaper from the second time on.

    Attributes:
        first: seconds of a step whose rows are all new.
        later: seconds of one whose rows were all drawn before.
        sample_rate: q, with which a process draws a row; after t steps it was not drawn with probability (1 − q)^t.
    """

    first: float
    later: float
    sample_rate: float

    def seconds(self, steps: int) -> float:
        """Of so many steps together."""
        new = (1 - (1 - self.sample_rate) ** steps) / self.sample_rate
        return steps * self.later + new * (self.first - self.later)

    def steps(self, seconds: float) -> int:
        """The most that take no more than `seconds`."""
        return bisect.bisect_right(range(1, int(seconds / self.later) + 1), seconds, key=self.seconds)


@dataclass(frozen=True)
class Seconds:
    """What a step takes: `step` + rows · (`row` + points · `point`), and with rows that were drawn before `again` for
    `row`."""

    row: float
    again: float
    point: float
    step: float = 0.05

    def pace(self, rows: float, points: int, sample_rate: float) -> Pace:
        """Of steps with `rows` rows at `points` points each."""
        first, later = (self.step + rows * (row + points * self.point) for row in (self.row, self.again))
        return Pace(first, later, sample_rate)


def rows_to_read(seconds: Seconds, budget: float) -> int:
    """Of how many rows `find_slopes` reads the slopes in so many seconds."""
    points = (1 + _DIRECTIONS) * len(_MOVES)
    return int(budget / (seconds.row + points * seconds.point))


def find_slopes(losses: Losses, rows: Sequence[MicroBatch], perturbation: Perturbation, config: DPZeroConfig) -> Slopes:
    """Slopes as `measure_slopes` reads them: of one side, if nothing else is given and the loss bends little.

    Those take half the passes.

    Raises:
        DPZeroError: no λ gives slopes that are finite and not 0.
    """
    if config.difference is not None:
        return measure_slopes(losses, rows, perturbation, config.difference, config.smoothing_parameter)
    one_sided = measure_slopes(losses, rows, perturbation, "forward", config.smoothing_parameter)
    if one_sided.disagreement <= _BENT:
        return one_sided
    return measure_slopes(losses, rows, perturbation, "central", config.smoothing_parameter)


def measure_slopes(
    losses: Losses,
    rows: Sequence[MicroBatch],
    perturbation: Perturbation,
    difference: str,
    smoothing_parameter: float | None = None,
) -> Slopes:
    """Reads slopes at several λ and takes the middle of the two neighboring λ whose slopes agree best.

    Too small a λ leaves the rounding of the losses, too large a one their curvature.

    Args:
        losses: of the model.
        rows: micro-batches of one row each.
        perturbation: over the trainable parameters, where training starts.
        difference: 'central' or 'forward'.
        smoothing_parameter: λ if it is known.

    Raises:
        DPZeroError: no λ gives slopes that are finite and not 0.
    """
    moves = _MOVES if smoothing_parameter is None else (smoothing_parameter, 2 * smoothing_parameter)
    slopes = _slopes(losses, rows, perturbation, difference, moves)
    found = [
        (float((one - other).norm() / other.norm()), math.sqrt(move * larger), other)
        for move, larger, one, other in zip(moves, moves[1:], slopes, slopes[1:], strict=False)
    ]
    usable = [one for one in found if math.isfinite(one[0]) and statistics.median(_sizes(one[2])) > 0]
    if not usable:
        raise DPZeroError(
            "No step size tells how the loss changes: it is not finite, or no made-up row moves it. Give "
            "clipping_threshold and smoothing_parameter, or public_text."
        )
    disagreement, move, made = min(usable, key=lambda candidate: candidate[0])
    return Slopes(_sizes(made), smoothing_parameter or float(f"{move:.2g}"), disagreement, difference)


def _sizes(slopes: Tensor) -> tuple[float, ...]:
    return tuple(sorted(slopes.square().mean(dim=1).sqrt().tolist()))


def _slopes(
    losses: Losses, rows: Sequence[MicroBatch], perturbation: Perturbation, difference: str, moves: Sequence[float]
) -> list[Tensor]:
    """(rows, directions) float64 for each move."""
    points = [points_of(_DIRECTIONS, move, difference) for move in moves]
    values = torch.cat(losses_at(losses, rows, perturbation, 0, list(chain(*points))), dim=1)  # [all points, rows]
    readable = values.isfinite().any(dim=0)
    values = values[:, readable] if bool(readable.any()) else values
    sides = zip(moves, torch.split(values, [len(some) for some in points]), strict=True)
    return [slopes_of(at, move, difference).T for move, at in sides]


def measure_seconds(losses: Losses, row: MicroBatch, perturbation: Perturbation) -> Seconds:
    """Times passes over copies of `row` at few points and at many, and tells from them what a step's rows take.

    Args:
        losses: of the model.
        row: of usual length.
        perturbation: over the trainable parameters.
    """
    batch = stacked_rows([dict(row)] * _TIMED_ROWS)

    def seconds(passes: Losses, points: int) -> float:
        start = time.perf_counter()
        losses_at(passes, [batch], perturbation, 0, points_of(points // 2, _TIMED_MOVE, "central"))
        return time.perf_counter() - start

    def a_row(passes: Losses, points: int) -> float:
        quickest = seconds(passes, points)
        for _ in range(_TIMED - 1 if quickest < _LONG else 0):
            quickest = min(quickest, seconds(passes, points))
        return quickest / _TIMED_ROWS

    new = losses.without_kept()
    # The first pass warms up. Of others the quickest was disturbed least.
    seconds(new, _FEW_POINTS)
    first = few = a_row(new, _FEW_POINTS)
    if losses.shortcuts.kept is not None:
        losses.prepare([batch])
        few = a_row(losses, _FEW_POINTS)
    # A small difference would drown in what is unsteady: so many points that they take as long as all else.
    many, points = few, _FEW_POINTS
    while many <= 2 * few and points < _MOST_POINTS:
        points *= 4
        many = a_row(losses, points)
    point = max(many - few, 1e-6 / _TIMED_ROWS) / (points - _FEW_POINTS)
    fresh, again = (_UNEVEN * max(made - _FEW_POINTS * point, 0.0) for made in (first, min(first, few)))
    return Seconds(fresh, again, _UNEVEN * point)
