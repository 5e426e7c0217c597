"""One rank of the multi-process tests: `accelerate launch --multi_gpu --num_processes P distributed_run.py OUT`.

(`--multi_gpu` is what makes Accelerate start several processes, also for CPUs.)

Trains a tiny model under DPZeroTrainer, whole and with an interruption, and leaves what this rank ended with in OUT.
`--die WAY` makes the last rank fail at step 5 instead, or wait there for what the test does; `--resume` goes on from
there. `--disagree` gives it another run in several ways, and leaves what each rank raised. `--wire` leaves how many
bytes crossed this host's network interface.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import signal
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from peft_dpzero import DPZeroConfig, DPZeroError, DPZeroTrainer
from peft_dpzero.processes import AcceleratedProcesses
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import TrainerCallback, TrainingArguments

import tiny
from tiny import trained

STEPS = 50
NUM_DIRECTIONS = 3
LOGICAL_BATCH = 12
ROWS = 48
OPTIONS: dict[str, Any] = {"noise_multiplier": 0.5, "target_delta": 1e-3}
# The interrupted run stops here, ten releases after its last checkpoint.
INTERRUPTED_AT = 30
SAVE_STEPS = 20
DIES_AT = 5
# Of `--wire`: large enough that what they send stands out of what connections send besides.
WIRE_RANK = 256
WIRE_DIRECTIONS = 2048
WIRE_STEPS = 3
# Seconds after which no delayed acknowledgement is on its way.
SETTLED = 0.2


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


def kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def waiting(folder: Path) -> Callable[[Any], None]:
    """Says that it waits, by a file in `folder`, and goes on when that file is gone."""

    def wait(control: Any) -> None:
        (folder / "waiting").touch()
        while (folder / "waiting").exists():
            time.sleep(0.01)

    return wait


def kill_in_sum(sent: bool) -> None:
    """From now on this process is killed in step `DIES_AT`: before its part of the sum is sent, or after."""
    whole, calls = AcceleratedProcesses.sum, itertools.count()

    def cut_short(self: AcceleratedProcesses, tensor: Tensor) -> Tensor:
        dies = next(calls) == DIES_AT
        if dies and not sent:
            kill()
        total = whole(self, tensor)
        if dies:
            kill()
        return total

    AcceleratedProcesses.sum = cut_short  # type: ignore[method-assign]


def lora_model(seed: int, r: int = 2) -> PeftModel:
    """The same base model for every seed, with an adapter that differs, of which a part is not trained."""
    base = tiny.tiny_model("classifier")
    torch.manual_seed(seed)
    model = get_peft_model(
        base,
        LoraConfig(r=r, target_modules=["query", "value"], modules_to_save=["classifier"], init_lora_weights=False),
    )
    model.base_model.model.bert.encoder.layer[0].attention.self.query.lora_A.requires_grad_(False)
    return model


def make_trainer(
    folder: Path,
    world_size: int,
    rank: int = 0,
    dataset: Dataset | None = None,
    model: PeftModel | None = None,
    threshold: float = 1.0,
    num_directions: int = NUM_DIRECTIONS,
    steps: int = STEPS,
    private: bool = False,
    trainer: type[CountingTrainer] = CountingTrainer,
    **kwargs: Any,
) -> CountingTrainer:
    share = LOGICAL_BATCH // world_size
    accumulation = 2 if share % 2 == 0 else 1
    arguments: TrainingArguments = tiny.arguments(
        folder,
        max_steps=steps,
        per_device_train_batch_size=share // accumulation,
        gradient_accumulation_steps=accumulation,
        learning_rate=1e-2,
        logging_steps=10,
        save_strategy="steps",
        save_steps=SAVE_STEPS,
    )
    config = DPZeroConfig(
        **OPTIONS, num_directions=num_directions, clipping_threshold=threshold, deterministic=not private
    )
    dataset = dataset or tiny.tiny_dataset("classifier", count=ROWS)
    model = model or lora_model(seed=rank)
    return trainer(model, arguments, train_dataset=dataset, dpzero_config=config, **kwargs)


def disagreements(folder: Path, world_size: int, rank: int) -> dict[str, str]:
    """What this rank raises if the last one has something else than the others."""
    rows = tiny.tiny_dataset("classifier", count=ROWS)
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


def crossed() -> int:
    """Bytes that this host's interface has sent and received, when all processes have come here."""
    counters = Path("/sys/class/net") / os.environ["GLOO_SOCKET_IFNAME"] / "statistics"
    torch.distributed.barrier()
    time.sleep(SETTLED)
    found = sum(int((counters / name).read_text()) for name in ("tx_bytes", "rx_bytes"))
    torch.distributed.barrier()
    return found


