"""LoRA layers as one product: x(W + s·BA)ᵀ instead of xWᵀ + s·(xAᵀ)Bᵀ.

PEFT keeps the low-rank product apart for the sake of gradients. Without them the sum is cheaper. It is made once a
point for the first layers, as many as fit in `KEPT_ENTRIES`, and in each pass of some hundred tokens for others; W is
never written. Only for weights of float32 or wider: in half precision the sum would round most of a perturbation away.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from peft.tuners.lora import Linear
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from peft_dpzero.modules import Forward, base_layer, replaced_forwards

# Entries of the sums that are kept while the parameters are at one point: 64 MiB of float32.
KEPT_ENTRIES = 1 << 24


class MergedLora:
    """The LoRA layers of a model that can be run as one product.

    Args:
        model: a PEFT model or any other; without LoRA layers there are none.
        always: also where it is not cheaper.
    """

    def __init__(self, model: nn.Module, always: bool = False) -> None:
        self.always = always
        self.layers = [module for module in model.modules() if type(module) is Linear and is_plain(module)]
        sizes = itertools.accumulate(_size(base_layer(layer)) for layer in self.layers)
        self._kept = [layer for layer, size in zip(self.layers, sizes, strict=True) if size <= KEPT_ENTRIES]

    @contextmanager
    def merged(self) -> Iterator[None]:
        """Within the block, in which the parameters stay where they are, the layers run as one product."""
        forwards = {layer: _merged_forward(layer, self.always, keeps=layer in self._kept) for layer in self.layers}
        with replaced_forwards(forwards):
            yield


def _size(layer: Any) -> int:
    return int(layer.weight.numel())


def is_plain(layer: Linear) -> bool:
    """Whether a layer is xWᵀ + s·(xAᵀ)Bᵀ, in float32 or wider."""
    base: Any = base_layer(layer)
    wide = type(base) in (nn.Linear, Conv1D) and base.weight.dtype in (torch.float32, torch.float64)
    return wide and not layer.lora_variant and not any(layer.lora_bias.values())


def plain_adapters(layer: Linear, x: Tensor) -> list[str]:
    """The adapters with which a plain `layer` adds s·(xAᵀ)Bᵀ to xWᵀ now, all in one dtype; none if it does not."""
    adapters = [name for name in layer.active_adapters if name in layer.lora_A]
    weight: Any = base_layer(layer).weight
    alike = {layer.lora_A[name].weight.dtype for name in adapters} == {weight.dtype} == {x.dtype}
    idle = layer.disable_adapters or layer.merged or not alike or torch.is_autocast_enabled(x.device.type)
    return [] if idle else adapters


def _merged_forward(layer: Linear, always: bool, keeps: bool) -> Forward:
    apart = layer.forward
    base: Any = base_layer(layer)
    kept: dict[tuple[str, ...], Tensor] = {}

    def forward(x: Tensor, *args: Any, **kwargs: Any) -> Any:
        weight, adapters = base.weight, plain_adapters(layer, x)
        # Summing takes as long as applying the factors to about this many tokens.
        few = not always and not keeps and x.numel() < x.shape[-1] * min(layer.in_features, layer.out_features) / 2
        if not adapters or few or args or kwargs or weight.is_meta or hasattr(base, "_hf_hook"):
            return apart(x, *args, **kwargs)
        if tuple(adapters) in kept:
            weight, adapters = kept[tuple(adapters)], []
        for name in adapters:
            factors = layer.lora_B[name].weight, layer.lora_A[name].weight  # [out, r], [r, in]
            if layer.fan_in_fan_out:
                factors = factors[1].T, factors[0].T
            weight = torch.addmm(weight, *factors, alpha=layer.scaling[name])
        if keeps and adapters:
            kept[tuple(adapters)] = weight
        return F.linear(x, weight.T if layer.fan_in_fan_out else weight, base.bias)

    return forward
