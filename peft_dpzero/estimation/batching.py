"""From a step's logical batch to this process's collated micro-batches."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from peft_dpzero.estimation.packing import packs_well
from peft_dpzero.estimation.sampling import PoissonSampler
from peft_dpzero.estimation.units import Units

Collator = Callable[[list[Any]], dict[str, Any]]

# What a pass costs besides its tokens, in tokens: an estimate that suits small models on a CPU.
PASS_TOKENS = 32


@dataclass(frozen=True)
class LogicalBatch:
    """One process's share of a step's batch.

    Attributes:
        micro_batches: collated rows, each set small enough to go through the model at once.
        owners: for each row, in the micro-batches' order, the number of its unit in this share: (rows,) int64.
        num_units: units in this share.
    """

    micro_batches: Sequence[dict[str, Any]] = ()
    owners: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.int64))
    num_units: int = 0


class LogicalBatches:
    """The run's private batches, drawn by step number.

    Every process draws the same logical batch and keeps each `world_size`-th unit of it. Rows are independent, so
    they are sorted by length before they are cut into micro-batches, and columns that are padding in every row are
    cut off: what goes through the model is hardly more than the tokens that count. If rows are packed into lines, each
    micro-batch takes its share of short and long ones instead. Transforms and collators that
    draw at random (masking) do so from the run's secret: under a seed that is known, one example's presence would
    change every other's masks.

    Args:
        dataset: map-style training data.
        sampler: the run's sampler, over privacy units.
        collate: rows → micro-batch.
        micro_batch_size: rows of the longest length that go through the model at once; of shorter ones, as many as
            make as many tokens.
        rank: this process among all.
        world_size: how many processes there are.
        units: the rows of each unit; None makes each row a unit.
        max_tokens: tokens, padding included, that go through the model at once; None derives it as above.
        packed: whether the model takes rows in lines, without padding (`packing.py`).
    """

    def __init__(
        self,
        dataset: Dataset[Any],
        sampler: PoissonSampler,
        collate: Collator,
        micro_batch_size: int,
        rank: int = 0,
        world_size: int = 1,
        units: Units | None = None,
        max_tokens: int | None = None,
        packed: bool = False,
    ) -> None:
        self._dataset = dataset
        self._sampler = sampler
        self._collate = collate
        self._units = units
        self.micro_batch_size = micro_batch_size
        self.max_tokens = max_tokens
        self.packed = packed
        self.rank = rank
        self.world_size = world_size

    def share_key(self, broadcast: Callable[[Tensor], Tensor]) -> None:
        """Gives every process the first one's sampling key, so that all draw the same logical batches."""
        self._sampler.share_key(broadcast)

    def draw(self, step: int) -> LogicalBatch:
        """This process's share of the batch of `step`, without rows if no unit of its share was drawn."""
        drawn = self._sampler.draw(step)[self.rank :: self.world_size]
        if not drawn.size:
            return LogicalBatch()
        seed = self._sampler.generator_seed(step, self.rank)
        with _generators_seeded(seed):
            chosen = self._choose(drawn, np.random.default_rng(np.frombuffer(seed, dtype="<u4")))
            owners = np.repeat(np.arange(len(chosen)), [len(rows) for rows in chosen])
            rows = self._rows(np.concatenate(chosen).tolist())
            parts = self._parts(np.array([_length(row) for row in rows]))
            micro_batches = [trimmed(self._collate([rows[i] for i in part])) for part in parts]
        return LogicalBatch(micro_batches, torch.from_numpy(owners[np.concatenate(parts)]), len(chosen))

    def _choose(self, drawn: np.ndarray, generator: np.random.Generator) -> list[np.ndarray]:
        if self._units is None:
            return [np.array([unit]) for unit in drawn]
        return [self._units.choose(int(unit), generator) for unit in drawn]

    def _parts(self, lengths: np.ndarray) -> list[np.ndarray]:
        """The rows of each micro-batch, by index into `lengths`."""
        order = np.argsort(lengths, kind="stable")
        longest = int(lengths[order[-1]])
        if not longest:
            return np.split(order, range(self.micro_batch_size, len(order), self.micro_batch_size))
        budget = self.max_tokens or self.micro_batch_size * longest
        if self.packed and packs_well(lengths):
            return dealt_parts(lengths, order, budget)
        return np.split(order, np.cumsum(cheapest_parts(lengths[order], budget))[:-1])

    def _rows(self, indices: Sequence[int]) -> list[Any]:
        if hasattr(self._dataset, "__getitems__"):
            return list(self._dataset.__getitems__(list(indices)))
        return [self._dataset[i] for i in indices]


