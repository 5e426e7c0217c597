"""The Trainer's progress bar, with what was spent and released at its end."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from transformers import ProgressCallback, TrainerCallback

# What the bar shows of a log entry, and under which name.
_SHOWN = {"epsilon": "ε", "loss": "loss", "clipping_threshold": "C"}


class SpendingProgress(ProgressCallback):  # type: ignore[misc]
    """As in the Trainer, with the last logged ε, released loss and adaptive threshold in the training bar."""

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """Takes over what a log entry has."""
        super().on_log(args, state, control, logs=logs, **kwargs)
        shown = {name: f"{logs[key]:.4g}" for key, name in _SHOWN.items() if key in (logs or {})}
        if self.training_bar is not None and shown:
            self.training_bar.set_postfix(shown)


def with_spending(callbacks: Iterable[TrainerCallback]) -> list[TrainerCallback]:
    """`callbacks` with the stock progress bar replaced; a bar of the user's own stays."""
    return [SpendingProgress() if type(callback) is ProgressCallback else callback for callback in callbacks]
