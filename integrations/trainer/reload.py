"""Loads a saved adapter with plain PEFT, in a process that knows nothing of peft_dpzero, and prints its accuracy."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import torch
from peft import PeftModel
from reviews import rated_as_labels
from transformers import AutoModelForSequenceClassification, AutoTokenizer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--base", required=True)
    parser.add_argument("--adapter", required=True)
    parser.add_argument("--reviews", type=Path, required=True)
    parser.add_argument("--private", default="movies")
    options = parser.parse_args()

    base = AutoModelForSequenceClassification.from_pretrained(options.base)
    model = PeftModel.from_pretrained(base, options.adapter).eval()
    tokenizer = AutoTokenizer.from_pretrained(options.adapter)
    _, held_out = rated_as_labels(options.reviews, options.private)
    rows = sorted(held_out, key=lambda row: len(row["text"]))
    correct = 0
    for start in range(0, len(rows), 64):
        chunk = rows[start : start + 64]
        batch = tokenizer([row["text"] for row in chunk], truncation=True, padding=True, return_tensors="pt")
        with torch.no_grad():
            logits = model(**batch).logits
        correct += int((logits.argmax(1) == torch.tensor([row["labels"] for row in chunk])).sum())
    assert "peft_dpzero" not in sys.modules
    print(json.dumps({"accuracy_reloaded": correct / len(rows)}))


if __name__ == "__main__":
    main()
