"""The shape in which a row goes through the model: a function of that row and of public facts, of no other row.

A row is padded to a length that its own length decides. How many rows of that length share a pass is one of few
numbers, among which a trial found a row's outputs to be the same bit for bit, whatever the other rows hold; where rows
are missing, made-up ones fill up. `transformers` drops an attention mask that is 1 everywhere, which another row can
decide; so every row of a micro-batch ends in padding, and one that cannot goes by itself.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from peft_dpzero.errors import DPZeroError

IGNORE = -100
# Padded lengths are multiples of this, and so many to an octave: fewer where passes cost more than padding.
SHORTEST_STEP = 4
LENGTHS_PER_OCTAVE = {"cpu": 4}
LENGTHS_PER_OCTAVE_ELSEWHERE = 2
# What a pass costs besides its tokens, in tokens: estimates for small models.
PASS_TOKENS = {"cpu": 64}
PASS_TOKENS_ELSEWHERE = 2048
# Where each pass perturbs large parameters anew, it takes as long as so many tokens (270M parameters, two cores), and
# lengths are fewer.
PASS_TOKENS_PERTURBED = 512
LENGTHS_PER_OCTAVE_PERTURBED = 2
SHORTEST_STEP_PERTURBED = 32
# Passes of more tokens than so many times `pass_tokens` are hardly cheaper.
LONGEST_PASS = 12
# Of fewer rows a step most have a length of their own.
FEWEST_ROWS = 28
# At most this part of a step's rows shares a pass: more of one length are seldom drawn, and each number is tried.
LARGEST_SHARE = 4
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
        together: for each padded length at which rows share a pass the numbers of rows that may, ascending: those
            among which a trial found a row's losses to be the same bit for bit.
        exact: whether a row that goes by itself is not padded.
        pad_token_id: what `input_ids` are padded with.
        token_labels: whether labels (l,) belong to tokens; None tells by their shape.
        lengths_per_octave: padded lengths between a power of two and the next.
        pass_tokens: what a pass costs besides its tokens, in tokens.
        perturbs_each_pass: whether parameters are so large that each pass perturbs them anew.
        shortest_step: padded lengths are multiples of this.
    """

    expected_rows: float
    most_rows: int
    limit: int | None = None
    max_length: int | None = None
    max_tokens: int | None = None
    alone: bool = False
    together: Mapping[int, Sequence[int]] = field(default_factory=dict)
    exact: bool = True
    pad_token_id: int = 0
    token_labels: bool | None = None
    lengths_per_octave: int = LENGTHS_PER_OCTAVE["cpu"]
    pass_tokens: int = PASS_TOKENS["cpu"]
    perturbs_each_pass: bool = False
    shortest_step: int = SHORTEST_STEP

    def counts(self, length: int) -> Sequence[int]:
        """How many rows of a padded length a micro-batch may have."""
        return (1,) if self.alone else self.together.get(length, (1,))

    def wanted_counts(self, length: int) -> list[int]:
        """How many rows of a padded length would share a pass if they were strangers to each other."""
        if self.expected_rows < FEWEST_ROWS and not self.perturbs_each_pass:
            return [1]
        tokens = LONGEST_PASS * self.pass_tokens
        if self.max_tokens is not None:
            tokens = min(tokens, self.max_tokens)
        if self.perturbs_each_pass:
            return powers_of_two(min(self.most_rows, int(self.expected_rows), tokens // length))
        return row_counts(min(self.most_rows, int(self.expected_rows) // LARGEST_SHARE, tokens // length))

    def length(self, tokens: int) -> int:
        """The padded length of a row: longer than the row, unless it goes by itself."""
        padded = self.shared_length(tokens)
        return tokens if self.exact and max(self.counts(padded)) == 1 else padded

    def lengths(self, longest: int) -> list[int]:
        """The padded lengths of rows below `longest` tokens at which several would share a pass."""
        bounds = [bound for bound in (longest, self.limit, self.max_length and self.max_length + 1) if bound]
        lengths = sorted({self.shared_length(tokens) for tokens in range(1, min(bounds))})
        return [length for length in lengths if self.wanted_counts(length)[-1] > 1]

    def shared_length(self, tokens: int) -> int:
        """To what a row is padded that shares a pass."""
        step = max(self.shortest_step, (1 << tokens.bit_length()) // (2 * self.lengths_per_octave))
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

    def sizes(self, row: Row, number: int) -> list[int]:
        """How many rows each micro-batch of `number` padded rows like this one has, made-up ones at the end included.

        Rows that do not end in padding go one at a time. The others are split so that passes, and tokens with those of
        made-up rows, cost least.
        """
        if "input_ids" in row and not may_have_company(row):
            return [1] * number
        columns = (row.get(key) for key in ("input_ids", "inputs_embeds", "attention_mask", *_TARGETS))
        length = max((v.shape[1] for v in columns if isinstance(v, Tensor) and v.ndim > 1), default=1)
        # The cheapest way to split 0, 1, … rows: its cost, and its last micro-batch.
        cheapest = [(0, 0)]
        for rows in range(1, number + 1):
            costs = ((cheapest[max(0, rows - n)][0] + n * length + self.pass_tokens, n) for n in self.counts(length))
            cheapest.append(min(costs))
        sizes = []
        while number > 0:
            sizes.append(cheapest[number][1])
            number -= sizes[-1]
        return sorted(sizes, reverse=True)

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


def may_have_company(batch: Mapping[str, Any]) -> bool:
    """Whether rows of a micro-batch share passes, here or elsewhere: those that end in padding may, others never do."""
    mask = batch.get("attention_mask")
    return isinstance(mask, Tensor) and mask.ndim == 2 and not bool(mask.all())


def row_counts(most: int) -> list[int]:
    """1, 2, 3, 4, 6, 8, 12, 16, …, up to `most`: halves of powers of two, since each is tried before training."""
    counts = {(halves << power) // 2 for power in range(max(most, 1).bit_length()) for halves in (2, 3)}
    return sorted(count for count in counts if count <= max(most, 1))


def powers_of_two(most: int) -> list[int]:
    """1, 2, 4, …, up to `most`: where each number takes long to try."""
    return [1 << power for power in range(max(most, 1).bit_length())]


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
    if isinstance(mask, Tensor) and mask.ndim in (2, 3):
        return int(mask.bool().sum(dim=-1).max())
    return int(ids.shape[1]) if isinstance(ids, Tensor) and ids.ndim == 2 else 0


def _form(value: Any) -> Hashable:
    if isinstance(value, Tensor):
        return tuple(value.shape), value.dtype
    if isinstance(value, Hashable):
        return value
    raise DPZeroError(
        f"data_collator returns a {type(value).__name__}: only tensors, numbers and texts can go through the model."
    )
