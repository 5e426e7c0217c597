"""What else a step may release: the loss, the count below an adaptive threshold; and other ways to clip."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft_dpzero import DPZeroConfig, DPZeroError, make_plan
from peft_dpzero.mechanism.clipping import SENSITIVITY, clip, normalized
from peft_dpzero.mechanism.contribution import COUNT_SHARE, LOSS_SHARE, Contributions
from peft_dpzero.mechanism.private_sum import PrivateDifferences, PrivateSum

from tiny import explicit


def config(**changes: object) -> DPZeroConfig:
    values: dict[str, object] = {"noise_multiplier": 0, "target_delta": 1e-5, "clipping_threshold": 3.0}
    return explicit(**(values | {"num_directions": 4} | changes))


def differences(count: int, seed: int = 0, scale: float = 2.0) -> PrivateDifferences:
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(count, 4, generator=generator, dtype=torch.float64) * scale
    return PrivateDifferences(rows, torch.rand(count, generator=generator, dtype=torch.float64) * 3)


ODD = [0.0, 5e-324, 1e-310, 1e38, -1e38, 1e300, -1e308, math.inf, -math.inf, math.nan]


@settings(max_examples=200, deadline=None)
@given(
    rows=st.lists(
        st.lists(st.one_of(st.floats(-1e3, 1e3), st.sampled_from(ODD)), min_size=4, max_size=4), min_size=1, max_size=20
    ),
    loss=st.one_of(st.floats(-10, 10), st.sampled_from(ODD)),
    clipping=st.sampled_from(["fixed", "adaptive", "automatic"]),
    train_loss=st.sampled_from(["withheld", "private"]),
)
def test_whatever_is_released_a_units_row_keeps_the_sensitivity(
    rows: list[list[float]], loss: float, clipping: str, train_loss: str
) -> None:
    contributions = Contributions(config(clipping=clipping, train_loss=train_loss), loss_interval=1)
    values = torch.tensor(rows, dtype=torch.float64)
    units = contributions.rows(0, values, torch.full((len(rows),), loss, dtype=torch.float64), 3.0)
    for row, source in zip(units.tolist(), rows, strict=True):
        assert sum(v**2 for v in row) <= SENSITIVITY**2
        if not np.isfinite(source).all() or (train_loss == "private" and not math.isfinite(loss)):
            assert not any(row)


def test_a_released_loss_is_the_mean_of_the_clipped_losses() -> None:
    sealed = differences(40)
    mechanism = PrivateSum(config(train_loss="private"), 50, loss_interval=3)
    losses = [mechanism.release(step, sealed).loss for step in range(6)]
    assert [loss is not None for loss in losses] == [False, False, True, False, False, True]
    assert losses[2] == pytest.approx(float(sealed._losses.clamp(0, 2).sum()) / 50, rel=1e-5)


def test_other_releases_leave_the_estimate_as_it_is() -> None:
    sealed = differences(40)
    plain = PrivateSum(config(), 50).release(0, sealed).coefficients
    with_loss = PrivateSum(config(train_loss="private"), 50, loss_interval=1).release(0, sealed).coefficients
    with_count = PrivateSum(config(clipping="adaptive"), 50).release(0, sealed).coefficients
    assert with_loss == pytest.approx(plain, rel=1e-4)
    assert with_count == pytest.approx(plain, rel=1e-4)


def test_the_loss_is_paid_by_more_noise_on_the_differences() -> None:
    k = 4000
    noisy = config(noise_multiplier=1.0, train_loss="private", num_directions=k)
    mechanism = PrivateSum(noisy, 1, loss_interval=2)
    empty = PrivateDifferences(torch.zeros(0, k, dtype=torch.float64))
    deviation = [np.std(np.multiply(mechanism.release(step, empty).coefficients, k)) for step in (0, 1)]
    assert deviation[0] == pytest.approx(3.0, rel=0.05)
    assert deviation[1] == pytest.approx(3.0 / math.sqrt(1 - LOSS_SHARE), rel=0.05)


@pytest.mark.parametrize("quantile", [0.3, 0.8])
def test_an_adaptive_threshold_finds_the_quantile_of_the_norms(quantile: float) -> None:
    sealed = differences(400, scale=50.0)
    wanted = float(torch.quantile(sealed._rows.norm(dim=1), quantile))
    noisy = config(noise_multiplier=1.0, clipping="adaptive", clipping_quantile=quantile)
    mechanism = PrivateSum(noisy, 400)
    thresholds = [mechanism.release(step, sealed).clipping_threshold for step in range(150)]
    assert thresholds[0] == 3.0
    assert np.mean(thresholds[100:]) == pytest.approx(wanted, rel=0.1)


def test_an_adaptive_threshold_is_a_function_of_the_released_values() -> None:
    sealed = differences(100, scale=9.0)
    noisy = config(noise_multiplier=1.0, clipping="adaptive")
    mechanism = PrivateSum(noisy, 100)
    made = [mechanism.release(step, sealed) for step in range(20)]
    reader = PrivateSum(noisy, 100)
    assert [reader.interpret(r.step, r.values) for r in made] == made
    with pytest.raises(RuntimeError, match="cannot follow"):
        reader.interpret(3, made[3].values)


def test_the_count_has_its_share() -> None:
    below = PrivateDifferences(torch.full((7, 4), 0.1, dtype=torch.float64))
    values = PrivateSum(config(clipping="adaptive"), 7).release(0, below).values
    assert values[-1] == 7 * int(math.sqrt(COUNT_SHARE) * SENSITIVITY)


def test_automatic_clipping_gives_every_unit_nearly_the_same_norm() -> None:
    rows = torch.randn(100, 4, dtype=torch.float64) * torch.logspace(0, 6, 100, dtype=torch.float64)[:, None]
    units = normalized(rows, 3.0)
    norms = units.norm(dim=1)
    assert bool((norms < 1.0).all())
    assert float(norms[50:].min()) > 0.99
    torch.testing.assert_close(units / norms[:, None], clip(rows, 1e-9) / 1e-9, rtol=1e-9, atol=0)
    assert bool((normalized(torch.zeros(1, 4, dtype=torch.float64), 3.0) == 0).all())


def test_a_private_loss_costs_no_more_than_the_plan() -> None:
    plain = make_plan(explicit(target_epsilon=2.0, target_delta=1e-5), 1000, 50, 100)
    private = explicit(target_epsilon=2.0, target_delta=1e-5, train_loss="private")
    plan = make_plan(private, 1000, 50, 100, loss_interval=10)
    assert (plan.noise_multiplier, plan.epsilon()) == (plain.noise_multiplier, plain.epsilon())
    with pytest.raises(DPZeroError, match="logging_steps"):
        make_plan(private, 1000, 50, 100)
