"""Checks that turn a wrong value or a failed call into one readable line."""

from __future__ import annotations

import difflib
import enum
import types
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal, Union, get_args, get_origin

from peft_dpzero.errors import DPZeroError


def nearest(value: object, known: Iterable[str]) -> str:
    """The member of `known` that is spelt most like `value`."""
    return difflib.get_close_matches(str(value), list(known), n=1, cutoff=0.0)[0]


def check_types(section: str, values: Mapping[str, Any], hints: Mapping[str, Any]) -> None:
    """Refuses keys that are not in `hints` and values that do not suit them.

    Raises:
        DPZeroError: names the key, and the nearest valid one or the type that is wanted.
    """
    for key, value in values.items():
        if key not in hints:
            fix = f"did you mean {nearest(key, hints)!r}?" if hints else "this kind takes none."
            raise DPZeroError(f"{section}.{key} is not a known key: {fix}")
        kinds = _members(hints[key])
        if not any(_suits(value, kind) for kind in kinds):
            wanted = " or ".join(dict.fromkeys(_describe(kind) for kind in kinds if kind is not type(None)))
            raise DPZeroError(f"{section}.{key} must be {wanted}, got {value!r}.")


def _members(hint: Any) -> list[Any]:
    members = list(get_args(hint)) if get_origin(hint) in (Union, types.UnionType) else [hint]
    has_choices = any(isinstance(member, type) and issubclass(member, enum.Enum) for member in members)
    return [member for member in members if not (has_choices and member is str)]


def _suits(value: Any, kind: Any) -> bool:
    origin = get_origin(kind) or kind
    if origin is Literal:
        return any(type(value) is type(choice) for choice in get_args(kind))
    if not isinstance(origin, type):
        return True
    if issubclass(origin, enum.Enum):
        return value in [member.value for member in origin]
    if origin is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    if origin is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, origin)


def _describe(kind: Any) -> str:
    origin = get_origin(kind) or kind
    if origin is Literal:
        return " or ".join(map(repr, get_args(kind)))
    if isinstance(origin, type) and issubclass(origin, enum.Enum):
        return "one of " + ", ".join(str(member.value) for member in origin)
    names = {
        bool: "true or false",
        int: "an integer",
        float: "a number",
        str: "text",
        list: "a list",
        dict: "a mapping",
    }
    return names.get(origin, str(kind))


@contextmanager
def explained(where: str) -> Iterator[None]:
    """Raises what fails inside, as a `DPZeroError` that begins with `where`. For code that has no data in hand."""
    try:
        yield
    except Exception as error:
        raise DPZeroError(f"{where}: {error or type(error).__name__}") from None
