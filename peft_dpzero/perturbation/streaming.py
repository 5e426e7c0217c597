"""Perturbing module by module: while a model runs, only the module at work has a perturbed copy of its parameters.

Full-parameter tuning then needs the memory of inference and the largest module's parameters once more, instead of all
of them. Between calls a streamed parameter is empty, so that whatever reads one behind its module's back fails
instead of computing with θ.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from peft_dpzero.modules import Forward, hooked, replaced_forwards


def streamable_parameters(
    model: nn.Module, parameters: Mapping[str, nn.Parameter], run: Callable[[], object]
) -> frozenset[str]:
    """Names of the parameters that belong to modules without children, all of which `run` calls.

    The output embedding's are not among them: losses may read rows of it without a call. Compiled models have none.

    Args:
        run: one forward pass on public, made-up input.
    """
    called: set[nn.Module] = set()
    if any(hasattr(module, "_orig_mod") for module in model.modules()):
        return frozenset()
    handles = [module.register_forward_pre_hook(lambda module, args: called.add(module)) for module in model.modules()]
    with hooked(handles):
        run()
    find_head = getattr(model, "get_output_embeddings", None)
    head = find_head() if callable(find_head) else None
    barred = {id(parameter) for parameter in head.parameters()} if isinstance(head, nn.Module) else set()
    for module in model.modules():
        if module not in called or next(module.children(), None) is not None:
            barred.update(id(parameter) for parameter in module.parameters(recurse=False))
    return frozenset(name for name, parameter in parameters.items() if id(parameter) not in barred)


@contextmanager
def streamed(
    model: nn.Module,
    originals: Mapping[nn.Parameter, Tensor],
    perturbed: Callable[[list[nn.Parameter]], list[Tensor]],
) -> Iterator[None]:
    """Within the block each module that owns some of `originals` runs with their perturbed values.

    Args:
        originals: the streamed parameters and their values. The caller puts these back after the block.
        perturbed: makes the perturbed values of some of the parameters.
    """
    owners = {module: [p for p in module.parameters(recurse=False) if p in originals] for module in model.modules()}
    forwards = {module: _perturbed_forward(module.forward, own, perturbed) for module, own in owners.items() if own}
    with replaced_forwards(forwards):
        for parameter in originals:
            _empty(parameter)
        yield


def _empty(parameter: nn.Parameter) -> None:
    parameter.data = parameter.data.new_empty(0)


def _perturbed_forward(
    original: Forward, own: list[nn.Parameter], perturbed: Callable[[list[nn.Parameter]], list[Tensor]]
) -> Forward:
    def forward(*args: Any, **kwargs: Any) -> Any:
        try:
            for parameter, value in zip(own, perturbed(own), strict=True):
                parameter.data = value
            return original(*args, **kwargs)
        finally:
            for parameter in own:
                _empty(parameter)

    return forward
