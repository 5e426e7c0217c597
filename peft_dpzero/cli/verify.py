"""`peft-dpzero verify` and `peft-dpzero replay`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from peft_dpzero.release.evidence import Check
from peft_dpzero.release.rebuild import rebuild
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
    release: Annotated[str, typer.Argument(help="What holds the journal: a folder, or a name on the Hub.")],
    out: Annotated[Path, typer.Argument(help="A new folder, for the adapter or the tuned model.")],
    model_class: ModelClass = None,
) -> None:
    """Makes a tuned model's weights from its base and its journal, without data."""
    steps = rebuild(base, release, out, model_class)
    print(f"{steps} steps' releases applied to {base}; saved in {out}")


def checks_table(checks: Sequence[Check]) -> Table:
    """One row a check."""
    table = Table()
    for column in ("check", "status", "what was found"):
        table.add_column(column, overflow="fold")
    for check in checks:
        table.add_row(check.name, f"[{_STYLES[check.status]}]{check.status}[/]", check.reason.replace("[", "\\["))
    return table
