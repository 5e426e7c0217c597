"""The one-run bound: valid against mechanisms whose ε is known, and near it."""

from __future__ import annotations

import math

import numpy as np
import pytest
from peft_dpzero import epsilon_lower_bound
from peft_dpzero.auditing.bounds import guessing_p_value
from scipy import stats


@pytest.mark.parametrize("canaries", [1, 30, 400])
@pytest.mark.parametrize("epsilon", [0.0, 0.5, 4.0])
def test_without_delta_the_p_value_is_the_binomial_tail(canaries: int, epsilon: float) -> None:
    for correct in range(0, canaries + 1, max(1, canaries // 7)):
        tail = stats.binom.sf(correct - 1, canaries, 1 / (1 + math.exp(-epsilon)))
        assert guessing_p_value(correct, canaries, epsilon, 0.0, canaries) == pytest.approx(tail, rel=1e-9, abs=1e-12)


def test_delta_adds_the_theorems_term() -> None:
    correct, guesses, canaries, epsilon, delta = 70, 90, 200, 0.7, 1e-4
    success = 1 / (1 + math.exp(-epsilon))
    cdf = stats.binom(guesses, success).cdf
    slopes = [(cdf(correct - 1) - cdf(correct - i - 1)) / i for i in range(1, correct + 1)]
    wanted = stats.binom.sf(correct - 1, guesses, success) + 2 * canaries * delta * max(slopes)
    assert guessing_p_value(correct, guesses, epsilon, delta, canaries) == pytest.approx(wanted, rel=1e-9)


@pytest.mark.parametrize(("epsilon", "delta"), [(0.5, 0.0), (2.0, 0.0), (1.0, 1e-4), (3.0, 1e-3)])
def test_the_bound_holds_and_is_near_for_randomised_response(epsilon: float, delta: float) -> None:
    """Each coin is told with probability δ and else answered rightly with odds e^ε: (ε, δ)-DP exactly."""
    trials, canaries, confidence = 2000, 400, 0.95
    generator = np.random.default_rng(7)
    success = delta + (1 - delta) / (1 + math.exp(-epsilon))
    cases, counts = np.unique(generator.binomial(canaries, success, trials), return_counts=True)
    bounds = np.array([epsilon_lower_bound(int(v), canaries, delta, confidence) for v in cases])
    # In expectation at most 5 % exceed ε; 3.7 standard deviations above that for a false alarm.
    assert counts[bounds > epsilon].sum() / trials <= 0.05 + 3.7 * math.sqrt(0.05 * 0.95 / trials)
    assert np.average(bounds, weights=counts) > 0.6 * epsilon


def test_abstaining_costs_nothing_without_delta_and_something_with_it() -> None:
    assert epsilon_lower_bound(50, 50, 0.0, canaries=1000) == epsilon_lower_bound(50, 50, 0.0)
    assert epsilon_lower_bound(50, 50, 1e-4, canaries=1000) < epsilon_lower_bound(50, 50, 1e-4)


def test_all_right_gives_the_exact_bound() -> None:
    # p^m = 5 % where p = e^ε / (1 + e^ε).
    p = 0.05 ** (1 / 200)
    assert epsilon_lower_bound(200, 200, 0.0) == pytest.approx(math.log(p / (1 - p)), abs=1e-5)


def test_the_bound_grows_with_right_guesses_and_shrinks_with_confidence_and_delta() -> None:
    bounds = [epsilon_lower_bound(v, 100, 1e-4) for v in range(101)]
    assert bounds == sorted(bounds)
    assert bounds[50] == 0
    assert epsilon_lower_bound(90, 100, 1e-4, 0.99) < bounds[90] < epsilon_lower_bound(90, 100, 1e-6)
    assert epsilon_lower_bound(100, 100, 1.0) == 0
    assert epsilon_lower_bound(0, 0, 1e-4) == 0


@pytest.mark.parametrize(
    "arguments", [(3, 2, 0.0, 0.95), (-1, 2, 0.0, 0.95), (1, 2, 1.5, 0.95), (1, 2, 0.0, 1.0), (1, 2, 0.0, 0.95, 1)]
)
def test_impossible_numbers_are_refused(arguments: tuple[float, ...]) -> None:
    with pytest.raises(ValueError, match=r"must (hold|lie)"):
        epsilon_lower_bound(*arguments)  # type: ignore[arg-type]
