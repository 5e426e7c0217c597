"""Trains a tiny adapter and pushes it to the Hub of HF_ENDPOINT. usage: hub_push.py FOLDER"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from huggingface_hub import HfApi
from peft import LoraConfig, get_peft_model
from peft_dpzero import DPZeroConfig, DPZeroTrainer
from safetensors.torch import save_file
from transformers import BertForSequenceClassification

from tiny import arguments, tiny_dataset, tiny_model, word_tokenizer


def strays(folder: Path) -> None:
    """Somebody else's files, under names that a release could have too."""
    for name in ("model.safetensors", "config.json", "model-00001-of-00002.safetensors"):
        for place in (folder, folder / "model-x"):
            place.mkdir(parents=True, exist_ok=True)
            (place / name).write_bytes(b"somebody else's")


def main() -> None:
    folder = Path(sys.argv[1])
    base = tiny_model("classifier")
    base.config.id2label, base.config.label2id = {0: "bad", 1: "good"}, {"bad": 0, "good": 1}
    base.save_pretrained(folder / "base")
    tokenizer = word_tokenizer()
    tokenizer.save_pretrained(folder / "base")
    HfApi(token="hf_secret").create_repo("user/base")
    HfApi(token="hf_secret").upload_folder(repo_id="user/base", folder_path=folder / "base")
    base = BertForSequenceClassification.from_pretrained(folder / "base")
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
        processing_class=tokenizer,
        dpzero_config=DPZeroConfig(noise_multiplier=1.0, target_delta=1e-5, num_directions=2),
    )
    strays(folder / "run")
    trainer.train()
    strays(folder / "run" / "checkpoint-4")
    figures = {"eval_accuracy": 0.123456789, "eval_loss": 0.5, "eval_runtime": 3.0}
    trainer.push_to_hub(
        tags=["demo"],
        license="apache-2.0",
        language="en",
        finetuned_from="user/base",
        datasets=["user/reviews"],
        eval_results=figures,
    )
    ids = torch.arange(5, 13)[None]
    with torch.no_grad():
        logits = model.eval()(input_ids=ids).logits
    save_file({"input_ids": ids, "logits": logits}, folder / "logits.safetensors")


if __name__ == "__main__":
    main()
