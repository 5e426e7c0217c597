"""Quantised bases: which cannot be trained on privately, and how points are stacked over those that can."""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from peft_dpzero.errors import DPZeroError

_PRODUCT = "bitsandbytes::gemm_4bit"
_with_rule: set[str] = set()


def check_quantisation(model: nn.Module) -> None:
    """Refuses LLM.int8() layers that pick outlier columns: they look for them in all examples of a micro-batch.

    Raises:
        DPZeroError: names the first such layer.
    """
    for name, module in model.named_modules():
        state = getattr(module, "state", None)
        if type(module).__name__ == "Linear8bitLt" and getattr(state, "threshold", 0) > 0:
            raise DPZeroError(
                f"{name} is an LLM.int8() layer, which keeps a column in 16 bits for all examples of a micro-batch if "
                "one of them has an outlier there: examples change each other's losses. Set llm_int8_threshold=0.0, "
                "or better, load in 4 bits (load_in_4bit=True) or quantise weights only (torchao's "
                "Int8WeightOnlyConfig)."
            )


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
