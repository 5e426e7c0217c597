"""A private training loop of one's own, with Accelerate and no Trainer.

    python integrations/accelerate/train.py [--output-dir DIR] [--steps T]
    ACCELERATE_USE_CPU=true accelerate launch --multi_gpu --num_processes 2 integrations/accelerate/train.py

Tunes a LoRA adapter on a made-up task; saves it with its privacy record and card.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import peft_dpzero as dpzero
import torch
from accelerate import Accelerator
from accelerate.utils import send_to_device, set_seed
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import BertConfig, BertForSequenceClassification, get_scheduler

VOCABULARY, LENGTH, NUM_TRAIN, BATCH = 100, 16, 4096, 128


def make_rows(count: int, seed: int) -> list[dict[str, Any]]:
    """Random sentences; the label says whether words of the vocabulary's upper half are in the majority."""
    generator = torch.Generator().manual_seed(seed)
    lean = torch.rand(count, 1, generator=generator).lt(0.5) * 0.5 + 0.25
    upper = torch.rand(count, LENGTH, generator=generator) < lean
    ids = torch.randint(1, VOCABULARY // 2, (count, LENGTH), generator=generator) + upper * (VOCABULARY // 2)
    return [
        {"input_ids": row, "labels": int(label)} for row, label in zip(ids, upper.sum(1) > LENGTH // 2, strict=True)
    ]


def collate(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """Rows → micro-batch."""
    ids = torch.stack([row["input_ids"] for row in rows])
    return {"input_ids": ids, "labels": torch.tensor([row["labels"] for row in rows])}


def build_model() -> PeftModel:
    """A small random model: its seed is the same on all processes."""
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    config = BertConfig(vocab_size=VOCABULARY, initializer_range=0.2, **sizes)
    lora = LoraConfig(task_type="SEQ_CLS", r=4, target_modules=["query", "value"])
    return get_peft_model(BertForSequenceClassification(config), lora)


@torch.no_grad()
def accuracy(model: PeftModel, rows: list[dict[str, Any]], device: torch.device) -> float:
    """Accuracy on rows that are treated as public."""
    batch = send_to_device(collate(rows), device)
    predicted = model.eval()(input_ids=batch["input_ids"]).logits.argmax(dim=1)
    return float((predicted == batch["labels"]).float().mean())


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--output-dir", type=Path, default=Path("runs/accelerate"))
    parser.add_argument("--steps", type=int, default=100)
    options = parser.parse_args()

    accelerator = Accelerator()
    set_seed(0)
    model = build_model().to(accelerator.device)
    train_rows, test_rows = make_rows(NUM_TRAIN, seed=1), make_rows(1000, seed=2)

    config = dpzero.DPZeroConfig(
        target_epsilon=2.0, target_delta=1e-5, num_directions=8, clipping_threshold=1.0, max_length=LENGTH
    )
    run = dpzero.Run(config, train_rows, expected_batch_size=BATCH, steps=options.steps, accelerator=accelerator)
    optimizer = dpzero.DPZeroSGD((p for p in model.parameters() if p.requires_grad), lr=3.0)
    scheduler = get_scheduler("linear", optimizer, num_warmup_steps=0, num_training_steps=run.plan.steps)

    before = accuracy(model, test_rows, accelerator.device)
    with run.started(model, optimizer, collate, options.output_dir):
        for number in range(run.plan.steps):
            estimate = run.release(number).estimate
            optimizer.step(estimate)
            scheduler.step()
            if (number + 1) % 20 == 0:
                accelerator.print(f"step {number + 1:4d}   |g| {estimate.released.norm:.3f}")
    after = accuracy(model, test_rows, accelerator.device)

    run.save(model, options.output_dir)
    record = run.record()
    accelerator.print(f"processes {accelerator.num_processes}   accuracy {before:.3f} → {after:.3f}")
    accelerator.print(f"epsilon {record['epsilon']:.3f} at delta {record['delta']:g}   saved in {options.output_dir}")
    accelerator.end_training()


if __name__ == "__main__":
    main()
