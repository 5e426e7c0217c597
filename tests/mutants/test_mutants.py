"""Planted bugs, and the check that catches each: every detector passes on the package and fails on its mutants."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import detectors
import numpy as np
import peft_dpzero.mechanism.private_sum as private_sum
import peft_dpzero.training.run as run
import pytest
import torch
from peft_dpzero.estimation.batching import LogicalBatches
from peft_dpzero.estimation.sampling import PoissonSampler, seeded_secret
from peft_dpzero.mechanism.accountant import Accountant, Segment
from peft_dpzero.mechanism.clipping import SENSITIVITY
from peft_dpzero.mechanism.contribution import Contributions
from peft_dpzero.mechanism.noise import ExactNoise, SeededNoise
from peft_dpzero.mechanism.private_sum import PrivateDifferences, PrivateSum
from peft_dpzero.release.optimizer import DPZeroOptimizer, DPZeroSGD
from torch import Tensor

from tiny import clip_to_grid

Patch = pytest.MonkeyPatch
Detector = Callable[[], None]

_release, _sample, _draw = PrivateSum.release, ExactNoise.sample, PoissonSampler.draw
_batches, _update, _clip_to_grid, _epsilon = (
    LogicalBatches.draw,
    DPZeroOptimizer.step,
    clip_to_grid,
    Accountant.epsilon,
)


def _clip_by(patch: Patch, clip: Callable[[Tensor, float], Tensor]) -> None:
    patch.setattr(
        Contributions, "rows", lambda self, step, differences, losses, threshold: clip(differences, threshold)
    )


def _account_for(patch: Patch, other: Callable[[Segment], Segment]) -> None:
    patch.setattr(Accountant, "epsilon", lambda self, segments: _epsilon(self, [other(s) for s in segments]))


def noise_halved(patch: Patch) -> None:
    patch.setattr(ExactNoise, "sample", lambda self, n, t: _sample(ExactNoise(self.mechanism, self.scale / 2), n, t))


def noise_averaged_over_four_draws(patch: Patch) -> None:
    def sample(self: ExactNoise, size: int, step: int) -> Tensor:
        return torch.stack([_sample(self, size, step) for _ in range(4)]).sum(dim=0).div(4).long()

    patch.setattr(ExactNoise, "sample", sample)


def noise_from_the_direction_seed(patch: Patch) -> None:
    patch.setattr(private_sum, "_noise", lambda scale, config: SeededNoise("gaussian", scale, config.direction_seed))


def noise_from_torchs_global_generator(patch: Patch) -> None:
    patch.setattr(ExactNoise, "sample", lambda self, n, t: (torch.randn(n) * self.scale).long())


def noise_drawn_once_and_kept(patch: Patch) -> None:
    kept: dict[int, Tensor] = {}

    def sample(self: ExactNoise, size: int, step: int) -> Tensor:
        return kept.setdefault(size, _sample(self, size, step))

    patch.setattr(ExactNoise, "sample", sample)


def noise_shared_by_all_directions(patch: Patch) -> None:
    patch.setattr(ExactNoise, "sample", lambda self, n, t: _sample(self, 1, t).expand(n).clone())


def clipping_skipped(patch: Patch) -> None:
    _clip_by(patch, lambda d, c: (d / c * SENSITIVITY).trunc().long())


def each_direction_clipped_alone(patch: Patch) -> None:
    _clip_by(patch, lambda d, c: (d.clamp(-c, c) / c * SENSITIVITY).trunc().long())


def the_batchs_sum_clipped(patch: Patch) -> None:
    """The batch's mean is clipped and multiplied by its size, as one does with an averaged loss."""

    def clip_mean(differences: Tensor, threshold: float) -> Tensor:
        if not len(differences):
            return _clip_to_grid(differences, threshold)
        return _clip_to_grid(differences.mean(dim=0, keepdim=True), threshold).expand(len(differences), -1)

    _clip_by(patch, clip_mean)


