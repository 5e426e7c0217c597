"""A release as a folder: which files it may hold, and what binds its record to its journal and weights."""

from __future__ import annotations

import shutil
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, snapshot_download

from peft_dpzero.config import CONFIG_NAME
from peft_dpzero.errors import DPZeroError
from peft_dpzero.perturbation import Perturbation
from peft_dpzero.release.card import CARD_NAME
from peft_dpzero.release.digests import files_digest, parameters_digest
from peft_dpzero.release.journal import JOURNAL_NAME, Journal
from peft_dpzero.release.record import RECORD_NAME
from peft_dpzero.release.start import START_NAME

# All that a push may upload.
RELEASED_FILES = (
    "adapter_model.safetensors",
    "adapter_config.json",
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "model-*.safetensors",
    "model.safetensors.index.json",
    CONFIG_NAME,
    RECORD_NAME,
    CARD_NAME,
    JOURNAL_NAME,
    START_NAME,
)
# What else may lie in a release's folder: figures on evaluation data, which is public, and the Hub's own.
HARMLESS_FILES = ("metrics.json", ".gitattributes")


def is_released(name: str) -> bool:
    """Whether a release may hold the file `name`, a path relative to its folder."""
    return "/" not in name and any(fnmatch(name, pattern) for pattern in (*RELEASED_FILES, *HARMLESS_FILES))


def copy_evidence(journal: Journal, folder: Path) -> None:
    """Puts a run's journal, and its start if it has one, into `folder`."""
    for name in (JOURNAL_NAME, START_NAME):
        source = journal.path.parent / name
        if source.exists() and folder.resolve() != source.parent.resolve():
            shutil.copyfile(source, folder / name)


def sealed(
    record: dict[str, Any], folder: Path, journal: Journal, perturbation: Perturbation, step: int | None = None
) -> dict[str, Any]:
    """`record` with the hashes that bind it to a journal and to the weights.

    Args:
        record: from `privacy_record`.
        folder: where the model was saved.
        journal: the run's.
        perturbation: over the trained model.
        step: how many releases the weights are made of; None for all.
    """
    return {
        **record,
        "journal": {"entries": len(journal.entries), "sha256": journal.checksum},
        "weights": {
            "step": len(journal.entries) if step is None else step,
            "parameters_sha256": parameters_digest(perturbation),
            "file_sha256": files_digest(folder),
        },
    }


def fetch_release(name: str | Path) -> tuple[Path, list[str]]:
    """A release's folder, downloaded if `name` is a Hub name, and the names of all files that it holds.

    Files that do not belong in a release are named and not downloaded.

    Raises:
        DPZeroError: there is no such folder or repository.
    """
    folder = Path(name)
    if folder.is_dir():
        return folder, sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if not p.is_dir())
    try:
        files = HfApi().list_repo_files(str(name))
        return Path(snapshot_download(str(name), allow_patterns=list(RELEASED_FILES))), sorted(files)
    except Exception as error:
        raise DPZeroError(
            f"{name} is neither a folder nor a repository on the Hub that can be read ({type(error).__name__})."
        ) from None
