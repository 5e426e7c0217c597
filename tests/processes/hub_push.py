"""Trains a tiny adapter and pushes it to the Hub of HF_ENDPOINT. usage: hub_push.py FOLDER"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from peft_dpzero import DPZeroConfig, DPZeroTrainer
from safetensors.torch import save_file

from tiny import arguments, tiny_dataset, tiny_model


def strays(folder: Path) -> None:
    """Somebody else's files, under names that a release could have too."""
    for name in ("model.safetensors", "config.json", "model-00001-of-00002.safetensors"):
        for place in (folder, folder / "model-x"):
            place.mkdir(parents=True, exist_ok=True)
            (place / name).write_bytes(b"somebody else's")


def main() -> None:
    folder = Path(sys.argv[1])
    base = tiny_model("classifier")
    base.save_pretrained(folder / "base")
    model = get_peft_model(base, LoraConfig(task_type="SEQ_CLS", r=2, target_modules=["query", "value"]))
    settings = arguments(
        folder / "run",
        max_steps=4,
        save_strategy="steps",
        save_steps=2,
        push_to_hub=True,
        hub_model_id="user/private-adapter",
        hub_strategy="every_save",
        hub_token="hf_secret",
    )
    trainer = DPZeroTrainer(
        model,
        settings,
        train_dataset=tiny_dataset("classifier"),
        dpzero_config=DPZeroConfig(noise_multiplier=1.0, target_delta=1e-5, num_directions=2),
    )
    strays(folder / "run")
    trainer.train()
    strays(folder / "run" / "checkpoint-4")
    trainer.push_to_hub(tags=["demo"], license="apache-2.0")
    ids = torch.arange(5, 13)[None]
    with torch.no_grad():
        logits = model.eval()(input_ids=ids).logits
    save_file({"input_ids": ids, "logits": logits}, folder / "logits.safetensors")


if __name__ == "__main__":
    main()
