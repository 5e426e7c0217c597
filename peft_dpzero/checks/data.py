"""Training data that cannot be sampled, or that its task cannot read: told by name, before the first step.

Column names and types are public. Label values are not: that they may stop a run is a stated gap, and no message quotes
one.
"""

from __future__ import annotations

import functools
import inspect
import random
from collections.abc import Sequence
from types import FunctionType, MethodType
from typing import Any

import numpy as np
import torch
from torch.utils.data import IterableDataset

from peft_dpzero.errors import DPZeroError
from peft_dpzero.estimation.tasks import ClassificationTask, Task
from peft_dpzero.estimation.verbalizer import Verbalizer

_GENERATORS = (torch.Generator, np.random.Generator, np.random.RandomState, random.Random)
# The global ones, which are seeded for each example.
_SEEDED = (torch.default_generator, np.random.mtrand._rand, random._inst)
_SINGLE = "single_label_classification"
_STRINGS = ("string", "large_string")
_LABELS = ("labels", "label", "label_ids")
# What a model can read; without any of them text was not tokenized.
_INPUTS = ("input_ids", "inputs_embeds", "pixel_values", "input_values", "input_features")


def check_dataset(dataset: Any) -> None:
    """Refuses data that cannot be Poisson-sampled.

    Raises:
        DPZeroError: no data set, an iterable one, or an empty one.
    """
    if dataset is None:
        raise DPZeroError("train_dataset is missing: DPZero trains on a map-style data set.")
    if isinstance(dataset, IterableDataset) or not (hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__")):
        raise DPZeroError(
            "train_dataset is iterable or streaming: Poisson sampling needs random access. Load it in full, for "
            "example with datasets.Dataset.from_generator."
        )
    if len(dataset) == 0:
        raise DPZeroError("train_dataset is empty: there is nothing to train on.")


def check_collator(collator: Any) -> None:
    """Refuses collators that join examples, or that draw at random from a generator of their own.

    Such a generator goes on from row to row, so that a row's masks would depend on which others were drawn.

    Raises:
        DPZeroError: the collator flattens or packs, or has a seed or a generator.
    """
    if (name := _own_generator(collator)) is not None:
        raise DPZeroError(
            f"The data collator draws at random by its own {name}, which goes on from row to row, so that "
            "rows would depend on each other: leave it out. The global generators have a secret seed for each example."
        )
    flattens = any(kind.__name__ == "DataCollatorWithFlattening" for kind in type(collator).__mro__)
    if flattens or getattr(collator, "padding_free", False) is True:
        raise DPZeroError(
            f"{type(collator).__name__} joins examples into one row, so that no single one can be clipped: use a "
            "padding collator."
        )


def _own_generator(collator: Any, depth: int = 3) -> str | None:
    """The name of a seed or generator that a collator, or what it calls, keeps."""
    held: dict[Any, Any] = dict(getattr(collator, "__dict__", {}))
    if isinstance(collator, functools.partial):
        held |= {"func": collator.func, **collator.keywords}
        held |= dict(enumerate(collator.args))
    if isinstance(collator, MethodType):
        held |= getattr(collator.__self__, "__dict__", {})
    if isinstance(collator, FunctionType):
        read = inspect.getclosurevars(collator)
        held |= {**read.nonlocals, **read.globals}
    for name, value in held.items():
        own = isinstance(value, _GENERATORS) and not any(value is known for known in _SEEDED)
        if own or (name == "seed" and value is not None):
            return str(name)
        deeper = depth and callable(value) and not isinstance(value, type)
        if deeper and (found := _own_generator(value, depth - 1)) is not None:
            return found
    return None


def check_columns(dataset: Any, label_names: Sequence[str], needs_labels: bool, drops_unused: bool) -> None:
    """Refuses a data set whose columns show that it was never tokenized, or that it has no labels.

    Args:
        dataset: what has no `column_names`, or is transformed as it is read, is let pass.
        label_names: what the Trainer takes for labels besides the usual names.
        needs_labels: whether the collator leaves labels to the data.
        drops_unused: whether columns that the model does not take are dropped before the collator sees them.

    Raises:
        DPZeroError: names the columns.
    """
    columns = getattr(dataset, "column_names", None)
    if not columns or _is_transformed(dataset):
        return
    texts = [name for name, kind in _features(dataset).items() if getattr(kind, "dtype", None) in _STRINGS]
    if texts and drops_unused and not set(columns) & set(_INPUTS):
        raise DPZeroError(
            f"train_dataset has no 'input_ids': tokenize {', '.join(map(repr, texts))} first, for example with "
            "train.map(lambda rows: tokenizer(rows['text'], truncation=True), batched=True)."
        )
    if needs_labels and not set(columns) & {*_LABELS, *label_names}:
        raise DPZeroError(
            f"train_dataset has no 'labels' column (it has {', '.join(columns)}). Add one; for a causal LM, a copy of "
            "input_ids with -100 where no loss is wanted, or a data_collator that makes it."
        )


def check_labels(dataset: Any, task: Task, model: Any) -> None:
    """Refuses class labels that the model's head cannot have meant.

    Args:
        dataset: what has no typed columns, or is transformed as it is read, is let pass.
        task: only classes that are told apart are looked at.
        model: its config holds the number of classes.

    Raises:
        DPZeroError: labels are missing, no integers, or out of range. No value is told.
    """
    name = next((name for name in _LABELS if name in _features(dataset)), None)
    classes = classes_of(task, model)
    if name is None or classes is None or _is_transformed(dataset):
        return
    kind = _features(dataset)[name]
    dtype = str(getattr(kind, "dtype", ""))
    if dtype.startswith(("float", *_STRINGS)):
        raise DPZeroError(
            f"Column {name!r} holds {dtype}, and {classes} classes need integers from 0 to {classes - 1}: map them "
            "first (for regression, load the model with num_labels=1)."
        )
    values = dataset.with_format(None)[name][:]
    if any(value is None for value in values):
        raise DPZeroError(f"Column {name!r} has rows without a label: drop them, or give them one.")
    numbers = np.asarray(values)
    if numbers.ndim != 1 or not np.issubdtype(numbers.dtype, np.integer):
        raise DPZeroError(f"Column {name!r} must hold one class for each row: integers from 0 to {classes - 1}.")
    if len(numbers) and not (numbers.min() >= 0 and numbers.max() < classes):
        raise DPZeroError(
            f"Column {name!r} holds classes outside 0 to {classes - 1}, the {classes} that the model has: load it with "
            "num_labels=… as many as there are, counting from 0."
        )


def check_public(text: Any, dataset: Any, name: str = "public_text") -> None:
    """Refuses the training data as public text.

    Raises:
        DPZeroError: it is the same object, or the same data set.
    """
    if text is None:
        return
    public, private = (getattr(data, "_fingerprint", None) for data in (text, dataset))
    if text is dataset or (public is not None and public == private):
        raise DPZeroError(f"{name} is the training data, which is private: give other text of the same kind.")


def _is_transformed(dataset: Any) -> bool:
    """Whether `set_transform` or `with_transform` makes rows that the columns say nothing of."""
    return dict(getattr(dataset, "format", None) or {}).get("type") == "custom"


def _features(dataset: Any) -> dict[str, Any]:
    return dict(getattr(dataset, "features", None) or {})


def classes_of(task: Task, model: Any) -> int | None:
    """How many classes labels name; None if they name something else."""
    if isinstance(task, Verbalizer):
        return len(task.words)
    config: Any = getattr(model, "config", None)
    several = int(getattr(config, "num_labels", None) or 1) > 1
    other = getattr(config, "problem_type", None) in ("regression", "multi_label_classification")
    if type(task) is not ClassificationTask or not several or other or task.problem_type not in (None, _SINGLE):
        return None
    return int(config.num_labels)