def rounded_away_from_zero(patch: Patch) -> None:
    def clip(differences: Tensor, threshold: float) -> Tensor:
        norm = differences.norm(dim=1, keepdim=True)
        units = differences * (threshold / norm).clamp(max=1) / threshold * SENSITIVITY
        return (units.sign() * units.abs().ceil()).long()

    _clip_by(patch, clip)


def broken_row_raises(patch: Patch) -> None:
    def clip(differences: Tensor, threshold: float) -> Tensor:
        if not bool(torch.isfinite(differences).all()):
            raise FloatingPointError("a loss is not finite")
        return _clip_to_grid(differences, threshold)

    _clip_by(patch, clip)


def broken_entries_replaced(patch: Patch) -> None:
    _clip_by(patch, lambda d, c: _clip_to_grid(torch.nan_to_num(d), c))


def divided_by_the_actual_batch(patch: Patch) -> None:
    def release(self: PrivateSum, step: int, differences: PrivateDifferences, *more: Any) -> Any:
        self.expected_batch_size = max(1, len(differences._rows))
        return _release(self, step, differences, *more)

    patch.setattr(PrivateSum, "release", release)


def empty_batch_released_without_noise(patch: Patch) -> None:
    def release(self: PrivateSum, step: int, differences: PrivateDifferences, *more: Any) -> Any:
        rows = differences._rows
        return self.interpret(step, [0] * rows.shape[1]) if not len(rows) else _release(self, step, differences, *more)

    patch.setattr(PrivateSum, "release", release)


def empty_batch_skipped(patch: Patch) -> None:
    def draw(self: LogicalBatches, step: int) -> Any:
        while not (batches := _batches(self, step)).num_units:
            step += 1 << 20
        return batches

    patch.setattr(LogicalBatches, "draw", draw)


