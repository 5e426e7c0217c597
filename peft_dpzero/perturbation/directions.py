"""Public random directions, a pure function of (seed, step, k, parameter, position).

Layout: the parameters lie one after another in one long vector, each starting at a fresh Philox block of 256 bits,
which makes 16 Gaussian entries or 256 signs (`philox.py`). Entries are made and used piece by piece, on as many
threads as torch uses, and no result depends on how the vector was cut.
"""

from __future__ import annotations

import functools
import logging
import math
import os
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor, wait
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from peft_dpzero.errors import DPZeroError
from peft_dpzero.perturbation.philox import Stream, entries_per_block, gaussian_table

# Made at once: threads that make shorter pieces wait for each other (for Python's lock) more often.
PIECE_ENTRIES = 1 << 17
# Used at once: torch runs operations on so few entries on the calling thread.
_ACTION_ENTRIES = 1 << 15
# What one thread takes at once: at most this much, and at least a quarter of it.
_CHUNK_ENTRIES = 1 << 19

Action = Callable[[str, slice, Tensor], None]
Piece = tuple[str, slice, int]
Fill = Callable[[Tensor, Tensor, int, int, int, int, bool], None]

logger = logging.getLogger(__name__)


class Directions:
    """The directions z_1 … z_K of every step, over a fixed list of named parameters.

    Args:
        parameters: (name, parameter) pairs; their order and shapes fix the layout.
        seed: the public direction seed, 0 <= seed < 2**63.
        distribution: "gaussian" (entries N(0, 1) on 2¹⁶ values, see `philox.gaussian_table`), "rademacher" (entries
            ±1) or "sphere" (the Gaussian direction scaled to length √d, d the number of entries).

    Raises:
        DPZeroError: the distribution is one for a basis's coordinates.
    """

    def __init__(self, parameters: Iterable[tuple[str, nn.Parameter]], seed: int, distribution: str) -> None:
        if distribution == "orthogonal":
            raise DPZeroError("direction_distribution='orthogonal' is for directions in the basis of public_text.")
        self.seed = seed
        self.distribution = distribution
        self._signs = distribution == "rademacher"
        self._per_block = entries_per_block(self._signs)
        self._first_block: dict[str, int] = {}
        self._shape: dict[str, torch.Size] = {}
        self._blocks = 0
        for name, parameter in parameters:
            self._first_block[name] = self._blocks
            self._shape[name] = parameter.shape
            self._blocks += -(-parameter.numel() // self._per_block)
        self.num_entries = sum(shape.numel() for shape in self._shape.values())
        self._scale_key: tuple[int, int] | None = None
        self._scale = 1.0

    def entry(
        self,
        step: int,
        direction: int,
        name: str,
        part: slice | None = None,
        device: torch.device | str = "cpu",
    ) -> Tensor:
        """z of one parameter: float32, on `device`, of the parameter's shape, or of one dimension for a `part`.

        Args:
            part: of the flattened parameter, from a multiple of `PIECE_ENTRIES` on; None for all.
        """
        shape = self._shape[name]
        whole = slice(0, shape.numel())
        part = whole if part is None else part
        out = torch.empty(part.stop - part.start, device=device)
        if not self._fill(step, direction, self._first_block[name] + part.start // self._per_block, out):
            made = torch.empty(out.shape)

            def keep(_: str, piece: slice, z: Tensor) -> None:
                made[piece.start - part.start : piece.stop - part.start] = z

            scales = {direction: self._length_scale(step, direction)}
            self._visit(step, {direction: 1.0}, scales, keep, {name: part}, torch.float32)
            out.copy_(made)
        return out.view(shape) if part == whole else out

    def vector(self, step: int, direction: int, device: torch.device | str = "cpu") -> Tensor:
        """z of all parameters as one float32 vector, each parameter padded to whole blocks; read with `view`."""
        out = torch.empty(self._blocks * self._per_block, device=device)
        if self._fill(step, direction, 0, out):
            return out
        made = torch.empty(out.shape)
        self._stream(step, direction).fill(0, made.numpy())
        return made.mul_(self._length_scale(step, direction)).to(device)

    def _fill(self, step: int, direction: int, first_block: int, out: Tensor) -> bool:
        """Fills `out` on its GPU, if there is a kernel for it."""
        fill = gpu_kernel(out.device) if out.device.type == "cuda" else None
        if fill is None:
            return False
        fill(out, _table(out.device), self.seed, step, direction, first_block, self._signs)
        out.mul_(self._length_scale(step, direction))
        return True

    def numel(self, name: str) -> int:
        """Number of one parameter's entries."""
        return self._shape[name].numel()

    def view(self, vector: Tensor, name: str) -> Tensor:
        """One parameter's entries in a `vector` or in each of (P, …) vectors, in the parameter's shape."""
        start, shape = self._first_block[name] * self._per_block, self._shape[name]
        return vector[..., start : start + shape.numel()].reshape(*vector.shape[:-1], *shape)

    def visit(
        self,
        step: int,
        coefficients: Mapping[int, float],
        action: Action,
        *,
        names: Collection[str] | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        """Calls `action(name, part, Σ_k c_k z_k)` for pieces of the flattened parameters until all were seen.

        Terms are multiplied, rounded, then added in the order of `coefficients`. The sum is a CPU tensor that the
        action may change but not keep.

        Args:
            coefficients: c_k by direction.
            action: called on several threads at once, for disjoint pieces, without autograd.
            names: the parameters to visit; None for all.
            dtype: of the sum, float32 or float64.
        """
        scales = {k: self._length_scale(step, k) for k in coefficients}
        spans = {name: slice(0, self._shape[name].numel()) for name in (self._shape if names is None else names)}
        self._visit(step, coefficients, scales, action, spans, dtype)

    def _visit(
        self,
        step: int,
        coefficients: Mapping[int, float],
        scales: Mapping[int, float],
        action: Action,
        spans: Mapping[str, slice],
        dtype: torch.dtype,
    ) -> None:
        wide = np.dtype(np.float64 if dtype == torch.float64 else np.float32)

        def work(pieces: list[Piece]) -> None:
            streams = [(self._stream(step, k), scales[k], c) for k, c in coefficients.items()]
            buffers = np.empty((2, PIECE_ENTRIES), dtype=np.float32)
            for name, part, block in pieces:
                # The first term takes the first buffer and becomes the sum; the others follow through the second.
                total: Any = None
                for stream, scale, coefficient in streams:
                    z: Any = buffers[0 if total is None else 1, : part.stop - part.start]
                    stream.fill(block, z)
                    if scale != 1.0:
                        z *= np.float32(scale)
                    z = z.astype(wide, copy=False)
                    z *= wide.type(coefficient)
                    if total is None:
                        total = z
                    else:
                        total += z
                whole = torch.from_numpy(total)
                for start in range(part.start, part.stop, _ACTION_ENTRIES):
                    some = slice(start, min(start + _ACTION_ENTRIES, part.stop))
                    action(name, some, whole[some.start - part.start : some.stop - part.start])

        _in_parallel(work, self._chunks(spans))

    def _chunks(self, spans: Mapping[str, slice]) -> Iterator[list[Piece]]:
        share = sum(span.stop - span.start for span in spans.values()) // torch.get_num_threads()
        enough = min(max(share, _CHUNK_ENTRIES // 4), _CHUNK_ENTRIES)
        chunk: list[Piece] = []
        entries = 0
        for name, span in spans.items():
            for start in range(span.start, span.stop, PIECE_ENTRIES):
                part = slice(start, min(start + PIECE_ENTRIES, span.stop))
                chunk.append((name, part, self._first_block[name] + start // self._per_block))
                entries += part.stop - start
                if entries >= enough:
                    yield chunk
                    chunk, entries = [], 0
        if chunk:
            yield chunk

    def _stream(self, step: int, direction: int) -> Stream:
        return Stream(self.seed, step, direction, self._signs)

    def _length_scale(self, step: int, direction: int) -> float:
        """What brings the raw direction to the sphere; 1 for the other distributions."""
        if self.distribution != "sphere":
            return 1.0
        if self._scale_key != (step, direction):
            squares: list[int] = []

            # Squares rounded to multiples of 2⁻²⁰ add up exactly, in any order.
            def add(_: str, __: slice, z: Tensor) -> None:
                squares.append(int(z.square_().mul_(2.0**20).round_().sum()))

            spans = {name: slice(0, shape.numel()) for name, shape in self._shape.items()}
            self._visit(step, {direction: 1.0}, {direction: 1.0}, add, spans, torch.float64)
            self._scale_key = (step, direction)
            self._scale = math.sqrt(self.num_entries / (sum(squares) * 2.0**-20))
        return self._scale


@functools.cache
def gpu_kernel(device: torch.device) -> Fill | None:
    """The Triton kernel that makes entries on a GPU, or None without Triton or where it misses the CPU's bits."""
    try:
        from peft_dpzero.perturbation.kernels import fill

        for signs in (False, True):
            made, wanted = torch.empty(5003, device=device), torch.empty(5003)
            fill(made, _table(device), 3, 2, 1, 7, signs)
            Stream(3, 2, 1, signs).fill(7, wanted.numpy())
            if not torch.equal(made.cpu(), wanted):
                raise RuntimeError("the kernel and the CPU disagree")
    except Exception as error:
        logger.warning("Directions for %s are made on the CPU, which is slow (Triton: %s).", device, error)
        return None
    return fill


@functools.cache
def _table(device: torch.device) -> Tensor:
    return torch.from_numpy(gaussian_table()).to(device)


def _in_parallel(work: Callable[[list[Piece]], None], chunks: Iterator[list[Piece]]) -> None:
    """Runs `work` on each chunk, on torch's number of threads; returns or raises when no thread is at work any more."""
    first = next(chunks, None)
    second = next(chunks, None)
    inference = torch.is_inference_mode_enabled()

    @torch.no_grad()
    def run(chunk: list[Piece]) -> None:
        with torch.inference_mode(inference):
            work(chunk)

    if first is None:
        return
    if second is None or torch.get_num_threads() == 1:
        for chunk in (first, *([second] if second else []), *chunks):
            run(chunk)
        return
    pool = _pool(os.getpid(), torch.get_num_threads())
    futures = [pool.submit(run, chunk) for chunk in (first, second, *chunks)]
    try:
        for future in futures:
            future.result()
    finally:
        for future in futures:
            future.cancel()
        wait(futures)


@functools.lru_cache(maxsize=1)
def _pool(process: int, threads: int) -> ThreadPoolExecutor:
    """One pool a process: after a fork the parent's threads are gone."""
    return ThreadPoolExecutor(threads, thread_name_prefix=f"directions-{process}")
