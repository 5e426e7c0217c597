"""What verification looks at, and how it says what it found."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import nn

from peft_dpzero.release.base_model import load_start_model
from peft_dpzero.release.header import FORMAT_VERSION
from peft_dpzero.release.journal import JOURNAL_NAME, JournalContent, JournalSegment, read_journal
from peft_dpzero.release.ledger import record_of
from peft_dpzero.release.record import RECORD_NAME
from peft_dpzero.release.start import copy_start

OLDER = "made by an older version"


@dataclass(frozen=True)
class Check:
    """One thing that was checked.

    Attributes:
        name: what.
        status: "ok", "FAILED" or "skipped".
        reason: what was found, in words.
    """

    name: str
    status: str
    reason: str


class Failed(Exception):
    """A check that failed. The text is its reason."""


class Skipped(Exception):
    """A check that could not be made. The text is its reason."""


@dataclass
class Evidence:
    """A release, and the base if there is one. Files are read when a check first asks for them.

    Attributes:
        folder: the release's.
        files: the names of all that it holds.
        base: the base model or its name.
        model_class: its class, if transformers does not have it.
        tolerance: how far replayed weights may lie from the saved ones.
    """

    folder: Path
    files: Sequence[str]
    base: str | Path | nn.Module | None = None
    model_class: str | None = None
    tolerance: float = 0.0

    @cached_property
    def record(self) -> dict[str, Any]:
        """The record as it was released."""
        return self.json(RECORD_NAME)

    @cached_property
    def journal(self) -> JournalContent:
        """The journal, whose chain holds."""
        return read_journal(self.folder / JOURNAL_NAME)

    @cached_property
    def remade(self) -> dict[str, Any]:
        """The record as the journal gives it."""
        return record_of(self.journal.segments)

    @property
    def segments(self) -> list[JournalSegment]:
        """The journal's."""
        return self.journal.segments

    @property
    def header(self) -> dict[str, Any]:
        """The journal's last header: the settings that the release was saved with."""
        return self.segments[-1].header

    @property
    def is_older(self) -> bool:
        """Whether the journal has not all that this version writes."""
        return bool(self.segments[0].header["format_version"] < FORMAT_VERSION)

    @cached_property
    def model(self) -> nn.Module:
        """The base as it was before training, with the adapter that training began with if the release is one.

        Raises:
            Skipped: no base was given.
        """
        if self.base is None:
            raise Skipped("give --base")
        base = self.base
        model = base if isinstance(base, nn.Module) else load_start_model(base, self.folder, self.model_class)
        copy_start(model, [name for name, _, _ in self.segments[0].header["trainable"]], self.folder)
        return model

    def json(self, name: str) -> dict[str, Any]:
        """A JSON file of the release."""
        return dict(json.loads((self.folder / name).read_text(encoding="utf-8")))
