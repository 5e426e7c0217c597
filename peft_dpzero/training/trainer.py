"""`DPZeroTrainer`: Hugging Face's loop around one private step."""

from __future__ import annotations

import functools
import math
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import DynamoBackend, is_compiled_module
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import Trainer, TrainerState, TrainingArguments
from transformers.trainer_utils import TrainOutput

from peft_dpzero.checks.arguments import (
    check_arguments,
    check_collator,
    check_columns,
    check_dataset,
    check_weights,
    forward_only,
    stop_checkpointing,
)
from peft_dpzero.checks.causes import check_batch_norm
from peft_dpzero.checks.compiled import check_compiled, check_compiled_parts
from peft_dpzero.checks.probe import Probe
from peft_dpzero.checks.quantized import check_quantization
from peft_dpzero.checks.shortcuts import find_streamed
from peft_dpzero.config import DPZeroConfig
from peft_dpzero.errors import DPZeroError
from peft_dpzero.estimation.batching import LogicalBatches, without_column
from peft_dpzero.estimation.losses import Losses, Shortcuts
from peft_dpzero.estimation.sampling import PoissonSampler, new_secret, seeded_secret
from peft_dpzero.estimation.shapes import Shapes, row_counts
from peft_dpzero.estimation.shortcuts.stacked_4bit import stack_4bit_products
from peft_dpzero.estimation.tasks import Task, as_task
from peft_dpzero.mechanism.plan import PrivacyPlan
from peft_dpzero.mechanism.private_sum import Released
from peft_dpzero.perturbation.perturbation import Perturbation
from peft_dpzero.processes import check_processes
from peft_dpzero.release.digests import parameters_digest
from peft_dpzero.release.journal import Journal, JournalSegment
from peft_dpzero.release.ledger import record_of
from peft_dpzero.release.optimizer import DPZeroOptimizer
from peft_dpzero.release.record import privacy_record
from peft_dpzero.step import PrivateStep
from peft_dpzero.training.offloading import bring_trained_into_memory, is_offloaded
from peft_dpzero.training.pacing import step_loader
from peft_dpzero.training.reporting import ReportingMixin
from peft_dpzero.training.resuming import ResumingMixin, checkpoint_step
from peft_dpzero.training.saving import SavingMixin


