"""A logical batch reaches the model whole: each drawn row once, whatever the micro-batches and processes."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from peft_dpzero import DPZeroError
from peft_dpzero.estimation.batching import LogicalBatches
from peft_dpzero.estimation.sampling import PoissonSampler, new_secret, seeded_secret
from peft_dpzero.estimation.shapes import Shapes
from peft_dpzero.training.pacing import step_loader

from tiny import drawn_values

SHAPES = Shapes(expected_rows=60, most_rows=8, limit=64, together={length: range(1, 9) for length in range(1, 3000)})
ROWS = [{"input_ids": [1] * (1 + i * 7 % 11), "index": i} for i in range(40)]


def collate(rows: list[Any]) -> dict[str, Any]:
    (row,) = rows
    ids = torch.tensor([row["input_ids"]])
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "index": torch.tensor([row["index"]])}


def batches(secret: bytes, dataset: Any = ROWS, rate: float = 0.5, **settings: Any) -> LogicalBatches:
    settings = {"shapes": SHAPES} | settings
    return LogicalBatches(dataset, PoissonSampler(len(dataset), rate, secret), collate, **settings)


def drawn(source: LogicalBatches, step: int) -> list[int]:
    return drawn_values(source.draw(step), "index")


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("most_rows", [1, 4, 100])
def test_every_drawn_row_is_in_one_micro_batch_of_one_process(world_size: int, most_rows: int) -> None:
    secret = seeded_secret(0)
    shapes = replace(SHAPES, together=dict.fromkeys(range(1, 3000), range(1, most_rows + 1)))
    for step in range(5):
        ranks = [batches(secret, rank=rank, world_size=world_size, shapes=shapes) for rank in range(world_size)]
        assert (
            sorted(row for rank in ranks for row in drawn(rank, step))
            == PoissonSampler(40, 0.5, secret).draw(step).tolist()
        )
        for share in (rank.draw(step) for rank in ranks):
            assert all(len(batch["index"]) <= most_rows for batch in share.micro_batches)
            assert len(share.owners) == sum(share.counts)


def neighbors_of(row: int) -> Any:
    """Data sets that hold `row` at its place and other rows elsewhere."""
    others = st.lists(st.integers(1, 64), min_size=40, max_size=40)
    return others.map(
        lambda lengths: [
            ROWS[i] if i == row else {"input_ids": [2] * length, "index": 100 + i} for i, length in enumerate(lengths)
        ]
    )


@given(neighbors_of(7), st.sets(st.integers(1, 12), min_size=1))
def test_how_a_row_is_computed_depends_on_no_other_row(dataset: list[Any], counts: set[int]) -> None:
    """Same padding, in a number of rows that was tried, whatever else was drawn."""
    shapes = replace(SHAPES, together=dict.fromkeys(range(1, 3000), sorted(counts)))

    def seen(data: list[Any]) -> tuple[Any, ...]:
        share = batches(seeded_secret(0), data, rate=1.0, shapes=shapes).draw(0)
        (found,) = [one for one in share.micro_batches if 7 in one["index"].tolist()]
        assert len(found["index"]) in counts
        place = found["index"].tolist().index(7)
        row = {key: (value.shape[1:], value[place].tolist()) for key, value in found.items()}
        return row, bool(found["attention_mask"].all())

    assert seen(dataset) == seen(ROWS)


@given(st.integers(0, 200), st.integers(1, 40), st.sets(st.integers(1, 40), min_size=1), st.integers(0, 1000))
def test_rows_are_split_at_least_cost(number: int, length: int, counts: set[int], pass_tokens: int) -> None:
    shapes = Shapes(100, 40, together={length: sorted(counts)}, pass_tokens=pass_tokens)
    row = {"attention_mask": torch.zeros(1, length), "input_ids": torch.zeros(1, length)}
    sizes = shapes.sizes(row, number)
    assert set(sizes) <= counts
    assert sizes == sorted(sizes, reverse=True)
    # Only the last is filled up.
    assert number <= sum(sizes)
    assert not sizes or sum(sizes[:-1]) < number

    def cost(sizes: list[int]) -> int:
        return sum(size * length + pass_tokens for size in sizes)

    assert all(cost(sizes) <= cost([size] * -(-number // size)) for size in counts)


@example(384, 2, 28.0, None)
@given(st.integers(0, 3000), st.integers(1, 64), st.floats(0.1, 5000), st.sampled_from([None, 512, 2048]))
def test_padded_lengths_are_longer_than_the_row_and_not_by_much(
    tokens: int, most: int, expected: float, limit: int | None
) -> None:
    shapes = Shapes(expected, most, limit=limit)
    counts = {length: shapes.wanted_counts(length) for length in shapes.lengths(1024)}
    shapes = replace(shapes, together=counts)
    length = shapes.length(tokens)
    assert all(1 <= count <= most for count in shapes.counts(length))
    assert tokens <= length <= max(tokens + 4, 1.26 * tokens)
    if length == tokens > 0:
        ids = torch.ones(1, tokens, dtype=torch.long)
        assert shapes.sizes({"input_ids": ids, "attention_mask": ids}, 2) == [1, 1]
    assert limit is None or length <= max(limit, tokens)
    longer = shapes.length(tokens + 1)
    assert longer >= length or max(shapes.counts(length)) > 1 or tokens + 1 == longer


def test_missing_rows_are_made_up_and_hold_nothing_of_the_data() -> None:
    row = {
        "input_ids": torch.tensor([[7, 8, 9]]),
        "attention_mask": torch.tensor([[1, 1, 0]]),
        "labels": torch.tensor([[7, -100, -100]]),
        "weight": torch.tensor([0.25]),
    }
    made = Shapes(4, 4, pad_token_id=3).made_up(row)
    assert {key: value.tolist() for key, value in made.items()} == {
        "input_ids": [[3, 3, 3]],
        "attention_mask": [[1, 0, 0]],
        "labels": [[-100, -100, -100]],
        "weight": [0.0],
    }
    assert Shapes(4, 4).key(made) == Shapes(4, 4).key(row)


@pytest.mark.parametrize("left", [False, True])
def test_padding_that_a_row_came_with_is_cut_off(left: bool) -> None:
    ids, mask = [5, 6, 7] + [0] * 9, [1, 1, 1] + [0] * 9
    row = {"input_ids": torch.tensor([ids[::-1] if left else ids])}
    row["attention_mask"] = torch.tensor([mask[::-1] if left else mask])
    row |= {"labels": row["input_ids"].masked_fill(row["attention_mask"] == 0, -100), "weight": torch.ones(1)}
    padded = SHAPES.padded(row)
    kept = [7, 6, 5] if left else [5, 6, 7]
    assert padded["input_ids"].tolist() == [[*kept, 0]]
    assert padded["attention_mask"].tolist() == [[1, 1, 1, 0]]
    assert padded["labels"].tolist() == [[*kept, -100]]
    assert padded["weight"].shape == (1,)
    alone = replace(SHAPES, alone=True).padded(row)
    assert alone["input_ids"].tolist() == [kept]


def test_class_labels_are_no_tokens() -> None:
    row = {"input_ids": torch.ones(1, 3, dtype=torch.long), "attention_mask": torch.ones(1, 3, dtype=torch.long)}
    row["labels"] = torch.tensor([[1, 0, 1]])
    assert replace(SHAPES, token_labels=False).padded(row)["labels"].shape == (1, 3)
    assert SHAPES.padded(row)["labels"].shape == (1, 4)
    floats = row | {"labels": torch.tensor([[1.0, 0.0, 1.0]])}
    assert SHAPES.padded(floats)["labels"].shape == (1, 3)


def test_rows_that_are_nobodys_or_too_long_leave_their_unit_empty() -> None:
    data = [None, *ROWS[1:4], {"input_ids": [1] * 30, "index": 4}]
    share = batches(seeded_secret(0), data, rate=1.0, shapes=replace(SHAPES, max_length=22)).draw(0)
    assert (share.num_units, sorted(share.owners.tolist())) == (5, [1, 2, 3])


@pytest.mark.parametrize("made", [{"x": torch.zeros(2)}, {"x": torch.zeros(0, 3)}])
def test_collators_that_make_several_rows_of_one_are_refused(made: dict[str, Any]) -> None:
    source = LogicalBatches(ROWS, PoissonSampler(40, 1.0, new_secret()), lambda rows: made, SHAPES)
    with pytest.raises(DPZeroError, match="one row"):
        source.draw(0)


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

    wanted = PoissonSampler(40, 0.2, seeded_secret(0)).draw(0).tolist()
    data = Rows(ROWS)
    data.read = []
    batches(seeded_secret(0), data, rate=0.2).draw(0)
    assert data.read == wanted


def masks(seed: int, secret: bytes) -> list[list[float]]:
    """What a collator that draws from the global generators makes of all rows, which are drawn for certain."""

    def masking(rows: list[Any]) -> dict[str, Any]:
        return {"draws": torch.tensor([[torch.rand(()).item(), random.random(), float(np.random.rand())]])}

    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed)
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    share = LogicalBatches(ROWS, PoissonSampler(40, 1.0, secret), masking, SHAPES).draw(0)
    assert torch.equal(before[0], torch.get_rng_state())
    assert before[1:] == (random.getstate(), np.random.get_state()[1].tolist())
    draws = drawn_values(share, "draws")
    assert len({tuple(draw) for draw in draws}) == 40
    return draws


def test_a_masking_collator_draws_from_the_secret_and_not_from_the_users_seed() -> None:
    one, other = masks(0, new_secret())[0], masks(0, new_secret())[0]
    assert all(a != b for a, b in zip(one, other, strict=True))
    assert masks(0, seeded_secret(0)) == masks(1, seeded_secret(0))


def test_the_trainers_loader_carries_no_data() -> None:
    loader = step_loader(num_units=40, logical_batch_size=8)
    assert list(loader) == [{}] * 5
    assert (len(loader), len(loader.dataset)) == (5, 40)


def test_rows_are_padded_to_fewer_lengths_where_passes_cost_more() -> None:
    many, few = (replace(SHAPES, limit=None, lengths_per_octave=count) for count in (4, 2))
    assert sorted({many.length(tokens) for tokens in range(64, 128)}) == [80, 96, 112, 128]
    assert sorted({few.length(tokens) for tokens in range(64, 128)}) == [96, 128]
