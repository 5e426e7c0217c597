"""The shared trunk: activations that no direction can change are computed once a micro-batch.

A module without a perturbed parameter, whose arguments no perturbed parameter has touched, gives the same output at
θ + λz and θ − λz for every z. Within `SharedTrunk.shared()` such a module runs once and then repeats its output, so
that adapters on the upper layers cost only the passes above them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._C._functorch import is_batchedtensor
from torch.utils._pytree import tree_flatten, tree_leaves

from peft_dpzero.modules import Forward, hooked, replaced_forwards

# Values that are the same in two passes if they are equal. Of other objects that is not known.
_PLAIN = (type(None), bool, int, float, str, torch.dtype, torch.device)


class SharedTrunk:
    """Finds the shareable modules of a model by watching a forward pass at two points.

    Args:
        model: in eval mode; its trainable parameters are the perturbed ones.
        here: runs one forward pass on public, made-up input.
        there: the same pass at another point.

    Attributes:
        modules: those that run once a micro-batch.
        unmoved: all modules whose outputs no perturbed parameter changes.
        share: the part of `modules` in all matrix products' weights.
        row_width, token_width: of the widest output above them, entries a row (b, width) and a token (b, l, width).
    """

    def __init__(self, model: nn.Module, here: Callable[[], object], there: Callable[[], object]) -> None:
        self.model = model
        one, other = _watched(model, here), _watched(model, there)
        self.modules = outermost(
            model, lambda m: m in one and m in other and _is_untouched(m) and one[m].given == other[m].given
        )
        self.unmoved = [module for module in one if module in other and one[module].made == other[module].made]
        self.share = products(self.modules) / max(products([model]), 1)
        self.row_width, self.token_width = _widths(one, other)

    def measure(self, here: Callable[[], object], there: Callable[[], object]) -> None:
        """Measures the widths again, in passes with shortcuts."""
        self.row_width, self.token_width = _widths(_watched(self.model, here), _watched(self.model, there))

    def entries_above(self, rows: int, tokens: int) -> int:
        """Entries of the widest output above the trunk for a micro-batch."""
        return max(rows * self.row_width, tokens * self.token_width, 1)

    @contextmanager
    def shared(self) -> Iterator[Callable[[], None]]:
        """Within the block, for one micro-batch, the trunk's modules run once for the same arguments.

        Yields: what to call before each pass.
        """
        memos = {module: _Memo(module.forward) for module in self.modules}

        def restart() -> None:
            for memo in memos.values():
                memo.restart()

        with replaced_forwards(memos):
            yield restart


class _Memo:
    """The calls of one module in a pass, and what they gave: repeated for the same arguments in the next pass."""

    def __init__(self, original: Forward) -> None:
        self._original = original
        self._calls: list[tuple[_Noted, _Noted]] = []
        self._next = 0

    def restart(self) -> None:
        """A pass begins."""
        self._next = 0

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        number, self._next = self._next, self._next + 1
        if number < len(self._calls):
            given, made = self._calls[number]
            if given.is_now((args, kwargs)) and made.is_now(made.value):
                return made.value
        output = self._original(*args, **kwargs)
        self._calls[number:] = [(_Noted((args, kwargs)), _Noted(output))]
        return output


class _Noted:
    """Nested values, with the versions of their tensors: one that is written to is no longer what it was."""

    def __init__(self, value: Any) -> None:
        self.value = value
        self._leaves, self._form = tree_flatten(value)
        self._versions = [_version(leaf) for leaf in self._leaves]

    def is_now(self, other: Any) -> bool:
        """Whether `other` is equal to what was noted, and that was not written to since."""
        leaves, form = tree_flatten(other)
        if form != self._form or [_version(leaf) for leaf in self._leaves] != self._versions:
            return False
        return all(map(_is_same, self._leaves, leaves))


def _version(leaf: Any) -> int:
    return leaf._version if isinstance(leaf, Tensor) and not leaf.is_inference() else 0


def _is_same(one: Any, other: Any) -> bool:
    if one is other:
        return True
    if not (isinstance(one, Tensor) and isinstance(other, Tensor)):
        return not isinstance(one, Tensor) and not isinstance(other, Tensor) and bool(one == other)
    # What is stacked differs between points.
    if is_batchedtensor(one) or is_batchedtensor(other):
        return False
    return one.shape == other.shape and one.dtype == other.dtype and torch.equal(one, other)


@dataclass
class _Call:
    """A module's calls in a pass: how many there were, and of the last what told arguments and outputs of one pass from
    those of another, and an output's shape, without a length if all its positions are the same."""

    given: Any = None
    made: Any = None
    count: int = 0
    shape: tuple[int, ...] = ()


def _watched(model: nn.Module, run: Callable[[], object]) -> dict[nn.Module, _Call]:
    calls: dict[nn.Module, _Call] = {}

    def on_start(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        call = calls.setdefault(module, _Call())
        call.count += 1
        # A call among several has no arguments of its own.
        call.given = _marks((args, kwargs)) if call.count == 1 else object()

    def on_end(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        calls[module].made = _marks(output)
        if isinstance(output, Tensor):
            alike = output.ndim == 3 and (output.shape[1] == 1 or output.stride(1) == 0)
            calls[module].shape = tuple(output[:, 0].shape if alike else output.shape)

    handles = [m.register_forward_pre_hook(on_start, with_kwargs=True) for m in model.modules()]
    handles += [m.register_forward_hook(on_end) for m in model.modules()]
    with hooked(handles):
        run()
    return calls


def _marks(value: Any) -> list[Any]:
    """What the leaves of a value can be compared by, without keeping tensors: two sums of each."""
    return [_mark(leaf) for leaf in tree_leaves(value)]


def _mark(leaf: Any) -> Any:
    if not isinstance(leaf, Tensor) or leaf.is_meta:
        return leaf if isinstance(leaf, _PLAIN) else object()
    wide = leaf.detach().double()
    ramp = torch.linspace(1, 2, leaf.shape[-1], dtype=torch.float64, device=leaf.device) if leaf.ndim else wide
    return tuple(leaf.shape), leaf.dtype, float(wide.sum()), float((wide * ramp).sum())


def _widths(one: Mapping[nn.Module, _Call], other: Mapping[nn.Module, _Call]) -> tuple[int, int]:
    """The widest outputs (b, width) and (b, l, width) that differ between two passes."""
    above = [call.shape for module, call in one.items() if module not in other or other[module].made != call.made]
    rows, tokens = (max((shape[-1] for shape in above if len(shape) == ndim), default=0) for ndim in (2, 3))
    return rows, tokens


def _is_untouched(module: nn.Module) -> bool:
    return not any(parameter.requires_grad for parameter in module.parameters())


def outermost(model: nn.Module, suits: Callable[[nn.Module], bool]) -> list[nn.Module]:
    """The modules that suit and are not in another that does."""
    found: list[nn.Module] = []

    def visit(module: nn.Module) -> None:
        if suits(module):
            found.append(module)
            return
        for child in module.children():
            visit(child)

    visit(model)
    return found


def products(modules: Iterable[nn.Module]) -> int:
    """Entries of the weight matrices in `modules`, those of embeddings apart."""
    inside = (child for module in modules for child in module.modules() if not isinstance(child, nn.Embedding))
    return sum(p.numel() for child in inside for p in child.parameters(recurse=False) if p.ndim == 2)
