"""Opacus's DP-SGD on the same LoRA model, rows and logical batch: per-example gradients by hooks, or ghost clipping.

The logical batch goes through the model in physical batches of the workload's micro-batch size (BatchMemoryManager's
virtual steps), padded to their longest row by the same collator; one optimizer step a logical batch. Dropout is 0, as
for all contenders.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import torch
from opacus import PrivacyEngine
from opacus.utils.batch_memory_manager import BatchMemoryManager
from torch import Tensor, nn
from torch.utils.data import DataLoader

from workloads import Row, Workload


class Opacus:
    """One step of DP-SGD.

    Args:
        workload: a sequence classifier or a causal LM with token losses, with a LoRA adapter.
        mode: "hooks" or "ghost".
    """

    def __init__(self, workload: Workload, mode: str) -> None:
        warnings.filterwarnings("ignore", module="opacus")
        self.workload = workload
        self.mode = mode
        workload.model.train()
        optimizer = torch.optim.SGD([p for p in workload.model.parameters() if p.requires_grad], lr=1e-6)
        made = PrivacyEngine(accountant="rdp").make_private(
            module=workload.model,
            optimizer=optimizer,
            criterion=nn.CrossEntropyLoss(),
            data_loader=self._loader(workload.rows[: workload.batch_size]),
            noise_multiplier=1.0,
            max_grad_norm=1.0,
            poisson_sampling=False,
            grad_sample_mode=mode,
        )
        self.model, self.optimizer, self.criterion = (
            made[0],
            made[1],
            made[2] if mode == "ghost" else nn.CrossEntropyLoss(),
        )

    def _loader(self, rows: Sequence[Row]) -> DataLoader[Any]:
        return DataLoader(list(rows), batch_size=len(rows), collate_fn=self.workload.collate)  # type: ignore[arg-type]

    def __call__(self, number: int, rows: Sequence[Row]) -> None:
        self.model.train()
        physical = self.workload.micro_batch_size
        with BatchMemoryManager(
            data_loader=self._loader(rows), max_physical_batch_size=physical, optimizer=self.optimizer
        ) as loader:
            for batch in loader:
                self.optimizer.zero_grad()
                self.loss(batch).backward()
                self.optimizer.step()
        self.optimizer.zero_grad()

    def loss(self, batch: dict[str, Tensor]) -> Any:
        device = next(self.model.parameters()).device
        labels = batch["labels"].to(device)
        logits = self.model(**{key: value.to(device) for key, value in batch.items() if key != "labels"}).logits
        if labels.ndim == 1:
            return self.criterion(logits, labels)
        targets = labels[:, 1:]
        shape = {"shape": targets.shape} if self.mode == "ghost" else {}
        return self.criterion(logits[:, :-1].flatten(0, 1), targets.flatten(), **shape)
