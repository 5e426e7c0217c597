"""`peft-dpzero verify` and `peft-dpzero replay`."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from peft_dpzero.errors import DPZeroError
from peft_dpzero.release.base import load_start_model
from peft_dpzero.release.bundle import fetch_release, is_released
from peft_dpzero.release.digests import is_weights
from peft_dpzero.release.evidence import Check
from peft_dpzero.release.journal import JOURNAL_NAME, read_journal
from peft_dpzero.release.record import RECORD_NAME
from peft_dpzero.release.replay import replay_journal
from peft_dpzero.release.verify import verify

_STYLES = {"ok": "green", "FAILED": "bold red", "skipped": "dim"}


ModelClass = Annotated[
    str | None,
    typer.Option(
        "--model-class", help="module:Class or file.py:Class, if transformers does not have the base's class."
    ),
]


def verify_command(
    release: Annotated[str, typer.Argument(help="A release: a folder, or a name on the Hub.")],
    base: Annotated[
        str | None, typer.Option(help="The base model's folder or Hub name: the journal is replayed.")
    ] = None,
    model_class: ModelClass = None,
    tolerance: Annotated[
        float, typer.Option(min=0, help="How far replayed weights may lie from the saved ones, relative.")
    ] = 0.0,
) -> None:
    """Checks a release against itself, and with --base its weights. Exit status 1 if a check fails."""
    console = Console()
    with Console(stderr=True).status("Checking"):
        checks = verify(release, base, model_class, tolerance)
    console.print(checks_table(checks))
    failed = [check.name for check in checks if check.status == "FAILED"]
    console.print(f"FAILED: {', '.join(failed)}" if failed else verdict(checks), highlight=False)
    raise typer.Exit(bool(failed))


def verdict(checks: Sequence[Check]) -> str:
    """What follows if no check failed, and what does not."""
    passed = {check.name for check in checks if check.status == "ok"}
    found = ["the files agree", "ε follows from the journal's settings"]
    if "scale" in passed:
        found.append("the released values have a plausible size")
    if "replay" in passed:
        found.append("the weights are a function of base, start and journal")
    else:
        found.append("whether the weights follow from the journal was not checked (give --base)")
    return (
        f"No check failed: {', '.join(found)}. Files cannot show that the code which ran drew its batches and noise as "
        "they say: a consistent forgery looks the same."
    )


def replay_command(
    base: Annotated[str, typer.Argument(help="The base model: a folder, or a name on the Hub.")],
    journal: Annotated[str, typer.Argument(help="The release with the journal: a folder, or a name on the Hub.")],
    out: Annotated[Path, typer.Argument(help="A new folder, for the adapter or the tuned model.")],
    model_class: ModelClass = None,
) -> None:
    """Makes a tuned model's weights from its base and its journal, without data."""
    steps = rebuild(base, journal, out, model_class)
    print(f"{steps} releases applied to {base}; saved in {out}")


def checks_table(checks: Sequence[Check]) -> Table:
    """One row a check."""
    table = Table()
    for column in ("check", "status", "what was found"):
        table.add_column(column, overflow="fold")
    for check in checks:
        table.add_row(check.name, f"[{_STYLES[check.status]}]{check.status}[/]", check.reason.replace("[", "\\["))
    return table


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
    folder, _ = fetch_release(Path(journal).parent if Path(journal).is_file() else journal)
    model = load_start_model(base, folder, model_class)
    steps = _steps(folder)
    replay_journal(model, folder, steps)
    out.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(out)  # type: ignore[operator]
    for path in folder.iterdir():
        if is_released(path.name) and not is_weights(path.name):
            shutil.copyfile(path, out / path.name)
    return steps


def _steps(folder: Path) -> int:
    """How many releases the weights are made of: all, unless training went back to its best checkpoint."""
    path = folder / RECORD_NAME
    record = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    count = record["weights"]["step"] if "weights" in record else len(read_journal(folder / JOURNAL_NAME).entries)
    return int(count)
