"""What paces the Trainer's loop, which sees no data."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset


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


def step_loader(num_units: int, logical_batch_size: int) -> DataLoader[Any]:
    """A loader that paces the Trainer's loop, one empty item a step, and carries no data.

    The step draws its own batch from `LogicalBatches` by number, so prefetching, skipping on resume and epoch
    ends cannot change what is sampled.
    """
    return DataLoader(
        _StepNumbers(num_units),
        batch_sampler=_OnePerStep(math.ceil(num_units / logical_batch_size)),
        collate_fn=_nothing,
    )
