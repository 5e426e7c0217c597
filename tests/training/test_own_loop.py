"""What a loop of one's own is refused before its journal is opened, as the Trainer is."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from peft_dpzero import DPZeroConfig, DPZeroError, DPZeroSGD, Run
from peft_dpzero.training import sharding
from torch import nn
from transformers import DataCollatorForLanguageModeling, default_data_collator

from tiny import adapted, config, tiny_dataset, tiny_model, word_tokenizer


def refused(
    folder: Path,
    words: str,
    model: Any = None,
    collate: Callable[[list[Any]], Any] = default_data_collator,
    dpzero: DPZeroConfig | None = None,
) -> None:
    model = adapted() if model is None else model
    run = Run(dpzero or config(), tiny_dataset("classifier"), expected_batch_size=8, steps=2)
    optimizer = DPZeroSGD(p for p in model.parameters() if p.requires_grad)
    with pytest.raises(DPZeroError, match=words), run.started(model, optimizer, collate, folder):
        pass
    assert not (folder / "dpzero_journal").exists()


def test_minutes_are_refused(tmp_path: Path) -> None:
    refused(tmp_path, "steps and expected_batch_size are yours", dpzero=config(minutes=1.0))


def test_masks_that_depend_on_the_rows_before_are_refused(tmp_path: Path) -> None:
    masking = DataCollatorForLanguageModeling(word_tokenizer(), seed=42)
    refused(tmp_path, "from row to row", collate=masking)


def compiled() -> Any:
    return torch.compile(adapted())


def injected() -> Any:
    model = tiny_model("classifier")
    model.add_adapter(LoraConfig(r=2, target_modules=["query"]))
    return model


def broken() -> Any:
    model = adapted()
    next(model.parameters()).data[0] = float("nan")
    return model


@pytest.mark.parametrize(
    ("build", "words"),
    [(compiled, "pass the model itself"), (injected, "get_peft_model"), (broken, "NaN or infinity")],
)
def test_models_that_cannot_be_trained_are_refused(build: Callable[[], Any], words: str, tmp_path: Path) -> None:
    refused(tmp_path, words, model=build())


def test_a_model_that_was_sharded_before_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sharding, "DTensor", nn.Parameter)
    refused(tmp_path, "sharded already")
