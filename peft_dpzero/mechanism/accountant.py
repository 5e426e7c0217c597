"""What the releases cost, by dp-accounting's privacy loss distributions (PLD).

A run is T releases, each a Gaussian mechanism with noise multiplier σ on a Poisson sample at rate q. Under
`add_or_remove_one` a unit's sum has sensitivity C; under `replace_one` two units' vectors can point opposite ways,
2C apart, which the accountant's own REPLACE_ONE relation covers. Laws: Koskela et al. 2020, Doroshenko et al. 2022.
"""

from __future__ import annotations

import copy
import logging
import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import lru_cache
from importlib.metadata import version
from typing import Any

from dp_accounting import (
    DpEvent,
    GaussianDpEvent,
    LaplaceDpEvent,
    NeighboringRelation,
    PoissonSampledDpEvent,
    SelfComposedDpEvent,
)
from dp_accounting.mechanism_calibration import ExplicitBracketInterval, calibrate_dp_mechanism
from dp_accounting.pld import PLDAccountant
from dp_accounting.rdp import RdpAccountant

from peft_dpzero.config import MECHANISMS, DPZeroConfig
from peft_dpzero.errors import DPZeroError
from peft_dpzero.mechanism.laplace import LARGEST_LOSS, laplace_epsilon, laplace_noise_multiplier

# The accountant's grid on the privacy loss. Its rounding is pessimistic, so a coarse grid overstates ε.
INTERVAL = 1e-4
COARSE_INTERVAL = 1e-3
RELATIONS = {
    "add_or_remove_one": NeighboringRelation.ADD_OR_REMOVE_ONE,
    "replace_one": NeighboringRelation.REPLACE_ONE,
}
# σ is calibrated to this relative tolerance, on a grid of this share of ε, and proven on the accountant's own.
TOLERANCE, _SEARCH_SHARE = 1e-3, 3e-4
# Grids for what is shown of a run that goes on.
_QUICK_SHARE, _COARSEST = 1e-3, 1e-2
# And for a σ that is only compared with others.
_ROUGH_SHARE = 3e-3
# Below this σ one proof takes seconds.
_SLOW = 0.25
# A run that has spent this share of its ε, or would need this many times a fresh one's noise, cannot be continued.
SPENT, MOST_NOISE = 0.995, 100.0
# Integer Rényi orders: their closed form always converges, and they only bracket PLD's answer.
_RDP_ORDERS = [*range(2, 64), 96, 128, 256, 512, 1024]
_EVENT_NAME = "poisson_sampled_discrete_"
_LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class Segment:
    """Releases that share σ and q. A run that was continued has several, one after another."""

    noise_multiplier: float
    sample_rate: float
    steps: int


def first_releases(segments: Iterable[Segment], steps: int) -> tuple[Segment, ...]:
    """What the first `steps` of all releases in `segments` are made of."""
    made = []
    for segment in segments:
        made.append(replace(segment, steps=min(steps, segment.steps)))
        steps -= made[-1].steps
    return tuple(segment for segment in made if segment.steps)


