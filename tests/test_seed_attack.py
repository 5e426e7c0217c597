"""The attack on noise that comes from the direction's seed.

Public DPZero code draws a 30-bit seed from NumPy's global generator, seeds torch with it to draw z, seeds torch with it
again for each perturbation, and then takes the noise from the same generator: its next draw. Whoever sees one update
sees z up to a factor, finds the seed by search, and subtracts the noise. The miniature here keeps all of that but
searches 2¹² seeds.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from peft_dpzero import DPZeroTrainer
from peft_dpzero.mechanism.clipping import SENSITIVITY
from peft_dpzero.mechanism.private_sum import PrivateDifferences, PrivateSum
from peft_dpzero.perturbation.directions import Directions
from peft_dpzero.release.journal import JOURNAL_NAME
from torch import Tensor

from tiny import arguments, clip_to_grid, explicit, tiny_dataset, tiny_model

SEEDS = 1 << 12
ARGS_SEED = 42
SIZE = 40
CLIP, RATE, SMOOTHING = 1.0, 0.1, 1e-3


class Miniature:
    """One step of the public scheme on per-example quadratic losses ℓ_i(θ) = ‖θ − x_i‖² / 2."""

    def __init__(self, examples: Tensor, noise_multiplier: float) -> None:
        self.examples = examples
        self.noise_std = 2 * noise_multiplier * CLIP / len(examples)
        self.weights = torch.zeros(SIZE)

    def step(self) -> float:
        """Updates the weights and returns what ought to stay secret: the clipped mean without noise."""
        seed = int(np.random.randint(SEEDS))
        self._perturb(seed, 1)
        plus = self._losses()
        self._perturb(seed, -2)
        minus = self._losses()
        clipped = ((plus - minus) / (2 * SMOOTHING)).clamp(-CLIP, CLIP).mean()
        estimate = clipped + torch.randn(1).item() * self.noise_std
        self._perturb(seed, 1)
        torch.manual_seed(seed)
        self.weights = self.weights - RATE * estimate * torch.normal(0.0, 1.0, (SIZE,))
        return float(clipped)

    def _perturb(self, seed: int, factor: float) -> None:
        torch.manual_seed(seed)
        self.weights = self.weights + factor * SMOOTHING * torch.normal(0.0, 1.0, (SIZE,))

    def _losses(self) -> Tensor:
        return (self.weights - self.examples).square().sum(dim=1) / 2


def recovered_mean(update: Tensor, noise_std: float) -> float | None:
    """The clipped mean behind −η·ĝ·z, if some seed's z is parallel to the update."""
    generator = torch.Generator()
    for seed in range(SEEDS):
        generator.manual_seed(seed)
        z = torch.normal(0.0, 1.0, (SIZE,), generator=generator)
        if abs(torch.cosine_similarity(update, z, dim=0)) > 0.99:
            estimate = -float(update @ z) / (RATE * float(z @ z))
            return estimate - float(torch.randn(1, generator=generator)) * noise_std
    return None


@pytest.mark.parametrize("repetition", range(3))
def test_the_attack_undoes_the_noise_of_the_public_scheme(repetition: int) -> None:
    np.random.seed(repetition)
    generator = torch.Generator().manual_seed(repetition)
    victim = Miniature(torch.randn(8, SIZE, generator=generator), noise_multiplier=10.0)
    before = victim.weights.clone()
    secret = victim.step()
    # What is left of noise of standard deviation `noise_std` is float32 rounding.
    assert recovered_mean(victim.weights - before, victim.noise_std) == pytest.approx(
        secret, abs=1e-4 * victim.noise_std
    )


# ---- The same attack on ours ----

DIRECTIONS = 4
DIRECTION_SEED = 1234
STEP = 2


def seeds() -> Iterator[int]:
    yield from {*range(SEEDS), DIRECTION_SEED, ARGS_SEED, DIRECTION_SEED + STEP, ARGS_SEED + STEP}


def guesses(scale: float) -> Iterator[Tensor]:
    """The noise vectors that public values could have made: from every seed, in each way a generator is used."""
    directions = Directions([("weights", torch.nn.Parameter(torch.zeros(SIZE)))], DIRECTION_SEED, "gaussian")
    z = torch.cat([directions.entry(STEP, k, "weights") for k in range(DIRECTIONS)])
    yield from (scale * z.double()[i : i + DIRECTIONS] for i in range(z.numel() - DIRECTIONS + 1))
    generator = torch.Generator()
    for seed in seeds():
        generator.manual_seed(seed)
        yield scale * torch.randn(DIRECTIONS, generator=generator).double()
        generator.manual_seed(seed)
        torch.normal(0.0, 1.0, (SIZE,), generator=generator)
        yield scale * torch.randn(DIRECTIONS, generator=generator).double()
        for key in (seed, [seed, STEP]):
            yield torch.from_numpy(np.random.default_rng(key).normal(scale=scale, size=DIRECTIONS))


def undoes_the_noise(values: list[float], secret: Tensor, scale: float) -> bool:
    """Whether one of the guesses, taken off the released values, leaves the un-noised integer sums."""
    noise = torch.tensor(values, dtype=torch.float64) - secret
    return bool(((torch.stack(list(guesses(scale))) - noise).abs() <= 2).all(dim=1).any())


def released(deterministic: bool) -> tuple[list[float], Tensor, float]:
    config = explicit(
        noise_multiplier=1.0,
        target_delta=1e-5,
        num_directions=DIRECTIONS,
        direction_seed=DIRECTION_SEED,
        deterministic=deterministic,
    )
    torch.manual_seed(ARGS_SEED)
    np.random.seed(ARGS_SEED)
    rows = torch.linspace(-2, 2, 5 * DIRECTIONS, dtype=torch.float64).view(5, DIRECTIONS)
    values = PrivateSum(config, expected_batch_size=5).release(STEP, PrivateDifferences(rows)).values
    secret = clip_to_grid(rows, config.clipping_threshold).sum(dim=0)
    return list(values), secret.double(), float(SENSITIVITY)


def test_the_attack_fails_on_our_noise() -> None:
    assert not undoes_the_noise(*released(deterministic=False))


def test_the_attack_would_work_if_our_noise_had_a_seed() -> None:
    assert undoes_the_noise(*released(deterministic=True))


def test_two_training_runs_with_every_seed_fixed_share_no_noise(tmp_path: Path) -> None:
    """Every example is in each batch and the first step starts from the same weights: only the noise can differ."""
    seen: list[tuple[float, ...]] = []
    for name in ("first", "second"):
        folder = tmp_path / name
        DPZeroTrainer(
            tiny_model("classifier"),
            arguments(folder, seed=ARGS_SEED, data_seed=ARGS_SEED, per_device_train_batch_size=8),
            train_dataset=tiny_dataset("classifier", 8),
            dpzero_config=explicit(
                noise_multiplier=1.0, target_delta=1e-5, num_directions=DIRECTIONS, direction_seed=DIRECTION_SEED
            ),
        ).train()
        first_release = (folder / JOURNAL_NAME).read_text(encoding="utf-8").splitlines()[1]
        seen.append(tuple(json.loads(first_release)["values"]))
    # A difference of 2 grid units or less has probability 1e-6 a coordinate.
    assert min(abs(a - b) for a, b in zip(*seen, strict=True)) > 2
