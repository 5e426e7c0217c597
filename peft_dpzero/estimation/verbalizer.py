"""Classification by label words."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from peft_dpzero.errors import DPZeroError
from peft_dpzero.estimation.shapes import IGNORE
from peft_dpzero.estimation.shortcuts.label_logits import FullLogits, Logits
from peft_dpzero.estimation.tasks import Batch, LabelPositionTask, cross_entropy_at, labels_of, widened


class Verbalizer(LabelPositionTask):
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

    token_labels = False

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

    def losses_from(self, logits: Logits, batch: Batch) -> Tensor:
        return self.losses_of(self.scores_from(logits, batch), batch)

    def losses_of(self, scores: Tensor, batch: Batch) -> Tensor:
        """One loss an example, of its scores [b, c]: (b,), float32 or float64."""
        return F.cross_entropy(scores, labels_of(batch).view(-1), reduction="none")

    def predictions(self, outputs: Any, batch: Batch) -> Tensor:
        """Scores of the label words: [b, c], float32 or float64."""
        return self.scores_from(FullLogits(outputs.logits), batch)

    def positions(self, batch: Batch, length: int) -> tuple[Tensor, Tensor]:
        ids, mask = batch["input_ids"], _attention(batch)
        if self.appended:
            b, c = len(ids), len(self.words)
            last = mask.sum(dim=1).repeat_interleave(c) - 1 + length - ids.shape[1] - self.longest  # [b*c]
            slot = torch.arange(self.longest, device=ids.device)
            return _each(torch.arange(b * c, device=ids.device), last[:, None] + slot)
        extra = length - ids.shape[1]
        rows = torch.arange(len(ids), device=ids.device)
        if self.causal:
            columns = torch.arange(ids.shape[1], device=ids.device)
            return rows, (columns * mask).argmax(dim=1) + extra
        order = torch.argsort((~self._masks(ids)).to(torch.uint8), dim=1, stable=True)[:, : self.longest]
        return _each(rows, order + extra)

    def _masks(self, ids: Tensor) -> Tensor:
        return torch.eq(ids, self.mask_token_id)

    def scores_from(self, logits: Logits, batch: Batch) -> Tensor:
        """Scores of the label words: [b, c], float32 or float64."""
        ids = batch["input_ids"]
        tokens = self.tokens.to(ids.device)
        rows, slots = self.positions(batch, logits.length)
        if self.appended:
            targets = tokens.clamp(min=0).repeat(len(ids), 1)
            nll = cross_entropy_at(logits, rows, slots, targets.flatten(), len(rows))
            return _mean_over_tokens(-nll.view(len(ids), *tokens.shape), tokens)
        if self.longest == 1:
            scores = widened(logits.at(rows, slots, tokens[:, 0]))
        else:
            at_slots = widened(logits.at(rows, slots)).view(len(ids), self.longest, -1)
            log_probs = torch.log_softmax(at_slots, dim=-1)
            each = torch.arange(self.longest, device=ids.device).expand_as(tokens)
            scores = _mean_over_tokens(log_probs[:, each, tokens.clamp(min=0)], tokens)
        if self.causal:
            return scores
        # A prompt without enough mask tokens has no loss; its example then contributes zero.
        lacking = self._masks(ids).sum(dim=1) < self.longest
        return scores.masked_fill(lacking[:, None], torch.nan)


def _each(rows: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
    """(n,) rows and each one's positions (n, m) as pairs: (n·m,) twice."""
    return rows.repeat_interleave(positions.shape[1]), positions.flatten()


def _attention(batch: Batch) -> Tensor:
    mask = batch.get("attention_mask")
    return torch.ones_like(batch["input_ids"]) if mask is None else torch.as_tensor(mask)


def _mean_over_tokens(scores: Tensor, tokens: Tensor) -> Tensor:
    """Mean of `scores` [b, c, longest] over each word's tokens: [b, c]."""
    real = (tokens != IGNORE).to(scores.dtype)
    return (scores * real).sum(dim=-1) / real.sum(dim=-1)
