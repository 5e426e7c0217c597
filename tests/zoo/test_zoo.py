"""Stock architectures: adding, removing or replacing a row changes no other row's contribution, or there is no run."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from peft_dpzero import infer_task
from peft_dpzero.checks.architectures import KNOWN_TYPES
from peft_dpzero.estimation.shortcuts.kept_trunk import KeptTrunk

from zoo import neighbors
from zoo.architectures import ARCHITECTURES, BY_NAME, attentions, build
from zoo.neighbors import ALL, FEW, LENGTHS, SHORTCUTS, Finding, Neighbor, Row, differences, rows_of

DTYPES = (torch.float32, torch.bfloat16)
# One of each kind of mask, position and mixing.
FAST = (
    "BERT",
    "ModernBERT",
    "GPT-2",
    "Llama",
    "Llama, dynamic RoPE",
    "Phi-3, longrope",
    "Gemma 3",
    "Mixtral",
    "T5",
    "Mamba",
)
ABOVE_A_TRUNK = ("BERT", "Llama, dynamic RoPE", "Phi-3, longrope", "Gemma 3")


def named(value: object) -> str:
    """In a test's name, without "torch."."""
    return str(value).removeprefix("torch.")


def examined(
    name: str, dtype: torch.dtype, attention: str | None, shortcuts: str, neighbors: tuple[Neighbor, ...]
) -> Finding:
    """What the other rows' contributions do in one architecture."""
    architecture = BY_NAME[name]
    model = build(architecture, dtype, attention)
    rows = rows_of(architecture.kind)
    return differences(model, infer_task(model), rows, neighbors=neighbors, poisons=True, shortcuts=shortcuts)


@pytest.mark.parametrize(
    ("dtype", "shortcuts"),
    [
        (torch.float32, "chosen"),
        (torch.float32, "plain"),
        (torch.bfloat16, "chosen"),
        pytest.param(torch.bfloat16, "plain", marks=pytest.mark.slow),
    ],
    ids=named,
)
@pytest.mark.parametrize("name", FAST)
def test_rows_are_strangers(name: str, dtype: torch.dtype, shortcuts: str) -> None:
    found = examined(name, dtype, None, shortcuts, FEW)
    assert found.independent, str(found)


def test_all_architectures_whose_rows_share_passes_are_tried() -> None:
    assert set(KNOWN_TYPES) <= {architecture.make_config().model_type for architecture in ARCHITECTURES}


@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.bfloat16, marks=pytest.mark.slow)], ids=named)
@pytest.mark.parametrize("name", ABOVE_A_TRUNK)
def test_rows_are_strangers_above_a_trunk_that_is_kept(
    name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    filled: list[int] = []
    fill = KeptTrunk.fill

    def noting(self: KeptTrunk, passes: Any, run: Any) -> None:
        filled.append(len(passes))
        fill(self, passes, run)

    monkeypatch.setattr(KeptTrunk, "fill", noting)
    architecture = BY_NAME[name]
    model = build(architecture, dtype)
    layers = {key: int(found[1]) for key, _ in model.named_parameters() if (found := re.search(r"\.(\d+)\.", key))}
    for key, parameter in model.named_parameters():
        parameter.requires_grad_(parameter.requires_grad and layers.get(key) == max(layers.values()))
    found = differences(model, infer_task(model), rows_of(architecture.kind), neighbors=FEW, poisons=True)
    assert found.independent, str(found)
    assert len(filled) > len(FEW), "the trunk was not kept"


@pytest.mark.zoo
@pytest.mark.parametrize("shortcuts", SHORTCUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=named)
@pytest.mark.parametrize(
    ("name", "attention"),
    [(architecture.name, attention) for architecture in ARCHITECTURES for attention in ("eager", "sdpa")],
)
def test_rows_are_strangers_in_all_architectures(name: str, attention: str, dtype: torch.dtype, shortcuts: str) -> None:
    if attention not in attentions(BY_NAME[name]):
        pytest.skip("The architecture does not have it.")
    found = examined(name, dtype, attention, shortcuts, ALL)
    assert found.independent, str(found)


def test_the_harness_sees_rows_that_look_at_others(monkeypatch: pytest.MonkeyPatch) -> None:
    def crowded(rows: Sequence[Row]) -> torch.Tensor:
        return torch.tensor([[len(row["input_ids"]), len(rows)] for row in rows])

    model = build(BY_NAME["BERT"])
    monkeypatch.setattr(neighbors, "prepared", lambda *args, **kwargs: crowded)
    found = differences(model, infer_task(model), rows_of("classifier"), neighbors=FEW)
    assert (found.outcome, found.rows) == ("differs", len(LENGTHS))
    assert found.total == pytest.approx(len(LENGTHS) / 2**20)
