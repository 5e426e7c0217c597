"""Modules: adapters' base layers, weights that are sharded, and forwards that are replaced or watched for a while."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.utils._pytree import tree_leaves
from torch.utils.hooks import RemovableHandle

Forward = Callable[..., Any]


def base_layer(layer: Any) -> nn.Module:
    """The layer that a layer of PEFT's adapts."""
    base: nn.Module = layer.get_base_layer()
    return base


def is_sharded(model: nn.Module) -> bool:
    """Whether frozen weights of `model` are split among processes, which then run as many passes each (FSDP2)."""
    return any(isinstance(module, FSDPModule) for module in model.modules())


def class_of(module: nn.Module) -> type:
    """The class of a module, also of one that FSDP2 has given a class of its own."""
    return next(kind for kind in type(module).__mro__ if not issubclass(kind, FSDPModule))


def whole(tensor: Tensor) -> Tensor:
    """`tensor` itself, or the whole of which every process holds a part: all of them call this at the same point."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


@contextmanager
def replaced_forwards(forwards: Mapping[nn.Module, Forward]) -> Iterator[None]:
    """Within the block each module runs its replacement; afterwards all are as before."""
    own = {module: vars(module).get("forward") for module in forwards}
    try:
        for module, forward in forwards.items():
            module.forward = forward
        yield
    finally:
        for module, before in own.items():
            if before is not None:
                module.forward = before
            else:
                vars(module).pop("forward", None)


@contextmanager
def hooked(handles: Iterable[RemovableHandle]) -> Iterator[None]:
    """Removes the hooks after the block."""
    handles = list(handles)
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def is_precise(model: nn.Module, run: Callable[[], object]) -> bool:
    """Whether nothing is in half precision or less where `run` takes a pass through `model`: neither weights nor what
    modules put out, as under autocast."""
    seen = {parameter.dtype for parameter in model.parameters()}

    def note(module: nn.Module, inputs: object, output: object) -> None:
        seen.update(leaf.dtype for leaf in tree_leaves(output) if isinstance(leaf, Tensor))

    with hooked(module.register_forward_hook(note) for module in model.modules()):
        run()
    return {dtype for dtype in seen if dtype.is_floating_point} <= {torch.float32, torch.float64}
