"""Per-example losses: a task turns model outputs into one float32 loss an example.

Shapes: b examples, l tokens, v vocabulary, c classes. Losses are computed from float32 logits whatever the
model's dtype (float64 stays float64): in half precision the difference of two losses is mostly rounding. How many
numbers an operation works on at once follows from a batch's shape, never from what is in it: a row's loss would else
be rounded as other rows decide.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.models.auto import modeling_auto as auto
from transformers.utils import ModelOutput

from peft_dpzero.errors import DPZeroError
from peft_dpzero.estimation.shapes import IGNORE, may_have_company
from peft_dpzero.estimation.shortcuts.filled_rows import ROWS
from peft_dpzero.estimation.shortcuts.label_logits import CHUNK_ENTRIES, FullLogits, Logits, OutputHead
from peft_dpzero.modules import unwrapped

Batch = Mapping[str, Any]
# Of so many positions, or a multiple, logits are made at a time where the vocabulary allows it.
_POSITIONS = 16
LossFunction = Callable[[Any, Tensor], Tensor]


def widened(tensor: Tensor) -> Tensor:
    """`tensor` in float32, or unchanged if float64."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def labels_of(batch: Batch) -> Tensor:
    """The batch's labels.

    Raises:
        DPZeroError: there are none.
    """
    for key in ("labels", "label"):
        if batch.get(key) is not None:
            return torch.as_tensor(batch[key])
    raise DPZeroError(
        "The collated batch has no 'labels': add a 'labels' (or 'label') column to train_dataset, or use a "
        "data_collator that makes one."
    )


class Task:
    """How a model's inputs are made from a batch and its losses read from the outputs.

    Subclasses override what differs: `inputs` (batch → forward arguments), `losses` (outputs, batch → (b,)) and
    `predictions` (outputs, batch → what `compute_metrics` sees). The rows of a task that is not this package's go
    through the model one at a time.

    Attributes:
        token_labels: whether labels belong to tokens, (b, l); None tells by their shape.
        sequences: how many sequences the model reads for a row.
    """

    token_labels: bool | None = None
    sequences: int = 1

    def inputs(self, batch: Batch) -> dict[str, Any]:
        """Forward arguments: the batch without labels, so that the model computes no loss of its own."""
        return {key: value for key, value in batch.items() if key not in ("labels", "label")}

    def losses(self, outputs: Any, batch: Batch) -> Tensor:
        """One loss an example: (b,), float32 or float64."""
        raise NotImplementedError

    def positions(self, batch: Batch, length: int) -> tuple[Tensor, Tensor] | None:
        """Rows and positions, both (n,), of the outputs (b, length, …) that the losses read; None if not known."""
        return None

    def made_up(self, batch: Batch) -> dict[str, Any]:
        """A batch for the start-up probe, from made-up `input_ids` and `attention_mask` (b, l), and labels."""
        return dict(batch)

    def predictions(self, outputs: Any, batch: Batch) -> Tensor:
        """What evaluation collects: the logits."""
        return torch.as_tensor(outputs.logits)


class LabelPositionTask(Task):
    """A task that reads logits at label positions only, so that no others need be made."""

    def losses(self, outputs: Any, batch: Batch) -> Tensor:
        return self.losses_from(FullLogits(outputs.logits), batch)

    def losses_from(self, logits: Logits, batch: Batch) -> Tensor:
        """One loss an example: (b,), float32 or float64."""
        raise NotImplementedError


