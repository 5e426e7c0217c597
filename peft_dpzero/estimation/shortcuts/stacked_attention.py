"""Attention of points that are stacked, with a mask that they share, in one kernel.

PyTorch 2.11's rule for `torch.func.vmap` over the GPU's attention kernels folds the points into the batch of queries,
keys and values, but not into that of a mask which has none.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode


class FoldedAttention(TorchFunctionMode):
    """Within the block, `scaled_dot_product_attention` takes stacked points as more rows."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return (_attention if func is F.scaled_dot_product_attention else func)(*args, **(kwargs or {}))


def _attention(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, *args: Any, **kwargs: Any
) -> Tensor:
    return torch.as_tensor(_Attention.apply(query, key, value, attn_mask, args, kwargs))  # type: ignore[no-untyped-call]


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, args: Any, kwargs: Any) -> Tensor:
        return F.scaled_dot_product_attention(query, key, value, mask, *args, **kwargs)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        """Nothing is kept: there is no backward pass."""

    @staticmethod
    def vmap(
        info: Any,
        in_dims: tuple[int | None, ...],
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None,
        args: Any,
        kwargs: Any,
    ) -> tuple[Tensor, int]:
        def folded(tensor: Tensor, dim: int | None) -> Tensor:
            points = tensor.expand(info.batch_size, *tensor.shape) if dim is None else tensor.movedim(dim, 0)
            return points.flatten(0, 1)

        queries, keys, values = (folded(*one) for one in zip((query, key, value), in_dims, strict=False))
        if mask is not None and (in_dims[3] is not None or (mask.ndim == queries.ndim and len(mask) > 1)):
            mask = folded(mask, in_dims[3])
        made = F.scaled_dot_product_attention(queries, keys, values, mask, *args, **kwargs)
        return made.view(info.batch_size, -1, *made.shape[1:]), 0
