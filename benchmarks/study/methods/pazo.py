"""PAZO-P (arXiv 2511.10859): private two-sided differences along combinations of public gradients.

A step draws some batches of labelled public rows and normalises their gradients, the columns of G. With u from N(0, I)
every private row's difference at θ ± λGu is clipped; the noisy mean of them times Gu is the update. Written from a
description of the paper.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from ..clock import Clock
from ..mechanism import secret_generator
from ..models import Row, Start
from .base import Outcome, root_mean_square
from .loop import private_loop
from .ours import PUBLISHED_MOVE, PUBLISHED_ROWS

PUBLIC_ROWS = 16
# Public rows and directions that the threshold is measured on.
MEASURED_ROWS, MEASURED_DIRECTIONS = 32, 16


def pazo(
    start: Start,
    clock: Clock,
    epsilon: float | None,
    seed: int,
    folder: Path,
    *,
    learning_rate: float,
    public_batches: int,
) -> Outcome:
    assert epsilon is not None
    reader = PublicGradients(start, public_batches, seed)
    reader.prepare()
    threshold = usual_difference(reader, start.public[:MEASURED_ROWS])
    outcome = private_loop(reader, start, clock, epsilon, batch=PUBLISHED_ROWS, threshold=threshold, rate=learning_rate)
    outcome.settings |= {"public_batches": public_batches, "smoothing_parameter": PUBLISHED_MOVE}
    return outcome


def usual_difference(reader: PublicGradients, public: list[Row]) -> float:
    """The root mean square of public rows' differences along combinations of the same gradients."""
    differences = []
    for _ in range(MEASURED_DIRECTIONS):
        reader.draw()
        differences.append(reader.read(public))
    return root_mean_square(torch.stack(differences))


class PublicGradients:
    """Differences along Gu, which is drawn anew each step."""

    passes_a_row = 2

    def __init__(self, start: Start, public_batches: int, seed: int) -> None:
        self.start, self.public_batches = start, public_batches
        self.parameters = list(start.parameters.values())
        self.order = np.random.RandomState(seed)
        self.directions = secret_generator()
        self.columns = self.direction = torch.empty(0)

    def prepare(self) -> None:
        """Draws G (its columns are rows here: (k, d)) and u."""
        columns = []
        for _ in range(self.public_batches):
            chosen = self.order.choice(len(self.start.public), min(PUBLIC_ROWS, self.start.size.batch))
            batch = self.start.collate([dict(self.start.public[i]) for i in chosen])
            loss = self.start.losses(batch).mean()
            made = torch.autograd.grad(loss, self.parameters, allow_unused=True, materialize_grads=True)
            columns.append(nn.functional.normalize(torch.cat([g.flatten() for g in made]), dim=0))
        self.columns = torch.stack(columns)
        self.draw()

    def draw(self) -> None:
        """Draws u: the direction Gu is (d,)."""
        self.direction = torch.randn(len(self.columns), generator=self.directions) @ self.columns

    @torch.no_grad()
    def read(self, rows: list[Row]) -> Tensor:
        batches = self.start.batches(rows)
        self.move(PUBLISHED_MOVE)
        plus = [self.start.losses(batch) for batch in batches]
        self.move(-2 * PUBLISHED_MOVE)
        minus = [self.start.losses(batch) for batch in batches]
        self.move(PUBLISHED_MOVE)
        if not batches:
            return torch.zeros(0, 1)
        return ((torch.cat(plus) - torch.cat(minus)) / (2 * PUBLISHED_MOVE))[:, None]

    def update(self, mean: Tensor, rate: float) -> None:
        self.move(-rate * float(mean))

    @torch.no_grad()
    def move(self, scale: float) -> None:
        """θ ← θ + scale · Gu."""
        parts = self.direction.split([p.numel() for p in self.parameters])
        for parameter, part in zip(self.parameters, parts, strict=True):
            parameter.add_(part.view_as(parameter), alpha=scale)
