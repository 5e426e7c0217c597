"""A row's bits in the passes of a run, by which it is told whether other rows reach it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cache, partial

import torch
from torch import Tensor

from peft_dpzero.estimation.differences import losses_at, points_together
from peft_dpzero.estimation.losses import Losses, MicroBatch
from peft_dpzero.modules import Call, watched
from peft_dpzero.perturbation.perturbation import Perturbation, Point

# A row's losses at each of its places (points, places); and of each module call a digest of what it put out for it at
# the first, and whether it did at all. The outputs themselves would take as much memory as training.
RowBits = tuple[Tensor, dict[Call, tuple[Tensor, Tensor]]]
# As wide as a float of so many bytes.
_INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


@torch.no_grad()
def row_bits(
    perturbation: Perturbation,
    losses: Losses,
    batches: Sequence[MicroBatch],
    places: Sequence[range],
    points: Sequence[Point],
) -> Iterator[RowBits]:
    """What a row gives in each batch."""
    together = points_together(losses, batches[0], perturbation, len(points))
    tried = points[: max(2, together)]
    # Its products are of labels, which may be as many as there are rows.
    head = losses.shortcuts.label_logits
    inside = set(head.module.modules()) if head else set()
    heads = {name for name, module in losses.model.named_modules() if module in inside}
    for batch, where in zip(batches, places, strict=True):
        rows, count = slice(where.start, where.stop, where.step), len(batch["input_ids"])
        with losses.over_one_micro_batch(batch) as restart:
            own = partial(_own, rows=rows, count=count)
            with perturbation.at(0, *points[0]), watched(losses.model, own) as seen:
                values = losses(batch)[None]
            restart()
            if together > 1 or losses.shortcuts.trunk is not None:
                (values,) = losses_at(losses, [batch], perturbation, 0, tried)
        yield values[:, rows], {call: made for call, made in seen.items() if made is not None and call[0] not in heads}


def _own(output: Tensor, rows: slice, count: int) -> tuple[Tensor, Tensor] | None:
    """A digest of what a module's output holds at the first of `rows`, and whether the others hold the same; None if it
    does not lie row by row, as what all rows share does not."""
    if output.ndim == 0 or len(output) != count:
        return None
    first = output[rows.start]
    return digest(first), (output[rows] == first).all()


def digest(values: Tensor) -> Tensor:
    """A number modulo 2⁶⁴ that tells tensors of one shape and dtype apart, but for chances of some 2⁻⁶³.

    Zeros of either sign are alike.
    """
    values = values + 0
    flat = (torch.view_as_real(values) if values.is_complex() else values).flatten()
    bits = flat.view(_INTEGERS[flat.element_size()]) if flat.is_floating_point() else flat
    factors = _factors().to(bits.device)
    digest = torch.zeros((), dtype=torch.int64, device=bits.device)
    for piece in torch.split(bits, len(factors) - 1):
        digest = digest * factors[-1] + (piece * factors[: len(piece)]).sum()
    return digest


@cache
def _factors() -> Tensor:
    """Odd numbers, so that no change of a single entry is lost."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(-(1 << 63), (1 << 63) - 1, ((1 << 16) + 1,), generator=generator) | 1


def all_alike(reference: RowBits, found: RowBits) -> bool:
    """Whether a row's losses, at the points that both have, and the outputs of the calls that both made are at each
    place those at the reference's first."""
    (wanted, wanted_outputs), (values, outputs) = reference, found
    points = min(len(wanted), len(values))
    if not bool((values[:points] == wanted[:points, :1]).all()):
        return False
    pairs = [(outputs[call], wanted_outputs[call][0]) for call in outputs.keys() & wanted_outputs.keys()]
    # One answer for all: each would keep a GPU waiting.
    return not pairs or bool(torch.stack([everywhere & (first == other) for (first, everywhere), other in pairs]).all())
