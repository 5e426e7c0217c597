"""Which optimizer `TrainingArguments` ask for."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from transformers import Trainer, TrainingArguments

from peft_dpzero.errors import DPZeroError
from peft_dpzero.release.optimizer import DPZeroAdamW, DPZeroOptimizer, DPZeroSGD

# An adapter that learns moves its numbers by some hundredths at least.
_SMALL_MOVE = 0.01
_KINDS: dict[type, type[DPZeroOptimizer]] = {torch.optim.AdamW: DPZeroAdamW, torch.optim.SGD: DPZeroSGD}


def optimizer_for(args: TrainingArguments, groups: list[dict[str, Any]]) -> DPZeroOptimizer:
    """The DPZero counterpart of what the Trainer would make of `optim`, `optim_args` and the `adam_` settings.

    Args:
        args: `check_arguments` let them pass.
        groups: parameters with their weight decay.

    Raises:
        DPZeroError: `optim_args` ask for what the counterpart lacks.
    """
    kind, settings = Trainer.get_optimizer_cls_and_kwargs(args)
    ours = _KINDS[kind]
    settings.pop("fused", None)
    if unknown := settings.keys() - {"lr", *ours.hyperparameters}:
        raise DPZeroError(f"optim_args: {ours.__name__} has no {', '.join(sorted(unknown))}: leave it out.")
    return ours(groups, **settings)


def warn_of_small_moves(optimizer: DPZeroOptimizer, steps: int) -> None:
    """Warns if AdamW cannot move any number far: the Trainer's default rate is made for other gradients."""
    rate = max(optimizer.learning_rates)
    if isinstance(optimizer, DPZeroAdamW) and 0 < rate * steps < _SMALL_MOVE:
        warnings.warn(
            f"learning_rate={rate:g} moves no number by more than {rate * steps:.1g} in {steps} steps, which seldom "
            "teaches a model anything: private estimates want 1e-3 to 1e-2.",
            stacklevel=3,
        )


def as_dpzero_optimizer(optimizer: Any) -> DPZeroOptimizer:
    """`optimizer` without Accelerate's wrapper.

    Raises:
        DPZeroError: it needs gradients.
    """
    optimizer = getattr(optimizer, "optimizer", optimizer)
    if not isinstance(optimizer, DPZeroOptimizer):
        raise DPZeroError(
            f"{type(optimizer).__name__} needs gradients, and there are none: pass a DPZeroAdamW or DPZeroSGD, or no "
            "optimizer."
        )
    return optimizer
