"""Loads a saved adapter with plain PEFT, in a process that knows nothing of peft_dpzero, and prints its accuracy."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import torch
from peft import PeftModel
from reviews import movie_reviews
from sentence_classifier import SentenceForSequenceClassification
from transformers import AutoTokenizer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--base", required=True)
    parser.add_argument("--adapter", required=True)
    parser.add_argument("--reviews", type=Path, required=True)
    options = parser.parse_args()

    base = SentenceForSequenceClassification.from_pretrained(options.base)
    model = PeftModel.from_pretrained(base, options.adapter).eval()
    tokenizer = AutoTokenizer.from_pretrained(options.base)
    _, held_out = movie_reviews(options.reviews)
    rows = sorted(held_out, key=lambda row: len(row["text"]))
    correct = 0
    for start in range(0, len(rows), 64):
        chunk = rows[start : start + 64]
        texts = [row["text"] for row in chunk]
        batch = tokenizer(texts, truncation=True, max_length=64, padding=True, return_tensors="pt")
        with torch.no_grad():
            logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        correct += int((logits.argmax(1) == torch.tensor([row["labels"] for row in chunk])).sum())
    assert "peft_dpzero" not in sys.modules
    print(json.dumps({"accuracy_reloaded": correct / len(rows)}))


if __name__ == "__main__":
    main()
