"""Compiled models: what is refused of them, before any data is read."""

from __future__ import annotations

from collections.abc import Callable

import torch
from accelerate.utils import is_compiled_module
from torch import Tensor, nn

from peft_dpzero.errors import DPZeroError
from peft_dpzero.modules import with_precision
from peft_dpzero.perturbation.perturbation import Perturbation

# How far a perturbation moves the parameters, and how far compiled logits may lie from the plain ones, relative to the
# largest: float32 and half precision.
_SCALE = 0.1
_TOLERANCES = (1e-3, 0.1)


def check_compiled_parts(model: nn.Module) -> None:
    """Refuses a model of which parts are compiled, or which was compiled in place: the probe cannot look into it.

    Raises:
        DPZeroError: names the part.
    """
    for name, module in model.named_modules():
        if is_compiled_module(module) or getattr(module, "_compiled_call_impl", None) is not None:
            raise DPZeroError(
                f"{name or 'The model'} is compiled in place or by itself: leave it as it is and set "
                "TrainingArguments(torch_compile=True), or pass torch.compile(model, dynamic=True)."
            )


@torch.no_grad()
def check_compiled(perturbation: Perturbation, plain: Callable[[], Tensor], compiled: Callable[[], Tensor]) -> None:
    """Refuses a compiled model that does not follow its parameters, as one with frozen weights.

    Args:
        perturbation: over the model.
        plain: logits of the model on made-up tokens.
        compiled: logits of the compiled model on the same.

    Raises:
        DPZeroError: they differ at perturbed parameters.
    """
    compiled()
    with perturbation.at(0, 0, _SCALE):
        found = compiled().double()
        wanted, precise = with_precision(perturbation.model, lambda: plain().double())
    limit = _TOLERANCES[0 if precise else 1] * float(wanted.abs().max())
    if not torch.allclose(wanted, found, rtol=0, atol=limit):
        raise DPZeroError(
            "The compiled model gives other logits than the plain one at perturbed parameters: compile without "
            "freezing (torch._inductor.config.freezing) and with plain settings, or not at all."
        )
