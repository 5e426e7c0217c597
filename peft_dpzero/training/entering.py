"""How a run enters its journal: as a new one, or as the one that is there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from peft_dpzero.errors import DPZeroError
from peft_dpzero.mechanism.plan import PrivacyPlan
from peft_dpzero.perturbation.perturbation import Perturbation
from peft_dpzero.release.header import in_version, plan_header
from peft_dpzero.release.journal import JOURNAL_NAME, Journal
from peft_dpzero.release.optimizer import DPZeroOptimizer
from peft_dpzero.release.start import copy_start, load_start, save_basis, save_start


def open_journal(folder: Path, resume: bool) -> Journal:
    """The journal in `folder`, locked.

    Raises:
        DPZeroError: it holds releases and the run does not `resume`, or another process has it.
    """
    path = folder / JOURNAL_NAME
    journal = Journal(path)
    if (made := len(journal.entries)) and not resume:
        journal.close()
        raise DPZeroError(
            f"{path} holds {made} releases of an earlier run on this data: call "
            "train(resume_from_checkpoint=True) to go on, or use another output_dir."
        )
    return journal


def enter_journal(
    journal: Journal,
    plan: PrivacyPlan,
    perturbation: Perturbation,
    optimizer: DPZeroOptimizer,
    chosen: dict[str, Any] | None,
    at_checkpoint: bool,
    frozen: dict[str, Any] | None = None,
) -> None:
    """Writes the header of the releases to come, or checks the one that is there.

    Args:
        journal: the run's.
        plan: of the releases to come.
        perturbation: over the model. Its adapter goes to the run's start.
        optimizer: what applies the releases.
        chosen: the settings that were chosen before training.
        at_checkpoint: whether a checkpoint will be loaded over that: its digest is not compared then.
        frozen: what the header says of frozen weights, if one process cannot read them; see `plan_header`.

    Raises:
        DPZeroError: the journal is of a run with other settings, or the start is not that run's.
    """
    folder = journal.path.parent
    folder.mkdir(parents=True, exist_ok=True)
    journal.lock()
    first = journal.segments[0].header if journal.entries else None
    start = None if first is None else str(first["start"])
    if start is None:
        save_start(perturbation, folder)
        save_basis(perturbation.basis, folder)
    elif at_checkpoint:
        copy_start(perturbation.model, perturbation.parameters, folder)
    else:
        load_start(perturbation, folder, start)
    header = plan_header(plan, perturbation, optimizer, start, chosen, frozen)
    journal.begin(header if first is None else in_version(header, first["format_version"]))
