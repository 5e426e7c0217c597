"""The global random generators, from which data sets, collators and models draw: where they start, and put back."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch


@contextmanager
def generators_kept(device: torch.device | None = None) -> Iterator[None]:
    """After the block the generators of Python, NumPy, torch on the CPU and on `device`, if that is a GPU, are where
    they were."""
    python, numpy_ = random.getstate(), np.random.get_state()
    devices = [] if device is None or device.type != "cuda" else [torch.cuda.current_device(), device.index]
    try:
        with torch.random.fork_rng(devices=[index for index in dict.fromkeys(devices) if index is not None]):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy_)


def seed_generators(seed: bytes, device: torch.device | None = None) -> None:
    """Starts the generators from the first eight bytes of `seed` or more."""
    number = int.from_bytes(seed[:8], "little")
    random.seed(seed)
    np.random.seed(np.frombuffer(seed, dtype="<u4"))
    # `torch.manual_seed` would look for every kind of device, which takes longer than a small model's layer.
    torch.default_generator.manual_seed(number)
    if device is not None and device.type == "cuda":
        with torch.cuda.device(device):
            torch.cuda.manual_seed(number)
