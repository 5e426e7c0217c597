"""The Trainer's checkpoints: which one a run goes on from."""

from __future__ import annotations

import json
import re
from pathlib import Path

import torch
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, get_last_checkpoint

from peft_dpzero.errors import DPZeroError
from peft_dpzero.release.digests import files_digest
from peft_dpzero.release.journal import JOURNAL_NAME, Journal, read_journal
from peft_dpzero.release.record import RECORD_NAME

_NAME = re.compile(rf"{PREFIX_CHECKPOINT_DIR}-(\d+)")


def checkpoint_to_resume(resume: str | bool | None, journal: Journal | None) -> str | None:
    """The checkpoint that a run goes on from; None for the run's start.

    Args:
        resume: as `Trainer.train` takes it: True for the newest whole one.
        journal: the run's, beside its checkpoints.

    Raises:
        DPZeroError: the checkpoint is of a later step than the journal, or the one that is named is not whole, or of
            another run.
    """
    if not resume or journal is None:
        return None
    folder, steps = journal.path.parent, len(journal.entries)
    newest = str(resume) if resume is not True else get_last_checkpoint(folder) if folder.is_dir() else None
    # Without a journal, what the checkpoints cost is unknown.
    if newest is not None and (step := checkpoint_step(Path(newest))) > steps:
        raise DPZeroError(
            f"The checkpoint is at step {step} but the journal holds {steps} releases, so the ε spent is unknown: "
            f"put {JOURNAL_NAME} of that run into output_dir."
        )
    if resume is True:
        return _last_checkpoint(journal)
    assert newest is not None
    if not is_whole(Path(newest)):
        raise DPZeroError(f"{newest} is incomplete or damaged: pass resume_from_checkpoint=True for one that is not.")
    if not _is_of(Path(newest), journal):
        raise DPZeroError(
            f"{newest} is of another run than the journal in {folder}, which does not count its releases: resume it in "
            "its own output_dir."
        )
    return newest


def _last_checkpoint(journal: Journal) -> str | None:
    """The newest of the run's checkpoints that was written to its end; None if there is none."""
    folders = [path for path in journal.path.parent.glob(f"{PREFIX_CHECKPOINT_DIR}-*") if path.is_dir()]
    newest_first = sorted(folders, key=checkpoint_step, reverse=True)
    return next((str(path) for path in newest_first if is_whole(path) and _is_of(path, journal)), None)


def _is_of(checkpoint: Path, journal: Journal) -> bool:
    """Whether the journal's releases go on from those that were saved with the checkpoint."""
    try:
        made = read_journal(checkpoint / JOURNAL_NAME).entries
    except DPZeroError:
        return False
    return journal.entries[: len(made)] == made


def is_whole(checkpoint: Path) -> bool:
    """Whether all of a checkpoint is there: its weights as its record has them, its optimizer, its state."""
    try:
        record = json.loads((checkpoint / RECORD_NAME).read_text(encoding="utf-8"))
        state = json.loads((checkpoint / TRAINER_STATE_NAME).read_text(encoding="utf-8"))
        for name in ("optimizer.pt", "scheduler.pt"):
            torch.load(checkpoint / name, map_location="cpu", weights_only=True)
        weights = record["weights"]
        return bool(weights["step"] == state["global_step"] and weights["file_sha256"] == files_digest(checkpoint))
    except Exception:
        # However torn a file is, the answer is that it is not whole.
        return False


def checkpoint_step(checkpoint: Path) -> int:
    """The number of steps done at a checkpoint, by its state or its name; 0 if neither tells."""
    try:
        return int(json.loads((checkpoint / TRAINER_STATE_NAME).read_text(encoding="utf-8"))["global_step"])
    except (OSError, ValueError, KeyError, TypeError):
        named = _NAME.fullmatch(checkpoint.name)
        return int(named[1]) if named else 0
