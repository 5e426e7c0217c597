"""Clipping onto the grid, under whatever losses a broken or hostile model makes. A case is one unit's row.

The reference is the formula in extended precision (x87's 64-bit mantissa and 15-bit exponent, or wider), in which none
of these values overflows.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from peft_dpzero.mechanism.clipping import SENSITIVITY
from peft_dpzero.mechanism.private_sum import PrivateDifferences, PrivateSum

from tiny import clip_to_grid, explicit

# float64 rounds a value of 2²⁰ grid units by less than this.
ROUNDING = 1e-6
TINY, HUGE = 5e-324, 1.7976931348623157e308
SPECIAL = [0.0, -0.0, TINY, -TINY, 2.2e-308, 1e-45, -1e-40, 1e-38, 1e38, -1e38, 3.4e38, 1e300, HUGE, -HUGE]
BROKEN = [float("nan"), float("inf"), float("-inf")]
FINITE = st.one_of(st.sampled_from(SPECIAL), st.floats(-10, 10), st.floats(allow_nan=False, allow_infinity=False))
ANY = st.one_of(st.sampled_from(BROKEN), FINITE)
THRESHOLDS = st.one_of(st.sampled_from([1e-30, 1e-3, 1.0, 10.0, 1e30]), st.floats(1e-30, 1e30))

EXAMPLES = 300
ROWS = 40

fuzz = settings(
    max_examples=EXAMPLES,
    deadline=None,
    derandomize=True,
    phases=[Phase.explicit, Phase.generate],
    suppress_health_check=list(HealthCheck),
)


def check_rows(differences: np.ndarray, threshold: float) -> None:
    """Every property of a clipped row, on (n, K) differences."""
    units = clip_to_grid(torch.from_numpy(differences), threshold).numpy()
    assert units.shape == differences.shape
    assert units.dtype == np.int64
    for row in np.unique(units, axis=0).tolist():
        assert sum(value * value for value in row) <= SENSITIVITY**2
    finite = np.isfinite(differences).all(axis=1)
    assert not units[~finite].any()
    exact = reference(differences[finite], threshold)
    assert (np.abs(units[finite] - exact) <= 1 + ROUNDING).all()
    assert (np.abs(units[finite]) <= np.abs(exact) + ROUNDING).all()
    assert (units[finite] * np.sign(exact) >= 0).all()


def reference(differences: np.ndarray, threshold: float) -> np.ndarray:
    """d · min(1, C / ‖d‖) in grid units, not rounded: (n, K) longdouble."""
    rows = differences.astype(np.longdouble)
    norm = np.sqrt((rows * rows).sum(axis=1, keepdims=True))
    units = rows / np.longdouble(threshold) * SENSITIVITY
    clipped = rows / np.where(norm == 0, 1, norm) * SENSITIVITY
    return np.asarray(np.where(norm > threshold, clipped, units))


@pytest.mark.skipif(np.finfo(np.longdouble).maxexp <= 1024, reason="longdouble is float64 here")
def test_twelve_thousand_drawn_rows_keep_every_property() -> None:
    drawn = 0

    @fuzz
    @given(
        data=st.integers(1, 6).flatmap(lambda k: hnp.arrays(np.float64, (ROWS, k), elements=ANY, fill=st.nothing())),
        threshold=THRESHOLDS,
    )
    def every_row(data: np.ndarray, threshold: float) -> None:
        nonlocal drawn
        drawn += len(data)
        check_rows(data, threshold)

    every_row()
    assert drawn >= EXAMPLES * ROWS >= 10_000


@pytest.mark.skipif(np.finfo(np.longdouble).maxexp <= 1024, reason="longdouble is float64 here")
@settings(fuzz, max_examples=60)
@given(
    shape=st.one_of(
        st.tuples(st.integers(0, 20), st.integers(1, 512)),
        st.tuples(st.sampled_from([0, 1, 1000, 4000]), st.integers(1, 16)),
    ),
    data=st.data(),
    threshold=THRESHOLDS,
    scale=st.sampled_from([1e-300, 1e-30, 1e-3, 1.0, 1e3, 1e38, 1e300]),
    seed=st.integers(0, 2**32 - 1),
)
def test_empty_and_huge_batches_and_many_directions_keep_every_property(
    shape: tuple[int, int], data: st.DataObject, threshold: float, scale: float, seed: int
) -> None:
    differences = np.random.default_rng(seed).normal(size=shape) * scale
    if differences.size:
        places = data.draw(st.lists(st.integers(0, differences.size - 1), max_size=20))
        values = data.draw(st.lists(ANY, min_size=len(places), max_size=len(places)))
        differences.flat[places] = values
    check_rows(differences, threshold)


@pytest.mark.parametrize("k", [1, 2, 3, 5, 7, 64, 511, 512])
@pytest.mark.parametrize("threshold", [5e-324, 1e-310, 1e-30, 0.1, 3.0, 1e30])
def test_rows_on_the_very_edge_do_not_pass_it(k: int, threshold: float) -> None:
    generator = np.random.default_rng(k)
    rows = generator.normal(size=(300, k))
    rows[0] = 1.0
    rows = rows / np.linalg.norm(rows, axis=1, keepdims=True) * threshold
    check_rows(np.concatenate([rows, rows * (1 + 2.3e-16), rows * (1 - 1.2e-16)]), threshold)


@settings(fuzz, max_examples=30)
@given(
    rows=hnp.arrays(np.float32, st.tuples(st.integers(0, 30), st.integers(1, 8)), elements=st.floats(width=32)),
    threshold=THRESHOLDS,
)
def test_one_more_unit_moves_the_sum_by_at_most_the_sensitivity(rows: np.ndarray, threshold: float) -> None:
    """Through the one door, without noise: float32 losses, differenced at λ = 1e-3, in and out of the batch."""
    config = explicit(noise_multiplier=0, target_delta=1e-5, clipping_threshold=threshold, num_directions=rows.shape[1])
    mechanism = PrivateSum(config, expected_batch_size=4)
    differences = torch.from_numpy(rows).double() / 2e-3

    def total(among: torch.Tensor) -> list[int]:
        return [int(value) for value in mechanism.release(0, PrivateDifferences(among)).values]

    whole = total(differences)
    for left_out in range(min(3, len(rows))):
        rest = total(torch.cat([differences[:left_out], differences[left_out + 1 :]]))
        assert sum((a - b) ** 2 for a, b in zip(whole, rest, strict=True)) <= SENSITIVITY**2


def test_sums_fit_in_64_bits_up_to_2_to_the_43_units() -> None:
    """No entry exceeds 2²⁰, so a sum of n rows stays below 2⁶³ while n < 2⁴³; the largest entry is that large."""
    units = clip_to_grid(torch.tensor([[HUGE], [-HUGE], [1.0]], dtype=torch.float64), 1.0)
    assert units.flatten().tolist() == [SENSITIVITY, -SENSITIVITY, SENSITIVITY]
    assert (2**43 - 1) * SENSITIVITY < 2**63
