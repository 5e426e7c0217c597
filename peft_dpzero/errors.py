"""Errors whose text is safe to show while private data is in hand."""

from __future__ import annotations

import logging
import traceback
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

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


@contextmanager
def quiet() -> Iterator[None]:
    """Within the block nothing is logged or warned of: libraries put rows' lengths and values into such lines."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


@contextmanager
def withheld(doing: str) -> Iterator[None]:
    """Raises what fails inside without its message, which may quote the data."""
    try:
        yield
    except (DPZeroError, PrivateStepError):
        raise
    except Exception as error:
        raise PrivateStepError.withhold(f"while {doing}", error) from None
