"""Pure ε: discrete Laplace noise and its accounting."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from dp_accounting import LaplaceDpEvent, NeighboringRelation, PoissonSampledDpEvent
from dp_accounting.pld import PLDAccountant
from hypothesis import given, settings
from hypothesis import strategies as st
from peft_dpzero import DPZeroConfig, make_plan
from peft_dpzero.mechanism.clipping import SENSITIVITY
from peft_dpzero.mechanism.laplace import laplace_epsilon, laplace_noise_multiplier
from peft_dpzero.mechanism.noise import ExactNoise
from peft_dpzero.mechanism.private_sum import PrivateDifferences, PrivateSum
from peft_dpzero.release.record import privacy_record
from scipy import stats

from tiny import explicit

RELATIONS = ("add_or_remove_one", "replace_one")


def config(**changes: object) -> DPZeroConfig:
    values: dict[str, object] = {"mechanism": "laplace", "num_directions": 1, "target_delta": 0, "target_epsilon": 4.0}
    return explicit(**(values | changes))


@pytest.mark.parametrize(("rate", "scale"), [(0.1, 2.0), (0.01, 0.5), (1.0, 3.0)])
def test_one_release_costs_what_pld_proves(rate: float, scale: float) -> None:
    accountant = PLDAccountant(NeighboringRelation.ADD_OR_REMOVE_ONE, value_discretization_interval=1e-6)
    accountant.compose(PoissonSampledDpEvent(rate, LaplaceDpEvent(scale)))
    proven = accountant.get_epsilon(1e-12)
    assert laplace_epsilon(scale, rate, 1, "add_or_remove_one") == pytest.approx(proven, abs=1e-5)


@pytest.mark.parametrize("neighboring", RELATIONS)
def test_the_largest_privacy_loss_is_reached_and_not_passed(neighboring: str) -> None:
    q, b, half = 0.3, 2.0, 400
    x = np.arange(-half, half + 1) / 10

    def density(unit: float) -> np.ndarray:
        return (1 - q) * np.exp(-abs(x) / b) + q * np.exp(-abs(x - unit) / b)

    # Units contribute anything in [−1, 1]; without the unit nothing is added.
    pairs = {"add_or_remove_one": [(1.0, 0.0), (-0.5, 0.0)], "replace_one": [(1.0, -1.0), (0.5, -1.0)]}[neighboring]
    ratios = [np.abs(np.log(density(u) / density(v))).max() for u, v in pairs]
    assert max(ratios) == pytest.approx(laplace_epsilon(b, q, 1, neighboring), rel=1e-9)


@settings(max_examples=200, deadline=None)
@given(
    target=st.floats(0.01, 20),
    rate=st.floats(1e-4, 1),
    steps=st.integers(1, 5000),
    neighboring=st.sampled_from(RELATIONS),
)
def test_calibration_inverts_the_accounting(target: float, rate: float, steps: int, neighboring: str) -> None:
    b = laplace_noise_multiplier(target, rate, steps, neighboring)
    assert laplace_epsilon(b, rate, steps, neighboring) <= target
    assert laplace_epsilon(b, rate, steps, neighboring) == pytest.approx(target, rel=1e-6)


def test_discrete_laplace_has_its_distribution() -> None:
    scale = 2.5
    draws = ExactNoise("laplace", scale).sample(200_000, 0).numpy()
    support = np.arange(-15, 16)
    inside = np.exp(-abs(support) / scale) * np.tanh(1 / (2 * scale))
    counts = [(draws == v).sum() for v in support] + [(abs(draws) > 15).sum()]
    expected = np.append(inside, 1 - inside.sum()) * draws.size
    assert stats.chisquare(counts, expected).pvalue > 1e-6


def test_a_step_adds_laplace_noise_of_the_accounted_scale() -> None:
    mechanism = PrivateSum(config(noise_multiplier=2.0, target_epsilon=None), expected_batch_size=4)
    empty = PrivateDifferences(torch.zeros(0, 1, dtype=torch.float64))
    noise = np.array([mechanism.release(t, empty).values[0] for t in range(4000)])
    assert np.abs(noise).mean() == pytest.approx(2.0 * SENSITIVITY, rel=0.1)


def test_the_record_claims_pure_epsilon() -> None:
    plan = make_plan(config(), 1000, 50, 200)
    record = privacy_record(plan, 200)
    assert record["delta"] == 0
    assert record["mechanism"] == "poisson_sampled_discrete_laplace"
    assert record["epsilon"] == pytest.approx(4.0, rel=1e-6)
    assert record["guarantee"].startswith("epsilon-differential privacy")


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"target_delta": 1e-5}, "target_delta"),
        ({"num_directions": 2}, "num_directions"),
        ({"clipping": "adaptive"}, "adaptive"),
        ({"train_loss": "private"}, "train_loss"),
        ({"mechanism": "gaussian"}, "target_delta"),
    ],
)
def test_what_pure_epsilon_cannot_cover_is_refused(changes: dict[str, object], field: str) -> None:
    with pytest.raises(ValueError, match=field):
        config(**changes)
