"""How long a run may take: in seconds of which none is given back, or in passes of private rows."""

from __future__ import annotations

import time
from collections.abc import Callable

from .cells import Budget

# What steps take besides what was timed.
RESERVE = 1.05


class Clock:
    """Starts when the model and the rows are there; all that a method does before its first step counts.

    Args:
        budget: of the run; None never ends.
    """

    def __init__(self, budget: Budget | None) -> None:
        self.budget = budget
        self._start = time.monotonic()
        self._stop: float | None = None

    @property
    def seconds(self) -> float:
        """Since the start, until the last step."""
        return (self._stop or time.monotonic()) - self._start

    def stop(self) -> None:
        """Training is over: what is saved or computed of it afterwards does not count."""
        self._stop = self._stop or time.monotonic()

    @property
    def left(self) -> float:
        """Seconds; inf if passes are what counts."""
        if self.budget is None or self.budget.unit != "s":
            return float("inf")
        return self.budget.amount - self.seconds

    @property
    def is_over(self) -> bool:
        return self.left <= 0

    def steps(
        self, passes_a_step: float, trial: Callable[[], object], first: Callable[[], object] | None = None
    ) -> int:
        """How many steps fit, one at least.

        Args:
            passes_a_step: passes of private rows.
            trial: does the work of a step; not called if passes are what counts.
            first: what sets up all that later steps do not; by default the trial, once more.
        """
        assert self.budget is not None, "what trains has a budget"
        if self.budget.unit == "p":
            return max(1, int(self.budget.amount / passes_a_step))
        (first or trial)()
        before = time.monotonic()
        trial()
        once = time.monotonic() - before
        return max(1, int(self.left / (RESERVE * once)))
