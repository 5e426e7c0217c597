"""A release is written beside its folder's files and put in place as a whole, so that what was written is known."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path

from peft_dpzero.release.card import CARD_NAME
from peft_dpzero.release.digests import file_names, is_model_file
from peft_dpzero.release.record import RECORD_NAME

_PREFIX = ".dpzero-unfinished-"
# Put in place last: until then the hashes of an older record do not fit the other files.
_LAST = (CARD_NAME, RECORD_NAME)


@contextmanager
def staging(folder: Path) -> Iterator[Path]:
    """A new folder in `folder`, gone after the block. What a process left there when it was killed goes first."""
    folder.mkdir(parents=True, exist_ok=True)
    for left in folder.glob(f"{_PREFIX}*"):
        shutil.rmtree(left, ignore_errors=True)
    with tempfile.TemporaryDirectory(prefix=_PREFIX, dir=folder) as staged:
        yield Path(staged)


def put_in_place(staged: Path, folder: Path, kept: Collection[str] = ()) -> tuple[str, ...]:
    """Moves what was written to `staged` into `folder`, each file at once.

    Parts of an older model that a new one does not overwrite are removed; other files of `folder` stay.

    Args:
        staged: from `staging`.
        folder: the release's folder.
        kept: files that `folder` has already and must keep, the same as in `staged`.

    Returns: the files' names, relative to the folder.
    """
    names = file_names(staged)
    names.sort(key=lambda name: _LAST.index(name) if name in _LAST else -1)
    if any(map(is_model_file, names)):
        for path in folder.iterdir():
            if is_model_file(path.name) and path.name not in names:
                path.unlink()
    for name in names:
        if name not in kept:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            os.replace(staged / name, folder / name)
    return tuple(names)
