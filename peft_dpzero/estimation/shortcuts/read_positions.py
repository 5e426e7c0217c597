"""The last layers, at the positions that losses read.

After the last attention every layer works on each token by itself, and a loss reads few of them: a classifier's first
token, a prompt's label position. Linear layers, norms, activations and blocks of such need not run on the others, whose
outputs are the read position's instead, or zeros if there are several; nor need the last attention ask there
(`last_attention.py`). Each row keeps a line of its own, with as many positions as any other's. Which modules these are
is found by trying, on made-up tokens, among types that are known to work token by token. They run on a multiple of four
lines, as in `filled_rows.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

from peft.tuners.lora import Linear as LoraLinear
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from peft_dpzero.estimation.shortcuts.last_attention import LastAttention
from peft_dpzero.estimation.shortcuts.places import Places, Positions
from peft_dpzero.modules import Forward, base_layer, hooked, replaced_forwards

# Modules in a row that cannot be narrowed, after which no earlier one is tried.
PATIENCE = 6
# Stock blocks whose forward is a sum or a product of what their layers make of the same token.
_BLOCKS = ("SelfOutput", "Intermediate", "Output", "MLP")


class NarrowedLayers:
    """Modules that run on the positions that are read only.

    Args:
        modules: each maps one or more (b, l, …) → (b, l, …), and its output elsewhere has no part in what is read.
        attention: the last one, if it is asked at these positions only.
        loud: the output elsewhere is large, not zero: in a test nothing that is read may change by it, not by a bit.
    """

    def __init__(
        self, modules: Sequence[nn.Module], attention: LastAttention | None = None, *, loud: bool = False
    ) -> None:
        self.modules = tuple(modules)
        self.attention = attention
        self.loud = loud

    @contextmanager
    def narrowed(self, positions: Positions) -> Iterator[None]:
        """Within the block, for one pass, the modules skip what is not read."""
        places = Places(positions, self.loud)
        forwards = {module: _narrowed(module.forward, places) for module in self.modules}
        with replaced_forwards(forwards), self.attention.narrowed(places) if self.attention else nullcontext():
            yield


def _narrowed(original: Forward, places: Places) -> Forward:
    def forward(*args: Any, **kwargs: Any) -> Any:
        shapes = {arg.shape[:2] if isinstance(arg, Tensor) and arg.ndim == 3 else None for arg in args}
        shape = shapes.pop() if len(shapes) == 1 and not kwargs else None
        read = places.of(*shape) if shape else None
        if shape is None or read is None:
            return original(*args, **kwargs)
        output = original(*(places.at(read, arg) for arg in args))[: shape[0]]  # [b, positions, …]
        return places.everywhere(output, shape[1])

    return forward


def last_modules(model: nn.Module, run: Callable[[], object]) -> list[nn.Module]:
    """The modules that work token by token, blocks of such and adapters' layers over such, that `run` calls once.

    Latest first, and a block before what is in it.

    Args:
        run: one forward pass on public, made-up input.
    """
    ended: dict[nn.Module, bool] = {}

    def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        alike = bool(args) and not kwargs and all(isinstance(t, Tensor) and t.ndim == 3 for t in (*args, output))
        ended[module] = alike and module not in ended and {a.shape[:2] for a in args} == {output.shape[:2]}

    layers = [module for module in model.modules() if type(module) is LoraLinear and _is_linear(base_layer(module))]
    inside = {child for layer in layers for child in layer.modules() if child is not layer}
    alone = {m for m in model.modules() if m not in inside and (m in layers or _works_token_by_token(m))}
    blocks = {m for m in model.modules() if _is_block(m) and all(c in alone for c in _children(m, layers))}
    with hooked([module.register_forward_hook(note, with_kwargs=True) for module in alone | blocks]):
        run()
    return [module for module, alike in reversed(ended.items()) if alike]


def _is_block(module: nn.Module) -> bool:
    kind = type(module)
    return kind.__module__.startswith("transformers.models.") and kind.__name__.endswith(_BLOCKS)


def _children(module: nn.Module, layers: Sequence[nn.Module]) -> list[nn.Module]:
    """What is in a module, but not what is in its LoRA `layers`."""
    found: list[nn.Module] = []
    for child in module.children():
        found += [child] if child in layers else _children(child, layers) or [child]
    return found


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
    """Those of `modules` that can be narrowed, tried one by one from the first on; with a block, all that is in it.

    Args:
        modules: from `last_modules`.
        keeps_losses: whether losses on made-up tokens stay the same with these narrowed.
    """
    found: list[nn.Module] = []
    inside: set[nn.Module] = set()
    failures = 0
    for module in modules:
        if module in inside:
            continue
        if keeps_losses([*found, module]):
            found.append(module)
            inside.update(module.modules())
            failures = 0
        else:
            failures += 1
        if failures == PATIENCE:
            break
    return found
