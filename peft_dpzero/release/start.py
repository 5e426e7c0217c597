"""Where training starts and what it ends in, as hashes and as a file: before any data is seen, and after."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from peft_dpzero.errors import DPZeroError
from peft_dpzero.perturbation import Perturbation

START_NAME = "dpzero_start.safetensors"
ADAPTER_NAME = "adapter_model.safetensors"


def digest(tensors: Iterable[tuple[str, Tensor]]) -> str:
    """SHA-256 over the names, dtypes, shapes and bytes of `tensors`, in their order."""
    total = hashlib.sha256()
    for name, tensor in tensors:
        dtype = str(tensor.dtype).removeprefix("torch.")
        total.update(json.dumps([name, dtype, list(tensor.shape)]).encode())
        flat = tensor.detach().to("cpu").contiguous().reshape(-1)
        total.update(flat.view(torch.uint8).numpy().data)
    return total.hexdigest()


def parameters_digest(perturbation: Perturbation) -> str:
    """`digest` of the trained parameters, as they are now."""
    return digest(perturbation.parameters.items())


def model_files(folder: Path) -> list[Path]:
    """The weight files that `save_pretrained` leaves: the adapter's, or the model's."""
    adapter = folder / ADAPTER_NAME
    return [adapter] if adapter.exists() else sorted(folder.glob("model*.safetensors"))


def files_digest(folder: Path) -> str | None:
    """`digest` of the tensors in a saved model's weight files, sorted by name; None if there are none.

    Raises:
        DPZeroError: a file is damaged.
    """
    files = model_files(folder)
    return digest(saved_tensors(files)) if files else None


def saved_tensors(files: Iterable[Path]) -> Iterator[tuple[str, Tensor]]:
    """The tensors of several safetensors files, one at a time, file by file and sorted by name in each.

    Raises:
        DPZeroError: a file is damaged.
    """
    for path in files:
        try:
            with safe_open(path, framework="pt") as file:
                for name in sorted(file.keys()):
                    yield name, file.get_tensor(name)
        except (OSError, SafetensorError) as error:
            raise DPZeroError(f"{path} cannot be read: {error}") from None


def save_start(model: Any, perturbation: Perturbation, folder: Path) -> None:
    """Writes an adapter's starting weights to `dpzero_start.safetensors`, since the base model does not tell them.

    A model without an adapter starts at the base itself, and nothing is written.
    """
    path = folder / START_NAME
    if not hasattr(model, "peft_config"):
        path.unlink(missing_ok=True)
        return
    unfinished = path.with_suffix(".tmp")
    tensors = {name: p.detach().to("cpu").contiguous().clone() for name, p in perturbation.parameters.items()}
    save_file(tensors, unfinished)
    with unfinished.open("rb+") as file:
        os.fsync(file.fileno())
    os.replace(unfinished, path)


@torch.no_grad()
def load_start(perturbation: Perturbation, folder: Path, expected: str) -> None:
    """Takes the trained parameters to where the run started.

    Args:
        perturbation: over the model.
        folder: holds `dpzero_start.safetensors`, if the run has one.
        expected: the start's digest in the journal's header.

    Raises:
        DPZeroError: the file's tensors do not fit the model; or the start is not the run's.
    """
    path = folder / START_NAME
    if path.exists():
        _copy(load_file(path), perturbation, path)
    if parameters_digest(perturbation) != expected:
        raise DPZeroError(
            f"{path} is not the start of this run: restore it from a copy."
            if path.exists()
            else "The trainable parameters are not those that the run started from: build the model from the same "
            "base and seed (if it got a new head, save it with the head first and use that folder as the base)."
        )


def _copy(tensors: Mapping[str, Tensor], perturbation: Perturbation, path: Path) -> None:
    shapes = {name: p.shape for name, p in perturbation.parameters.items()}
    if {name: tensor.shape for name, tensor in tensors.items()} != shapes:
        raise DPZeroError(f"{path} does not fit the model's trainable parameters: build the model as for training.")
    for name, parameter in perturbation.parameters.items():
        parameter.copy_(tensors[name])
