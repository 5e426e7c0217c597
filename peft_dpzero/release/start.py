"""Where training starts, as files and hashes: an adapter and all that is trained before data is seen, and the basis."""

from __future__ import annotations

import json
import os
from collections.abc import Collection
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from peft_dpzero.errors import DPZeroError
from peft_dpzero.modules import adapter_parameters
from peft_dpzero.perturbation.basis import Basis
from peft_dpzero.perturbation.perturbation import Perturbation
from peft_dpzero.release.digests import start_digest

START_NAME = "dpzero_start.safetensors"
BASIS_NAME = "dpzero_basis.safetensors"


def save_start(perturbation: Perturbation, folder: Path) -> None:
    """Writes an adapter's starting weights to `dpzero_start.safetensors`, since the base model does not tell them.

    That holds for those that are not trained as well, such as LoRA's A where it is frozen.

    A model without an adapter starts at the base itself, and nothing is written.
    """
    path = folder / START_NAME
    if not hasattr(perturbation.model, "peft_config"):
        path.unlink(missing_ok=True)
        return
    _write(path, {name: p.detach().to("cpu").contiguous().clone() for name, p in perturbation.with_adapter.items()})


def save_basis(basis: Basis | None, folder: Path) -> None:
    """Writes `dpzero_basis.safetensors`, or removes it for a run that has no basis."""
    path = folder / BASIS_NAME
    if basis is None:
        path.unlink(missing_ok=True)
        return
    _write(path, {"vectors": basis.vectors}, {"names": json.dumps(basis.names)})


def load_basis(folder: Path, digest: str) -> Basis:
    """Reads `dpzero_basis.safetensors`.

    Args:
        folder: where it lies.
        digest: what a journal says that its digest is.

    Raises:
        DPZeroError: there is no such file, or it holds another basis.
    """
    path = folder / BASIS_NAME
    try:
        with safe_open(path, "pt") as file:
            basis = Basis(file.get_tensor("vectors"), json.loads(file.metadata()["names"]))
    except Exception as error:
        raise DPZeroError(f"{path}, which this run needs, cannot be read ({type(error).__name__}).") from None
    if basis.digest() != digest:
        raise DPZeroError(f"{path} is not the basis of this run: restore it from a copy.")
    return basis


def load_start(perturbation: Perturbation, folder: Path, expected: str) -> None:
    """Takes the adapter and what is trained to where the run started.

    Args:
        perturbation: over the model.
        folder: holds `dpzero_start.safetensors`, if the run has one.
        expected: the start's digest in the journal's header.

    Raises:
        DPZeroError: the file's tensors do not fit the model; or the start is not the run's.
    """
    path = folder / START_NAME
    trained = perturbation.parameters
    # Starts of before hold what is trained alone.
    held = copy_start(perturbation.model, trained, folder) or trained
    if start_digest(held, trained) != expected:
        raise DPZeroError(
            f"{path} is not the start of this run: restore it from a copy."
            if path.exists()
            else "The trainable parameters are not those that the run started from: build the model from the same "
            "base and seed (if it got a new head, save it with the head first and use that folder as the base)."
        )


@torch.no_grad()
def copy_start(model: nn.Module, trained: Collection[str], folder: Path) -> dict[str, nn.Parameter]:
    """Gives `model` the tensors of `dpzero_start.safetensors` in `folder`, if there is one.

    Those that are not trained get the file's dtype, too, as nothing else tells which they had.

    Args:
        model: with its adapter. Beside it and what is trained, nothing is changed.
        trained: names of the trained parameters.
        folder: where the file lies.

    Returns: what was given, by name.

    Raises:
        DPZeroError: its tensors do not fit the model.
    """
    path = folder / START_NAME
    if not path.exists():
        return {}
    tensors = load_file(path)
    own = {name: p for name, p in model.named_parameters() if name in trained} | adapter_parameters(model)
    shapes = {name: own[name].shape for name in tensors if name in own}
    if shapes != {name: tensor.shape for name, tensor in tensors.items()} or not shapes.keys() >= set(trained):
        raise DPZeroError(f"{path} does not fit the model's adapter: build the model as for training.")
    for name, tensor in tensors.items():
        if name in trained:
            own[name].copy_(tensor)
        else:
            own[name].data = tensor.to(own[name].device)
    return {name: own[name] for name in tensors}


def _write(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """Puts a whole file on disk, or none."""
    unfinished = path.with_suffix(".tmp")
    save_file(tensors, unfinished, metadata)
    with unfinished.open("rb+") as file:
        os.fsync(file.fileno())
    os.replace(unfinished, path)
