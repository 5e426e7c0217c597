"""Which basis a run's directions lie in: its journal's, or for a new run one from public text."""

from __future__ import annotations

from collections.abc import Callable

from peft_dpzero.perturbation.basis import Basis
from peft_dpzero.processes import AcceleratedProcesses
from peft_dpzero.release.journal import Journal
from peft_dpzero.release.start import load_basis


def agreed_basis(
    journal: Journal | None, processes: AcceleratedProcesses, find: Callable[[], Basis] | None
) -> Basis | None:
    """The same basis on all processes, None for none.

    Args:
        journal: the run's, on the first process.
        processes: all of the run.
        find: makes a new run's basis; None for no basis.

    Raises:
        DPZeroError: the journal's basis is not in its folder.
    """

    def found() -> Basis | None:
        assert journal is not None
        if not journal.entries:
            return None if find is None else find()
        digest = journal.segments[0].header.get("basis")
        return load_basis(journal.path.parent, digest) if digest else None

    return processes.on_main(found)
