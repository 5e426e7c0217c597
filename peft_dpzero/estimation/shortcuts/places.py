"""Where losses read in a pass, and how what was made there stands for the whole."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from peft_dpzero.estimation.shortcuts.filled_rows import filled

# (length of the outputs) → rows and positions that are read, both (n,), row by row and as many of each; None for all.
Positions = Callable[[int], tuple[Tensor, Tensor] | None]

# Rows and positions that are read: (b, positions) each, with rows to fill up.
Read = tuple[Tensor, Tensor]

# Narrowing costs a gathering and a scattering: not worth it if more than this share of the tokens is read.
WORTHWHILE = 0.5


class Places:
    """The places that one pass reads.

    Args:
        positions: of the pass.
        loud: what stands elsewhere is large, not zero.

    Attributes:
        handed_over: (b, positions, …) of the places that are read, for which one entry a position stands where the
            model passes it on.
    """

    def __init__(self, positions: Positions, loud: bool = False) -> None:
        self._positions = positions
        self._loud = loud
        self.handed_over: Tensor | None = None
        self._read: dict[tuple[int, int], Read | None] = {}

    def of(self, rows: int, length: int) -> Read | None:
        """The places among `rows` rows of `length` positions, up to a multiple of four rows; None to read all."""
        if (rows, length) not in self._read:
            read = self._positions(length)
            if read is None or len(read[0]) % rows or len(read[0]) > WORTHWHILE * rows * length:
                self._read[rows, length] = None
            else:
                self._read[rows, length] = _with_more(read[0].view(rows, -1)), _with_more(read[1].view(rows, -1))
        return self._read[rows, length]

    def at(self, read: Read, values: Tensor) -> Tensor:
        """What `values` (b, length, …) hold where is read, or what was handed over if they stand for that."""
        if self.handed_over is not None and values.shape[-1] == 1:
            return self.handed_over[read[0][:, 0]]
        return values[read]

    def everywhere(self, output: Tensor, length: int) -> Tensor:
        """`output` (b, positions, …) of what is read, as (b, length, …)."""
        if output.shape[1] == 1 and not self._loud:
            # What is read stands at every place of its row, without a copy.
            return output.expand(-1, length, *output.shape[2:])
        whole = output.new_zeros(len(output), length, *output.shape[2:])
        if self._loud:
            whole += 100 * torch.arange(whole.shape[-1], device=whole.device).cos()
        read = self.of(len(output), length)
        assert read is not None
        return whole.index_put_(tuple(place[: len(output)] for place in read), output)


def _with_more(places: Tensor) -> Tensor:
    """`places` (b, positions) with the first row's again up to a multiple of four rows."""
    return torch.cat([places, places[:1].expand(filled(len(places)) - len(places), -1)])
