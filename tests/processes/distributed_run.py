"""One rank of the multi-process tests: `accelerate launch --multi_gpu --num_processes P distributed_run.py OUT`.

(`--multi_gpu` is what makes Accelerate start several processes, also for CPUs.)

Trains a tiny model under DPZeroTrainer, whole and with an interruption, and leaves what this rank ended with in OUT.
`--die exit|raise` makes the last rank fail at step 5 instead. `--disagree` gives it another run in several ways, and
leaves what each rank raised.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from peft_dpzero import DPZeroConfig, DPZeroError, DPZeroTrainer
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import TrainerCallback, TrainingArguments

import tiny

STEPS = 50
NUM_DIRECTIONS = 3
LOGICAL_BATCH = 12
# The interrupted run stops here, ten releases after its last checkpoint.
INTERRUPTED_AT = 30
SAVE_STEPS = 20
DIES_AT = 5


class Traffic(TorchDispatchMode):
    """Records each collective operation that runs within it, as [name, bytes of its tensors]."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[list[Any]] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func.namespace == "c10d":
            tensors = [t for t in torch.utils._pytree.tree_leaves(args) if isinstance(t, Tensor)]
            self.calls.append([func._opname, sum(t.nbytes for t in tensors)])
        return func(*args, **(kwargs or {}))


class CountingTrainer(DPZeroTrainer):
    """Notes the traffic of each step and of all that happens between the first step and the end of training."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.step_traffic: list[list[list[Any]]] = []
        self.wrapped: set[str] = set()

    def training_step(self, model: nn.Module, *args: Any, **kwargs: Any) -> Tensor:
        self.wrapped |= {type(model).__name__, type(self.model_wrapped).__name__}
        if not self.step_traffic:
            self.begin_steps(model)  # Shares the start: no part of a step.
        with Traffic() as traffic:
            result = super().training_step(model, *args, **kwargs)
        self.step_traffic.append(traffic.calls)
        return result


class AtStep(TrainerCallback):
    """Calls `action` when `step` steps are done."""

    def __init__(self, step: int, action: Callable[[Any], None]) -> None:
        self.step = step
        self.action = action

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            self.action(control)


def stop(control: Any) -> None:
    control.should_training_stop = True


def leave(control: Any) -> None:
    os._exit(1)


def fail(control: Any) -> None:
    raise ValueError("this rank fails")


def lora_model(seed: int, r: int = 2) -> PeftModel:
    """The same base model for every seed, with an adapter that differs."""
    base = tiny.tiny_model("classifier")
    torch.manual_seed(seed)
    return get_peft_model(
        base,
        LoraConfig(r=r, target_modules=["query", "value"], modules_to_save=["classifier"], init_lora_weights=False),
    )


def make_trainer(
    folder: Path,
    world_size: int,
    rank: int = 0,
    dataset: Dataset | None = None,
    model: PeftModel | None = None,
    threshold: float = 1.0,
    **kwargs: Any,
) -> CountingTrainer:
    arguments: TrainingArguments = tiny.arguments(
        folder,
        max_steps=STEPS,
        per_device_train_batch_size=LOGICAL_BATCH // (2 * world_size),
        gradient_accumulation_steps=2,
        learning_rate=1e-2,
        logging_steps=10,
        save_strategy="steps",
        save_steps=SAVE_STEPS,
    )
    config = DPZeroConfig(
        noise_multiplier=0.5,
        target_delta=1e-3,
        num_directions=NUM_DIRECTIONS,
        clipping_threshold=threshold,
        deterministic=True,
    )
    dataset = dataset or tiny.tiny_dataset("classifier", count=48)
    model = model or lora_model(seed=rank)
    return CountingTrainer(model, arguments, train_dataset=dataset, dpzero_config=config, **kwargs)


def disagreements(folder: Path, world_size: int, rank: int) -> dict[str, str]:
    """What this rank raises if the last one has something else than the others."""
    rows = tiny.tiny_dataset("classifier", count=48)
    other: dict[str, dict[str, Any]] = {
        "shuffle": {"dataset": rows.shuffle()},
        "rows": {"dataset": rows.select(range(40))},
        "settings": {"threshold": 2.0},
        "adapter": {"model": lora_model(seed=rank, r=3)},
    }
    raised = {}
    for kind, changes in other.items():
        trainer = make_trainer(folder / kind, world_size, rank, **(changes if rank == world_size - 1 else {}))
        try:
            trainer.train()
        except DPZeroError as error:
            raised[kind] = str(error)
    return raised


def trained(trainer: DPZeroTrainer) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in trainer.model.named_parameters() if p.requires_grad}


def interrupted_run(folder: Path, world_size: int, rank: int) -> DPZeroTrainer:
    """Stops after its last checkpoint and goes on from there in a new trainer."""
    make_trainer(folder, world_size, rank, callbacks=[AtStep(INTERRUPTED_AT, stop)]).train()
    resumed = make_trainer(folder, world_size, rank)
    resumed.train(resume_from_checkpoint=True)
    return resumed


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("out", type=Path)
    parser.add_argument("--die", choices=["exit", "raise"])
    parser.add_argument("--disagree", action="store_true")
    options = parser.parse_args()
    out: Path = options.out
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])

    if options.die:
        action = {"exit": leave, "raise": fail}[options.die]
        callbacks = [AtStep(DIES_AT, action)] if rank == world_size - 1 else []
        make_trainer(out / "dying", world_size, rank, callbacks=callbacks).train()
        return

    if options.disagree:
        (out / f"raised-{rank}.json").write_text(json.dumps(disagreements(out, world_size, rank)))
        # The threads of a group that is left standing may abort the process as it exits.
        PartialState().destroy_process_group()
        return

    trainer = make_trainer(out / "whole", world_size, rank)
    start = trained(trainer)
    with Traffic() as traffic:
        trainer.train()
    trainer.save_model()
    report = {
        "processes": trainer.accelerator.num_processes,
        "backend": torch.distributed.get_backend(),
        "wrapped": sorted(trainer.wrapped),
        "step_traffic": trainer.step_traffic,
        "train_traffic": traffic.calls,
        "has_journal": trainer.run.journal is not None,
        "logs": trainer.state.log_history,
    }
    (out / f"report-{rank}.json").write_text(json.dumps(report))
    save_file(start, out / f"start-{rank}.safetensors")
    save_file(trained(trainer), out / f"whole-{rank}.safetensors")
    resumed = interrupted_run(out / "interrupted", world_size, rank)
    save_file(trained(resumed), out / f"resumed-{rank}.safetensors")
    trainer.accelerator.end_training()


if __name__ == "__main__":
    main()
