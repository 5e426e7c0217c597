"""What the parts of a private Trainer share."""

from __future__ import annotations

from typing import TYPE_CHECKING

from peft_dpzero.training.run import RunOnDisk

if TYPE_CHECKING:
    from transformers import Trainer as _Trainer
else:
    _Trainer = object


class Host(_Trainer):  # type: ignore[misc]
    """Stands before a Trainer, which type checkers take it for."""

    @property
    def run(self) -> RunOnDisk:
        """The private run."""
        raise NotImplementedError
