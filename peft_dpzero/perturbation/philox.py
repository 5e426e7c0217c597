"""Random words and the tables that turn them into entries: integer arithmetic and look-ups, the same everywhere.

The words come from Philox4x64-10 (Salmon et al., SC 2011), in NumPy's implementation, whose raw stream is fixed by
the Random123 test vectors. No logarithm or cosine touches an entry, so that every machine, thread count and library
version makes the same bits.
"""

from __future__ import annotations

import functools
import math
from statistics import NormalDist

import numpy as np
import numpy.typing as npt

WORDS_PER_BLOCK = 4

Words = npt.NDArray[np.uint64]
Entries = npt.NDArray[np.float32]


def philox(seed: int, step: int, direction: int, first_block: int) -> np.random.Philox:
    """Philox4x64-10 under the key (seed, 0), whose next block has the counter (first_block, direction, step, 0)."""
    counter = first_block | direction << 64 | step << 128
    # NumPy increments the counter before its first block.
    return np.random.Philox(counter=(counter - 1) % (1 << 256), key=seed)


@functools.cache
def gaussian_table() -> Entries:
    """The midpoint quantiles of N(0, 1) at 2¹⁶ equal probabilities, scaled to variance 1: float32, (65536,).

    A uniform 16-bit index picks a standard normal of 2¹⁶ values: symmetric, of variance 1, bounded by 4.33, with no
    even moment above the normal's (the fourth is 2.9992), hence sub-Gaussian with the normal's own constant. That is
    all that zeroth-order descent asks of a direction: E[z] = 0 and E[zzᵀ] = I make the estimate unbiased up to O(λ²),
    a bounded fourth moment bounds its variance, and the sub-Gaussian tail of zᵀ∇f is what clipping thresholds are
    chosen by (arXiv 2310.09639, Theorem 1; Spall 1992 for entries that are not normal). By the central limit theorem
    zᵀ∇f is as normal as with normal entries wherever ∇f has many coordinates.

    `NormalDist.inv_cdf` calls `log`, whose last bit differs between machines; no quantile lies near enough to a
    rounding boundary of float32 for that to matter (tested).
    """
    half = _negative_quantiles()
    return np.concatenate([half, -half[::-1]]).astype(np.float32)


def _negative_quantiles() -> npt.NDArray[np.float64]:
    half = [NormalDist().inv_cdf((index + 0.5) * 2.0**-16) for index in range(1 << 15)]
    scale = 1.0 / math.sqrt(math.fsum(value * value for value in half) / len(half))
    return np.array(half) * scale


@functools.cache
def sign_table() -> Entries:
    """The eight bits of a byte as signs, lowest first, 1 for +1: float32, (256, 8)."""
    bits = np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1, bitorder="little")
    return bits.astype(np.float32) * 2.0 - 1.0


class Stream:
    """The entries of one direction, readable from any block on.

    Args:
        seed, step, direction: see `philox`.
        signs: entries ±1, 256 a block, instead of Gaussian ones, 16 a block.
    """

    def __init__(self, seed: int, step: int, direction: int, signs: bool) -> None:
        self._address = (seed, step, direction)
        self._table = sign_table() if signs else gaussian_table()
        self._index = np.dtype("u1" if signs else "<u2")
        self._entries_per_block = entries_per_block(signs)
        self._next = -1
        self._generator: np.random.Philox | None = None

    def fill(self, first_block: int, out: Entries) -> None:
        """Writes the entries from block `first_block` on to `out`, float32 and of one dimension.

        A block that `out` does not fill to its end is dropped. Reading on from where the last call ended is fastest.
        """
        blocks = -(-out.size // self._entries_per_block)
        if self._generator is None or first_block != self._next:
            self._generator = philox(*self._address, first_block)
        self._next = first_block + blocks
        words = np.asarray(self._generator.random_raw(WORDS_PER_BLOCK * blocks), dtype="<u8")
        index = words.view(self._index)
        # mode="clip" writes to `out` without a buffer; no index is out of range.
        if blocks * self._entries_per_block == out.size:
            np.take(self._table, index, axis=0, out=out.reshape(index.shape + self._table.shape[1:]), mode="clip")
        else:
            out[:] = np.take(self._table, index, axis=0, mode="clip").reshape(-1)[: out.size]


def entries_per_block(signs: bool) -> int:
    """16 Gaussian entries or 256 signs."""
    return 256 if signs else 16