@dataclass(frozen=True)
class Accountant:
    """Proves what releases cost. Two of its answers can be compared, since they are about the same guarantee.

    Attributes:
        neighboring: which data sets are neighbors.
        delta: δ; 0 with Laplace noise.
        mechanism: "gaussian" or "laplace".
        interval: the grid on the privacy loss.
    """

    neighboring: str
    delta: float
    mechanism: str
    interval: float = INTERVAL

    def __post_init__(self) -> None:
        if self.neighboring not in RELATIONS or self.mechanism not in MECHANISMS:
            raise ValueError(f"Nothing is proven for {self.mechanism!r} noise under {self.neighboring!r}.")

    @classmethod
    def of(cls, config: DPZeroConfig, interval: float = INTERVAL) -> Accountant:
        """The accountant of the guarantee that `config` asks for."""
        assert config.target_delta is not None
        return cls(config.neighboring, config.target_delta, config.mechanism, interval)

    @property
    def event_name(self) -> str:
        """What one release is, in the record's words."""
        return _EVENT_NAME + self.mechanism

    def describe(self, segments: Iterable[Segment]) -> dict[str, Any]:
        """How `epsilon` treats `segments`, JSON-ready."""
        if self.mechanism == "laplace":
            return {"name": "sum of the releases' largest privacy losses", "per_step": LARGEST_LOSS[self.neighboring]}
        return {
            "name": "dp_accounting.pld.PLDAccountant",
            "version": version("dp-accounting"),
            "value_discretization_interval": self._grid(segment.noise_multiplier for segment in segments),
        }

    def epsilon(self, segments: Iterable[Segment]) -> float:
        """The ε that all `segments` together cost, an upper bound; inf if one has no noise.

        Proven by PLD for Gaussian noise; for Laplace noise, at δ = 0, the sum of the largest losses (`laplace.py`).

        One release of noise C that everybody joins has δ = Φ(½ − ε) − e^ε Φ(−½ − ε); at ε = 1 that is 0.1269:

        >>> round(Accountant("add_or_remove_one", 0.1269, "gaussian").epsilon([Segment(1.0, 1.0, 1)]), 3)
        1.0
        """
        segments = tuple(segment for segment in segments if segment.steps)
        if any(segment.noise_multiplier == 0 for segment in segments):
            return math.inf
        if self.mechanism == "laplace":
            return sum(laplace_epsilon(s.noise_multiplier, s.sample_rate, s.steps, self.neighboring) for s in segments)
        return _pld_epsilon(self, segments) if segments else 0.0

    def quick_epsilon(self, segments: Iterable[Segment], about: float) -> float:
        """As `epsilon`, on a grid that suits an ε of `about` that size: within a percent, in a fraction of a second."""
        return self._for_about(about, _QUICK_SHARE).epsilon(segments)

    def rdp_epsilon(self, segments: Iterable[Segment]) -> float:
        """A second, looser bound on the same ε, by Rényi DP.

        Raises:
            dp_accounting.UnsupportedEventError: RDP does not cover these events.
        """
        accountant = RdpAccountant(_RDP_ORDERS, RELATIONS[self.neighboring])
        for segment in segments:
            accountant.compose(self._event(segment))
        return float(accountant.get_epsilon(self.delta))

    def noise_multiplier(
        self, target_epsilon: float, sample_rate: float, steps: int, spent: tuple[Segment, ...] = ()
    ) -> float:
        """The smallest σ, to 0.1 %, with which `steps` more releases after `spent` stay within `target_epsilon`.

        Raises:
            DPZeroError: `spent` leaves next to nothing, or no σ below 10⁶ gives the target.
        """
        before = self.epsilon(spent)
        too_little = DPZeroError(
            f"The releases made so far cost ε={before:.4g} of target_epsilon={target_epsilon:g}, which leaves too "
            f"little for {steps} more: raise target_epsilon."
        )
        if before >= SPENT * target_epsilon:
            raise too_little
        if self.mechanism == "laplace":
            return laplace_noise_multiplier(target_epsilon - before, sample_rate, steps, self.neighboring)
        search = self._for_about(target_epsilon, _SEARCH_SHARE)
        # Alone they would need at least this much.
        alone = _pld_noise_multiplier(search, target_epsilon, sample_rate, steps)
        if alone < _SLOW:
            _LOG.warning(
                "Calibrating the noise for ε = %g, which takes some seconds at so little noise.", target_epsilon
            )
        sigma = search._after(spent, alone, target_epsilon, sample_rate, steps) if spent else alone
        if sigma is None:
            raise too_little
        while self.epsilon((*spent, Segment(sigma, sample_rate, steps))) > target_epsilon:
            sigma *= 1 + TOLERANCE / 10
        return sigma

    def quick_noise_multiplier(self, target_epsilon: float, sample_rate: float, steps: int) -> float:
        """As `noise_multiplier`, within a percent, in half a second."""
        if self.mechanism == "laplace":
            return laplace_noise_multiplier(target_epsilon, sample_rate, steps, self.neighboring)
        return _pld_noise_multiplier(self._for_about(target_epsilon, _ROUGH_SHARE), target_epsilon, sample_rate, steps)

    def _after(
        self, spent: tuple[Segment, ...], alone: float, target_epsilon: float, sample_rate: float, steps: int
    ) -> float | None:
        """σ of `steps` releases after `spent`, from `alone` upwards; None if it would be many times that."""
        prior = self._composed(spent, alone)

        def proven(sigma: float) -> bool:
            accountant = copy.deepcopy(prior).compose(self._event(Segment(sigma, sample_rate, steps)))
            return bool(accountant.get_epsilon(self.delta) <= target_epsilon)

        low, high = alone, 2 * alone
        while high <= MOST_NOISE * alone and not proven(high):
            low, high = high, high * 2
        if high > MOST_NOISE * alone:
            return None
        while high - low > TOLERANCE * low:
            middle = (low + high) / 2
            low, high = (low, middle) if proven(middle) else (middle, high)
        return high

    def affordable_steps(self, target_epsilon: float, segment: Segment, spent: tuple[Segment, ...] = ()) -> int:
        """How many of `segment`'s releases fit within `target_epsilon` after `spent`: the next one would pass it."""

        def fits(steps: int) -> bool:
            more = Segment(segment.noise_multiplier, segment.sample_rate, steps)
            return self.epsilon((*spent, more)) <= target_epsilon

        low, high = 0, segment.steps
        if fits(high):
            return high
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if fits(middle) else (low, middle)
        return low

    def _for_about(self, epsilon: float, share: float) -> Accountant:
        return replace(self, interval=max(self.interval, min(share * epsilon, _COARSEST)))

    def _grid(self, noise_multipliers: Iterable[float]) -> float:
        """Coarser below σ = 0.1, where ε is huge and the fine grid has millions of points."""
        return max((self.interval, *(1e-6 / sigma**2 for sigma in noise_multipliers if sigma)))

    def _composed(self, segments: Iterable[Segment], *later: float) -> PLDAccountant:
        """PLD's account of `segments`, on a grid that also suits the noise multipliers that come `later`."""
        segments = tuple(segments)
        grid = self._grid((*(segment.noise_multiplier for segment in segments), *later))
        accountant = PLDAccountant(RELATIONS[self.neighboring], value_discretization_interval=grid)
        for segment in segments:
            accountant.compose(self._event(segment))
        return accountant

    def _event(self, segment: Segment) -> DpEvent:
        release = LaplaceDpEvent if self.mechanism == "laplace" else GaussianDpEvent
        sampled = PoissonSampledDpEvent(segment.sample_rate, release(segment.noise_multiplier))
        return SelfComposedDpEvent(sampled, segment.steps)


