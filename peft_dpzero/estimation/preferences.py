"""Losses of preference pairs: the chosen and the rejected sequence of one row go through the model together.

A row (1, 2, l) holds both, padded to the longer of the two, and no pass holds more than one row.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from peft_dpzero.estimation.shapes import IGNORE, Row
from peft_dpzero.estimation.tasks import Batch, Task, widened

# log π_ref of both sequences: (b, 2).
REFERENCE = "reference_log_probs"
_FOR_MODEL = ("input_ids", "attention_mask", "token_type_ids", "position_ids")


def as_pair(collated: Mapping[str, Any]) -> Row:
    """What a preference collator made of one example, chosen (2, l) before rejected, as a row (1, 2, l)."""
    return {
        key: value[None] if isinstance(value, Tensor) and value.ndim and value.shape[0] == 2 else value
        for key, value in collated.items()
    }


class PairTask(Task):
    """A task over rows (b, 2, l)."""

    token_labels = False
    sequences = 2

    def inputs(self, batch: Batch) -> dict[str, Any]:
        return {key: batch[key].flatten(0, 1) for key in _FOR_MODEL if key in batch}

    def made_up(self, batch: Batch) -> dict[str, Any]:
        """Pairs of made-up rows and the same tokens in another order; the second half of each is its completion."""
        ids, mask = batch["input_ids"], batch["attention_mask"]
        completion = mask * (torch.arange(ids.shape[1], device=ids.device) >= ids.shape[1] // 2)
        pairs = {"attention_mask": mask, "completion_mask": completion}
        return {
            **{key: torch.stack([value, value], dim=1) for key, value in pairs.items()},
            "input_ids": torch.stack([ids, ids.roll(1, dims=1)], dim=1),
            "labels": batch.get("labels"),
        }


class CompletionTask(PairTask):
    """Log-probabilities of completions, given their prompts: those of both sequences of all pairs, (2b,)."""

    def losses(self, outputs: Any, batch: Batch) -> Tensor:
        return self.log_probs(outputs, batch).flatten()

    def log_probs(self, outputs: Any, batch: Batch) -> Tensor:
        """log π of both completions: (b, 2), float32 or float64."""
        ids, completion = batch["input_ids"].flatten(0, 1), batch["completion_mask"].flatten(0, 1)
        targets = ids.masked_fill(completion == 0, IGNORE)[:, 1:]
        # Virtual tokens stand before a sequence's own.
        logits = widened(outputs.logits[:, -ids.shape[1] :])[:, :-1]
        nll = F.cross_entropy(logits.transpose(1, 2), targets, ignore_index=IGNORE, reduction="none")
        return -nll.sum(dim=1).view(-1, 2)


class DPOTask(CompletionTask):
    """Direct preference optimization: −log σ(β((log π − log π_ref)(chosen) − (log π − log π_ref)(rejected))).

    Args:
        beta: β.
    """

    def __init__(self, beta: float) -> None:
        self.beta = beta

    def losses(self, outputs: Any, batch: Batch) -> Tensor:
        log_probs = self.log_probs(outputs, batch)
        ratios = log_probs - batch[REFERENCE].to(log_probs)
        return -F.logsigmoid(self.beta * (ratios[:, 0] - ratios[:, 1]))

    def made_up(self, batch: Batch) -> dict[str, Any]:
        pairs = super().made_up(batch)
        return {**pairs, REFERENCE: torch.zeros(pairs["input_ids"].shape[:2], device=pairs["input_ids"].device)}


class RewardTask(PairTask):
    """Reward modelling: −log σ(r_chosen − r_rejected − margin) + c·(r_chosen + r_rejected)².

    Args:
        centering: c, TRL's `center_rewards_coefficient`.
    """

    def __init__(self, centering: float = 0.0) -> None:
        self.centering = centering

    def losses(self, outputs: Any, batch: Batch) -> Tensor:
        rewards = widened(outputs.logits).view(-1, 2)
        margin = rewards[:, 0] - rewards[:, 1]
        if "margin" in batch:
            margin = margin - batch["margin"].to(margin)
        return -F.logsigmoid(margin) + self.centering * rewards.sum(dim=1).square()