def dealt_parts(lengths: np.ndarray, order: np.ndarray, budget: int) -> list[np.ndarray]:
    """As few parts as keep the budget, rows dealt out in turn so that each has short and long ones.

    Args:
        lengths: (n,) int64.
        order: (n,) indices by which `lengths` ascend.
        budget: tokens of a part at most, unless it is a single row.
    """
    for count in range(max(1, -(-int(lengths.sum()) // budget)), len(order)):
        parts = [order[number::count] for number in range(count)]
        if max(int(lengths[part].sum()) for part in parts) <= budget:
            return parts
    return [order[number : number + 1] for number in range(len(order))]


def cheapest_parts(lengths: np.ndarray, budget: int) -> list[int]:
    """Sizes of the consecutive parts that cost least: padded tokens, and `PASS_TOKENS` a part.

    Args:
        lengths: (n,) int64, ascending.
        budget: padded tokens of a part at most, unless it is a single row.
    """
    least = np.zeros(len(lengths) + 1)
    start = np.zeros(len(lengths) + 1, dtype=np.int64)
    for end, length in enumerate(lengths, start=1):
        first = max(0, min(end - 1, end - budget // max(int(length), 1)))
        starts = np.arange(first, end)
        costs = least[first:end] + PASS_TOKENS + (end - starts) * length
        start[end] = first + int(np.argmin(costs))
        least[end] = costs[start[end] - first]
    sizes: list[int] = []
    end = len(lengths)
    while end:
        sizes.append(end - int(start[end]))
        end = int(start[end])
    return sizes[::-1]


def trimmed(batch: dict[str, Any]) -> dict[str, Any]:
    """`batch` without the leading and trailing columns that are padding in every row.

    A column is cut from every (b, l) tensor if no row attends to it and no row has a label there.
    """
    mask = batch.get("attention_mask")
    if not isinstance(mask, Tensor) or mask.ndim != 2 or "decoder_input_ids" in batch:
        return batch
    used = mask.bool().any(dim=0)
    labels = batch.get("labels")
    if isinstance(labels, Tensor) and labels.shape == mask.shape:
        used = used | (labels != -100).any(dim=0)
    columns = used.nonzero().flatten()
    if not len(columns) or len(columns) == mask.shape[1]:
        return batch
    kept = slice(int(columns[0]), int(columns[-1]) + 1)
    return {
        key: value[:, kept] if isinstance(value, Tensor) and value.shape == mask.shape else value
        for key, value in batch.items()
    }


def without_column(collate: Collator, column: str) -> Collator:
    """`collate` on rows without `column`, which says whose they are and is not for the model."""

    def collated(rows: list[Any]) -> dict[str, Any]:
        kept = [{k: v for k, v in row.items() if k != column} if isinstance(row, dict) else row for row in rows]
        return collate(kept)

    return collated


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
    """The tokens that a row attends to; 0 if it holds none."""
    ids, mask = (row.get("input_ids"), row.get("attention_mask")) if isinstance(row, dict) else (None, None)
    if mask is not None and ids is not None and len(mask) == len(ids):
        return int(np.count_nonzero(mask))
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
