"""Poisson sampling of privacy units: who joins a step's logical batch."""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

SECRET_BYTES = 32


def new_secret() -> bytes:
    """32 bytes from the operating system: the key of one run's sampling. Never saved, never logged."""
    return secrets.token_bytes(SECRET_BYTES)


def seeded_secret(seed: int) -> bytes:
    """A predictable key, for deterministic mode only."""
    return hashlib.sha256(b"peft_dpzero deterministic sampling %d" % seed).digest()


class PoissonSampler:
    """Draws each of `num_units` into a step's batch independently with probability `sample_rate`.

    The bits are SHAKE-256 of a secret key and the step, so that processes that share the key draw the same
    batch without talking, and nobody without it can predict one. A unit joins if its 64-bit word is below
    ⌊q·2⁶⁴⌋: the true rate is at most q, which the accountant assumes.

    Args:
        num_units: N, the number of privacy units.
        sample_rate: q in (0, 1].
        secret: the key, from `new_secret`; of several processes, the first one's is used.
    """

    def __init__(self, num_units: int, sample_rate: float, secret: bytes) -> None:
        self.num_units = num_units
        self.sample_rate = sample_rate
        self._secret = secret

    def draw(self, step: int, rank: int = 0, world_size: int = 1) -> np.ndarray:
        """Indices of the units in this step's batch that are `rank`'s, ascending: (n,) int64, n random, possibly 0.

        Which process takes a unit follows from the unit's own word, and so tells nothing of who else was drawn.
        """
        threshold = int(self.sample_rate * 2.0**64)
        stream = hashlib.shake_256(self._secret + step.to_bytes(8, "little")).digest(8 * self.num_units)
        words = np.frombuffer(stream, dtype="<u8")
        joins = words < np.uint64(threshold) if threshold < 1 << 64 else np.ones(self.num_units, dtype=bool)
        return np.flatnonzero(joins & (words % np.uint64(world_size) == rank))

    def unit_seed(self, step: int, unit: int) -> bytes:
        """Seed of what else is random about a unit in a step, such as masks: 32 bytes, secret as the key."""
        label = b"generators" + step.to_bytes(8, "little") + unit.to_bytes(8, "little")
        return hashlib.shake_256(self._secret + label).digest(SECRET_BYTES)

    def share_key(self, broadcast: Callable[[Tensor], Tensor]) -> None:
        """Takes the first process's key."""
        self._secret = bytes(broadcast(torch.tensor(list(self._secret), dtype=torch.uint8)).tolist())

    def __repr__(self) -> str:
        return f"PoissonSampler(num_units={self.num_units}, sample_rate={self.sample_rate})"
