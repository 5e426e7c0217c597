"""The Trainer's checkpoints: which one a run goes on from."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from transformers.trainer_utils import get_last_checkpoint

from peft_dpzero.errors import DPZeroError
from peft_dpzero.release.digests import files_digest
from peft_dpzero.release.journal import JOURNAL_NAME, Journal
from peft_dpzero.release.record import RECORD_NAME


def checkpoint_to_resume(resume: str | bool | None, journal: Journal | None) -> str | None:
    """The checkpoint that a run goes on from; None for the run's start.

    Args:
        resume: as `Trainer.train` takes it: True for the newest whole one.
        journal: the run's, beside its checkpoints.

    Raises:
        DPZeroError: the checkpoint is of a later step than the journal, or the one that is named is not whole.
    """
    if not resume or journal is None:
        return None
    folder, steps = journal.path.parent, len(journal.entries)
    newest = Path(get_last_checkpoint(folder) or "") if resume is True and folder.is_dir() else Path(str(resume))
    # Without a journal, what the checkpoints cost is unknown.
    if (step := checkpoint_step(newest)) > steps:
        raise DPZeroError(
            f"The checkpoint is at step {step} but the journal holds {steps} releases, so the ε spent is unknown: "
            f"put {JOURNAL_NAME} of that run into output_dir."
        )
    if resume is True:
        return last_whole_checkpoint(folder)
    if not is_whole(newest):
        raise DPZeroError(f"{newest} is incomplete or damaged: pass resume_from_checkpoint=True for one that is not.")
    return str(newest)


def last_whole_checkpoint(folder: Path) -> str | None:
    """The newest checkpoint in `folder` that was written to its end; None if there is none."""
    steps = {checkpoint_step(path): path for path in folder.glob("checkpoint-*") if path.is_dir()}
    return next((str(steps[step]) for step in sorted(steps, reverse=True) if is_whole(steps[step])), None)


def is_whole(checkpoint: Path) -> bool:
    """Whether all of a checkpoint is there: its weights as its record has them, its optimizer, its state."""
    try:
        record = json.loads((checkpoint / RECORD_NAME).read_text(encoding="utf-8"))
        state = json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
        for name in ("optimizer.pt", "scheduler.pt"):
            torch.load(checkpoint / name, map_location="cpu", weights_only=True)
        weights = record["weights"]
        return bool(weights["step"] == state["global_step"] and weights["file_sha256"] == files_digest(checkpoint))
    except Exception:
        # However torn a file is, the answer is that it is not whole.
        return False


def checkpoint_step(checkpoint: Path) -> int:
    """The number of steps done at a folder named checkpoint-N; 0 for another name."""
    digits = checkpoint.name.rpartition("-")[2]
    return int(digits) if digits.isdigit() else 0
