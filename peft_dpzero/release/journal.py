"""The journal: every release, on disk before it is used.

One JSON line an entry: step, learning rates, direction seed, the released values, and a SHA-256 that chains it to the
line before. Everything in it is public. A header line opens each segment of the run: the settings that its releases
were made with. The journal lives beside the checkpoints, so that going back to a checkpoint forgets no release: the
entries after it are applied again instead of being released again.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from peft_dpzero.errors import DPZeroError
from peft_dpzero.release.files import lock, sync_folder

JOURNAL_NAME = "dpzero_journal"


@dataclass(frozen=True)
class JournalEntry:
    """One release.

    Attributes:
        step: its number in the whole run.
        learning_rates: one for each group of the optimizer, or a single one for all.
        direction_seed: the public seed of its directions.
        values: all that the step released: integers, or floats if nothing is clipped.
    """

    step: int
    learning_rates: tuple[float, ...]
    direction_seed: int
    values: tuple[float, ...]


@dataclass(frozen=True)
class JournalSegment:
    """A header, and the entries that were released under it."""

    header: dict[str, Any]
    entries: list[JournalEntry] = field(default_factory=list)


@dataclass
class JournalContent:
    """What a journal's bytes hold, as far as they verify.

    Attributes:
        segments: in order.
        checksum: that of the last whole line; it covers all lines before it.
        size: bytes in whole lines; what follows is a torn last line.
        count: entries.
        header_sizes: bytes before each header.
        checksums: the checksum before each header.
    """

    segments: list[JournalSegment] = field(default_factory=list)
    checksum: str = ""
    size: int = 0
    count: int = 0
    header_sizes: list[int] = field(default_factory=list)
    checksums: list[str] = field(default_factory=list)

    @property
    def entries(self) -> list[JournalEntry]:
        """The entries of all segments."""
        return [entry for segment in self.segments for entry in segment.entries]

    def add(self, content: dict[str, Any], line: bytes) -> None:
        """Takes in the next line."""
        if "header" in content:
            self.header_sizes.append(self.size)
            self.checksums.append(self.checksum)
            self.segments.append(JournalSegment(content["header"]))
        else:
            self.segments[-1].entries.append(_entry(content))
            self.count += 1
        self.checksum = _chained(self.checksum, content)
        self.size += len(line)

    def drop_last_segment(self) -> None:
        """Forgets the last header, under which nothing was released."""
        self.segments.pop()
        self.size, self.checksum = self.header_sizes.pop(), self.checksums.pop()


def read_journal(path: Path) -> JournalContent:
    """Reads and checks a journal, without changing it.

    Raises:
        DPZeroError: the file cannot be read, or a line is damaged, torn, missing or out of order.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise DPZeroError(f"{path} cannot be read: {error.strerror}.") from None
    content = _parsed(data, path)
    if content.size < len(data) or not content.segments:
        raise DPZeroError(f"{path} ends in a torn line: it is not the journal of a finished run.")
    return content


class Journal:
    """An append-only file of releases, which one process writes.

    Args:
        path: the file; its folder must exist.
        header: see `begin`, which is called with it. None reads what is there and creates nothing.

    Raises:
        DPZeroError: another process writes this file, it belongs to another run, or it is damaged other than by a
            torn last line, which is dropped: the process died while it wrote it, so that release was never used.
    """

    def __init__(self, path: Path, header: dict[str, Any] | None = None) -> None:
        self.path = path
        self._file: int | None = None
        self._read = JournalContent()
        self._in_doubt = False
        if path.exists():
            self._open()
        if header is not None:
            self.begin(header)

    @property
    def segments(self) -> list[JournalSegment]:
        """The run's segments, in order."""
        return self._content.segments

    @property
    def entries(self) -> list[JournalEntry]:
        """Every release of the run, in order."""
        return self._content.entries

    @property
    def checksum(self) -> str:
        """SHA-256 of the last line, which covers the whole file."""
        return self._content.checksum

    @property
    def _content(self) -> JournalContent:
        """What the file holds: read again if an append was interrupted, since its line may be whole by then."""
        if self._in_doubt:
            self._read = _parsed(self.path.read_bytes(), self.path)
            if self._file is not None:
                self._truncate()
            self._in_doubt = False
        return self._read

    def lock(self) -> None:
        """Keeps other processes from the file, and makes it if there is none.

        Raises:
            DPZeroError: another process has it, or has begun a run in it since it was looked for.
        """
        if self._file is not None:
            return
        self._open()
        if self.entries:
            self.close()
            raise DPZeroError(f"{self.path} was begun by another process meanwhile: use another output_dir.")

    def begin(self, header: dict[str, Any]) -> None:
        """Goes on with the segment of `header`, or opens it.

        Args:
            header: from `plan_header`. A header under which nothing was released is replaced.

        Raises:
            DPZeroError: the file belongs to a run with other settings.
        """
        header = json.loads(json.dumps(header))
        if self._file is None:
            self._open()
        try:
            self._begin(header)
        except DPZeroError:
            self.close()
            raise

    def _begin(self, header: dict[str, Any]) -> None:
        segments = self.segments
        while segments and not segments[-1].entries and segments[-1].header != header:
            self._content.drop_last_segment()
            self._truncate()
        if segments and segments[-1].header == header:
            return
        if segments and not (
            header.get("first_step") == self._content.count and continues(segments[-1].header, header)
        ):
            raise DPZeroError(
                f"{self.path} belongs to a run with other settings ({_differences(segments[-1].header, header)}): use "
                "another output_dir, or resume with the settings of that run."
            )
        self._append({"header": header})

    def record(self, step: int, learning_rates: Sequence[float], direction_seed: int, values: Sequence[float]) -> None:
        """Appends a release and returns when it is on disk.

        Raises:
            RuntimeError: `step` is not the next one, or the journal is closed.
        """
        if step != self._content.count:
            raise RuntimeError(f"Step {step} cannot be released: the journal is at step {self._content.count}.")
        rates = list(learning_rates)
        rate = rates[0] if len(set(rates)) == 1 else rates
        self._append({"step": step, "lr": rate, "seed": direction_seed, "values": list(values)})

    def close(self) -> None:
        """Lets other processes write the file. What was read and written stays readable here."""
        if self._file is None:
            return
        try:
            # The torn end of an interrupted append is dropped while the file can be written.
            with contextlib.suppress(OSError, DPZeroError):
                _ = self._content
        finally:
            os.close(self._file)
            self._file = None

    def __del__(self) -> None:
        if getattr(self, "_file", None) is not None:
            self.close()

    def _open(self) -> None:
        new = not self.path.exists()
        self._file = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND | getattr(os, "O_BINARY", 0), 0o644)
        try:
            lock(self._file, self.path)
            if new:
                sync_folder(self.path.parent)
            self._read = _parsed(self.path.read_bytes(), self.path)
            self._truncate()
        except DPZeroError:
            self.close()
            raise

    def _truncate(self) -> None:
        assert self._file is not None
        if os.fstat(self._file).st_size > self._read.size:
            os.ftruncate(self._file, self._read.size)
            os.fsync(self._file)

    def _append(self, content: dict[str, Any]) -> None:
        if self._file is None:
            raise RuntimeError(f"{self.path} is closed: nothing can be released.")
        checksum = _chained(self._content.checksum, content)
        line = (json.dumps({**content, "sha256": checksum}) + "\n").encode()
        self._in_doubt = True
        written = 0
        while written < len(line):
            written += os.write(self._file, line[written:])
        os.fsync(self._file)
        self._read.add(content, line)
        self._in_doubt = False


