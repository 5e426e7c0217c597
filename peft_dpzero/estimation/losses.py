"""Per-example losses: a task turns model outputs into one float32 loss an example.

Shapes: b examples, l tokens, v vocabulary, c classes. Losses are computed from float32 logits whatever the
model's dtype (float64 stays float64): in half precision the difference of two losses is mostly rounding.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.models.auto import modeling_auto as auto

from peft_dpzero.errors import DPZeroError

IGNORE = -100
Batch = Mapping[str, Any]
LossFunction = Callable[[Any, Tensor], Tensor]

# Logits that are gathered and widened at a time: larger pieces than a layer's activations would raise peak memory.
_CHUNK_ENTRIES = 1 << 20


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
    `predictions` (outputs, batch → what `compute_metrics` sees).
    """

    def inputs(self, batch: Batch) -> dict[str, Any]:
        """Forward arguments: the batch without labels, so that the model computes no loss of its own."""
        return {key: value for key, value in batch.items() if key not in ("labels", "label")}

    def losses(self, outputs: Any, batch: Batch) -> Tensor:
        """One loss an example: (b,), float32 or float64."""
        raise NotImplementedError

    def predictions(self, outputs: Any, batch: Batch) -> Tensor:
        """What evaluation collects: the logits."""
        return torch.as_tensor(outputs.logits)


class TokenTask(Task):
    """Mean cross-entropy over an example's label tokens; label −100 is no label.

    Nor is one whose token, or whose predicting token, has attention_mask 0: with padding on the left, the logits at
    the last padded position would predict an example's first token, in those batches only that pad the example.

    Args:
        shift: 1 if the logits at t predict the label at t + 1 (causal LM), else 0 (masked LM, tagging).
    """

    def __init__(self, shift: int = 0) -> None:
        self.shift = shift

    def losses(self, outputs: Any, batch: Batch) -> Tensor:
        labels = labels_of(batch)  # [b, l]
        logits = outputs.logits  # [b, virtual tokens + l, v]
        example, position = self._counted(labels, batch).nonzero(as_tuple=True)
        targets = labels[example, position + self.shift]
        position = position + (logits.shape[1] - labels.shape[1])
        nll = cross_entropy_at(logits, example, position, targets)
        total = nll.new_zeros(labels.shape[0]).index_add(0, example, nll)
        count = torch.bincount(example, minlength=labels.shape[0]).clamp(min=1)
        return total / count

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

    @staticmethod
    def _problem(logits: Tensor, labels: Tensor) -> str:
        if logits.shape[-1] == 1:
            return "regression"
        integral = not labels.is_floating_point()
        return "single_label_classification" if integral else "multi_label_classification"


class FunctionTask(Task):
    """A user's `(outputs, labels) → (b,)`; it need not be differentiable."""

    def __init__(self, function: LossFunction) -> None:
        self.function = function

    def losses(self, outputs: Any, batch: Batch) -> Tensor:
        return widened(torch.as_tensor(self.function(outputs, labels_of(batch))))


