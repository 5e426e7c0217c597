"""Numbers as a card shows them: four significant digits, and never less than what is claimed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from decimal import ROUND_CEILING, Decimal
from typing import Any, TypeVar

DIGITS = 4
T = TypeVar("T")


def rounded_up(value: float) -> float:
    """The smallest number of so many significant digits that is not below `value`; an infinite one as it is.

    >>> rounded_up(1.99951234), rounded_up(2.0), rounded_up(1e-5)
    (2.0, 2.0, 1e-05)
    """
    if not math.isfinite(value):
        return value
    exact = Decimal(value)
    shown = Decimal(f"{value:.{DIGITS}g}")
    if shown < exact and float(shown) < value:
        shown = exact.quantize(Decimal(1).scaleb(exact.adjusted() - DIGITS + 1), ROUND_CEILING)
    return float(shown)


def thinned(values: Sequence[T], most: int) -> Sequence[T]:
    """At most so many of the values, evenly and with the last."""
    return values[::-1][:: -(-len(values) // most)][::-1]


def short(value: Any) -> Any:
    """A float in four significant digits; anything else as it is."""
    return float(f"{value:.{DIGITS}g}") if isinstance(value, float) else value
