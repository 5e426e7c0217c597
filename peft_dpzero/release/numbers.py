"""Numbers as a card shows them: four significant digits, and never less than what is claimed."""

from __future__ import annotations

import math
from decimal import ROUND_CEILING, Decimal
from typing import Any

DIGITS = 4


def rounded_up(value: float, digits: int = DIGITS) -> float:
    """The smallest number of so many significant digits that is not below `value`; an infinite one as it is.

    >>> rounded_up(1.99951234), rounded_up(2.0), rounded_up(1e-5)
    (2.0, 2.0, 1e-05)
    """
    if not math.isfinite(value):
        return value
    exact = Decimal(value)
    shown = Decimal(f"{value:.{digits}g}")
    if shown < exact and float(shown) < value:
        shown = exact.quantize(Decimal(1).scaleb(exact.adjusted() - digits + 1), ROUND_CEILING)
    return float(shown)


def short(value: Any) -> Any:
    """A float in four significant digits; anything else as it is."""
    return float(f"{value:.{DIGITS}g}") if isinstance(value, float) else value
