"""A basis for directions from public text: where the model's own outputs are sensitive to what is trained.

The gradient of a row's loss, whoever's it is, lies mostly in the span of the gradients of the model's outputs on other
text of its kind. The top eigenvectors of those, from some hundred public texts, hold most of a private gradient in some
dozen coordinates; as many random ones would hold next to nothing. Backward passes touch public text only.
(Public subspaces for DP-SGD: arXiv 2007.03813; with forward passes, PAZO: arXiv 2511.10859.)
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers.utils.logging import tqdm

from peft_dpzero.config import MOST_VECTORS
from peft_dpzero.errors import DPZeroError
from peft_dpzero.estimation.losses import MicroBatch
from peft_dpzero.estimation.shortcuts.label_logits import OutputHead
from peft_dpzero.estimation.tasks import LabelPositionTask, Task, read_losses
from peft_dpzero.modules import with_precision
from peft_dpzero.perturbation.basis import Basis

logger = logging.getLogger(__name__)

# Texts for each vector of the basis.
_TEXTS_A_VECTOR = 4
# Entries of all gradients together: 2 GiB of float32.
_MOST_ENTRIES = 1 << 29
# So many entries of each gradient are widened at once.
_COLUMNS = 1 << 12
# Directions with a smaller share of the largest one's energy are rounding.
_SMALLEST_SHARE = 1e-9
# Vectors grow as the energy falls, by this power of it: halfway to a basis along which outputs are equally sensitive.
# Without that, noise moves the few strong coordinates and leaves the many weak ones where they were.
_STRETCH = -0.25
# The weakest grow ten times at most.
_STRETCHED_SHARE = 1e-4
# Losses that differ by less of their size are the same.
_ROUNDING, _ROUNDING_HALF = 1e-4, 1e-2
_PATIENCE = 5


def find_basis(
    model: nn.Module,
    task: Task,
    rows: Sequence[Mapping[str, Any]],
    collate: Callable[[list[Any]], Mapping[str, Any]],
    place: Callable[[MicroBatch], MicroBatch],
    size: int,
    until: float | None = None,
    fewest: int | None = None,
) -> Basis:
    """The top eigenvectors of the gradients of public rows' losses.

    It leaves out trainable parameters that no loss moves at first (LoRA's A while B is 0): they stay as they are.

    Args:
        model: as training starts.
        task: how losses are read.
        rows: public rows with labels (`public_rows`), which may be made up.
        collate: makes a micro-batch of a row.
        place: moves it to the model's device.
        size: r; fewer vectors come back if the gradients span fewer.
        until: when there are enough gradients, by `time.monotonic`, if there are `fewest`.
        fewest: vectors that do where memory or time are short; by default `size`.

    Raises:
        DPZeroError: no parameter moves the losses, or there are too many for a basis of this size.
    """
    if not 1 <= size <= MOST_VECTORS:
        raise DPZeroError(f"basis_size must lie between 1 and {MOST_VECTORS}, got {size}.")
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    entries, fewest = sum(p.numel() for p in parameters.values()), fewest or size
    size = min(size, _MOST_ENTRIES // (_TEXTS_A_VECTOR * entries))
    if size < fewest:
        raise DPZeroError(
            f"A basis of {fewest} vectors over {entries:,} trainable parameters takes too much memory: lower "
            "basis_size, or train fewer parameters (a smaller LoRA rank, fewer layers)."
        )
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))[: _TEXTS_A_VECTOR * size].tolist()
    gradients: dict[str, Tensor] = {}  # of those that are not always 0: [texts, d_i]
    model.eval()
    read: Callable[[MicroBatch], Tensor] | None = None
    done = 0
    for chosen in tqdm(order, desc="Public gradients", delay=_PATIENCE):
        if until is not None and done >= fewest and time.monotonic() > until:
            logger.info("Time for the basis is over after %d of %d texts.", done, len(order))
            break
        row = place(collate([dict(rows[chosen])]))
        read = read or _reader(model, task, row)
        with torch.enable_grad():
            loss = read(row).sum()
            made = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
        if not loss.isfinite():  # as without the mask token that a verbalizer reads
            continue
        for name, gradient in zip(parameters, made, strict=True):
            if gradient is not None and (name in gradients or bool(gradient.any())):
                if name not in gradients:
                    gradients[name] = torch.zeros(len(order), gradient.numel())
                gradients[name][done] = gradient.flatten()
        done += 1
    moved = [name for name in parameters if name in gradients]
    if not moved:
        raise DPZeroError(
            "No trainable parameter moves the loss on public_text: is the adapter active?"
            if done
            else "No text of public_text has a loss: for label words, add your rows' prompt to each, mask token too."
        )
    return Basis.of(_top_vectors([gradients[name][:done] for name in moved], size), moved)


@torch.no_grad()
def _reader(model: nn.Module, task: Task, batch: MicroBatch) -> Callable[[MicroBatch], Tensor]:
    """How a micro-batch's losses are read: from the logits at labels alone, if that gives those of `batch`."""

    def reader(head: OutputHead | None) -> Callable[[MicroBatch], Tensor]:
        return lambda batch: read_losses(task, model, task.inputs(batch), batch, head)

    whole, head = reader(None), OutputHead.of(model)
    if head is None or not isinstance(task, LabelPositionTask):
        return whole
    at_labels = reader(head)
    losses, precise = with_precision(model, lambda: whole(batch))
    rounding = _ROUNDING if precise else _ROUNDING_HALF
    try:
        return at_labels if torch.allclose(at_labels(batch), losses, rtol=rounding) else whole
    except Exception as error:  # Not every model calls its head.
        logger.info("Logits are made at all positions: %s without.", type(error).__name__)
        return whole


def _top_vectors(parts: Sequence[Tensor], size: int) -> Tensor:
    """The first right singular vectors of [parts[0], parts[1], …], each (m, d_i), stretched: (r, d) float32."""
    gram = torch.zeros(len(parts[0]), len(parts[0]), dtype=torch.float64)  # [m, m]
    for part in parts:
        for start in range(0, part.shape[1], _COLUMNS):
            wide = part[:, start : start + _COLUMNS].double()
            gram.addmm_(wide, wide.T)
    energies, left = torch.linalg.eigh(gram)
    energies, left = energies.flip(0)[:size], left.flip(1)[:, :size]
    kept = int((energies > _SMALLEST_SHARE * energies[0]).sum())
    logger.info("A basis of %d vectors holds %.0f %%.", kept, 100 * float(energies.sum() / gram.trace()))
    shares = (energies[:kept] / energies[0]).clamp(min=_STRETCHED_SHARE)
    lengths = (shares / shares[-1]) ** _STRETCH  # the longest 1
    scaled = (left[:, :kept] * lengths / energies[:kept].sqrt()).float().T  # [r, m]
    return torch.cat([scaled @ part for part in parts], dim=1)
