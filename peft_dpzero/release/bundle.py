"""A release as a folder: which files it may hold, and what binds its record to its journal and weights."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, snapshot_download

from peft_dpzero.config import CONFIG_NAME
from peft_dpzero.errors import DPZeroError
from peft_dpzero.perturbation.perturbation import Perturbation
from peft_dpzero.release.adapter import ADAPTER_CONFIG_NAME
from peft_dpzero.release.card import CARD_NAME
from peft_dpzero.release.digests import (
    ADAPTER_NAME,
    file_digest,
    file_names,
    files_digest,
    is_model_file,
    parameters_digest,
)
from peft_dpzero.release.journal import JOURNAL_NAME, Journal
from peft_dpzero.release.picture import PICTURE_NAME
from peft_dpzero.release.record import RECORD_NAME
from peft_dpzero.release.start import BASIS_NAME, START_NAME

# What tokenizers of transformers write.
_TOKENIZER = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "chat_template.jinja"),
    *("vocab.txt", "vocab.json", "merges.txt", "spiece.model", "tokenizer.model", "sentencepiece.bpe.model"),
)
# Those of a tokenizer that has several.
_TEMPLATE = re.compile(r"additional_chat_templates/[\w-]+\.jinja")
# What a push may upload, with a whole model's weights in one file or several.
_RELEASED = (
    ADAPTER_NAME,
    ADAPTER_CONFIG_NAME,
    "config.json",
    "generation_config.json",
    "model.safetensors.index.json",
    CONFIG_NAME,
    RECORD_NAME,
    CARD_NAME,
    PICTURE_NAME,
    JOURNAL_NAME,
    START_NAME,
    BASIS_NAME,
    *_TOKENIZER,
)
# What else may lie in a release's folder: figures on evaluation data, which is public, and the Hub's own.
_HARMLESS = ("metrics.json", ".gitattributes")
# What lies beside the journal while a run is going on.
EVIDENCE = (JOURNAL_NAME, START_NAME, BASIS_NAME)
_CHECKPOINT = re.compile(r"checkpoint-\d+")
# The record cannot hold its own hash, and the card may get a better text.
_BY_CONTENT = (RECORD_NAME, CARD_NAME)


def is_released(name: str) -> bool:
    """Whether a push may upload the file `name`, a path relative to the release's folder."""
    return name in _RELEASED or is_model_file(name) or _TEMPLATE.fullmatch(name) is not None


def is_tolerated(name: str) -> bool:
    """Whether a release's folder may hold the file `name`."""
    return is_released(name) or name in _HARMLESS


def is_hashed(name: str) -> bool:
    """Whether the record notes the hash of the file `name`."""
    return is_released(name) and name not in _BY_CONTENT


def copy_evidence(journal: Journal, folder: Path) -> None:
    """Puts a run's journal, and its start if it has one, into `folder`."""
    for name in EVIDENCE:
        source = journal.path.parent / name
        if source.exists() and folder.resolve() != source.parent.resolve():
            shutil.copyfile(source, folder / name)


def with_digests(
    record: dict[str, Any], folder: Path, journal: Journal, perturbation: Perturbation, step: int | None = None
) -> dict[str, Any]:
    """`record` with the hashes that bind it to a journal, to the weights and to the other files of the release.

    Args:
        record: from `privacy_record`.
        folder: where the model, its configuration and the journal were saved.
        journal: the run's.
        perturbation: over the trained model.
        step: how many releases the weights are made of; None for all.
    """
    names = filter(is_hashed, file_names(folder))
    return {
        **record,
        "journal": {"entries": len(journal.entries), "sha256": journal.checksum},
        "weights": {
            "step": len(journal.entries) if step is None else step,
            "parameters_sha256": parameters_digest(perturbation),
            "file_sha256": files_digest(folder),
        },
        "files": {name: file_digest(folder / name) for name in names},
    }


def fetch_release(name: str | Path) -> tuple[Path, list[str]]:
    """A release's folder, downloaded if `name` is a Hub name, and the names of all files that it holds.

    The checkpoints of a run that was made in the folder do not count.

    Files that do not belong in a release are named and not downloaded.

    Raises:
        DPZeroError: there is no such folder or repository.
    """
    folder = Path(name)
    if folder.is_dir():
        # A run's checkpoints may lie beside its release on its own machine; no push takes them.
        return folder, [name for name in file_names(folder) if not _CHECKPOINT.fullmatch(name.partition("/")[0])]
    try:
        files = HfApi().list_repo_files(str(name))
        return Path(snapshot_download(str(name), allow_patterns=_wanted(files))), sorted(files)
    except Exception as error:
        raise DPZeroError(
            f"{name} is neither a folder nor a repository on the Hub that can be read ({type(error).__name__})."
        ) from None


def _wanted(files: Iterable[str]) -> list[str]:
    """The names of a repository's files that belong in a release. They hold no wildcard, so each matches itself."""
    return [name for name in files if is_released(name)]
