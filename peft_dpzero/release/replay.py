"""From a journal to weights: what was released, applied to the start, without data and without a forward pass."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from peft_dpzero.errors import DPZeroError
from peft_dpzero.mechanism.private_sum import PrivateSum, Released
from peft_dpzero.perturbation.perturbation import Perturbation
from peft_dpzero.release.header import READABLE_VERSIONS, segment_config
from peft_dpzero.release.journal import JOURNAL_NAME, JournalSegment, read_journal
from peft_dpzero.release.optimizer import Estimate, optimizer_of
from peft_dpzero.release.start import load_basis, load_start


@dataclass(frozen=True)
class Replayed:
    """A release out of a journal, and the learning rates that it was applied with."""

    released: Released
    learning_rates: tuple[float, ...]


def replayed_releases(segments: Sequence[JournalSegment], mechanism: PrivateSum | None = None) -> list[Replayed]:
    """Every entry of a journal, as the step that made it put it out.

    Args:
        segments: from the first.
        mechanism: interprets the last segment, for a run that goes on with it.
    """
    replayed = []
    for number, segment in enumerate(segments):
        own = mechanism if number == len(segments) - 1 else None
        header = segment.header
        own = own or PrivateSum(
            segment_config(segment), header["expected_batch_size"], loss_interval=header["loss_interval"]
        )
        for entry in segment.entries:
            replayed.append(Replayed(own.interpret(entry.step, entry.values), entry.learning_rates))
    return replayed


def replay_journal(model: nn.Module, journal: str | Path, steps: int | None = None) -> nn.Module:
    """Gives `model` the weights that a run ended with, from its journal.

    Bit-identical on the kind of device that trained; within float rounding on another.

    Args:
        model: as it was before training: the base model, with the adapter's structure if there was one (its starting
            weights are taken from the file beside the journal). Changed in place.
        journal: the file `dpzero_journal`, or its folder.
        steps: how many releases to apply; None for all.

    Returns: `model`.

    Raises:
        DPZeroError: the journal is damaged, or `model` is not the one that it starts from.
    """
    path = Path(journal)
    path = path / JOURNAL_NAME if path.is_dir() else path
    segments = read_journal(path).segments
    header = segments[0].header
    if (version := header.get("format_version")) not in READABLE_VERSIONS:
        raise DPZeroError(f"{path} has format {version}; this version reads {', '.join(map(str, READABLE_VERSIONS))}.")
    _shape_as_trained(model, header)
    config = segment_config(segments[0])
    basis = load_basis(path.parent, header["basis"]) if header.get("basis") else None
    perturbation = Perturbation(model, config.direction_seed, config.direction_distribution, basis=basis)
    if list(perturbation.parameters) != [name for name, _, _ in header["trainable"]]:
        raise DPZeroError("The model's trainable parameters are in another order than in training.")
    load_start(perturbation, path.parent, header["start"])
    optimizer = optimizer_of(header["optimizer"], perturbation)
    for replayed in replayed_releases(segments)[:steps]:
        optimizer.step(Estimate(replayed.released, perturbation, replayed.learning_rates))
    return model


def _shape_as_trained(model: nn.Module, header: dict[str, Any]) -> None:
    """Makes the parameters that were trained, and no others, trainable, in the dtype that they had."""
    dtypes = {name: getattr(torch, dtype) for name, dtype, _ in header["trainable"]}
    shapes = {name: list(shape) for name, _, shape in header["trainable"]}
    parameters = dict(model.named_parameters())
    for name, shape in shapes.items():
        if name not in parameters:
            raise DPZeroError(f"The model has no parameter {name}, which was trained: build it as for training.")
        if list(parameters[name].shape) != shape:
            raise DPZeroError(
                f"{name} has shape {list(parameters[name].shape)}, and {shape} in training: build the model as for "
                "training."
            )
    for name, parameter in parameters.items():
        parameter.requires_grad_(name in dtypes)
        if name in dtypes:
            parameter.data = parameter.data.to(dtypes[name])
