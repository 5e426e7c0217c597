"""Mistakes in the training data, told before the first step."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
from datasets import ClassLabel, Dataset
from peft_dpzero import DPZeroError, DPZeroTrainer
from peft_dpzero.checks.data import check_labels
from peft_dpzero.estimation.tasks import ClassificationTask

from tiny import adapted, arguments, config, tiny_dataset, tiny_model


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


def test_the_training_data_are_not_public(tmp_path: Path) -> None:
    dataset = tiny_dataset("classifier")
    refused(tmp_path, dataset, "public_text is the training data", public_text=dataset)
    refused(tmp_path, dataset, "public_text is the training data", public_text=copy.copy(dataset))


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
