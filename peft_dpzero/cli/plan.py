"""`peft-dpzero plan`: what an ε costs in noise, before anything is trained."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import track
from rich.table import Table

from peft_dpzero.config import DPZeroConfig
from peft_dpzero.errors import DPZeroError
from peft_dpzero.mechanism.accountant import COARSE_INTERVAL, Accountant
from peft_dpzero.mechanism.plan import PrivacyPlan, make_plan
from peft_dpzero.training.planning import steps_of


def default_delta(examples: int) -> float:
    """1 / (10 N), rounded down to one digit."""
    power = 10.0 ** math.floor(math.log10(0.1 / examples))
    return float(f"{math.floor(0.1 / examples / power + 1e-9) * power:.0e}")


def default_step_counts(steps: int) -> list[int]:
    """A quarter to four times `steps`."""
    return sorted({max(1, steps // 4), max(1, steps // 2), steps, 2 * steps, 4 * steps})


def numbers(text: str, kind: type[int] | type[float], option: str) -> list[float]:
    """The numbers above 0 in a comma-separated list.

    Raises:
        DPZeroError: names the option.
    """
    try:
        values = [kind(part) for part in text.split(",")]
    except ValueError:
        values = []
    if not values or not all(0 < value < math.inf for value in values):
        raise DPZeroError(f"{option} must be numbers above 0 with commas between, such as 1,2,4; got {text!r}.")
    return sorted(set(values))


def summary(plan: PrivacyPlan) -> Table:
    """The plan's numbers, the noise beside what it hides."""
    config, sigma, batch = plan.config, plan.noise_multiplier, plan.expected_batch_size
    bound, count = config.clipping_threshold, config.num_directions
    assert bound is not None, "the command has a default"
    assert count is not None
    table = Table(show_header=False)
    for name, value in (
        ("noise multiplier σ", f"{sigma:.4g}"),
        ("ε proven (PLD)", f"{plan.epsilon():.4f}"),
        ("δ", f"{config.target_delta:g}"),
        ("neighboring data sets", config.neighboring),
        ("steps T", f"{plan.steps:,} ({plan.steps * plan.sample_rate:.3g} epochs)"),
        ("sample rate q", f"{plan.sample_rate:.4g}"),
        ("batch B, expected", f"{batch:,} of {plan.num_units:,} examples"),
        ("clipping threshold C: an example's most in a sum", f"{bound:g}"),
        ("noise σC on each of a step's K sums", f"{sigma * bound:.4g}"),
        ("C / B: an example's most in the mean", f"{bound / batch:.4g}"),
        ("noise σC / B on the mean", f"{sigma * bound / batch:.4g}"),
        ("σ√K / B: noise over the largest possible sum", f"{noise_share(sigma, count, batch):.3g} (K = {count})"),
    ):
        table.add_row(name, value)
    return table


def noise_share(sigma: float, num_directions: int, batch: int) -> float:
    """σ√K / B: the noise's length over the length of the sum if every example agreed and reached C."""
    return sigma * math.sqrt(num_directions) / batch


class Choices:
    """σ for each of some ε and step counts, with everything else as in `plan`.

    Calibrated on the accountant's coarse grid, which is quick and can only overstate σ, by less than 1 %.
    """

    def __init__(self, plan: PrivacyPlan, epsilons: Sequence[float], step_counts: Sequence[int]) -> None:
        self.plan = plan
        self.epsilons = list(epsilons)
        self.step_counts = list(step_counts)
        self.sigmas: dict[tuple[float, int], float] = {}

    def __len__(self) -> int:
        return len(self.epsilons) * len(self.step_counts)

    def compute(self) -> Iterator[None]:
        """Fills the table, one cell an item."""
        accountant = Accountant.of(self.plan.config, COARSE_INTERVAL)
        for epsilon in self.epsilons:
            for steps in self.step_counts:
                self.sigmas[epsilon, steps] = accountant.noise_multiplier(epsilon, self.plan.sample_rate, steps)
                yield

    def table(self) -> Table:
        """Rows of ε, columns of steps; each cell σ and, in brackets, σ√K / B."""
        plan = self.plan
        table = Table(title="σ, and noise over the largest possible sum, by ε and steps")
        table.add_column("ε", justify="right")
        for steps in self.step_counts:
            table.add_column(f"{steps:,} steps", justify="right")
        for epsilon in self.epsilons:
            cells = []
            for steps in self.step_counts:
                sigma = self.sigmas[epsilon, steps]
                share = noise_share(sigma, plan.config.num_directions or 1, plan.expected_batch_size)
                cells.append(f"{sigma:.3g} ({share:.0%})")
            table.add_row(f"{epsilon:g}", *cells)
        return table


def plan_command(
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
        steps = steps_of(epochs, examples, batch_size)
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
