"""The floor: bare forward passes on exactly the non-padding tokens of a logical batch.

Nothing but the model runs: no losses, no directions, no noise; batches are laid out beforehand. Only the label rows
reach the output embedding, and of a prompted model only the two label words. LoRA stays unmerged, as in a step.
Which layout is fastest depends on machine and model, so several are tried and the fastest is the floor:

- equal: rows of equal length together, nothing padded, no attention mask;
- packed: rows one after another in long lines under a block-diagonal mask, nothing padded but the last line;
- sorted: rows sorted by length and padded to the longest of a micro-batch (a few more tokens, fewer passes).

For LoRA each also with every row twice, which reads the base weights half as often for the two passes of a direction.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
from torch import Tensor

from workloads import IGNORE, Row, Workload

PACKED = (128, 256, 512)


@dataclass
class Pass:
    """Inputs of one pass, and where its label rows are: hidden[example, position]."""

    inputs: dict[str, Tensor]
    example: Tensor
    position: Tensor

    def doubled(self) -> Pass:
        size = len(self.inputs["input_ids"])
        inputs = {key: torch.cat([value, value]) for key, value in self.inputs.items()}
        return Pass(inputs, torch.cat([self.example, self.example + size]), self.position.repeat(2))


Layout = Callable[[Sequence[Row]], list[Pass]]


class Floor:
    """2K passes over a batch's tokens under one layout."""

    def __init__(self, workload: Workload, layout: str, doubled: bool, passes: int) -> None:
        self.workload = workload
        self.layout_name = layout
        self.layout = layouts(workload)[layout]
        self.doubled = doubled
        self.passes = passes
        self.name = layout + (" ×2" if doubled else "")
        self._laid: tuple[int, list[Pass]] = (-1, [])

    def prepare(self, number: int, rows: Sequence[Row]) -> None:
        """Lays out a step's batch: not part of the floor's time."""
        laid = self.layout(rows)
        self._laid = number, [p.doubled() for p in laid] if self.doubled else laid

    @torch.no_grad()
    def __call__(self, number: int, rows: Sequence[Row]) -> None:
        assert self._laid[0] == number
        run = runner(self.workload)
        for _ in range(self.passes // 2 if self.doubled else self.passes):
            for laid in self._laid[1]:
                run(laid)


def candidates(workload: Workload, passes: int) -> list[Floor]:
    """All layouts of the floor, single, and doubled where two points share weights."""
    singly = (False, True) if workload.mode == "lora" else (False,)
    return [Floor(workload, name, twice, passes) for name in layouts(workload) for twice in singly]


def layouts(workload: Workload) -> dict[str, Layout]:
    longest = max(len(row["input_ids"]) for row in workload.rows)
    made: dict[str, Layout] = {
        "equal": lambda rows: equal(workload, rows),
        "sorted": lambda rows: ordered(workload, rows),
    }
    for size in PACKED:
        if size >= longest:
            made[f"packed {size}"] = lambda rows, size=size: packed(workload, rows, size)
    return made


def runner(workload: Workload) -> Callable[[Pass], Tensor]:
    """Label rows' logits of a pass, from the model's own parts."""
    base = workload.base
    if hasattr(base, "bert"):

        def classify(laid: Pass) -> Tensor:
            hidden = _trunk(base.bert, laid.inputs)
            return base.classifier(base.bert.pooler(hidden[laid.example, laid.position][:, None]))

        return classify
    weight = base.get_output_embeddings().weight

    def predict(laid: Pass) -> Tensor:
        hidden = base.model(**laid.inputs, use_cache=False).last_hidden_state[laid.example, laid.position]
        return hidden @ (weight[list(workload.words)] if workload.words else weight).T

    return predict


def _trunk(bert: Any, inputs: dict[str, Tensor]) -> Tensor:
    pooler, bert.pooler = bert.pooler, None
    try:
        return bert(**inputs).last_hidden_state
    finally:
        bert.pooler = pooler


def equal(workload: Workload, rows: Sequence[Row]) -> list[Pass]:
    passes = []
    for _, group in groupby(_by_length(rows), key=lambda row: len(row["input_ids"])):
        passes += [
            _rectangle(workload, chunk, masked=False) for chunk in _chunks(list(group), workload.micro_batch_size)
        ]
    return passes


def ordered(workload: Workload, rows: Sequence[Row]) -> list[Pass]:
    return [_rectangle(workload, chunk, masked=True) for chunk in _chunks(_by_length(rows), workload.micro_batch_size)]


def packed(workload: Workload, rows: Sequence[Row], size: int) -> list[Pass]:
    """Lines of at most `size` tokens, first fit from the longest row on; as many lines a pass as fill a micro-batch."""
    lines: list[list[Row]] = []
    for row in reversed(_by_length(rows)):
        fitting = (line for line in lines if sum(len(r["input_ids"]) for r in line) + len(row["input_ids"]) <= size)
        line = next(fitting, None)
        if line is None:
            lines.append([row])
        else:
            line.append(row)
    tokens = sum(len(row["input_ids"]) for row in rows) / max(1, len(rows)) * workload.micro_batch_size
    return [_packed_pass(workload, chunk) for chunk in _chunks(lines, max(1, round(tokens / size)))]


def _rectangle(workload: Workload, rows: Sequence[Row], masked: bool) -> Pass:
    longest = max(len(row["input_ids"]) for row in rows)
    ids = torch.full((len(rows), longest), workload.pad_token_id)
    mask = torch.zeros_like(ids)
    where: list[tuple[int, int]] = []
    for i, row in enumerate(rows):
        length = len(row["input_ids"])
        ids[i, :length] = torch.tensor(row["input_ids"])
        mask[i, :length] = 1
        where += [(i, position) for position in _label_positions(workload, row)]
    inputs = {"input_ids": ids, "attention_mask": mask} if masked and not bool(mask.all()) else {"input_ids": ids}
    return _placed(workload, inputs, where)


def _packed_pass(workload: Workload, lines: Sequence[Sequence[Row]]) -> Pass:
    longest = max(sum(len(row["input_ids"]) for row in line) for line in lines)
    ids = torch.full((len(lines), longest), workload.pad_token_id)
    position_ids = torch.zeros_like(ids)
    segment = torch.full_like(ids, -1)
    where: list[tuple[int, int]] = []
    for i, line in enumerate(lines):
        start = 0
        for number, row in enumerate(line):
            stop = start + len(row["input_ids"])
            ids[i, start:stop] = torch.tensor(row["input_ids"])
            position_ids[i, start:stop] = torch.arange(stop - start)
            segment[i, start:stop] = number
            where += [(i, start + position) for position in _label_positions(workload, row)]
            start = stop
    mask = segment[:, None, :, None] == segment[:, None, None, :]  # [b, 1, l, l]
    if not hasattr(workload.base, "bert"):
        mask &= torch.ones(longest, longest, dtype=torch.bool).tril()
    return _placed(workload, {"input_ids": ids, "position_ids": position_ids, "attention_mask": mask}, where)


def _label_positions(workload: Workload, row: Row) -> list[int]:
    if hasattr(workload.base, "bert"):
        return [0]
    if workload.words:
        return [len(row["input_ids"]) - 1]
    return [i - 1 for i, label in enumerate(row["labels"]) if label != IGNORE and i > 0]


def _placed(workload: Workload, inputs: dict[str, Tensor], where: list[tuple[int, int]]) -> Pass:
    device = next(workload.model.parameters()).device
    example, position = torch.tensor(where, device=device).T
    return Pass({key: value.to(device) for key, value in inputs.items()}, example, position)


def _by_length(rows: Sequence[Row]) -> list[Row]:
    return sorted(rows, key=lambda row: len(row["input_ids"]))


def _chunks(items: Sequence[Any], size: int) -> list[Any]:
    return [items[i : i + size] for i in range(0, len(items), size)]
