"""A private run for a loop of one's own.

run = Run(config, rows, expected_batch_size=64, steps=500)
with run.started(model, optimizer, collate, "out"):
    for number in range(run.plan.steps):
        optimizer.step(run.release(number).estimate)
run.save(model, "out")
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from accelerate.utils import is_compiled_module, send_to_device
from torch import nn

from peft_dpzero.checks.arguments import check_adapter, check_weights
from peft_dpzero.checks.data import check_collator
from peft_dpzero.checks.passes import try_model
from peft_dpzero.errors import DPZeroError
from peft_dpzero.estimation.batching import Collator, without_column
from peft_dpzero.estimation.tasks import Task, as_task
from peft_dpzero.public.settings import Settings
from peft_dpzero.release.optimizer import DPZeroOptimizer
from peft_dpzero.release.staging import put_in_place, staging
from peft_dpzero.training.measured_rows import rows_to_measure
from peft_dpzero.training.run import RunOnDisk
from peft_dpzero.training.settling import find_settings
from peft_dpzero.training.sharding import check_whole


class Run(RunOnDisk):
    """One private run over one data set. Arguments, attributes and errors as for `RunOnDisk`."""

    @contextmanager
    def started(
        self,
        model: nn.Module,
        optimizer: DPZeroOptimizer,
        collate: Collator,
        folder: str | Path,
        *,
        task: Task | None = None,
        most_rows: int = 64,
    ) -> Iterator[None]:
        """Within the block `release` makes the run's releases, with those of an interrupted run in `folder` first.

        Args:
            model: on its device. Its trainable parameters go to where the run started.
            optimizer: over them.
            collate: makes a row (1, …) of a list of one example.
            folder: for the journal, which is written before each release is used.
            task: how losses are read; by default that of the model's class.
            most_rows: rows that go through the model at once at most.

        Raises:
            DPZeroError: `folder` holds another run's journal or is in use; or the model cannot be trained privately.
        """
        if self.config.minutes is not None:
            raise DPZeroError("minutes is for DPZeroTrainer: here steps and expected_batch_size are yours.")
        if is_compiled_module(model):
            raise DPZeroError("A compiled model is trained by DPZeroTrainer: pass the model itself here.")
        check_whole(model)
        check_collator(collate)
        check_adapter(model)
        check_weights(model)
        with self.opened(folder, resume=True):
            self._begin_with(model, optimizer, collate, as_task(task, model), most_rows)
            yield

    def save(self, model: Any, folder: str | Path, **card_data: Any) -> None:
        """Saves the model with its configuration, journal, record and card.

        Args:
            model: the trained one.
            folder: for the release.
            card_data: see `DPZeroTrainer.describe_release`.
        """
        if self.processes.is_main_process:
            with staging(Path(folder)) as staged:
                model.save_pretrained(staged)
                self.save_claims(model, staged, **card_data)
                put_in_place(staged, Path(folder), self.evidence_in(Path(folder)))

    def _begin_with(
        self, model: nn.Module, optimizer: DPZeroOptimizer, collate: Collator, task: Task, most_rows: int
    ) -> None:
        device = self.accelerator.device
        self.keep_still(model)
        self.take_basis()
        perturbation = self.perturbation(model)
        place = partial(send_to_device, device=device)
        tried = try_model(perturbation, task, self.config, place, device=device)

        def measured() -> Settings:
            rows = rows_to_measure(tried, ())
            return find_settings(tried, perturbation, self.config, *rows, self.sizes(most_rows)).settings

        self.take_settings(measured)
        settled = self.config.settled()
        passes = tried.passes_for(perturbation, settled, expected_rows=self.expected_rows, most_rows=most_rows)
        perturbation = self.perturbation(model, passes.streamed)
        self.enter(perturbation, optimizer)
        if (unit := self.config.privacy_unit) is not None:
            collate = without_column(collate, unit)
        batches = self.batches(self.dataset, collate, passes.shapes)
        self.begin(model, batches, passes.losses, perturbation, optimizer)
