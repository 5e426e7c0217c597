"""Memory that was freed and that the C library keeps."""

from __future__ import annotations

import ctypes
import sys
from functools import cache
from typing import Any


def return_freed_memory() -> None:
    """Gives freed pages back to the system, where the C library can (glibc).

    Passes of many shapes leave pieces of many sizes, which it would keep for the rest of the run.
    """
    if (trim := _trim()) is not None:
        trim(0)


@cache
def _trim() -> Any:
    return getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
