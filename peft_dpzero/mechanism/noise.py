"""Exact integer noise."""

from __future__ import annotations

from functools import lru_cache
from typing import Any, Protocol

import numpy as np
import opendp.prelude as opendp
import torch
from torch import Tensor


class Noise(Protocol):
    """A source of integer noise."""

    def sample(self, size: int, step: int) -> Tensor:
        """`size` integers for `step`: (size,) int64."""


class ExactNoise:
    """The discrete Gaussian N_ℤ(0, scale²) or discrete Laplace (Canonne, Kamath, Steinke 2020), sampled by OpenDP.

    Its randomness is the operating system's. No seed of Python, NumPy or torch touches it.

    Args:
        mechanism: "gaussian", P(x) ∝ exp(−x² / 2·scale²), or "laplace", P(x) ∝ exp(−|x| / scale).
        scale: in grid units.
    """

    def __init__(self, mechanism: str, scale: float) -> None:
        self.mechanism = mechanism
        self.scale = scale

    def sample(self, size: int, step: int) -> Tensor:
        """See `Noise`; `step` plays no part."""
        return torch.tensor(_measurement(self.mechanism, self.scale)([0] * size), dtype=torch.int64)


class SeededNoise:
    """Rounded Gaussian or Laplace noise that is a function of (seed, step): for deterministic mode, no privacy."""

    def __init__(self, mechanism: str, scale: float, seed: int) -> None:
        self.mechanism = mechanism
        self.scale = scale
        self.seed = seed

    def sample(self, size: int, step: int) -> Tensor:
        """See `Noise`."""
        generator = np.random.default_rng([self.seed, step])
        draw = generator.laplace if self.mechanism == "laplace" else generator.normal
        return torch.from_numpy(np.rint(draw(scale=self.scale, size=size)).astype(np.int64))


class NoNoise:
    """Zeros, for runs with noise_multiplier 0."""

    def sample(self, size: int, step: int) -> Tensor:
        """See `Noise`."""
        return torch.zeros(size, dtype=torch.int64)


@lru_cache(maxsize=8)
def _measurement(mechanism: str, scale: float) -> Any:
    opendp.enable_features("contrib")
    domain = opendp.vector_domain(opendp.atom_domain(T="i64"))
    if mechanism == "laplace":
        return opendp.m.make_laplace(domain, opendp.l1_distance(T="i64"), scale=scale)
    return opendp.m.make_gaussian(domain, opendp.l2_distance(T="f64"), scale=scale)
