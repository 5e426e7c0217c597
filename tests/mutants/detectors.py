"""Checks of the mechanism, each of which raises AssertionError on a package that breaks what it checks."""

from __future__ import annotations

import math
import random
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft_dpzero import DPZeroTrainer, Estimate
from peft_dpzero.estimation.batching import LogicalBatches
from peft_dpzero.estimation.sampling import PoissonSampler, new_secret
from peft_dpzero.estimation.shapes import Shapes
from peft_dpzero.mechanism.accountant import Accountant, Segment
from peft_dpzero.mechanism.clipping import SENSITIVITY
from peft_dpzero.mechanism.private_sum import PrivateDifferences, PrivateSum
from peft_dpzero.perturbation.perturbation import Perturbation
from peft_dpzero.release.optimizer import DPZeroSGD
from scipy import stats
from torch import nn

from attackers import THRESHOLD, audited_epsilon, config
from tiny import arguments, drawn_values, tiny_dataset, tiny_model

# False alarms of each statistical check below one in a million.
ALARM = 1e-6
DELTA = 0.1
ACCOUNTANT = Accountant("add_or_remove_one", DELTA, "gaussian")


def fix_every_seed() -> None:
    random.seed(1)
    np.random.seed(1)
    torch.manual_seed(1)


def release(rows: Any, step: int = 0, **changes: object) -> Any:
    rows = torch.as_tensor(rows, dtype=torch.float64)
    mechanism = PrivateSum(config(num_directions=rows.shape[1], **changes), expected_batch_size=4)
    return mechanism.release(step, PrivateDifferences(rows))


def audit_of_a_release_stays_below_the_claim() -> None:
    claim = ACCOUNTANT.epsilon([Segment(1.0, 1.0, 1)])
    assert audited_epsilon(1.0, 1, 1.0, DELTA, 1 - ALARM, count=6000) <= claim


def audit_of_a_sampled_run_stays_below_the_claim() -> None:
    claim = ACCOUNTANT.epsilon([Segment(0.8, 0.5, 4)])
    assert audited_epsilon(0.5, 4, 0.8, DELTA, 1 - ALARM, count=8000) <= claim


def noise_is_fresh_whatever_is_known() -> None:
    """Two mechanisms with every public value and every seed alike; also two steps of one."""
    draws = []
    for step in (0, 0, 1):
        fix_every_seed()
        draws.append(np.array(release(torch.zeros(3, 300), step).values))
    for first, second in ((0, 1), (0, 2)):
        assert (draws[first] != draws[second]).any()
        assert stats.pearsonr(draws[first], draws[second]).pvalue > ALARM


def noise_of_each_step_of_a_run_is_its_own() -> None:
    mechanism = PrivateSum(config(num_directions=300), expected_batch_size=4)
    empty = PrivateDifferences(torch.zeros(0, 300, dtype=torch.float64))
    first, second = (np.array(mechanism.release(t, empty).values) for t in range(2))
    assert (first != second).any()
    assert stats.pearsonr(first, second).pvalue > ALARM


def one_unit_moves_the_sum_by_at_most_the_sensitivity() -> None:
    """‖s(D) − s(D ∪ {i})‖² ≤ 2⁴⁰ in integers, for units of every length and 1 to 512 directions."""
    generator = torch.Generator().manual_seed(3)
    for k in (1, 2, 16, 512):
        others = torch.randn(3, k, generator=generator)
        units = torch.randn(20, k, generator=generator) * torch.logspace(-2, 12, 20)[:, None]
        units[0], units[1] = THRESHOLD / math.sqrt(k), 1e6
        before = release(others, noise_multiplier=0).values
        for unit in units:
            after = release(torch.cat([others, unit[None]]), noise_multiplier=0).values
            assert sum((int(a) - int(b)) ** 2 for a, b in zip(after, before, strict=True)) <= SENSITIVITY**2


