"""Have released values the size that sampling, clipping and noise give them? A test of two sides.

A step of an honest run releases s = Σ_i row_i + noise: at most n rows, each of norm at most 2²⁰ grid units, and noise
of scale σ·2²⁰. In units of that scale:

- *Not too small.* Whatever the rows are, each value is noise around something: Σ values² over all steps is
  stochastically at least a χ² with one degree of freedom a value (Anderson's inequality, step by step), and Σ |values|
  of Laplace noise at least a sum of exponentials. Less than their 10⁻⁶ quantile refutes the claimed σ.
- *Not too large.* ‖s‖ ≤ n/σ + ‖noise‖, where n is a binomial draw from N = B/q units. More than a high quantile of both
  refutes it. A step's share of the level is 10⁻⁶ / T, half for n and half for the noise.

Honest runs fail each side with probability 10⁻⁶ at most. Forged values of that size pass: noise looks like that too.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from scipy import stats

from peft_dpzero.mechanism.clipping import SENSITIVITY
from peft_dpzero.release.header import segment_config
from peft_dpzero.release.journal import JournalSegment

LEVEL = 1e-6
# Below this many grid units the discrete noise is no longer like the continuous one.
_FINE = 100.0


@dataclass(frozen=True)
class Scale:
    """What the test found.

    Attributes:
        total: Σ values² (Gaussian) or Σ |values| (Laplace) over all steps, in units of the noise's scale.
        least: what it must reach.
        excess: the largest ratio of a step's norm to the most that it may have.
        step: where that was.
    """

    total: float
    least: float
    excess: float
    step: int

    @property
    def too_small(self) -> bool:
        return not self.total >= self.least

    @property
    def too_large(self) -> bool:
        return not self.excess <= 1.0


def measured(segments: Sequence[JournalSegment]) -> Scale | None:
    """The size of all released values against both bounds; None where there is no noise to measure them by."""
    count = sum(len(segment.entries) for segment in segments)
    laplace, total, freedom, excess = False, 0.0, 0, (0.0, 0)
    for segment in segments:
        config = segment_config(segment)
        assert config.noise_multiplier is not None
        if math.isinf(config.clipping_threshold) or config.noise_multiplier * SENSITIVITY < _FINE:
            return None
        laplace = config.mechanism == "laplace"
        for step, norm, width, most in _norms(segment, config.noise_multiplier, laplace, LEVEL / (2 * count)):
            total += norm if laplace else norm**2
            freedom += width
            excess = max(excess, (norm / most if math.isfinite(norm) else math.inf, step))
    if not freedom:
        return None
    least = stats.gamma.ppf(LEVEL, freedom) if laplace else stats.chi2.ppf(LEVEL, freedom)
    return Scale(total, float(least), *excess)


def _norms(
    segment: JournalSegment, noise_multiplier: float, laplace: bool, level: float
) -> Iterator[tuple[int, float, int, float]]:
    """Of each entry: its step, its norm in units of the noise, how many values it has, and the norm's bound."""
    batch, rate = segment.header["expected_batch_size"], segment.header["sample_rate"]
    rows = float(stats.binom.isf(level, round(batch / rate), rate)) if rate < 1 else batch
    scale = noise_multiplier * SENSITIVITY
    noise: dict[int, float] = {}
    for entry in segment.entries:
        width = len(entry.values)
        if width not in noise:
            # Grid units that the discrete noise may have over the continuous one.
            slack = math.sqrt(width) / scale
            tail = math.log(2 / level) if laplace else math.sqrt(float(stats.chi2.isf(level, width)))
            noise[width] = tail + slack
        norm = math.hypot(*(value / scale for value in entry.values))
        yield entry.step, norm, width, rows / noise_multiplier + noise[width]
