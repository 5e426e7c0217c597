"""What the releases cost, by dp-accounting's privacy loss distributions (PLD).

A run is T releases, each a Gaussian mechanism with noise multiplier σ on a Poisson sample at rate q. Under
`add_or_remove_one` a unit's sum has sensitivity C; under `replace_one` two units' vectors can point opposite ways,
2C apart, which the accountant's own REPLACE_ONE relation covers. Laws: Koskela et al. 2020, Doroshenko et al. 2022.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from importlib.metadata import version

from dp_accounting import GaussianDpEvent, NeighboringRelation, PoissonSampledDpEvent, SelfComposedDpEvent
from dp_accounting.mechanism_calibration import ExplicitBracketInterval, calibrate_dp_mechanism
from dp_accounting.pld import PLDAccountant
from dp_accounting.rdp import RdpAccountant

from peft_dpzero.config import DPZeroConfig
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


@dataclass(frozen=True)
class PrivacyPlan:
    """What couples sampling, noise and accounting, decided once before the first step.

    Attributes:
        config: with `noise_multiplier` calibrated.
        num_units: N. expected_batch_size: B. sample_rate: q = B / N. steps: T.
        loss_interval: steps between released losses, with train_loss="private".
    """

    config: DPZeroConfig
    num_units: int
    expected_batch_size: int
    steps: int
    loss_interval: int = 0

    @property
    def sample_rate(self) -> float:
        """q = B / N."""
        return self.expected_batch_size / self.num_units

    @property
    def noise_multiplier(self) -> float:
        """σ."""
        assert self.config.noise_multiplier is not None
        return self.config.noise_multiplier

    def epsilon(self, steps: int | None = None, interval: float = INTERVAL) -> float:
        """The ε that `steps` releases (all T by default) cost; inf where nothing is guaranteed."""
        if not self.config.is_private:
            return math.inf
        assert self.config.target_delta is not None
        count = self.steps if steps is None else steps
        if self.config.mechanism == "laplace":
            return laplace_epsilon(self.noise_multiplier, self.sample_rate, count, self.config.neighboring)
        return epsilon(
            self.noise_multiplier,
            self.sample_rate,
            count,
            self.config.target_delta,
            self.config.neighboring,
            interval,
        )


def make_plan(
    config: DPZeroConfig, num_units: int, expected_batch_size: int, steps: int, loss_interval: int = 0
) -> PrivacyPlan:
    """Checks the run's sizes and calibrates σ if an ε is asked for.

    Args:
        config: the user's settings.
        num_units: N, privacy units in the training data.
        expected_batch_size: B, the logical batch, in units.
        steps: T.
        loss_interval: steps between released losses; needed, and used, with train_loss="private" only.

    Raises:
        DPZeroError: an empty data set, a batch larger than the data, δ of 1/N or more, or no steps.
    """
    if num_units < 1:
        raise DPZeroError("train_dataset is empty: there is nothing to train on.")
    if steps < 1:
        raise DPZeroError("The run has no steps: set max_steps or num_train_epochs above 0.")
    if config.train_loss == "private" and loss_interval < 1:
        raise DPZeroError("train_loss='private' needs the steps between two released losses: set logging_steps.")
    noun = "examples" if config.privacy_unit is None else f"different values of {config.privacy_unit!r}"
    if expected_batch_size > num_units:
        raise DPZeroError(
            f"The logical batch ({expected_batch_size} = per_device_train_batch_size × gradient_accumulation_steps × "
            f"processes) is larger than the data ({num_units} {noun}): lower one of them."
        )
    assert config.target_delta is not None
    if config.is_private and config.target_delta >= 1 / num_units:
        raise DPZeroError(
            f"target_delta={config.target_delta:g} is not below 1/N = {1 / num_units:.3g}: such a δ would allow "
            f"publishing somebody's data outright. Use at most {0.1 / num_units:.1g}."
        )
    if config.noise_multiplier is None:
        rate = expected_batch_size / num_units
        config = config.replace(target_epsilon=None, noise_multiplier=_calibrated(config, rate, steps))
    return PrivacyPlan(config, num_units, expected_batch_size, steps, loss_interval)


def _calibrated(config: DPZeroConfig, sample_rate: float, steps: int) -> float:
    assert config.target_epsilon is not None
    assert config.target_delta is not None
    if config.mechanism == "laplace":
        return laplace_noise_multiplier(config.target_epsilon, sample_rate, steps, config.neighboring)
    return calibrate_noise_multiplier(
        config.target_epsilon, config.target_delta, sample_rate, steps, config.neighboring
    )
