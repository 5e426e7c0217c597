"""How a step's cost grows: with tokens, with K, and with the vocabulary beyond the label rows."""

from __future__ import annotations

import statistics
from typing import Any

import torch
from peft_dpzero import Verbalizer

from ours import Batches, Ours
from timing import alternate, linear_fit, ratios, seconds, spread
from workloads import Row, Workload, llama, minilm, pad_tokens

TOKENS = (8, 16, 32, 64, 96)
DIRECTIONS = (1, 2, 4, 8)
VOCABULARIES = (8_000, 128_000)


def fits(rounds: int) -> dict[str, Any]:
    """MiniLM with LoRA: seconds against the tokens of a logical batch (K = 1), and against K (16 rows)."""
    tokens, token_seconds = _against_tokens(rounds)
    directions, direction_seconds = _against_directions(rounds)
    return {
        "tokens": {"x": tokens, "seconds": token_seconds} | linear_fit(tokens, token_seconds),
        "directions": {"x": directions, "seconds": direction_seconds} | linear_fit(directions, direction_seconds),
    }


def _against_tokens(rounds: int) -> tuple[list[int], list[float]]:
    """Micro-batches of 8 rows, so that larger batches run no larger matrix products."""
    workloads = [minilm("lora", size, 8) for size in TOKENS]
    steps = [Ours(workload, 1) for workload in workloads]
    draws = [Batches(workload) for workload in workloads]
    found: list[tuple[int, float]] = []
    steps[0](0, draws[0](0))
    for number in range(1, rounds + 1):
        for step, draw in zip(steps, draws, strict=True):
            rows = draw(number)
            found.append((sum(len(row["input_ids"]) for row in rows), seconds(step, number, rows)))
    return [count for count, _ in found], [taken for _, taken in found]


def _against_directions(rounds: int) -> tuple[list[int], list[float]]:
    workload = minilm("lora", 16, 16)
    draw = Batches(workload)
    rows = draw(1)
    steps = [Ours(workload, k) for k in DIRECTIONS]
    steps[0](0, draw(0))
    times = {k: [seconds(step, 1, rows) for _ in range(rounds)] for k, step in zip(DIRECTIONS, steps, strict=True)}
    return list(DIRECTIONS), [statistics.median(times[k]) for k in DIRECTIONS]


def vocabulary(rounds: int) -> dict[str, Any]:
    """A step's time with 128,000 tokens in the vocabulary over that with 8,000: the rest of the model is the same.

    With label words (two rows of the output embedding are needed, whatever the vocabulary) and with a token loss on
    the last token alone (one row of logits an example is needed).
    """
    found = {}
    for name in ("label words", "one label token"):
        made = {size: _short_labels(size, words=name == "label words") for size in VOCABULARIES}
        steps = {str(size): Ours(workload, 1) for size, workload in made.items()}
        times = alternate(steps, Batches(made[VOCABULARIES[0]]), rounds)
        found[name] = spread(ratios(times, str(VOCABULARIES[1]), str(VOCABULARIES[0])))
    return {"sizes": list(VOCABULARIES), "seconds_ratio": found}


def _short_labels(vocab_size: int, words: bool) -> Workload:
    shape = {"vocab_size": vocab_size, "hidden_size": 384, "intermediate_size": 1024, "num_hidden_layers": 6}
    workload = llama(
        "lora",
        shape | {"num_attention_heads": 6},
        batch_size=16,
        micro_batch_size=16,
        lengths=(32, 128),
        completion=0.0,
    )
    if words:
        workload.task = Verbalizer(_ids, ("5", "6"), causal=True)
        workload.rows = [{"input_ids": row["input_ids"], "labels": i % 2} for i, row in enumerate(workload.rows)]
        workload.collate = _collate
    return workload


class _Ids:
    """A tokenizer whose words are ids."""

    mask_token_id = None

    def __call__(self, word: str, add_special_tokens: bool = False) -> dict[str, list[int]]:
        return {"input_ids": [int(word)]}


_ids = _Ids()


def _collate(rows: list[Row]) -> dict[str, Any]:
    batch = pad_tokens([row | {"labels": [0] * len(row["input_ids"])} for row in rows])
    return batch | {"labels": torch.tensor([row["labels"] for row in rows])}
