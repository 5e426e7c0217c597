"""Public random directions, a pure function of (seed, step, k, parameter, position).

The words come from Philox4x64-10 (Salmon et al., SC 2011), in NumPy's implementation, whose raw stream is
fixed by the Random123 test vectors. Two 32-bit halves of a word make two Gaussians by Box-Muller in float64,
rounded to float32, so that another machine's `log` and `cos` hardly ever change an entry.

Layout: the parameters lie one after another in one long vector, each starting at a fresh Philox block. A block
is 4 words of 64 bits, that is 8 entries.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator

import numpy as np
import torch
from torch import Tensor, nn

ENTRIES_PER_BLOCK = 8
_CHUNK_BLOCKS = 1 << 15


def philox_words(seed: int, step: int, direction: int, first_block: int, num_blocks: int) -> np.ndarray:
    """Philox4x64-10 output for counters (block, direction, step, 0) under the key (seed, 0).

    Returns: uint64 array of `4 * num_blocks` words.
    """
    counter = first_block | direction << 64 | step << 128
    # NumPy increments the counter before its first block.
    start = (counter - 1) % (1 << 256)
    generator = np.random.Philox(counter=start, key=seed)
    return np.asarray(generator.random_raw(4 * num_blocks), dtype=np.uint64)


def gaussian_entries(words: np.ndarray) -> Tensor:
    """Box-Muller on the two 32-bit halves of each word: float32 tensor, two standard normals a word."""
    halves = torch.from_numpy(words.view(np.uint32).astype(np.float64)).view(-1, 2)
    radius = torch.log((halves[:, 0] + 0.5) * 2.0**-32).mul_(-2.0).sqrt_()
    angle = halves[:, 1] * (2.0 * math.pi * 2.0**-32)
    return torch.stack((radius * torch.cos(angle), radius * torch.sin(angle)), dim=1).flatten().float()


def rademacher_entries(words: np.ndarray) -> Tensor:
    """The lowest bit of each 32-bit half as a sign: float32 tensor of ±1, two a word."""
    signs = (words.view(np.uint32) & np.uint32(1)).astype(np.float32)
    return torch.from_numpy(signs).mul_(2.0).sub_(1.0)


class Directions:
    """The directions z_1 … z_K of every step, over a fixed list of named parameters.

    Args:
        parameters: (name, parameter) pairs; their order and shapes fix the layout.
        seed: the public direction seed, 0 <= seed < 2**63.
        distribution: "gaussian" (entries N(0, 1)), "rademacher" (entries ±1) or "sphere" (uniform on the
            sphere of radius √d, d the number of entries).
    """

    def __init__(self, parameters: Iterable[tuple[str, nn.Parameter]], seed: int, distribution: str) -> None:
        self.seed = seed
        self.distribution = distribution
        self._first_block: dict[str, int] = {}
        self._shape: dict[str, torch.Size] = {}
        blocks = 0
        for name, parameter in parameters:
            self._first_block[name] = blocks
            self._shape[name] = parameter.shape
            blocks += -(-parameter.numel() // ENTRIES_PER_BLOCK)
        self.num_entries = sum(shape.numel() for shape in self._shape.values())
        self._scale_key: tuple[int, int] | None = None
        self._scale = 1.0

    def entry(self, step: int, direction: int, name: str) -> Tensor:
        """z of one parameter: float32 CPU tensor of the parameter's shape."""
        z = self._raw(step, direction, name)
        if self.distribution == "sphere":
            z *= self._sphere_scale(step, direction)
        return z

    def _raw(self, step: int, direction: int, name: str) -> Tensor:
        shape = self._shape[name]
        out = torch.empty(shape.numel())
        for start, values in self._chunks(step, direction, name):
            stop = min(start + values.numel(), out.numel())
            out[start:stop] = values[: stop - start]
        return out.view(shape)

    def _chunks(self, step: int, direction: int, name: str) -> Iterator[tuple[int, Tensor]]:
        entries = rademacher_entries if self.distribution == "rademacher" else gaussian_entries
        blocks = -(-self._shape[name].numel() // ENTRIES_PER_BLOCK)
        for first in range(0, blocks, _CHUNK_BLOCKS):
            count = min(_CHUNK_BLOCKS, blocks - first)
            words = philox_words(self.seed, step, direction, self._first_block[name] + first, count)
            yield first * ENTRIES_PER_BLOCK, entries(words)

    def _sphere_scale(self, step: int, direction: int) -> float:
        if self._scale_key != (step, direction):
            square = sum(float(self._raw(step, direction, n).double().square().sum()) for n in self._shape)
            self._scale_key = (step, direction)
            self._scale = math.sqrt(self.num_entries / square)
        return self._scale
