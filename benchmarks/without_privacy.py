"""What AdamW reaches without privacy on the demo's model, from its start, on the same rows.

    python benchmarks/without_privacy.py [--sets amazon tweets]

Needs `make demo` to have run once, for its data. Three epochs of 16 rows a step; prints the accuracy on the held-out
rows before and after.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time

from transformers import Trainer, TrainingArguments, set_seed

from workloads import REVIEWS, ROOT

sys.path.insert(0, str(ROOT / "integrations" / "trainer"))
from reviews import SETS
from sentiment import accuracy, started, tokenized

EPOCHS, ROWS, RATE = 3, 16, 3e-4


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sets", nargs="+", choices=SETS, default=list(SETS))
    options = parser.parse_args()
    for name in options.sets:
        print(f"{name}: {trained(name)}", flush=True)


def trained(name: str) -> str:
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder,
            num_train_epochs=EPOCHS,
            per_device_train_batch_size=ROWS,
            per_device_eval_batch_size=100,
            learning_rate=RATE,
            save_strategy="no",
            report_to=[],
            use_cpu=True,
            disable_tqdm=True,
        )
        set_seed(arguments.seed)
        model, tokenizer, _ = started(REVIEWS, name)
        train, held_out = tokenized(REVIEWS, name, tokenizer)
        trainer = Trainer(
            model=model,
            args=arguments,
            train_dataset=train,
            eval_dataset=held_out,
            processing_class=tokenizer,
            compute_metrics=accuracy,
        )
        before, start = trainer.evaluate()["eval_accuracy"], time.perf_counter()
        trainer.train()
        minutes = (time.perf_counter() - start) / 60
        after = trainer.evaluate()["eval_accuracy"]
    return f"{before:.1%} -> {after:.1%} on {len(held_out):,} rows, {len(train):,} trained on, {minutes:.1f} minutes"


if __name__ == "__main__":
    main()
