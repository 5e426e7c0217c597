"""From a table with text and label columns to tokenized examples."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from datasets import ClassLabel, Dataset, DatasetDict, Value, load_dataset, load_from_disk

from peft_dpzero.cli.settings import FILE_FORMATS, MASK, DataSettings
from peft_dpzero.errors import DPZeroError, withheld
from peft_dpzero.modules import text_config

DEFAULT_MAX_LENGTH = 512
_INDICES = "__class_indices__"


def load_table(data: DataSettings, part: str) -> Dataset:
    """The rows of `data.train`, `data.eval` or `data.public`, with the text and label columns only.

    Local files are read through a temporary folder, so that no copy of them stays in a cache.

    Args:
        data: the settings.
        part: "train", "eval" or "public", whose labels are not read.

    Raises:
        DPZeroError: the data cannot be read, or lacks a column.
    """
    source, split = str(getattr(data, part)), "train" if part == "public" else getattr(data, f"{part}_split")
    subset = None if part == "public" else data.subset
    table = _read_file(source) if Path(source).is_file() else _read_named(source, subset, split, part)
    wanted = [*data.columns, *([data.label] if data.label and part != "public" else [])]
    if missing := [column for column in wanted if column not in table.column_names]:
        raise DPZeroError(f"data.{part} has no column {missing[0]!r}: its columns are {', '.join(table.column_names)}.")
    if len(table) == 0:
        raise DPZeroError(f"data.{part} is empty.")
    return table.select_columns(list(dict.fromkeys(wanted)))


def _read_file(source: str) -> Dataset:
    kind = FILE_FORMATS[Path(source).suffix]
    with tempfile.TemporaryDirectory() as cache:
        try:
            return load_dataset(kind, data_files=source, split="train", cache_dir=cache, keep_in_memory=True)
        except Exception as error:
            cause = error.__cause__ or error
            raise DPZeroError(
                f"{source} cannot be read as {kind} ({type(cause).__name__}): is it well formed, and not empty?"
            ) from None


def _read_named(source: str, subset: str | None, split: str, part: str) -> Dataset:
    try:
        if (Path(source) / "state.json").is_file() or (Path(source) / "dataset_dict.json").is_file():
            saved = load_from_disk(source, keep_in_memory=True)
            return saved[split] if isinstance(saved, DatasetDict) else saved
        return load_dataset(source, subset, split=split)
    except Exception as error:
        raise DPZeroError(
            f"data.{part}: the dataset {source!r} cannot be loaded with subset {subset!r} and split {split!r} "
            f"({type(error).__name__}): check the three names and the connection."
        ) from None


def class_names(table: Dataset, column: str, given: Sequence[Any] | None) -> list[str]:
    """The classes in the order of their indices: those `given`, else the distinct values of `column`, sorted.

    Raises:
        DPZeroError: the column cannot hold classes, or holds fewer than two.
    """
    feature = table.features[column]
    if given is not None:
        names = [str(name) for name in given]
    elif isinstance(feature, ClassLabel):
        names = list(feature.names)
    else:
        _check_label_type(feature, column)
        values = table.unique(column)
        if None in values:
            raise DPZeroError(f"The label column {column!r} has empty cells: fill or drop them.")
        names = [str(value) for value in sorted(values)]
    if len(set(names)) < max(2, len(names)):
        raise DPZeroError(f"The label column {column!r} needs at least two different classes.")
    return names


def with_class_indices(table: Dataset, column: str, names: Sequence[str]) -> Dataset:
    """`table` with `column` replaced by a column `labels` of indices into `names`.

    Raises:
        DPZeroError: a value is none of the names; it is not shown.
    """
    feature, values = table.features[column], table[column][:]
    if isinstance(feature, ClassLabel):
        if set(names) <= set(feature.names):
            values = [feature.names[value] if value is not None and value >= 0 else None for value in values]
    else:
        _check_label_type(feature, column)
    indices = {name: index for index, name in enumerate(names)}
    labels = [indices.get(str(value), -1) for value in values]
    if min(labels) < 0:
        raise DPZeroError(
            f"The label column {column!r} holds a value that is none of the classes {', '.join(names)}: name them all "
            "in data.label_words or data.labels, and fill empty cells."
        )
    others = [name for name in table.column_names if name != column]
    indexed = table.add_column(_INDICES, labels)  # before the old column goes: a table without columns has no rows
    return indexed.select_columns([*others, _INDICES]).rename_column(_INDICES, "labels")


def _check_label_type(feature: Any, column: str) -> None:
    dtype = getattr(feature, "dtype", str(feature))
    if not (isinstance(feature, Value) and dtype.startswith(("int", "uint", "bool", "string", "large_string"))):
        raise DPZeroError(
            f"The label column {column!r} must hold integers, true/false or text, and holds {dtype} (a csv's integers "
            "turn into float64 if some cells are empty)."
        )


class Encoder:
    """Turns a row into token ids: template filled, text columns shortened until the tokens fit.

    The template itself is never cut, so that a mask or a closing phrase stays.

    Args:
        tokenizer: the model's.
        data: gives template and columns.
        max_length: tokens an example may have.
        mask_text: what `{mask}` stands for.
        causal_lm: whether the text itself is the target; it is then closed by the end-of-text token.
    """

    def __init__(
        self, tokenizer: Any, data: DataSettings, max_length: int, mask_text: str = "", causal_lm: bool = False
    ) -> None:
        self.tokenizer = tokenizer
        self.columns = data.columns
        self.template = data.template
        self.max_length = max_length
        self.mask_text = mask_text
        self.causal_lm = causal_lm

    def __call__(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """Token ids of one row, with its labels if it has any."""
        values = {column: "" if row[column] is None else str(row[column]) for column in self.columns}
        if self.mask_text:
            values = {k: v.replace(self.tokenizer.mask_token, "") for k, v in values.items()}
        ids = self._ids(values)
        while len(ids) > self.max_length:
            column = max(values, key=lambda name: len(values[name]))
            length = len(values[column])
            if not length:
                raise DPZeroError(f"data.text alone is longer than the {self.max_length} tokens that fit: shorten it.")
            values[column] = values[column][: min(length - 1, length * self.max_length // len(ids))]
            ids = self._ids(values)
        labels = {"labels": ids} if self.causal_lm else {"labels": row["labels"]} if "labels" in row else {}
        return {"input_ids": ids, "attention_mask": [1] * len(ids), **labels}

    def _ids(self, values: Mapping[str, str]) -> list[int]:
        text = self.template.format(**{**values, **({MASK: self.mask_text} if self.mask_text else {})})
        # Not verbose: a tokenizer prints the length of a text that is too long for the model.
        ids = list(self.tokenizer(text, verbose=False)["input_ids"])
        if self.causal_lm and self.tokenizer.eos_token_id is not None and ids[-1:] != [self.tokenizer.eos_token_id]:
            ids.append(self.tokenizer.eos_token_id)
        # A text without tokens still needs one, so that the model can read it.
        return ids or [self.tokenizer.pad_token_id]


def encode(table: Dataset, encoder: Encoder) -> Dataset:
    """`table` tokenized, in memory."""
    with withheld("tokenising the data"):
        encoded: Dataset = table.map(encoder, remove_columns=table.column_names, keep_in_memory=True, desc="Tokenising")
    return encoded


def token_limit(asked: int | None, tokenizer: Any, model_config: Any, reserved: int) -> int:
    """How many tokens an example may have, `reserved` of the model's positions being taken by others.

    Raises:
        DPZeroError: more are asked for than fit.
    """
    positions = getattr(text_config(model_config), "max_position_embeddings", None) or tokenizer.model_max_length
    room = min(tokenizer.model_max_length, positions) - reserved
    if room < 1 or (asked or 1) > room:
        raise DPZeroError(f"data.max_length can be at most {room} with this model and adapter.")
    return int(min(asked or DEFAULT_MAX_LENGTH, room))
