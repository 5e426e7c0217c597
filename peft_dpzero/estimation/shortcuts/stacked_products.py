"""Matrix products of what is stacked over points with what is not, in one piece.

`torch.func.vmap` would copy the other factor for every point. Here the points stand side by side in the first factor's
rows, or in the second's columns.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def product(left: Tensor, right: Tensor) -> Tensor:
    """left @ right for (…, n, d) and (…, d, m) with the same leading dimensions, without autograd."""
    return torch.as_tensor(_Product.apply(left, right))  # type: ignore[no-untyped-call]


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(left: Tensor, right: Tensor) -> Tensor:
        return left @ right

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        """Nothing is kept: there is no backward pass."""

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, int | None], left: Tensor, right: Tensor) -> tuple[Tensor, int]:
        points, (of_left, of_right) = info.batch_size, in_dims
        if of_left is not None and of_right is not None:
            return left.movedim(of_left, 0) @ right.movedim(of_right, 0), 0
        if of_right is None:
            assert of_left is not None
            rows = left.movedim(of_left, -3)  # […, P, n, d]
            made = rows.reshape(*rows.shape[:-3], -1, rows.shape[-1]) @ right
            return made.view(*made.shape[:-2], points, -1, made.shape[-1]), made.ndim - 2
        columns = right.movedim(of_right, -2)  # […, d, P, m]
        made = left @ columns.reshape(*columns.shape[:-2], -1)
        return made.view(*made.shape[:-1], points, -1), made.ndim - 1