class TokenTask(LabelPositionTask):
    """Mean cross-entropy over an example's label tokens; label −100 is no label.

    Nor is one whose token, or whose predicting token, has attention_mask 0: with padding on the left, the logits at
    the last padded position would predict an example's first token, in those batches only that pad the example.

    Args:
        shift: 1 if the logits at t predict the label at t + 1 (causal LM), else 0 (masked LM, tagging).
    """

    token_labels = True

    def __init__(self, shift: int = 0) -> None:
        self.shift = shift

    def losses_from(self, logits: Logits, batch: Batch) -> Tensor:
        labels = labels_of(batch)  # [b, l]
        b, length = labels.shape
        extra = logits.length - length
        example, position = self.positions(batch, logits.length)
        # Unless a row always goes alone, pieces are of one size: the last repeats row 0's first position.
        in_pieces = b > 1 or may_have_company(batch)
        lacking = -len(example) % _positions_at_once(logits.vocabulary, b * length) if in_pieces else 0
        row, column = F.pad(example, (0, lacking)), F.pad(position, (0, lacking), value=extra)
        targets = labels[row, column + self.shift - extra].clamp(min=0)
        nll = cross_entropy_at(logits, row, column, targets, b * length)[: len(example)]
        each = nll.new_zeros(b * length).scatter(0, example * length + position - extra, nll).view(b, length)
        count = self._counted(labels, batch).sum(dim=1).clamp(min=1)
        return each.sum(dim=1) / count

    def positions(self, batch: Batch, length: int) -> tuple[Tensor, Tensor]:
        labels = labels_of(batch)
        example, position = self._counted(labels, batch).nonzero(as_tuple=True)
        return example, position + (length - labels.shape[1])

    def _counted(self, labels: Tensor, batch: Batch) -> Tensor:
        """Which of `labels[:, shift:]` count: (b, l − shift) bool."""
        counted = labels[:, self.shift :] != IGNORE
        mask = batch.get("attention_mask")
        if mask is None or mask.shape != labels.shape:
            return counted
        attended = torch.as_tensor(mask).bool()
        return counted & attended[:, self.shift :] & attended[:, : attended.shape[1] - self.shift]


class Seq2SeqTask(TokenTask):
    """Mean cross-entropy over an example's target tokens, teacher-forced."""

    def _counted(self, labels: Tensor, batch: Batch) -> Tensor:
        return labels != IGNORE  # attention_mask is the source's.

    def inputs(self, batch: Batch) -> dict[str, Any]:
        return dict(batch) if "decoder_input_ids" not in batch else super().inputs(batch)


class ClassificationTask(Task):
    """Sequence classification: cross-entropy, multi-label binary cross-entropy or squared error.

    Args:
        problem_type: transformers' own name; None reads it off the labels as transformers does (one logit is
            regression, integer labels are single-label, float labels multi-label).
    """

    token_labels = False

    def __init__(self, problem_type: str | None = None) -> None:
        self.problem_type = problem_type

    def losses(self, outputs: Any, batch: Batch) -> Tensor:
        labels = labels_of(batch)
        logits = widened(outputs.logits)  # [b, c]
        problem = self.problem_type or self._problem(logits, labels)
        if problem == "regression":
            errors = (logits - labels.to(logits).view_as(logits)).square()
            return errors.mean(dim=1)
        if problem == "single_label_classification":
            return F.cross_entropy(logits, labels.view(-1), reduction="none")
        return F.binary_cross_entropy_with_logits(logits, labels.to(logits), reduction="none").mean(dim=1)

    def positions(self, batch: Batch, length: int) -> tuple[Tensor, Tensor]:
        """The first of each row: what BERT's kind of head reads. Where a head reads more, the probe finds out."""
        labels = labels_of(batch)
        rows = torch.arange(len(labels), device=labels.device)
        return rows, torch.zeros_like(rows)

    @staticmethod
    def _problem(logits: Tensor, labels: Tensor) -> str:
        if logits.shape[-1] == 1:
            return "regression"
        integral = not labels.is_floating_point()
        return "single_label_classification" if integral else "multi_label_classification"


class FunctionTask(Task):
    """A user's `(outputs, labels) → (b,)`; it need not be differentiable. It sees one row at a time, so b is 1."""

    def __init__(self, function: LossFunction) -> None:
        self.function = function

    def losses(self, outputs: Any, batch: Batch) -> Tensor:
        labels = labels_of(batch)
        return torch.cat([self._loss(_row_of(outputs, i, len(labels)), labels[i : i + 1]) for i in range(len(labels))])

    def _loss(self, outputs: Any, labels: Tensor) -> Tensor:
        loss = widened(torch.as_tensor(self.function(outputs, labels)))
        if loss.shape != (1,):
            # How many numbers it returned may be the row's length.
            raise DPZeroError(
                "per_example_loss must return (1,) for one row: one loss for each row that it is given, neither "
                "averaged over the batch nor one for each token."
            )
        return loss


