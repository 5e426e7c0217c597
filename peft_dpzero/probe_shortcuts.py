"""Which shortcuts a model allows: each is tried on made-up tokens and kept if the losses stay the plain pass's."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from peft_dpzero.architectures import reason_to_separate
from peft_dpzero.estimation.differences import losses_at
from peft_dpzero.estimation.filling import FilledLayers, layers_of_rows
from peft_dpzero.estimation.logits import OutputHead
from peft_dpzero.estimation.losses import FunctionTask, Task, TokenTask
from peft_dpzero.estimation.merging import MergedLora
from peft_dpzero.estimation.narrowing import NarrowedLayers, find_narrowed, last_modules
from peft_dpzero.estimation.passes import PLAIN, Losses, MicroBatch, Shortcuts
from peft_dpzero.estimation.trunk import SharedTrunk
from peft_dpzero.estimation.verbalizer import Verbalizer
from peft_dpzero.perturbation import Perturbation, Point

logger = logging.getLogger(__name__)

_POINTS: list[Point] = [(0, 0.1), (1, -0.1)]


class Trials:
    """Losses of one made-up micro-batch, at two points, with whatever shortcuts.

    Args:
        model: in eval mode.
        task: the run's.
        batch: without labels nothing can be told, and all trials fail.
        lone: a row by itself, without padding.
        perturbation: makes the points.
        tolerance: absolute, of losses.
    """

    def __init__(
        self,
        model: nn.Module,
        task: Task,
        batch: MicroBatch,
        lone: MicroBatch,
        perturbation: Perturbation,
        tolerance: float,
    ) -> None:
        self.model = model
        self.task = task
        self.perturbation = perturbation
        self._batch = batch
        self._lone = lone
        self._tolerance = tolerance
        # What labels decide is read of rows only that always go alone.
        self._narrowable = lone if isinstance(task, TokenTask) else batch
        self._plain = self.losses(PLAIN)

    def losses(
        self, shortcuts: Shortcuts, points: Sequence[Point] = _POINTS, batch: MicroBatch | None = None
    ) -> Tensor | None:
        """(points, b) float64 of the batch, or of another; None if the pass fails."""
        batch = batch or self._batch
        if "labels" not in batch:
            return None
        losses = Losses(self.model, self.task, dict, shortcuts)
        try:
            with warnings.catch_warnings(action="ignore"):
                return losses_at(losses, [batch], self.perturbation, 0, points)[0]
        except Exception as error:
            logger.info("A faster pass is not used: %s on made-up tokens.", type(error).__name__)
            return None

    def agree(self, shortcuts: Shortcuts) -> bool:
        """Whether the losses are the plain pass's."""
        losses = self.losses(shortcuts)
        return losses is not None and self._plain is not None and self._near(losses, self._plain)

    def agree_alone(self, shortcuts: Shortcuts) -> bool:
        """Whether the losses of a row by itself are the plain pass's."""
        losses, plain = self.losses(shortcuts, batch=self._lone), self.losses(PLAIN, batch=self._lone)
        return losses is not None and plain is not None and self._near(losses, plain)

    def agree_narrowed(self, shortcuts: Shortcuts, modules: Sequence[nn.Module]) -> bool:
        """Whether the losses are the plain pass's, whatever `modules` put out where no loss reads.

        Small models hide in a tolerance what large values there change, so that these must not change a bit.
        """
        quiet, loud = (
            self.losses(replace(shortcuts, last=NarrowedLayers(modules, loud)), _POINTS[:1], self._narrowable)
            for loud in (False, True)
        )
        plain = self.losses(PLAIN, _POINTS[:1], self._narrowable)
        if quiet is None or loud is None or plain is None:
            return False
        return torch.equal(quiet, loud) and self._near(quiet, plain)

    def _near(self, losses: Tensor, plain: Tensor) -> bool:
        return torch.allclose(losses, plain, rtol=1e-4, atol=self._tolerance)


def find_shortcuts(trials: Trials, trunk: SharedTrunk | None, run: Callable[[], Any]) -> Shortcuts:
    """The cheapest passes that give the plain ones' losses.

    Only known architectures are narrowed: what others do with places that no loss reads can depend on a row's length.

    Args:
        trunk: known to be sharable, or None.
        run: one forward pass on made-up tokens.
    """
    model, found = trials.model, PLAIN
    reads_labels_only = type(trials.task) in (TokenTask, Verbalizer)
    if reads_labels_only and (head := OutputHead.of(model)) is not None:
        found = _with(trials, found, head=head)
        if found.head is None:
            logger.info("Logits are made at all positions: this model's head does more than project.")
    if (lora := MergedLora(model)).layers and trials.agree(replace(found, lora=MergedLora(model, always=True))):
        found = replace(found, lora=lora)
    if type(trials.task) is not FunctionTask and reason_to_separate(model, trials.task) is None:
        head_module = found.head.module if found.head else None
        tried = [module for module in last_modules(model, run) if module is not head_module]
        narrowed = find_narrowed(tried, lambda modules: trials.agree_narrowed(found, modules))
        found = replace(found, last=NarrowedLayers(narrowed) if narrowed else None)
        if layers := layers_of_rows(model, run):
            found = _with(trials, found, few=FilledLayers(layers))
    if trials.perturbation.most_stacked > 1 and trials.agree_alone(stacked := replace(found, stacks=True)):
        found = stacked
    if trunk is None:
        return found
    shared = _with(trials, found, trunk=trunk)
    return shared if shared.trunk else replace(found, trunk=trunk, stacks=False)


def _with(trials: Trials, shortcuts: Shortcuts, **more: Any) -> Shortcuts:
    trial = replace(shortcuts, **more)
    return trial if trials.agree(trial) else shortcuts
