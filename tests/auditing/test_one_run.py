"""The one-run audit, end to end on tiny models."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from peft_dpzero import DPZeroConfig, DPZeroError, DPZeroTrainer, audit
from peft_dpzero.auditing.canaries import CanaryData, random_canaries
from peft_dpzero.estimation.batching import LogicalBatches
from peft_dpzero.estimation.sampling import PoissonSampler, seeded_secret
from peft_dpzero.estimation.shapes import Shapes
from peft_dpzero.estimation.units import units_by_column
from transformers import default_data_collator

from tiny import VOCABULARY, arguments, tiny_dataset, tiny_model

ROWS, CANARIES, LENGTH = 8, 60, 4
COINS = np.array([True, False, True, False])


def builder(folder: Path, sigma: float, directions: int = 64, users: type | None = None) -> Any:
    """Every example in each of two steps, so that few steps tell much."""

    def build(add_canaries: Any) -> DPZeroTrainer:
        rows = tiny_dataset("causal_lm", ROWS, LENGTH)
        if users is not None:
            rows = rows.add_column("user", [users(i // 2) for i in range(ROWS)])
        data = add_canaries(rows)
        size = ROWS + CANARIES if users is None else ROWS // 2 + CANARIES
        settings = {"max_steps": 2, "per_device_train_batch_size": size, "learning_rate": 1e-4}
        return DPZeroTrainer(
            tiny_model("causal_lm"),
            arguments(folder, **settings),
            train_dataset=data,
            dpzero_config=DPZeroConfig(
                noise_multiplier=sigma,
                target_delta=1e-3,
                num_directions=directions,
                clipping_threshold=1.0,
                privacy_unit=None if users is None else "user",
            ),
        )

    return build


@pytest.mark.slow
def test_weak_noise_is_seen_through_and_strong_noise_is_not(tmp_path: Path) -> None:
    weak = audit(builder(tmp_path, 0.2), CANARIES)
    assert weak.guesses == 30
    assert weak.correct >= 28
    assert weak.epsilon_lower_bound > 1.0
    assert weak.claimed_epsilon is not None
    assert not weak.refutes_claim
    strong = audit(builder(tmp_path, 4.0), CANARIES)
    assert strong.claimed_epsilon is not None
    assert strong.epsilon_lower_bound < strong.claimed_epsilon < 1.2
    assert strong.correct < weak.correct
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("users", [str, int])
def test_every_canary_is_a_user_of_its_own(users: type, tmp_path: Path) -> None:
    data = CanaryData(tiny_dataset("causal_lm", ROWS).add_column("user", [users(i // 2) for i in range(ROWS)]), COINS)
    units = units_by_column(data, "user", 16)
    assert len(units) == ROWS // 2 + len(COINS)
    sizes = [len(units.choose(unit, np.random.default_rng(0))) for unit in range(len(units))]
    assert sizes == [2] * (ROWS // 2) + [1] * len(COINS)
    weak = audit(builder(tmp_path, 0.2, users=users), CANARIES)
    assert weak.correct >= 28
    assert weak.claimed_epsilon is not None


def test_the_auditors_own_rows_may_be_canaries(tmp_path: Path) -> None:
    rows = list(tiny_dataset("causal_lm", 2 * CANARIES, LENGTH))[CANARIES:]
    result = audit(builder(tmp_path, 0.5, directions=2), rows, guesses=20, confidence=0.9)
    assert (result.canaries, result.guesses, result.confidence, result.steps) == (CANARIES, 20, 0.9, 2)
    assert result.to_dict()["refutes_claim"] is False


def test_absent_canaries_are_never_handed_out_and_keep_their_index() -> None:
    data = CanaryData(tiny_dataset("classifier", 3), np.array([True, False, True]))
    data.canaries = [{"input_ids": [i]} for i in range(3)]
    assert len(data) == 6
    assert [data[i] for i in (3, 4, 5)] == [{"input_ids": [0]}, None, {"input_ids": [2]}]


def test_a_step_that_draws_absent_canaries_alone_has_no_rows() -> None:
    data = CanaryData(tiny_dataset("classifier", 1), np.zeros(200, dtype=bool))
    shapes = Shapes(expected_rows=4, most_rows=4, limit=64)
    sampler = PoissonSampler(len(data), 0.05, seeded_secret(0))
    batches = LogicalBatches(data, sampler, default_data_collator, shapes)
    counts = [sum(batches.draw(step).counts) for step in range(40)]
    assert set(counts) == {0, 1}


@pytest.mark.parametrize("kind", ["causal_lm", "classifier", "tagger"])
def test_random_canaries_look_like_the_data(kind: str) -> None:
    data = tiny_dataset(kind, 30).map(lambda row: {"input_ids": [2, *row["input_ids"][1:]]})
    if kind == "causal_lm":
        data = data.map(lambda row: {"labels": [-100, *row["input_ids"][1:]]})
    known = {tuple(row["input_ids"]) for row in data}
    canaries = random_canaries(data, 50, VOCABULARY, np.random.default_rng(1))
    for row in canaries:
        ids = row["input_ids"]
        assert row.keys() == data[0].keys()
        assert ids[0] == 2
        assert 2 not in ids[1:]
        assert max(ids) < VOCABULARY
        assert tuple(ids) not in known
        if kind == "causal_lm":
            assert row["labels"] == [-100, *ids[1:]]
        elif kind == "tagger":
            assert len(row["labels"]) == len(ids)
            assert set(row["labels"]) <= {0, 1, 2}
    if kind == "classifier":
        assert {row["labels"] for row in canaries} == {0, 1}


def forgets_the_canaries(add_canaries: Any, folder: Path) -> Any:
    return builder(folder, 1.0)(lambda data: data)


def pushes(add_canaries: Any, folder: Path) -> Any:
    trainer = builder(folder, 1.0)(add_canaries)
    trainer.args.push_to_hub = True
    return trainer


@pytest.mark.parametrize(
    ("build", "options", "message"),
    [
        (forgets_the_canaries, {}, "call its argument once"),
        (pushes, {}, "push_to_hub=False"),
        (pushes, {"canaries": 3}, "At least 4 canaries"),
        (pushes, {"canaries": 8, "guesses": 3}, "even number"),
        (pushes, {"canaries": 8, "guesses": 10}, "even number"),
    ],
)
def test_what_cannot_be_audited_is_refused(build: Any, options: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(DPZeroError, match=message):
        audit(lambda add_canaries: build(add_canaries, tmp_path), **options)


def test_rows_without_tokens_need_canaries_of_the_users_own() -> None:
    with pytest.raises(DPZeroError, match="rows of your own"):
        random_canaries([{"pixels": [1]}], 4, 10, np.random.default_rng(0))