def _parsed(data: bytes, path: Path) -> JournalContent:
    content = JournalContent()
    for number, line, is_last in _lines(data):
        parsed = _verified(line, content.checksum)
        if parsed is None:
            # A power cut can leave part of the last line as NULs, which JSON never holds.
            if is_last and (not line.endswith(b"\n") or b"\0" in line):
                return content
            raise DPZeroError(f"{path} is damaged at line {number}: restore it from a copy.")
        if ("header" not in parsed and not content.segments) or parsed.get("step", content.count) != content.count:
            raise DPZeroError(f"{path} is damaged at line {number}: an entry is missing before it.")
        content.add(parsed, line)
    return content


def _lines(data: bytes) -> Iterator[tuple[int, bytes, bool]]:
    lines = data.split(b"\n")
    whole = [line + b"\n" for line in lines[:-1]] + ([lines[-1]] if lines[-1] else [])
    for number, line in enumerate(whole, start=1):
        yield number, line, number == len(whole)


def _verified(line: bytes, previous: str) -> dict[str, Any] | None:
    try:
        content = json.loads(line)
        checksum = content.pop("sha256")
        if "header" not in content:
            _entry(content)
    except (ValueError, KeyError, TypeError, AttributeError):
        return None
    return content if line.endswith(b"\n") and checksum == _chained(previous, content) else None


def _entry(content: dict[str, Any]) -> JournalEntry:
    rate = content["lr"]
    rates = tuple(rate) if isinstance(rate, list) else (rate,)
    return JournalEntry(content["step"], rates, content["seed"], tuple(content["values"]))


def _chained(previous: str, content: dict[str, Any]) -> str:
    return hashlib.sha256((previous + json.dumps(content, sort_keys=True)).encode()).hexdigest()


# What may change from one segment of a run to the next.
_PER_SEGMENT = ("steps", "first_step", "sample_rate", "expected_batch_size", "loss_interval", "requested")
_PER_SEGMENT_CONFIG = ("noise_multiplier", "target_epsilon")


def continues(before: dict[str, Any], after: dict[str, Any]) -> bool:
    """Whether a segment with the header `after` may follow one with `before`: more steps with all else unchanged."""
    return _fixed(before) == _fixed(after) and after["steps"] > before["steps"]


def _fixed(header: dict[str, Any]) -> dict[str, Any]:
    fixed = {key: value for key, value in header.items() if key not in _PER_SEGMENT}
    fixed["config"] = {k: v for k, v in header.get("config", {}).items() if k not in _PER_SEGMENT_CONFIG}
    return fixed


def _differences(before: dict[str, Any], after: dict[str, Any]) -> str:
    names = []
    for key in sorted({*before, *after}):
        old, new = before.get(key), after.get(key)
        if isinstance(old, dict) and isinstance(new, dict):
            names += [f"{key}.{k}" for k in sorted({*old, *new}) if old.get(k) != new.get(k)]
        elif old != new:
            names.append(key)
    # What was requested shows in the config that was made of it, unless the result is the same.
    return ", ".join([name for name in names if not name.startswith("requested.")] or names)
