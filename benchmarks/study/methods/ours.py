"""`DPZeroTrainer`: with its defaults, without public text, without privacy, with K = 1 and as DP-AggZO.

DP-AggZO clips an example's vector (d_1 … d_K) / K to c; ours is clipped before the division, so that C = K·c. Apart
from that its step is ours with a fixed threshold and SGD, and it gets our passes, faster than those published.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from peft_dpzero import DPZeroConfig, DPZeroTrainer
from peft_dpzero.config import DEFAULT_BASIS_SIZE
from peft_dpzero.errors import TooLittleTime
from peft_dpzero.perturbation.basis import Basis
from peft_dpzero.public.scales import Seconds
from peft_dpzero.public.settings import choose_sizes, learning_rate
from peft_dpzero.release.journal import JOURNAL_NAME, read_journal
from peft_dpzero.release.start import load_basis
from transformers import TrainerCallback, TrainingArguments

from ..cells import DELTA
from ..clock import Clock
from ..models import LONGEST, Row, Start
from .base import DoesNotFit, Outcome, Train

# As published, with its code: rows a step, and how far parameters are moved.
PUBLISHED_ROWS, PUBLISHED_MOVE = 64, 1e-3


def ours(start: Start, clock: Clock, epsilon: float | None, seed: int, folder: Path, **settings: Any) -> Outcome:
    """All defaults: sizes and rates for the time, and a basis from public text."""
    return _chosen(start, clock, folder, {"public_text": start.public_text}, target_epsilon=epsilon)


def ours_without_public(
    start: Start, clock: Clock, epsilon: float | None, seed: int, folder: Path, **settings: Any
) -> Outcome:
    return _chosen(start, clock, folder, {}, target_epsilon=epsilon)


def ours_without_privacy(
    start: Start, clock: Clock, epsilon: float | None, seed: int, folder: Path, **settings: Any
) -> Outcome:
    """The same estimate with neither noise nor clipping."""
    nothing = {"noise_multiplier": 0.0, "clipping": "fixed", "clipping_threshold": math.inf}
    return _chosen(start, clock, folder, {"public_text": start.public_text}, **nothing)


class _InBasisOf(DPZeroTrainer):
    """Takes another run's basis in place of finding its own."""

    basis_in: Path

    def _found_basis(self, minutes: float | None) -> Basis:
        digest = read_journal(self.basis_in / JOURNAL_NAME).segments[0].header["basis"]
        return load_basis(self.basis_in, digest)


def ours_given(
    start: Start,
    clock: Clock,
    epsilon: float | None,
    seed: int,
    folder: Path,
    *,
    learning_rate: float,
    clipping_threshold: float,
    like: Mapping[str, Any],
    basis_in: Path,
) -> Outcome:
    """With η and a fixed C as they are given.

    Args:
        like: `Outcome.settings` of one of our runs, whose sizes, directions and λ are taken.
        basis_in: that run's folder.
    """
    names = ("num_directions", "difference", "smoothing_parameter")
    config = DPZeroConfig(
        target_epsilon=epsilon,
        target_delta=DELTA,
        max_length=LONGEST,
        clipping="fixed",
        clipping_threshold=clipping_threshold,
        **{name: like[name] for name in names},
    )
    arguments = {
        "max_steps": like["planned_steps"],
        "per_device_train_batch_size": like["batch"],
        "learning_rate": learning_rate,
    }
    public = {"public_text": start.public_text}
    trainer = _trainer(start, start.train, folder, config, arguments, kind=_InBasisOf, **public)
    trainer.basis_in = basis_in
    return _finished(trainer, clock)


def aggzo(num_directions: int) -> Train:
    """DP-AggZO with K directions."""
    return partial(_published, num_directions)


def dpzero(start: Start, clock: Clock, epsilon: float | None, seed: int, folder: Path, **settings: Any) -> Outcome:
    """One direction and SGD, as published; sampling, noise and accounting are ours."""
    return _published(1, start, clock, epsilon, seed, folder, **settings)


class Deadline(TrainerCallback):
    """Ends training after the step in which time ran out: what was not released costs nothing."""

    def __init__(self, clock: Clock) -> None:
        self.clock = clock

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_training_stop = control.should_training_stop or self.clock.is_over


def _trainer(
    start: Start,
    rows: list[Row],
    folder: Path,
    config: DPZeroConfig,
    arguments: Mapping[str, Any],
    kind: type[DPZeroTrainer] = DPZeroTrainer,
    **options: Any,
) -> DPZeroTrainer:
    return kind(
        model=start.model,
        args=TrainingArguments(
            str(folder),
            logging_strategy="no",
            save_strategy="no",
            report_to=[],
            use_cpu=True,
            disable_tqdm=True,
            **arguments,
        ),
        train_dataset=start.dataset(rows),
        data_collator=start.collate,
        processing_class=start.tokenizer,
        per_example_loss=start.loss,
        dpzero_config=config,
        **options,
    )


