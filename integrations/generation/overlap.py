"""1 − ROUGE-L of what a causal LM writes after a prompt: a loss without a gradient."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from peft_dpzero import Task
from torch import Tensor, nn


class GreedyRouge(Task):
    """1 − ROUGE-L (F1) of greedily written tokens against the labels, for each row.

    Prompts (b, l) end in padding if at all, labels (b, r) in −100. How much is computed follows from the batch's shape
    alone, and every operation works on each row by itself: rows may share a pass.

    Args:
        model: the one that is trained.
        tokens: how many tokens it writes.
    """

    token_labels = True

    def __init__(self, model: nn.Module, tokens: int) -> None:
        self.model = model
        self.tokens = tokens

    def losses(self, outputs: Any, batch: Mapping[str, Any]) -> Tensor:
        return 1 - rouge_l(self.written(outputs, batch), batch["labels"])

    def written(self, outputs: Any, batch: Mapping[str, Any]) -> Tensor:
        """The tokens that the model writes: (b, tokens). Its `outputs` for the prompts give the first."""
        ids, mask = (nn.functional.pad(batch[key], (0, self.tokens)) for key in ("input_ids", "attention_mask"))
        end = mask.sum(dim=1, keepdim=True)  # [b, 1]
        logits, made = outputs.logits, []
        for number in range(self.tokens):
            at = (end + number - 1)[:, :, None].expand(-1, -1, logits.shape[2])
            made.append(logits.gather(1, at).argmax(dim=2))  # [b, 1]
            if number + 1 < self.tokens:
                ids, mask = (
                    kept.scatter(1, end + number, new) for kept, new in ((ids, made[-1]), (mask, torch.ones_like(end)))
                )
                logits = self.model(input_ids=ids, attention_mask=mask, use_cache=False).logits
        return torch.cat(made, dim=1)


def rouge_l(written: Tensor, reference: Tensor) -> Tensor:
    """F1 of the longest common subsequence of tokens (b, n) and (b, r), of which −100 is none: (b,) float32."""
    real = (reference >= 0).sum(dim=1)
    nothing = torch.zeros_like(real)
    row = [nothing] * (reference.shape[1] + 1)
    for token in written.unbind(dim=1):
        last, row = row, [nothing]
        for j, wanted in enumerate(reference.unbind(dim=1)):
            row.append(torch.where(token == wanted, last[j] + 1, torch.maximum(row[j], last[j + 1])))
    return 2 * row[-1].float() / (written.shape[1] + real)
