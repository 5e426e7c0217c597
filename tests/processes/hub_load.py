"""Loads the pushed adapter with plain PEFT and compares logits. usage: hub_load.py FOLDER"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import BertForSequenceClassification


def main() -> None:
    folder = Path(sys.argv[1])
    expected = load_file(folder / "logits.safetensors")
    base = BertForSequenceClassification.from_pretrained(folder / "base")
    model = PeftModel.from_pretrained(base, "user/private-adapter").eval()
    with torch.no_grad():
        logits = model(input_ids=expected["input_ids"]).logits
    torch.testing.assert_close(logits, expected["logits"], rtol=0, atol=1e-6)
    assert "peft_dpzero" not in sys.modules


if __name__ == "__main__":
    main()
