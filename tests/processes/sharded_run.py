"""One rank of the sharding tests: `accelerate launch --multi_gpu --num_processes P sharded_run.py OUT`.

Trains a tiny model whose frozen weights are sharded, and leaves what this rank saw and ended with in OUT. `--kill`
sends the last rank a SIGKILL inside a pass of one step, and `--resume` goes on from there. `--bad-row` gives the data
rows that cannot be read. `--kinds` tries other models and units, and settings that are left open.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from accelerate import ParallelismConfig, PartialState
from accelerate.utils import patch_environment
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from peft_dpzero import DPZeroConfig, DPZeroError, DPZeroTrainer
from peft_dpzero.estimation.losses import Losses
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import TrainerCallback, TrainingArguments, default_data_collator

import tiny
from tiny import trained

STEPS = 12
# Of four processes each expects one row, so that about one in three draws none.
LOGICAL_BATCH = 4
SAVE_STEPS = 4
KILLED_IN = 6
SHARDED: dict[str, Any] = {"fsdp": True, "fsdp_config": {"version": 2}}
KINDS: dict[str, dict[str, Any]] = {
    "classifier": {"fsdp": True, "fsdp_config": {"version": 2, "transformer_layer_cls_to_wrap": "BertLayer"}},
    "kept": {"fsdp": True, "fsdp_config": {"version": 2, "reshard_after_forward": False}},
    "by_size": {"fsdp": True, "fsdp_config": {"auto_wrap_policy": "SIZE_BASED_WRAP", "min_num_params": 500}},
    "masked_lm": SHARDED,
    "bfloat16": SHARDED,
    "in_two_groups": SHARDED | {"parallelism_config": ParallelismConfig(dp_replicate_size=2, dp_shard_size=2)},
}


def model_of(kind: str, seed: int = 0, r: int = 2) -> PeftModel:
    """The same base for every seed, with an adapter that differs."""
    base = tiny.tiny_model(kind if kind in tiny.LORA_TARGETS else "causal_lm")
    if kind == "bfloat16":
        base = base.to(torch.bfloat16)
    torch.manual_seed(seed)
    heads = ["classifier"] if kind == "classifier" else None
    targets = tiny.LORA_TARGETS.get(kind, ["q_proj", "v_proj"])
    return get_peft_model(base, LoraConfig(r=r, target_modules=targets, modules_to_save=heads, init_lora_weights=False))


def rows_of(kind: str, count: int = 32) -> Dataset:
    """Rows of 4 to 11 tokens."""
    rows = [ids[: 4 + i % 8] for i, ids in enumerate(tiny.token_rows(count, 12))]
    labels = [i % 2 for i in range(count)] if kind == "classifier" else rows
    return Dataset.from_dict({"input_ids": rows, "attention_mask": [[1] * len(ids) for ids in rows], "labels": labels})


def make_trainer(folder: Path, kind: str = "causal_lm", *, seed: int = 0, **options: Any) -> DPZeroTrainer:
    """On each rank, or on one that is alone."""
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    config = options.pop("config", {"noise_multiplier": 0.5, "deterministic": True})
    chosen = {"clipping_threshold": 1.0, "smoothing_parameter": 1e-2, "target_delta": 1e-3, "num_directions": 2}
    kept = ("callbacks", "data_collator", "trainer", "model", "eval_dataset", "public_text")
    others = {key: options.pop(key) for key in kept if key in options}
    arguments: TrainingArguments = tiny.arguments(
        folder,
        max_steps=STEPS,
        per_device_train_batch_size=LOGICAL_BATCH // processes,
        per_device_eval_batch_size=1,
        learning_rate=1e-2,
        save_strategy="steps",
        save_steps=SAVE_STEPS,
        **options,
    )
    made = {"model": model_of(kind, seed), "train_dataset": rows_of(kind), "eval_dataset": rows_of(kind, 10)} | others
    return made.pop("trainer", DPZeroTrainer)(args=arguments, dpzero_config=DPZeroConfig(**(chosen | config)), **made)


def losses_of(trainer: DPZeroTrainer, kind: str) -> list[float]:
    """Every row's own loss, by plain passes."""
    losses = Losses(trainer.model.eval(), trainer.task, dict)
    rows = ({key: torch.tensor([value]) for key, value in row.items()} for row in rows_of(kind))
    return [float(losses(row)) for row in rows]


def local_bytes(model: nn.Module) -> int:
    """Of frozen weights that are sharded, what this rank holds."""
    return sum(p.to_local().nbytes for p in model.parameters() if isinstance(p, DTensor))


