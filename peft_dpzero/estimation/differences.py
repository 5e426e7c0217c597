"""Per-unit loss differences along random directions: equations (3) and (4) of the step."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from peft_dpzero.errors import DPZeroError
from peft_dpzero.estimation.losses import Task
from peft_dpzero.estimation.trunk import SharedTrunk
from peft_dpzero.mechanism.private_sum import PrivateDifferences
from peft_dpzero.perturbation import Perturbation

MicroBatch = Mapping[str, Any]


class Losses:
    """Per-example losses of a model on micro-batches, without autograd.

    Args:
        model: in eval mode.
        task: how losses are read.
        place: moves a micro-batch to the model's device.
        trunk: activations to share between passes over one micro-batch, or None.
    """

    def __init__(
        self,
        model: nn.Module,
        task: Task,
        place: Callable[[MicroBatch], MicroBatch],
        trunk: SharedTrunk | None = None,
    ) -> None:
        self.model = model
        self.task = task
        self.place = place
        self.trunk = trunk

    @torch.no_grad()
    def __call__(self, batch: MicroBatch) -> Tensor:
        """Losses of one micro-batch on its device: (b,) float64, on the CPU."""
        losses = self.task.losses(self.model(**self.task.inputs(batch)), batch)
        if losses.ndim != 1:
            raise DPZeroError(
                f"The per-example loss has {losses.ndim} dimensions and must have one, (batch,): it must not be "
                "averaged over the batch."
            )
        return losses.to("cpu", torch.float64)


def estimate_differences(
    losses: Losses,
    batches: Sequence[MicroBatch],
    perturbation: Perturbation,
    *,
    step: int,
    num_directions: int,
    smoothing_parameter: float,
    difference: str,
) -> PrivateDifferences:
    """d_ik = (ℓ_i(θ+λz_k) − ℓ_i(θ−λz_k)) / 2λ, or (ℓ_i(θ+λz_k) − ℓ_i(θ)) / λ for forward differences.

    Returns: the differences of this process's units, (n, K) float64, sealed.
    """
    scale = smoothing_parameter
    rows: list[Tensor] = []
    totals: list[Tensor] = []
    # With a shared trunk a micro-batch meets all directions before the next one; without, a direction meets all
    # micro-batches, so that parameters are perturbed least often.
    groups = [[batch] for batch in batches] if losses.trunk else [list(batches)] if batches else []
    for group in groups:
        placed = [losses.place(batch) for batch in group]

        def losses_at(direction: int, shift: float, placed: list[MicroBatch] = placed) -> Tensor:
            with perturbation.at(step, direction, shift):
                return torch.cat([losses(batch) for batch in placed])

        with losses.trunk.shared() if losses.trunk else nullcontext():
            if difference == "forward":
                base = torch.cat([losses(batch) for batch in placed])
                columns = [(losses_at(k, scale) - base) / scale for k in range(num_directions)]
                totals.append(base)
            else:
                columns = []
                for k in range(num_directions):
                    plus, minus = losses_at(k, scale), losses_at(k, -scale)
                    columns.append((plus - minus) / (2 * scale))
                    totals.append((plus + minus) / (2 * num_directions))
        rows.append(torch.stack(columns, dim=1))
    differences = torch.cat(rows) if rows else torch.zeros(0, num_directions, dtype=torch.float64)
    return PrivateDifferences(differences, loss_sum=float(sum(total.sum() for total in totals)))
