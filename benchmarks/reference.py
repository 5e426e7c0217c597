"""The step of the reference DPZero (and MeZO) code, written anew with its costs.

As published with arXiv 2310.09639: the batch is padded to its longest row, in one piece; four passes over the
parameters a step, each reseeding torch's generator and drawing z again; `param.data` is rebuilt by each; one loss an
example at θ+λz and θ−λz, clipped, averaged and noised. Its RoBERTa half reads the head at the label position. Its OPT
half, for classification, runs every prompt once with each candidate word appended, takes the log-softmax of all
logits over the whole vocabulary, and scores the appended tokens; rows are padded to a multiple of 8.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from workloads import IGNORE, Row, Workload, pad_tokens


class Reference:
    """One step of the reference.

    Args:
        workload: model and rows.
        candidates: append each candidate word to the prompt, as the reference's OPT half does; False takes full
            logits on one row an example instead, which spares it half of the work.
    """

    smoothing_parameter, clipping_threshold, noise, lr = 1e-3, 200.0, 1.0, 1e-6

    def __init__(self, workload: Workload, candidates: bool = True) -> None:
        self.workload = workload
        self.candidates = candidates and bool(workload.words)
        self.parameters = [p for p in workload.model.parameters() if p.requires_grad]

    def __call__(self, number: int, rows: Sequence[Row]) -> None:
        self.workload.model.eval()
        batch = {key: value.to(self.parameters[0].device) for key, value in self.collate(rows).items()}
        seed = int(np.random.randint(1_000_000_000))
        self.perturb(seed, 1)
        plus = self.losses(batch)
        self.perturb(seed, -2)
        minus = self.losses(batch)
        difference = (plus - minus) / (2 * self.smoothing_parameter)
        scale = torch.clamp(self.clipping_threshold / difference.abs(), max=1.0)
        estimate = (difference * scale).mean()
        estimate += torch.randn(1).item() * 2 * self.noise * self.clipping_threshold / self.workload.batch_size
        self.perturb(seed, 1)
        self.update(seed, estimate)

    @torch.no_grad()
    def perturb(self, seed: int, scale: float) -> None:
        torch.manual_seed(seed)
        for parameter in self.parameters:
            z = self._z(parameter)
            parameter.data = parameter.data + scale * z * self.smoothing_parameter

    @torch.no_grad()
    def update(self, seed: int, estimate: Tensor) -> None:
        torch.manual_seed(seed)
        for parameter in self.parameters:
            z = self._z(parameter)
            parameter.data = parameter.data - self.lr * (estimate * z)

    @staticmethod
    def _z(parameter: Tensor) -> Tensor:
        return torch.normal(0.0, 1.0, size=parameter.shape, device=parameter.device, dtype=parameter.dtype)

    def collate(self, rows: Sequence[Row]) -> dict[str, Tensor]:
        if hasattr(self.workload.base, "bert"):
            return self.workload.collate(list(rows))
        if self.candidates:
            appended = [
                {"input_ids": [*row["input_ids"], word], "labels": row["labels"]}
                for row in rows
                for word in self.workload.words
            ]
            labels = torch.tensor([row["labels"] for row in rows])
            return _left_padded(appended, self.workload.pad_token_id) | {"labels": labels}
        if self.workload.words:
            labels = torch.tensor([row["labels"] for row in rows])
            return _left_padded(rows, self.workload.pad_token_id) | {"labels": labels}
        return pad_tokens(rows)

    @torch.inference_mode()
    def losses(self, batch: dict[str, Tensor]) -> Tensor:
        """One loss an example: (b,)."""
        labels = batch["labels"]
        inputs = {key: value for key, value in batch.items() if key != "labels"}
        logits = self.workload.model(**inputs).logits
        if hasattr(self.workload.base, "bert"):
            return F.cross_entropy(logits, labels, reduction="none")
        if self.candidates:
            log_probs = F.log_softmax(logits[:, :-1], dim=-1)  # [2b, l-1, v]
            scores = log_probs.gather(-1, inputs["input_ids"][:, 1:, None])[:, -1, 0]
            return F.cross_entropy(scores.view(-1, 2), labels, reduction="none")
        if self.workload.words:
            return F.cross_entropy(logits[:, -1, list(self.workload.words)], labels, reduction="none")
        shifted = labels[:, 1:]
        nll = F.cross_entropy(logits[:, :-1].transpose(1, 2), shifted, ignore_index=IGNORE, reduction="none")
        kept = shifted != IGNORE
        return (nll * kept).sum(dim=1) / kept.sum(dim=1)


def _left_padded(rows: Sequence[Any], pad: int) -> dict[str, Tensor]:
    longest = -(-max(len(row["input_ids"]) for row in rows) // 8) * 8
    ids = [[pad] * (longest - len(row["input_ids"])) + row["input_ids"] for row in rows]
    mask = [[0] * (longest - len(row["input_ids"])) + [1] * len(row["input_ids"]) for row in rows]
    return {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(mask)}
