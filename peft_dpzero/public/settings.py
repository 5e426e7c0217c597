"""Which settings a run takes where the user gave none: from what was measured on rows that are public or made up."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache
from operator import attrgetter
from typing import Any

from scipy.optimize import brentq
from scipy.stats import norm

from peft_dpzero.config import DPZeroConfig, SettledConfig
from peft_dpzero.errors import TooLittleTime
from peft_dpzero.mechanism.accountant import Accountant
from peft_dpzero.mechanism.laplace import laplace_noise_multiplier
from peft_dpzero.perturbation.orthogonal import angles
from peft_dpzero.public.scales import Pace, Seconds, Slopes

# How large the mean gradient is, squared, beside a row's: not known before training, and about this early in it.
SIGNAL_SHARE = 0.02
# How much the noise in a run's updates may change a loss by its end, to first order: in a basis; and in all
# coordinates, where there is more to bend.
_WANDERING, _WANDERING_AT_LARGE = 0.45, 0.35
# Smaller batches drown in noise, and of fewer rows each goes by itself.
_BATCHES = tuple(64 << power for power in range(6))
_DIRECTIONS = tuple(1 << power for power in range(10))
# A run of fewer steps than this is no training.
FEWEST_STEPS = 10
# As few steps as this go far from the start.
ENOUGH_STEPS = 40
# How many of a basis's vectors directions may lie in, where time decides.
BASIS_SIZES = (64, 128, 256)
# What it costs a run that gradients also lie outside the smallest of these, as variance, by simulated runs; and the
# power of the size with which their energy there falls, from 21 % to 13 and 7 % on films.
_OUTSIDE, _FALL = 2e-4, -0.8


@dataclass(frozen=True)
class Settings:
    """What was chosen before training. None is what the user gave, or what was left to TrainingArguments.

    Attributes:
        source: what it was measured on: "public text" or "made-up rows".
        clipping_threshold: C.
        smoothing_parameter: λ.
        difference: 'central' or 'forward'.
        num_directions: K.
        expected_batch_size: B, of all processes.
        steps: T.
        learning_rate: η.
        basis_size: r.
    """

    source: str
    clipping_threshold: float | None = None
    smoothing_parameter: float | None = None
    difference: str | None = None
    num_directions: int | None = None
    expected_batch_size: int | None = None
    steps: int | None = None
    learning_rate: float | None = None
    basis_size: int | None = None

    def settled(self, config: DPZeroConfig) -> SettledConfig:
        """`config` with what was chosen in place of what is None."""
        return config.settled(
            clipping_threshold=self.clipping_threshold,
            smoothing_parameter=self.smoothing_parameter,
            difference=self.difference,
            num_directions=self.num_directions,
            basis_size=self.basis_size,
        )

    def to_dict(self) -> dict[str, Any]:
        """The source and what was chosen, JSON-ready."""
        return {key: value for key, value in asdict(self).items() if value is not None}


@dataclass(frozen=True)
class Variance:
    """The expected squared error of an estimate of a gradient g, over the squared norm of a row's gradient.

    With d coordinates, K directions, and B rows of gradients with variance s², clipped at about c√K:
    d (‖g‖² / K + s² / (BK) + σ²c² / B²) and s² / B, which more directions leave. Of K directions at right angles,
    out of D, the first two are smaller: they have 1/K − 1/D for 1/K.
    """

    directions: float
    sampling: float
    noise: float

    @classmethod
    def of(
        cls, config: DPZeroConfig, entries: int, num_directions: int, batch: int, noise_multiplier: float
    ) -> Variance:
        """For d = `entries`, and the directions that `config` asks for."""
        missed = entries / num_directions
        if config.direction_distribution == "orthogonal":
            missed = max(0.0, missed - entries / angles(entries))
        return cls(missed * SIGNAL_SHARE, (1 + missed) / batch, entries * (noise_multiplier / batch) ** 2)

    @property
    def total(self) -> float:
        """The sum of the parts."""
        return self.directions + self.sampling + self.noise


@dataclass(frozen=True)
class Choice:
    """A logical batch and so many directions in so many coordinates, and what these give: `steps` at a `pace`."""

    expected_batch_size: int
    num_directions: int
    entries: int
    steps: int
    pace: Pace
    variance: Variance

    @property
    def error(self) -> float:
        """What is left of the estimates' variance after a run, and what gradients outside the coordinates cost."""
        return self.variance.total / self.steps + _OUTSIDE * math.pow(self.entries / BASIS_SIZES[0], _FALL)

    def proven(self, config: DPZeroConfig, num_units: int) -> Choice:
        """With the variance that the accountant's σ gives, in place of the formula's."""
        if config.target_epsilon is None or config.noise_multiplier is not None:
            return self
        sample_rate = self.expected_batch_size / num_units
        sigma = Accountant.of(config).quick_noise_multiplier(config.target_epsilon, sample_rate, self.steps)
        variance = Variance.of(config, self.entries, self.num_directions, self.expected_batch_size, sigma)
        return replace(self, variance=variance)


