"""The model at θ + s·z, with θ itself never written.

A perturbed copy takes the place of each parameter's storage and the original is put back by reference, so the
restore is exact bit for bit, also after an exception or Ctrl-C, and no arithmetic can drift.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from peft_dpzero.directions import Directions
from peft_dpzero.errors import DPZeroError

# Directions of a step are kept while they are together below this many entries (16 MiB of float32).
KEPT_ENTRIES = 1 << 22


class Perturbation:
    """The perturbed parameters θ of a model: those with `requires_grad`, each storage once.

    Arithmetic is in float32 (float64 for float64 parameters). A half-precision parameter is perturbed from its
    float32 value and rounded once; its float32 master copy is the optimizer's affair.

    Args:
        model: the model; its trainable parameters are θ.
        seed: public direction seed.
        distribution: see `Directions`.

    Raises:
        DPZeroError: no parameter has `requires_grad`, or one lies on the meta device.
    """

    def __init__(self, model: nn.Module, seed: int = 0, distribution: str = "gaussian") -> None:
        self.parameters: dict[str, nn.Parameter] = {
            name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad
        }
        if not self.parameters:
            raise DPZeroError(
                "The model is frozen: no parameter has requires_grad. Add an adapter with "
                "peft.get_peft_model, or call requires_grad_() on the parameters to tune."
            )
        for name, parameter in self.parameters.items():
            if parameter.is_meta:
                raise DPZeroError(f"Parameter {name} is offloaded (meta device): keep what is trained in memory.")
        self.directions = Directions(self.parameters.items(), seed, distribution)
        self._kept_step = -1
        self._kept_entries = 0
        self._kept: dict[tuple[int, str], Tensor] = {}

    def z(self, step: int, direction: int, name: str) -> Tensor:
        """z of one parameter, on the parameter's device: float32, the parameter's shape."""
        if step != self._kept_step:
            self._kept.clear()
            self._kept_step, self._kept_entries = step, 0
        key = (direction, name)
        if key in self._kept:
            return self._kept[key]
        z = self.directions.entry(step, direction, name).to(self.parameters[name].device)
        if self._kept_entries + z.numel() <= KEPT_ENTRIES:
            self._kept[key] = z
            self._kept_entries += z.numel()
        return z

    @contextmanager
    def at(self, step: int, direction: int, scale: float) -> Iterator[None]:
        """Within the block the model is at θ + scale·z; afterwards it is at θ, bit for bit."""
        with self._replaced(lambda name: self.z(step, direction, name).mul(scale)):
            yield

    @contextmanager
    def _replaced(self, shift: Callable[[str], Tensor]) -> Iterator[None]:
        originals = {name: parameter.data for name, parameter in self.parameters.items()}
        try:
            for name, parameter in self.parameters.items():
                parameter.data = shifted(originals[name], shift(name))
            yield
        finally:
            for name, parameter in self.parameters.items():
                parameter.data = originals[name]


def shifted(value: Tensor, shift: Tensor) -> Tensor:
    """value + shift in at least float32, in `value`'s dtype."""
    wide = torch.promote_types(value.dtype, torch.float32)
    return value.to(wide).add(shift.to(wide)).to(value.dtype)
