"""`peft-dpzero audit`: a run of `train` with canaries in its data, and what an attacker would learn from it."""

from __future__ import annotations

import contextlib
import json
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from peft_dpzero.auditing.one_run import AddCanaries, AuditResult, audit
from peft_dpzero.cli.settings import read_settings
from peft_dpzero.cli.train import TrainingRun
from peft_dpzero.errors import DPZeroError, withheld
from peft_dpzero.modules import module_from

SCRIPT_FUNCTION = "build_trainer"


def audit_command(
    run: Annotated[Path, typer.Argument(help="YAML as for train, or a .py file that defines build_trainer.")],
    canaries: Annotated[int, typer.Option("--canaries", "-m", min=4, help="Made-up examples.")] = 200,
    guesses: Annotated[
        int | None, typer.Option("--guesses", min=2, help="Coins to guess; half of the canaries by default.")
    ] = None,
    confidence: Annotated[float, typer.Option(help="Probability that the lower bound holds.")] = 0.95,
    as_json: Annotated[bool, typer.Option("--json", help="Prints JSON instead of a table.")] = False,
) -> None:
    """Trains once with canaries and prints the ε that guessing them proves, beside the claim. Spends the run's ε."""
    if not 0 < confidence < 1:
        raise DPZeroError(f"--confidence must lie strictly between 0 and 1, got {confidence}.")
    # What a Trainer prints must not mix with the result.
    with contextlib.redirect_stdout(sys.stderr), tempfile.TemporaryDirectory() as folder:
        build = _from_script(run) if run.suffix == ".py" else _from_yaml(run, folder)
        with withheld("auditing"):
            result = audit(build, canaries, guesses=guesses, confidence=confidence)
    if as_json:
        print(json.dumps({**result.to_dict(), "warning": _warning(result)}, indent=2))
    else:
        console = Console()
        console.print(audit_table(result))
        console.print(_warning(result), highlight=False)


def audit_table(result: AuditResult) -> Table:
    """The lower bound beside the claim."""
    claim = "none: this run gives no privacy" if result.claimed_epsilon is None else f"{result.claimed_epsilon:.4g}"
    bound = f"{result.epsilon_lower_bound:.4g}" + (", above the claim" if result.refutes_claim else "")
    rows = {
        "ε claimed (PLD)": claim,
        f"ε at least, at {result.confidence:g} confidence": bound,
        "δ": f"{result.delta:g}",
        "steps": str(result.steps),
        "canaries": str(result.canaries),
        "guessed right": f"{result.correct} of {result.guesses}",
    }
    table = Table(show_header=False)
    for name, value in rows.items():
        table.add_row(name, value)
    return table


def _warning(result: AuditResult) -> str:
    spent = "unbounded ε" if result.claimed_epsilon is None else f"ε = {result.claimed_epsilon:.4g}"
    return (
        f"The audited run spent {spent} on the training data, on top of every other run's. Nothing of it was saved, "
        "and nothing of it may be released."
    )


def _from_yaml(path: Path, folder: str) -> Callable[[AddCanaries], Any]:
    settings = read_settings(path)
    settings.training.output_dir = folder
    settings.training.push_to_hub = False
    return TrainingRun(settings).trainer


def _from_script(path: Path) -> Callable[[AddCanaries], Any]:
    if not path.is_file():
        raise DPZeroError(f"There is no file {path}.")
    with withheld(f"running {path.name}"):
        module = module_from(path)
    build: Callable[[AddCanaries], Any] | None = getattr(module, SCRIPT_FUNCTION, None)
    if not callable(build):
        raise DPZeroError(f"{path.name} defines no function {SCRIPT_FUNCTION}(add_canaries); see docs/audit.md.")
    return build
