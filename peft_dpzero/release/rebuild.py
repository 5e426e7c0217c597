"""A release's weights, made from its base and its journal."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from peft_dpzero.errors import DPZeroError
from peft_dpzero.release.base_model import load_start_model
from peft_dpzero.release.bundle import fetch_release, is_released
from peft_dpzero.release.digests import is_weights
from peft_dpzero.release.journal import JOURNAL_NAME, read_journal
from peft_dpzero.release.record import RECORD_NAME
from peft_dpzero.release.replay import replay_journal


def rebuild(base: str, journal: str, out: Path, model_class: str | None) -> int:
    """Makes a release's weights from its base and its journal, and writes the whole release to `out`.

    Args:
        base: a folder or a Hub name.
        journal: a release's folder or Hub name.
        out: a folder that does not exist, or is empty.
        model_class: `module:Class` or `file.py:Class`, if transformers does not have the base's class.

    Returns: how many releases were applied.

    Raises:
        DPZeroError: `out` is in use, or base and journal do not fit.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise DPZeroError(f"{out} exists and is not an empty folder: name a new one.")
    folder, names = fetch_release(Path(journal).parent if Path(journal).is_file() else journal)
    model = load_start_model(base, folder, model_class)
    steps = _steps(folder)
    replay_journal(model, folder, steps)
    out.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(out)  # type: ignore[operator]
    for name in names:
        if is_released(name) and not is_weights(name):
            (out / name).parent.mkdir(exist_ok=True)
            shutil.copyfile(folder / name, out / name)
    return steps


def _steps(folder: Path) -> int:
    """How many releases the weights are made of: all, unless training went back to its best checkpoint."""
    path = folder / RECORD_NAME
    record = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    count = record["weights"]["step"] if "weights" in record else len(read_journal(folder / JOURNAL_NAME).entries)
    return int(count)
