"""The private loop of methods that are written here: sample, read, clip, sum, noise, update."""

from __future__ import annotations

from typing import Any, Protocol

from torch import Tensor

from ..clock import Clock
from ..mechanism import PoissonGaussian
from ..models import Row, Start
from .base import Outcome


class Reader(Protocol):
    """What a method reads of private rows, and what it does with the noisy mean.

    Attributes:
        passes_a_row: through the model, a backward counting as two more.
    """

    passes_a_row: int

    def prepare(self) -> None:
        """Makes what a step needs, from public rows alone."""

    def read(self, rows: list[Row]) -> Tensor:
        """A vector for each row, not clipped: (b, k)."""

    def update(self, mean: Tensor, rate: float) -> None:
        """Moves the model by the noisy mean of clipped vectors (k,)."""


def private_loop(
    reader: Reader, start: Start, clock: Clock, epsilon: float, *, batch: int, threshold: float, rate: Any
) -> Outcome:
    """Trains until the budget is spent.

    Args:
        reader: the method.
        start: model and rows.
        clock: runs already.
        epsilon: the target.
        batch: B.
        threshold: C, from public rows.
        rate: η of the first step, which falls to 0; or a function from T to that.
    """
    batch = min(batch, start.size.batch)
    tried = start.some_rows(batch)

    def trial() -> None:
        reader.prepare()
        reader.read(tried)

    steps = clock.steps(reader.passes_a_row * batch, trial)
    mechanism = PoissonGaussian(epsilon, len(start.train), batch, steps, threshold)
    first = rate(steps) if callable(rate) else rate
    made = 0
    for made in range(1, steps + 1):
        reader.prepare()
        vectors = reader.read([start.train[i] for i in mechanism.draw()])
        reader.update(mechanism.release(vectors), first * (1 - (made - 1) / steps))
        if clock.is_over:
            break
    clock.stop()
    settings = {"learning_rate": first, "batch": batch, "planned_steps": steps, "clipping_threshold": threshold}
    return Outcome(made, float(reader.passes_a_row * batch * made), mechanism.spent(made), settings)
