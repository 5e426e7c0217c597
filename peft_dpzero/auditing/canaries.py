"""Canaries: made-up examples that a model has not learnt, and training data in which coins decide who is present."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from torch import Tensor
from torch.utils.data import Dataset

from peft_dpzero.errors import DPZeroError
from peft_dpzero.estimation.shapes import IGNORE
from peft_dpzero.estimation.units import unit_values

# Rows that canaries are modelled on.
_MODELS = 64

Row = dict[str, Any]


class CanaryData(Dataset[Any]):
    """The user's data followed by all canaries, of which those whose coin fell to tails are never handed out.

    Every canary has an index, so that N, and with it the sample rate, tells nothing of the coins. A step that draws
    an absent canary gets None for it: exactly the data set from which it was removed. Where a column says whose each
    row is, every canary is somebody of its own.

    Args:
        data: map-style training data.
        present: the coins, (m,) bool.
    """

    def __init__(self, data: Any, present: np.ndarray) -> None:
        self.data = data
        self.present = present
        self.canaries: list[Row] = []
        if columns := getattr(data, "column_names", None):
            self.column_names = columns

    def __len__(self) -> int:
        return len(self.data) + len(self.present)

    def __getitem__(self, index: int) -> Any:
        rest = index - len(self.data)
        if rest < 0:
            return self.data[index]
        return self.canaries[rest] if self.present[rest] else None

    def unit_values(self, column: str) -> list[Any]:
        """Whose each row is: a canary belongs to nobody else."""
        users = list(unit_values(self.data, column))
        return [*users, *_newcomers(users, len(self.present))]


def random_canaries(data: Any, count: int, vocabulary: int, generator: np.random.Generator) -> list[Row]:
    """Rows like those of `data` with random tokens and random labels: surprising, and each unlike the others.

    A token that all of the rows looked at share (separators, masks, the template's words) stays where it is; every
    other one is drawn anew. Labels that repeat the tokens follow them; others are drawn from the labels seen.

    Args:
        data: rows that are mappings with `input_ids` and, unless the collator makes them, `labels` or `label`.
        count: how many to make.
        vocabulary: tokens are drawn from 0 … vocabulary − 1, without those that stay.
        generator: the randomness.

    Raises:
        DPZeroError: the rows hold no `input_ids`.
    """
    models = [data[i] for i in generator.choice(len(data), min(_MODELS, len(data)), replace=False).tolist()]
    if not all(isinstance(row, Mapping) and "input_ids" in row for row in models):
        raise DPZeroError("Canaries can be made of rows with input_ids only: pass rows of your own as canaries.")
    fixed = set.intersection(*(set(_ints(row["input_ids"])) for row in models)) if len(models) > 1 else set()
    drawn = np.setdiff1d(np.arange(vocabulary), sorted(fixed))
    label = next((name for name in ("labels", "label") if name in models[0]), None)
    seen = [_labels(row[label]) for row in models] if label else []
    choices = sorted({value for row in seen for value in row if value != IGNORE})

    def canary(index: int) -> Row:
        model = models[index % len(models)]
        old = _ints(model["input_ids"])
        ids = [token if token in fixed else int(generator.choice(drawn)) for token in old]
        row = {**model, "input_ids": ids}
        if label:
            row[label] = _new_labels(model[label], old, ids)
        return row

    def _new_labels(labels: Any, old: list[int], ids: list[int]) -> Any:
        if np.ndim(labels) == 0:
            return choices[generator.integers(len(choices))]
        values = _labels(labels)
        if len(values) == len(old) and all(value in (IGNORE, token) for value, token in zip(values, old, strict=True)):
            return [value if value == IGNORE else token for value, token in zip(values, ids, strict=True)]
        return [value if value == IGNORE else choices[generator.integers(len(choices))] for value in values]

    return [canary(i) for i in range(count)]


def _newcomers(users: Sequence[Any], count: int) -> list[Any]:
    """`count` different ids that none of `users` has: strings if all of theirs are, else integers."""
    if all(isinstance(user, str) for user in users):
        longest = max(users, key=len)
        return [f"{longest}-canary-{number}" for number in range(count)]
    numbers = (int(user) for user in users if isinstance(user, (int, np.integer, Tensor)))
    first = 1 + max(numbers, default=0)
    return list(range(first, first + count))


def _ints(tokens: Any) -> list[int]:
    return [int(token) for token in tokens]


def _labels(value: Any) -> list[Any]:
    return list(np.atleast_1d(np.asarray(value)).tolist())
