"""Which shortcuts a model allows: each is tried on made-up tokens and kept if the losses stay the plain pass's."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from peft_dpzero.checks.architectures import positions_of, reason_to_separate
from peft_dpzero.estimation.differences import losses_at
from peft_dpzero.estimation.losses import PLAIN, Losses, MicroBatch, Shortcuts
from peft_dpzero.estimation.shapes import stacked_rows
from peft_dpzero.estimation.shortcuts.filled_rows import FilledLayers, layers_of_rows
from peft_dpzero.estimation.shortcuts.kept_trunk import KeptTrunk, find_kept
from peft_dpzero.estimation.shortcuts.label_logits import OutputHead
from peft_dpzero.estimation.shortcuts.last_attention import LastAttention, last_attention
from peft_dpzero.estimation.shortcuts.read_positions import NarrowedLayers, find_narrowed, last_modules
from peft_dpzero.estimation.shortcuts.trunk import SharedTrunk
from peft_dpzero.estimation.tasks import FunctionTask, Task, TokenTask
from peft_dpzero.estimation.verbalizer import Verbalizer
from peft_dpzero.perturbation.perturbation import Perturbation, Point
from peft_dpzero.perturbation.streaming import streamable_parameters

logger = logging.getLogger(__name__)

# How far parameters are moved: enough to show in float32 logits whatever the adapter.
SCALE = 0.1
# A smaller share of the model than this is not worth keeping.
_WORTHWHILE_TRUNK = 0.1
# How far stacking may change a loss, in what a pass of another shape does, and at most in tolerances.
_ROUNDING, _MOST_ROUNDING = 4, 30
_POINTS: list[Point] = [(0, SCALE), (1, -SCALE)]


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
        self._losses = Losses(model, task, dict)
        self._batch = batch
        self._lone = lone
        self._tolerance = tolerance
        self._plain, self._plain_alone = self.losses(PLAIN), self.losses(PLAIN, batch=lone)
        # What labels decide is read of rows only that always go alone.
        alone = isinstance(task, TokenTask)
        self._narrowable, self._plain_narrowable = (lone, self._plain_alone) if alone else (batch, self._plain)

    def losses(
        self, shortcuts: Shortcuts, points: Sequence[Point] = _POINTS, batch: MicroBatch | None = None
    ) -> Tensor | None:
        """(points, b) float64 of the batch, or of another; None if the pass fails."""
        batch = batch or self._batch
        if "labels" not in batch:
            return None
        losses = self._losses.with_shortcuts(shortcuts)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                losses.prepare([batch])
                return losses_at(losses, [batch], self.perturbation, 0, points)[0]
        except Exception as error:
            logger.info("A faster pass is not used: %s on made-up tokens.", type(error).__name__)
            return None

    def agree(self, shortcuts: Shortcuts) -> bool:
        """Whether the losses are the plain pass's."""
        return self._near(self.losses(shortcuts), self._plain)

    def agree_stacked(self, shortcuts: Shortcuts) -> bool:
        """Whether the losses are the plain pass's, of rows together and of one by itself, at points enough to stack.

        A stack is a pass of another shape, which rounds otherwise: in half precision by much.
        """
        tolerance = min(max(self._tolerance, _ROUNDING * self._rounding), _MOST_ROUNDING * self._tolerance)
        tried = zip((self._batch, self._lone), self._plain_at_stacks, strict=True)
        return all(self._near(self.losses(shortcuts, self._stack, batch), plain, tolerance) for batch, plain in tried)

    def agree_narrowed(
        self, shortcuts: Shortcuts, modules: Sequence[nn.Module], attention: LastAttention | None = None
    ) -> bool:
        """Whether the losses are the plain pass's, whatever `modules` and `attention` put out where no loss reads.

        Small models hide in a tolerance what large values there change, so that these must not change a bit.
        """
        quiet, loud = (
            self.losses(replace(shortcuts, read_positions=layers), _POINTS[:1], self._narrowable)
            for layers in (NarrowedLayers(modules, attention), NarrowedLayers(modules, attention, loud=True))
        )
        if quiet is None or loud is None or self._plain_narrowable is None:
            return False
        return torch.equal(quiet, loud) and self._near(quiet, self._plain_narrowable[:1])

    def agree_kept(self, shortcuts: Shortcuts, kept: KeptTrunk) -> bool:
        """Whether no bit of the losses changes by what is kept."""
        keeping = replace(shortcuts, kept=kept)
        plain = self.losses(shortcuts)
        if plain is None or self.losses(keeping) is None:
            return False
        # What a model notes in a pass, to use it further up, is of other rows from here on.
        others = {**self._batch, "input_ids": self._batch["input_ids"].roll(1, dims=1)}
        with torch.no_grad():
            self.model(**self.task.inputs(others))
        found = self.losses(keeping)
        return found is not None and torch.equal(plain, found)

    @cached_property
    def _stack(self) -> list[Point]:
        """As few points as are stacked at all."""
        return [(k, SCALE) for k in range(self._losses.fewest_stacked)]

    @cached_property
    def _plain_at_stacks(self) -> list[Tensor | None]:
        return [self.losses(PLAIN, self._stack, batch) for batch in (self._batch, self._lone)]

    @cached_property
    def _rounding(self) -> float:
        """How far losses are apart from those in a pass of another shape, over all rows twice."""
        rows = len(self._batch["input_ids"])
        twice = self.losses(PLAIN, batch=stacked_rows([dict(self._batch)] * 2)) if rows > 1 else None
        return 0.0 if self._plain is None or twice is None else float((twice[:, :rows] - self._plain).abs().max())

    def _near(self, losses: Tensor | None, plain: Tensor | None, tolerance: float | None = None) -> bool:
        if losses is None or plain is None:
            return False
        return torch.allclose(losses, plain, rtol=1e-4, atol=tolerance or self._tolerance)


