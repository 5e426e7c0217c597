"""What the releases cost, by dp-accounting's privacy loss distributions (PLD).

A run is T releases, each a Gaussian mechanism with noise multiplier σ on a Poisson sample at rate q. Under
`add_or_remove_one` a unit's sum has sensitivity C; under `replace_one` two units' vectors can point opposite ways,
2C apart, which the accountant's own REPLACE_ONE relation covers. Laws: Koskela et al. 2020, Doroshenko et al. 2022.
"""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from functools import lru_cache
from importlib.metadata import version

from dp_accounting import GaussianDpEvent, NeighboringRelation, PoissonSampledDpEvent, SelfComposedDpEvent
from dp_accounting.mechanism_calibration import ExplicitBracketInterval, calibrate_dp_mechanism
from dp_accounting.pld import PLDAccountant
from dp_accounting.rdp import RdpAccountant

from peft_dpzero.errors import DPZeroError
from peft_dpzero.mechanism.pure import laplace_epsilon, laplace_noise_multiplier

ACCOUNTANT = "dp_accounting.pld.PLDAccountant"
# The accountant's grid on the privacy loss. Its rounding is pessimistic, so a coarse grid overstates ε.
INTERVAL = 1e-4
COARSE_INTERVAL = 1e-3
RELATIONS = {
    "add_or_remove_one": NeighboringRelation.ADD_OR_REMOVE_ONE,
    "replace_one": NeighboringRelation.REPLACE_ONE,
}
# σ is calibrated to this relative tolerance.
TOLERANCE = 1e-3
# A run that has spent this share of its ε, or would need this many times a fresh one's noise, cannot be continued.
SPENT, MOST_NOISE = 0.995, 100.0
# Integer Rényi orders: their closed form always converges, and they only bracket PLD's answer.
_RDP_ORDERS = [*range(2, 64), 96, 128, 256, 512, 1024]


def accountant_version() -> str:
    """dp-accounting's version."""
    return version("dp-accounting")


def discretization_interval(noise_multiplier: float, interval: float = INTERVAL) -> float:
    """The grid that PLD takes at σ: coarser below σ = 0.1, where ε is huge and the fine grid has millions of points."""
    return max(interval, 1e-6 / noise_multiplier**2) if noise_multiplier else interval


@lru_cache(maxsize=1024)
def epsilon(
    noise_multiplier: float,
    sample_rate: float,
    steps: int,
    delta: float,
    neighboring: str = "add_or_remove_one",
    interval: float = INTERVAL,
) -> float:
    """The ε that T = `steps` releases cost at `delta`, an upper bound proven by PLD; inf if σ is 0."""
    if steps == 0:
        return 0.0
    if noise_multiplier == 0:
        return math.inf
    accountant = PLDAccountant(
        RELATIONS[neighboring], value_discretization_interval=discretization_interval(noise_multiplier, interval)
    )
    accountant.compose(_event(noise_multiplier, sample_rate, steps))
    return float(accountant.get_epsilon(delta))


@lru_cache(maxsize=64)
def calibrate_noise_multiplier(
    target_epsilon: float,
    target_delta: float,
    sample_rate: float,
    steps: int,
    neighboring: str = "add_or_remove_one",
    interval: float = INTERVAL,
) -> float:
    """The smallest σ, to 0.1 %, for which PLD proves `target_epsilon` on a grid of `interval`.

    RDP brackets the answer from above in milliseconds; PLD then searches inside the bracket only, since its cost
    explodes as σ shrinks.

    Raises:
        DPZeroError: no σ below 10⁶ gives the target.
    """

    def proven(sigma: float) -> float:
        return epsilon(sigma, sample_rate, steps, target_delta, neighboring, interval)

    high = _rdp_noise_multiplier(target_epsilon, target_delta, sample_rate, steps)
    if neighboring == "replace_one":
        high *= 2
    low = high
    while proven(low) <= target_epsilon:
        high, low = low, low * 0.85
        if low < 1e-3:
            return high
    while proven(high) > target_epsilon:
        low, high = high, high * 1.3
        if high > 1e6:
            raise DPZeroError(
                f"No noise gives ε={target_epsilon:g} at δ={target_delta:g} over {steps} steps: raise target_epsilon "
                "or target_delta, or take fewer steps."
            )
    return float(
        calibrate_dp_mechanism(
            lambda: PLDAccountant(RELATIONS[neighboring], value_discretization_interval=interval),
            lambda sigma: _event(sigma, sample_rate, steps),
            target_epsilon,
            target_delta,
            bracket_interval=ExplicitBracketInterval(low, high),
            tol=TOLERANCE * low,
        )
    )


@dataclass(frozen=True)
class Segment:
    """Releases that share σ and q. A run that was continued has several, one after another."""

    noise_multiplier: float
    sample_rate: float
    steps: int


