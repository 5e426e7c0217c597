"""Rows' own gradients, by Opacus's hooks."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from opacus import GradSampleModule
from torch import Tensor, nn

from ..models import Row, Start


@contextmanager
def own_gradients(start: Start) -> Iterator[Any]:
    """Within the block the yielded module gives each trainable parameter a `grad_sample` (b, …)."""
    warnings.filterwarnings("ignore", module="opacus")
    in_training_mode(start.model)
    module = GradSampleModule(start.model, loss_reduction="sum")
    try:
        yield module
    finally:
        module.to_standard_module()
        start.model.eval()


def in_training_mode(model: nn.Module) -> None:
    """Hooks work in training mode only; dropout stays off, as for all methods."""
    model.train()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0


def row_gradients(start: Start, module: Any, rows: list[Row], names: tuple[str, ...]) -> Iterator[Tensor]:
    """The gradients of some rows at a time, of the parameters `names` one after another: (b, d)."""
    parameters = start.parameters
    for batch in start.batches(rows):
        module.zero_grad(set_to_none=True)
        start.losses(batch, module).sum().backward()
        yield torch.cat([parameters[name].grad_sample.flatten(1) for name in names], dim=1)
    module.zero_grad(set_to_none=True)
    for parameter in parameters.values():
        parameter.grad_sample = None
