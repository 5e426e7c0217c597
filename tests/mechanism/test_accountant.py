"""Calibration and the record against dp-accounting alone."""

from __future__ import annotations

import json
import logging
import math

import dp_accounting
import pytest
from dp_accounting.pld import PLDAccountant
from hypothesis import example, given, settings
from hypothesis import strategies as st
from peft_dpzero import DPZeroConfig, DPZeroError, make_plan
from peft_dpzero.mechanism.accountant import Accountant, Segment
from peft_dpzero.release.record import privacy_record

from tiny import explicit

ACCOUNTANT = Accountant("add_or_remove_one", 1e-5, "gaussian")


@pytest.mark.parametrize(
    ("rate", "steps", "target", "smallest"),
    [(1 / 16, 10_000, 2.0, 12.497), (1 / 128, 2_000, 2.0, 0.993), (0.008, 20_000, 2.0, 2.373)],
)
def test_calibration_finds_the_smallest_noise(rate: float, steps: int, target: float, smallest: float) -> None:
    sigma = ACCOUNTANT.noise_multiplier(target, rate, steps)
    assert sigma == pytest.approx(smallest, rel=5e-3)
    assert ACCOUNTANT.epsilon([Segment(sigma, rate, steps)]) <= target


@given(
    st.floats(math.log(1e-3), math.log(100.0)).map(math.exp),
    st.sampled_from([(1 / 100, 50), (1 / 10, 300), (1 / 1000, 1000)]),
    st.sampled_from(["add_or_remove_one", "replace_one"]),
)
@example(0.001, (1 / 10, 300), "add_or_remove_one")
@example(100.0, (1 / 10, 300), "replace_one")
@settings(max_examples=4, deadline=None, derandomize=True)
def test_no_calibrated_run_passes_its_target(target: float, shape: tuple[float, int], neighboring: str) -> None:
    (rate, steps), units = shape, 2000
    config = DPZeroConfig(target_epsilon=target, target_delta=1e-5, neighboring=neighboring)
    plan = make_plan(config, units, round(units * rate), steps)
    segments = [Segment(plan.noise_multiplier, plan.sample_rate, steps)]
    assert 0.9 * target < Accountant(neighboring, 1e-5, "gaussian").epsilon(segments) <= target
    running = [plan.running_epsilon(step) for step in (1, steps // 2, steps)]
    assert running == sorted(running)
    assert running[-1] <= target


def test_a_continued_run_keeps_its_target() -> None:
    spent = (Segment(1.1, 0.02, 100),)
    sigma = ACCOUNTANT.noise_multiplier(3.0, 0.02, 200, spent)
    assert 2.9 < ACCOUNTANT.epsilon((*spent, Segment(sigma, 0.02, 200))) <= 3.0


def test_what_was_released_before_counts_against_the_epsilon_that_stops_a_run() -> None:
    cap = 1.001 * ACCOUNTANT.epsilon([Segment(4.0, 4 / 64, 23)])
    capped = explicit(noise_multiplier=4.0, target_epsilon=cap, target_delta=1e-5)
    plan = make_plan(capped, 64, 4, 25, spent=(Segment(4.0, 4 / 64, 10),))
    assert plan.steps == 23
    assert plan.epsilon() <= cap
    with pytest.raises(DPZeroError, match="Not one more step"):
        make_plan(capped, 64, 4, 25, spent=(Segment(4.0, 4 / 64, 23),))


@pytest.mark.slow
def test_a_slow_calibration_is_announced(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        ACCOUNTANT.noise_multiplier(2.0, 0.05, 20)
        assert not caplog.messages
        ACCOUNTANT.noise_multiplier(40.0, 0.01, 10)
    assert caplog.messages == ["Calibrating the noise for ε = 40, which takes some seconds at so little noise."]


def test_replacing_one_example_has_twice_the_sensitivity() -> None:
    replacing = Accountant("replace_one", 1e-5, "gaussian").epsilon([Segment(2.0, 1.0, 1)])
    assert replacing == pytest.approx(ACCOUNTANT.epsilon([Segment(1.0, 1.0, 1)]), rel=1e-3)


@pytest.mark.parametrize(("neighboring", "mechanism"), [("replace_two", "gaussian"), ("replace_one", "uniform")])
def test_nothing_is_proven_of_what_is_unknown(neighboring: str, mechanism: str) -> None:
    with pytest.raises(ValueError, match="Nothing is proven"):
        Accountant(neighboring, 1e-5, mechanism)


@pytest.mark.parametrize("neighboring", ["add_or_remove_one", "replace_one"])
def test_recorded_epsilon_is_what_another_accountant_computes(neighboring: str) -> None:
    config = explicit(noise_multiplier=1.5, target_delta=1e-5, neighboring=neighboring)
    record = json.loads(json.dumps(privacy_record(make_plan(config, 2000, 50, 300), steps=300)))

    relation = dp_accounting.NeighboringRelation[record["neighboring"].upper()]
    accountant = PLDAccountant(relation)
    release = dp_accounting.GaussianDpEvent(record["noise_multiplier"])
    sampled = dp_accounting.PoissonSampledDpEvent(record["sample_rate"], release)
    accountant.compose(dp_accounting.SelfComposedDpEvent(sampled, record["steps"]))
    assert record["epsilon"] == pytest.approx(accountant.get_epsilon(record["delta"]), abs=1e-3)


def test_records_without_a_guarantee_say_so() -> None:
    for changes in ({"deterministic": True}, {"noise_multiplier": 0}):
        config = explicit(**({"noise_multiplier": 1.0, "target_delta": 1e-5} | changes))
        record = privacy_record(make_plan(config, 2000, 50, 10), steps=10)
        assert record["epsilon"] is None
        assert record["guarantee"].startswith("none")


@pytest.mark.parametrize(
    ("units", "batch", "steps", "words"),
    [(0, 1, 1, "empty"), (10, 11, 1, "larger than the data"), (200_000, 8, 1, "1/N"), (100, 8, 0, "no steps")],
)
def test_impossible_plans_are_refused(units: int, batch: int, steps: int, words: str) -> None:
    with pytest.raises(DPZeroError, match=words):
        make_plan(explicit(noise_multiplier=1.0, target_delta=1e-5), units, batch, steps)


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"target_epsilon": 0.0}, "target_epsilon"),
        ({"target_epsilon": None}, "target_epsilon"),
        ({"target_delta": None}, "target_delta"),
        ({"target_delta": 1.0}, "target_delta"),
        ({"num_directions": 0}, "num_directions"),
        ({"clipping_threshold": -1.0}, "clipping_threshold"),
        ({"clipping_threshold": float("inf")}, "clipping_threshold"),
        ({"smoothing_parameter": float("nan")}, "smoothing_parameter"),
        ({"difference": "backward"}, "difference"),
        ({"neighboring": "remove"}, "neighboring"),
        ({"deterministic": "yes"}, "deterministic"),
        ({"noise_multiplier": -1.0}, "noise_multiplier"),
    ],
)
def test_wrong_values_name_their_field(changes: dict[str, object], field: str) -> None:
    with pytest.raises(ValueError, match=field):
        explicit(**({"target_epsilon": 2.0, "target_delta": 1e-5} | changes))


def test_hardly_any_noise_is_accounted_in_no_time() -> None:
    plan = make_plan(explicit(noise_multiplier=0.01, target_delta=1e-5), 2000, 50, 3)
    assert 5000 < plan.epsilon() < 50_000
