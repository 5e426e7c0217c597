"""Digests by which the processes of a run find out whether they hold the same data in the same order."""

from __future__ import annotations

import hashlib
import pickle
from collections.abc import Mapping, Set
from typing import Any

import numpy as np
import torch
from torch import Tensor

# Rows that are looked at, spread evenly over the data set.
_ROWS = 64


def order_digest(dataset: Any) -> str:
    """SHA-256 over some rows of `dataset` at fixed places: another order changes it, and so does other content.

    A row that raises counts by its error's type, since its message may quote the data.
    """
    total = hashlib.sha256()
    for index in np.unique(np.linspace(0, len(dataset) - 1, _ROWS).round().astype(int)):
        try:
            total.update(content_digest(dataset[int(index)]))
        except Exception as error:
            total.update(type(error).__name__.encode())
    return total.hexdigest()


def content_digest(value: Any) -> bytes:
    """SHA-256 of `value`, the same in every process: arrays by type, shape and bytes, containers by what they hold."""
    if isinstance(value, Tensor):
        flat = value.detach().to("cpu").contiguous().reshape(-1)
        return _digest(str(value.dtype), list(value.shape), flat.view(torch.uint8).numpy().tobytes())
    if isinstance(value, (np.ndarray, np.generic)) and not value.dtype.hasobject:
        return _digest(value.dtype.str, list(value.shape), value.tobytes())
    if isinstance(value, Mapping):
        return _digest("mapping", *sorted(content_digest(key) + content_digest(held) for key, held in value.items()))
    if isinstance(value, Set):
        return _digest("set", *sorted(map(content_digest, value)))
    if isinstance(value, (list, tuple, np.ndarray)):
        return _digest("sequence", *map(content_digest, value))
    if value is None or isinstance(value, (str, bytes, int, float)):
        return _digest(type(value).__name__, repr(value))
    return _digest(type(value).__name__, pickle.dumps(value))


def _digest(*parts: object) -> bytes:
    total = hashlib.sha256()
    for part in parts:
        encoded = part if isinstance(part, bytes) else str(part).encode("utf-8", "surrogatepass")
        total.update(len(encoded).to_bytes(8, "little") + encoded)
    return total.digest()
