"""What a pass may leave behind besides its losses, put back after it, so that no row leaves anything to the next.

That is what a model keeps besides its parameters, and how far the global generators are, from which some models draw in
eval mode too (Reformer's hashing). Every pass starts them alike, so that both sides of a direction draw the same.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from operator import is_
from typing import Any

from torch import Tensor, nn

from peft_dpzero.estimation.generators import generators_kept, seed_generators

# Where the generators start each pass.
_SEED = bytes(8)
_PLAIN = (bool, int, float, str, bytes, type(None))
_CONTAINERS = (dict, list, set)
# `nn.Module`'s own, which hold parameters, children and hooks.
_OWN = frozenset(vars(nn.Module()))


class KeptState:
    """Buffers and attributes of a model's modules, as they were when this was made.

    Tensors, numbers and texts are kept, and what dictionaries, lists, tuples and sets hold, however deep. Other objects
    are not looked into.

    Args:
        model: the model, before it saw a row.
    """

    def __init__(self, model: nn.Module) -> None:
        self._device = next((p.device for p in model.parameters() if not p.is_meta), None)
        self._modules = [_KeptModule(name, module) for name, module in model.named_modules()]

    @contextmanager
    def kept(self) -> Iterator[None]:
        """After the block all is as it was; within it, the global generators start where they always do."""
        with generators_kept(self._device):
            seed_generators(_SEED, self._device)
            try:
                yield
            finally:
                self.restore()

    def restore(self) -> list[str]:
        """Puts back what has changed, and returns its names."""
        return [name for module in self._modules if module.may_have_changed() for name in module.restore()]


class _KeptModule:
    def __init__(self, name: str, module: nn.Module) -> None:
        self._prefix = f"{name}." if name else ""
        self._module = module
        self._everything = tuple(vars(module).values())
        self._buffers = dict(module._buffers)
        self._attributes = _attributes(module)
        values = _with_contents([*self._buffers.values(), *self._attributes.values()])
        self._contents = [(value, value.copy()) for value in values if isinstance(value, _CONTAINERS)]
        self._tensors = [
            (value, value._version, value.detach().clone())
            for value in values
            if isinstance(value, Tensor) and not value.is_inference() and not value.is_meta
        ]

    def may_have_changed(self) -> bool:
        """A quick look: whether anything is another object than before, or was written to."""
        everything, buffers = vars(self._module), self._module._buffers
        if len(everything) != len(self._everything) or not all(map(is_, everything.values(), self._everything)):
            return True
        if not (self._buffers or buffers or self._tensors or self._contents):
            return False
        return (
            len(buffers) != len(self._buffers)
            or not all(map(is_, buffers.values(), self._buffers.values()))
            or any(tensor._version != version for tensor, version, _ in self._tensors)
            or any(not _holds(value, content) for value, content in self._contents)
        )

    def restore(self) -> list[str]:
        changed = _put_back(self._module._buffers, dict(self._module._buffers), self._buffers)
        changed += _put_back(vars(self._module), _attributes(self._module), self._attributes)
        for number, (tensor, version, value) in enumerate(self._tensors):
            if tensor._version != version:
                tensor.copy_(value)
                self._tensors[number] = tensor, tensor._version, value
                changed.append("what a tensor holds")
        for container, content in self._contents:
            if not _holds(container, content):
                container.clear()
                container.extend(content) if isinstance(container, list) else container.update(content)
                changed.append("what a container holds")
        return [self._prefix + name for name in changed]


def _with_contents(values: Sequence[Any]) -> list[Any]:
    """`values` and all that those of them hold that are containers, each once."""
    found: dict[int, Any] = {}
    left = list(values)
    while left:
        value = left.pop()
        if id(value) not in found:
            found[id(value)] = value
            if isinstance(value, (dict, list, tuple, set)):
                left += value.values() if isinstance(value, dict) else value
    return list(found.values())


def _attributes(module: nn.Module) -> dict[str, Any]:
    return {
        key: value
        for key, value in vars(module).items()
        if key not in _OWN and isinstance(value, (*_PLAIN, *_CONTAINERS, tuple, Tensor))
    }


def _put_back(target: dict[str, Any], now: dict[str, Any], before: dict[str, Any]) -> list[str]:
    changed = [
        key for key in {*now, *before} if key not in now or key not in before or not _same(now[key], before[key])
    ]
    for key in changed:
        if key in before:
            target[key] = before[key]
        else:
            del target[key]
    return changed


def _same(one: Any, other: Any) -> bool:
    if one is other:
        return True
    if type(one) is not type(other):
        return False
    if isinstance(one, tuple):
        return len(one) == len(other) and all(map(_same, one, other))
    return isinstance(one, _PLAIN) and bool(one == other)


def _holds(value: Any, content: Any) -> bool:
    if len(value) != len(content):
        return False
    if isinstance(value, dict):
        return all(key in value and _same(value[key], content[key]) for key in content)
    if isinstance(value, list):
        return all(map(_same, value, content))
    return all(entry in value for entry in content)
