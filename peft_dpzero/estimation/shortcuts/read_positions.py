"""The last layers, at the positions that losses read.

After the last attention every layer works on each token by itself, and a loss reads few of them: a classifier's first
token, a prompt's label position. Linear layers, norms and activations there need not run on the others, whose outputs
are the read position's instead, or zeros if there are several. Each row keeps a line of its own, with as many positions
as any other's. Which modules these are is found by trying, on made-up tokens, among types that are known to work token
by token. They run on a multiple of four lines, as in `filled_rows.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from peft.tuners.lora import Linear as LoraLinear
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from peft_dpzero.estimation.shortcuts.filled_rows import filled
from peft_dpzero.modules import Forward, base_layer, hooked, replaced_forwards

# (length of the outputs) → rows and positions that are read, both (n,), row by row and as many of each; None for all.
Positions = Callable[[int], tuple[Tensor, Tensor] | None]

# Rows and positions that are read: (b, positions) each, with rows to fill up.
_Places = tuple[Tensor, Tensor]

# Modules in a row that cannot be narrowed, after which no earlier one is tried.
PATIENCE = 6
# Narrowing costs a gathering and a scattering: not worth it if more than this share of the tokens is read.
WORTHWHILE = 0.5


class NarrowedLayers:
    """Modules that run on the positions that are read only.

    Args:
        modules: each maps (b, l, …) → (b, l, …), and its output elsewhere has no part in what is read.
        loud: the output elsewhere is large, not zero: in a test nothing that is read may change by it, not by a bit.
    """

    def __init__(self, modules: Sequence[nn.Module], loud: bool = False) -> None:
        self.modules = tuple(modules)
        self.loud = loud

    @contextmanager
    def narrowed(self, positions: Positions) -> Iterator[None]:
        """Within the block, for one pass, the modules skip what is not read."""
        places: dict[torch.Size, _Places | None] = {}

        def read_places(shape: torch.Size) -> _Places | None:
            if shape not in places:
                read = positions(shape[1])
                if read is None or len(read[0]) % shape[0] or len(read[0]) > WORTHWHILE * shape.numel():
                    places[shape] = None
                else:
                    places[shape] = _with_more(read[0].view(shape[0], -1)), _with_more(read[1].view(shape[0], -1))
            return places[shape]

        with replaced_forwards({module: self._narrowed(module.forward, read_places) for module in self.modules}):
            yield

    def _narrowed(self, original: Forward, read_places: Callable[[torch.Size], _Places | None]) -> Forward:
        def forward(x: Any, *args: Any, **kwargs: Any) -> Any:
            alone = isinstance(x, Tensor) and x.ndim == 3 and not args and not kwargs
            places = read_places(x.shape[:2]) if alone else None
            if places is None:
                return original(x, *args, **kwargs)
            output = original(x[places])[: len(x)]  # [b, positions, …]
            if output.shape[1] == 1 and not self.loud:
                # What is read stands at every place of its row, without a copy.
                return output.expand(-1, x.shape[1], *output.shape[2:])
            everywhere = output.new_zeros(*x.shape[:2], *output.shape[2:])
            if self.loud:
                everywhere += 100 * torch.arange(everywhere.shape[-1], device=x.device).cos()
            return everywhere.index_put_(tuple(place[: len(x)] for place in places), output)

        return forward


def _with_more(places: Tensor) -> Tensor:
    """`places` (b, positions) with the first row's again up to a multiple of four rows."""
    return torch.cat([places, places[:1].expand(filled(len(places)) - len(places), -1)])


def last_modules(model: nn.Module, run: Callable[[], object]) -> list[nn.Module]:
    """The modules that work token by token, and adapters' layers over such, that `run` calls once, latest first.

    Args:
        run: one forward pass on public, made-up input.
    """
    ended: dict[nn.Module, bool] = {}

    def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        alike = len(args) == 1 and not kwargs and all(isinstance(t, Tensor) and t.ndim == 3 for t in (*args, output))
        ended[module] = alike and module not in ended and args[0].shape[:2] == output.shape[:2]

    layers = [module for module in model.modules() if type(module) is LoraLinear and _is_linear(base_layer(module))]
    inside = {child for layer in layers for child in layer.modules() if child is not layer}
    single = [m for m in model.modules() if m not in inside and (m in layers or _works_token_by_token(m))]
    handles = [module.register_forward_hook(note, with_kwargs=True) for module in single]
    with hooked(handles):
        run()
    return [module for module, alike in reversed(ended.items()) if alike]


def _is_linear(module: nn.Module) -> bool:
    return type(module) in (nn.Linear, Conv1D)


def _works_token_by_token(module: nn.Module) -> bool:
    kind = type(module)
    stock = kind.__module__.startswith(("torch.nn.", "transformers."))
    norm = kind.__name__.endswith(("RMSNorm", "LayerNorm"))
    activation = kind.__module__ in ("torch.nn.modules.activation", "transformers.activations")
    several = kind in (nn.MultiheadAttention, nn.Softmax, nn.LogSoftmax, nn.Softmin)
    return _is_linear(module) or kind in (nn.Dropout, nn.Identity) or (stock and (norm or (activation and not several)))


def find_narrowed(modules: Sequence[nn.Module], keeps_losses: Callable[[Sequence[nn.Module]], bool]) -> list[nn.Module]:
    """Those of `modules` that can be narrowed, tried one by one from the first on.

    Args:
        modules: from `last_modules`.
        keeps_losses: whether losses on made-up tokens stay the same with these narrowed.
    """
    found: list[nn.Module] = []
    failures = 0
    for module in modules:
        if keeps_losses([*found, module]):
            found.append(module)
            failures = 0
        else:
            failures += 1
        if failures == PATIENCE:
            break
    return found
