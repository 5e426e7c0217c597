"""Modules: adapters' base layers, weights that are sharded, and forwards that are replaced or watched for a while."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar

import torch
from peft import get_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.utils.hooks import RemovableHandle

Forward = Callable[..., Any]
# A module's name and the number of its call.
Call = tuple[str, int]
T = TypeVar("T")


def module_from(path: Path) -> ModuleType:
    """Runs a Python file as a module that its own classes can find, as dataclasses do."""
    specification = importlib.util.spec_from_file_location(f"_dpzero_{path.stem}", path)
    assert specification is not None
    assert specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    sys.modules[specification.name] = module
    try:
        specification.loader.exec_module(module)
    except BaseException:
        del sys.modules[specification.name]
        raise
    return module


def unwrapped(model: Any) -> Any:
    """The model that PEFT has wrapped, or `model` itself."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def text_config(config: Any) -> Any:
    """The part of a model's config that is about text, or all of it."""
    return config.get_text_config() if hasattr(config, "get_text_config") else config


def base_layer(layer: Any) -> nn.Module:
    """The layer that a layer of PEFT's adapts."""
    base: nn.Module = layer.get_base_layer()
    return base


def adapter_parameters(model: Any) -> dict[str, nn.Parameter]:
    """The parameters that the active adapter is saved with, trained or not, by name; none without an adapter."""
    if not hasattr(model, "peft_config"):
        return {}
    state = model.state_dict(keep_vars=True)
    saved = get_peft_model_state_dict(model, state, model.active_adapter, save_embedding_layers=False)
    identities = {id(tensor) for tensor in saved.values()}
    return {name: parameter for name, parameter in model.named_parameters() if id(parameter) in identities}


@contextmanager
def same_parameters(model: nn.Module, names: Collection[str]) -> Iterator[None]:
    """After the block the parameters of these names are the objects that they were, with the values that they have got.

    PEFT puts others in their place, in float32, where it loads an adapter that is in half precision.
    """
    before = {name: parameter for name, parameter in model.named_parameters() if name in names}
    yield
    for name, now in list(model.named_parameters()):
        if name in before and before[name] is not now:
            with torch.no_grad():
                before[name].copy_(now)
            owner, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(owner), leaf, before[name])


def saves_what_is_trained(model: Any) -> bool:
    """Whether an adapter's file holds the trained parameters themselves. Of a prompt encoder (p-tuning, a projected
    prefix) it holds what that puts out."""
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    return not hasattr(model, "peft_config") or trained <= adapter_parameters(model).keys()


def lora_factors(model: nn.Module) -> Iterator[tuple[str, nn.Parameter, nn.Parameter]]:
    """The factors of products BA that active LoRA adapters add: each one's name, itself, and the other factor.

    Those of AdaLoRA, BEA, are left out.
    """
    names = {parameter: name for name, parameter in model.named_parameters()}
    layers: Iterator[Any] = (module for module in model.modules() if isinstance(module, LoraLayer))
    for layer in layers:
        for adapter in layer.active_adapters:
            if adapter in layer.lora_embedding_A:
                pair = layer.lora_embedding_A[adapter], layer.lora_embedding_B[adapter]
            elif isinstance(layer.lora_A, nn.ModuleDict) and adapter in layer.lora_A:
                pair = layer.lora_A[adapter].weight, layer.lora_B[adapter].weight
            else:
                continue
            yield names[pair[0]], *pair
            yield names[pair[1]], *reversed(pair)


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


@contextmanager
def watched(model: nn.Module, part: Callable[[Tensor], T]) -> Iterator[dict[Call, T]]:
    """Collects a `part` of the first tensor of each module call's output under (module's name, number of its call), in
    the order in which the calls end: a module ends before those that use its output."""
    seen: dict[Call, T] = {}
    calls: dict[str, int] = {}

    def note(name: str, output: object) -> None:
        calls[name] = calls.get(name, 0) + 1
        if (tensor := _first_tensor(output)) is not None:
            seen[name, calls[name]] = part(tensor.detach())

    def hook(name: str) -> object:
        return lambda module, args, output: note(name, output)

    handles = [module.register_forward_hook(hook(name)) for name, module in model.named_modules()]
    with hooked(handles):
        yield seen


@torch.no_grad()
def with_precision(model: nn.Module, run: Callable[[], T]) -> tuple[T, bool]:
    """What `run` returns, which takes a pass through `model`, and whether nothing is in half precision or less there:
    neither weights nor what modules put out, as under autocast."""
    with watched(model, lambda output: output.dtype) as seen:
        made = run()
    dtypes = {*seen.values(), *(parameter.dtype for parameter in model.parameters())}
    return made, {dtype for dtype in dtypes if dtype.is_floating_point} <= {torch.float32, torch.float64}


def _first_tensor(output: object) -> Tensor | None:
    if isinstance(output, Tensor):
        return output
    values = output.values() if isinstance(output, Mapping) else output if isinstance(output, (tuple, list)) else ()
    return next((value for value in values if isinstance(value, Tensor)), None)