class DPZeroTrainerMixin(SavingMixin, ResumingMixin, ReportingMixin):
    """Makes a `transformers.Trainer` subclass private: put it first among the bases.

    The logical batch is `per_device_train_batch_size × gradient_accumulation_steps × processes` on average;
    `per_device_train_batch_size` examples go through the model at once at most.

    Args:
        model: as for the Trainer.
        args: as for the Trainer.
        dpzero_config: the mechanism and its budget.
        per_example_loss: a `Task` (for example `Verbalizer`), or a function `(outputs, labels) → (batch,)`, which
            need not be differentiable. None takes the loss of the model's class.
        max_tokens_per_micro_batch: tokens, padding included, that go through the model at once, but for single examples
            that are longer; None allows any number.
        kwargs: the other arguments of the Trainer.

    Attributes:
        release_listeners: called with each step's release before it moves the parameters.

    Raises:
        DPZeroError: a setting, data set or model that cannot be trained privately; before any data is read.
    """

    def __init__(
        self,
        model: Any = None,
        args: TrainingArguments | None = None,
        *positional: Any,
        dpzero_config: DPZeroConfig | None = None,
        per_example_loss: Task | Callable[[Any, Tensor], Tensor] | None = None,
        max_tokens_per_micro_batch: int | None = None,
        **kwargs: Any,
    ) -> None:
        if not isinstance(dpzero_config, DPZeroConfig):
            raise DPZeroError("Pass dpzero_config=DPZeroConfig(target_epsilon=…, target_delta=…).")
        if max_tokens_per_micro_batch is not None and max_tokens_per_micro_batch < 1:
            raise DPZeroError(f"max_tokens_per_micro_batch must be at least 1, got {max_tokens_per_micro_batch}.")
        if kwargs.get("compute_loss_func") is not None:
            raise DPZeroError("compute_loss_func averages over the batch: pass per_example_loss instead.")
        if type(self)._get_train_sampler is not Trainer._get_train_sampler:
            raise DPZeroError("A custom train sampler cannot be accounted for: DPZero samples by itself.")
        args = TrainingArguments("trainer_output") if args is None else args
        check_arguments(args)
        check_processes(args.world_size, args.world_size)
        self.dpzero_config = dpzero_config
        self.max_tokens_per_micro_batch = max_tokens_per_micro_batch
        self.logical_batch_size = int(
            args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size
        )
        args = forward_only(args)
        # The probe, parameter names and saving want the plain model; the step runs the compiled one.
        self._compiled = model if is_compiled_module(model) else None
        super().__init__(model if self._compiled is None else model._orig_mod, args, *positional, **kwargs)
        if self.args.n_gpu > 1:
            raise DPZeroError(
                "nn.DataParallel averages losses over replicas: use accelerate launch, or show one GPU only "
                "(CUDA_VISIBLE_DEVICES)."
            )
        if self.model_init is not None:
            raise DPZeroError("model_init would build the model anew in train(): pass model=model_init() instead.")
        check_collator(self.data_collator)
        stop_checkpointing(self.model)
        if getattr(self, "optimizer", None) is not None:
            _as_dpzero_optimizer(self.optimizer)
        check_compiled_parts(self.model)
        bring_trained_into_memory(self.model)
        self.task = as_task(per_example_loss, self.model)
        self._plan: PrivacyPlan | None = None
        self._step: PrivateStep | None = None
        self._losses: Losses
        self._shapes: Shapes
        self._streamed: frozenset[str] = frozenset()
        self._journal: Journal | None = None
        self._segments: list[JournalSegment] = []
        self._weights_step: int | None = None
        self.release_listeners: list[Callable[[Released], None]] = []
        self._grad_norm = 0.0
        self._private_losses: dict[int, float] = {}
        self._metric_prefixes = {"eval"}
        self._left_out: set[str] = set()

    def privacy_record(self) -> dict[str, Any]:
        """The record of the releases made so far."""
        if self._journal is not None and self._journal.segments:
            return record_of(self._journal.segments)
        return privacy_record(self.privacy_plan, self.state.global_step, self._private_losses)

    # ---- Training ----

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> TrainOutput:
        """As `Trainer.train`. Resuming applies journalled releases again and makes none twice.

        With True, the newest checkpoint that was written to its end is taken; if there is none, the run's start. A
        finished run goes on if `max_steps` or `num_train_epochs` is larger now.

        Raises:
            DPZeroError: see the class; also an output folder that holds another run's journal.
        """
        check_dataset(self.train_dataset)
        check_columns(self.train_dataset, self.label_names if self._needs_label_column else ())
        with self._journalled(resume_from_checkpoint):
            check_weights(self.model)
            check_quantization(self.model)
            perturbation = self._perturbation()
            self._losses, self._shapes = self._probed(perturbation)
            checkpoint = self._enter_segment(perturbation, resume_from_checkpoint)
            self._step, self._weights_step = None, None
            if checkpoint is not None and checkpoint_step(Path(checkpoint)) >= self.privacy_plan.steps:
                return self._finished(checkpoint)
            output = super().train(checkpoint, *args, **kwargs)
        if self.state.global_step and parameters_digest(self._perturbation()) == self._segments[0].header["start"]:
            warnings.warn("Training did not move the trainable parameters: is the learning rate 0?", stacklevel=2)
        return self._public_output(output)

    def _finished(self, checkpoint: str) -> TrainOutput:
        """Takes over the last step's checkpoint: the Trainer's loop would take one step more."""
        self._load_from_checkpoint(checkpoint)
        self.state = TrainerState.load_from_json(str(Path(checkpoint) / "trainer_state.json"))
        return TrainOutput(self.state.global_step, math.nan, {})

    @property
    def _needs_label_column(self) -> bool:
        return not hasattr(self.data_collator, "mlm")

    def _perturbation(self) -> Perturbation:
        config = self.dpzero_config
        return Perturbation(self.model, config.direction_seed, config.direction_distribution, self._streamed)

    def _probed(self, perturbation: Perturbation) -> tuple[Losses, Shapes]:
        """The run's losses and shapes, from trials on made-up rows with the model as the Trainer prepares it."""
        self.model.eval()
        if not self._compiles:
            self.accelerator.prepare_model(self.model)
        check_batch_norm(self.model)
        units, asserted = self.logical_batch_size / self.args.world_size, self.dpzero_config.rows_asserted_independent
        shapes = Shapes(
            expected_rows=units * (1 if self._units is None else self._units.max_examples),
            most_rows=self.args.per_device_train_batch_size,
            max_length=self.dpzero_config.max_length,
            max_tokens=self.max_tokens_per_micro_batch,
            alone=not asserted,
            # Of rows without tokens, which have one length, nothing can be tried.
            together={1: row_counts(self.args.per_device_train_batch_size)} if asserted else {},
            exact=not self._compiles,
        )
        if not Probe.suits(self.model):
            if not asserted:
                _warn_of_single_rows("the model reads no tokens, so that nothing can be tried on made-up ones")
            return Losses(self.model, self.task, self._prepare_inputs), shapes
        stack_4bit_products()
        probe = Probe(self.model, self.args.device, self.task, asserted)
        if self._compiles and not asserted and probe.reason is None:
            probe.reason = "of compiled kernels it is not known that they keep rows apart"
        shapes = probe.fit_shapes(perturbation, shapes)
        if probe.reason is not None:
            _warn_of_single_rows(probe.reason)
        probe.check_reach(perturbation)
        losses = probe.losses(perturbation, self._prepare_inputs)
        # A compiled model would be compiled again with every micro-batch.
        if not self._compiles:
            self._streamed = find_streamed(perturbation, probe.run)
        return losses, probe.tried_shapes(perturbation, losses, shapes, self.dpzero_config)

    @property
    def _compiles(self) -> bool:
        return self._compiled is not None or self.accelerator.state.dynamo_plugin.backend != DynamoBackend.NO

    def _compiled_losses(self, model: nn.Module, perturbation: Perturbation, losses: Losses) -> Losses:
        """Losses of a compiled `model`: of one point at a time with nothing shared."""
        if Probe.suits(self.model):
            plain, compiled = (Probe(one, self.args.device, self.task, True).run for one in (self.model, model))
            check_compiled(perturbation, plain, compiled)
        return Losses(model, self.task, self._prepare_inputs, Shortcuts(label_logits=losses.shortcuts.label_logits))

    def _build_step(self, model: nn.Module) -> PrivateStep:
        plan, config = self.privacy_plan, self.dpzero_config
        model = (model if self._compiled is None else self._compiled).eval()
        perturbation, losses = self._perturbation(), self._losses
        if model is not self.model:
            losses = self._compiled_losses(model, perturbation, losses)
        secret = seeded_secret(self.args.seed) if config.deterministic else new_secret()
        step = PrivateStep(
            model,
            plan,
            batches=self._private_batches(PoissonSampler(plan.num_units, plan.sample_rate, secret), self._shapes),
            losses=losses,
            perturbation=perturbation,
            optimizer=self._dpzero_optimizer,
            journal=self._journal,
            segments=self._segments,
            accelerator=self.accelerator,
        )
        released = {entry.released.step + 1: entry.released.loss for entry in step.replayed}
        self._private_losses = {done: loss for done, loss in released.items() if loss is not None}
        return step

    def _private_batches(self, sampler: PoissonSampler, shapes: Shapes) -> LogicalBatches:
        dataset, collate = self.train_dataset, self.data_collator
        if (unit := self.dpzero_config.privacy_unit) is not None:
            collate = without_column(collate, unit)
        if hasattr(dataset, "remove_columns"):
            dataset = self._remove_unused_columns(dataset, description="training")
        else:
            collate = self._get_collator_with_removed_columns(collate, description="training")
        return LogicalBatches(
            dataset, sampler, collate, shapes, self.args.process_index, self.args.world_size, self._units
        )

    def get_train_dataloader(self) -> DataLoader[Any]:
        """Paces the loop, one empty item a step; the step draws its own batch."""
        return step_loader(self._num_units, self._steps_per_epoch)

    def get_total_train_batch_size(self, args: TrainingArguments) -> int:
        """The logical batch."""
        return self.logical_batch_size

    def training_step(self, model: nn.Module, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        """Makes the step's release and hands it to the optimizer. Returns 0, or the raw loss if it is not withheld."""
        if self._step is None:
            self._step = self._build_step(model)
        report = self._step(self.state.global_step)
        for listener in self.release_listeners:
            listener(report.released)
        self._grad_norm = report.released.norm
        if report.released.loss is not None:
            self._private_losses[self.state.global_step + 1] = report.released.loss
        return torch.tensor(report.nonprivate_loss or 0.0, device=self.args.device)

    def compute_loss(
        self, model: nn.Module, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Mean of the per-example losses: evaluation only."""
        outputs = model(**self.task.inputs(inputs))
        loss = self.task.losses(outputs, inputs).mean()
        return (loss, {"logits": self.task.predictions(outputs, inputs)}) if return_outputs else loss

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """A `DPZeroOptimizer` over the Trainer's weight-decay groups, unless one was passed in.

        Raises:
            DPZeroError: another kind of optimizer was passed.
        """
        if getattr(self, "optimizer", None) is None:
            decay = set(self.get_decay_parameter_names(self.model))
            named = [(n, p) for n, p in self.model.named_parameters() if p.requires_grad]
            groups = [
                {"params": [p for n, p in named if n in decay], "weight_decay": self.args.weight_decay},
                {"params": [p for n, p in named if n not in decay], "weight_decay": 0.0},
            ]
            self.optimizer = DPZeroOptimizer([g for g in groups if g["params"]], lr=self.args.learning_rate)
        self._dpzero_optimizer = _as_dpzero_optimizer(self.optimizer)
        return self.optimizer

    def create_accelerator_and_postprocess(self) -> None:
        """As in the Trainer, but models are never wrapped in DDP: nothing is synchronized but the K sums."""
        super().create_accelerator_and_postprocess()
        self.accelerator.prepare_model = functools.partial(self.accelerator.prepare_model, evaluation_mode=True)
        if self.model is not None and is_offloaded(self.model):
            self.accelerator.device_placement = False

    def _move_model_to_device(self, model: nn.Module, device: torch.device) -> None:
        if not is_offloaded(model):
            super()._move_model_to_device(model, device)

    def hyperparameter_search(self, *args: Any, **kwargs: Any) -> Any:
        """Refused: every trial would spend its own ε, and choosing among them spends more."""
        raise DPZeroError("hyperparameter_search would spend an ε a trial, unaccounted: tune on public data.")


class DPZeroTrainer(DPZeroTrainerMixin, Trainer):  # type: ignore[misc]
    """`transformers.Trainer` that fine-tunes privately with forward passes only. See `DPZeroTrainerMixin`."""


def _warn_of_single_rows(reason: str) -> None:
    warnings.warn(
        f"Rows go through the model one at a time, which takes longer: {reason}. If you can vouch that no row's loss "
        "depends on the rows beside it, set rows_asserted_independent=True; the privacy record will say so.",
        stacklevel=4,
    )


def _as_dpzero_optimizer(optimizer: Any) -> DPZeroOptimizer:
    """`optimizer` without Accelerate's wrapper."""
    optimizer = getattr(optimizer, "optimizer", optimizer)
    if not isinstance(optimizer, DPZeroOptimizer):
        raise DPZeroError(
            f"{type(optimizer).__name__} needs gradients, and there are none: pass a DPZeroOptimizer, or no optimizer."
        )
    return optimizer
