"""A logical batch reaches the model whole: each drawn row once, whatever the micro-batches and processes."""

from __future__ import annotations

import random
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from peft_dpzero import LogicalBatches, PoissonSampler, new_secret
from peft_dpzero.estimation.batching import step_loader
from peft_dpzero.estimation.sampling import seeded_secret

ROWS = [{"input_ids": [1] * (1 + i * 7 % 11), "index": i} for i in range(40)]


def collate(rows: list[Any]) -> dict[str, Any]:
    assert rows
    return {"index": [row["index"] for row in rows], "length": [len(row["input_ids"]) for row in rows]}


def batches(secret: bytes, dataset: Any = ROWS, rate: float = 0.5, **settings: Any) -> LogicalBatches:
    settings = {"micro_batch_size": 3} | settings
    return LogicalBatches(dataset, PoissonSampler(len(dataset), rate, secret), collate, **settings)


def drawn(source: LogicalBatches, step: int) -> list[dict[str, Any]]:
    return list(source.draw(step).micro_batches)


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("micro_batch_size", [1, 4, 100])
def test_every_drawn_row_is_in_one_micro_batch_of_one_process(world_size: int, micro_batch_size: int) -> None:
    secret = seeded_secret(0)
    for step in range(5):
        sharded = {"micro_batch_size": micro_batch_size, "world_size": world_size}
        ranks = [drawn(batches(secret, rank=rank, **sharded), step) for rank in range(world_size)]
        seen = [i for micro_batches in ranks for batch in micro_batches for i in batch["index"]]
        assert sorted(seen) == PoissonSampler(40, 0.5, secret).draw(step).tolist()
        for share in ranks:
            longest = max((length for batch in share for length in batch["length"]), default=0)
            tokens = [len(batch["length"]) * max(batch["length"]) for batch in share]
            assert all(count <= micro_batch_size * longest for count in tokens)


def test_rows_of_like_length_share_a_micro_batch() -> None:
    lengths = [batch["length"] for batch in batches(seeded_secret(0)).draw(0).micro_batches]
    assert len(lengths) > 1
    assert all(max(shorter) <= min(longer) for shorter, longer in pairwise(lengths))


def test_draws_are_a_function_of_key_and_step() -> None:
    first, again, other = batches(seeded_secret(0)), batches(seeded_secret(0)), batches(seeded_secret(1))
    assert drawn(first, 3) == drawn(first, 3) == drawn(again, 3)
    assert drawn(first, 3) != drawn(first, 4)
    assert drawn(first, 3) != drawn(other, 3)


def test_processes_that_share_a_key_draw_alike() -> None:
    first, second = batches(new_secret()), batches(new_secret())
    key: list[torch.Tensor] = []
    first.share_key(lambda tensor: key.append(tensor) or tensor)
    second.share_key(lambda tensor: key[0])
    assert drawn(first, 0) == drawn(second, 0)


def test_an_empty_draw_never_meets_the_collator() -> None:
    empty = batches(seeded_secret(0), rate=1e-6)
    assert [len(empty.draw(step).micro_batches) for step in range(10)] == [0] * 10


def test_only_drawn_rows_are_read() -> None:
    class Rows(list[Any]):
        read: list[int]

        def __getitem__(self, index: Any) -> Any:
            self.read.append(index)
            return super().__getitem__(index)

    class FetchedTogether(Rows):
        def __getitems__(self, indices: list[int]) -> list[Any]:
            return [self[i] for i in indices]

    wanted = PoissonSampler(40, 0.2, seeded_secret(0)).draw(0).tolist()
    for kind in (Rows, FetchedTogether):
        data = kind(ROWS)
        data.read = []
        batches(seeded_secret(0), data, rate=0.2).draw(0)
        assert data.read == wanted


def masks(seed: int, secret: bytes) -> list[list[float]]:
    """What a collator that draws from the global generators makes of all rows, which are drawn for certain."""

    def masking(rows: list[Any]) -> dict[str, Any]:
        return {"draws": [torch.rand(()).item(), random.random(), float(np.random.rand())]}

    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed)
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    batches = LogicalBatches(ROWS, PoissonSampler(40, 1.0, secret), masking, micro_batch_size=40).draw(0).micro_batches
    assert torch.equal(before[0], torch.get_rng_state())
    assert before[1:] == (random.getstate(), np.random.get_state()[1].tolist())
    return [batch["draws"] for batch in batches]


def test_a_masking_collator_draws_from_the_secret_and_not_from_the_users_seed() -> None:
    one, other = masks(0, new_secret())[0], masks(0, new_secret())[0]
    assert all(a != b for a, b in zip(one, other, strict=True))
    assert masks(0, seeded_secret(0)) == masks(1, seeded_secret(0))


def test_the_trainers_loader_carries_no_data() -> None:
    loader = step_loader(num_units=40, steps_per_epoch=5)
    assert list(loader) == [{}] * 5
    assert (len(loader), len(loader.dataset)) == (5, 40)