def one_unit_moves_the_estimate_by_at_most_c_over_bk() -> None:
    """‖ĝ(D) − ĝ(D ∪ {i})‖ ≤ C / (B·K): what the noise on the estimate is sized for."""
    for others in (0, 1, 7):
        rows = torch.full((others, 1), 2 * THRESHOLD)
        for sign in (-1, 1):
            more = torch.cat([rows, torch.full((1, 1), sign * 2 * THRESHOLD)])
            a, b = (release(r, noise_multiplier=0).coefficients[0] for r in (rows, more))
            assert abs(a - b) <= THRESHOLD / 4 * (1 + 1e-9)


def a_row_that_is_not_finite_contributes_nothing() -> None:
    rows = torch.tensor([[1.0, 0.5], [math.nan, 1.0], [math.inf, 1.0], [1.0, -math.inf]])
    try:
        values = release(rows, noise_multiplier=0).values
    except Exception as error:
        raise AssertionError("the private row was reported") from error
    assert values == release(rows[:1], noise_multiplier=0).values


def an_empty_batch_is_released_with_noise() -> None:
    values = np.array(release(torch.zeros(0, 400)).values) / SENSITIVITY
    assert stats.kstest(values, "norm").pvalue > ALARM


def every_unit_joins_every_step_by_its_own_coin() -> None:
    """Batch sizes are binomial, empty ones among them; a unit's next batch does not depend on its last."""
    units, rate, steps = 6, 0.3, 3000
    sampler = PoissonSampler(units, rate, new_secret())
    made = list(range(units)), sampler, lambda rows: {"unit": torch.tensor(rows)}, Shapes(2, 8)
    batches = LogicalBatches(*made)  # type: ignore[arg-type]
    joined = np.zeros((steps, units), dtype=int)
    for t in range(steps):
        joined[t, drawn_values(batches.draw(t), "unit")] = 1
    sizes = np.bincount(joined.sum(axis=1), minlength=units + 1)
    expected = stats.binom.pmf(range(units + 1), units, rate) * steps
    tail = 4
    observed = np.append(sizes[:tail], sizes[tail:].sum())
    assert stats.chisquare(observed, np.append(expected[:tail], expected[tail:].sum())).pvalue > ALARM
    for lag in (1, 2, 3):
        pairs = np.bincount((2 * joined[:-lag] + joined[lag:]).ravel(), minlength=4)
        chances = np.outer([1 - rate, rate], [1 - rate, rate]).ravel()
        assert stats.chisquare(pairs, chances * pairs.sum()).pvalue > ALARM


def a_release_moves_the_parameters_once() -> None:
    """θ' = θ − η Σ_k ĝ_k z_k, and nothing more when the optimizer is asked again."""
    model = nn.Linear(5, 3)
    perturbation = Perturbation(model, seed=5)
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = DPZeroSGD(model.parameters(), lr=0.1)
    released = release(torch.ones(2, 4))
    for estimate in (Estimate(released, perturbation), None):
        try:
            optimizer.step(estimate)
        except RuntimeError:
            break
    for name, parameter in model.named_parameters():
        z = torch.stack([perturbation.directions.entry(0, k, name) for k in range(4)])
        update = torch.tensordot(torch.tensor(released.coefficients, dtype=torch.float32), z, dims=1)
        torch.testing.assert_close(parameter.detach(), start[name] - 0.1 * update)


def runs_with_equal_seeds_sample_differently() -> None:
    """Two real training runs alike in all that a user can set."""
    seen: list[list[list[list[int]]]] = []
    for _ in range(2):
        drawn: list[list[list[int]]] = []

        def collate(rows: list[Any], drawn: list[list[list[int]]] = drawn) -> dict[str, Any]:
            drawn.append([row["input_ids"] for row in rows])
            return {key: torch.tensor([row[key] for row in rows]) for key in ("input_ids", "labels")}

        with tempfile.TemporaryDirectory() as folder:
            DPZeroTrainer(
                tiny_model("classifier"),
                arguments(Path(folder), seed=42, data_seed=42, per_device_train_batch_size=16, max_steps=2),
                train_dataset=tiny_dataset("classifier", 48),
                data_collator=collate,
                dpzero_config=config(num_directions=1),
            ).train()
        seen.append(drawn)
    assert seen[0] != seen[1]