def choose_sizes(
    config: DPZeroConfig,
    seconds: Seconds,
    *,
    num_units: int,
    entries: Sequence[int],
    budget: float,
    processes: int = 1,
    batch: int | None = None,
    steps: int | None = None,
) -> Choice:
    """The batch, the directions and their coordinates with which a run of `budget` seconds estimates gradients best.

    Args:
        config: the budget of privacy, the difference, and K if it is given.
        seconds: what passes take.
        num_units: N.
        entries: in how many coordinates directions may lie.
        budget: seconds for all steps.
        processes: among which rows are split.
        batch: B if it is given.
        steps: T if it is given.

    Raises:
        TooLittleTime: not even the smallest batch with one direction can be had for so little time.
    """
    batches = [batch] if batch else [b for b in _BATCHES if b <= num_units // 4] or [max(1, num_units // 4)]
    known = config.known_directions
    points = 1 if config.difference == "forward" else 2

    def pace_of(size: int, count: int) -> Pace:
        rows = size / processes
        return seconds.pace(rows, points * count, rows / num_units)

    def directions(coordinates: int) -> Sequence[int]:
        if known:
            return (known,)
        # No more directions than these are at right angles, and they tell everything.
        most = angles(coordinates) if config.direction_distribution == "orthogonal" else max(_DIRECTIONS)
        return [count for count in _DIRECTIONS if count <= most]

    def choices() -> Iterator[Choice]:
        shapes = ((size, lie, count) for size, lie in itertools.product(batches, entries) for count in directions(lie))
        for size, lie, count in shapes:
            pace = pace_of(size, count)
            made = steps or pace.steps(budget)
            fits = made >= (steps or FEWEST_STEPS) and pace.seconds(made) <= 1.01 * budget
            # Where all is given there is nothing to choose.
            if fits or (steps and batch and config.known_directions):
                sigma = rough_noise(config, size / num_units, made)
                yield Choice(size, count, lie, made, pace, Variance.of(config, lie, count, size, sigma))

    found = list(choices())
    if not found:
        least = pace_of(batches[0], known or 1).seconds(steps or FEWEST_STEPS)
        raise TooLittleTime(
            f"{steps or FEWEST_STEPS} steps take {least / 60:.1g} minutes at least here, and {budget / 60:.1g} are "
            "left of `minutes`: give more, or train fewer or higher layers."
        )
    enough = [choice for choice in found if choice.steps >= ENOUGH_STEPS] or found
    # The accountant takes longer than a formula: it is asked about the best of each batch only.
    of_size = ([one for one in enough if one.expected_batch_size == size] for size in batches)
    finalists = [min(some, key=attrgetter("error")) for some in of_size if some]
    return min((one.proven(config, num_units) for one in finalists), key=attrgetter("error"))


def learning_rate(slope: float, steps: int, in_basis: bool = True) -> float:
    """η with which the noise of a run of AdamW changes a loss by about 0.45, at a rate that falls to 0.

    Each number moves by η · (1 − t/T) in an unknown direction at each step: by η√(T/3) in all.

    Args:
        slope: the usual size of a row's slope along a direction.
        steps: T.
        in_basis: whether directions lie in a basis; where they do not, it is 0.35.
    """
    wandering = _WANDERING if in_basis else _WANDERING_AT_LARGE
    return _two_digits(wandering / (slope * math.sqrt(steps / 3)))


def clipping_threshold(slopes: Slopes, num_directions: int) -> float:
    """C: the usual norm of a row's slopes along K directions."""
    return _two_digits(slopes.typical * math.sqrt(num_directions))


def rough_noise(config: DPZeroConfig, sample_rate: float, steps: int) -> float:
    """About the σ that the accountant will calibrate, by the central limit theorem (Bu et al. 2020, arXiv 1911.11607):
    T releases at rate q are μ-Gaussian private with μ = q √(T (exp(1/σ²) − 1)). Below σ = 1 it is up to a third less.
    """
    if config.noise_multiplier is not None:
        return config.noise_multiplier
    assert config.target_epsilon is not None
    # Beyond this nothing is hidden, and exp overflows.
    epsilon = min(config.target_epsilon, 500.0)
    if config.mechanism == "laplace":
        return laplace_noise_multiplier(epsilon, sample_rate, steps, config.neighboring)
    assert config.target_delta is not None
    mu = _gaussian_privacy(epsilon, config.target_delta)
    return 1 / math.sqrt(math.log1p((mu / sample_rate) ** 2 / steps))


@cache
def _gaussian_privacy(epsilon: float, delta: float) -> float:
    """μ, up to 50, with which (ε, δ) is μ-Gaussian privacy."""

    def excess(mu: float) -> float:
        return float(norm.cdf(mu / 2 - epsilon / mu) - math.exp(epsilon) * norm.cdf(-mu / 2 - epsilon / mu)) - delta

    return float(brentq(excess, 1e-4, 50.0)) if excess(1e-4) < 0 < excess(50.0) else 50.0


def _two_digits(value: float) -> float:
    return float(f"{value:.2g}")
