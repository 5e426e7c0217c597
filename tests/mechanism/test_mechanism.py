"""Clipping, noise, sampling and their sum, by properties and statistics."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft_dpzero import DPZeroConfig
from peft_dpzero.estimation.sampling import PoissonSampler, new_secret
from peft_dpzero.mechanism.clipping import SENSITIVITY, clip
from peft_dpzero.mechanism.noise import ExactNoise
from peft_dpzero.mechanism.private_sum import OneProcess, PrivateDifferences, PrivateSum
from scipy import stats

from tiny import clip_to_grid, explicit

# False alarms below one in a million.
ALARM = 1e-6


def config(**changes: object) -> DPZeroConfig:
    values: dict[str, object] = {"noise_multiplier": 2.0, "target_delta": 1e-5, "clipping_threshold": 3.0}
    return explicit(**(values | changes))


SPECIAL = [0.0, -0.0, 5e-324, 1e-310, 1e-38, 1e38, -1e38, 1e300, -1e308, math.inf, -math.inf, math.nan, 1.0, 3.0]


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    rows=st.integers(0, 400),
    k=st.sampled_from([1, 2, 3, 16, 64, 512]),
    threshold=st.sampled_from([1e-30, 1e-3, 1.0, 3.0, 1e6]),
)
def test_integer_rows_never_exceed_the_sensitivity(seed: int, rows: int, k: int, threshold: float) -> None:
    generator = np.random.default_rng(seed)
    values = generator.normal(size=(rows, k)) * 10.0 ** generator.integers(-12, 12, size=(rows, 1))
    special = generator.random((rows, k)) < 0.1 * (generator.random((rows, 1)) < 0.5)
    values[special] = generator.choice(SPECIAL, size=int(special.sum()))
    units = clip_to_grid(torch.from_numpy(values), threshold)
    assert units.shape == (rows, k)
    for row, source in zip(units.tolist(), values, strict=True):
        assert sum(int(v) ** 2 for v in row) <= SENSITIVITY**2
        if not np.isfinite(source).all():
            assert not any(row)


def test_clipping_equals_the_formula_and_rounds_toward_zero() -> None:
    rows = torch.randn(200, 7, dtype=torch.float64) * torch.logspace(-3, 3, 200, dtype=torch.float64)[:, None]
    wanted = torch.stack([r * min(1.0, 3.0 / float(r.norm())) for r in rows])
    torch.testing.assert_close(clip(rows, 3.0), wanted, rtol=1e-12, atol=0)
    on_grid = clip_to_grid(rows, 3.0).double() * (3.0 / SENSITIVITY)
    assert bool((on_grid.abs() <= wanted.abs() + 1e-12).all())
    assert float((on_grid - wanted).abs().max()) <= 3.0 / SENSITIVITY * (1 + 1e-9)


def test_discrete_gaussian_has_its_distribution() -> None:
    scale = 2.5
    draws = ExactNoise("gaussian", scale).sample(200_000, 0).numpy()
    support = np.arange(-12, 13)
    weights = np.exp(-(np.arange(-200, 201) ** 2) / (2 * scale**2))
    inside = np.exp(-(support**2) / (2 * scale**2)) / weights.sum()
    expected = np.append(inside, 1 - inside.sum()) * draws.size
    counts = np.array([(draws == v).sum() for v in support] + [(abs(draws) > 12).sum()])
    assert stats.chisquare(counts, expected).pvalue > ALARM


def test_released_noise_has_the_accounted_variance() -> None:
    k = 1000
    mechanism = PrivateSum(config(num_directions=k), expected_batch_size=8)
    differences = PrivateDifferences(torch.ones(5, k, dtype=torch.float64))
    signal = clip_to_grid(torch.ones(5, k, dtype=torch.float64), 3.0).sum(0).numpy()
    noise = np.concatenate([np.array(mechanism.release(t, differences).values) - signal for t in range(500)])
    gamma = 3.0 / SENSITIVITY
    assert noise.size == 500_000
    assert np.var(noise * gamma) == pytest.approx((2.0 * 3.0) ** 2, rel=0.01)
    edges = stats.norm.ppf(np.linspace(0, 1, 51)[1:-1]) * 2.0 * SENSITIVITY
    counts = np.bincount(np.searchsorted(edges, noise), minlength=50)
    assert stats.chisquare(counts).pvalue > ALARM


def test_no_seed_of_the_user_touches_noise_or_sampling() -> None:
    def seeded_noise() -> np.ndarray:
        random.seed(1)
        np.random.seed(1)
        torch.manual_seed(1)
        mechanism = PrivateSum(config(num_directions=500, direction_seed=7), expected_batch_size=8)
        empty = PrivateDifferences(torch.zeros(0, 500, dtype=torch.float64))
        return np.concatenate([mechanism.release(t, empty).values for t in range(40)])

    def seeded_batches() -> np.ndarray:
        random.seed(1)
        np.random.seed(1)
        torch.manual_seed(1)
        sampler = PoissonSampler(2000, 0.5, new_secret())
        member = np.zeros((10, 2000))
        for t in range(10):
            member[t, sampler.draw(t)] = 1
        return member.ravel()

    for draw in (seeded_noise, seeded_batches):
        first, second = draw(), draw()
        assert stats.pearsonr(first, second).pvalue > ALARM
        assert stats.ks_2samp(first, second).pvalue > ALARM


def test_batch_sizes_are_binomial_and_units_independent() -> None:
    n, q, steps = 200, 0.05, 4000
    sampler = PoissonSampler(n, q, new_secret())
    draws = [sampler.draw(t) for t in range(steps)]
    sizes = np.array([d.size for d in draws])
    support = np.arange(3, 18)
    inside = stats.binom.pmf(support, n, q)
    expected = np.concatenate([[stats.binom.cdf(2, n, q)], inside, [stats.binom.sf(17, n, q)]]) * steps
    counts = np.concatenate([[(sizes < 3).sum()], [(sizes == s).sum() for s in support], [(sizes > 17).sum()]])
    assert stats.chisquare(counts, expected).pvalue > ALARM
    per_unit = np.bincount(np.concatenate(draws), minlength=n)
    assert stats.chisquare(per_unit).pvalue > ALARM


def test_sum_is_divided_by_the_expected_batch_size() -> None:
    mechanism = PrivateSum(config(noise_multiplier=0, num_directions=2), expected_batch_size=10)
    rows = torch.tensor([[0.3, 0.0], [0.3, 0.0], [0.3, 0.0]], dtype=torch.float64)
    released = mechanism.release(0, PrivateDifferences(rows))
    assert released.coefficients == pytest.approx((0.9 / (10 * 2), 0.0), rel=1e-5)
    assert all(isinstance(value, int) for value in released.values)


def test_an_empty_batch_is_noise_alone() -> None:
    mechanism = PrivateSum(config(num_directions=3), expected_batch_size=4)
    values = mechanism.release(0, PrivateDifferences(torch.zeros(0, 3, dtype=torch.float64))).values
    assert len(values) == 3
    assert any(values)


def test_private_differences_do_not_show_or_travel() -> None:
    import pickle

    sealed = PrivateDifferences(
        torch.full((1, 1), 42.0, dtype=torch.float64), torch.full((1,), 17.0, dtype=torch.float64)
    )
    assert "42" not in repr(sealed)
    assert "17" not in repr(sealed)
    with pytest.raises(TypeError):
        pickle.dumps(sealed)


def test_several_processes_add_the_noise_once() -> None:
    class Others:
        def __init__(self, main: bool) -> None:
            self.is_main_process = main

        def sum(self, tensor: torch.Tensor) -> torch.Tensor:
            return 2 * tensor

        def broadcast(self, tensor: torch.Tensor) -> torch.Tensor:
            return tensor

    rows = torch.full((1, 1), 1.0, dtype=torch.float64)
    exact = 2 * int(clip_to_grid(rows, 3.0))
    quiet = PrivateSum(config(num_directions=1), 1, Others(main=False)).release(0, PrivateDifferences(rows))
    loud = PrivateSum(config(num_directions=1), 1, Others(main=True)).release(0, PrivateDifferences(rows))
    assert quiet.values == (exact,)
    assert loud.values != (exact,)


class Sending(OneProcess):
    """Notes what goes to other processes."""

    def __init__(self) -> None:
        self.happened: list[tuple[str, list[float]]] = []

    def broadcast(self, tensor: torch.Tensor) -> torch.Tensor:
        self.happened.append(("sent", tensor.tolist()))
        return tensor


def test_a_release_is_on_disk_before_other_processes_have_it() -> None:
    processes = Sending()
    mechanism = PrivateSum(config(num_directions=2), 4, processes)
    differences = PrivateDifferences(torch.ones(1, 2, dtype=torch.float64))
    released = mechanism.release(0, differences, lambda values: processes.happened.append(("disk", list(values))))
    assert processes.happened == [("disk", list(released.values)), ("sent", list(released.values))]


def test_a_release_that_does_not_reach_the_disk_is_not_sent() -> None:
    def full(values: Sequence[float]) -> None:
        raise OSError("no space left")

    processes = Sending()
    mechanism = PrivateSum(config(num_directions=2), 4, processes)
    with pytest.raises(OSError, match="no space left"):
        mechanism.release(0, PrivateDifferences(torch.ones(1, 2, dtype=torch.float64)), full)
    assert not processes.happened
