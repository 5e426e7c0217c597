"""TRL's preference trainers: what a row's loss is, and how its reference is made."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from peft_dpzero.checks.hosts import DPO, REWARD, host_of
from peft_dpzero.estimation.batching import Collator
from peft_dpzero.estimation.losses import Losses, MicroBatch
from peft_dpzero.estimation.preferences import REFERENCE, CompletionTask, DPOTask, PairTask, RewardTask, as_pair


def preference_task(trainer: Any) -> PairTask | None:
    """The loss that the trainer's class stands for; None for other trainers than of preferences."""
    host = host_of(type(trainer))
    if host == DPO:
        return DPOTask(float(trainer.args.beta))
    if host == REWARD:
        return RewardTask(float(trainer.args.center_rewards_coefficient or 0.0))
    return None


def pair_collator(trainer: Any, collate: Collator) -> Collator:
    """What makes the private rows of a trainer of preferences; `collate` for other trainers."""
    if not isinstance(trainer.task, PairTask):
        return collate
    reference = getattr(trainer, "ref_model", None)
    return PairCollator(collate, trainer.task, trainer.model, reference, trainer._prepare_inputs)


class PairCollator:
    """Makes rows (1, 2, l) of what a preference collator makes of one example.

    For DPO it adds the log-probabilities of the reference, which no step moves: one pass of a row by itself.

    Args:
        collate: TRL's collator.
        task: what reads the rows.
        model: the trained one; with its adapter off it is the reference.
        ref_model: a reference of its own, or None.
        place: moves a row to the model's device.
    """

    def __init__(
        self,
        collate: Collator,
        task: PairTask,
        model: nn.Module,
        ref_model: nn.Module | None,
        place: Callable[[MicroBatch], MicroBatch],
    ) -> None:
        self._collate = collate
        self._adapted = model if ref_model is None else None
        self._place = place
        self._log_probs = None
        if isinstance(task, DPOTask):
            reference = model if ref_model is None else ref_model.eval()
            self._log_probs = Losses(reference, CompletionTask(), place)

    def __call__(self, rows: list[Any]) -> dict[str, Any]:
        row = as_pair(self._collate(rows))
        if self._log_probs is not None:
            with adapter_off(self._adapted):
                row[REFERENCE] = self._log_probs(self._place(row)).view(1, 2)
        return row


@contextmanager
def adapter_off(model: Any) -> Iterator[None]:
    """Within the block a PEFT model is its base model; None, and models without adapters, stay as they are."""
    if model is None or not hasattr(model, "disable_adapter"):
        yield
        return
    trained = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        with model.disable_adapter():
            yield
    finally:
        # PEFT switches all of an adapter on.
        for parameter, requires_grad in trained:
            parameter.requires_grad_(requires_grad)
