"""From a step's logical batch to this process's collated micro-batches."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from peft_dpzero.estimation.sampling import PoissonSampler

Collator = Callable[[list[Any]], dict[str, Any]]


class LogicalBatches:
    """The run's private batches, drawn by step number.

    Every process draws the same logical batch and keeps each `world_size`-th unit of it. Units are independent, so
    rows are sorted by length before they are cut into micro-batches, which spares padding. Transforms and collators
    that draw at random (masking) do so from the run's secret: under a seed that is known, one example's presence
    would change every other's masks.

    Args:
        dataset: map-style training data.
        sampler: the run's sampler.
        collate: rows → micro-batch.
        micro_batch_size: rows that go through the model at once.
        rank: this process among all.
        world_size: how many processes there are.
    """

    def __init__(
        self,
        dataset: Dataset[Any],
        sampler: PoissonSampler,
        collate: Collator,
        micro_batch_size: int,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        self._dataset = dataset
        self._sampler = sampler
        self._collate = collate
        self.micro_batch_size = micro_batch_size
        self.rank = rank
        self.world_size = world_size

    def share_key(self, broadcast: Callable[[Tensor], Tensor]) -> None:
        """Gives every process the first one's sampling key, so that all draw the same logical batches."""
        self._sampler.share_key(broadcast)

    def draw(self, step: int) -> list[dict[str, Any]]:
        """This process's micro-batches of `step`: a list, empty if no unit of its share was drawn."""
        indices = self._sampler.draw(step)[self.rank :: self.world_size].tolist()
        if not indices:
            return []
        with _generators_seeded(self._sampler.generator_seed(step, self.rank)):
            rows = sorted(self._rows(indices), key=_length)
            cuts = range(0, len(rows), self.micro_batch_size)
            return [self._collate(rows[i : i + self.micro_batch_size]) for i in cuts]

    def _rows(self, indices: Sequence[int]) -> list[Any]:
        if hasattr(self._dataset, "__getitems__"):
            return list(self._dataset.__getitems__(list(indices)))
        return [self._dataset[i] for i in indices]


@contextmanager
def _generators_seeded(seed: bytes) -> Iterator[None]:
    """Within the block, the global CPU generators of Python, NumPy and torch run from `seed`; afterwards, as before."""
    python, numpy_ = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(devices=[]):
            random.seed(seed)
            np.random.seed(np.frombuffer(seed, dtype="<u4"))
            torch.default_generator.manual_seed(int.from_bytes(seed[:8], "little"))
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy_)


def _length(row: Any) -> int:
    ids = row.get("input_ids") if isinstance(row, dict) else None
    return len(ids) if ids is not None else 0


class _StepNumbers(Dataset[None]):
    """As long as the training data and empty: what the Trainer's loop sees of it."""

    def __init__(self, length: int) -> None:
        self.length = length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> None:
        return None


class _OnePerStep:
    def __init__(self, steps: int) -> None:
        self.steps = steps

    def __len__(self) -> int:
        return self.steps

    def __iter__(self) -> Iterator[list[int]]:
        return ([0] for _ in range(self.steps))


def _nothing(rows: list[None]) -> dict[str, torch.Tensor]:
    return {}


def step_loader(num_units: int, steps_per_epoch: int) -> DataLoader[Any]:
    """A loader that paces the Trainer's loop, one empty item a step, and carries no data.

    The step draws its own batch from `LogicalBatches` by number, so prefetching, skipping on resume and epoch
    ends cannot change what is sampled.
    """
    return DataLoader(_StepNumbers(num_units), batch_sampler=_OnePerStep(steps_per_epoch), collate_fn=_nothing)
