"""The journal against damage, crashes and other writers."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from peft_dpzero import DPZeroError
from peft_dpzero.release.journal import Journal, read_journal

HEADER = {"config": {"noise_multiplier": 1.0}, "steps": 6, "first_step": 0}


def written(path: Path, count: int = 4) -> Journal:
    journal = Journal(path, HEADER)
    for step in range(count):
        journal.record(step, (0.1, 0.1), 7, [step, -step])
    journal.close()
    return journal


def test_a_journal_is_read_back_and_goes_on(tmp_path: Path) -> None:
    path = tmp_path / "journal"
    entries = written(path).entries
    again = Journal(path, HEADER)
    assert again.entries == entries
    assert (entries[3].learning_rates, entries[3].direction_seed, entries[3].values) == ((0.1,), 7, (3, -3))
    again.record(4, (0.1, 0.2), 7, [9])
    assert again.entries[4].learning_rates == (0.1, 0.2)
    with pytest.raises(RuntimeError, match="Step 4"):
        again.record(4, (0.1,), 7, [9])
    again.close()
    with pytest.raises(RuntimeError, match="closed"):
        again.record(5, (0.1,), 7, [9])
    assert read_journal(path).checksum == again.checksum
    assert len(read_journal(path).entries) == 5


def test_every_torn_end_is_dropped_and_made_again(tmp_path: Path) -> None:
    path = tmp_path / "journal"
    written(path)
    whole = path.read_bytes()
    last = whole.rindex(b"\n", 0, -1) + 1
    for cut in range(last, len(whole)):
        for tail in (b"", b"\0" * 50, b"\0" * 20 + b"}\n"):
            path.write_bytes(whole[:cut] + tail)
            if cut + len(tail) > last:
                with pytest.raises(DPZeroError, match="torn line"):
                    read_journal(path)
            journal = Journal(path, HEADER)
            assert len(journal.entries) == 3
            journal.record(3, (0.1,), 7, [3, -3])
            journal.close()
            assert path.read_bytes() == whole


def test_a_death_before_the_first_release_leaves_no_trace(tmp_path: Path) -> None:
    path = tmp_path / "journal"
    for start in (b"", b'{"header": {"se', b"\0\0\0"):
        path.write_bytes(start)
        Journal(path, HEADER).close()
        assert len(path.read_bytes().splitlines()) == 1
    Journal(path, {**HEADER, "steps": 9}).close()
    assert [segment.header["steps"] for segment in read_journal(path).segments] == [9]


@pytest.mark.parametrize("where", ["before the line", "in the line", "after the line"])
def test_an_interrupted_append_counts_what_is_on_disk(
    where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "journal"
    journal = Journal(path, HEADER)
    journal.record(0, (0.1,), 7, [1])
    whole = {"write": os.write, "fsync": os.fsync}

    def interrupted(file: int, line: bytes = b"") -> int:
        if where == "in the line":
            whole["write"](file, line[:20])
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync" if where == "after the line" else "write", interrupted)
        with pytest.raises(KeyboardInterrupt):
            journal.record(1, (0.1,), 7, [2])
    made = 2 if where == "after the line" else 1
    assert len(journal.entries) == path.read_bytes().count(b'"step"') == made
    journal.record(made, (0.1,), 7, [3])
    journal.close()
    assert [entry.values for entry in read_journal(path).entries] == [*[(1,), (2,)][:made], (3,)]


def damaged(lines: list[bytes]) -> dict[str, list[bytes]]:
    return {
        "an entry changed": [*lines[:2], lines[2].replace(b"0.1", b"0.2"), *lines[3:]],
        "the last entry changed": [*lines[:-1], lines[-1].replace(b"0.1", b"0.2")],
        "the last line is no JSON": [*lines[:-1], b"{" + lines[-1]],
        "the last line is no entry": [*lines[:-1], b"{}\n"],
        "an entry removed": [*lines[:2], *lines[3:]],
        "two entries swapped": [lines[0], lines[2], lines[1], *lines[3:]],
        "the header removed": lines[1:],
        "the header changed": [lines[0].replace(b"1.0", b"9.0"), *lines[1:]],
        "an entry repeated": [*lines, lines[-1]],
    }


def rechained(lines: list[dict[str, Any]]) -> bytes:
    """A journal whose chain somebody computed anew."""
    checksum, out = "", b""
    for line in lines:
        content = {key: value for key, value in line.items() if key != "sha256"}
        checksum = hashlib.sha256((checksum + json.dumps(content, sort_keys=True)).encode()).hexdigest()
        out += (json.dumps({**content, "sha256": checksum}) + "\n").encode()
    return out


def test_damage_is_an_error_and_changes_nothing(tmp_path: Path) -> None:
    path = tmp_path / "journal"
    written(path)
    lines = path.read_bytes().splitlines(keepends=True)
    for what, changed in damaged(lines).items():
        path.write_bytes(b"".join(changed))
        for read in (lambda: Journal(path, HEADER), lambda: read_journal(path)):
            with pytest.raises(DPZeroError, match="damaged at line"):
                read()
        assert path.read_bytes() == b"".join(changed), what
    parsed = [json.loads(line) for line in lines]
    path.write_bytes(rechained(parsed))
    assert read_journal(path).entries
    path.write_bytes(rechained([*parsed[:2], *parsed[3:]]))
    with pytest.raises(DPZeroError, match="missing before"):
        read_journal(path)


def test_other_runs_are_refused_by_the_name_of_what_differs(tmp_path: Path) -> None:
    path = tmp_path / "journal"
    written(path)
    for other, name in (
        ({**HEADER, "config": {"noise_multiplier": 2.0}}, "config.noise_multiplier"),
        ({**HEADER, "steps": 3}, "steps"),
        ({**HEADER, "config": {"noise_multiplier": 1.0, "seed": 2}, "first_step": 4, "steps": 9}, "config.seed"),
    ):
        with pytest.raises(DPZeroError, match=rf"other settings \(.*{name}"):
            Journal(path, other)


def test_a_longer_run_opens_a_segment(tmp_path: Path) -> None:
    path = tmp_path / "journal"
    written(path)
    more = {"config": {"noise_multiplier": 3.0}, "steps": 9, "first_step": 4}
    journal = Journal(path, more)
    journal.record(4, (0.1,), 7, [5])
    journal.close()
    assert [len(segment.entries) for segment in read_journal(path).segments] == [4, 1]
    assert [entry.step for entry in Journal(path, more).entries] == list(range(5))


@pytest.mark.slow
def test_one_process_writes_a_journal(tmp_path: Path) -> None:
    path = tmp_path / "journal"
    journal = Journal(path, HEADER)
    program = "import sys, pathlib; from peft_dpzero.release.journal import Journal; Journal(pathlib.Path(sys.argv[1]))"
    command = [sys.executable, "-c", program, str(path)]
    other = subprocess.run(command, capture_output=True, text=True, check=False)
    assert "Another process is writing" in other.stderr
    journal.record(0, (0.1,), 7, [1])
    journal.close()
    assert subprocess.run(command, check=False).returncode == 0
