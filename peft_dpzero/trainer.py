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
from accelerate.utils import broadcast_object_list
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import Trainer, TrainingArguments
from transformers.trainer_utils import TrainOutput, get_last_checkpoint

from peft_dpzero.config import DPZeroConfig
from peft_dpzero.errors import DPZeroError
from peft_dpzero.estimation.batching import LogicalBatches, step_loader
from peft_dpzero.estimation.differences import Losses
from peft_dpzero.estimation.losses import FunctionTask, Task, infer_task
from peft_dpzero.estimation.sampling import PoissonSampler, new_secret, seeded_secret
from peft_dpzero.estimation.trunk import SharedTrunk
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
from peft_dpzero.mechanism.accountant import COARSE_INTERVAL, PrivacyPlan, make_plan
from peft_dpzero.perturbation import Perturbation
from peft_dpzero.probe import Probe
from peft_dpzero.probe_causes import check_batch_norm
from peft_dpzero.release.journal import JOURNAL_NAME, Journal, JournalEntry
from peft_dpzero.release.optimizer import DPZeroOptimizer
from peft_dpzero.release.record import plan_header, privacy_record
from peft_dpzero.saving import SavingMixin
from peft_dpzero.step import PrivateStep

# What the stock Trainer logs that would tell of the private data.
_WITHHELD_LOGS = ("loss", "train_loss", "total_flos", "num_input_tokens_seen")


