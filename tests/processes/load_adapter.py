"""Loads saved models with plain peft and transformers, and compares their logits with those saved beside them.

usage: load_adapter.py FOLDER...   (each holds base/, saved/ and logits.safetensors)
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import transformers
from peft import PeftModel
from safetensors.torch import load_file


def main() -> None:
    for folder in map(Path, sys.argv[1:]):
        expected = load_file(folder / "logits.safetensors")
        config = transformers.AutoConfig.from_pretrained(folder / "base")
        kind = getattr(transformers, config.architectures[0])
        if (folder / "saved" / "adapter_config.json").exists():
            model = PeftModel.from_pretrained(kind.from_pretrained(folder / "base"), folder / "saved")
        else:
            model = kind.from_pretrained(folder / "saved")
        inputs = {key: value for key, value in expected.items() if key != "logits"}
        with torch.no_grad():
            logits = model.eval()(**inputs).logits
        torch.testing.assert_close(logits, expected["logits"], rtol=0, atol=1e-6, msg=lambda m, f=folder: f"{f}: {m}")
    assert "peft_dpzero" not in sys.modules
    print(f"{len(sys.argv) - 1} models agree")


if __name__ == "__main__":
    main()
