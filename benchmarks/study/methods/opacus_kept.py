"""Opacus with what ours has besides its estimate: the frozen layers below the adapters run once for each row.

Opacus does not do so by itself; whoever trains with it can. Of stock BERT classifiers that train their last layer only.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft_dpzero.modules import hooked
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from ..clock import Clock
from ..models import Batch, Row, Start
from .base import DoesNotFit, Outcome
from .opacus_adamw import opacus_adamw


def opacus_kept(start: Start, clock: Clock, epsilon: float | None, seed: int, folder: Path, **settings: Any) -> Outcome:
    with kept_trunk(start) as above:
        return opacus_adamw(above, clock, epsilon, seed, folder, **settings)


class AboveTrunk(Start):
    """A start whose rows are what enters the last layer."""

    @property
    def collate(self) -> Callable[[list[Row]], Batch]:
        return _padded


@contextmanager
def kept_trunk(start: Start) -> Iterator[AboveTrunk]:
    """Runs the trunk over all private rows; within the block the model is its last layer and its head.

    Raises:
        DoesNotFit: the model is no BERT that trains its last layer only.
    """
    base = start.model.get_base_model()
    if not hasattr(base, "bert") or any(p.requires_grad for p in base.bert.encoder.layer[:-1].parameters()):
        raise DoesNotFit("a stock BERT classifier that trains its last layer")
    embeddings, layers = base.bert.embeddings, base.bert.encoder.layer
    above = AboveTrunk(**vars(start) | {"train": _entering(start, layers[-1])})
    try:
        base.bert.embeddings, base.bert.encoder.layer = _AsGiven(), layers[-1:]
        yield above
    finally:
        base.bert.embeddings, base.bert.encoder.layer = embeddings, layers


@torch.no_grad()
def _entering(start: Start, layer: nn.Module) -> list[Row]:
    """The private rows with what enters `layer`, without its padding: (l, d)."""
    entered, found = list[Tensor](), list[Tensor]()
    order = sorted(range(len(start.train)), key=lambda i: len(start.train[i]["input_ids"]))
    with hooked([layer.register_forward_pre_hook(lambda module, inputs: entered.append(inputs[0]))]):
        for batch in start.batches([start.train[i] for i in order]):
            start.model(**start.loss.inputs(batch))
            lengths = batch["attention_mask"].sum(dim=1).tolist()
            found += [hidden[:length].clone() for hidden, length in zip(entered.pop(), lengths, strict=True)]
    of = dict(zip(order, found, strict=True))
    return [{**row, "inputs_embeds": of[number]} for number, row in enumerate(start.train)]


def _padded(rows: list[Row]) -> Batch:
    return {
        "inputs_embeds": pad_sequence([row["inputs_embeds"] for row in rows], batch_first=True),
        "attention_mask": pad_sequence([torch.tensor(row["attention_mask"]) for row in rows], batch_first=True),
        "labels": torch.tensor([row["labels"] for row in rows]),
    }


class _AsGiven(nn.Module):
    """In place of embeddings: what is given is what enters the first layer."""

    def forward(self, *args: Any, inputs_embeds: Tensor, **kwargs: Any) -> Tensor:
        return inputs_embeds