@lru_cache(maxsize=1024)
def epsilon_of(
    segments: tuple[Segment, ...],
    delta: float,
    neighboring: str = "add_or_remove_one",
    interval: float = INTERVAL,
    mechanism: str = "gaussian",
) -> float:
    """The ε that all `segments` together cost at `delta`, an upper bound; inf if one has no noise.

    Proven by PLD for Gaussian noise; for Laplace noise, at δ = 0, it is the sum of the largest losses (`pure.py`).
    """
    segments = tuple(segment for segment in segments if segment.steps)
    if mechanism == "laplace":
        return sum(laplace_epsilon(s.noise_multiplier, s.sample_rate, s.steps, neighboring) for s in segments)
    if len(segments) < 2 or any(segment.noise_multiplier == 0 for segment in segments):
        alone = [epsilon(s.noise_multiplier, s.sample_rate, s.steps, delta, neighboring, interval) for s in segments]
        return max(alone, default=0.0)
    grid = max(discretization_interval(segment.noise_multiplier, interval) for segment in segments)
    accountant = PLDAccountant(RELATIONS[neighboring], value_discretization_interval=grid)
    for segment in segments:
        accountant.compose(_event(segment.noise_multiplier, segment.sample_rate, segment.steps))
    return float(accountant.get_epsilon(delta))


def rdp_epsilon_of(segments: tuple[Segment, ...], delta: float, neighboring: str = "add_or_remove_one") -> float:
    """A second, looser bound on the same ε, by Rényi DP.

    Raises:
        dp_accounting.UnsupportedEventError: RDP does not cover these events.
    """
    accountant = RdpAccountant(_RDP_ORDERS, RELATIONS[neighboring])
    for segment in segments:
        accountant.compose(_event(segment.noise_multiplier, segment.sample_rate, segment.steps))
    return float(accountant.get_epsilon(delta))


def calibrate_after(
    spent: tuple[Segment, ...],
    target_epsilon: float,
    target_delta: float,
    sample_rate: float,
    steps: int,
    neighboring: str = "add_or_remove_one",
    mechanism: str = "gaussian",
) -> float:
    """The smallest σ, to 0.1 %, with which `steps` more releases after `spent` stay within `target_epsilon`.

    Raises:
        DPZeroError: `spent` leaves next to nothing.
    """
    before = epsilon_of(spent, target_delta, neighboring, mechanism=mechanism)
    too_little = DPZeroError(
        f"The releases made so far cost ε={before:.4g} of target_epsilon={target_epsilon:g}, which leaves too "
        f"little for {steps} more: raise target_epsilon."
    )
    if before >= SPENT * target_epsilon:
        raise too_little
    if mechanism == "laplace":
        return laplace_noise_multiplier(target_epsilon - before, sample_rate, steps, neighboring)
    # Alone they would need at least this much.
    alone = calibrate_noise_multiplier(target_epsilon, target_delta, sample_rate, steps, neighboring)
    if not spent:
        return alone
    prior = PLDAccountant(RELATIONS[neighboring], value_discretization_interval=INTERVAL)
    for segment in spent:
        prior.compose(_event(segment.noise_multiplier, segment.sample_rate, segment.steps))

    def proven(sigma: float) -> bool:
        accountant = copy.deepcopy(prior).compose(_event(sigma, sample_rate, steps))
        return bool(accountant.get_epsilon(target_delta) <= target_epsilon)

    low, high = alone, 2 * alone
    while high <= MOST_NOISE * alone and not proven(high):
        low, high = high, high * 2
    if high > MOST_NOISE * alone:
        raise too_little
    while high - low > TOLERANCE * low:
        middle = (low + high) / 2
        low, high = (low, middle) if proven(middle) else (middle, high)
    return high


def affordable_steps(
    spent: tuple[Segment, ...],
    target_epsilon: float,
    target_delta: float,
    segment: Segment,
    neighboring: str,
    mechanism: str = "gaussian",
) -> int:
    """How many of `segment`'s releases fit within `target_epsilon` after `spent`: the next one would pass it."""

    def fits(steps: int) -> bool:
        more = Segment(segment.noise_multiplier, segment.sample_rate, steps)
        return epsilon_of((*spent, more), target_delta, neighboring, mechanism=mechanism) <= target_epsilon

    low, high = 0, segment.steps
    if fits(high):
        return high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def _event(noise_multiplier: float, sample_rate: float, steps: int) -> SelfComposedDpEvent:
    return SelfComposedDpEvent(PoissonSampledDpEvent(sample_rate, GaussianDpEvent(noise_multiplier)), steps)


def _rdp_noise_multiplier(target_epsilon: float, target_delta: float, sample_rate: float, steps: int) -> float:
    def enough(sigma: float) -> bool:
        accountant = RdpAccountant(_RDP_ORDERS)
        accountant.compose(_event(sigma, sample_rate, steps))
        return bool(accountant.get_epsilon(target_delta) <= target_epsilon)

    sigma = 1.0
    while not enough(sigma) and sigma < 1e6:
        sigma *= 2
    low, high = sigma / 2, sigma
    if sigma == 1.0:
        while low > 1e-2 and enough(low):
            low, high = low / 2, low
    while high / low > 1.02:
        middle = math.sqrt(low * high)
        low, high = (low, middle) if enough(middle) else (middle, high)
    return high
