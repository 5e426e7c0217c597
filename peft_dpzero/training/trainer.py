"""`DPZeroTrainer`: Hugging Face's loop around one private step."""

from __future__ import annotations

import functools
import inspect
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import is_compiled_module, patch_environment
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerBase, ProcessorMixin, Trainer, TrainerState, TrainingArguments
from transformers.trainer_utils import TrainOutput, align_special_tokens

from peft_dpzero.checks.arguments import (
    check_adapter,
    check_arguments,
    check_weights,
    forward_only,
    stop_checkpointing,
)
from peft_dpzero.checks.compiled import check_compiled_parts
from peft_dpzero.checks.data import check_collator, check_columns, check_dataset, check_labels
from peft_dpzero.checks.hosts import check_host, check_hosted
from peft_dpzero.config import DPZeroConfig
from peft_dpzero.errors import DPZeroError
from peft_dpzero.estimation.batching import without_column
from peft_dpzero.estimation.preferences import PairTask
from peft_dpzero.estimation.tasks import Task, as_task
from peft_dpzero.mechanism.plan import PrivacyPlan
from peft_dpzero.mechanism.private_sum import Released
from peft_dpzero.modules import saves_what_is_trained
from peft_dpzero.processes import AcceleratedProcesses, check_processes
from peft_dpzero.release.digests import start_digest
from peft_dpzero.release.optimizer import Estimate
from peft_dpzero.training.checkpoints import checkpoint_step, checkpoint_to_resume
from peft_dpzero.training.evaluating import EvaluatingMixin
from peft_dpzero.training.offloading import bring_trained_into_memory, is_offloaded
from peft_dpzero.training.optimizers import as_dpzero_optimizer, optimizer_for, warn_of_small_moves
from peft_dpzero.training.pacing import step_loader
from peft_dpzero.training.preferences import pair_collator, preference_task
from peft_dpzero.training.preparing import PreparingMixin
from peft_dpzero.training.progress import with_spending
from peft_dpzero.training.reporting import ReportingMixin
from peft_dpzero.training.run import RunOnDisk
from peft_dpzero.training.saving import SavingMixin
from peft_dpzero.training.settling import Given
from peft_dpzero.training.sharding import check_accelerator, check_sharded_run, check_whole, shard, sharding_asked


