"""The shape in which a row goes through the model: a function of that row and of public facts, of no other row.

With its shape fixed, a row's outputs are the same bit for bit whatever the other rows of its micro-batch hold. So a row
is padded to a length that its own length decides, and a micro-batch of that length has a fixed number of rows: what is
missing is filled with made-up rows. `transformers` drops an attention mask that is 1 everywhere, which another row can
decide; so every row of a micro-batch ends in padding, and one that cannot goes by itself.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from peft_dpzero.errors import DPZeroError

IGNORE = -100
# Padded lengths are multiples of this, and of an eighth of the next power of two.
SHORTEST_STEP = 4
# What a pass costs besides its tokens, in tokens: estimates for small models.
PASS_TOKENS = {"cpu": 64}
PASS_TOKENS_ELSEWHERE = 2048
# About as many different lengths are drawn in a step.
LENGTHS_A_STEP = 14
_TARGETS = ("labels", "decoder_input_ids", "decoder_attention_mask")

Row = dict[str, Any]


@dataclass(frozen=True)
class Shapes:
    """Padded lengths, and rows a micro-batch.

    Attributes:
        expected_rows: rows that a process draws in a step, on average.
        most_rows: rows that go through the model at once at most, whatever their length.
        limit: positions that the model has; None if their number is not limited.
        max_length: tokens that a row may have; None allows any number.
        max_tokens: tokens, padding included, that go through the model at once, unless it is a single row.
        alone: whether every row goes through the model by itself.
        together: the padded lengths at which rows share a pass, since a trial showed no bit to depend on the others.
        exact: whether a row that goes by itself is not padded.
        pad_token_id: what `input_ids` are padded with.
        token_labels: whether labels (l,) belong to tokens; None tells by their shape.
        pass_tokens: what a pass costs besides its tokens, in tokens.
    """

    expected_rows: float
    most_rows: int
    limit: int | None = None
    max_length: int | None = None
    max_tokens: int | None = None
    alone: bool = False
    together: frozenset[int] = frozenset()
    exact: bool = True
    pad_token_id: int = 0
    token_labels: bool | None = None
    pass_tokens: int = PASS_TOKENS["cpu"]

    def rows(self, length: int) -> int:
        """How many rows of a padded length a micro-batch has."""
        return 1 if self.alone or length not in self.together else self.wanted_rows(length)

    def wanted_rows(self, length: int) -> int:
        """How many rows of a padded length share a pass where they are strangers to each other.

        It weighs a pass's fixed cost, which many rows share, against made-up rows, about half a micro-batch for each
        length that is drawn. Of fewer rows than two a length most would be made up. Rows without tokens are all of
        length 1.
        """
        if length == 1:
            return self.most_rows
        if self.expected_rows < 2 * LENGTHS_A_STEP:
            return 1
        best = math.sqrt(2 * self.pass_tokens * self.expected_rows / (LENGTHS_A_STEP * max(length, 1)))
        bound = self.most_rows if self.max_tokens is None else min(self.most_rows, self.max_tokens // max(length, 1))
        return max(1, min(1 << round(math.log2(max(best, 1))), bound))

    def length(self, tokens: int) -> int:
        """The padded length of a row: longer than the row, unless it goes by itself."""
        padded = self._bucket(tokens)
        return tokens if self.exact and self.rows(padded) == 1 else padded

    def lengths(self, longest: int, most_tokens: int) -> list[int]:
        """The padded lengths of rows below `longest` tokens at which several would share a pass of so many tokens."""
        bounds = [bound for bound in (longest, self.limit, self.max_length and self.max_length + 1) if bound]
        lengths = sorted({self._bucket(tokens) for tokens in range(1, min(bounds))})
        return [length for length in lengths if 1 < self.wanted_rows(length) <= most_tokens // length]

    def _bucket(self, tokens: int) -> int:
        step = max(SHORTEST_STEP, (1 << tokens.bit_length()) // 8)
        padded = step * (tokens // step + 1)
        return padded if self.limit is None else max(tokens, min(padded, self.limit))

    def fits(self, row: Row) -> bool:
        """Whether a collated row is within `max_length`."""
        return self.max_length is None or _tokens(row) <= self.max_length

    def padded(self, row: Row) -> Row:
        """A collated row (1, …), without the padding that it came with, padded to its own length.

        Every (1, l) column of the length of `attention_mask` is padded, targets of another length to one of their own.
        Tokens without a mask get one, unless they go alone.
        """
        ids, mask = row.get("input_ids"), row.get("attention_mask")
        if mask is None and isinstance(ids, Tensor) and ids.ndim == 2 and not self.alone:
            row = row | {"attention_mask": torch.ones_like(ids)}
        mask = row.get("attention_mask")
        if not isinstance(mask, Tensor) or mask.ndim != 2:
            return row
        used = mask[0].bool()
        if self._has_token_labels(row):
            used = used | (row["labels"][0] != IGNORE)
        columns = used.nonzero().flatten()
        kept = slice(int(columns[0]), int(columns[-1]) + 1) if len(columns) else slice(0, 1)
        tokens = kept.stop - kept.start
        made: Row = {}
        for key, value in row.items():
            if self._is_column(key, value, mask):
                made[key] = self._extended(key, value[:, kept], self.length(tokens))
            elif isinstance(value, Tensor) and self._is_target(key, value):
                made[key] = self._extended(key, value, self.length(value.shape[1]))
            else:
                made[key] = value
        return made

    def key(self, row: Row) -> Hashable:
        """What rows of one micro-batch share: shapes, dtypes, whether they end in padding, and what is no tensor."""
        mask = row.get("attention_mask")
        full = isinstance(mask, Tensor) and bool(mask.all())
        return full, tuple((key, _form(value)) for key, value in sorted(row.items()))

    def rows_like(self, row: Row) -> int:
        """How many rows a micro-batch of padded rows like this one has: one of a row that does not end in padding."""
        mask = row.get("attention_mask")
        if "input_ids" in row and not (isinstance(mask, Tensor) and mask.ndim == 2 and not bool(mask.all())):
            return 1
        tokens = (row.get(key) for key in ("input_ids", "inputs_embeds", "attention_mask", *_TARGETS))
        return self.rows(max((v.shape[1] for v in tokens if isinstance(v, Tensor) and v.ndim > 1), default=1))

    def made_up(self, row: Row) -> Row:
        """A row of the same shape that holds nothing of `row`: padding after one token, and the first class."""
        made: Row = {}
        for key, value in row.items():
            if not isinstance(value, Tensor):
                made[key] = value
            elif key in ("attention_mask", "decoder_attention_mask"):
                made[key] = torch.ones_like(value)
                made[key][:, 1:] = 0
            else:
                made[key] = torch.full_like(value, self._filler(key) if self._is_padded(key, value, row) else 0)
        return made

    def _has_token_labels(self, row: Row) -> bool:
        labels = row.get("labels")
        return isinstance(labels, Tensor) and self._is_column("labels", labels, row["attention_mask"])

    def _is_column(self, key: str, value: Any, mask: Tensor) -> bool:
        if not isinstance(value, Tensor) or value.ndim < 2 or value.shape[:2] != mask.shape:
            return False
        return key not in _TARGETS or self._is_target(key, value)

    def _is_target(self, key: str, value: Tensor) -> bool:
        tokens = key in _TARGETS and value.ndim == 2 and not value.is_floating_point()
        return tokens and (key != "labels" or self.token_labels is not False)

    def _is_padded(self, key: str, value: Tensor, row: Row) -> bool:
        mask = row.get("attention_mask")
        is_column = isinstance(mask, Tensor) and value.shape[:2] == mask.shape
        return self._is_target(key, value) if key in _TARGETS else is_column

    def _extended(self, key: str, value: Tensor, length: int) -> Tensor:
        short = length - value.shape[1]
        if short <= 0:
            return value
        filler = value.new_full((1, short, *value.shape[2:]), self._filler(key))
        return torch.cat([value, filler], dim=1)

    def _filler(self, key: str) -> int:
        if key in ("input_ids", "decoder_input_ids"):
            return self.pad_token_id
        return IGNORE if key == "labels" else 0


def stacked_rows(rows: list[Row]) -> Row:
    """Rows (1, …) of one key as a micro-batch (b, …)."""
    first = rows[0]
    return {
        key: torch.cat([row[key] for row in rows]) if isinstance(value, Tensor) and value.ndim else value
        for key, value in first.items()
    }


def as_row(collated: Mapping[str, Any]) -> Row:
    """What a collator made of one example.

    Raises:
        DPZeroError: it made several rows of it, or none.
    """
    row = dict(collated)
    if any(isinstance(value, Tensor) and value.ndim and value.shape[0] != 1 for value in row.values()):
        raise DPZeroError(
            "data_collator makes several rows of one example, or none: it must return one row (1, …) for each."
        )
    return row


def _tokens(row: Row) -> int:
    mask, ids = row.get("attention_mask"), row.get("input_ids")
    if isinstance(mask, Tensor) and mask.ndim == 2:
        return int(mask.bool().sum())
    return int(ids.shape[1]) if isinstance(ids, Tensor) and ids.ndim == 2 else 0


def _form(value: Any) -> Hashable:
    if isinstance(value, Tensor):
        return tuple(value.shape), value.dtype
    if isinstance(value, Hashable):
        return value
    raise DPZeroError(
        f"data_collator returns a {type(value).__name__}: only tensors, numbers and texts can go through the model."
    )
