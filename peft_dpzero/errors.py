"""Errors whose text is safe to show while private data is in hand."""

from __future__ import annotations

import traceback
from collections.abc import Iterator
from contextlib import contextmanager

# What an error of private data tells, since a single example may have caused it.
STOP_IS_PUBLIC = "That the run stopped is public, and the guarantee does not cover it."


class DPZeroError(ValueError):
    """A setting, data schema or model that cannot be trained privately. The text quotes no private value."""


class PrivateStepError(RuntimeError):
    """Some code failed while it held private data. The text names the error's type and place, no value.

    That it was raised may be one example's doing (a label out of range, a token that the model lacks): the guarantee
    covers what is released, not whether the run stopped.
    """

    @classmethod
    def withhold(cls, step: int, error: Exception) -> PrivateStepError:
        """Keeps of `error` only its type and the code lines it went through."""
        frames = traceback.extract_tb(error.__traceback__)[-4:]
        places = "".join(f"\n  {frame.filename}:{frame.lineno} in {frame.name}" for frame in frames)
        return cls(
            f"{type(error).__name__} in step {step}, while private data was in hand. Its message is withheld, since "
            f"it may quote the data; run the same code on made-up data to see it. {STOP_IS_PUBLIC} Raised at:{places}"
        )


@contextmanager
def withheld(doing: str) -> Iterator[None]:
    """Raises what fails inside without its message, which may quote the data."""
    try:
        yield
    except (DPZeroError, PrivateStepError):
        raise
    except Exception as error:
        frame = traceback.extract_tb(error.__traceback__)[-1]
        raise PrivateStepError(
            f"{type(error).__name__} while {doing}, at {frame.filename}:{frame.lineno}. Its message is withheld, since "
            f"it may quote the data; run the same settings on made-up data to see it. {STOP_IS_PUBLIC}"
        ) from None