def wire_traffic(folder: Path, world_size: int, rank: int) -> dict[str, int]:
    """Bytes that cross this host's interface while a run begins, and in its steps."""
    counts: list[int] = []

    class Counted(CountingTrainer):
        def begin_steps(self, model: nn.Module) -> None:
            counts.append(crossed())
            super().begin_steps(model)
            counts.append(crossed())

    model = lora_model(seed=rank, r=WIRE_RANK)
    end = AtStep(WIRE_STEPS, lambda control: counts.append(crossed()))
    sizes = {"num_directions": WIRE_DIRECTIONS, "steps": WIRE_STEPS}
    make_trainer(folder, world_size, rank, model=model, callbacks=[end], trainer=Counted, **sizes).train()
    before, begun, done = counts
    entries = sum(p.numel() for name, p in model.named_parameters() if "default" in name)
    return {"adapter": entries, "start": begun - before, "steps": done - begun}


def interrupted_run(folder: Path, world_size: int, rank: int) -> DPZeroTrainer:
    """Stops after its last checkpoint and goes on from there in a new trainer."""
    make_trainer(folder, world_size, rank, callbacks=[AtStep(INTERRUPTED_AT, stop)]).train()
    resumed = make_trainer(folder, world_size, rank)
    resumed.train(resume_from_checkpoint=True)
    return resumed


def dying_run(options: argparse.Namespace, world_size: int, rank: int) -> None:
    """Up to `DIES_AT` steps of a run: then something happens to the last rank."""
    out: Path = options.out
    actions = {"exit": leave, "raise": fail, "wait": waiting(out)}
    callbacks = []
    if rank == world_size - 1:
        if options.die in actions:
            callbacks = [AtStep(DIES_AT, actions[options.die])]
        else:
            kill_in_sum(sent=options.die == "sent")
    if options.timeout:
        # On a CPU the Trainer takes no notice of its ddp_timeout.
        PartialState(cpu=True, timeout=timedelta(seconds=options.timeout))
    make_trainer(out / "dying", world_size, rank, callbacks=callbacks, private=options.private).train()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("out", type=Path)
    parser.add_argument("--die", choices=["exit", "raise", "wait", "unsent", "sent"])
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("--disagree", action="store_true")
    parser.add_argument("--wire", action="store_true")
    parser.add_argument("--private", action="store_true", help="with secrets, so that no two runs are the same")
    parser.add_argument("--timeout", type=int, help="seconds that a process waits for the others")
    options = parser.parse_args()
    out: Path = options.out
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])

    if options.die:
        dying_run(options, world_size, rank)
        return

    if options.resume:
        resumed = make_trainer(out / "dying", world_size, rank, private=options.private)
        resumed.train(resume_from_checkpoint=True)
        resumed.save_model()
        save_file(trained(resumed), out / f"resumed-{rank}.safetensors")
        PartialState().destroy_process_group()
        return

    if options.wire:
        (out / f"wire-{rank}.json").write_text(json.dumps(wire_traffic(out / "wire", world_size, rank)))
        PartialState().destroy_process_group()
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
