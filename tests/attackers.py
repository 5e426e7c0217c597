"""Attackers of the mechanism itself: worst-case canaries in many cheap runs, and what their guesses prove."""

from __future__ import annotations

import math

import numpy as np
import torch
from peft_dpzero import DPZeroConfig
from peft_dpzero.estimation.sampling import PoissonSampler, new_secret
from peft_dpzero.mechanism.private_sum import PrivateDifferences, PrivateSum
from scipy import stats

from tiny import explicit

THRESHOLD = 3.0
# Coordinates of one release, each a run of its own.
_LANES = 256


def config(**changes: object) -> DPZeroConfig:
    values: dict[str, object] = {"noise_multiplier": 1.0, "target_delta": 1e-5, "clipping_threshold": THRESHOLD}
    return explicit(**(values | changes))  # type: ignore[arg-type]


def runs(count: int, sample_rate: float, steps: int, sigma: float) -> tuple[np.ndarray, np.ndarray]:
    """What the attacker sees in `count` runs with its canary in the data and in `count` without.

    Canary j's row is so long that clipping makes it C in coordinate j and 0 elsewhere. A coordinate's noise is its
    own, so one release with K coordinates holds K runs of the mechanism with K = 1: those with a canary to their
    name, and those without.

    Returns: two arrays (count, steps) float64, in units of C.
    """
    with_canary, without = [], []
    half = _LANES // 2
    rows = torch.zeros(half, _LANES, dtype=torch.float64)
    rows[torch.arange(half), torch.arange(half)] = 1e9
    for _ in range(math.ceil(count / half)):
        mechanism = PrivateSum(config(noise_multiplier=sigma, num_directions=_LANES), expected_batch_size=1)
        sampler = PoissonSampler(half, sample_rate, new_secret())
        seen = [
            mechanism.release(t, PrivateDifferences(rows[torch.from_numpy(sampler.draw(t))])).coefficients
            for t in range(steps)
        ]
        scaled = np.array(seen).T * _LANES / THRESHOLD
        with_canary.append(scaled[:half])
        without.append(scaled[half:])
    return np.concatenate(with_canary)[:count], np.concatenate(without)[:count]


def log_likelihood_ratio(seen: np.ndarray, sample_rate: float, sigma: float) -> np.ndarray:
    """log P[seen | canary in the data] / P[seen | not], of runs (n, steps): (n,).

    By Neyman and Pearson no test is stronger. A step's value is a mixture: with probability q the canary shifts it by
    C; steps are independent.
    """
    shifted = np.log(sample_rate) + (seen - 0.5) / sigma**2
    stays = math.log1p(-sample_rate) if sample_rate < 1 else -math.inf
    return np.asarray(np.logaddexp(shifted, stays).sum(axis=1))


def epsilon_from_errors(
    with_canary: np.ndarray, without: np.ndarray, threshold: float, delta: float, confidence: float
) -> float:
    """A lower bound on ε from a test's two error rates, each bounded by Clopper and Pearson.

    (ε, δ)-DP demands 1 − FNR ≤ e^ε FPR + δ and 1 − FPR ≤ e^ε FNR + δ.
    """
    alpha = (1 - confidence) / 2
    false_positives = _upper(int((without > threshold).sum()), without.size, alpha)
    false_negatives = _upper(int((with_canary <= threshold).sum()), with_canary.size, alpha)
    ratios = [
        (1 - false_negatives - delta) / false_positives,
        (1 - false_positives - delta) / false_negatives,
    ]
    return math.log(max(1.0, *ratios))


def audited_epsilon(sample_rate: float, steps: int, sigma: float, delta: float, confidence: float, count: int) -> float:
    """Runs the mechanism, picks the likelihood ratio's threshold on a third of the runs, and bounds ε on the rest."""
    ratios = [log_likelihood_ratio(seen, sample_rate, sigma) for seen in runs(count, sample_rate, steps, sigma)]
    pilot = [values[: count // 3] for values in ratios]
    rest = [values[count // 3 :] for values in ratios]
    candidates = np.quantile(np.concatenate(pilot), np.linspace(0.02, 0.98, 49))
    best = max(candidates, key=lambda threshold: epsilon_from_errors(*pilot, threshold, delta, 0.999))
    return epsilon_from_errors(*rest, best, delta, confidence)


def _upper(successes: int, trials: int, alpha: float) -> float:
    return float(stats.beta.ppf(1 - alpha, successes + 1, trials - successes)) if successes < trials else 1.0
