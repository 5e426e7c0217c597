"""The command line: `peft-dpzero plan`, `train`, `verify`, `replay` and `audit`.

Errors are one line; exit status 2 if the user can mend them, 1 if not, 130 after Ctrl-C.
"""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import Annotated

import typer
from accelerate import PartialState
from rich.console import Console
from rich.progress import track

from peft_dpzero.cli_audit import audit_command
from peft_dpzero.cli_plan import Choices, default_delta, default_step_counts, numbers, summary
from peft_dpzero.cli_settings import read_settings
from peft_dpzero.cli_train import TrainingRun
from peft_dpzero.cli_verify import replay_command, verify_command
from peft_dpzero.config import DPZeroConfig
from peft_dpzero.errors import DPZeroError
from peft_dpzero.mechanism.plan import make_plan

# What a shell reports of a process that Ctrl-C ended.
INTERRUPTED = 130

app = typer.Typer(
    name="peft-dpzero",
    help="Differentially private fine-tuning of Hugging Face models with forward passes only.",
    add_completion=False,
    rich_markup_mode=None,
)


app.command("audit")(audit_command)


@app.command()
def plan(
    examples: Annotated[int, typer.Option("--examples", "-n", min=1, help="Training examples, N.")],
    batch_size: Annotated[int, typer.Option("--batch-size", "-b", min=1, help="Expected batch, B.")] = 64,
    steps: Annotated[int | None, typer.Option("--steps", "-t", min=1, help="Steps, T.")] = None,
    epochs: Annotated[float | None, typer.Option("--epochs", help="Instead of --steps.")] = None,
    epsilon: Annotated[float, typer.Option("--epsilon", "-e", help="ε to spend over the run.")] = 2.0,
    delta: Annotated[
        float | None, typer.Option("--delta", "-d", help="δ; by default 1/(10 N), rounded down to one digit.")
    ] = None,
    clipping_threshold: Annotated[float, typer.Option(help="C.")] = 10.0,
    num_directions: Annotated[int, typer.Option(help="K, directions a step.")] = 16,
    neighboring: Annotated[str, typer.Option(help="add_or_remove_one or replace_one.")] = "add_or_remove_one",
    epsilons: Annotated[str, typer.Option(help="Rows of the table, with commas between.")] = "0.5,1,2,4,8",
    step_counts: Annotated[
        str, typer.Option(help="Columns of the table, with commas between; by default T/4 to 4T.", show_default=False)
    ] = "",
    table: Annotated[bool, typer.Option(help="Whether to show the table over ε and steps.")] = True,
) -> None:
    """Shows the noise that an ε needs, and a table to choose ε and steps from. Reads no data."""
    if (steps is None) == (epochs is None):
        raise DPZeroError("Give exactly one of --steps and --epochs.")
    if steps is None:
        assert epochs is not None
        if not 0 < epochs < math.inf:
            raise DPZeroError(f"--epochs must be a number above 0, got {epochs}.")
        steps = math.ceil(epochs * math.ceil(examples / batch_size))
    rows = numbers(epsilons, float, "--epsilons")
    columns = (
        [int(n) for n in numbers(step_counts, int, "--step-counts")] if step_counts else default_step_counts(steps)
    )
    config = DPZeroConfig(
        target_epsilon=epsilon,
        target_delta=default_delta(examples) if delta is None else delta,
        clipping_threshold=clipping_threshold,
        num_directions=num_directions,
        neighboring=neighboring,
    )
    if batch_size > examples:
        raise DPZeroError(f"--batch-size {batch_size} is larger than --examples {examples}: lower it.")
    console, progress = Console(), Console(stderr=True)
    with progress.status("Calibrating the noise"):
        chosen = make_plan(config, examples, batch_size, steps)
    console.print(summary(chosen))
    if delta is None:
        console.print(f"δ is 1/(10 N), rounded down to one digit: {config.target_delta:g}. Set another with --delta.")
    if table:
        choices = Choices(chosen, rows, columns)
        for _ in track(choices.compute(), "Filling the table", len(choices), console=progress, transient=True):
            pass
        console.print(choices.table())


@app.command()
def train(
    config: Annotated[Path, typer.Argument(help="The run in YAML: model, task, data, adapter, dpzero, training.")],
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the last checkpoint in output_dir.")] = False,
) -> None:
    """Tunes a model privately as a YAML file says, saves it, and shows what it cost."""
    settings = read_settings(config)
    results = TrainingRun(settings, resume).train()
    if PartialState().is_main_process:
        console = Console()
        console.print(results)
        console.print(f"Saved in {settings.training.output_dir}", soft_wrap=True, highlight=False)


app.command("verify")(verify_command)
app.command("replay")(replay_command)


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
        hint = "; from a checkpoint, train --resume goes on and releases no step twice" if "train" in arguments else ""
        return _fail(f"interrupted{hint}", INTERRUPTED)
    return status


def _fail(message: str, status: int) -> int:
    print("peft-dpzero: " + " ".join(message.split()), file=sys.stderr)
    return status


if __name__ == "__main__":
    main()
