"""Linear layers over one vector a row (a pooler, a classifier), at a number of rows that is a multiple of four.

Kernels work on four rows at a time and treat those that are left over in another way, so that a row's bits would depend
on how many rows there are. Four rows take as long as one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from peft_dpzero.modules import Forward, hooked, replaced_forwards

ROWS = 4


class FilledLayers:
    """Layers that map (b, in) → (b, out), each row by itself, and run on as many rows as `filled` says."""

    def __init__(self, modules: Sequence[nn.Module]) -> None:
        self.modules = tuple(modules)

    @contextmanager
    def filled(self) -> Iterator[None]:
        """Within the block zero rows fill up what the layers get."""
        with replaced_forwards({module: _filled(module.forward) for module in self.modules}):
            yield


def filled(rows: int) -> int:
    """The next multiple of four."""
    return -(-rows // ROWS) * ROWS


def layers_of_rows(model: nn.Module, run: Callable[[], object]) -> list[nn.Linear]:
    """The linear layers that get a matrix in `run`, a forward pass."""
    found: dict[nn.Linear, None] = {}

    def note(module: nn.Module, args: tuple[object, ...]) -> None:
        if len(args) == 1 and isinstance(args[0], Tensor) and args[0].ndim == 2:
            assert isinstance(module, nn.Linear)
            found[module] = None

    linear = [module for module in model.modules() if type(module) is nn.Linear]
    with hooked([module.register_forward_pre_hook(note) for module in linear]):
        run()
    return list(found)


def _filled(original: Forward) -> Forward:
    def forward(x: Tensor) -> Tensor:
        missing = filled(len(x)) - len(x) if x.ndim == 2 else 0
        if not missing:
            return torch.as_tensor(original(x))
        return torch.as_tensor(original(torch.cat([x, x.new_zeros(missing, x.shape[1])])))[: len(x)]

    return forward
