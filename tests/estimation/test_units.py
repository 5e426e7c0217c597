"""Privacy units of many examples: sampled whole, averaged to one row, clipped once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from peft_dpzero import DPZeroError, DPZeroTrainer, Released
from peft_dpzero.estimation.batching import LogicalBatches
from peft_dpzero.estimation.sampling import PoissonSampler, new_secret
from peft_dpzero.estimation.shapes import Shapes
from peft_dpzero.estimation.units import units_by_column
from peft_dpzero.mechanism.private_sum import PrivateSum

from tiny import arguments, drawn_values, explicit, tiny_dataset, tiny_model

SIZES = [1, 2, 3, 7, 50, 500]


def owned(ids: list[Any], column: str = "user_id") -> Dataset:
    return tiny_dataset("classifier", len(ids)).add_column(column, ids)


def crowd(kind: type) -> Dataset:
    return owned([kind(user) for user, size in enumerate(SIZES) for _ in range(size)])


@pytest.mark.parametrize("kind", [int, str])
def test_rows_are_grouped_by_their_owner(kind: type) -> None:
    data = crowd(kind)
    units = units_by_column(data, "user_id", 1000)
    assert len(units) == len(SIZES)
    chosen = [units.choose(u, np.random.default_rng(0)) for u in range(len(SIZES))]
    assert [len(rows) for rows in chosen] == SIZES
    assert [{data[int(i)]["user_id"] for i in rows} for rows in chosen] == [{kind(u)} for u in range(len(SIZES))]


def test_rows_beyond_the_limit_are_chosen_at_random_and_once() -> None:
    units = units_by_column(crowd(int), "user_id", 5)
    draws = [units.choose(5, np.random.default_rng(seed)) for seed in range(400)]
    assert all(len(set(rows.tolist())) == 5 for rows in draws)
    counts = np.bincount(np.concatenate(draws) - sum(SIZES[:5]), minlength=500)
    assert 0.5 < counts.var() / counts.mean() < 1.5


def whose(rows: list[Any]) -> dict[str, torch.Tensor]:
    return {"user": torch.tensor([row["user_id"] for row in rows])}


def test_a_drawn_unit_brings_its_rows_whole_to_one_process() -> None:
    units = units_by_column(crowd(int), "user_id", 5)
    secret = new_secret()
    for step in range(5):
        seen: list[int] = []
        for rank in range(2):
            sampler = PoissonSampler(len(units), 0.5, secret)
            shapes = Shapes(expected_rows=50, most_rows=4)
            batches = LogicalBatches(crowd(int), sampler, whose, shapes, rank, 2, units)
            share = batches.draw(step)
            users = drawn_values(share, "user")
            owners = share.owners.tolist()
            assert len(owners) == len(users)
            by_owner = {owner: {u for o, u in zip(owners, users, strict=True) if o == owner} for owner in owners}
            assert all(len(found) == 1 for found in by_owner.values())
            assert all(users.count(u) == min(5, SIZES[u]) for u in set(users))
            seen += set(users)
        assert sorted(seen) == PoissonSampler(len(units), 0.5, secret).draw(step).tolist()


def test_many_examples_count_as_their_mean(tmp_path: Path) -> None:
    """500 copies of an example weigh as much as one."""

    def released(copies: int, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Released:
        rows = tiny_dataset("classifier", 2)
        data = rows.select([0] * copies + [1]).add_column("user_id", ["a"] * copies + ["b"])
        torch.manual_seed(3)
        model = get_peft_model(
            tiny_model("classifier"), LoraConfig(task_type="SEQ_CLS", r=2, target_modules=["query", "value"])
        )
        kept: list[Released] = []
        release = PrivateSum.release
        monkeypatch.setattr(PrivateSum, "release", lambda *a: kept.append(release(*a)) or kept[-1])
        config = explicit(
            noise_multiplier=0, target_delta=1e-5, privacy_unit="user_id", max_examples_per_unit=1000, num_directions=3
        )
        trainer = DPZeroTrainer(
            model,
            arguments(folder, max_steps=1, per_device_train_batch_size=2),
            train_dataset=data,
            dpzero_config=config,
        )
        assert trainer.privacy_plan.num_units == 2
        trainer.train()
        return kept[-1]

    with pytest.MonkeyPatch.context() as patch:
        one = released(1, tmp_path / "one", patch)
    with pytest.MonkeyPatch.context() as patch:
        many = released(500, tmp_path / "many", patch)
    assert one.coefficients == pytest.approx(many.coefficients, rel=1e-3)


def test_units_set_the_plan_the_record_and_the_card(tmp_path: Path) -> None:
    data = owned([i // 4 for i in range(64)])
    config = explicit(noise_multiplier=1.0, target_delta=1e-5, privacy_unit="user_id", num_directions=2)
    trainer = DPZeroTrainer(
        tiny_model("classifier"), arguments(tmp_path, max_steps=-1, num_train_epochs=2), train_dataset=data,
        dpzero_config=config,
    )  # fmt: skip
    plan = trainer.privacy_plan
    assert (plan.num_units, plan.sample_rate, plan.steps) == (16, 4 / 16, 8)
    trainer.train()
    trainer.save_model()
    assert trainer.privacy_record()["privacy_unit"] == "user_id"
    card = (tmp_path / "README.md").read_text()
    assert "all examples of one `user_id` together" in card
    assert "one value of `user_id`" in card


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (owned(["a", None, "b", "a"]), "null"),
        (owned([0.5, 1.5, 2.5, 3.5]), "neither a string nor an integer"),
        (owned([1, 2, 3, 4], column="owner"), "not a column"),
    ],
)
def test_units_that_nobody_can_name_are_refused(data: Dataset, words: str) -> None:
    with pytest.raises(DPZeroError, match=words):
        units_by_column(data, "user_id", 5)


def test_rows_without_the_column_are_refused_in_plain_lists() -> None:
    rows = [{"user_id": 1, "input_ids": [1]}, {"input_ids": [2]}]
    with pytest.raises(DPZeroError, match="missing from a row"):
        units_by_column(rows, "user_id", 5)