class DPZeroTrainerMixin(SavingMixin):
    """Makes a `transformers.Trainer` subclass private: put it first among the bases.

    The logical batch is `per_device_train_batch_size × gradient_accumulation_steps × processes` on average;
    `per_device_train_batch_size` examples go through the model at once.

    Args:
        model: as for the Trainer.
        args: as for the Trainer.
        dpzero_config: the mechanism and its budget.
        per_example_loss: a `Task` (for example `Verbalizer`), or a function `(outputs, labels) → (batch,)`, which
            need not be differentiable. None takes the loss of the model's class.
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
        **kwargs: Any,
    ) -> None:
        if not isinstance(dpzero_config, DPZeroConfig):
            raise DPZeroError("Pass dpzero_config=DPZeroConfig(target_epsilon=…, target_delta=…).")
        if kwargs.get("compute_loss_func") is not None:
            raise DPZeroError("compute_loss_func averages over the batch: pass per_example_loss instead.")
        if type(self)._get_train_sampler is not Trainer._get_train_sampler:
            raise DPZeroError("A custom train sampler cannot be accounted for: DPZero samples by itself.")
        args = TrainingArguments("trainer_output") if args is None else args
        check_arguments(args)
        check_processes(args.world_size, args.world_size)
        self.dpzero_config = dpzero_config
        self.logical_batch_size = int(
            args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size
        )
        # One item of the loop is one logical batch, and there are no gradients to clip.
        args = copy.copy(args)
        args.gradient_accumulation_steps = 1
        args.max_grad_norm = 0.0
        super().__init__(model, args, *positional, **kwargs)
        if self.args.n_gpu > 1:
            raise DPZeroError(
                "nn.DataParallel averages losses over replicas: use accelerate launch, or show one GPU only "
                "(CUDA_VISIBLE_DEVICES)."
            )
        check_collator(self.data_collator)
        if getattr(self, "optimizer", None) is not None:
            _as_dpzero_optimizer(self.optimizer)
        self.task = _as_task(per_example_loss, self.model)
        self._plan: PrivacyPlan | None = None
        self._step: PrivateStep | None = None
        self._trunk: SharedTrunk | None = None
        self._journal: Journal | None = None
        self._replayed: list[JournalEntry] = []
        self._grad_norm = 0.0

    # ---- The plan ----

    @property
    def privacy_plan(self) -> PrivacyPlan:
        """q, σ, T and what they cost; calibrated at first use, before any data is read."""
        if self._plan is None:
            check_dataset(self.train_dataset)
            units = len(self.train_dataset)
            if self.args.max_steps > 0:
                steps = self.args.max_steps
            else:
                steps = math.ceil(self.args.num_train_epochs * self._steps_per_epoch(units))
            self._plan = make_plan(self.dpzero_config, units, self.logical_batch_size, steps)
        return self._plan

    def _steps_per_epoch(self, units: int) -> int:
        return math.ceil(units / self.logical_batch_size)

    def privacy_record(self) -> dict[str, Any]:
        """The record of the releases made so far."""
        done = len(self._journal.entries) if self._journal is not None else self.state.global_step
        return privacy_record(self.privacy_plan, done)

    # ---- Training ----

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> TrainOutput:
        """As `Trainer.train`. Resuming applies journalled releases again and makes none twice.

        Raises:
            DPZeroError: see the class; also an output folder that holds another run's journal.
        """
        check_dataset(self.train_dataset)
        check_columns(self.train_dataset, self.label_names if self._needs_label_column else ())
        plan = self.privacy_plan
        check_weights(self.model)
        perturbation = self._perturbation()
        self._probe_model(perturbation)
        checkpoint = get_last_checkpoint(self.args.output_dir) if resume_from_checkpoint is True else None
        self._open_journal(plan, perturbation, checkpoint or resume_from_checkpoint or None)
        self._step = None
        start = fingerprint(perturbation)
        output = super().train(resume_from_checkpoint, *args, **kwargs)
        if self.state.global_step and fingerprint(self._perturbation()) == start:
            warnings.warn("Training did not move the trainable parameters: is the learning rate 0?", stacklevel=2)
        if self.dpzero_config.train_loss == "nonprivate":
            return output
        metrics = {key: value for key, value in output.metrics.items() if key not in _WITHHELD_LOGS}
        return TrainOutput(output.global_step, math.nan, metrics)

    @property
    def _needs_label_column(self) -> bool:
        return not hasattr(self.data_collator, "mlm")

    def _perturbation(self) -> Perturbation:
        config = self.dpzero_config
        return Perturbation(self.model, config.direction_seed, config.direction_distribution)

    def _probe_model(self, perturbation: Perturbation) -> None:
        self.model.eval()
        check_batch_norm(self.model)
        if not Probe.suits(self.model):
            warnings.warn("The model reads no tokens: that examples are independent was not probed.", stacklevel=3)
            return
        probe = Probe(self.model, self.args.device, padding_side(self.data_collator), self.task)
        probe.check_independence(perturbation)
        probe.check_reach(perturbation)
        self._trunk = probe.find_trunk(perturbation)

    def _open_journal(self, plan: PrivacyPlan, perturbation: Perturbation, checkpoint: Any) -> None:
        shared: list[Any] = [None]
        if self.is_world_process_zero():
            folder = Path(self.args.output_dir)
            folder.mkdir(parents=True, exist_ok=True)
            shapes = [(name, list(p.shape)) for name, p in perturbation.parameters.items()]
            self._journal = Journal(folder / JOURNAL_NAME, plan_header(plan, shapes))
            shared = [self._journal.entries]
            if self._journal.entries and checkpoint is None:
                raise DPZeroError(
                    f"{self._journal.path} holds {len(self._journal.entries)} releases of an earlier run on this "
                    "data: call train(resume_from_checkpoint=True) to go on, or use another output_dir."
                )
        self._replayed = list(self._from_main_process(shared)[0])
        if checkpoint is not None and (step := _checkpoint_step(checkpoint)) > len(self._replayed):
            raise DPZeroError(
                f"The checkpoint is at step {step} but the journal holds {len(self._replayed)} releases, so the ε "
                f"spent is unknown: put {JOURNAL_NAME} of that run into output_dir."
            )

        if checkpoint is not None and _checkpoint_step(checkpoint) >= plan.steps:
            raise DPZeroError(
                f"The run is finished: its {plan.steps} releases are made, and {checkpoint} holds the model. To train "
                "anew, which spends ε anew, use another output_dir."
            )

    def _from_main_process(self, values: list[Any]) -> list[Any]:
        return list(broadcast_object_list(values)) if self.args.world_size > 1 else values

    def _build_step(self, model: nn.Module) -> PrivateStep:
        plan, config = self.privacy_plan, self.dpzero_config
        perturbation = self._perturbation()
        secret = seeded_secret(self.args.seed) if config.deterministic else new_secret()
        return PrivateStep(
            model,
            plan,
            self._private_batches(PoissonSampler(plan.num_units, plan.sample_rate, secret)),
            Losses(model, self.task, self._prepare_inputs, self._trunk),
            perturbation,
            self._dpzero_optimizer,
            self._journal,
            self._replayed,
            self.accelerator,
        )

    def _private_batches(self, sampler: PoissonSampler) -> LogicalBatches:
        dataset, collate = self.train_dataset, self.data_collator
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
        )

    def get_train_dataloader(self) -> DataLoader[Any]:
        """Paces the loop, one empty item a step; the step draws its own batch."""
        check_dataset(self.train_dataset)
        units = len(self.train_dataset)
        return step_loader(units, self._steps_per_epoch(units))

    def get_total_train_batch_size(self, args: TrainingArguments) -> int:
        """The logical batch."""
        return self.logical_batch_size

    def training_step(self, model: nn.Module, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        """Makes the step's release and hands it to the optimizer. Returns 0, or the raw loss if it is not withheld."""
        if self._step is None:
            self._step = self._build_step(model)
        report = self._step(self.state.global_step)
        self._grad_norm = report.released.norm
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

    def hyperparameter_search(self, *args: Any, **kwargs: Any) -> Any:
        """Refused: every trial would spend its own ε, and choosing among them spends more."""
        raise DPZeroError("hyperparameter_search would spend an ε a trial, unaccounted: tune on public data.")

    # ---- What is logged ----

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """As in the Trainer, less what is private, plus the ε spent so far (an upper bound)."""
        if self.dpzero_config.train_loss == "withheld":
            logs = {key: value for key, value in logs.items() if key not in _WITHHELD_LOGS}
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


def _checkpoint_step(checkpoint: Any) -> int:
    digits = str(checkpoint).rstrip("/").rpartition("-")[2]
    return int(digits) if digits.isdigit() else 0
