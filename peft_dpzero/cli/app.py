"""The command line: `peft-dpzero plan`, `tune`, `train`, `verify`, `replay` and `audit`.

Errors are one line; exit status 2 if the user can mend them, 1 if not, 130 after Ctrl-C.
"""

from __future__ import annotations

import sys
from importlib.metadata import version
from typing import Annotated

import typer

from peft_dpzero.cli.audit import audit_command
from peft_dpzero.cli.plan import plan_command
from peft_dpzero.cli.train import train_command
from peft_dpzero.cli.tune import tune_command
from peft_dpzero.cli.verify import replay_command, verify_command

# What a shell reports of a process that Ctrl-C ended.
INTERRUPTED = 130

app = typer.Typer(
    name="peft-dpzero",
    add_completion=False,
    rich_markup_mode=None,
)


def _show_version(asked: bool) -> None:
    if asked:
        print(f"peft-dpzero {version('peft_dpzero')}")
        raise typer.Exit


@app.callback()
def _options(
    show_version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Differentially private fine-tuning of Hugging Face models with forward passes only."""


for command in (plan_command, tune_command, train_command, verify_command, replay_command, audit_command):
    app.command(command.__name__.removesuffix("_command"))(command)


def main() -> None:
    """Runs the command line and ends the process."""
    sys.exit(run(sys.argv[1:]))


def run(arguments: list[str]) -> int:
    """Runs one command. Returns the exit status; every failure prints one line."""
    try:
        status = int(app(arguments or ["--help"], prog_name="peft-dpzero", standalone_mode=False) or 0)
    except (KeyboardInterrupt, typer.Abort):
        status = INTERRUPTED
    except Exception as error:
        # Usage errors of the option parser, whose class depends on typer's version.
        if hasattr(error, "format_message"):
            return _fail(f"{error.format_message()} (see --help)", 2)
        if isinstance(error, ValueError):
            return _fail(str(error), 2)
        return _fail(str(error) if isinstance(error, RuntimeError) else f"{type(error).__name__}: {error}", 1)
    if status == INTERRUPTED:
        hint = "; train --resume goes on and releases no step twice" if "train" in arguments else ""
        return _fail(f"interrupted{hint}", INTERRUPTED)
    return status


def _fail(message: str, status: int) -> int:
    print("peft-dpzero: " + " ".join(message.split()), file=sys.stderr)
    return status


if __name__ == "__main__":
    main()