def shuffled_instead_of_poisson(patch: Patch) -> None:
    def draw(self: PoissonSampler, step: int, *shard: int) -> np.ndarray:
        size = max(1, round(self.sample_rate * self.num_units))
        epoch, part = divmod(step, max(1, self.num_units // size))
        seed = list(self._secret + epoch.to_bytes(8, "little"))
        order = np.random.default_rng(seed).permutation(self.num_units)
        return np.sort(order[part * size : (part + 1) * size])

    patch.setattr(PoissonSampler, "draw", draw)


def fixed_size_instead_of_poisson(patch: Patch) -> None:
    def draw(self: PoissonSampler, step: int, *shard: int) -> np.ndarray:
        generator = np.random.default_rng(list(self._secret + step.to_bytes(8, "little")))
        size = round(self.sample_rate * self.num_units)
        return np.sort(generator.choice(self.num_units, size, replace=False))

    patch.setattr(PoissonSampler, "draw", draw)


def same_batch_at_every_step(patch: Patch) -> None:
    patch.setattr(PoissonSampler, "draw", lambda self, step, *shard: _draw(self, 0, *shard))


def sampled_at_twice_the_rate(patch: Patch) -> None:
    def draw(self: PoissonSampler, step: int, *shard: int) -> np.ndarray:
        return _draw(PoissonSampler(self.num_units, min(1.0, 2 * self.sample_rate), self._secret), step, *shard)

    patch.setattr(PoissonSampler, "draw", draw)


def sampled_by_args_seed(patch: Patch) -> None:
    patch.setattr(run, "new_secret", lambda: seeded_secret(42))


def release_applied_twice(patch: Patch) -> None:
    def step(self: DPZeroOptimizer, estimate: Any = None) -> None:
        _update(self, estimate)
        _update(self, estimate)

    patch.setattr(DPZeroSGD, "step", step)


def release_kept_for_the_next_step(patch: Patch) -> None:
    kept: list[Any] = []

    def step(self: DPZeroOptimizer, estimate: Any = None) -> None:
        kept.extend([estimate] if estimate else [])
        _update(self, kept[-1])

    patch.setattr(DPZeroSGD, "step", step)


def composition_not_accounted(patch: Patch) -> None:
    _account_for(patch, lambda segment: Segment(segment.noise_multiplier, segment.sample_rate, 1))


def rate_understated_to_the_accountant(patch: Patch) -> None:
    _account_for(patch, lambda segment: Segment(segment.noise_multiplier, segment.sample_rate / 2, segment.steps))


@dataclass(frozen=True)
class Mutant:
    """A planted bug and what must catch it."""

    plant: Callable[[Patch], None]
    caught_by: Detector


MUTANTS = [
    Mutant(noise_halved, detectors.audit_of_a_release_stays_below_the_claim),
    Mutant(noise_averaged_over_four_draws, detectors.audit_of_a_release_stays_below_the_claim),
    Mutant(noise_from_the_direction_seed, detectors.noise_is_fresh_whatever_is_known),
    Mutant(noise_from_torchs_global_generator, detectors.noise_is_fresh_whatever_is_known),
    Mutant(noise_drawn_once_and_kept, detectors.noise_of_each_step_of_a_run_is_its_own),
    Mutant(noise_shared_by_all_directions, detectors.an_empty_batch_is_released_with_noise),
    Mutant(clipping_skipped, detectors.one_unit_moves_the_sum_by_at_most_the_sensitivity),
    Mutant(clipping_skipped, detectors.audit_of_a_release_stays_below_the_claim),
    Mutant(each_direction_clipped_alone, detectors.one_unit_moves_the_sum_by_at_most_the_sensitivity),
    Mutant(the_batchs_sum_clipped, detectors.one_unit_moves_the_sum_by_at_most_the_sensitivity),
    Mutant(rounded_away_from_zero, detectors.one_unit_moves_the_sum_by_at_most_the_sensitivity),
    Mutant(broken_row_raises, detectors.a_row_that_is_not_finite_contributes_nothing),
    Mutant(broken_entries_replaced, detectors.a_row_that_is_not_finite_contributes_nothing),
    Mutant(divided_by_the_actual_batch, detectors.one_unit_moves_the_estimate_by_at_most_c_over_bk),
    Mutant(empty_batch_released_without_noise, detectors.an_empty_batch_is_released_with_noise),
    Mutant(empty_batch_skipped, detectors.every_unit_joins_every_step_by_its_own_coin),
    Mutant(shuffled_instead_of_poisson, detectors.every_unit_joins_every_step_by_its_own_coin),
    Mutant(fixed_size_instead_of_poisson, detectors.every_unit_joins_every_step_by_its_own_coin),
    Mutant(same_batch_at_every_step, detectors.every_unit_joins_every_step_by_its_own_coin),
    Mutant(sampled_at_twice_the_rate, detectors.audit_of_a_sampled_run_stays_below_the_claim),
    Mutant(sampled_by_args_seed, detectors.runs_with_equal_seeds_sample_differently),
    Mutant(release_applied_twice, detectors.a_release_moves_the_parameters_once),
    Mutant(release_kept_for_the_next_step, detectors.a_release_moves_the_parameters_once),
    Mutant(composition_not_accounted, detectors.audit_of_a_sampled_run_stays_below_the_claim),
    Mutant(rate_understated_to_the_accountant, detectors.audit_of_a_sampled_run_stays_below_the_claim),
]


@pytest.mark.parametrize("detector", dict.fromkeys(mutant.caught_by for mutant in MUTANTS), ids=lambda d: d.__name__)
def test_the_package_passes(detector: Detector) -> None:
    detector()


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda m: f"{m.plant.__name__} -> {m.caught_by.__name__}")
def test_the_mutant_is_caught(mutant: Mutant, monkeypatch: Patch) -> None:
    mutant.plant(monkeypatch)
    with pytest.raises(AssertionError):
        mutant.caught_by()
