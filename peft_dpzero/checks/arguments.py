"""What is refused before any data is read."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from peft_dpzero.errors import DPZeroError

OPTIMIZERS = ("adamw_torch", "adamw_torch_fused", "sgd")
# (argument of TrainingArguments, is it set?, why it is refused and what to do)
_REFUSED_ARGUMENTS: Sequence[tuple[str, Callable[[Any], bool], str]] = (
    ("deepspeed", bool, "DeepSpeed shards the parameters that are perturbed: use accelerate launch without it."),
    ("fp16", bool, "its gradient scaler needs a backward pass: use bf16=True or float32."),
    (
        "optim",
        lambda v: getattr(v, "value", v) not in (None, *OPTIMIZERS),
        "releases are applied by adamw_torch or sgd: use one of them.",
    ),
    ("neftune_noise_alpha", lambda v: v is not None, "NEFTune adds noise of its own to every forward pass."),
    ("auto_find_batch_size", bool, "a restart would repeat releases unaccounted: set the batch size yourself."),
    ("torch_empty_cache_steps", lambda v: v is not None, "it serves the backward pass, and there is none."),
    ("label_smoothing_factor", bool, "per-example losses do not apply it: pass per_example_loss with it inside."),
    (
        "include_num_input_tokens_seen",
        lambda v: v not in (False, None, "no"),
        "the number of sampled tokens is private.",
    ),
    (
        "train_sampling_strategy",
        lambda v: v not in (None, "random"),
        "examples must be sampled independently: leave it at 'random'.",
    ),
    ("group_by_length", bool, "examples must be sampled independently: turn it off."),
    ("debug", bool, "it prints what private rows put out: debug on made-up rows, without DPZero."),
    ("use_liger_kernel", bool, "it replaces modules after they were tried: leave it out."),
    *(
        (name, bool, "it would round what was trained, which the journal does not know: use bf16=True.")
        for name in ("bf16_full_eval", "fp16_full_eval")
    ),
    ("packing", bool, "packed rows mix examples, so that no single one can be clipped: turn it off."),
    ("padding_free", bool, "flattened rows mix examples, so that no single one can be clipped: turn it off."),
    (
        "hub_strategy",
        lambda v: getattr(v, "value", v) in ("checkpoint", "all_checkpoints"),
        "checkpoints hold more than the release: use 'end' or 'every_save'.",
    ),
)


def check_arguments(args: Any) -> None:
    """Refuses training arguments that break the sensitivity or leak.

    Raises:
        DPZeroError: names the argument, the reason and the way out.
    """
    for name, is_set, reason in _REFUSED_ARGUMENTS:
        if is_set(getattr(args, name, None)):
            raise DPZeroError(f"{name}={getattr(args, name)!r} cannot be used with DPZero: {reason}")


def forward_only(args: Any) -> Any:
    """A copy of the training arguments `args` without what serves a backward pass or measures private data.

    Nor does it ask for FSDP, which is not the Trainer's affair: it would shard what is trained.
    """
    args = copy.copy(args)
    args.fsdp, args.fsdp_plugin_args, args.parallelism_config = None, None, None
    # One item of the loop is one logical batch, and there are no gradients to clip.
    args.gradient_accumulation_steps = 1
    args.max_grad_norm = 0.0
    # transformers has renamed it, and keeps both.
    for name in ("gradient_checkpointing", "activation_checkpointing"):
        if getattr(args, name, False):
            warnings.warn(f"{name} is switched off: there is no backward pass.", stacklevel=3)
            setattr(args, name, False)
    if not args.skip_memory_metrics:
        warnings.warn("Memory metrics are switched off: what a step takes tells of its longest example.", stacklevel=3)
        args.skip_memory_metrics = True
    return args


def stop_checkpointing(model: Any) -> None:
    """Switches off what `model` does for a backward pass: checkpointing, and embeddings that require gradients."""
    name = "activation" if hasattr(model, "activation_checkpointing_disable") else "gradient"
    if getattr(model, f"is_{name}_checkpointing", False):
        getattr(model, f"{name}_checkpointing_disable")()
    if getattr(model, "_require_grads_hooks", None):
        model.disable_input_require_grads()


def check_adapter(model: nn.Module) -> None:
    """Refuses adapters whose releases could not be loaded or made again.

    That is those without PEFT's model around the base, several, and one with another name than PEFT's own, under which
    PEFT saves it elsewhere.

    Raises:
        DPZeroError: how to add one.
    """
    if hasattr(model, "peft_config") and not hasattr(model, "active_adapter"):
        raise DPZeroError(
            "The adapter was put into the model itself (add_adapter, inject_adapter_in_model): add it by "
            "peft.get_peft_model(model, config), or load it by PeftModel.from_pretrained(…, is_trainable=True)."
        )
    names = [*getattr(model, "peft_config", ["default"])]
    if names != ["default"] or getattr(model, "active_adapter", "default") != "default":
        raise DPZeroError(
            f"The model has the adapters {', '.join(names)}: it must have one, named 'default', as get_peft_model "
            "makes it: a release holds that. Merge the others into the base (merge_and_unload) and save that."
        )


def check_weights(model: nn.Module) -> None:
    """Refuses models with NaN or infinite weights.

    Raises:
        DPZeroError: names the parameter.
    """
    for name, parameter in model.named_parameters():
        if not all(map(_is_finite, _parts(parameter.detach()))):
            raise DPZeroError(f"Parameter {name} holds NaN or infinity: load the model again, or fix its checkpoint.")


def _is_finite(tensor: Tensor) -> bool:
    return tensor.is_meta or not tensor.is_floating_point() or bool(torch.isfinite(tensor).all())


def _parts(tensor: Any) -> Iterator[Tensor]:
    """The plain tensors that a quantized one is made of, this process's part of a sharded one, or the tensor itself."""
    if isinstance(tensor, DTensor):
        tensor = tensor.to_local()
    if not is_traceable_wrapper_subclass(tensor):
        yield tensor
        return
    for name in tensor.__tensor_flatten__()[0]:
        yield from _parts(getattr(tensor, name))
