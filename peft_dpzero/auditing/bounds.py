"""Lower bounds on ε from an attacker's right guesses.

The bound is Theorem 5.2 of Steinke, Nasr and Jagielski, "Privacy Auditing with One (1) Training Run" (NeurIPS 2023,
arXiv 2305.08846). Each of m canaries is put into the data by a fair coin; the auditor sees the mechanism's output,
guesses r of the coins and abstains from the rest. Under (ε, δ)-DP for the addition or removal of one canary, the
number W of right guesses satisfies

    P[W ≥ v] ≤ P[X ≥ v] + 2mδ · max_{1 ≤ i ≤ v} P[v − i ≤ X < v] / i,    X ~ Binomial(r, e^ε / (1 + e^ε)).
"""

from __future__ import annotations

import math

import numpy as np

_LARGEST_EPSILON = 100.0
_TOLERANCE = 1e-6


def guessing_p_value(correct: int, guesses: int, epsilon: float, delta: float, canaries: int) -> float:
    """An upper bound on the probability of `correct` or more right guesses if the mechanism is (ε, δ)-DP.

    Args:
        correct: v, right guesses.
        guesses: r, guesses made.
        epsilon, delta: the guarantee that is tested.
        canaries: m, coins tossed, guessed or not.
    """
    log_mass = _log_binomial_pmf(guesses, epsilon)
    tail = math.fsum(np.exp(log_mass[correct:]))
    if delta == 0 or correct == 0:
        return min(1.0, tail)
    below = np.cumsum(np.exp(log_mass[:correct])[::-1])  # entry i − 1 is P[v − i ≤ X < v]
    slope = float(np.max(below / np.arange(1, correct + 1)))
    return min(1.0, tail + 2 * canaries * delta * slope)


def epsilon_lower_bound(
    correct: int, guesses: int, delta: float, confidence: float = 0.95, canaries: int | None = None
) -> float:
    """The largest ε that `correct` right guesses refute: no smaller one is the mechanism's, at this confidence.

    Args:
        correct: v, right guesses.
        guesses: r, guesses made; how many must not have been chosen by looking at the coins.
        delta: δ at which the guarantee is claimed.
        confidence: probability that the bound holds, such as 0.95.
        canaries: m, coins tossed, guessed or not; `guesses` if None.

    Returns: ε ≥ 0; 0 if nothing is refuted.

    Raises:
        ValueError: counts, δ or confidence out of range.
    """
    coins = guesses if canaries is None else canaries
    if not 0 <= correct <= guesses <= coins:
        raise ValueError(f"0 <= correct <= guesses <= canaries must hold, got {correct}, {guesses}, {coins}.")
    if not 0 <= delta <= 1:
        raise ValueError(f"delta must lie in [0, 1], got {delta!r}.")
    if not 0 < confidence < 1:
        raise ValueError(f"confidence must lie strictly between 0 and 1, got {confidence!r}.")

    def refuted(epsilon: float) -> bool:
        return guessing_p_value(correct, guesses, epsilon, delta, coins) < 1 - confidence

    if guesses == 0 or not refuted(0.0):
        return 0.0
    low, high = 0.0, _LARGEST_EPSILON
    while high - low > _TOLERANCE:
        middle = (low + high) / 2
        low, high = (middle, high) if refuted(middle) else (low, middle)
    return low


def _log_binomial_pmf(trials: int, epsilon: float) -> np.ndarray:
    """log P[X = k] for k = 0 … trials, X ~ Binomial(trials, e^ε / (1 + e^ε)): (trials + 1,) float64."""
    log_factorial = np.concatenate([[0.0], np.cumsum(np.log(np.arange(1, trials + 1)))])
    log_choose = log_factorial[-1] - log_factorial - log_factorial[::-1]
    return np.asarray(log_choose - epsilon * np.arange(trials, -1, -1) - trials * math.log1p(math.exp(-epsilon)))
