"""The start, as it is."""

from __future__ import annotations

from typing import Any

from .base import Outcome


def zero_shot(*_: Any, **__: Any) -> Outcome:
    return Outcome()
