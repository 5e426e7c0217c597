"""What a run needs to know and its user did not say: measured before training, without a private row."""

from __future__ import annotations

import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from itertools import cycle, islice
from typing import Any

from transformers import TrainingArguments

from peft_dpzero.checks.passes import Passes, TriedModel
from peft_dpzero.config import DEFAULT_DIRECTIONS, DPZeroConfig, SettledConfig
from peft_dpzero.errors import DPZeroError
from peft_dpzero.estimation.batching import LogicalBatches
from peft_dpzero.estimation.differences import estimate_differences
from peft_dpzero.estimation.losses import MicroBatch
from peft_dpzero.estimation.sampling import PoissonSampler, new_secret
from peft_dpzero.perturbation.perturbation import Perturbation
from peft_dpzero.public.scales import Pace, Seconds, Slopes, find_slopes, measure_seconds, rows_to_read
from peft_dpzero.public.settings import (
    BASIS_SIZES,
    ENOUGH_STEPS,
    FEWEST_STEPS,
    Choice,
    Settings,
    choose_sizes,
    clipping_threshold,
    learning_rate,
)
from peft_dpzero.release.journal import JournalSegment
from peft_dpzero.training.measured_rows import PUBLIC

# Rows whose slopes are read, and the part of the time that this may take, where there is a deadline.
_READ, _READ_AT_LEAST, _READING = 32, 4, 0.05
# A step is timed twice, as the first warms up, unless nothing is kept of rows, there are so few steps that each counts
# and it took no longer than this many times what was planned: something else may have run.
_SURPRISING = 1.3
# Runs of fewer steps have left a model worse than it was.
_FEW_STEPS = 20
# What steps take besides what was timed, and what is left for saving.
_RESERVE = 1.1
# The part of the time in which it is tried which rows may share a pass, at most.
_TRYING = 0.2


@dataclass(frozen=True)
class Sizes:
    """What a run's settings must suit.

    Attributes:
        num_units: N.
        rows_a_unit: how many rows a unit may have in a step.
        processes: among which rows are split.
        most_rows: rows that go through the model at once at most; None allows as many as a process draws.
        max_tokens: tokens that go through the model at once.
        batch: B, if the user gave it.
        steps: T, if the user gave it.
        learning_rate: η, if the user gave it.
        deadline: when training should be over, by `time.monotonic`; None leaves sizes to the user.
    """

    num_units: int
    rows_a_unit: int
    processes: int
    most_rows: int | None
    max_tokens: int | None
    batch: int | None
    steps: int | None = None
    learning_rate: float | None = None
    deadline: float | None = None


@dataclass(frozen=True)
class Measured:
    """What was found out before training.

    Attributes:
        settings: what was chosen of it.
        passes: how rows go through the model with that.
        slopes: how losses change along directions.
        choice: the sizes that time allows, and the variance that they give; None if time does not decide.
        seconds_a_step: measured with these sizes, if time decides.
    """

    settings: Settings
    passes: Passes
    slopes: Slopes
    choice: Choice | None = None
    seconds_a_step: float | None = None


@dataclass(frozen=True)
class Given:
    """What of the training arguments is not the default of their library's class, and so the user's word."""

    batch: int | None
    steps: int | None
    epochs: float | None
    learning_rate: float | None
    most_rows: int | None

    @classmethod
    def of(cls, args: TrainingArguments, optimizers: Any = None) -> Given:
        """Reads them; `optimizers` as passed to the Trainer."""
        libraries: Iterator[Any] = (
            kind for kind in type(args).__mro__ if kind.__module__.split(".")[0] in ("transformers", "trl")
        )
        default = {field.name: field.default for field in fields(next(libraries))}
        rows = args.per_device_train_batch_size
        asked = rows != default["per_device_train_batch_size"]
        batch = int(rows * args.gradient_accumulation_steps * args.world_size)
        own_rate = args.learning_rate != default["learning_rate"] or bool(optimizers and optimizers[0])
        return cls(
            batch if asked or args.gradient_accumulation_steps != 1 else None,
            args.max_steps if args.max_steps > 0 else None,
            args.num_train_epochs if args.num_train_epochs != default["num_train_epochs"] else None,
            args.learning_rate if own_rate else None,
            rows if asked else None,
        )


