"""Why an example's loss depends on its batch-mates: the first module that shows it, and what such modules do."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from peft_dpzero.errors import DPZeroError
from peft_dpzero.modules import Call


@dataclass(frozen=True)
class Dependence:
    """What an example's loss was seen to depend on.

    Args:
        circumstance: "chance", "masked tokens", "padding", "neighbors" or "place" (in the batch).
        name: the first module whose output for the example differs; "" is the model itself.
        module: that module, or None if every module agrees.
        only_in_loss: the logits agree.
    """

    circumstance: str
    name: str
    module: nn.Module | None
    only_in_loss: bool = False


def check_batch_norm(model: nn.Module) -> None:
    """Refuses batch norm that uses the batch's own statistics although the model is in eval mode.

    Raises:
        DPZeroError: names the module.
    """
    for name, module in model.named_modules():
        if _uses_batch_statistics(module):
            raise dependence_error(Dependence("neighbors", name, module))


def dependence_error(found: Dependence) -> DPZeroError:
    """The refusal of what cannot be mended by running rows one at a time."""
    return DPZeroError(
        f"An example's loss depends on more than the example, so clipping it bounds nothing. {told(found)}"
    )


def told(found: Dependence) -> str:
    """The cause's name, the module that shows it first, and the way out."""
    where = ""
    if found.module is not None:
        where = f" It shows first in {found.name or 'the model itself'} ({type(found.module).__name__})."
    cause, fix = _cause(found)
    return f"Cause: {cause}.{where} {fix}"


def _cause(found: Dependence) -> tuple[str, str]:
    """(the cause's name, the way out)."""
    module = found.module
    kind = "" if module is None else type(module).__name__.lower()
    if found.circumstance == "chance":
        return "the model draws at random in eval mode", "Make eval() turn it off, as it does for dropout."
    if found.only_in_loss:
        return (
            f"the loss itself looks at {_SEEN[found.circumstance]}",
            "Let per_example_loss compute each example's value from that example's own outputs and labels.",
        )
    if module is not None and _uses_batch_statistics(module):
        return (
            "batch norm that uses the batch's statistics (train mode, or track_running_stats=False)",
            "Let it use running statistics in eval mode, or replace it by layer norm.",
        )
    if found.circumstance == "masked tokens":
        return "the model ignores attention_mask", "Use a model that applies it, or rows of equal length."
    if found.circumstance == "padding":
        return (
            "pad length: padding shifts positions, or is counted as text",
            "Use a model that applies attention_mask.",
        )
    if module is not None and (re.search("moe|expert|router|switch|capacity", kind) or _has_capacity(module)):
        return (
            "a mixture of experts that drops tokens past its capacity",
            "Raise the capacity in eval mode so that nothing is dropped.",
        )
    if "attention" in kind or "attn" in kind:
        return "packing: tokens attend to other examples", "Give each example a row of its own."
    if isinstance(module, nn.Embedding) or re.search("embed|rotary|position", kind):
        return "packing: positions run on from one example to the next", "Restart position_ids in each row."
    if found.circumstance == "place":
        return "order: the example's place in the batch, or how many share it", "Use a model without it."
    return "the model mixes the examples of a batch", "Use a model without it."


_SEEN = {
    "masked tokens": "tokens under a mask of 0",
    "padding": "the pad length",
    "neighbors": "other examples",
    "place": "the example's place in the batch, or its size",
}


def _uses_batch_statistics(module: nn.Module) -> bool:
    return isinstance(module, _BatchNorm) and (module.training or module.running_mean is None)


def _has_capacity(module: nn.Module) -> bool:
    return any("capacity" in name for name in vars(module))


def first_difference(
    ones: Mapping[Call, Tensor | None], others: Mapping[Call, Tensor | None], tolerance: float
) -> str | None:
    """The name of the first module whose outputs differ by more than `tolerance` of their size, or None."""
    for call, one in ones.items():
        other = others.get(call)
        if one is None or other is None or one.shape != other.shape or one.numel() == 0:
            continue
        one, other = one.double(), other.double()
        if not torch.allclose(one, other, rtol=0, atol=tolerance * float(one.abs().max()), equal_nan=True):
            return call[0]
    return None