class DPZeroTrainerMixin(PreparingMixin, EvaluatingMixin, SavingMixin, ReportingMixin):
    """Makes a `transformers.Trainer` subclass private: put it first among the bases.

    The logical batch is `per_device_train_batch_size × gradient_accumulation_steps × processes` on average;
    `per_device_train_batch_size` examples go through the model at once at most.

    Args:
        model: as for the Trainer.
        args: as for the Trainer. With `fsdp` frozen weights are sharded, from here on, and what is trained is not.
        dpzero_config: the mechanism and its budget.
        per_example_loss: a `Task` (for example `Verbalizer`), or a function `(outputs, labels) → (batch,)`, which
            need not be differentiable. None takes the loss of the model's class.
        public_text: text of the same kind that is public, and need not be labelled: some hundred strings (with
            `processing_class`), or rows as in `train_dataset`. Directions then lie where it moves the model's outputs
            most, in `basis_size` coordinates, which takes far fewer directions. This alone runs backward passes, over
            the public text, before training.
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
        public_text: Any = None,
        max_tokens_per_micro_batch: int | None = None,
        **kwargs: Any,
    ) -> None:
        if not isinstance(dpzero_config, DPZeroConfig):
            raise DPZeroError("Pass dpzero_config=DPZeroConfig(target_epsilon=…, target_delta=…).")
        if max_tokens_per_micro_batch is not None and max_tokens_per_micro_batch < 1:
            raise DPZeroError(f"max_tokens_per_micro_batch must be at least 1, got {max_tokens_per_micro_batch}.")
        # A trainer of TRL orders its arguments otherwise.
        kwargs |= dict(zip([*inspect.signature(Trainer).parameters][2:], positional, strict=False))
        options = kwargs | {"public_text": public_text}
        check_host(type(self), args, model, options, has_loss=per_example_loss is not None)
        args = TrainingArguments("trainer_output") if args is None else args
        check_arguments(args)
        self._sharding = sharding_asked(args)
        check_processes(args.world_size, args.world_size)
        self._given = Given.of(args, kwargs.get("optimizers"))
        if dpzero_config.minutes is not None and self._given.epochs is not None and self._given.steps is None:
            raise DPZeroError("With minutes, time decides on the steps: leave num_train_epochs out, or give max_steps.")
        self.dpzero_config = dpzero_config
        self.public_text = public_text
        self.max_tokens_per_micro_batch = max_tokens_per_micro_batch
        self.logical_batch_size = int(
            args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size
        )
        args = forward_only(args)
        # The probe, parameter names and saving want the plain model; the step runs the compiled one.
        self._compiled = model if is_compiled_module(model) else None
        super().__init__(model=model if self._compiled is None else model._orig_mod, args=args, **kwargs)
        if self.args.n_gpu > 1:
            raise DPZeroError(
                "nn.DataParallel averages losses over replicas: use accelerate launch, or show one GPU only "
                "(CUDA_VISIBLE_DEVICES)."
            )
        if self.model_init is not None:
            raise DPZeroError("model_init would build the model anew in train(): pass model=model_init() instead.")
        check_hosted(self)
        self.callback_handler.callbacks = with_spending(self.callback_handler.callbacks)
        check_collator(self.data_collator)
        stop_checkpointing(self.model)
        if getattr(self, "optimizer", None) is not None:
            as_dpzero_optimizer(self.optimizer)
        check_compiled_parts(self.model)
        check_adapter(self.model)
        bring_trained_into_memory(self.model)
        self.task = preference_task(self) or as_task(per_example_loss, self.model)
        check_whole(self.model)
        if self._sharding is not None:
            check_sharded_run(self)
            shard(self.model, self._sharding, AcceleratedProcesses(self.accelerator))
        self.release_listeners: list[Callable[[Released], None]] = []
        self._estimate: Estimate | None = None
        self._metric_prefixes = {"eval"}
        self._left_out: set[str] = set()

    @functools.cached_property
    def run(self) -> RunOnDisk:
        """The private run over `train_dataset`. It is made at first use, and reads no rows but for `privacy_unit`."""
        run = RunOnDisk(
            self.dpzero_config,
            self.train_dataset,
            expected_batch_size=self.logical_batch_size,
            logging_steps=self.args.logging_steps,
            accelerator=self.accelerator,
            **self._length,
        )
        run.listeners = self.release_listeners
        return run

    @property
    def _length(self) -> dict[str, Any]:
        if self._time_decides:
            return {"steps": self._given.steps}
        steps = int(self.args.max_steps)
        return {"steps": steps if steps > 0 else None, "epochs": float(self.args.num_train_epochs)}

    @property
    def privacy_plan(self) -> PrivacyPlan:
        """q, σ, T and what they cost; calibrated at first use, before any data is read.

        Raises:
            DPZeroError: `minutes` decides, and `train` has not measured yet.
        """
        return self.run.plan

    def privacy_record(self) -> dict[str, Any]:
        """The record of the releases made so far."""
        return self.run.record()

    # ---- Training ----

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> TrainOutput:
        """As `Trainer.train`. Resuming applies journalled releases again and makes none twice.

        With True, the newest checkpoint that was written to its end is taken; if there is none, the run's start. A
        finished run goes on if `max_steps` or `num_train_epochs` is larger now.

        Raises:
            DPZeroError: see the class; also an output folder that holds another run's journal.
        """
        check_dataset(self.train_dataset)
        self._check_public_text()
        needs_labels = not hasattr(self.data_collator, "mlm")
        if not isinstance(self.task, PairTask):
            check_columns(self.train_dataset, self.label_names, needs_labels, self.args.remove_unused_columns)
        check_labels(self.train_dataset, self.task, self.model)
        if self.run.dataset is not self.train_dataset:
            del self.run
        run, folder = self.run, Path(self.args.output_dir)
        # From here on: how long it takes to read private rows may not decide on sizes.
        minutes = self.dpzero_config.minutes
        deadline = None if minutes is None else time.monotonic() + 60 * minutes
        self._weights_step = None
        with run.opened(folder, resume=bool(resume_from_checkpoint), **self._length):
            check_weights(self.model)
            run.keep_still(self.model)
            if isinstance(self.processing_class, (PreTrainedTokenizerBase, ProcessorMixin)):
                align_special_tokens(self.model, self.processing_class)  # before rows are padded, not in the loop
            self._prepare_run(deadline)
            if run.plan.steps < run.steps:
                warnings.warn(
                    f"Training stops after {run.plan.steps} steps: the next would pass target_epsilon.", stacklevel=2
                )
                self.args.max_steps = run.plan.steps
            checkpoint = run.processes.on_main(lambda: checkpoint_to_resume(resume_from_checkpoint, run.journal))
            if not saves_what_is_trained(self.model):
                if self.args.load_best_model_at_end:
                    raise DPZeroError("load_best_model_at_end: this adapter is saved as what it puts out.")
                checkpoint = None  # the journal makes the weights again
            self.create_optimizer()
            warn_of_small_moves(self._dpzero_optimizer, run.plan.steps)
            run.enter(run.perturbation(self.model), self._dpzero_optimizer, at_checkpoint=checkpoint is not None)
            if checkpoint is not None and checkpoint_step(Path(checkpoint)) >= run.plan.steps:
                return self._finished(checkpoint)
            output = super().train(checkpoint, *args, **kwargs)
        ended = run.perturbation(self.model)
        start = run.segments[0].header["start"]
        if self.state.global_step and start_digest(ended.with_adapter, ended.parameters) == start:
            warnings.warn("Training did not move the trainable parameters: is the learning rate 0?", stacklevel=2)
        return self._public_output(output)

    def _finished(self, checkpoint: str) -> TrainOutput:
        """Takes over the last step's checkpoint: the Trainer's loop would take one step more."""
        self._load_from_checkpoint(checkpoint)
        self.state = TrainerState.load_from_json(str(Path(checkpoint) / "trainer_state.json"))
        return self._public_output(TrainOutput(self.state.global_step, None, {}))

    def begin_steps(self, model: nn.Module) -> None:
        """Connects what the run's steps are made of; the first step does it.

        Args:
            model: as the Trainer's loop passes it to `training_step`.
        """
        model = (model if self._compiled is None else self._compiled).eval()
        run, passes = self.run, self._passes
        perturbation, losses = run.perturbation(self.model, passes.streamed), passes.losses
        if model is not self.model:
            losses = self._compiled_losses(model, perturbation, losses)
        dataset, collate = self._sampled()
        batches = run.batches(dataset, collate, passes.shapes, self.args.seed)
        run.begin(model, batches, losses, perturbation, self._dpzero_optimizer, passes.idle)

    def private_collator(self) -> Callable[[list[Any]], dict[str, Any]]:
        """Makes what goes through the model of a row as it was given: columns that the model does not take are left
        out."""
        collate = self.data_collator
        if (unit := self.dpzero_config.privacy_unit) is not None:
            collate = without_column(collate, unit)
        collate = self._get_collator_with_removed_columns(collate, description="training")
        return pair_collator(self, collate)

    def _sampled(self) -> tuple[Any, Callable[[list[Any]], dict[str, Any]]]:
        """The training data without columns that the model does not take, where that is cheap, and its collator."""
        dataset = self.train_dataset
        if hasattr(dataset, "remove_columns"):
            dataset = self._remove_unused_columns(dataset, description="training")
        return dataset, self.private_collator()

    def get_train_dataloader(self) -> DataLoader[Any]:
        """Paces the loop, one empty item a step; the step draws its own batch."""
        return step_loader(self.run.num_units, self.logical_batch_size)

    def get_total_train_batch_size(self, args: TrainingArguments) -> int:
        """The logical batch."""
        return self.logical_batch_size

    def training_step(self, model: nn.Module, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        """Makes the step's release and hands it to the optimizer. Returns 0, or the raw loss if it is not withheld."""
        if self.run.step is None:
            self.begin_steps(model)
        report = self.run.release(self.state.global_step)
        self._estimate = report.estimate
        return torch.tensor(report.nonprivate_loss or 0.0, device=self.args.device)

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """What `args.optim` asks for, over the Trainer's weight-decay groups, unless an optimizer was passed in.

        Raises:
            DPZeroError: one that needs gradients was passed, or `args.optim_args` cannot be followed.
        """
        if getattr(self, "optimizer", None) is None:
            decay = set(self.get_decay_parameter_names(self.model))
            named = [(n, p) for n, p in self.model.named_parameters() if p.requires_grad]
            groups = [
                {"params": [p for n, p in named if n in decay], "weight_decay": self.args.weight_decay},
                {"params": [p for n, p in named if n not in decay], "weight_decay": 0.0},
            ]
            self.optimizer = optimizer_for(self.args, [g for g in groups if g["params"]])
        optimizer = as_dpzero_optimizer(self.optimizer)
        if getattr(self, "_dpzero_optimizer", None) is not optimizer:
            self._dpzero_optimizer = optimizer
            # The loop calls step() without arguments.
            optimizer.register_step_pre_hook(lambda *_: ((optimizer, self._taken_estimate()), {}))
        return self.optimizer

    def _taken_estimate(self) -> Estimate | None:
        estimate, self._estimate = self._estimate, None
        return estimate

    def create_accelerator_and_postprocess(self) -> None:
        """As in the Trainer, but models are never wrapped: nothing is synchronized but the K sums."""
        # Accelerate's FSDP would shard what is trained, too.
        with patch_environment(ACCELERATE_USE_FSDP="false", ACCELERATE_USE_PARALLELISM_CONFIG="false"):
            super().create_accelerator_and_postprocess()
        check_accelerator(self.accelerator)
        self.accelerator.prepare_model = functools.partial(self.accelerator.prepare_model, evaluation_mode=True)
        if self.model is not None and is_offloaded(self.model):
            self.accelerator.device_placement = False

    def _move_model_to_device(self, model: nn.Module, device: torch.device) -> None:
        if not is_offloaded(model) and self._sharding is None:
            super()._move_model_to_device(model, device)

    def hyperparameter_search(self, *args: Any, **kwargs: Any) -> Any:
        """Refused: every trial would spend its own ε, and choosing among them spends more."""
        raise DPZeroError("hyperparameter_search would spend an ε a trial, unaccounted: tune on public data.")


class DPZeroTrainer(DPZeroTrainerMixin, Trainer):  # type: ignore[misc]
    """`transformers.Trainer` that fine-tunes privately with forward passes only. See `DPZeroTrainerMixin`."""