def settings_of(segments: Sequence[JournalSegment]) -> Settings | None:
    """What was chosen for the run that a journal is of; None if nothing was."""
    chosen = segments[0].header.get("chosen") if segments else None
    return None if chosen is None else Settings(**chosen)


def find_settings(
    tried: TriedModel,
    perturbation: Perturbation,
    config: DPZeroConfig,
    rows: Sequence[MicroBatch],
    source: str,
    sizes: Sizes,
) -> Measured:
    """Measures what `config` leaves open, and how rows go through the model with that.

    Args:
        tried: the model.
        perturbation: over it, where training starts.
        config: the user's.
        rows: micro-batches of one row each, public or made up.
        source: which of the two they are.
        sizes: of the run.

    Raises:
        DPZeroError: losses cannot be measured, or the time does not suffice.
    """
    losses = tried.passes.losses
    with _saying_what_to_give(source):
        seconds = None if sizes.deadline is None else measure_seconds(losses, _usual(rows), perturbation)
        read = _rows_to_read(rows, source, seconds, sizes.deadline)
        slopes = find_slopes(losses, read, perturbation, config)
    batch, directions = sizes.batch, config.known_directions
    choice = None
    if seconds is not None:
        choice = _choice(config.replace(difference=slopes.difference), seconds, perturbation, sizes)
        batch, directions = choice.expected_batch_size, choice.num_directions
        if choice.entries < perturbation.num_coordinates:
            perturbation = perturbation.narrowed(choice.entries)
            slopes = find_slopes(losses, read, perturbation, config.replace(difference=slopes.difference))
    basis_size = None if choice is None or perturbation.basis is None else choice.entries
    settled = config.settled(
        clipping_threshold=clipping_threshold(slopes, directions or DEFAULT_DIRECTIONS),
        smoothing_parameter=slopes.smoothing_parameter,
        difference=slopes.difference,
        num_directions=directions,
        basis_size=basis_size,
    )
    assert batch is not None, "it is the user's unless time decides"
    expected = batch / sizes.processes * sizes.rows_a_unit
    usually = max(1, round(expected))
    passes = tried.passes_for(
        perturbation,
        settled,
        expected_rows=expected,
        most_rows=sizes.most_rows or usually,
        max_tokens=sizes.max_tokens,
        likely=[_tokens(row) for row in rows] if source == PUBLIC else (),
        until=None if sizes.deadline is None else time.monotonic() + _TRYING * _left(sizes.deadline),
    )
    steps, rate, once = sizes.steps, sizes.learning_rate, None
    if choice is not None:
        pace = _measured_pace(passes, perturbation, settled, rows, usually, choice)
        steps = steps or _steps(pace, sizes.deadline)
        once = pace.seconds(steps) / steps
        rate = rate or learning_rate(slopes.typical, steps, perturbation.basis is not None)
    chosen = Settings(
        source,
        clipping_threshold=settled.clipping_threshold if config.clipping_threshold is None else None,
        smoothing_parameter=settled.smoothing_parameter if config.smoothing_parameter is None else None,
        difference=settled.difference if config.difference is None else None,
        num_directions=settled.num_directions if config.known_directions is None else None,
        expected_batch_size=batch if sizes.batch is None else None,
        steps=steps if sizes.steps is None else None,
        learning_rate=rate if sizes.learning_rate is None else None,
        basis_size=basis_size if config.basis_size is None else None,
    )
    return Measured(chosen, passes, slopes, choice, once)


@contextmanager
def _saying_what_to_give(source: str) -> Iterator[None]:
    """Within the block, what cannot be measured is an error that says what to give in its place."""
    try:
        yield
    except DPZeroError:
        raise
    except Exception as error:  # A user's function may want labels that nobody can make up.
        raise DPZeroError(
            f"The loss cannot be measured on {source} ({type(error).__name__}): give clipping_threshold and "
            "smoothing_parameter."
        ) from error