def find_shortcuts(trials: Trials, trunk: SharedTrunk | None, run: Callable[[], Any]) -> Shortcuts:
    """The cheapest passes that give the plain ones' losses.

    Only known architectures are narrowed: what others do with places that no loss reads can depend on a row's length.

    Args:
        trunk: known to be sharable, or None.
        run: one forward pass on made-up tokens.
    """
    model = trials.model
    found = replace(PLAIN, positions=positions_of(model))
    reads_labels_only = type(trials.task) in (TokenTask, Verbalizer)
    if reads_labels_only and (head := OutputHead.of(model)) is not None:
        found = _with(trials, found, label_logits=head)
        if found.label_logits is None:
            logger.info("Logits are made at all positions: this model's head does more than project.")
    if type(trials.task) is not FunctionTask and reason_to_separate(model, trials.task) is None:
        found = replace(found, read_positions=_narrowed(trials, found, run))
        if layers := layers_of_rows(model, run):
            found = _with(trials, found, filled_rows=FilledLayers(layers))
    stacked = replace(found, stacked=True)
    if trials.perturbation.most_stacked > 1 and trials.agree_stacked(stacked):
        found = stacked
    if trunk is None:
        return found
    trunk.measure(lambda: trials.losses(found, _POINTS[:1]), lambda: trials.losses(found, _POINTS[1:]))
    shared = _with(trials, found, trunk=trunk)
    if shared.trunk is None or (shared.stacked and not trials.agree_stacked(shared)):
        shared = replace(found, trunk=trunk, stacked=False)
    if any(parameter.device.type != "cpu" for parameter in model.parameters()):
        return shared
    kept = find_kept(trunk, run, lambda kept: trials.agree_kept(shared, kept), trials.task.sequences)
    return replace(shared, kept=kept)


def _narrowed(trials: Trials, shortcuts: Shortcuts, run: Callable[[], Any]) -> NarrowedLayers | None:
    """The last layers, and the last attention if they reach down to it, that can run where losses read."""
    held_back = {shortcuts.label_logits.module} if shortcuts.label_logits else set()
    tried = [module for module in last_modules(trials.model, run) if held_back.isdisjoint(module.modules())]
    layers = find_narrowed(tried, lambda modules: trials.agree_narrowed(shortcuts, modules))
    attention = last_attention(trials.model, lambda: trials.losses(shortcuts, _POINTS[:1])) if layers else None
    ways = (replace(attention, hands_over=True), attention, replace(attention, values=None)) if attention else ()
    for asked in ways:
        if trials.agree_narrowed(shortcuts, layers, asked):
            return _with_queries(trials, shortcuts, layers, asked, tried)
    return NarrowedLayers(layers) if layers else None


def _with_queries(
    trials: Trials,
    shortcuts: Shortcuts,
    layers: Sequence[nn.Module],
    attention: LastAttention,
    tried: Sequence[nn.Module],
) -> NarrowedLayers:
    """Those of `tried`, too, that can be narrowed since the attention is asked at few places, as that of queries."""
    done = {attention.values, *layers}.union(*(layer.modules() for layer in layers))
    before = [module for module in tried if module not in done]
    more = find_narrowed(before, lambda some: trials.agree_narrowed(shortcuts, [*layers, *some], attention))
    return NarrowedLayers([*layers, *more], attention)


def _with(trials: Trials, shortcuts: Shortcuts, **more: Any) -> Shortcuts:
    trial = replace(shortcuts, **more)
    return trial if trials.agree(trial) else shortcuts


@torch.no_grad()
def find_streamed(perturbation: Perturbation, run: Callable[[], Tensor]) -> frozenset[str]:
    """The parameters that can be streamed: none if they are few, or if streaming changes `run`'s output.

    Args:
        run: one forward pass on public, made-up input.
    """
    if not perturbation.is_large:
        return frozenset()
    plain = run()
    model = perturbation.model
    trial = Perturbation(model, streamed=streamable_parameters(model, perturbation.parameters, run))
    try:
        # θ + 0·z is θ: only a read outside the owner's call, where the parameter is empty, makes a difference.
        with trial.at(0, 0, 0.0):
            output = run()
    except Exception as error:
        logger.info("Parameters are perturbed as a whole: %s reads some outside their module.", type(error).__name__)
        return frozenset()
    same = output.shape == plain.shape and torch.allclose(output, plain, rtol=1e-5, atol=1e-6)
    return trial.streamed if same else frozenset()


def find_trunk(model: nn.Module, perturbation: Perturbation, run: Callable[[], Tensor]) -> SharedTrunk | None:
    """The activations that directions can share, or None if there are few or sharing changes the output."""

    def there() -> Tensor:
        with perturbation.at(0, 0, SCALE):
            return run()

    trunk = SharedTrunk(model, run, there)
    if trunk.share < _WORTHWHILE_TRUNK:
        return None
    plain = there()
    with trunk.shared() as restart:
        run()
        for _ in range(2):
            restart()
            shared = there()
    if not torch.allclose(plain, shared, rtol=1e-5, atol=1e-6):
        logger.info("Activations are not shared between directions: this model changes them in place.")
        return None
    return trunk
