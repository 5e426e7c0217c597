"""The shared trunk: activations that no direction can change are computed once a micro-batch.

Every module whose work ends before the first perturbed parameter is used gives the same output at θ + λz and
θ − λz for every z. Within `SharedTrunk.shared()` such a module runs once and then repeats its output, so that
adapters on the upper layers cost only the passes above them.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._C._functorch import is_batchedtensor
from torch.utils._pytree import tree_flatten

from peft_dpzero.modules import Forward, hooked, replaced_forwards


class SharedTrunk:
    """Finds the shareable modules of a model by watching one forward pass.

    Args:
        model: in eval mode; its trainable parameters are the perturbed ones.
        probe: runs one forward pass on public, made-up input.

    Attributes:
        modules: those that run once a micro-batch.
        share: their part of all matrix products' weights.
        row_width, token_width: of the widest output above them, entries a row (b, width) and a token (b, l, width).
    """

    def __init__(self, model: nn.Module, probe: Callable[[], object]) -> None:
        calls = _watched(model, probe)
        first_use = _first_use(model, {module: call.start for module, call in calls.items()})
        self.modules = _modules_before(first_use, model, calls)
        self.share = _products(self.modules) / max(_products([model]), 1)
        above = [call.shape for call in calls.values() if call.end >= first_use]
        self.row_width, self.token_width = (
            max((shape[-1] for shape in above if len(shape) == ndim), default=0) for ndim in (2, 3)
        )

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
    """A module's calls: when the first started and the last ended, how many there were, and an output's shape."""

    start: int
    end: float = math.inf
    count: int = 0
    shape: tuple[int, ...] = ()


def _watched(model: nn.Module, probe: Callable[[], object]) -> dict[nn.Module, _Call]:
    calls: dict[nn.Module, _Call] = {}
    clock = itertools.count(1)

    def on_start(module: nn.Module, args: Any) -> None:
        call = calls.setdefault(module, _Call(next(clock)))
        call.count += 1

    def on_end(module: nn.Module, args: Any, output: Any) -> None:
        calls[module].end = next(clock)
        calls[module].shape = tuple(output.shape) if isinstance(output, Tensor) else ()

    handles = [m.register_forward_pre_hook(on_start) for m in model.modules()]
    handles += [m.register_forward_hook(on_end) for m in model.modules()]
    with hooked(handles):
        probe()
    return calls


def _modules_before(first_use: int, model: nn.Module, calls: Mapping[nn.Module, _Call]) -> list[nn.Module]:
    """The outermost modules that are called once and end before the first use of a trainable parameter."""
    shareable: list[nn.Module] = []

    def visit(module: nn.Module) -> None:
        call = calls.get(module)
        if call is not None and call.count == 1 and call.end < first_use:
            shareable.append(module)
            return
        for child in module.children():
            visit(child)

    visit(model)
    return shareable


def _products(modules: Iterable[nn.Module]) -> int:
    """Entries of the weight matrices in `modules`, those of embeddings apart."""
    inside = (child for module in modules for child in module.modules() if not isinstance(child, nn.Embedding))
    return sum(p.numel() for child in inside for p in child.parameters(recurse=False) if p.ndim == 2)


def _first_use(model: nn.Module, started: Mapping[nn.Module, int]) -> int:
    """When the first trainable parameter can have been read: its owner's start, or that of the nearest ancestor
    that was called, since a parent may read a child's parameter without calling it."""
    first = [max(started.values(), default=0) + 1]

    def visit(module: nn.Module, ancestor_start: int) -> None:
        start = started.get(module, ancestor_start)
        if any(parameter.requires_grad for parameter in module.parameters(recurse=False)):
            first.append(min(start, ancestor_start) if module not in started else start)
        for child in module.children():
            visit(child, start)

    visit(model, 0)
    return min(first)