class Verbalizer(Task):
    """Classification by label words: cross-entropy over the words' scores at the label position.

    A word's score is the mean log-probability of its tokens there. Single-token words need one pass over the
    batch, and their loss is the papers': cross-entropy over the label words' logits. With a masked LM the label
    position is the mask token, and a prompt must hold as many mask tokens as the longest word has tokens. With
    a causal LM it is what follows the prompt; words of several tokens are appended to it and read in one pass
    over b × c rows. Labels are class indices (b,).

    Args:
        tokenizer: the model's tokenizer.
        words: label words, one a class, as the tokenizer should see them (a causal LM's usually begin with a
            space: " great").
        causal: causal LM (True) or masked LM (False).

    Raises:
        DPZeroError: fewer than two words, a word without tokens or with an unknown one, two words with the same
            tokens, or a masked LM without a mask token.
    """

    def __init__(self, tokenizer: Any, words: Sequence[str], *, causal: bool) -> None:
        tokens = [tokenizer(word, add_special_tokens=False)["input_ids"] for word in words]
        if len(tokens) < 2:
            raise DPZeroError("Verbalizer needs a label word for each of at least two classes.")
        if empty := [word for word, ids in zip(words, tokens, strict=True) if not ids]:
            raise DPZeroError(f"Label word {empty[0]!r} has no tokens.")
        unknown = getattr(tokenizer, "unk_token_id", None)
        if unread := [word for word, ids in zip(words, tokens, strict=True) if unknown in ids]:
            raise DPZeroError(f"Label word {unread[0]!r} is not in the tokenizer's vocabulary: choose another.")
        if len({tuple(ids) for ids in tokens}) < len(tokens):
            raise DPZeroError(f"Two of the label words {list(words)} have the same tokens: choose others.")
        if not causal and tokenizer.mask_token_id is None:
            raise DPZeroError("The tokenizer has no mask token: use Verbalizer(..., causal=True).")
        self.words = list(words)
        self.causal = causal
        self.mask_token_id = tokenizer.mask_token_id
        self.longest = max(map(len, tokens))
        self.tokens = torch.tensor([ids + [IGNORE] * (self.longest - len(ids)) for ids in tokens])  # [c, longest]
        self.appended = causal and self.longest > 1

    def inputs(self, batch: Batch) -> dict[str, Any]:
        if not self.appended:
            return super().inputs(batch)
        ids, mask = batch["input_ids"], _attention(batch)  # [b, l]
        (b, length), c = ids.shape, len(self.words)
        lengths = mask.sum(dim=1)  # [b]
        # Left-aligned prompts, then the word at its end: position j of row (i, w).
        order = torch.argsort(1 - mask, dim=1, stable=True)
        rows = F.pad(ids.gather(1, order), (0, self.longest)).repeat_interleave(c, dim=0)  # [b*c, l+longest]
        words = self.tokens.to(ids.device).clamp(min=0).repeat(b, 1)  # [b*c, longest]
        start = lengths.repeat_interleave(c)[:, None]
        rows.scatter_(1, start + torch.arange(self.longest, device=ids.device), words)
        sizes = start + (self.tokens != IGNORE).sum(dim=1).to(ids.device).repeat(b)[:, None]
        columns = torch.arange(length + self.longest, device=ids.device)
        return {"input_ids": rows, "attention_mask": (columns < sizes).to(mask.dtype)}

    def losses(self, outputs: Any, batch: Batch) -> Tensor:
        return F.cross_entropy(self.predictions(outputs, batch), labels_of(batch).view(-1), reduction="none")

    def predictions(self, outputs: Any, batch: Batch) -> Tensor:
        """Scores of the label words: [b, c], float32 or float64."""
        logits = outputs.logits
        tokens = self.tokens.to(logits.device)
        extra = logits.shape[1] - self._length(batch)
        if self.appended:
            return self._appended_scores(logits, _attention(batch).sum(dim=1) + extra, tokens)
        rows = self._label_rows(logits, batch, extra)  # [b, longest, v]
        if self.longest == 1:
            return widened(rows[:, 0, tokens[:, 0]])
        log_probs = torch.log_softmax(widened(rows), dim=-1)
        slots = torch.arange(self.longest, device=logits.device).expand_as(tokens)
        return _mean_over_tokens(log_probs[:, slots, tokens.clamp(min=0)], tokens)

    def _length(self, batch: Batch) -> int:
        return int(batch["input_ids"].shape[1]) + (self.longest if self.appended else 0)

    def _appended_scores(self, logits: Tensor, lengths: Tensor, tokens: Tensor) -> Tensor:
        b, (c, longest) = lengths.shape[0], tokens.shape
        row = torch.arange(b * c, device=logits.device)[:, None].expand(-1, longest)
        slot = torch.arange(longest, device=logits.device)
        position = lengths.repeat_interleave(c)[:, None] - 1 + slot  # [b*c, longest]
        targets = tokens.clamp(min=0).repeat(b, 1)
        nll = cross_entropy_at(logits, row.flatten(), position.flatten(), targets.flatten())
        return _mean_over_tokens(-nll.view(b, c, longest), tokens)

    def _label_rows(self, logits: Tensor, batch: Batch, extra: int) -> Tensor:
        ids = batch["input_ids"]
        if self.causal:
            positions = torch.arange(ids.shape[1], device=ids.device)
            last = (positions * _attention(batch)).argmax(dim=1)
            return logits[torch.arange(ids.shape[0], device=ids.device), last + extra][:, None]
        masks = ids == self.mask_token_id
        order = torch.argsort((~masks).to(torch.uint8), dim=1, stable=True)[:, : self.longest]
        rows = logits.gather(1, (order + extra)[..., None].expand(-1, -1, logits.shape[-1]))
        # A prompt without enough mask tokens has no loss; its example then contributes zero.
        return rows.masked_fill((masks.sum(dim=1) < self.longest)[:, None, None], torch.nan)


def cross_entropy_at(logits: Tensor, row: Tensor, position: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy of `logits[row, position]` [n, v] against `targets` [n]: (n,), widened in chunks."""
    step = max(1, _CHUNK_ENTRIES // logits.shape[-1])
    pieces = [
        F.cross_entropy(
            widened(logits[row[i : i + step], position[i : i + step]]), targets[i : i + step], reduction="none"
        )
        for i in range(0, row.numel(), step)
    ]
    return torch.cat(pieces) if pieces else widened(logits.new_zeros(0))


def infer_task(model: Any) -> Task:
    """The task that the model's class was made for.

    Raises:
        DPZeroError: the class names no task that is known here.
    """
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
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


def _attention(batch: Batch) -> Tensor:
    mask = batch.get("attention_mask")
    return torch.ones_like(batch["input_ids"]) if mask is None else torch.as_tensor(mask)


def _mean_over_tokens(scores: Tensor, tokens: Tensor) -> Tensor:
    """Mean of `scores` [b, c, longest] over each word's tokens: [b, c]."""
    real = (tokens != IGNORE).to(scores.dtype)
    return (scores * real).sum(dim=-1) / real.sum(dim=-1)
