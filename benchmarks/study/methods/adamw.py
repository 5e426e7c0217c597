"""AdamW on LoRA without privacy: three epochs of 16 rows a step at most, as `without_privacy.py`."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import torch

from without_privacy import EPOCHS, RATE, ROWS

from ..clock import Clock
from ..models import Start
from .base import Outcome

# Forward, and backward as two.
PASSES_A_ROW = 3


def adamw(start: Start, clock: Clock, epsilon: float | None, seed: int, folder: Path, **settings: Any) -> Outcome:
    parameters = list(start.parameters.values())
    optimizer = torch.optim.AdamW(parameters, lr=RATE, weight_decay=0.0)

    def differentiate(rows: list[Any]) -> None:
        optimizer.zero_grad()
        start.losses(start.collate([dict(row) for row in rows])).mean().backward()

    rows = min(ROWS, start.size.batch)
    epoch = math.ceil(len(start.train) / rows)
    tried = start.some_rows(rows)
    fit = clock.steps(PASSES_A_ROW * rows, lambda: differentiate(tried))
    steps = min(EPOCHS * epoch, fit)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, steps)
    random = np.random.RandomState(seed)
    number = len(start.train)
    order = np.concatenate([random.permutation(number) for _ in range(math.ceil(steps * rows / number))])
    passes = made = 0
    for made in range(1, steps + 1):
        chosen = order[(made - 1) * rows : made * rows]
        differentiate([start.train[i] for i in chosen])
        optimizer.step()
        schedule.step()
        passes += PASSES_A_ROW * len(chosen)
        if clock.is_over:
            break
    clock.stop()
    return Outcome(made, passes, settings={"learning_rate": RATE, "batch": rows, "planned_steps": steps})
