"""The one door: sealed per-unit differences go in, K noisy integers come out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from peft_dpzero.config import DPZeroConfig
from peft_dpzero.mechanism.clipping import SENSITIVITY, clip, grid_unit, normalized
from peft_dpzero.mechanism.contribution import Contributions
from peft_dpzero.mechanism.noise import ExactNoise, Noise, NoNoise, SeededNoise


@dataclass(frozen=True, repr=False, eq=False)
class PrivateDifferences:
    """Per-unit loss differences, (n, K) float64, and losses, (n,) float64. Private: only the mechanism opens it."""

    _rows: Tensor
    _losses: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.float64))

    def __repr__(self) -> str:
        return "PrivateDifferences(withheld)"

    def __reduce__(self) -> str:
        raise TypeError("PrivateDifferences cannot be pickled: it holds private values.")


def clipped_rows_of_own(differences: PrivateDifferences, config: DPZeroConfig, clipping_threshold: float) -> Tensor:
    """Differences as they are clipped in a step, (n, K) float64, of examples that the caller made up: for audits.

    Never call it on private data: this is the only other way out of the seal.
    """
    rows = differences._rows
    if config.clipping == "automatic":
        return normalized(rows, clipping_threshold).mul(clipping_threshold)
    return clip(rows, clipping_threshold)


@dataclass(frozen=True)
class Released:
    """What a step gives away: public from here on.

    Attributes:
        step: the step's number, from 0.
        values: the noisy integer sums (floats only if nothing is clipped): K for the directions, then one for the
            loss and one for the count of units below the threshold, where the step releases them.
        coefficients: ĝ_k = γ·s_k / (B·K), the weight of direction z_k in the estimated gradient.
        clipping_threshold: C of this step.
        loss: the noisy mean loss, if the step releases it.
    """

    step: int
    values: tuple[float, ...]
    coefficients: tuple[float, ...] = field(repr=False)
    clipping_threshold: float
    loss: float | None = None

    @property
    def norm(self) -> float:
        """‖ĝ‖₂ of the K coefficients."""
        return float(torch.tensor(self.coefficients, dtype=torch.float64).norm())


class Processes(Protocol):
    """The processes of a run: `sum` sums over them, `broadcast` copies from the first."""

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
    """s = Σ_i row_i + noise, in integers; ĝ = γ·s / (B·K).

    Guarantee: for the sampled units, the L2 sensitivity of the integer sum is 2²⁰ when one unit is added or
    removed (checked row by row), and the noise is a discrete Gaussian of scale σ·2²⁰: a Gaussian mechanism with
    noise multiplier σ. With mechanism="laplace" rows have one entry, so the same holds of the L1 norm and the
    discrete Laplace. Poisson sampling at rate q and T-fold composition are the accountant's.

    Args:
        config: with `noise_multiplier` set, as `make_plan` returns it.
        expected_batch_size: B = q·N. Sums are divided by it, never by a batch's actual size.
        processes: the run's processes.
        loss_interval: steps between released losses, with train_loss="private".
    """

    def __init__(
        self,
        config: DPZeroConfig,
        expected_batch_size: float,
        processes: Processes | None = None,
        loss_interval: int = 0,
    ) -> None:
        if config.noise_multiplier is None:
            raise ValueError("noise_multiplier is not calibrated yet: use the config that `make_plan` returns.")
        self.config = config.settled()
        self.expected_batch_size = expected_batch_size
        self.processes = processes or OneProcess()
        self.clips = self.config.clipping_threshold != float("inf")
        self.clipping_threshold = self.config.clipping_threshold
        self._contributions = Contributions(self.config, loss_interval)
        self._noise = _noise(config.noise_multiplier * SENSITIVITY, config)
        self._last_step = -1

    def release(
        self, step: int, differences: PrivateDifferences, record: Callable[[Sequence[float]], object] | None = None
    ) -> Released:
        """Clips, sums over units and processes, adds noise once, and opens the door for the results.

        Args:
            step: its number.
            differences: of this process's units.
            record: puts the values on disk, on the first process, before any other has them.
        """
        rows = differences._rows
        if self.clips:
            rows = self._contributions.rows(step, rows, differences._losses, self.clipping_threshold)
        else:
            rows = clip(rows, self.clipping_threshold)
        total = self.processes.sum(rows.sum(dim=0))
        if self.processes.is_main_process:
            total = total + self._noise.sample(total.numel(), step)
            if record is not None:
                record(total.tolist())
        values = self.processes.broadcast(total).tolist()
        return self.interpret(step, values)

    def interpret(self, step: int, values: Sequence[float]) -> Released:
        """The release whose values are already known, from a journal; moves an adaptive threshold on.

        Raises:
            RuntimeError: with an adaptive threshold, `step` is not the one after the last.
        """
        threshold, contributions = self.clipping_threshold, self._contributions
        if contributions.counts and self._last_step not in (-1, step - 1):
            raise RuntimeError(f"Step {step} cannot follow step {self._last_step}: its threshold is unknown.")
        self._last_step = step
        self.clipping_threshold = contributions.next_threshold(threshold, values, self.expected_batch_size)
        unit = grid_unit(threshold) / contributions.difference_weight(step) if self.clips else 1.0
        weight = unit / (self.expected_batch_size * self.config.num_directions)
        return Released(
            step,
            tuple(values),
            tuple(weight * value for value in values[: self.config.num_directions]),
            threshold,
            contributions.loss(step, values, self.expected_batch_size),
        )

    def raw_loss(self, differences: PrivateDifferences) -> float | None:
        """The batch's mean loss without noise if the user chose train_loss="nonprivate", else None."""
        if self.config.train_loss != "nonprivate":
            return None
        return float(self.processes.sum(differences._losses.nansum()[None])) / self.expected_batch_size


def _noise(scale: float, config: DPZeroConfig) -> Noise:
    if scale == 0:
        return NoNoise()
    if config.deterministic:
        return SeededNoise(config.mechanism, scale, config.direction_seed)
    return ExactNoise(config.mechanism, scale)
