"""First-order DP in our public basis: what our estimate would be with all directions, at the price of backward passes.

A row's gradient in the basis's coordinates is clipped, summed over a Poisson batch and noised; AdamW moves the
coordinates, as ours does. The threshold and the learning rate follow the package's rules from public rows.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import torch
from peft_dpzero.perturbation.basis import Basis
from peft_dpzero.public.basis import find_basis
from peft_dpzero.public.rows import public_rows
from peft_dpzero.public.settings import learning_rate
from torch import Tensor

from ..clock import Clock
from ..models import LONGEST, Row, Start
from .base import Outcome
from .gradients import own_gradients, row_gradients
from .loop import private_loop

BATCH, PASSES_A_ROW, MEASURED_ROWS = 256, 3, 32
# What ours takes of films in five minutes; here a vector more costs no passes.
VECTORS = 128


def first_order_in_basis(
    start: Start, clock: Clock, epsilon: float | None, seed: int, folder: Path, **settings: Any
) -> Outcome:
    assert epsilon is not None
    rows = public_rows(start.public_text, start.loss, start.model, start.tokenizer, LONGEST)
    size = start.size.basis or VECTORS
    basis = find_basis(start.model, start.loss, rows, start.collate, lambda batch: batch, size)
    with own_gradients(start) as module:
        reader = CoordinateGradients(start, module, basis)
        typical = float(reader.read(rows[:MEASURED_ROWS]).norm(dim=1).mean())
        return private_loop(
            reader,
            start,
            clock,
            epsilon,
            batch=BATCH,
            threshold=typical,
            rate=partial(learning_rate, typical),
        )


class CoordinateGradients:
    """Rows' gradients in a basis's coordinates c, where θ = θ₀ + Vᵀc; AdamW moves c."""

    passes_a_row = PASSES_A_ROW

    def __init__(self, start: Start, module: Any, basis: Basis) -> None:
        self.start, self.module, self.names = start, module, basis.names
        self.vectors = basis.vectors.float() * 2.0**-15  # [r, d]
        self.origin = {name: start.parameters[name].detach().clone() for name in basis.names}
        self.coordinates = torch.zeros(basis.size, requires_grad=True)
        self.optimizer = torch.optim.AdamW([self.coordinates], weight_decay=0.0)

    def prepare(self) -> None:
        """Nothing: the basis stays."""

    def read(self, rows: list[Row]) -> Tensor:
        some = [g @ self.vectors.T for g in row_gradients(self.start, self.module, rows, self.names)]
        return torch.cat(some) if some else torch.zeros(0, len(self.vectors))

    @torch.no_grad()
    def update(self, mean: Tensor, rate: float) -> None:
        self.coordinates.grad = mean
        self.optimizer.param_groups[0]["lr"] = rate
        self.optimizer.step()
        moved = (self.coordinates @ self.vectors).split([origin.numel() for origin in self.origin.values()])
        for (name, origin), shift in zip(self.origin.items(), moved, strict=True):
            self.start.parameters[name].copy_(origin + shift.view_as(origin))
