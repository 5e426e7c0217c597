"""Directions of a step that stand at right angles: a Hadamard matrix's rows, in random order, with random signs.

r of them tell a gradient of r coordinates exactly, where r independent ones are off by as much as it is long; each by
itself is one of independent signs (Choromanski et al. 2018, arXiv 1804.02395). Order and signs come from Philox words.
"""

from __future__ import annotations

import functools

import numpy as np
import numpy.typing as npt
import torch
from scipy.linalg import hadamard
from torch import Tensor

from peft_dpzero.perturbation.philox import philox


def angles(size: int) -> int:
    """How many directions differ by right angles: the power of two that is not below `size`.

    If it is above, their first `size` entries only are used: all of them together still tell a gradient exactly, and
    fewer nearly as well as if they were at right angles.
    """
    return 1 << (size - 1).bit_length()


class OrthogonalCoordinates:
    """The coordinates w_1, w_2, … of every step's directions, entries ±1. Those beyond `angles(size)` start anew.

    Args:
        size: r, the number of coordinates.
        seed: the public direction seed.
    """

    def __init__(self, size: int, seed: int) -> None:
        self.size = size
        self.seed = seed

    def entry(self, step: int, direction: int) -> Tensor:
        """w of one direction: (r,) float64."""
        turn, number = divmod(direction, angles(self.size))
        order, signs = _drawn(self.seed, step, turn, angles(self.size))
        row = _matrix(angles(self.size))[order[number]] * signs
        return torch.from_numpy(row[: self.size].astype(np.float64))


@functools.cache
def _matrix(size: int) -> npt.NDArray[np.int8]:
    return np.asarray(hadamard(size, dtype=np.int8))


@functools.lru_cache(maxsize=8)
def _drawn(seed: int, step: int, turn: int, size: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int8]]:
    words = philox(seed, step, turn, 0).random_raw(2 * size)
    order = np.argsort(words[:size], kind="stable")
    signs = (words[size:] & np.uint64(1)).astype(np.int8) * np.int8(2) - np.int8(1)
    return order, signs
