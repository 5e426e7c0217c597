"""Errors whose text is safe to show while private data is in hand."""

from __future__ import annotations

import logging
import threading
import traceback
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

# What an error of private data tells, since a single example may have caused it.
STOP_IS_PUBLIC = "That the run stopped is public, and the guarantee does not cover it."


class DPZeroError(ValueError):
    """A setting, data schema or model that cannot be trained privately. The text quotes no private value."""


class TooLittleTime(DPZeroError):
    """`minutes` do not suffice for a run."""


class PrivateStepError(RuntimeError):
    """Some code failed while it held private data. The text names the error's type and place, no value.

    That it was raised may be one example's doing (a label out of range, a token that the model lacks): the guarantee
    covers what is released, not whether the run stopped.
    """

    @classmethod
    def withhold(cls, when: str, error: Exception) -> PrivateStepError:
        """Keeps of `error` only its type and the code lines it went through; `when` as "in step 3"."""
        frames = traceback.extract_tb(error.__traceback__)[-4:]
        places = "".join(f"\n  {frame.filename}:{frame.lineno} in {frame.name}" for frame in frames)
        return cls(
            f"{type(error).__name__} {when}, while private data was in hand. Its message is withheld, since "
            f"it may quote the data; run the same code on made-up data to see it. {STOP_IS_PUBLIC} Raised at:{places}"
        )


class _Quiet:
    """Nothing is logged and no warning shown in this process while some thread is in such a block.

    Filters of warnings stay as they are: a change would make all that was shown once be shown again.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._inside = 0
        self._before: tuple[int, Any] = 0, None

    def __enter__(self) -> None:
        with self._lock:
            if not self._inside:
                self._before = logging.root.manager.disable, warnings.showwarning
                logging.disable(logging.CRITICAL)
                warnings.showwarning = _nothing
            self._inside += 1

    def __exit__(self, *raised: object) -> None:
        with self._lock:
            self._inside -= 1
            if not self._inside:
                disabled, warnings.showwarning = self._before
                logging.disable(disabled)


def _nothing(*warning: object, **more: object) -> None:
    """Shows no warning."""


# Around what holds private rows: libraries put their lengths and values into logs and warnings.
quiet = _Quiet()


@contextmanager
def withheld(doing: str) -> Iterator[None]:
    """Raises what fails inside without its message, which may quote the data."""
    try:
        yield
    except (DPZeroError, PrivateStepError):
        raise
    except Exception as error:
        raise PrivateStepError.withhold(f"while {doing}", error) from None
