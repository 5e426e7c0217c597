"""Loads the pushed adapter with plain PEFT and compares logits. usage: hub_load.py FOLDER"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from huggingface_hub import hf_hub_download
from peft import AutoPeftModelForSequenceClassification, PeftModel
from safetensors.torch import load_file
from transformers import BertForSequenceClassification, pipeline


def usage_snippet(card: str) -> str:
    """The card's first block of Python."""
    return card.split("```python\n", 1)[1].split("```", 1)[0]


def main() -> None:
    folder = Path(sys.argv[1])
    expected = load_file(folder / "logits.safetensors")
    base = BertForSequenceClassification.from_pretrained(folder / "base")
    model = PeftModel.from_pretrained(base, "user/private-adapter").eval()
    with torch.no_grad():
        logits = model(input_ids=expected["input_ids"]).logits
    torch.testing.assert_close(logits, expected["logits"], rtol=0, atol=1e-6)
    text = "w5 w6 w7 w8 w9 w10 w11 w12"
    found = pipeline("text-classification", model="user/private-adapter")(text, top_k=None)
    scores = {one["label"]: one["score"] for one in found}
    seen, wanted = torch.tensor([scores["bad"], scores["good"]]), expected["logits"][0].softmax(-1)
    torch.testing.assert_close(seen, wanted, rtol=0, atol=1e-6)
    auto = AutoPeftModelForSequenceClassification.from_pretrained("user/private-adapter").eval()
    with torch.no_grad():
        torch.testing.assert_close(auto(input_ids=expected["input_ids"]).logits, expected["logits"], rtol=0, atol=1e-6)
    exec(usage_snippet(Path(hf_hub_download("user/private-adapter", "README.md")).read_text()), {})
    assert "peft_dpzero" not in sys.modules


if __name__ == "__main__":
    main()
