"""Modules: adapters' base layers, and forwards that are replaced or watched for a while."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import nn
from torch.utils.hooks import RemovableHandle

Forward = Callable[..., Any]


def base_layer(layer: Any) -> nn.Module:
    """The layer that a layer of PEFT's adapts."""
    base: nn.Module = layer.get_base_layer()
    return base


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
