"""Hashes of tensors and of the files that hold them."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from peft_dpzero.errors import DPZeroError
from peft_dpzero.modules import whole
from peft_dpzero.perturbation.perturbation import Perturbation

ADAPTER_NAME = "adapter_model.safetensors"
_PIECE = 1 << 20
# Beside what `hf download --local-dir` has fetched.
_DOWNLOADS = ".cache/huggingface/"
# A whole model's weights, in one file or in several.
_MODEL_FILE = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors")


def is_model_file(name: str) -> bool:
    """Whether `name` is that of a file with a whole model's weights, or with a part of them."""
    return _MODEL_FILE.fullmatch(name) is not None


def is_weights(name: str) -> bool:
    """Whether `name` is that of a weight file, or of the index of several."""
    return name in (ADAPTER_NAME, "model.safetensors.index.json") or is_model_file(name)


def file_names(folder: Path) -> list[str]:
    """The names of all files in `folder` and below, relative to it, but for what a download from the Hub notes."""
    names = (path.relative_to(folder).as_posix() for path in folder.rglob("*") if not path.is_dir())
    return sorted(name for name in names if not name.startswith(_DOWNLOADS))


def file_digest(path: Path) -> str:
    """SHA-256 of a file's bytes."""
    total = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(_PIECE):
            total.update(piece)
    return total.hexdigest()


def digest(tensors: Iterable[tuple[str, Tensor]]) -> str:
    """SHA-256 over the names, dtypes, shapes and bytes of `tensors`, in their order.

    Sharded ones are gathered one by one, so that all processes must take part; the digest is that of the whole.
    """
    total = hashlib.sha256()
    for name, tensor in tensors:
        dtype = str(tensor.dtype).removeprefix("torch.")
        total.update(json.dumps([name, dtype, list(tensor.shape)]).encode())
        flat = whole(tensor.detach()).to("cpu").contiguous().reshape(-1)
        total.update(flat.view(torch.uint8).numpy().data)
    return total.hexdigest()


def parameters_digest(perturbation: Perturbation) -> str:
    """`digest` of the trained parameters, as they are now."""
    return digest(perturbation.parameters.items())


def start_digest(tensors: Mapping[str, Tensor], trained: Collection[str]) -> str:
    """`digest` of a run's start: of what is `trained`, in its order, and then of the others by name."""
    names = [*trained, *sorted(tensors.keys() - trained)]
    return digest((name, tensors[name]) for name in names)


def model_files(folder: Path) -> list[Path]:
    """The weight files that `save_pretrained` leaves: the adapter's, or the model's."""
    adapter = folder / ADAPTER_NAME
    return [adapter] if adapter.exists() else sorted(path for path in folder.iterdir() if is_model_file(path.name))


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
