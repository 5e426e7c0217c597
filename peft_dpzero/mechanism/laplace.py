"""Pure ε of Poisson-sampled Laplace releases, at δ = 0.

The privacy loss of one release is bounded by a largest value that is reached, and T releases reach T times it: for
δ = 0 this sum is what an exact PLD gives, while PLD on a grid returns infinity, since it truncates tails.
"""

from __future__ import annotations

import math

# One release's largest loss, in words that a record can carry.
LARGEST_LOSS = {
    "add_or_remove_one": "log(1 - q + q * exp(1 / noise_multiplier))",
    "replace_one": "log((1 - q + q * exp(1 / noise_multiplier)) / (1 - q + q * exp(-1 / noise_multiplier)))",
}


def laplace_epsilon(noise_multiplier: float, sample_rate: float, steps: int, neighboring: str) -> float:
    """ε of T releases of scale b·C at rate q, b = `noise_multiplier`.

    With x = e^{1/b}, one release costs log(1 − q + q·x) under add_or_remove_one, and under replace_one
    log((1 − q + q·x) / (1 − q + q/x)).

    Three releases of scale C that everybody joins cost 1 each:

    >>> laplace_epsilon(1.0, 1.0, 3, "add_or_remove_one")
    3.0
    """
    q, x = sample_rate, math.exp(1.0 / noise_multiplier)
    ratio = 1.0 - q + q * x
    if neighboring == "replace_one":
        ratio /= 1.0 - q + q / x
    return steps * math.log(ratio)


def laplace_noise_multiplier(target_epsilon: float, sample_rate: float, steps: int, neighboring: str) -> float:
    """The smallest b whose `laplace_epsilon` is the target."""
    q, growth = sample_rate, math.expm1(target_epsilon / steps)
    if neighboring == "replace_one":
        # The positive root of q·x² − (1 − q)·growth·x − q·(1 + growth) = 0.
        half = (1.0 - q) * growth / (2.0 * q)
        excess = half + math.sqrt(half * half + growth + 1.0) - 1.0
    else:
        excess = growth / q
    multiplier = 1.0 / math.log1p(excess)
    while laplace_epsilon(multiplier, sample_rate, steps, neighboring) > target_epsilon:
        multiplier = math.nextafter(multiplier * (1.0 + 1e-12), math.inf)
    return multiplier
