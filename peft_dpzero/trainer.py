"""`DPZeroTrainer`: Hugging Face's loop around one private step."""

from __future__ import annotations

import copy
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

from peft_dpzero.compiling import check_compiled, check_compiled_parts
from peft_dpzero.config import DPZeroConfig
from peft_dpzero.errors import DPZeroError
from peft_dpzero.estimation.batching import LogicalBatches, step_loader, without_column
from peft_dpzero.estimation.losses import FunctionTask, Task, infer_task
from peft_dpzero.estimation.passes import Losses, Shortcuts
from peft_dpzero.estimation.sampling import PoissonSampler, new_secret, seeded_secret
from peft_dpzero.guards import (
    check_arguments,
    check_collator,
    check_columns,
    check_dataset,
    check_processes,
    check_weights,
    fingerprint,
    padding_side,
)
from peft_dpzero.mechanism.accountant import COARSE_INTERVAL
from peft_dpzero.mechanism.plan import PrivacyPlan
from peft_dpzero.offloading import bring_trained_into_memory, is_offloaded
from peft_dpzero.perturbation import Perturbation
from peft_dpzero.probe import Probe
from peft_dpzero.probe_causes import check_batch_norm
from peft_dpzero.quantised import check_quantisation, stack_4bit_products
from peft_dpzero.release.journal import Journal, JournalSegment
from peft_dpzero.release.ledger import record_of
from peft_dpzero.release.optimizer import DPZeroOptimizer
from peft_dpzero.release.record import privacy_record
from peft_dpzero.resuming import ResumingMixin, checkpoint_step
from peft_dpzero.saving import SavingMixin
from peft_dpzero.step import PrivateStep

# What the stock Trainer logs that would tell of the private data.
_WITHHELD_LOGS = ("loss", "train_loss", "total_flos", "num_input_tokens_seen")


