"""Forward passes: per-example losses of a model, and the ways to make several passes cost less.

Each of the `Shortcuts` gives the losses of the plain pass within float rounding, which `Probe` checks on made-up
tokens before it is used.
"""

from __future__ import annotations

import copy
import inspect
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap

from peft_dpzero.errors import DPZeroError
from peft_dpzero.estimation.shapes import may_have_company
from peft_dpzero.estimation.shortcuts.filled_rows import FilledLayers
from peft_dpzero.estimation.shortcuts.kept_trunk import KeptTrunk
from peft_dpzero.estimation.shortcuts.label_logits import OutputHead
from peft_dpzero.estimation.shortcuts.read_positions import NarrowedLayers
from peft_dpzero.estimation.shortcuts.stacked_attention import FoldedAttention
from peft_dpzero.estimation.shortcuts.trunk import SharedTrunk
from peft_dpzero.estimation.state import KeptState
from peft_dpzero.estimation.tasks import Task, TokenTask, labels_of, read_losses
from peft_dpzero.modules import unwrapped

MicroBatch = Mapping[str, Any]

# Points are stacked over a shared trunk while the widest output above it stays within this many entries, which is what
# a core's share of the cache holds (`benchmarks/stacking.py`). Elsewhere they are over a row that goes by itself
# while so many tokens make a pass cheaper than several, or while weights take longer to fetch than to use. On a GPU a
# pass of few tokens takes as long as one of many, but one over a stack takes twice as long to launch as one over a
# point.
STACKED_ENTRIES_ABOVE_TRUNK = 1 << 22
STACKED_TOKENS = 1024
STACKED_TOKENS_OFFLOADED = 1 << 13
STACKED_ENTRIES_ABOVE_TRUNK_ON_GPU = 1 << 26
STACKED_TOKENS_ON_GPU = 1 << 13
FEWEST_STACKED_ON_GPU = 4


@dataclass(frozen=True)
class Shortcuts:
    """What a pass may leave out.

    Attributes:
        trunk: activations that no direction changes are computed once a micro-batch.
        kept: and at the last place of them once a run for each row.
        label_logits: logits are made at label positions only. For tasks that read nothing else.
        read_positions: the last layers run at the positions only that losses read.
        filled_rows: layers over one vector a row run on a multiple of four rows.
        stacked: several points θ + s·z go through the model in one pass, a copy of the activations each from the first
            perturbed parameter on, so that frozen weights are read once.
        positions: of longer rows no points are stacked, since for them some models make a longer table in the pass;
            None sets no limit.
    """

    trunk: SharedTrunk | None = None
    kept: KeptTrunk | None = None
    label_logits: OutputHead | None = None
    read_positions: NarrowedLayers | None = None
    filled_rows: FilledLayers | None = None
    stacked: bool = False
    positions: int | None = None


PLAIN = Shortcuts()