@lru_cache(maxsize=1024)
def _pld_epsilon(accountant: Accountant, segments: tuple[Segment, ...]) -> float:
    return float(accountant._composed(segments).get_epsilon(accountant.delta))


@lru_cache(maxsize=64)
def _pld_noise_multiplier(accountant: Accountant, target_epsilon: float, sample_rate: float, steps: int) -> float:
    """The smallest σ, to 0.1 %, for which PLD proves `target_epsilon`.

    RDP brackets the answer from above in milliseconds; PLD then searches inside the bracket only, since its cost
    explodes as σ shrinks.
    """

    def proven(sigma: float) -> float:
        return accountant.epsilon((Segment(sigma, sample_rate, steps),))

    high = _rdp_noise_multiplier(accountant, target_epsilon, sample_rate, steps)
    low = high
    while proven(low) <= target_epsilon:
        high, low = low, low * 0.85
        if low < 1e-3:
            return high
    while proven(high) > target_epsilon:
        low, high = high, high * 1.3
        if high > 1e6:
            raise DPZeroError(
                f"No noise gives ε={target_epsilon:g} at δ={accountant.delta:g} over {steps} steps: raise "
                "target_epsilon or target_delta, or take fewer steps."
            )
    return float(
        calibrate_dp_mechanism(
            lambda: accountant._composed((), low),
            lambda sigma: accountant._event(Segment(sigma, sample_rate, steps)),
            target_epsilon,
            accountant.delta,
            bracket_interval=ExplicitBracketInterval(low, high),
            tol=TOLERANCE * low,
        )
    )


def _rdp_noise_multiplier(accountant: Accountant, target_epsilon: float, sample_rate: float, steps: int) -> float:
    """About the smallest σ for which RDP proves `target_epsilon`; under `replace_one`, twice add-or-remove's."""
    adding = Accountant("add_or_remove_one", accountant.delta, accountant.mechanism)

    def enough(sigma: float) -> bool:
        return adding.rdp_epsilon((Segment(sigma, sample_rate, steps),)) <= target_epsilon

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
    return high * (2 if accountant.neighboring == "replace_one" else 1)
