"""The base that an adapter was trained on, as a hash of all that training left alone."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from peft_dpzero.release.digests import digest

# PEFT's untrained copy of a module that is trained: the trained one is used in its place.
_REPLACED = "original_module"


def frozen_header(model: nn.Module, trained: Collection[str]) -> dict[str, Any]:
    """What the journal's header says of the base, JSON-ready: its hash and the dtypes that it was hashed in.

    Parameters that are not trained, and buffers that belong to the saved model; buffers that the model's class
    computes are left out, since their last bits differ between devices.

    Args:
        model: with its adapter.
        trained: names of the trained parameters.

    Returns: `sha256`, or null with a `reason`: offloaded or quantized weights cannot be read as they are saved.
    """
    tensors = dict(_frozen(model, trained))
    if reason := _unreadable(model, tensors):
        return {"sha256": None, "reason": reason}
    floats = {name: _dtype(tensor) for name, tensor in tensors.items() if tensor.is_floating_point()}
    usual = next((dtype for dtype, _ in Counter(floats.values()).most_common(1)), None)
    return {
        "sha256": digest(tensors.items()),
        "dtype": usual,
        "other_dtypes": {name: dtype for name, dtype in floats.items() if dtype != usual},
    }


def frozen_digest(model: nn.Module, trained: Collection[str], noted: Mapping[str, Any]) -> str:
    """The hash of a model that may have been loaded in other dtypes than `noted` by `frozen_header`.

    Raises:
        ValueError: its weights cannot be read. The text says why.
    """
    tensors = dict(_frozen(model, trained))
    if reason := _unreadable(model, tensors):
        raise ValueError(reason)
    return digest((name, _as_noted(name, tensor, noted)) for name, tensor in tensors.items())


def _frozen(model: nn.Module, trained: Collection[str]) -> Iterator[tuple[str, Tensor]]:
    for name, parameter in model.named_parameters():
        if name not in trained and _REPLACED not in name.split("."):
            yield name, parameter
    for prefix, module in model.named_modules():
        for own, buffer in module.named_buffers(prefix, recurse=False):
            if own.rpartition(".")[2] not in module._non_persistent_buffers_set and _REPLACED not in own.split("."):
                yield own, buffer


def _unreadable(model: nn.Module, tensors: Mapping[str, Tensor]) -> str | None:
    if any(tensor.is_meta for tensor in tensors.values()):
        return "weights of the base were offloaded"
    # Libraries that quantize keep weights in tensor classes of their own, or name themselves in the model.
    owned = any(type(tensor) not in (Tensor, nn.Parameter, DTensor) for tensor in tensors.values())
    if owned or any(getattr(module, "hf_quantizer", None) is not None for module in model.modules()):
        return "the base was quantized"
    return None


def _as_noted(name: str, tensor: Tensor, noted: Mapping[str, Any]) -> Tensor:
    if not tensor.is_floating_point():
        return tensor
    return tensor.to(getattr(torch, noted["other_dtypes"].get(name, noted["dtype"])))


def _dtype(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")
