"""Public text as rows that the run's task can read, with made-up labels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from peft_dpzero.checks.data import classes_of
from peft_dpzero.errors import DPZeroError
from peft_dpzero.estimation.tasks import Seq2SeqTask, Task, TokenTask

_LONGEST = 512


def public_rows(
    text: Any, task: Task, model: Any, tokenizer: Any, max_length: int | None = None
) -> list[dict[str, Any]]:
    """Rows with the labels that a task reads: any class at random, or a text's own tokens.

    Args:
        text: strings, or rows as the training data has them, whose labels are replaced if classes are told apart.
        task: the run's.
        model: tells the number of classes.
        tokenizer: for strings.
        max_length: tokens to which strings are cut.

    Raises:
        DPZeroError: there is no text, no tokenizer for strings, or rows lack labels that cannot be made up.
    """
    if not len(text):
        raise DPZeroError("public_text is empty: give some hundred texts or rows.")
    rows = [text[i] for i in range(len(text))]
    if isinstance(rows[0], str):
        rows = _tokenized(rows, tokenizer, max_length)
    generator = torch.Generator().manual_seed(0)
    classes = classes_of(task, model)
    if classes is not None:
        labels = torch.randint(0, classes, (len(rows),), generator=generator).tolist()
        return [{**Task().inputs(row), "labels": label} for row, label in zip(rows, labels, strict=True)]
    if isinstance(task, TokenTask) and not isinstance(task, Seq2SeqTask) and task.shift:
        return [row if "labels" in row else {**row, "labels": list(row["input_ids"])} for row in rows]
    if not all("labels" in row or "label" in row for row in rows):
        raise DPZeroError(f"public_text needs labels for {type(task).__name__}: give rows with (made-up) labels.")
    return [dict(row) for row in rows]


def _tokenized(texts: Sequence[str], tokenizer: Any, max_length: int | None) -> list[dict[str, Any]]:
    if tokenizer is None or not callable(tokenizer):
        raise DPZeroError("public_text holds strings: pass processing_class=tokenizer, or tokenized rows.")
    encoded = tokenizer(list(texts), truncation=True, max_length=max_length or _LONGEST)
    return [{key: values[i] for key, values in encoded.items()} for i in range(len(texts))]
