"""Files on disk: one that a process has to itself, and names that a power cut leaves."""

from __future__ import annotations

import errno
import os
from pathlib import Path

from peft_dpzero.errors import DPZeroError

try:
    import fcntl
except ImportError:  # not on this operating system
    fcntl = None  # type: ignore[assignment]

_UNLOCKABLE = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)


def lock(file: int, path: Path) -> None:
    """Keeps other processes from an open file, where the system can.

    Raises:
        DPZeroError: another process has it; `path` says which.
    """
    if fcntl is None:
        return
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise DPZeroError(f"Another process is writing {path}: end it, or use another output_dir.") from None
    except OSError as error:
        if error.errno not in _UNLOCKABLE:
            raise


def sync_folder(folder: Path) -> None:
    """Puts a new file's name on disk, where folders can be opened."""
    if os.name == "posix":
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
