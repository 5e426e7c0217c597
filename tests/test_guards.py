"""What is refused, before any data is read."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from datasets import IterableDataset
from peft import LoraConfig, get_peft_model
from peft_dpzero import DPZeroConfig, DPZeroError, DPZeroTrainer, DPZeroTrainerMixin
from peft_dpzero.guards import check_arguments
from transformers import DataCollatorWithFlattening, Trainer

from tiny import arguments, tiny_dataset, tiny_model


class Unreadable(torch.utils.data.Dataset):  # type: ignore[type-arg]
    """Has a length and columns, and fails when a row is read."""

    def __init__(self, length: int = 64, columns: tuple[str, ...] = ("input_ids", "attention_mask", "labels")) -> None:
        self.length = length
        self.column_names = list(columns)

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> Any:
        raise AssertionError("data was read")


def lora(model: Any = None) -> Any:
    return get_peft_model(
        model or tiny_model("classifier"), LoraConfig(task_type="SEQ_CLS", r=2, target_modules=["query", "value"])
    )


def config(**changes: Any) -> DPZeroConfig:
    return DPZeroConfig(**({"noise_multiplier": 1.0, "target_delta": 1e-5, "num_directions": 2} | changes))


def refused(folder: Path, words: str, model: Any = None, dpzero: DPZeroConfig | None = None, **changes: Any) -> None:
    data = changes.pop("train_dataset", Unreadable())
    keywords = {key: changes.pop(key) for key in ("data_collator", "compute_loss_func") if key in changes}
    with pytest.raises(DPZeroError, match=words):
        DPZeroTrainer(
            lora() if model is None else model,
            arguments(folder, **changes),
            train_dataset=data,
            dpzero_config=dpzero or config(),
            **keywords,
        ).train()
    assert not (folder / "dpzero_journal").exists()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("deepspeed", "config.json"),
        ("fsdp", ["full_shard"]),
        ("fp16", True),
        ("neftune_noise_alpha", 5.0),
        ("auto_find_batch_size", True),
        ("torch_empty_cache_steps", 4),
        ("label_smoothing_factor", 0.1),
        ("include_num_input_tokens_seen", "all"),
        ("train_sampling_strategy", "group_by_length"),
        ("group_by_length", True),
        ("packing", True),
        ("padding_free", True),
        ("hub_strategy", "all_checkpoints"),
    ],
)
def test_arguments_that_break_privacy_are_refused_by_name(name: str, value: Any) -> None:
    check_arguments(SimpleNamespace())
    with pytest.raises(DPZeroError, match=name):
        check_arguments(SimpleNamespace(**{name: value}))


def test_data_that_cannot_be_sampled_is_refused(tmp_path: Path) -> None:
    stream = IterableDataset.from_generator(lambda: iter(tiny_dataset("classifier")))
    refused(tmp_path, "iterable or streaming", train_dataset=stream)
    refused(tmp_path, "missing", train_dataset=None)
    refused(tmp_path, "empty", train_dataset=Unreadable(0))
    refused(tmp_path, "no 'labels' column", train_dataset=Unreadable(columns=("input_ids", "text")))


def test_impossible_budgets_are_refused(tmp_path: Path) -> None:
    refused(tmp_path, "larger than the data", per_device_train_batch_size=65)
    refused(tmp_path, "1/N", dpzero=config(target_delta=0.5))


def test_losses_and_collators_that_join_examples_are_refused(tmp_path: Path) -> None:
    refused(tmp_path, "joins examples", data_collator=DataCollatorWithFlattening())
    refused(tmp_path, "per_example_loss", compute_loss_func=lambda outputs, labels, num_items_in_batch: 0.0)


def test_models_that_cannot_be_tuned_are_refused(tmp_path: Path) -> None:
    frozen = tiny_model("classifier").requires_grad_(False)
    refused(tmp_path, "frozen", model=frozen)

    broken = lora()
    next(broken.parameters()).data[0] = float("nan")
    refused(tmp_path, "NaN or infinity", model=broken)

    unused = tiny_model("classifier").requires_grad_(False)
    unused.extra = torch.nn.Linear(2, 2)
    refused(tmp_path, "do not reach", model=unused)


def test_a_model_that_mixes_examples_is_refused(tmp_path: Path) -> None:
    base = tiny_model("classifier")
    forward = base.bert.encoder.forward

    def mixing(hidden: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        output = forward(hidden, *args, **kwargs)
        output.last_hidden_state = output.last_hidden_state - output.last_hidden_state.mean(0)
        return output

    base.bert.encoder.forward = mixing
    refused(tmp_path, "batch-mates", model=lora(base))


def test_custom_samplers_are_refused(tmp_path: Path) -> None:
    class Ordered(Trainer):
        def _get_train_sampler(self, train_dataset: Any = None) -> Any:
            return torch.utils.data.SequentialSampler(train_dataset)

    class Private(DPZeroTrainerMixin, Ordered):
        pass

    with pytest.raises(DPZeroError, match="sampler"):
        Private(lora(), arguments(tmp_path), train_dataset=Unreadable(), dpzero_config=config())


def test_a_config_is_required_and_searches_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DPZeroError, match="dpzero_config"):
        DPZeroTrainer(lora(), arguments(tmp_path), train_dataset=Unreadable())
    run = DPZeroTrainer(lora(), arguments(tmp_path), train_dataset=Unreadable(), dpzero_config=config())
    with pytest.raises(DPZeroError, match="ε"):
        run.hyperparameter_search()


def test_a_loss_that_is_already_averaged_is_refused(tmp_path: Path) -> None:
    run = DPZeroTrainer(
        lora(),
        arguments(tmp_path),
        train_dataset=tiny_dataset("classifier"),
        dpzero_config=config(),
        per_example_loss=lambda outputs, labels: outputs.logits.mean(),
    )
    with pytest.raises(DPZeroError, match="must not be averaged"):
        run.train()


def test_missing_labels_in_a_batch_name_the_fix(tmp_path: Path) -> None:
    rows = [{"input_ids": [5, 6, 7], "attention_mask": [1, 1, 1]}] * 64
    run = DPZeroTrainer(lora(), arguments(tmp_path), train_dataset=rows, dpzero_config=config())
    with pytest.raises(DPZeroError, match="no 'labels'"):
        run.train()
