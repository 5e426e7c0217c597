"""Stacked points over 4-bit weights: bitsandbytes' product as `torch.func.vmap` wants it."""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

_PRODUCT = "bitsandbytes::gemm_4bit"
_with_rule: set[str] = set()


def stack_4bit_products() -> None:
    """Teaches `torch.func.vmap` bitsandbytes' 4-bit product, if bitsandbytes is in use: all stacked points are
    multiplied by weights that were unpacked once, instead of one after the other."""
    library = sys.modules.get("bitsandbytes")
    if library is None or _PRODUCT in _with_rule or not hasattr(torch.ops.bitsandbytes, "gemm_4bit"):
        return
    torch.library.register_vmap(_PRODUCT, _stacked_product)
    _with_rule.add(_PRODUCT)


def _stacked_product(info: Any, in_dims: tuple[Any, ...], activations: Tensor, *weights: Any, **more: Any) -> Any:
    if any(dim is not None for dim in tree_leaves(in_dims[1:])):
        raise NotImplementedError("Only activations can be stacked.")
    stacked = activations.movedim(in_dims[0], 0)
    return torch.ops.bitsandbytes.gemm_4bit.default(stacked, *weights, **more), 0
