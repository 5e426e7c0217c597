"""Logits where losses need them: at label positions, and of label words.

A language model's vocabulary is wide, and most positions carry no label. `OutputHead` keeps the model from projecting
hidden states onto the vocabulary; the task then projects those that it needs, a chunk at a time.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from peft_dpzero.modules import replaced_forwards, text_config, unwrapped

# Logits that are made and widened at a time, 16 MiB of float32: each piece reads the whole output embedding.
CHUNK_ENTRIES = 1 << 22


class Logits(Protocol):
    """The logits of a pass, read at some positions.

    Attributes:
        length: positions of a row, virtual tokens included.
        vocabulary: v.
    """

    length: int
    vocabulary: int

    def at(self, rows: Tensor, positions: Tensor, words: Tensor | None = None) -> Tensor:
        """Logits at (row, position) pairs, both (n,): (n, v), or (n, c) of the tokens `words` (c,) only."""


class FullLogits:
    """Logits that the model made: (b, l, v)."""

    def __init__(self, logits: Tensor) -> None:
        self._logits = logits
        self.length, self.vocabulary = logits.shape[1:]

    def at(self, rows: Tensor, positions: Tensor, words: Tensor | None = None) -> Tensor:
        """See `Logits`."""
        gathered = self._logits[rows, positions]
        return gathered if words is None else gathered[:, words]


class HiddenLogits:
    """Logits that are made when they are read, from what the model gave its output head: (b, l, h)."""

    def __init__(self, hidden: Tensor, head: OutputHead) -> None:
        self._hidden = hidden
        self._head = head
        self.length = hidden.shape[1]
        self.vocabulary = head.vocabulary

    def at(self, rows: Tensor, positions: Tensor, words: Tensor | None = None) -> Tensor:
        """See `Logits`."""
        return self._head.project(self._hidden[rows, positions], words)


class OutputHead:
    """The module that projects hidden states onto the vocabulary, held back during a pass.

    Args:
        module: the model's output embeddings.
        vocabulary: v.
    """

    def __init__(self, module: nn.Module, vocabulary: int) -> None:
        self.module = module
        self.vocabulary = vocabulary
        # Rows of a frozen linear layer can be read alone, if they are in memory.
        parameters = list(module.parameters())
        self._rows_readable = type(module) is nn.Linear and not any(p.requires_grad or p.is_meta for p in parameters)

    @classmethod
    def of(cls, model: Any) -> OutputHead | None:
        """The head of a language model, or None if it has none that is known."""
        base = unwrapped(model)
        module = base.get_output_embeddings() if hasattr(base, "get_output_embeddings") else None
        if module is None:
            return None
        return cls(module, int(text_config(base.config).vocab_size))

    @contextmanager
    def held_back(self) -> Iterator[list[Tensor]]:
        """Within the block the head returns (b, l, 0) and what it was given is collected in the list."""
        seen: list[Tensor] = []

        def forward(hidden: Tensor) -> Tensor:
            seen.append(hidden)
            return hidden[..., :0]

        with replaced_forwards({self.module: forward}):
            yield seen

    def logits(self, model: Any, inputs: Mapping[str, Any]) -> HiddenLogits:
        """Those of a pass, to be made where they are read."""
        with self.held_back() as hidden:
            model(**inputs)
        return HiddenLogits(hidden[-1], self)

    def project(self, hidden: Tensor, words: Tensor | None = None) -> Tensor:
        """Logits of hidden states (n, h): (n, v), or (n, c) of the tokens `words` (c,) only."""
        if words is None:
            return torch.as_tensor(self.module(hidden))
        if not self._rows_readable:
            return torch.as_tensor(self.module(hidden)[:, words])
        assert isinstance(self.module, nn.Linear)
        bias = self.module.bias
        return F.linear(hidden, self.module.weight[words], None if bias is None else bias[words])