class Losses:
    """Per-example losses of a model on micro-batches, without autograd.

    Args:
        model: in eval mode.
        task: how losses are read.
        place: moves a micro-batch to the model's device.
        shortcuts: those that give the plain pass's losses; by default none.
    """

    def __init__(
        self,
        model: nn.Module,
        task: Task,
        place: Callable[[MicroBatch], MicroBatch],
        shortcuts: Shortcuts = PLAIN,
    ) -> None:
        self.model = model
        self.task = task
        self.place = place
        self.shortcuts = shortcuts
        self._offloaded = any(parameter.is_meta for parameter in model.parameters())
        self._on_gpu = any(parameter.device.type not in ("cpu", "meta") for parameter in model.parameters())
        self._settings = {"use_cache": False} if _takes_use_cache(model) else {}
        self._state = KeptState(model)

    @torch.no_grad()
    def __call__(self, batch: MicroBatch) -> Tensor:
        """Losses of one micro-batch on its device, at the model's parameters: (b,) float64, on the CPU."""
        with self._state.kept():
            return self._losses(batch).to("cpu", torch.float64)

    def with_shortcuts(self, shortcuts: Shortcuts) -> Losses:
        """Those of the same model, read with these."""
        other = copy.copy(self)
        other.shortcuts = shortcuts
        return other

    def without_kept(self) -> Losses:
        """The same, and nothing is kept from step to step."""
        return self.with_shortcuts(replace(self.shortcuts, kept=None))

    @torch.no_grad()
    def prepare(self, micro_batches: Sequence[MicroBatch]) -> None:
        """Computes what is kept of rows for the whole run, and is not yet of those in a step's micro-batches."""
        if self.shortcuts.kept is not None:
            passes = [self._inputs(self.place(micro_batch)) for micro_batch in micro_batches]
            self.shortcuts.kept.fill(passes, self._run)

    @contextmanager
    def over_one_micro_batch(self, batch: MicroBatch) -> Iterator[Callable[[], None]]:
        """Within the block, in which passes are over this micro-batch, they share what no parameter changes.

        Yields: what to call before each pass.
        """
        kept, trunk = self.shortcuts.kept, self.shortcuts.trunk
        with (
            kept.given(self._inputs(batch)) if kept else nullcontext(),
            trunk.shared() if trunk else nullcontext(_nothing) as restart,
        ):
            yield restart

    @torch.no_grad()
    def stacked(self, batch: MicroBatch, parameters: Mapping[str, Tensor]) -> Tensor:
        """Losses of one micro-batch at P points, in one pass.

        Args:
            batch: on its device.
            parameters: by name, (P, …) each.

        Returns: (P, b) float64, on the CPU.
        """
        whole = _Pass(self.model, self._losses)
        values = {f"model.{name}": value for name, value in parameters.items()}
        folded = FoldedAttention() if self._on_gpu else nullcontext()
        with self._state.kept(), folded, warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*batching rule.*")
            losses = vmap(lambda point: functional_call(whole, point, (batch,)))(values)
        return torch.as_tensor(losses).to("cpu", torch.float64)

    @property
    def fewest_stacked(self) -> int:
        """Fewer points than these go through the model one after the other."""
        return FEWEST_STACKED_ON_GPU if self._on_gpu and not self._offloaded else 2

    def points_at_once(self, batch: MicroBatch) -> int:
        """How many points to stack over one micro-batch at most; 1 stacks none."""
        if not self.shortcuts.stacked:
            return 1
        ids, trunk = batch.get("input_ids"), self.shortcuts.trunk
        rows = next((v.shape[0] for v in batch.values() if isinstance(v, Tensor) and v.ndim), 1)
        tokens = ids.numel() if isinstance(ids, Tensor) else rows
        if rows and tokens // rows > (self.shortcuts.positions or tokens):
            return 1
        if self._offloaded:
            return STACKED_TOKENS_OFFLOADED // max(tokens, 1)
        if trunk is not None:
            entries = STACKED_ENTRIES_ABOVE_TRUNK_ON_GPU if self._on_gpu else STACKED_ENTRIES_ABOVE_TRUNK
            return entries // trunk.entries_above(rows, tokens)
        if self._on_gpu:
            return STACKED_TOKENS_ON_GPU // max(tokens, 1)
        return STACKED_TOKENS // max(tokens, 1) if rows == 1 and not may_have_company(batch) else 1

    def _losses(self, batch: MicroBatch) -> Tensor:
        inputs = self._inputs(batch)
        last, few = self.shortcuts.read_positions, self.shortcuts.filled_rows
        narrowed = last.narrowed(partial(self._positions, batch)) if last else nullcontext()
        with narrowed, few.filled() if few else nullcontext():
            losses = read_losses(self.task, self.model, inputs, batch, self.shortcuts.label_logits)
        if losses.ndim != 1:
            raise DPZeroError(
                f"The per-example loss has {losses.ndim} dimensions and must have one, (batch,): it must not be "
                "averaged over the batch."
            )
        return losses

    def _run(self, inputs: Mapping[str, Any]) -> None:
        with self._state.kept():
            self.model(**inputs)

    def _inputs(self, batch: MicroBatch) -> dict[str, Any]:
        return {**self.task.inputs(batch), **self._settings}

    def _positions(self, batch: MicroBatch, length: int) -> tuple[Tensor, Tensor] | None:
        """Where losses read in a pass, if that is as many positions of each row.

        A row's labels decide only if it always goes by itself.
        """
        if isinstance(self.task, TokenTask) and (len(labels_of(batch)) > 1 or may_have_company(batch)):
            return None
        return self.task.positions(batch, length)


class _Pass(nn.Module):
    """A model and the reading of its losses as one module, so that both meet the same parameters."""

    def __init__(self, model: nn.Module, read: Callable[[MicroBatch], Tensor]) -> None:
        super().__init__()
        self.model = model
        self.read = read

    def forward(self, batch: MicroBatch) -> Tensor:
        return self.read(batch)


def _nothing() -> None:
    """Without a trunk nothing has to be restarted."""


def _takes_use_cache(model: Any) -> bool:
    base = unwrapped(model)
    return "use_cache" in inspect.signature(base.forward).parameters