class CountingTrainer(DPZeroTrainer):
    """Notes how many micro-batches each step has here, and how many passes it makes."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.drawn: list[int] = []
        self.passes: list[int] = []
        self.model.register_forward_pre_hook(lambda module, args: self._count())

    def _count(self) -> None:
        if self.passes:
            self.passes[-1] += 1

    def training_step(self, model: nn.Module, *args: Any, **kwargs: Any) -> Tensor:
        if self.run.step is None:
            self.begin_steps(model)
        self.passes.append(0)
        self.drawn.append(len(self.run.step.batches.draw(self.state.global_step).micro_batches))
        return super().training_step(model, *args, **kwargs)


class AtStep(TrainerCallback):
    """Calls `action` when `step` steps are done."""

    def __init__(self, step: int, action: Callable[[nn.Module], None]) -> None:
        self.step = step
        self.action = action

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            self.action(kwargs["model"])


def die_in_the_next_pass(model: nn.Module) -> None:
    last = [module for module in model.modules() if type(module).__name__.endswith("DecoderLayer")][-1]
    last.register_forward_pre_hook(lambda module, args: os.kill(os.getpid(), signal.SIGKILL))


def refusals(folder: Path) -> dict[str, str]:
    """What each refused run raises before anything is sharded."""
    config = {"noise_multiplier": 0.5, "deterministic": True}
    refused: dict[str, dict[str, Any]] = {
        "version": {"fsdp_config": {"version": 1}},
        "offload": {"fsdp_config": {"version": 2, "cpu_offload": True}},
        "full": {"model": tiny.tiny_model("causal_lm")},
        "compiled": {"torch_compile": True},
        "public": {"public_text": ["some text"] * 300},
        "minutes": {"config": config | {"minutes": 1.0}},
        "batches": {"accelerator_config": {"even_batches": False}},
        "no block": {"fsdp_config": {"auto_wrap_policy": "NO_WRAP"}},
        "unknown block": {"fsdp_config": {"transformer_layer_cls_to_wrap": "NoSuchLayer"}},
        "models": {"model": model_of("causal_lm", r=2 + int(os.environ["RANK"]))},
    }
    raised = {}
    for name, options in refused.items():
        try:
            # TrainingArguments leave torch_compile there.
            with patch_environment(ACCELERATE_DYNAMO_BACKEND="no"):
                make_trainer(folder / name, **(SHARDED | options))
        except DPZeroError as error:
            raised[name] = str(error)
    return raised


def fails_on_long_rows(rows: list[dict[str, Any]]) -> dict[str, Any]:
    if len(rows[0]["input_ids"]) == 11:
        raise ValueError("a private text")
    return dict(default_data_collator(rows))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("out", type=Path)
    parser.add_argument("--kill", action="store_true")
    parser.add_argument("--bad-row", action="store_true")
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("--kinds", action="store_true")
    options = parser.parse_args()
    out: Path = options.out
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])

    # These are sharded by what `accelerate launch` says.
    if options.kill:
        callbacks = [AtStep(KILLED_IN, die_in_the_next_pass)] if rank == world_size - 1 else []
        make_trainer(out / "killed", callbacks=callbacks).train()
        return
    if options.bad_row:
        make_trainer(out / "bad", data_collator=fails_on_long_rows).train()
        return
    if options.resume:
        resumed = make_trainer(out / "killed", seed=rank)
        resumed.train(resume_from_checkpoint=True)
        resumed.save_model()
        save_file(trained(resumed), out / f"resumed-{rank}.safetensors")
        resumed.accelerator.end_training()
        return

    report: dict[str, Any] = kinds(out, rank) if options.kinds else whole(out, rank)
    (out / f"report-{rank}.json").write_text(json.dumps(report))
    PartialState().wait_for_everyone()
    PartialState().destroy_process_group()


def whole(out: Path, rank: int) -> dict[str, Any]:
    """One run from its start to its end, and what is refused before and after it."""
    raised = refusals(out / "raised")
    model = model_of("causal_lm", seed=rank)
    for parameter in model.parameters() if rank else ():
        # All take the first one's.
        parameter.data.zero_()
    trainer = make_trainer(out / "whole", model=model, trainer=CountingTrainer, **SHARDED)
    before = trainer.evaluate()
    trainer.train()
    trainer.save_model()
    frozen = [p for p in trainer.model.parameters() if not p.requires_grad]
    report = {
        "raised": raised,
        "misplaced": [n for n, p in trainer.model.named_parameters() if isinstance(p, DTensor) == p.requires_grad],
        "local": local_bytes(trainer.model),
        "whole": sum(p.nbytes for p in frozen),
        "drawn": trainer.drawn,
        "passes": list(trainer.passes),
        "evaluated": [before["eval_loss"], trainer.evaluate()["eval_loss"]],
        "losses": losses_of(trainer, "causal_lm"),
    }
    save_file(trained(trainer), out / f"whole-{rank}.safetensors")
    for name, action in {
        "again": lambda: make_trainer(out / "again", model=trainer.model, **SHARDED),
        "generate": lambda: trainer.model.generate(input_ids=torch.tensor([[7, 8]]), max_new_tokens=2),
        "tune_on": trainer.tune_on,
    }.items():
        try:
            action()
        except DPZeroError as error:
            raised[name] = str(error)
    return report


def kinds(out: Path, rank: int) -> dict[str, Any]:
    """Other models and units."""
    losses = {kind: losses_of(make_trainer(out / "losses", kind, **how), kind) for kind, how in KINDS.items()}

    # Kept whole from the first call on, where reading weights to save them would make one process gather them alone.
    local = {}
    for kind in ("kept", "in_two_groups"):
        trainer = make_trainer(out / kind, seed=rank, **KINDS[kind])
        local[kind] = local_bytes(trainer.model)
        trainer.train()
        trainer.save_model()
        save_file(trained(trainer), out / f"{kind}-{rank}.safetensors")

    # With what is left open measured in lock-step, and a guarantee.
    private = {"target_epsilon": 4.0, "clipping_threshold": None, "smoothing_parameter": None}
    trainer = make_trainer(out / "private", seed=rank, config=private, **SHARDED)
    trainer.train()
    trainer.save_model()
    return {"losses": losses, "local": local}


if __name__ == "__main__":
    main()
