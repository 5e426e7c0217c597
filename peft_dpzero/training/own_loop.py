"""What a loop of one's own needs before its first step, which the Trainer does for itself."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from accelerate.utils import is_compiled_module, send_to_device
from torch import nn

from peft_dpzero.checks.arguments import check_weights
from peft_dpzero.checks.data import check_collator
from peft_dpzero.checks.passes import try_model
from peft_dpzero.config import DPZeroConfig
from peft_dpzero.errors import DPZeroError
from peft_dpzero.estimation.batching import Collator, without_column
from peft_dpzero.estimation.tasks import Task, as_task
from peft_dpzero.public.settings import Settings
from peft_dpzero.release.optimizer import DPZeroOptimizer
from peft_dpzero.training.settling import find_settings, rows_to_measure

if TYPE_CHECKING:
    from peft_dpzero.training.run import Run


def check_own_loop(config: DPZeroConfig, model: nn.Module, collate: Collator) -> None:
    """Refuses what only the Trainer can do.

    Raises:
        DPZeroError: sizes that time decides, a compiled model, a collator that joins rows, or weights that cannot be
            perturbed.
    """
    if config.minutes is not None:
        raise DPZeroError("minutes is for DPZeroTrainer: here steps and expected_batch_size are yours.")
    if is_compiled_module(model):
        raise DPZeroError("A compiled model is trained by DPZeroTrainer: pass the model itself here.")
    check_collator(collate)
    check_weights(model)


def begin_own_loop(
    run: Run, model: nn.Module, optimizer: DPZeroOptimizer, collate: Collator, task: Task | None, most_rows: int
) -> None:
    """Enters an opened run with `model`, so that it can release. Arguments as for `Run.started`."""
    device = run.accelerator.device
    run.take_basis()
    perturbation = run.perturbation(model)
    place = partial(send_to_device, device=device)
    tried = try_model(perturbation, as_task(task, model), run.config, place, device=device)

    def measured() -> Settings:
        rows = rows_to_measure(tried, ())
        return find_settings(tried, perturbation, run.config, *rows, run.sizes(most_rows)).settings

    run.take_settings(measured)
    settled = run.config.settled()
    passes = tried.passes_for(perturbation, settled, expected_rows=run.expected_rows, most_rows=most_rows)
    perturbation = run.perturbation(model, passes.streamed)
    run.enter(perturbation, optimizer)
    if (unit := run.config.privacy_unit) is not None:
        collate = without_column(collate, unit)
    batches = run.batches(run.dataset, collate, passes.shapes)
    run.begin(model, batches, passes.losses, perturbation, optimizer)