class DPZeroTrainerMixin(SavingMixin, ResumingMixin):
    """Makes a `transformers.Trainer` subclass private: put it first among the bases.

    The logical batch is `per_device_train_batch_size × gradient_accumulation_steps × processes` on average;
    about `per_device_train_batch_size` examples go through the model at once.

    Args:
        model: as for the Trainer.
        args: as for the Trainer.
        dpzero_config: the mechanism and its budget.
        per_example_loss: a `Task` (for example `Verbalizer`), or a function `(outputs, labels) → (batch,)`, which
            need not be differentiable. None takes the loss of the model's class.
        max_tokens_per_micro_batch: tokens, padding included, that go through the model at once, whatever the number of
            examples; None allows `per_device_train_batch_size` times the longest example of a logical batch.
        kwargs: the other arguments of the Trainer.

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
        # One item of the loop is one logical batch, and there are no gradients to clip.
        args = copy.copy(args)
        args.gradient_accumulation_steps = 1
        args.max_grad_norm = 0.0
        # The probe, parameter names and saving want the plain model; the step runs the compiled one.
        self._compiled = model if is_compiled_module(model) else None
        super().__init__(model if self._compiled is None else model._orig_mod, args, *positional, **kwargs)
        if self.args.n_gpu > 1:
            raise DPZeroError(
                "nn.DataParallel averages losses over replicas: use accelerate launch, or show one GPU only "
                "(CUDA_VISIBLE_DEVICES)."
            )
        check_collator(self.data_collator)
        if getattr(self, "optimizer", None) is not None:
            _as_dpzero_optimizer(self.optimizer)
        check_compiled_parts(self.model)
        bring_trained_into_memory(self.model)
        self.task = _as_task(per_example_loss, self.model)
        self._plan: PrivacyPlan | None = None
        self._step: PrivateStep | None = None
        self._losses: Losses | None = None
        self._streamed: frozenset[str] = frozenset()
        self._journal: Journal | None = None
        self._segments: list[JournalSegment] = []
        self._weights_step: int | None = None
        self._grad_norm = 0.0
        self._private_losses: dict[int, float] = {}

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
            check_quantisation(self.model)
            perturbation = self._perturbation()
            self._probe_model(perturbation)
            start = fingerprint(perturbation)
            checkpoint = self._enter_segment(perturbation, resume_from_checkpoint)
            self._step, self._weights_step = None, None
            if checkpoint is not None and checkpoint_step(Path(checkpoint)) >= self.privacy_plan.steps:
                return self._finished(checkpoint)
            output = super().train(checkpoint, *args, **kwargs)
        if self.state.global_step and fingerprint(self._perturbation()) == start:
            warnings.warn("Training did not move the trainable parameters: is the learning rate 0?", stacklevel=2)
        if self.dpzero_config.train_loss == "nonprivate":
            return output
        metrics = {key: value for key, value in output.metrics.items() if key not in _WITHHELD_LOGS}
        released = list(self._private_losses.values())
        return TrainOutput(output.global_step, sum(released) / len(released) if released else math.nan, metrics)

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

    def _probe_model(self, perturbation: Perturbation) -> None:
        self.model.eval()
        check_batch_norm(self.model)
        if not Probe.suits(self.model):
            warnings.warn("The model reads no tokens: that examples are independent was not probed.", stacklevel=3)
            return
        stack_4bit_products()
        probe = self._probe(self.model)
        probe.check_independence(perturbation)
        probe.check_reach(perturbation)
        self._losses = probe.losses(perturbation, self._prepare_inputs)
        # A compiled model would be compiled again with every micro-batch.
        if self._compiled is None and self.accelerator.state.dynamo_plugin.backend == DynamoBackend.NO:
            self._streamed = perturbation.find_streamed(probe.run)

    def _probe(self, model: nn.Module) -> Probe:
        return Probe(model, self.args.device, padding_side(self.data_collator), self.task)

    def _run_losses(self, model: nn.Module, perturbation: Perturbation) -> Losses:
        """The probe's losses; of a compiled `model`, those of one point at a time with nothing shared."""
        losses = self._losses or Losses(self.model, self.task, self._prepare_inputs)
        if model is self.model:
            return losses
        if Probe.suits(self.model):
            check_compiled(perturbation, self._probe(self.model).run, self._probe(model).run)
        return Losses(model, self.task, self._prepare_inputs, Shortcuts(head=losses.shortcuts.head))

    def _build_step(self, model: nn.Module) -> PrivateStep:
        plan, config = self.privacy_plan, self.dpzero_config
        perturbation = self._perturbation()
        secret = seeded_secret(self.args.seed) if config.deterministic else new_secret()
        model = model if self._compiled is None else self._compiled
        losses = self._run_losses(model.eval(), perturbation)
        step = PrivateStep(
            model,
            plan,
            self._private_batches(PoissonSampler(plan.num_units, plan.sample_rate, secret), losses.shortcuts.packs),
            losses,
            perturbation,
            self._dpzero_optimizer,
            self._journal,
            self._segments,
            self.accelerator,
        )
        released = {entry.released.step + 1: entry.released.loss for entry in step.replayed}
        self._private_losses = {done: loss for done, loss in released.items() if loss is not None}
        return step

    def _private_batches(self, sampler: PoissonSampler, packed: bool) -> LogicalBatches:
        dataset, collate = self.train_dataset, self.data_collator
        if (unit := self.dpzero_config.privacy_unit) is not None:
            collate = without_column(collate, unit)
        if hasattr(dataset, "remove_columns"):
            dataset = self._remove_unused_columns(dataset, description="training")
        else:
            collate = self._get_collator_with_removed_columns(collate, description="training")
        return LogicalBatches(
            dataset,
            sampler,
            collate,
            self.args.per_device_train_batch_size,
            self.args.process_index,
            self.args.world_size,
            self._units,
            self.max_tokens_per_micro_batch,
            packed,
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
        """As in the Trainer, but models are never wrapped in DDP: nothing is synchronised but the K sums."""
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

    # ---- What is logged ----

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """As in the Trainer, less what is private, plus the ε spent so far (an upper bound)."""
        if self.dpzero_config.train_loss != "nonprivate":
            logs = {key: value for key, value in logs.items() if key not in _WITHHELD_LOGS}
        if (loss := self._private_losses.get(self.state.global_step)) is not None and "learning_rate" in logs:
            logs["loss"] = loss
        logs.pop("total_flos", None)
        if "learning_rate" in logs and self.is_world_process_zero():
            logs["epsilon"] = self.privacy_plan.epsilon(self.state.global_step, COARSE_INTERVAL)
        super().log(logs, *args, **kwargs)

    def floating_point_ops(self, inputs: Any) -> int:
        """0: the count would tell how many tokens were sampled."""
        return 0

    def _get_num_items_in_batch(self, batch_samples: Any, device: Any) -> None:
        return None

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> float:
        return self._grad_norm


class DPZeroTrainer(DPZeroTrainerMixin, Trainer):  # type: ignore[misc]
    """`transformers.Trainer` that fine-tunes privately with forward passes only. See `DPZeroTrainerMixin`."""


def _as_task(loss: Task | Callable[[Any, Tensor], Tensor] | None, model: nn.Module) -> Task:
    if loss is None:
        return infer_task(model)
    return loss if isinstance(loss, Task) else FunctionTask(loss)


def _as_dpzero_optimizer(optimizer: Any) -> DPZeroOptimizer:
    """`optimizer` without Accelerate's wrapper."""
    optimizer = getattr(optimizer, "optimizer", optimizer)
    if not isinstance(optimizer, DPZeroOptimizer):
        raise DPZeroError(
            f"{type(optimizer).__name__} needs gradients, and there are none: pass a DPZeroOptimizer, or no optimizer."
        )
    return optimizer