def _row_of(outputs: Any, row: int, count: int) -> Any:
    """What belongs to one of `count` rows in a model's outputs; what does not lie row by row is left out."""

    def part(value: Any) -> Any:
        if isinstance(value, Tensor):
            return value[row : row + 1] if value.ndim and value.shape[0] == count else None
        return tuple(map(part, value)) if isinstance(value, (tuple, list)) else None

    if isinstance(outputs, ModelOutput):
        return type(outputs)(**{key: part(value) for key, value in outputs.items()})
    if hasattr(outputs, "__dict__") and not isinstance(outputs, Tensor):
        parts = copy.copy(outputs)
        vars(parts).update({key: part(value) for key, value in vars(outputs).items()})
        return parts
    return part(outputs)


def _positions_at_once(vocabulary: int, available: int) -> int:
    """Of how many positions logits are made at a time: no rows are left over, which kernels treat in another way, so
    that it does not matter which of them a label has."""
    most = CHUNK_ENTRIES // vocabulary
    rows = _POSITIONS if most >= _POSITIONS else ROWS
    return max(rows, min(most // rows, -(-available // rows)) * rows)


def cross_entropy_at(logits: Logits, row: Tensor, position: Tensor, targets: Tensor, available: int) -> Tensor:
    """Cross-entropy of the logits at (row, position) against `targets`, all (n,): (n,), widened in pieces.

    Args:
        available: how many positions there are; a piece has no more, and no more than `CHUNK_ENTRIES` logits.
    """
    step = _positions_at_once(logits.vocabulary, available)
    pieces = [
        F.cross_entropy(
            widened(logits.at(row[i : i + step], position[i : i + step])), targets[i : i + step], reduction="none"
        )
        for i in range(0, max(1, row.numel()), step)
    ]
    return torch.cat(pieces)


def read_losses(task: Task, model: Any, inputs: dict[str, Any], batch: Batch, head: OutputHead | None) -> Tensor:
    """A pass's losses, (b,), and with a `head` no logits but those that a `LabelPositionTask` reads."""
    if head is None:
        return task.losses(model(**inputs), batch)
    assert isinstance(task, LabelPositionTask)
    return task.losses_from(head.logits(model, inputs), batch)


def infer_task(model: Any) -> Task:
    """The task that the model's class was made for.

    Raises:
        DPZeroError: the class names no task that is known here.
    """
    base = unwrapped(model)
    config = getattr(base, "config", None)
    names = [kind.__name__ for kind in type(base).__mro__]

    def is_one_of(mapping: Mapping[str, Any], suffix: str) -> bool:
        known = {name for entry in mapping.values() for name in ([entry] if isinstance(entry, str) else entry)}
        return any(name in known or name.endswith(suffix) for name in names)

    if is_one_of(auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES, "ForSequenceClassification"):
        return ClassificationTask(getattr(config, "problem_type", None))
    if is_one_of(auto.MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES, "ForTokenClassification"):
        return TokenTask()
    if getattr(config, "is_encoder_decoder", False) and is_one_of(
        auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES, "ForConditionalGeneration"
    ):
        return Seq2SeqTask()
    if is_one_of(auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, "ForCausalLM"):
        return TokenTask(shift=1)
    if is_one_of(auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES, "ForMaskedLM"):
        return TokenTask()
    raise DPZeroError(
        f"No per-example loss is known for {type(base).__name__}: pass per_example_loss=(outputs, labels) → (batch,)."
    )


def as_task(loss: Task | Callable[[Any, Tensor], Tensor] | None, model: nn.Module) -> Task:
    """A task from what a user passes as `per_example_loss`: None takes the loss of the model's class."""
    if loss is None:
        return infer_task(model)
    return loss if isinstance(loss, Task) else FunctionTask(loss)
