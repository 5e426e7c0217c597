"""Exact discrete Gaussian noise."""

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


class DiscreteGaussian:
    """The discrete Gaussian N_ℤ(0, scale²) (Canonne, Kamath, Steinke 2020), sampled exactly by OpenDP.

    Its randomness is the operating system's. No seed of Python, NumPy or torch touches it.

    Args:
        scale: in grid units.
    """

    def __init__(self, scale: float) -> None:
        self.scale = scale

    def sample(self, size: int, step: int) -> Tensor:
        """See `Noise`; `step` plays no part."""
        return torch.tensor(_gaussian(self.scale)([0] * size), dtype=torch.int64)


class SeededGaussian:
    """Rounded Gaussian noise that is a function of (seed, step): for deterministic mode, no privacy."""

    def __init__(self, scale: float, seed: int) -> None:
        self.scale = scale
        self.seed = seed

    def sample(self, size: int, step: int) -> Tensor:
        """See `Noise`."""
        generator = np.random.default_rng([self.seed, step])
        return torch.from_numpy(np.rint(generator.normal(scale=self.scale, size=size)).astype(np.int64))


class NoNoise:
    """Zeros, for runs with noise_multiplier 0."""

    def sample(self, size: int, step: int) -> Tensor:
        """See `Noise`."""
        return torch.zeros(size, dtype=torch.int64)


@lru_cache(maxsize=8)
def _gaussian(scale: float) -> Any:
    opendp.enable_features("contrib")
    space = opendp.vector_domain(opendp.atom_domain(T="i64")), opendp.l2_distance(T="f64")
    return opendp.m.make_gaussian(*space, scale=scale)
