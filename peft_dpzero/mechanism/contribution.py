"""What one unit adds to a step's sum: a row of norm at most 1, shared by all that the step releases.

    differences          √(1 − a − b) · v_i / C           K entries
    loss                 √a · clip(ℓ_i, 0, R) / R         one entry, in steps that release the loss
    below the threshold  √b · (+1 if ‖d_i‖ ≤ C else −1)   one entry, with adaptive clipping

R is `loss_clipping_threshold`. The row is one vector to one Gaussian mechanism, so a step costs the same ε whatever it
releases: the loss and the count take a share of the row's norm, and the differences get more noise instead.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from peft_dpzero.config import DPZeroConfig
from peft_dpzero.mechanism.clipping import SENSITIVITY, clipped_over_threshold, normalized, to_grid

# a and b: shares of the squared norm.
LOSS_SHARE = 0.1
COUNT_SHARE = 0.02
# Units whose rows are made at once: always as many, so that none is rounded as the others' number decides.
UNITS_AT_ONCE = 64
# η_C of Andrew et al. 2021: how fast the threshold follows the quantile.
THRESHOLD_RATE = 0.2


class Contributions:
    """Makes units' integer rows, and reads the values that a sum of them releases.

    Args:
        config: the run's config.
        loss_interval: steps between released losses; 0 releases none.
    """

    def __init__(self, config: DPZeroConfig, loss_interval: int = 0) -> None:
        self.config = config.settled()
        self.loss_interval = loss_interval if config.train_loss == "private" else 0
        self.counts = self.config.clipping == "adaptive"

    def releases_loss(self, step: int) -> bool:
        """Whether `step` releases the loss: each `loss_interval`-th does."""
        return self.loss_interval > 0 and (step + 1) % self.loss_interval == 0

    def width(self, step: int) -> int:
        """How many values `step` releases."""
        return self.config.num_directions + self.releases_loss(step) + self.counts

    def difference_weight(self, step: int) -> float:
        """√(1 − a − b): what the other releases of `step` leave to the differences."""
        return math.sqrt(1.0 - LOSS_SHARE * self.releases_loss(step) - COUNT_SHARE * self.counts)

    def rows(self, step: int, differences: Tensor, losses: Tensor, threshold: float) -> Tensor:
        """The units' rows on the grid; a unit with a value that is not finite has a row of zeros.

        Args:
            step: the step's number.
            differences: (n, K) float64.
            losses: (n,) float64, read only if `step` releases the loss.
            threshold: C of this step.

        Returns: (n, K to K + 2) int64, squared norms at most 2⁴⁰.
        """
        made = []
        for start in range(0, len(differences), UNITS_AT_ONCE):
            count = min(UNITS_AT_ONCE, len(differences) - start)
            block = differences.new_zeros(UNITS_AT_ONCE, differences.shape[1])
            block[:count] = differences[start : start + count]
            level = losses.new_zeros(UNITS_AT_ONCE)
            if self.releases_loss(step):
                level[:count] = losses[start : start + count]
            made.append(self._block(step, block, level, threshold)[:count])
        return torch.cat(made) if made else self._block(step, differences, losses, threshold)

    def _block(self, step: int, differences: Tensor, losses: Tensor, threshold: float) -> Tensor:
        clipped, within = clipped_over_threshold(differences, threshold)
        bounded = normalized(differences, threshold) if self.config.clipping == "automatic" else clipped
        columns = [self.difference_weight(step) * bounded]
        usable = torch.isfinite(differences).all(dim=1)
        if self.releases_loss(step):
            share = losses.div(self.config.loss_clipping_threshold).clamp(0.0, 1.0)
            columns.append(math.sqrt(LOSS_SHARE) * share[:, None])
            usable = usable & torch.isfinite(losses)
        if self.counts:
            columns.append(math.sqrt(COUNT_SHARE) * torch.where(within, 1.0, -1.0).to(differences))
        return to_grid(torch.where(usable[:, None], torch.cat(columns, dim=1), 0.0))

    def loss(self, step: int, values: Sequence[float], expected_batch_size: float) -> float | None:
        """The mean loss among a step's released `values`, or None."""
        if not self.releases_loss(step):
            return None
        total = values[self.config.num_directions] / (math.sqrt(LOSS_SHARE) * SENSITIVITY)
        return total * self.config.loss_clipping_threshold / expected_batch_size

    def next_threshold(self, threshold: float, values: Sequence[float], expected_batch_size: float) -> float:
        """C of the next step: C · exp(−0.2 (share below C − quantile)) (Andrew et al. 2021, algorithm 1)."""
        if not self.counts:
            return threshold
        surplus = values[-1] / (math.sqrt(COUNT_SHARE) * SENSITIVITY)
        below = 0.5 + surplus / (2 * expected_batch_size)
        return threshold * math.exp(-THRESHOLD_RATE * (below - self.config.clipping_quantile))
