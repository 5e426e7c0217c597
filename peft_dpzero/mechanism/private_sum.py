"""The one door: sealed per-unit differences go in, K noisy integers come out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from peft_dpzero.config import DPZeroConfig
from peft_dpzero.mechanism.clipping import SENSITIVITY, clip, clip_to_grid, grid_unit
from peft_dpzero.mechanism.noise import DiscreteGaussian, Noise, NoNoise, SeededGaussian


@dataclass(frozen=True, repr=False, eq=False)
class PrivateDifferences:
    """Per-unit loss differences: (n, K) float64. Private: only `PrivateSum` opens it.

    `loss_sum` is the sum of the units' losses, which leaves only if the user chose train_loss="nonprivate".
    """

    _rows: Tensor
    loss_sum: float = 0.0

    def __repr__(self) -> str:
        return "PrivateDifferences(withheld)"

    def __reduce__(self) -> str:
        raise TypeError("PrivateDifferences cannot be pickled: it holds private values.")


@dataclass(frozen=True)
class Released:
    """What a step gives away: public from here on.

    Attributes:
        step: the step's number, from 0.
        values: K numbers, s_k: integers on the grid (floats only if nothing is clipped).
        coefficients: ĝ_k / 1 = γ·s_k / (B·K), the weight of direction z_k in the estimated gradient.
    """

    step: int
    values: tuple[float, ...]
    coefficients: tuple[float, ...] = field(repr=False)

    @property
    def norm(self) -> float:
        """‖ĝ‖₂ of the K coefficients."""
        return float(torch.tensor(self.coefficients, dtype=torch.float64).norm())


class Processes(Protocol):
    """The processes of a run: `reduce` sums over them, `broadcast` copies from the first."""

    is_main_process: bool

    def sum(self, tensor: Tensor) -> Tensor: ...
    def broadcast(self, tensor: Tensor) -> Tensor: ...


class OneProcess:
    """A run in a single process."""

    is_main_process = True

    def sum(self, tensor: Tensor) -> Tensor:
        return tensor

    def broadcast(self, tensor: Tensor) -> Tensor:
        return tensor


class PrivateSum:
    """s = Σ_i clip(d_i) + noise, in integers; ĝ = γ·s / (B·K).

    Guarantee: for the sampled units, the L2 sensitivity of the integer sum is 2²⁰ when one unit is added or
    removed (checked row by row), and the noise is a discrete Gaussian of scale σ·2²⁰: a Gaussian mechanism with
    noise multiplier σ. Poisson sampling at rate q and T-fold composition are the accountant's.

    Args:
        config: with `noise_multiplier` set (see `calibrated`).
        expected_batch_size: B = q·N. Sums are divided by it, never by a batch's actual size.
        processes: the run's processes.
    """

    def __init__(self, config: DPZeroConfig, expected_batch_size: float, processes: Processes | None = None) -> None:
        if config.noise_multiplier is None:
            raise ValueError("noise_multiplier is not calibrated yet: use the config that `make_plan` returns.")
        self.config = config
        self.expected_batch_size = expected_batch_size
        self.processes = processes or OneProcess()
        self.clips = config.clipping_threshold != float("inf")
        self.unit = grid_unit(config.clipping_threshold) if self.clips else 1.0
        self._noise = _noise(config.noise_multiplier * SENSITIVITY, config)

    def release(self, step: int, differences: PrivateDifferences) -> Released:
        """Clips, sums over units and processes, adds noise once, and opens the door for the K results."""
        rows = differences._rows
        threshold = self.config.clipping_threshold
        clipped = clip_to_grid(rows, threshold) if self.clips else clip(rows, threshold)
        total = self.processes.sum(clipped.sum(dim=0))
        if self.processes.is_main_process:
            total = total + self._noise.sample(total.numel(), step)
        values = self.processes.broadcast(total).tolist()
        return self.interpret(step, values)

    def interpret(self, step: int, values: Sequence[float]) -> Released:
        """The release whose K values are already known, from a journal."""
        weight = self.unit / (self.expected_batch_size * self.config.num_directions)
        return Released(step, tuple(values), tuple(weight * value for value in values))


def _noise(scale: float, config: DPZeroConfig) -> Noise:
    if scale == 0:
        return NoNoise()
    return SeededGaussian(scale, config.direction_seed) if config.deterministic else DiscreteGaussian(scale)
