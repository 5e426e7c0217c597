"""The shared trunk: activations that no direction can change are computed once a micro-batch.

Every module whose work ends before the first perturbed parameter is used gives the same output at θ + λz and
θ − λz for every z. Within `SharedTrunk.shared()` such a module runs once and then repeats its output, so that
adapters on the upper layers cost only the passes above them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from peft_dpzero.forwards import Forward, replaced_forwards


class SharedTrunk:
    """Finds the shareable modules of a model by watching one forward pass.

    Args:
        model: in eval mode; its trainable parameters are the perturbed ones.
        probe: runs one forward pass on public, made-up input.
    """

    def __init__(self, model: nn.Module, probe: Callable[[], object]) -> None:
        self.modules = _modules_before_first_use(model, probe)

    @contextmanager
    def shared(self) -> Iterator[None]:
        """Within the block, for one micro-batch, the trunk's modules run at most once."""
        with replaced_forwards({module: _memoised(module.forward) for module in self.modules}):
            yield


def _memoised(original: Forward) -> Forward:
    memo: list[Any] = []

    def forward(*args: Any, **kwargs: Any) -> Any:
        if not memo:
            memo.append(original(*args, **kwargs))
        return memo[0]

    return forward


def _modules_before_first_use(model: nn.Module, probe: Callable[[], object]) -> list[nn.Module]:
    started: dict[nn.Module, int] = {}
    ended: dict[nn.Module, int] = {}
    calls: dict[nn.Module, int] = {}
    clock = 0

    def on_start(module: nn.Module, args: Any) -> None:
        nonlocal clock
        clock += 1
        started.setdefault(module, clock)
        calls[module] = calls.get(module, 0) + 1

    def on_end(module: nn.Module, args: Any, output: Any) -> None:
        nonlocal clock
        clock += 1
        ended[module] = clock

    handles = [m.register_forward_pre_hook(on_start) for m in model.modules()]
    handles += [m.register_forward_hook(on_end) for m in model.modules()]
    try:
        probe()
    finally:
        for handle in handles:
            handle.remove()

    first_use = _first_use(model, started)
    shareable: list[nn.Module] = []

    def visit(module: nn.Module) -> None:
        if calls.get(module) == 1 and ended.get(module, first_use) < first_use:
            shareable.append(module)
            return
        for child in module.children():
            visit(child)

    visit(model)
    return shareable


def _first_use(model: nn.Module, started: dict[nn.Module, int]) -> int:
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
