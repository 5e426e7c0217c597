"""DP-AdamW on LoRA by Opacus: its sampler, its per-example gradients by hooks, its PRV accountant at the study's δ.

Its accountant's relation is add-or-remove-one, as ours. Noise and sampling are seeded by the operating system.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from opacus import PrivacyEngine
from opacus.accountants.utils import get_noise_multiplier
from opacus.utils.batch_memory_manager import BatchMemoryManager
from torch.utils.data import DataLoader

from ..cells import DELTA
from ..clock import Clock
from ..mechanism import secret_generator
from ..models import READ_TOGETHER, Row, Start
from .base import Outcome
from .gradients import in_training_mode, own_gradients

PASSES_A_ROW = 3


def opacus_adamw(
    start: Start,
    clock: Clock,
    epsilon: float | None,
    seed: int,
    folder: Path,
    *,
    learning_rate: float,
    clipping_threshold: float,
    batch: int,
) -> Outcome:
    assert epsilon is not None
    warnings.filterwarnings("ignore")
    batch = min(batch, start.size.batch)
    batches = math.ceil(len(start.train) / batch)  # Opacus samples and accounts with a rate of one over these
    passes = PASSES_A_ROW * len(start.train) / batches
    rows = start.some_rows(round(len(start.train) / batches))
    with own_gradients(start) as module:
        steps = clock.steps(
            passes,
            lambda: _trial(start, module, rows),
            first=lambda: _trial(start, module, rows[:READ_TOGETHER]),
        )
    sigma = get_noise_multiplier(
        target_epsilon=epsilon, target_delta=DELTA, sample_rate=1 / batches, steps=steps, accountant="prv"
    )
    in_training_mode(start.model)
    optimizer = torch.optim.AdamW(start.parameters.values(), lr=learning_rate, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, steps)
    engine = PrivacyEngine(accountant="prv")
    loader: DataLoader[Row] = DataLoader(
        start.train,  # type: ignore[arg-type]
        batch_size=batch,
        collate_fn=start.collate,
        generator=secret_generator(),
    )
    module, private, loader = engine.make_private(
        module=start.model,
        optimizer=optimizer,
        data_loader=loader,
        noise_multiplier=sigma,
        max_grad_norm=clipping_threshold,
        noise_generator=secret_generator(),
        loss_reduction="sum",
    )
    made = _trained(start, clock, module, private, loader, schedule, steps)
    clock.stop()
    module.to_standard_module()
    start.model.eval()
    return Outcome(
        made,
        passes * made,
        {
            "epsilon": engine.get_epsilon(DELTA) if made else 0.0,
            "delta": DELTA,
            "noise_multiplier": sigma,
            "statement": "add or remove one row; Opacus's Poisson sampler and PRV accountant",
        },
        {
            "learning_rate": learning_rate,
            "batch": batch,
            "planned_steps": steps,
            "clipping_threshold": clipping_threshold,
        },
    )


def _trained(start: Start, clock: Clock, module: Any, private: Any, loader: Any, schedule: Any, steps: int) -> int:
    """Steps made until the budget is spent."""
    made = 0
    while True:
        with BatchMemoryManager(
            data_loader=loader, max_physical_batch_size=READ_TOGETHER, optimizer=private
        ) as physical:
            for batch in physical:
                private.zero_grad()
                _differentiate(start, module, batch)
                private.step()
                if private._is_last_step_skipped:  # a part of a logical batch
                    continue
                made += 1
                schedule.step()
                if made >= steps or clock.is_over:
                    return made


def _differentiate(start: Start, module: Any, batch: Any) -> None:
    """Gives parameters their rows' gradients; of an empty batch none, so that the step is noise alone."""
    if isinstance(batch, Mapping) and len(batch["labels"]):
        start.losses(batch, module).sum().backward()
        return
    for parameter in start.parameters.values():
        parameter.grad_sample = parameter.new_zeros(0, *parameter.shape)


def _trial(start: Start, module: Any, rows: list[Row]) -> None:
    """The gradients of rows, in physical batches of any lengths as in training."""
    for first in range(0, len(rows), READ_TOGETHER):
        module.zero_grad(set_to_none=True)
        _differentiate(start, module, start.collate([dict(row) for row in rows[first : first + READ_TOGETHER]]))
    for parameter in start.parameters.values():
        parameter.grad = parameter.grad_sample = None
