"""How a run's rows go through its model: decided on made-up rows, before any data is read."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch

from peft_dpzero.checks.causes import check_batch_norm
from peft_dpzero.checks.probe import Probe
from peft_dpzero.checks.quantized import check_quantization
from peft_dpzero.checks.shortcuts import find_streamed
from peft_dpzero.config import DPZeroConfig, SettledConfig
from peft_dpzero.errors import DPZeroError
from peft_dpzero.estimation.losses import Losses, MicroBatch
from peft_dpzero.estimation.preferences import PairTask
from peft_dpzero.estimation.shapes import Shapes, row_counts
from peft_dpzero.estimation.shortcuts.stacked_4bit import stack_4bit_products
from peft_dpzero.estimation.tasks import Task
from peft_dpzero.modules import is_sharded
from peft_dpzero.perturbation.perturbation import Perturbation


@dataclass(frozen=True)
class Passes:
    """How rows go through a model.

    Attributes:
        losses: their losses.
        shapes: how rows are padded, and which share a pass.
        streamed: names of the parameters that are perturbed where they are used, piece by piece.
        idle: a pass over a made-up row, for a process that has fewer than others; None if each may run as many as it
            has.
    """

    losses: Losses
    shapes: Shapes
    streamed: frozenset[str] = frozenset()
    idle: Callable[[], object] | None = None


@dataclass(frozen=True)
class TriedModel:
    """What was found out about a model before it is known how many rows a step has.

    Attributes:
        passes: for rows that go alone.
        probe: made-up rows; None if none suit the model.
    """

    passes: Passes
    probe: Probe | None

    def passes_for(
        self,
        perturbation: Perturbation,
        config: SettledConfig,
        *,
        expected_rows: float,
        most_rows: int,
        max_tokens: int | None = None,
        likely: Sequence[int] = (),
        until: float | None = None,
    ) -> Passes:
        """Tries which rows may share a pass.

        Args:
            perturbation: over the model.
            config: the run's settings.
            expected_rows: rows that this process draws in a step, on average.
            most_rows: rows that go through the model at once at most.
            max_tokens: tokens, padding included, that go through the model at once, but for single rows.
            likely: tokens of rows that are like the run's, whose lengths are tried first.
            until: when no further length is tried, by `time.monotonic`.
        """
        losses = self.passes.losses
        shapes = replace(
            self.passes.shapes,
            expected_rows=expected_rows,
            most_rows=most_rows,
            max_tokens=max_tokens,
            # Of rows without tokens, which have one length, nothing can be tried.
            together={1: row_counts(most_rows)} if config.rows_asserted_independent else {},
        )
        if self.probe is not None:
            shapes = self.probe.tried_shapes(perturbation, losses, shapes, config, likely, until)
        return replace(self.passes, shapes=shapes)


def try_model(
    perturbation: Perturbation,
    task: Task,
    config: DPZeroConfig,
    place: Callable[[MicroBatch], MicroBatch],
    *,
    device: torch.device,
    compiles: bool = False,
) -> TriedModel:
    """Tries what the model allows, with rows that are made up.

    A sharded model allows plain passes only: what makes others cheaper reads weights outside their module's call, where
    a process holds a part of them. All processes call this at the same point.

    Args:
        perturbation: over the model, which is as it will be in the run; it is put into eval mode.
        task: how losses are read.
        config: the run's settings.
        place: moves a micro-batch to the model's device.
        device: the model's.
        compiles: whether the run's passes will be compiled: rows then go alone, unless the user vouches for them.

    Raises:
        DPZeroError: the model cannot be trained privately.
    """
    model, asserted = perturbation.model.eval(), config.rows_asserted_independent
    check_batch_norm(model)
    check_quantization(model)
    shapes = Shapes(1, 1, max_length=config.max_length, alone=not asserted, exact=not compiles)
    if not Probe.suits(model):
        if is_sharded(model):
            raise DPZeroError("fsdp needs a model that reads tokens: for another, idle processes have no row to run.")
        if not asserted:
            _warn_of_single_rows("the model reads no tokens, so that nothing can be tried on made-up ones")
        return TriedModel(Passes(Losses(model, task, place), shapes), None)
    stack_4bit_products()
    probe = Probe(model, device, task, asserted)
    if compiles and not asserted and probe.reason is None:
        probe.reason = "of compiled kernels it is not known that they keep rows apart"
    shapes = probe.fit_shapes(perturbation, shapes)
    if probe.reason is not None and not isinstance(task, PairTask):
        _warn_of_single_rows(probe.reason)
    probe.check_reach(perturbation)
    if is_sharded(model):
        return TriedModel(Passes(Losses(model, task, place), shapes, idle=probe.idle()), probe)
    losses = probe.losses(perturbation, place)
    # A compiled model would be compiled again with every micro-batch.
    streamed = frozenset() if compiles else find_streamed(perturbation, probe.run)
    return TriedModel(Passes(losses, shapes, streamed), probe)


def _warn_of_single_rows(reason: str) -> None:
    warnings.warn(
        f"Rows go through the model one at a time, which takes longer: {reason}. If you can vouch that no row's loss "
        "depends on the rows beside it, set rows_asserted_independent=True; the privacy record will say so.",
        stacklevel=5,
    )
