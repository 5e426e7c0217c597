"""Mistakes in the training data, told before the first step."""

from __future__ import annotations

import copy
import functools
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset
from peft_dpzero import DPZeroError, DPZeroTrainer
from peft_dpzero.checks.data import check_collator, check_labels
from peft_dpzero.estimation.batching import without_column
from peft_dpzero.estimation.tasks import ClassificationTask
from transformers import DataCollatorForLanguageModeling, default_data_collator

from tiny import adapted, arguments, config, tiny_dataset, tiny_model, word_tokenizer


def rows(labels: list[Any]) -> Dataset:
    return tiny_dataset("classifier").remove_columns("labels").add_column("labels", labels)


def refused(folder: Path, dataset: Dataset, words: str, **options: Any) -> None:
    run = DPZeroTrainer(adapted(), arguments(folder), train_dataset=dataset, dpzero_config=config(), **options)
    with pytest.raises(DPZeroError, match=words) as told:
        run.train()
    assert "37" not in str(told.value)
    assert not (folder / "dpzero_journal").exists()


@pytest.mark.parametrize(
    ("labels", "words"),
    [
        ([0, 1] * 31 + [0, 37], "classes outside 0 to 1, the 2 that the model has"),
        ([0, 1] * 31 + [0, -100], "classes outside 0 to 1"),
        ([0, 1] * 31 + [0, None], "rows without a label"),
        ([0.0, 1.0] * 32, "holds float64, and 2 classes need integers from 0 to 1"),
        (["good", "bad"] * 32, "holds string, and 2 classes need integers"),
        ([[0], [1]] * 32, "one class for each row"),
    ],
)
def test_labels_that_the_head_cannot_mean(labels: list[Any], words: str, tmp_path: Path) -> None:
    refused(tmp_path, rows(labels), words)


def test_text_that_was_never_tokenized(tmp_path: Path) -> None:
    dataset = Dataset.from_dict({"sentence": ["a private sentence"] * 64, "label": [0, 1] * 32})
    refused(tmp_path, dataset, "no 'input_ids': tokenize 'sentence' first")


def test_rows_that_a_transform_makes_are_trained_on(tmp_path: Path) -> None:
    tokenizer = word_tokenizer()
    dataset = Dataset.from_dict({"text": ["w5 w6 w7", "w8 w9"] * 32, "label": ["good", "bad"] * 32})
    dataset.set_transform(
        lambda rows: dict(tokenizer(rows["text"]), labels=[int(label == "good") for label in rows["label"]])
    )
    args = arguments(tmp_path, max_steps=1, remove_unused_columns=False)
    run = DPZeroTrainer(
        adapted(), args, train_dataset=dataset, processing_class=tokenizer, dpzero_config=config(clipping="fixed")
    )
    assert run.train().global_step == 1


def test_the_training_data_are_not_public(tmp_path: Path) -> None:
    dataset = tiny_dataset("classifier")
    refused(tmp_path, dataset, "public_text is the training data", public_text=dataset)
    refused(tmp_path, dataset, "public_text is the training data", public_text=copy.copy(dataset))


class Masks:
    def __init__(self) -> None:
        self.random = np.random.RandomState(0)

    def collated(self, rows: list[Any]) -> Any:
        return self.random.rand() and default_data_collator(rows)


GENERATOR = torch.Generator()


def draws_by_a_global_one(rows: list[Any]) -> Any:
    return torch.rand(1, generator=GENERATOR) and default_data_collator(rows)


def draws_by(generator: Any) -> Any:
    def collate(rows: list[Any]) -> Any:
        return generator.random() and default_data_collator(rows)

    return collate


@pytest.mark.parametrize(
    "collator",
    [
        DataCollatorForLanguageModeling(word_tokenizer(), seed=42),
        draws_by(np.random.default_rng(0)),
        functools.partial(draws_by(random.Random(0))),
        draws_by_a_global_one,
        Masks().collated,
        without_column(DataCollatorForLanguageModeling(word_tokenizer(), seed=0), "user"),
    ],
)
def test_masks_that_depend_on_the_rows_before_are_refused(collator: Any) -> None:
    with pytest.raises(DPZeroError, match="from row to row"):
        check_collator(collator)


def test_masks_from_the_secret_seeds_pass() -> None:
    choice = random.choice

    def from_the_global_generator(rows: list[Any]) -> Any:
        return choice([default_data_collator])(rows)

    check_collator(from_the_global_generator)
    check_collator(without_column(DataCollatorForLanguageModeling(word_tokenizer()), "user"))


def test_what_is_right_passes() -> None:
    model = tiny_model("classifier")
    named = rows([0, 1] * 32).cast_column("labels", ClassLabel(names=["bad", "good"]))
    for dataset, problem in (
        (named, None),
        (rows([0.5] * 64), "regression"),
        (rows([[1.0, 0.0]] * 64), "multi_label_classification"),
        (tiny_dataset("tagger"), "multi_label_classification"),
        ([{"labels": 37}], None),
    ):
        check_labels(dataset, ClassificationTask(problem), model)
