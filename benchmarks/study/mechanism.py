"""The mechanism of the baselines that have none of their own: Poisson batches, a clipped sum and Gaussian noise.

Their noise is drawn in floating point, as in the code that was published with them; that of `peft_dpzero` is exact.
Sampling and noise are seeded by the operating system, never by a cell's seed.
"""

from __future__ import annotations

import secrets
from dataclasses import dataclass, field
from typing import Any

import torch
from dp_accounting import DpEvent, GaussianDpEvent, NeighboringRelation, PoissonSampledDpEvent, SelfComposedDpEvent
from dp_accounting.pld import PLDAccountant
from opacus.accountants.utils import get_noise_multiplier
from peft_dpzero import DPZeroConfig, make_plan
from torch import Tensor

from .cells import DELTA


def secret_generator() -> torch.Generator:
    """Seeded from the operating system."""
    return torch.Generator().manual_seed(secrets.randbits(63))


def clipped(vectors: Tensor, threshold: float) -> Tensor:
    """Rows (b, k) of norm C at most; one that is not finite becomes 0."""
    norms = vectors.norm(dim=1, keepdim=True)
    kept = torch.where(norms.isfinite(), vectors, 0.0)
    return kept * (threshold / norms.clamp(min=threshold)).nan_to_num(0.0)


@dataclass
class PoissonGaussian:
    """T releases of clipped sums, (ε, δ)-private for adding or removing one row.

    Attributes:
        epsilon: the target, reached after all `steps` releases.
        num_rows: N.
        batch: B, expected.
        steps: T.
        threshold: C.
    """

    epsilon: float
    num_rows: int
    batch: int
    steps: int
    threshold: float
    _generator: torch.Generator = field(default_factory=secret_generator)

    def __post_init__(self) -> None:
        config = DPZeroConfig(
            target_epsilon=self.epsilon, target_delta=DELTA, clipping_threshold=1.0, smoothing_parameter=1e-3
        )
        self.noise_multiplier = make_plan(config, self.num_rows, self.batch, self.steps).noise_multiplier

    def draw(self) -> list[int]:
        """The numbers of the rows that join a step."""
        joined = torch.rand(self.num_rows, generator=self._generator, dtype=torch.float64) < self.batch / self.num_rows
        return joined.nonzero().flatten().tolist()

    def release(self, vectors: Tensor) -> Tensor:
        """The noisy sum of clipped `vectors` (b, k) over B: (k,)."""
        total = clipped(vectors, self.threshold).double().sum(dim=0)
        noise = torch.randn(total.shape, generator=self._generator, dtype=torch.float64)
        return ((total + self.noise_multiplier * self.threshold * noise) / self.batch).float()

    def spent(self, steps: int) -> dict[str, Any]:
        """What `steps` releases cost."""
        event = PoissonSampledDpEvent(self.batch / self.num_rows, GaussianDpEvent(self.noise_multiplier))
        return {
            "epsilon": pld_epsilon(SelfComposedDpEvent(event, steps)) if steps else 0.0,
            "delta": DELTA,
            "noise_multiplier": self.noise_multiplier,
            "statement": "add or remove one row; Poisson batches; PLD of dp-accounting; noise in floating point",
        }


def pld_epsilon(event: DpEvent) -> float:
    """ε at the study's δ for adding or removing one row, by privacy loss distributions."""
    accountant = PLDAccountant(NeighboringRelation.ADD_OR_REMOVE_ONE, value_discretization_interval=1e-3)
    return float(accountant.compose(event).get_epsilon(DELTA))


def published_noise_multiplier(epsilon: float, sample_rate: float, steps: int) -> float:
    """σ as the code published with DPZero finds it: Rényi DP, as if batches were Poisson samples."""
    return get_noise_multiplier(
        target_epsilon=epsilon, target_delta=DELTA, sample_rate=sample_rate, steps=steps, accountant="rdp"
    )
