"""Per-unit loss differences along random directions: equations (3) and (4) of the step."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from peft_dpzero.errors import DPZeroError
from peft_dpzero.estimation.batching import LogicalBatch
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
    batch: LogicalBatch,
    perturbation: Perturbation,
    *,
    step: int,
    num_directions: int,
    smoothing_parameter: float,
    difference: str,
) -> PrivateDifferences:
    """d_ik = (ℓ_i(θ+λz_k) − ℓ_i(θ−λz_k)) / 2λ, or (ℓ_i(θ+λz_k) − ℓ_i(θ)) / λ for forward differences.

    Returns: the differences (n, K) and losses (n,) of this process's units, float64, sealed. A unit's are the means
    over its rows.
    """
    scale = smoothing_parameter
    micro_batches = list(batch.micro_batches)
    differences: list[Tensor] = []
    means: list[Tensor] = []
    # With a shared trunk a micro-batch meets all directions before the next one; without, a direction meets all
    # micro-batches, so that parameters are perturbed least often.
    groups = [[one] for one in micro_batches] if losses.trunk else [micro_batches] if micro_batches else []
    for group in groups:
        placed = [losses.place(one) for one in group]

        def losses_at(direction: int, shift: float, placed: list[MicroBatch] = placed) -> Tensor:
            with perturbation.at(step, direction, shift):
                return torch.cat([losses(one) for one in placed])

        with losses.trunk.shared() if losses.trunk else nullcontext():
            if difference == "forward":
                base = torch.cat([losses(one) for one in placed])
                columns = [(losses_at(k, scale) - base) / scale for k in range(num_directions)]
                means.append(base)
            else:
                sides = [(losses_at(k, scale), losses_at(k, -scale)) for k in range(num_directions)]
                columns = [(plus - minus) / (2 * scale) for plus, minus in sides]
                means.append(sum((plus + minus for plus, minus in sides), torch.zeros(())) / (2 * num_directions))
        differences.append(torch.stack(columns, dim=1))
    if not differences:
        return PrivateDifferences(torch.zeros(0, num_directions, dtype=torch.float64))
    mean = partial(_mean_by_owner, owners=batch.owners, num_units=batch.num_units)
    return PrivateDifferences(mean(torch.cat(differences)), mean(torch.cat(means)))


def _mean_by_owner(rows: Tensor, owners: Tensor, num_units: int) -> Tensor:
    """Means of `rows` (r, …) over the rows of each unit: (num_units, …)."""
    counts = torch.bincount(owners, minlength=num_units).to(rows.dtype)
    totals = rows.new_zeros(num_units, *rows.shape[1:]).index_add(0, owners, rows)
    return totals / counts.view(-1, *(1,) * (rows.ndim - 1))
