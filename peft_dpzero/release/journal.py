"""The journal: every release, on disk before it is used.

One JSON line an entry: step, learning rate, the K released values, and a SHA-256 that chains it to the entry
before. Everything in it is public. It lives beside the checkpoints, not in them, so that going back to a
checkpoint forgets no release: the entries after it are applied again instead of being released again.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peft_dpzero.errors import DPZeroError

JOURNAL_NAME = "dpzero_journal"


@dataclass(frozen=True)
class JournalEntry:
    """One release: its step, the learning rate it was applied with, and its K values."""

    step: int
    learning_rate: float
    values: tuple[float, ...]


class Journal:
    """An append-only file of releases.

    Args:
        path: the file; its folder must exist.
        header: public facts of the run (seed, K, σ, …); a file of another run is refused.

    Raises:
        DPZeroError: the file belongs to another run, or is damaged before its last line.
    """

    def __init__(self, path: Path, header: dict[str, Any]) -> None:
        self.path = path
        self.header = json.loads(json.dumps(header))
        self.entries: list[JournalEntry] = []
        self._checksum = ""
        if path.exists():
            self._read()
        if not self._checksum:
            path.write_bytes(b"")
            self._append({"header": self.header})

    def record(self, step: int, learning_rate: float, values: Sequence[float]) -> None:
        """Appends a release and returns when it is on disk.

        Raises:
            RuntimeError: `step` is not the next one.
        """
        if step != len(self.entries):
            raise RuntimeError(f"Step {step} cannot be released: the journal is at step {len(self.entries)}.")
        self._append({"step": step, "lr": learning_rate, "values": list(values)})
        self.entries.append(JournalEntry(step, learning_rate, tuple(values)))

    def _append(self, content: dict[str, Any]) -> None:
        self._checksum = _chained(self._checksum, content)
        line = json.dumps({**content, "sha256": self._checksum}) + "\n"
        with self.path.open("ab") as file:
            file.write(line.encode())
            file.flush()
            os.fsync(file.fileno())

    def _read(self) -> None:
        data = self.path.read_bytes()
        good = 0
        lines = data.splitlines(keepends=True)
        for number, line in enumerate(lines):
            content = self._verified(line)
            if content is None:
                if number < len(lines) - 1:
                    raise DPZeroError(f"{self.path} is damaged at line {number + 1}: restore it from a copy.")
                # The process died while it wrote this line, so the release was never used.
                with self.path.open("r+b") as file:
                    file.truncate(good)
                    os.fsync(file.fileno())
                return
            good += len(line)
            self._accept(content)

    def _verified(self, line: bytes) -> dict[str, Any] | None:
        try:
            content = json.loads(line)
            checksum = content.pop("sha256")
        except (ValueError, KeyError, AttributeError):
            return None
        return content if line.endswith(b"\n") and checksum == _chained(self._checksum, content) else None

    def _accept(self, content: dict[str, Any]) -> None:
        self._checksum = _chained(self._checksum, content)
        if "header" in content:
            if content["header"] != self.header:
                raise DPZeroError(
                    f"{self.path} belongs to a run with other settings: use another output_dir, or resume with the "
                    "settings of that run."
                )
            return
        self.entries.append(JournalEntry(content["step"], content["lr"], tuple(content["values"])))


def _chained(previous: str, content: dict[str, Any]) -> str:
    return hashlib.sha256((previous + json.dumps(content, sort_keys=True)).encode()).hexdigest()
