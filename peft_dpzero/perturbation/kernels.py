"""The entries of a direction on a GPU, the same bits as on the CPU: Philox4x64-10 and a table look-up in Triton."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _round(c0, c1, c2, c3, k0, k1):  # type: ignore[no-untyped-def]
    m0 = tl.full((1,), 0xD2E7470EE14C6C93, tl.uint64)
    m1 = tl.full((1,), 0xCA5A826395121157, tl.uint64)
    return tl.umulhi(c2, m1) ^ c1 ^ k0, c2 * m1, tl.umulhi(c0, m0) ^ c3 ^ k1, c0 * m0


@triton.jit(  # type: ignore[untyped-decorator]
    do_not_specialize=["entries", "seed", "step", "direction", "first_block"]
)
def _entries(  # type: ignore[no-untyped-def]
    table, out, entries, seed, step, direction, first_block, BLOCKS: tl.constexpr, SIGNS: tl.constexpr
):
    block = tl.program_id(0).to(tl.int64) * BLOCKS + tl.arange(0, BLOCKS)
    zero = tl.zeros((BLOCKS,), tl.uint64)
    c0, c1, c2, c3 = (block + first_block).to(tl.uint64), zero + direction, zero + step, zero
    k0, k1 = zero + seed, zero
    for _ in tl.static_range(10):
        c0, c1, c2, c3 = _round(c0, c1, c2, c3, k0, k1)
        k0 += tl.full((1,), 0x9E3779B97F4A7C15, tl.uint64)
        k1 += tl.full((1,), 0xBB67AE8584CAA73B, tl.uint64)
    width: tl.constexpr = 64 if SIGNS else 4
    bits: tl.constexpr = 1 if SIGNS else 16
    place = tl.arange(0, width)
    for number in tl.static_range(4):
        if number == 0:
            word = c0
        elif number == 1:
            word = c1
        elif number == 2:
            word = c2
        else:
            word = c3
        index = (word[:, None] >> (place * bits)[None, :].to(tl.uint64)) & ((1 << bits) - 1)
        position = block[:, None] * (4 * width) + number * width + place[None, :]
        inside = position < entries
        z = index.to(tl.float32) * 2.0 - 1.0 if SIGNS else tl.load(table + index.to(tl.int64), mask=inside)
        tl.store(out + position, z, mask=inside)


def fill(out: Tensor, table: Tensor, seed: int, step: int, direction: int, first_block: int, signs: bool) -> None:
    """What `philox.Stream.fill` writes, written to a contiguous float32 tensor on a GPU.

    Args:
        table: `philox.gaussian_table` on the same device.
    """
    blocks, per_program = (triton.cdiv(out.numel(), 256), 16) if signs else (triton.cdiv(out.numel(), 16), 256)
    grid = (triton.cdiv(blocks, per_program),)
    with torch.cuda.device(out.device if out.is_cuda else -1):
        _entries[grid](table, out, out.numel(), seed, step, direction, first_block, BLOCKS=per_program, SIGNS=signs)
