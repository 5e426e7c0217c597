"""Made-up batches for the start-up probe: tokens, masks and labels that suit a model and its task."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from peft_dpzero.errors import DPZeroError
from peft_dpzero.estimation.shapes import IGNORE
from peft_dpzero.estimation.tasks import ClassificationTask, Task, TokenTask, infer_task
from peft_dpzero.estimation.verbalizer import Verbalizer
from peft_dpzero.modules import text_config, unwrapped

_LENGTHS = (5, 9, 7)
_TARGET_LENGTH = 3


@dataclass(frozen=True)
class ProbeBatch:
    """A batch that holds the row under test.

    Args:
        rows: token ids, each (l,).
        index: the tested row's place.
        width: columns after padding, at least the longest row's.
        filler: the token in padded columns, under a mask of 0; None is the padding token.
    """

    rows: Sequence[Tensor]
    index: int
    width: int
    filler: int | None = None


class SyntheticRows:
    """Rows of made-up tokens, and the batches that hold them.

    Args:
        model: whose vocabulary and classes they suit.
        device: where they lie.
        task: whose labels they carry; None carries none.
    """

    def __init__(self, model: Any, device: torch.device, task: Task | None) -> None:
        config = model.config
        text = text_config(config)
        self.encoder_decoder = bool(getattr(config, "is_encoder_decoder", False))
        self.pad = int(getattr(text, "pad_token_id", None) or 0)
        self._labelled = _labelled_task(task, model)
        self._classes = _classes(self._labelled, model, text)
        self._vocabulary = int(text.vocab_size)
        self.slots = torch.tensor(_mask_tokens(task), dtype=torch.int64)
        self.device = device
        self.rows = self.rows_of(_LENGTHS)
        self.other_token = int(self.rows[0][0])

    def rows_of(self, lengths: Sequence[int]) -> list[Tensor]:
        """Token ids of rows of these lengths, mask tokens that a task wants apart: the same ones at each call."""
        generator = torch.Generator().manual_seed(0)
        draw = torch.randint(0, self._vocabulary - 1, (sum(lengths),), generator=generator)
        ids = draw + (draw >= self.pad).long()
        return [torch.cat([row, self.slots]).to(self.device) for row in torch.split(ids, list(lengths))]

    def together(self, index: int) -> ProbeBatch:
        """All rows, `index` under test."""
        return ProbeBatch(self.rows, index, max(map(len, self.rows)))

    def alone(self, index: int) -> ProbeBatch:
        """One row, without padding."""
        return ProbeBatch([self.rows[index]], 0, len(self.rows[index]))

    def batch(self, probed: ProbeBatch) -> dict[str, Tensor]:
        """`input_ids` and `attention_mask` (b, width), `labels` and what else the model and the task take."""
        filler = self.pad if probed.filler is None else probed.filler
        batch = {
            "input_ids": self._padded(probed.rows, probed.width, filler),
            "attention_mask": self._padded([torch.ones_like(row) for row in probed.rows], probed.width, 0),
        }
        if self.encoder_decoder:
            targets = [row[:_TARGET_LENGTH] for row in probed.rows]
            batch["decoder_input_ids"] = self._padded(targets, _TARGET_LENGTH, self.pad)
        if self._labelled is not None:
            batch["labels"] = self._labels(self._labelled, probed)
        return batch

    def own_tokens(self, states: Tensor, probed: ProbeBatch) -> Tensor:
        """`states` (virtual tokens + width, …) at the tested row's own tokens."""
        length = len(probed.rows[probed.index])
        return states[: len(states) - probed.width + length]

    def own_part(self, output: Tensor, probed: ProbeBatch) -> Tensor | None:
        """What belongs to the tested row in a module's output, or None if that cannot be told."""
        count = len(probed.rows)
        if output.ndim == 0 or output.shape[0] % count:
            return output[0] if output.ndim and output.shape[0] == 1 else None
        row = output if output.shape[0] == count else output.view(count, -1, *output.shape[1:])
        row = row[probed.index]
        return self.own_tokens(row, probed) if row.ndim >= 2 and len(row) >= probed.width else row

    def _padded(self, rows: Sequence[Tensor], width: int, value: int) -> Tensor:
        return torch.stack([nn.functional.pad(row, (0, width - len(row)), value=value) for row in rows])

    def _labels(self, task: Task, probed: ProbeBatch) -> Tensor:
        """Each row's own labels, wherever it stands."""
        rows, classes = probed.rows, self._classes
        if isinstance(task, TokenTask):
            if self.encoder_decoder:
                return self._padded([row[:_TARGET_LENGTH] % classes for row in rows], _TARGET_LENGTH, IGNORE)
            return self._padded([row % classes for row in rows], probed.width, IGNORE)
        labels = torch.stack([row[0] % classes for row in rows])
        problem = getattr(task, "problem_type", None) or ("regression" if classes == 1 else None)
        if problem in ("regression", "multi_label_classification"):
            return nn.functional.one_hot(labels, classes).float()
        return labels


def _labelled_task(task: Task | None, model: Any) -> Task | None:
    """The task whose labels can be made up: `task`, or for a user's own the one that the model's class was made for."""
    if task is None or isinstance(task, (TokenTask, ClassificationTask, Verbalizer)):
        return task
    try:
        return infer_task(model)
    except DPZeroError:
        return None


def _classes(task: Task | None, model: Any, text: Any) -> int:
    if isinstance(task, Verbalizer):
        return len(task.tokens)
    base = unwrapped(model)
    if isinstance(task, ClassificationTask) or type(base).__name__.endswith("ForTokenClassification"):
        return int(model.config.num_labels)
    return int(text.vocab_size)


def _mask_tokens(task: Task | None) -> list[int]:
    """The mask tokens that a verbalizer's prompt must hold."""
    if not isinstance(task, Verbalizer) or task.causal:
        return []
    return [int(task.mask_token_id)] * task.longest


def thinned(labels: Tensor) -> Tensor:
    """Labels (b, l) of one column in three: most positions are read by no loss."""
    unlabelled = torch.arange(labels.shape[1], device=labels.device) % 3 != 0
    return labels.masked_fill(unlabelled, IGNORE)
