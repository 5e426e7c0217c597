"""What the processes of a run compare before the first release."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pytest
import torch
from peft_dpzero import DPZeroConfig, DPZeroError, make_plan
from peft_dpzero.checks.agreement import check_agreement
from peft_dpzero.estimation.batching import LogicalBatches
from peft_dpzero.estimation.fingerprint import content_digest
from peft_dpzero.estimation.sampling import PoissonSampler, new_secret
from peft_dpzero.estimation.shapes import Shapes
from peft_dpzero.estimation.units import units_by_column
from peft_dpzero.perturbation.perturbation import Perturbation
from torch import nn

SHAPES = Shapes(expected_rows=8, most_rows=4, limit=64)
ROWS = [{"input_ids": torch.arange(i, i + 4), "labels": i % 2, "user": i // 2} for i in range(100)]


class Masked:
    """Rows that a transform masks, as the global generators draw."""

    def __len__(self) -> int:
        return len(ROWS)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"input_ids": torch.where(torch.rand(4) < 0.5, ROWS[index]["input_ids"], np.random.randint(100))}


class Failing(Masked):
    def __getitem__(self, index: int) -> dict[str, Any]:
        raise KeyError("private text")


def facts(rank: int = 0, data: Any = ROWS, replayed: int = 0, sizes: tuple[int, int] = (3, 2), **changes: Any) -> Any:
    """What the process of this rank would send."""
    config = DPZeroConfig(**({"noise_multiplier": 1.0, "target_delta": 1e-3} | changes))
    units = units_by_column(data, config.privacy_unit, 4) if config.privacy_unit else None
    plan = make_plan(config, len(units or data), 8, 3)
    sampler = PoissonSampler(plan.num_units, plan.sample_rate, new_secret())
    batches = LogicalBatches(data, sampler, list, SHAPES, rank, 2, units)
    sent: list[Mapping[str, str]] = []

    def gather(own: Mapping[str, str]) -> list[Mapping[str, str]]:
        sent.append(own)
        return [own | {"rank": "0"}, own | {"rank": "1"}]

    check_agreement(plan, batches, Perturbation(nn.Linear(*sizes)), replayed, gather)
    return sent[0]


def compared(*sent: Mapping[str, str]) -> None:
    batches = LogicalBatches(ROWS, PoissonSampler(100, 0.08, new_secret()), list, SHAPES)  # type: ignore[arg-type]
    plan = make_plan(DPZeroConfig(noise_multiplier=1.0, target_delta=1e-3), 100, 8, 3)
    check_agreement(plan, batches, Perturbation(nn.Linear(3, 2)), 0, lambda own: sent)


@pytest.mark.parametrize("data", [ROWS, Masked(), Failing()])
def test_processes_with_the_same_run_agree(data: Any) -> None:
    torch.manual_seed(1)
    first = facts(0, data)
    torch.manual_seed(2)
    compared(first, facts(1, data))


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"data": ROWS[::-1]}, "order or content.*shuffle with a fixed seed"),
        ({"data": ROWS[:90]}, "num_units"),
        ({"data": [*ROWS[:50], {**ROWS[50], "labels": 7}, *ROWS[51:]]}, "order or content"),
        ({"clipping_threshold": 2.0}, "clipping_threshold.*same data set, DPZeroConfig"),
        ({"noise_multiplier": 1.1}, "noise_multiplier"),
        ({"sizes": (2, 3)}, "trainable parameters.*same model"),
        ({"replayed": 1}, "releases made before"),
    ],
)
def test_what_differs_is_named_with_the_way_out(changes: dict[str, Any], named: str) -> None:
    data = [*ROWS[:50], {**ROWS[50], "labels": 0}, *ROWS[51:]]
    with pytest.raises(DPZeroError, match=named):
        compared(facts(0, data=data), facts(1, **({"data": data} | changes)))


def test_other_units_or_a_rank_twice_are_refused() -> None:
    regrouped = [{**row, "user": row["user"] if i < 97 else 48} for i, row in enumerate(ROWS)]
    with pytest.raises(DPZeroError, match="order or content"):
        compared(facts(0, privacy_unit="user"), facts(1, data=regrouped, privacy_unit="user"))
    with pytest.raises(DPZeroError, match=r"rank=accelerator\.process_index"):
        compared(facts(0), facts(0))


def test_the_sampling_key_is_not_sent() -> None:
    assert facts() == facts()


SAME: list[Callable[[], Any]] = [
    lambda: {"a": torch.arange(6).view(2, 3), "b": [1, 2.5, None, "x"]},
    lambda: {"b", "a", "c"},
    lambda: torch.ones(3, dtype=torch.bfloat16),
    lambda: np.array(["a", {"b": 1}], dtype=object),
    lambda: complex(1, 2),
]


@pytest.mark.parametrize("make", SAME)
def test_equal_values_have_equal_digests(make: Callable[[], Any]) -> None:
    assert content_digest(make()) == content_digest(make())


@pytest.mark.slow
def test_a_digest_is_the_same_in_every_process() -> None:
    code = "from peft_dpzero.estimation.fingerprint import content_digest as d; print(d({'x': {'a', 'b', 'c'}}).hex())"
    found = {
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
        for _ in range(2)
    }
    assert len(found) == 1


def test_unlike_values_have_unlike_digests() -> None:
    values = [
        torch.zeros(2),
        torch.zeros(2, 1),
        torch.zeros(2, dtype=torch.float64),
        np.zeros(2),
        [0, 0],
        ["0", "0"],
        [[0], 0],
        {"a": 0},
        {"a": "0"},
        b"a",
        "a",
        None,
        0,
        False,
        0.0,
    ]
    assert len({content_digest(value) for value in values}) == len(values)
