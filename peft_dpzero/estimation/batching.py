"""From a step's logical batch to this process's micro-batches."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from peft_dpzero.estimation.fingerprint import order_digest
from peft_dpzero.estimation.generators import generators_kept, seed_generators
from peft_dpzero.estimation.sampling import SECRET_BYTES, PoissonSampler
from peft_dpzero.estimation.shapes import Row, Shapes, as_row, stacked_rows
from peft_dpzero.estimation.units import Units

Collator = Callable[[list[Any]], dict[str, Any]]


@dataclass(frozen=True, repr=False)
class LogicalBatch:
    """One process's share of a step's batch. It does not print its rows.

    Attributes:
        micro_batches: rows of one shape each.
        counts: how many of a micro-batch's rows are the data's; those after them are made up.
        owners: for each row of the data, in the micro-batches' order, the number of its unit in this share: (rows,)
            int64. A unit may have none.
        num_units: units in this share.
    """

    micro_batches: Sequence[dict[str, Any]] = ()
    counts: Sequence[int] = ()
    owners: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.int64))
    num_units: int = 0


class LogicalBatches:
    """The run's private batches, drawn by step number.

    Every process draws the same logical batch and keeps its share of the units. Rows are fetched, collated and padded
    one at a time, so that nothing about a row depends on another (`shapes.py`). Transforms and collators that draw at
    random (masking) do so from the run's secret, each unit from a seed of its own.

    A row that is None is nobody's, and one longer than `shapes.max_length` counts as none.

    Args:
        dataset: map-style training data.
        sampler: the run's sampler, over privacy units.
        collate: makes a micro-batch (1, …) of a list of one row.
        shapes: how rows are padded and how many share a pass, from `Probe.fit_shapes` and `Probe.tried_shapes`.
        rank: this process among all.
        world_size: how many processes there are.
        units: the rows of each unit; None makes each row a unit.
    """

    def __init__(
        self,
        dataset: Dataset[Any],
        sampler: PoissonSampler,
        collate: Collator,
        shapes: Shapes,
        rank: int = 0,
        world_size: int = 1,
        units: Units | None = None,
    ) -> None:
        self._dataset = dataset
        self._sampler = sampler
        self._collate = collate
        self._units = units
        self.shapes = shapes
        self.rank = rank
        self.world_size = world_size

    def share_key(self, broadcast: Callable[[Tensor], Tensor]) -> None:
        """Gives every process the first one's sampling key, so that all draw the same logical batches."""
        self._sampler.share_key(broadcast)

    def fingerprint(self) -> str:
        """A digest of the data's size and order, whose each row is, and how it is sampled. The key is no part of it."""
        with generators_kept():
            seed_generators(bytes(SECRET_BYTES))
            order = order_digest(self._dataset)
        units = self._units.fingerprint() if self._units is not None else ""
        return f"{len(self._dataset)} {order} {units} {self._sampler!r}"  # type: ignore[arg-type]

    def draw(self, step: int) -> LogicalBatch:
        """This process's share of the batch of `step`."""
        drawn = self._sampler.draw(step, self.rank, self.world_size)
        groups: dict[Hashable, list[tuple[int, Row]]] = {}
        with generators_kept():
            for owner, unit in enumerate(drawn.tolist()):
                seed_generators(seed := self._sampler.unit_seed(step, unit))
                for row in self._rows(unit, np.random.default_rng(np.frombuffer(seed, dtype="<u4"))):
                    groups.setdefault(self.shapes.key(row), []).append((owner, row))
        micro_batches, counts, owners = [], [], []
        for group in (groups[key] for key in sorted(groups, key=lambda key: (_size(groups[key][0][1]), repr(key)))):
            left = iter(group)
            for size in self.shapes.sizes(group[0][1], len(group)):
                part = list(islice(left, size))
                rows = [row for _, row in part]
                micro_batches.append(stacked_rows(rows + [self.shapes.made_up(rows[0])] * (size - len(rows))))
                counts.append(len(rows))
                owners += [owner for owner, _ in part]
        return LogicalBatch(micro_batches, counts, torch.tensor(owners, dtype=torch.int64), len(drawn))

    def _rows(self, unit: int, generator: np.random.Generator) -> Iterator[Row]:
        """The padded rows of a unit that take part."""
        indices = [unit] if self._units is None else self._units.choose(unit, generator).tolist()
        for index in indices:
            example = self._dataset[index]
            if example is None:
                continue
            row = as_row(self._collate([example]))
            if self.shapes.fits(row):
                yield self.shapes.padded(row)


def _size(row: Row) -> int:
    return max((value.numel() for value in row.values() if isinstance(value, Tensor)), default=0)


def without_column(collate: Collator, column: str) -> Collator:
    """`collate` on rows without `column`, which says whose they are and is not for the model."""

    def collated(rows: list[Any]) -> dict[str, Any]:
        kept = [{k: v for k, v in row.items() if k != column} if isinstance(row, Mapping) else row for row in rows]
        return collate(kept)

    return collated
