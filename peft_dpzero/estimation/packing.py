"""Rows packed into lines: no padding goes through the model.

A causal LM takes several rows one after another in one line if `position_ids` start again at each: transformers then
keeps them apart in its attention masks. The losses are read at the rows' own places in the lines.
"""

from __future__ import annotations

import heapq
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from peft_dpzero.estimation.logits import Logits

# Attention costs the square of a line's length, a pass the same for however few lines. Longer rows stay padded: alone
# in its line a row needs no mask, which attention is twice as fast without.
LINE_TOKENS = 128
# Packing pays if it leaves out this share of the tokens.
WORTHWHILE = 0.03


@dataclass(frozen=True)
class Layout:
    """Where the rows of a padded batch lie in lines.

    Attributes:
        first: column of each row's first token in the padded batch: (b,).
        lengths: tokens of each row: (b,).
        line: each row's line: (b,).
        start: each row's first column in its line: (b,).
        source: index of each place's token in the flattened padded batch, of padding any: (lines, length).
        position_ids: of each place in its row: (lines, length).
    """

    first: Tensor
    lengths: Tensor
    line: Tensor
    start: Tensor
    source: Tensor
    position_ids: Tensor

    @classmethod
    def of(cls, attention_mask: Tensor) -> Layout | None:
        """The layout for rows that attend where the mask (b, l) is not 0; None if packing does not pay, or cannot be
        done since a row does not attend to one stretch of its tokens."""
        mask = attention_mask.cpu().bool()
        lengths = mask.sum(dim=1)
        first = mask.int().argmax(dim=1)
        columns = torch.arange(mask.shape[1])
        stretch = (columns >= first[:, None]) & (columns < (first + lengths)[:, None])
        if not torch.equal(mask, stretch) or int(lengths.min()) == 0 or not packs_well(lengths.numpy()):
            return None
        lines = _even_lines(lengths.tolist())
        longest = max(sum(int(lengths[row]) for row in line) for line in lines)
        if len(lines) * longest > (1 - WORTHWHILE) * mask.numel():
            return None
        line_of, start_of = torch.zeros_like(lengths), torch.zeros_like(lengths)
        source = torch.zeros(len(lines), longest, dtype=torch.int64)
        position_ids = torch.arange(longest).repeat(len(lines), 1)
        for number, line in enumerate(lines):
            start = 0
            for row in line:
                length = int(lengths[row])
                line_of[row], start_of[row] = number, start
                inside = slice(start, start + length)
                source[number, inside] = row * mask.shape[1] + first[row] + torch.arange(length)
                position_ids[number, inside] -= start
                start += length
            position_ids[number, start:] -= start
        device = attention_mask.device
        return cls(*(tensor.to(device) for tensor in (first, lengths, line_of, start_of, source, position_ids)))

    def packed(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """Forward arguments for the lines, from those for the padded batch."""
        made = dict(inputs)
        del made["attention_mask"]
        for key in ("input_ids", "token_type_ids"):
            if key in made:
                made[key] = made[key].flatten()[self.source]
        return made | {"position_ids": self.position_ids}

    def places(self, rows: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Lines and columns of (row, position) pairs of the padded batch: (n,) each. Padding is at its row's end."""
        inside = torch.minimum(positions - self.first[rows], self.lengths[rows] - 1).clamp(min=0)
        return self.line[rows], self.start[rows] + inside


class PackedLogits:
    """The logits of packed lines, read as those of a padded batch.

    Args:
        logits: of the lines.
        layout: of the batch in them.
        length: l of the padded batch.
    """

    def __init__(self, logits: Logits, layout: Layout, length: int) -> None:
        self._logits = logits
        self._layout = layout
        self.length = length
        self.vocabulary = logits.vocabulary

    def at(self, rows: Tensor, positions: Tensor, words: Tensor | None = None) -> Tensor:
        """See `Logits`."""
        return self._logits.at(*self._layout.places(rows, positions), words)


def packs_well(lengths: npt.NDArray[np.int64]) -> bool:
    """Whether rows of these lengths (n,) are short enough to be packed."""
    return bool(lengths.mean() <= LINE_TOKENS)


def packable(inputs: Mapping[str, Any]) -> bool:
    """Whether forward arguments are tokens and masks (b, l) alone."""
    mask, known = inputs.get("attention_mask"), {"input_ids", "attention_mask", "token_type_ids"}
    tensors = {key for key, value in inputs.items() if isinstance(value, Tensor)}
    return isinstance(mask, Tensor) and mask.ndim == 2 and "input_ids" in tensors and tensors <= known


def _even_lines(lengths: Sequence[int]) -> list[list[int]]:
    """Rows dealt out to as many lines as have about `LINE_TOKENS` tokens, longest first, to the shortest line."""
    count = max(1, min(len(lengths), round(sum(lengths) / max(LINE_TOKENS, *lengths, 1))))
    loads = [(0, number) for number in range(count)]
    lines: list[list[int]] = [[] for _ in range(count)]
    for row in sorted(range(len(lengths)), key=lambda row: -lengths[row]):
        load, number = heapq.heappop(loads)
        lines[number].append(row)
        heapq.heappush(loads, (load + lengths[row], number))
    return [line for line in lines if line]
