"""Per-unit loss differences along random directions: equations (3) and (4) of the step."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial, reduce

import torch
from torch import Tensor

from peft_dpzero.estimation.batching import LogicalBatch
from peft_dpzero.estimation.losses import Losses, MicroBatch
from peft_dpzero.mechanism.private_sum import PrivateDifferences
from peft_dpzero.perturbation.perturbation import Perturbation, Point

# Parameters at stacked points are kept for a step's micro-batches while they are so few entries (128 MiB of float32).
KEPT_ENTRIES_IN_STACKS = 1 << 25


def estimate_differences(
    losses: Losses,
    batch: LogicalBatch,
    perturbation: Perturbation,
    *,
    step: int,
    num_directions: int,
    smoothing_parameter: float,
    difference: str,
) -> PrivateDifferences:
    """d_ik = (ℓ_i(θ+λz_k) − ℓ_i(θ−λz_k)) / 2λ, or (ℓ_i(θ+λz_k) − ℓ_i(θ)) / λ for forward differences.

    Returns: the differences (n, K) and losses (n,) of this process's units, float64, sealed. A unit's are the means
    over its rows, NaN if it has none.
    """
    if not batch.micro_batches:
        nothing = torch.full((batch.num_units, num_directions), torch.nan, dtype=torch.float64)
        return PrivateDifferences(nothing, nothing[:, 0])
    losses.prepare(batch.micro_batches)
    scale = smoothing_parameter
    points = points_of(num_directions, scale, difference)
    columns, levels = [], []
    for values, count in zip(
        losses_at(losses, batch.micro_batches, perturbation, step, points), batch.counts, strict=True
    ):
        # Summed one by one, so that a row's place does not decide the order.
        level = values[0] if difference == "forward" else reduce(torch.add, values) / len(values)
        # Made-up rows go last, when no number of rows can matter any more.
        columns.append(slopes_of(values, scale, difference).T[:count])
        levels.append(level[:count])
    mean = partial(_mean_by_owner, owners=batch.owners, num_units=batch.num_units)
    return PrivateDifferences(mean(torch.cat(columns)), mean(torch.cat(levels)))


def points_of(num_directions: int, scale: float, difference: str) -> list[Point]:
    """Where a step reads losses: θ and θ+λz_k for forward differences, else θ+λz_k and θ−λz_k, λ = `scale`."""
    if difference == "forward":
        return [(0, 0.0), *((k, scale) for k in range(num_directions))]
    return [(k, side * scale) for k in range(num_directions) for side in (1, -1)]


def slopes_of(losses: Tensor, scale: float, difference: str) -> Tensor:
    """A slope for each direction, (K, …), of losses (points, …) at `points_of`."""
    if difference == "forward":
        return (losses[1:] - losses[0]) / scale
    return (losses[0::2] - losses[1::2]) / (2 * scale)


def losses_at(
    losses: Losses,
    micro_batches: Sequence[MicroBatch],
    perturbation: Perturbation,
    step: int,
    points: Sequence[Point],
) -> list[Tensor]:
    """Losses of each micro-batch's rows at all points: (points, b) float64 each, on the CPU."""
    alone = [i for i, one in enumerate(micro_batches) if points_together(losses, one, perturbation, len(points)) < 2]
    if losses.shortcuts.trunk is not None:
        alone = []
    # A point meets all of these, so that parameters are perturbed least often.
    placed = [losses.place(micro_batches[i]) for i in alone]
    made = [_at_point(losses, placed, perturbation, step, point) for point in points] if alone else []
    found = {i: torch.stack([values[number] for values in made]) for number, i in enumerate(alone)}
    # Of the others each meets all points, so that they share what none of them changes.
    stacks = _Stacks(perturbation, step)
    return [found[i] if i in found else _at_points(losses, one, stacks, points) for i, one in enumerate(micro_batches)]


def points_together(losses: Losses, micro_batch: MicroBatch, perturbation: Perturbation, number: int) -> int:
    """How many of `number` points go over a micro-batch in one pass: as many in each, since a pass of another shape
    rounds otherwise."""
    most = min(losses.points_at_once(micro_batch), perturbation.most_stacked, number)
    return math.ceil(number / math.ceil(number / most)) if most >= losses.fewest_stacked else 1


def _at_point(
    losses: Losses, placed: Sequence[MicroBatch], perturbation: Perturbation, step: int, point: Point
) -> list[Tensor]:
    with perturbation.at(step, *point):
        return [losses(one) for one in placed]


class _Stacks:
    """The parameters at several points of a step, kept for the next micro-batch if they are few."""

    def __init__(self, perturbation: Perturbation, step: int) -> None:
        self.perturbation = perturbation
        self.step = step
        self._kept: dict[tuple[Point, ...], dict[str, Tensor]] = {}

    def at(self, points: tuple[Point, ...]) -> dict[str, Tensor]:
        """As `Perturbation.stacked` makes them."""
        if points not in self._kept:
            entries = sum(map(len, (*self._kept, points))) * int(self.perturbation.directions.num_entries)
            if entries > KEPT_ENTRIES_IN_STACKS:
                self._kept.clear()
            self._kept[points] = self.perturbation.stacked(self.step, points)
        return self._kept[points]


def _at_points(losses: Losses, micro_batch: MicroBatch, stacks: _Stacks, points: Sequence[Point]) -> Tensor:
    placed = losses.place(micro_batch)
    together = points_together(losses, micro_batch, stacks.perturbation, len(points))
    made: list[Tensor] = []
    with losses.over_one_micro_batch(placed) as restart:
        while len(made) < len(points):
            restart()
            # The last ones overlap with those before, rather than be fewer.
            start = min(len(made), len(points) - together)
            chunk = tuple(points[start : start + together])
            if together < 2:
                made[start:] = _at_point(losses, [placed], stacks.perturbation, stacks.step, chunk[0])
            else:
                made[start:] = losses.stacked(placed, stacks.at(chunk))
    return torch.stack(made)


def _mean_by_owner(rows: Tensor, owners: Tensor, num_units: int) -> Tensor:
    """Means of `rows` (r, …) over the rows of each unit: (num_units, …), NaN for a unit without rows."""
    counts = torch.bincount(owners, minlength=num_units).to(rows.dtype)
    totals = rows.new_zeros(num_units, *rows.shape[1:]).index_add(0, owners, rows)
    return totals / counts.view(-1, *(1,) * (rows.ndim - 1))