def _rows_to_read(
    rows: Sequence[MicroBatch], source: str, seconds: Seconds | None, deadline: float | None
) -> Sequence[MicroBatch]:
    """Those whose slopes are read: a learning rate wants more than a threshold that follows the norms anyway."""
    if seconds is None or deadline is None:
        return rows[: _READ if source == PUBLIC else _READ_AT_LEAST]
    affordable = rows_to_read(seconds, _READING * _left(deadline))
    return rows[: min(_READ, max(affordable, _READ_AT_LEAST))]


def _choice(config: DPZeroConfig, seconds: Seconds, perturbation: Perturbation, sizes: Sizes) -> Choice:
    """The sizes for the time that trying shapes leaves."""
    assert sizes.deadline is not None
    return choose_sizes(
        config,
        seconds,
        num_units=sizes.num_units,
        entries=_coordinates(config, perturbation),
        budget=(1 - _TRYING) * _left(sizes.deadline) / _RESERVE,
        processes=sizes.processes,
        batch=sizes.batch,
        steps=sizes.steps,
    )


def _steps(pace: Pace, deadline: float | None) -> int:
    """T that the time allows."""
    assert deadline is not None
    steps = max(FEWEST_STEPS, pace.steps(_left(deadline) / _RESERVE))
    if steps < _FEW_STEPS:
        warnings.warn(
            f"{steps} steps are all that `minutes` allow: noise may outweigh what so few teach, and leave the model "
            "worse than it was. Give more minutes, or train fewer or higher layers.",
            stacklevel=3,
        )
    return steps


def _left(deadline: float) -> float:
    """Seconds until then."""
    return deadline - time.monotonic()


def _coordinates(config: DPZeroConfig, perturbation: Perturbation) -> Sequence[int]:
    """In how many coordinates directions may lie: in some of a basis's, if the user does not say."""
    found = perturbation.num_coordinates
    if perturbation.basis is None or config.basis_size is not None:
        return (found,)
    return (*(size for size in BASIS_SIZES if size < found), found)


def _measured_pace(
    passes: Passes,
    perturbation: Perturbation,
    config: SettledConfig,
    rows: Sequence[MicroBatch],
    count: int,
    choice: Choice,
) -> Pace:
    """Of steps with `count` rows, of which the first keeps what later ones read."""

    def seconds() -> float:
        return _seconds_a_step(passes, perturbation, config, rows, count)

    keeps = passes.losses.shortcuts.kept is not None
    first = seconds()
    once = not keeps and choice.steps < ENOUGH_STEPS and first <= _SURPRISING * choice.pace.first
    later = first if once else min(first, seconds())
    return replace(choice.pace, first=first if keeps else later, later=later)


def _seconds_a_step(
    passes: Passes, perturbation: Perturbation, config: SettledConfig, rows: Sequence[MicroBatch], count: int
) -> float:
    """Seconds in which a step reads `count` rows' losses."""
    dataset: Any = list(islice(cycle(rows), count))
    batches = LogicalBatches(dataset, PoissonSampler(count, 1.0, new_secret()), _only, passes.shapes)
    start = time.perf_counter()
    estimate_differences(
        passes.losses,
        batches.draw(0),
        perturbation,
        step=0,
        num_directions=config.num_directions,
        smoothing_parameter=config.smoothing_parameter,
        difference=config.difference,
    )
    return time.perf_counter() - start


def _only(rows: list[Any]) -> dict[str, Any]:
    return dict(rows[0])


def _usual(rows: Sequence[MicroBatch]) -> MicroBatch:
    """One of usual length."""
    return sorted(rows, key=_tokens)[len(rows) // 2]


def _tokens(row: MicroBatch) -> int:
    return max((value.numel() for value in row.values() if hasattr(value, "numel")), default=0)
