"""What a Trainer finds out before its first step: a basis, settings, and how rows go through the model."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from accelerate.utils import DynamoBackend
from torch import nn

from peft_dpzero.checks.compiled import check_compiled
from peft_dpzero.checks.data import check_public
from peft_dpzero.checks.passes import Passes, TriedModel, try_model
from peft_dpzero.checks.probe import Probe
from peft_dpzero.config import DEFAULT_BASIS_SIZE, DPZeroConfig
from peft_dpzero.errors import DPZeroError
from peft_dpzero.estimation.losses import Losses, MicroBatch, Shortcuts
from peft_dpzero.estimation.tasks import Task
from peft_dpzero.modules import is_sharded
from peft_dpzero.perturbation.basis import Basis
from peft_dpzero.perturbation.perturbation import KEPT_ENTRIES_IN_BASIS, Perturbation
from peft_dpzero.public.basis import find_basis
from peft_dpzero.public.rows import public_rows
from peft_dpzero.public.settings import BASIS_SIZES, Settings
from peft_dpzero.training.host import Host
from peft_dpzero.training.measured_rows import MOST_ROWS, PUBLIC, public_batches, rows_to_measure
from peft_dpzero.training.settling import Given, Measured, find_settings

# The part of `minutes` after which a basis is made of the gradients that there are.
_FOR_BASIS = 0.1


class PreparingMixin(Host):
    """The part of a private Trainer that comes before training. No private row is read."""

    dpzero_config: DPZeroConfig
    task: Task
    public_text: Any
    max_tokens_per_micro_batch: int | None
    logical_batch_size: int
    _given: Given
    _compiled: Any
    _passes: Passes

    def _prepare_run(self, deadline: float | None) -> None:
        """Settles what the run lacks, with the Trainer's arguments, and tries how rows go through the model.

        Args:
            deadline: when training should be over, by `time.monotonic`, if time decides its sizes.
        """
        run = self.run
        minutes = self.dpzero_config.minutes
        run.take_basis(None if self.public_text is None else lambda: self._found_basis(minutes))
        if not self._compiles:
            self.accelerator.prepare_model(self.model.eval())
        perturbation = run.perturbation(self.model)
        tried = self._tried(perturbation)
        found: list[Passes] = []

        def settings() -> Settings:
            measured = self._measured(tried, perturbation, self._rows_to_measure(tried), deadline)
            found.append(measured.passes)
            return measured.settings

        run.take_settings(settings, in_step=is_sharded(self.model))
        if run.chosen is not None:
            self._follow(run.chosen)
            perturbation = run.perturbation(self.model)
        # What was measured on one process may be no other's.
        self._passes = found[0] if found and run.processes.count == 1 else self._passes_of(tried, perturbation)

    def tune_on(self, public_dataset: Any = None, minutes: float | None = None) -> Measured:
        """Measures what a run of `minutes` would be, without a private row. No weight changes; the model is left in
        eval mode, and LoRA's A frozen, as training would.

        Args:
            public_dataset: rows as in training, public: in place of `public_text` and made-up rows.
            minutes: how long training may take on this machine; by default the config's, or 5.

        Returns:
            what was measured; its `settings` are what was chosen.

        Raises:
            DPZeroError: what is public is the training data, the losses of its rows cannot be measured, or the model
                is sharded.
        """
        if is_sharded(self.model):
            raise DPZeroError("tune_on times the passes of one process, and with fsdp all run together: leave it out.")
        check_public(public_dataset, self.train_dataset, "public_dataset")
        self._check_public_text()
        if not self._compiles:
            self.accelerator.prepare_model(self.model.eval())
        run, minutes = self.run, minutes or self.dpzero_config.minutes or 5.0
        run.keep_still(self.model)
        if run.basis is None and self.public_text is not None:
            run.lie_in(self._found_basis(minutes))
        perturbation = run.perturbation(self.model)
        tried = self._tried(perturbation)
        if public_dataset is None:
            rows = self._rows_to_measure(tried)
        else:
            collate = self._public_collator()
            given = [public_dataset[i] for i in range(min(len(public_dataset), MOST_ROWS))]
            rows = public_batches(given, collate, tried), PUBLIC
        deadline = time.monotonic() + 60 * minutes
        return self._measured(tried, perturbation, rows, deadline)

    def _check_public_text(self) -> None:
        if self.public_text is not None and self.args.weight_decay:
            raise DPZeroError("weight_decay shrinks parameters out of the basis of public_text: set it to 0.")
        check_public(self.public_text, self.train_dataset)

    def _tried(self, perturbation: Perturbation) -> TriedModel:
        return try_model(
            perturbation,
            self.task,
            self.dpzero_config,
            self._prepare_inputs,
            device=self.args.device,
            compiles=self._compiles,
        )

    def _passes_of(self, tried: TriedModel, perturbation: Perturbation) -> Passes:
        run = self.run
        return tried.passes_for(
            perturbation,
            run.config.settled(),
            expected_rows=run.expected_rows,
            most_rows=self._most_rows or max(1, round(run.expected_rows)),
            max_tokens=self.max_tokens_per_micro_batch,
        )

    @property
    def _most_rows(self) -> int | None:
        return self._given.most_rows if self._time_decides else int(self.args.per_device_train_batch_size)

    @property
    def _time_decides(self) -> bool:
        return self.dpzero_config.minutes is not None

    def _measured(
        self,
        tried: TriedModel,
        perturbation: Perturbation,
        rows: tuple[Sequence[MicroBatch], str],
        deadline: float | None,
    ) -> Measured:
        of_time: dict[str, Any] = {}
        if deadline is not None:
            given = self._given
            if given.learning_rate is None and "sgd" in str(self.args.optim).lower():
                raise DPZeroError("With minutes=…, AdamW's learning rate is chosen: give learning_rate for SGD.")
            of_time = {
                "batch": given.batch,
                "steps": given.steps,
                "learning_rate": given.learning_rate,
                "deadline": deadline,
            }
        sizes = self.run.sizes(self._most_rows, self.max_tokens_per_micro_batch, **of_time)
        config = self.dpzero_config.replace(direction_distribution=self.run.config.direction_distribution)
        return find_settings(tried, perturbation, config, *rows, sizes)

    def _follow(self, chosen: Settings) -> None:
        """Gives the Trainer's loop what was chosen for the run."""
        if chosen.expected_batch_size is not None:
            self.logical_batch_size = chosen.expected_batch_size
        if self._time_decides:
            self.args.max_steps = self.run.plan.steps
        if chosen.learning_rate is not None:
            self.args.learning_rate = chosen.learning_rate

    def _public_rows(self) -> list[dict[str, Any]]:
        model = self.accelerator.unwrap_model(self.model)
        return public_rows(self.public_text, self.task, model, self.processing_class, self.dpzero_config.max_length)

    def _public_collator(self) -> Any:
        return self._get_collator_with_removed_columns(self.data_collator, description="public")

    def _rows_to_measure(self, tried: TriedModel) -> tuple[Sequence[MicroBatch], str]:
        public = [] if self.public_text is None else public_batches(self._public_rows(), self._public_collator(), tried)
        return rows_to_measure(tried, public)

    def _found_basis(self, minutes: float | None) -> Basis:
        model = self.accelerator.unwrap_model(self.model)
        size = fewest = self.dpzero_config.basis_size or DEFAULT_BASIS_SIZE
        if minutes is not None and self.dpzero_config.basis_size is None:
            # As many directions are then kept during a step.
            entries = sum(p.numel() for p in model.parameters() if p.requires_grad)
            size = max((size for size in BASIS_SIZES if size * entries <= KEPT_ENTRIES_IN_BASIS), default=fewest)
        return find_basis(
            model,
            self.task,
            self._public_rows(),
            self._public_collator(),
            self._prepare_inputs,
            size,
            until=None if minutes is None else time.monotonic() + _FOR_BASIS * 60 * minutes,
            fewest=fewest,
        )

    @property
    def _compiles(self) -> bool:
        return self._compiled is not None or self.accelerator.state.dynamo_plugin.backend != DynamoBackend.NO

    def _compiled_losses(self, model: nn.Module, perturbation: Perturbation, losses: Losses) -> Losses:
        """Losses of a compiled `model`: of one point at a time with nothing shared."""
        if Probe.suits(self.model):
            plain, compiled = (Probe(one, self.args.device, self.task, True).run for one in (self.model, model))
            check_compiled(perturbation, plain, compiled)
        return Losses(model, self.task, self._prepare_inputs, Shortcuts(label_logits=losses.shortcuts.label_logits))
