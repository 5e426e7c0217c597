"""Privacy units: whom an example belongs to."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from peft_dpzero.errors import DPZeroError


class Units:
    """The training rows of each privacy unit.

    Args:
        rows: for each unit, the indices of its rows: (m,) int64, m ≥ 1.
        max_examples: rows of one unit that a step reads at most.
    """

    def __init__(self, rows: Sequence[np.ndarray], max_examples: int) -> None:
        self._rows = list(rows)
        self.max_examples = max_examples

    def __len__(self) -> int:
        return len(self._rows)

    def fingerprint(self) -> str:
        """SHA-256 over whose each row is."""
        total = hashlib.sha256()
        for rows in self._rows:
            total.update(len(rows).to_bytes(8, "little") + rows.astype("<i8").tobytes())
        return total.hexdigest()

    def choose(self, unit: int, generator: np.random.Generator) -> np.ndarray:
        """The unit's rows, or `max_examples` of them at random."""
        rows = self._rows[unit]
        if rows.size <= self.max_examples:
            return rows
        return generator.choice(rows, self.max_examples, replace=False)


def units_by_column(dataset: Any, column: str, max_examples: int) -> Units:
    """Groups rows by the value of `column`: strings or integers.

    A data set that knows its values without handing out rows has a method `unit_values(column)`.

    Raises:
        DPZeroError: there is no such column, or a row has no value in it.
    """
    columns = getattr(dataset, "column_names", None)
    if columns is not None and column not in columns:
        raise DPZeroError(
            f"privacy_unit={column!r} is not a column of train_dataset (it has {', '.join(columns)}): name the column "
            "that says whose each example is."
        )
    rows: dict[Any, list[int]] = {}
    for index, value in enumerate(unit_values(dataset, column)):
        key = _key(value, column)
        rows.setdefault(key, []).append(index)
    return Units([np.array(indices) for indices in rows.values()], max_examples)


def unit_values(dataset: Any, column: str) -> Sequence[Any]:
    """Every row's value of `column`.

    Raises:
        DPZeroError: a row has none.
    """
    if hasattr(dataset, "unit_values"):
        return list(dataset.unit_values(column))
    if hasattr(dataset, "with_format"):
        return list(dataset.with_format(None)[column])
    try:
        return [dataset[index][column] for index in range(len(dataset))]
    except (KeyError, TypeError, IndexError):
        raise DPZeroError(
            f"privacy_unit={column!r} is missing from a row of train_dataset: every row needs it."
        ) from None


def _key(value: Any, column: str) -> Any:
    value = value.item() if hasattr(value, "item") else value
    if isinstance(value, bool) or not isinstance(value, (str, int)):
        raise DPZeroError(
            f"privacy_unit={column!r} holds a row whose value is null or neither a string nor an integer: everybody's "
            "examples must be named, or dropped, before training."
        )
    return value
