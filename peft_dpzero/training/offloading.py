"""Base weights that Accelerate keeps on the CPU or on disk, with the trained parameters in memory."""

from __future__ import annotations

from typing import Any

from accelerate.hooks import AlignDevicesHook, SequentialHook, remove_hook_from_module
from peft.tuners.lora import LoraLayer
from torch import nn

from peft_dpzero.errors import DPZeroError


def is_offloaded(model: nn.Module) -> bool:
    """Whether some of the weights are loaded module by module, so that the model must stay where it is."""
    return any(parameter.is_meta for parameter in model.parameters())


def bring_trained_into_memory(model: nn.Module) -> None:
    """Takes what is trained out of Accelerate's offloading: a parameter that is loaded anew at each call cannot move.

    Parameters that were offloaded keep their values. LoRA layers that PEFT put on an offloaded base have none: PEFT
    makes them on the meta device. They get the initial values that PEFT would have given them.

    Raises:
        DPZeroError: a module holds trained and frozen parameters together, and is offloaded; or what is trained was
            loaded onto the disk.
    """
    for name, module in model.named_modules():
        hook = _offloading_hook(module)
        own = list(module.parameters(recurse=False))
        if hook is None or not any(parameter.requires_grad for parameter in own):
            continue
        if not all(parameter.requires_grad for parameter in own):
            raise DPZeroError(f"Some parameters of {name} are trained and others not: keep that module in memory.")
        remove_hook_from_module(module)
        for parameter in module.parameters(recurse=False):
            if parameter.is_meta:
                raise DPZeroError(
                    f"{name} is trained and was loaded onto the disk: keep that module in memory by its device_map, or "
                    "train an adapter."
                )
            # From disk comes a view of a file.
            parameter.data = parameter.detach().to(hook.execution_device, copy=True)
    for module in model.modules():
        if isinstance(module, LoraLayer):
            _initialise(model, module)


def _initialise(model: Any, layer: LoraLayer) -> None:
    """Gives LoRA factors on the meta device the values that PEFT gives them elsewhere, where the base layer runs."""
    hook = _offloading_hook(layer.get_base_layer())
    for adapter in layer.lora_A:
        start = model.peft_config[adapter].init_lora_weights
        factors = [layer.lora_A[adapter], layer.lora_B[adapter]]
        if hook is None or start not in (True, False, "gaussian") or not all(f.weight.is_meta for f in factors):
            continue
        for factor in factors:
            factor.to_empty(device=hook.execution_device)
            factor.reset_parameters()
        layer.reset_lora_parameters(adapter, start)


def _offloading_hook(module: nn.Module) -> AlignDevicesHook | None:
    hook = getattr(module, "_hf_hook", None)
    hooks = hook.hooks if isinstance(hook, SequentialHook) else [hook]
    return next((h for h in hooks if isinstance(h, AlignDevicesHook) and h.offload), None)