def _chosen(start: Start, clock: Clock, folder: Path, options: Mapping[str, Any], **config: Any) -> Outcome:
    """A run whose sizes are chosen for the budget."""
    settings = {"target_delta": DELTA, "max_length": LONGEST, "basis_size": start.size.basis} | config
    settings["smoothing_parameter"] = start.size.move
    with _fitting():
        if math.isfinite(clock.left):
            made = DPZeroConfig(**settings, minutes=clock.left / 60)
            trainer = _trainer(start, start.train, folder, made, {}, callbacks=[Deadline(clock)], **options)
        else:
            settings["basis_size"] = start.size.basis or DEFAULT_BASIS_SIZE
            trainer = _for_passes(start, clock, folder, options, DPZeroConfig(**settings))
        return _finished(trainer, clock)


def _for_passes(
    start: Start, clock: Clock, folder: Path, options: Mapping[str, Any], config: DPZeroConfig
) -> DPZeroTrainer:
    """Chooses sizes as for a time, where each pass of a row takes one unit of it and nothing else takes any."""
    assert clock.budget is not None
    noise = 1.0 if config.noise_multiplier is None else config.noise_multiplier
    tried = config.replace(target_epsilon=None, noise_multiplier=noise)  # not calibrated for a run that is not made
    trainer = _trainer(start, start.train, folder, tried, {}, **options)
    slopes = trainer.tune_on(minutes=5).slopes  # a time in which anything fits
    measured = config.replace(
        difference=slopes.difference,
        smoothing_parameter=slopes.smoothing_parameter,
        direction_distribution=trainer.run.config.direction_distribution,
    )
    base = 1.0 if slopes.difference == "forward" else 0.0
    choice = choose_sizes(
        measured,
        Seconds(row=base, again=base, point=1.0, step=0.0),
        num_units=len(start.train),
        entries=[trainer.run.perturbation(trainer.model).num_coordinates],
        budget=clock.budget.amount,
    )
    arguments = {
        "max_steps": choice.steps,
        "per_device_train_batch_size": choice.expected_batch_size,
        "learning_rate": learning_rate(slopes.typical, choice.steps, trainer.run.basis is not None),
    }
    measured = measured.replace(num_directions=choice.num_directions)
    return _trainer(start, start.train, folder, measured, arguments, **options)


def _published(
    num_directions: int,
    start: Start,
    clock: Clock,
    epsilon: float | None,
    seed: int,
    folder: Path,
    *,
    learning_rate: float,
) -> Outcome:
    """SGD at a constant rate, two-sided differences at the published λ, batches of 64, and a fixed threshold: the usual
    norm of a row's vector, measured on made-up rows."""
    config = DPZeroConfig(
        target_epsilon=epsilon,
        target_delta=DELTA,
        num_directions=num_directions,
        difference="central",
        smoothing_parameter=PUBLISHED_MOVE,
        clipping="fixed",
        max_length=LONGEST,
    )
    rows = min(PUBLISHED_ROWS, start.size.batch)
    arguments: dict[str, Any] = {
        "optim": "sgd",
        "learning_rate": learning_rate,
        "lr_scheduler_type": "constant",
        "per_device_train_batch_size": rows,
    }
    if math.isfinite(clock.left):
        config = config.replace(minutes=clock.left / 60)
    else:
        arguments["max_steps"] = max(1, int(clock.budget.amount / (2 * num_directions * rows)))
    with _fitting():
        return _finished(_trainer(start, start.train, folder, config, arguments, callbacks=[Deadline(clock)]), clock)


@contextmanager
def _fitting() -> Iterator[None]:
    """Turns the package's word that a time does not suffice into ours."""
    try:
        yield
    except TooLittleTime as error:
        raise DoesNotFit(str(error)) from None


def _finished(trainer: DPZeroTrainer, clock: Clock) -> Outcome:
    trainer.train()
    clock.stop()
    trainer.save_model()
    run, steps = trainer.run, trainer.state.global_step
    config, record = run.config, trainer.privacy_record()
    points = 2 * config.num_directions if config.difference == "central" else config.num_directions + 1
    names = ("num_directions", "difference", "smoothing_parameter", "clipping", "clipping_threshold")
    batch = run.expected_batch_size
    return Outcome(
        steps,
        float(steps * batch * points),
        {
            "epsilon": record["epsilon"],
            "delta": record["delta"],
            "noise_multiplier": run.plan.noise_multiplier,
            "statement": "privacy_record.json and dpzero_journal of the run",
        }
        if config.is_private
        else {},
        {name: _finite(getattr(config, name)) for name in names}
        | {
            "batch": batch,
            "planned_steps": run.plan.steps,
            "learning_rate": trainer.args.learning_rate,
            "optimizer": str(trainer.args.optim),
        },
    )


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value
