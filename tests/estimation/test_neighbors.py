"""Found ways in which a row reached other rows' contributions: each is refused before a step, or changes no bit.

All that touches the package's way from rows to contributions is `zoo.neighbors.prepared`.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from peft_dpzero import DPZeroError, Task, infer_task
from peft_dpzero.estimation.tasks import ClassificationTask, FunctionTask, TokenTask
from torch import Tensor, nn
from transformers import BertModel

from tiny import SwitchLayer
from zoo.architectures import BY_NAME, build, untuned
from zoo.neighbors import (
    POISON,
    SHORTCUTS,
    Finding,
    Neighbor,
    Row,
    contributions,
    differences,
    row,
)

TARGETS = {"classifier": ["query", "value"], "causal_lm": ["q_proj", "v_proj"]}
# More than any start-up check on made-up tokens is likely to have.
FAR = 24


def rows_with(kind: str, lengths: Sequence[int], stranger: int, token: int | None = None) -> dict[Hashable, Row]:
    """Rows of these lengths, by number, and "stranger"."""
    rows: dict[Hashable, Row] = {number: row(kind, length, 300 + number) for number, length in enumerate(lengths)}
    return rows | {"stranger": row(kind, stranger, 400, token)}


def when_one_joins(model: Any, task: Task, rows: dict[Hashable, Row], **settings: Any) -> Finding:
    """What becomes of the others when "stranger" joins, first or last, and when it has gone again."""
    base = tuple(key for key in rows if key != "stranger")
    neighbors = (
        Neighbor("one more, last", (*base, "stranger")),
        Neighbor("one more, first", ("stranger", *base)),
        Neighbor("the same again", base),
    )
    return differences(model, task, rows, base, neighbors, **settings)


def assert_strangers(found: Finding) -> None:
    assert found.independent, str(found)


def assert_as_plain(build_model: Any, task: Task, rows: Sequence[Row], **settings: Any) -> None:
    """The passes that a run would take give the plain ones' contributions, as near as float32 over 2λ allows."""
    try:
        chosen, plain = (contributions(build_model(), task, rows, shortcuts=how, **settings) for how in SHORTCUTS)
    except DPZeroError:
        return
    assert float((chosen - plain).abs().max()) < 0.02 * float(plain.abs().max())


def tuned(kind: str, place: str, module: nn.Module) -> Any:
    """A stock model with LoRA, and `module` behind the one at `place`."""
    model = untuned(BY_NAME["BERT" if kind == "classifier" else "Llama"])
    model.set_submodule(place, nn.Sequential(model.get_submodule(place), module))
    settings = LoraConfig(r=2, target_modules=TARGETS[kind], init_lora_weights=False)
    return get_peft_model(model, settings).eval()


@pytest.mark.parametrize(("name", "kind"), [("BERT", "classifier"), ("Llama", "causal_lm")])
def test_few_rows_of_a_large_model_share_passes_as_strangers(
    name: str, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("peft_dpzero.perturbation.perturbation.STREAMED_ENTRIES", 0)
    monkeypatch.setattr("peft_dpzero.perturbation.perturbation.KEPT_ENTRIES", 0)
    model = untuned(BY_NAME[name]).eval()
    for stranger in (2, 20, 32):
        rows = rows_with(kind, [5, 9, 1, 12, 7, 8, 5, 16, 9, 23], stranger)
        assert_strangers(when_one_joins(model, infer_task(model), rows, micro_batch_size=16))


# ---- Length and state ----


@pytest.mark.parametrize("shortcuts", SHORTCUTS)
@pytest.mark.parametrize("name", ["Llama, dynamic RoPE", "Phi-3, longrope", "Llama, longrope"])
def test_a_long_row_changes_no_rotary_frequencies(name: str, shortcuts: str) -> None:
    model = build(BY_NAME[name])
    rows = rows_with("causal_lm", [26, 30, 28, 31, 29, 12], stranger=36)
    assert_strangers(when_one_joins(model, infer_task(model), rows, shortcuts=shortcuts, micro_batch_size=8))


def test_a_long_row_leaves_no_rotary_frequencies_behind() -> None:
    model = build(BY_NAME["Llama, dynamic RoPE"])
    rows = rows_with("causal_lm", [33, 40, 34, 40], stranger=70)
    base = (0, 1, 2, 3)
    # Nobody meets the stranger, so that only what it leaves behind can show.
    neighbors = (Neighbor("the stranger alone", ("stranger",)), Neighbor("the same again", base))
    assert_strangers(differences(model, infer_task(model), rows, base, neighbors))


class LongestSeen(nn.Module):
    """Scales by the longest row met so far, from `FAR` tokens on."""

    def __init__(self, buffered: bool) -> None:
        super().__init__()
        self.buffered = buffered
        self.register_buffer("longest", torch.zeros(()))
        self.length = 0

    def forward(self, hidden: Tensor) -> Tensor:
        if self.buffered:
            self.longest.fill_(max(float(self.longest), hidden.shape[1]))
        else:
            self.length = max(self.length, hidden.shape[1])
        return hidden * (1 + max(0.0, max(float(self.longest), self.length) - FAR) / FAR)


@pytest.mark.parametrize("buffered", [True, False], ids=["in a buffer", "in an attribute"])
def test_a_long_row_leaves_no_state_behind(buffered: bool) -> None:
    model = tuned("classifier", "bert.encoder.layer.0.output.dropout", LongestSeen(buffered))
    rows = rows_with("classifier", [5, 9, 12, 9, 7, 16], stranger=60)
    assert_strangers(when_one_joins(model, infer_task(model), rows))


# ---- Rounding ----


@pytest.mark.parametrize("shortcuts", ["chosen", pytest.param("plain", marks=pytest.mark.slow)])
def test_in_half_precision_one_more_row_changes_no_rounding(shortcuts: str) -> None:
    model = build(BY_NAME["Llama"], torch.bfloat16)
    rows = rows_with("causal_lm", [4 + 7 * number % 37 for number in range(48)], stranger=29)
    assert_strangers(when_one_joins(model, infer_task(model), rows, shortcuts=shortcuts))


@pytest.mark.slow
def test_under_autocast_one_more_row_changes_no_rounding() -> None:
    model = build(replace(BY_NAME["BERT"], changes={"hidden_size": 64, "intermediate_size": 256}))
    rows = rows_with("classifier", [4 + 7 * number % 37 for number in range(48)], stranger=29)
    model.forward = torch.autocast("cpu", torch.bfloat16)(model.forward)  # As Accelerate does.
    assert_strangers(when_one_joins(model, infer_task(model), rows))


# ---- Rows side by side ----


def test_a_row_of_nan_among_short_rows_reaches_no_other() -> None:
    model = build(BY_NAME["Llama"])
    rows = rows_with("causal_lm", [5, 7, 6, 9, 4, 8, 3, 10], stranger=6, token=POISON)
    assert_strangers(when_one_joins(model, infer_task(model), rows, micro_batch_size=8, poisons=True))


class Shifted(nn.Module):
    """Each position also sees the one `FAR` before it."""

    def forward(self, hidden: Tensor) -> Tensor:
        return hidden + F.pad(hidden, (0, 0, FAR, 0))[:, :-FAR]


class Pooled(nn.Module):
    """Each position also sees the mean of those from `FAR` on."""

    def forward(self, hidden: Tensor) -> Tensor:
        return hidden + hidden[:, FAR:].mean(1, keepdim=True) if hidden.shape[1] > FAR else hidden


def with_shift() -> Any:
    return tuned("causal_lm", "model.norm", Shifted())


def with_pooling() -> Any:
    return tuned("classifier", "bert.encoder.layer.1.output.LayerNorm", Pooled())


def sparsely_labelled(rows: dict[Hashable, Row]) -> dict[Hashable, Row]:
    """Rows with a label at the last token only: losses then read few positions."""
    return {key: one | {"labels": [-100] * (len(one["labels"]) - 1) + one["labels"][-1:]} for key, one in rows.items()}


MIXERS = {"shift": ("causal_lm", with_shift, TokenTask(shift=1)), "pooling": ("classifier", with_pooling, None)}


@pytest.mark.parametrize("shortcuts", SHORTCUTS)
@pytest.mark.parametrize("case", MIXERS)
def test_modules_that_mix_positions_before_the_head_keep_rows_apart(case: str, shortcuts: str) -> None:
    kind, build_model, task = MIXERS[case]
    rows = rows_with(kind, [30, 40, 34, 40, 36, 12], stranger=50)
    rows = sparsely_labelled(rows) if kind == "causal_lm" else rows
    task = task or ClassificationTask()
    assert_strangers(when_one_joins(build_model(), task, rows, shortcuts=shortcuts, micro_batch_size=8))


@pytest.mark.parametrize("case", MIXERS)
def test_modules_that_mix_positions_before_the_head_keep_their_losses(case: str) -> None:
    kind, build_model, task = MIXERS[case]
    rows = rows_with(kind, [30, 40, 34, 40, 36, 12], stranger=50)
    rows = sparsely_labelled(rows) if kind == "causal_lm" else rows
    assert_as_plain(build_model, task or ClassificationTask(), list(rows.values()), micro_batch_size=8)


# ---- Many rows ----


def test_experts_whose_capacity_only_many_rows_fill_drop_nothing() -> None:
    model = tuned("classifier", "bert.encoder.layer.0.output.dropout", SwitchLayer(capacity=150))
    rows = rows_with("classifier", [40] * 12, stranger=40)
    assert_strangers(when_one_joins(model, infer_task(model), rows, micro_batch_size=16))


class InChunks(nn.Module):
    """A frozen encoder, called once for every four rows, and a head that is trained."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.config = BY_NAME["BERT"].make_config()
        self.encoder = BertModel(self.config).requires_grad_(False)
        self.head = nn.Linear(16, 3)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> SimpleNamespace:
        chunks = zip(input_ids.split(4), attention_mask.split(4), strict=True)
        first = [self.encoder(ids, mask).last_hidden_state[:, 0] for ids, mask in chunks]
        return SimpleNamespace(logits=self.head(torch.cat(first)))


def test_a_trunk_that_is_called_once_a_chunk_gives_each_chunk_its_own() -> None:
    rows = [row("classifier", 12, 300 + number) for number in range(16)]
    task = FunctionTask(lambda outputs, labels: F.cross_entropy(outputs.logits, labels, reduction="none"))
    assert_as_plain(lambda: InChunks().eval(), task, rows, micro_batch_size=16)


# ---- The user's own losses ----


def normalized(outputs: Any, labels: Tensor) -> Tensor:
    losses = F.cross_entropy(outputs.logits.float(), labels, reduction="none")
    return losses / (losses.mean() + 1e-6)


@pytest.mark.slow
def test_a_loss_that_is_normalized_over_the_batch_is_found_in_half_precision() -> None:
    model = build(BY_NAME["BERT"], torch.bfloat16)
    rows = rows_with("classifier", [8] * 6, stranger=8)
    assert_strangers(when_one_joins(model, FunctionTask(normalized), rows, micro_batch_size=8))


class Weighted(ClassificationTask):
    """Losses by a column of weights, which are normalized over the batch."""

    def inputs(self, batch: Any) -> dict[str, Any]:
        return {key: value for key, value in super().inputs(batch).items() if key != "weight"}

    def losses(self, outputs: Any, batch: Any) -> Tensor:
        return super().losses(outputs, batch) * batch["weight"] / batch["weight"].mean()


def test_weights_that_are_normalized_over_the_batch_are_found() -> None:
    model = build(BY_NAME["BERT"])
    rows = rows_with("classifier", [8] * 6, stranger=8)
    rows = {key: one | {"weight": 1.0 + number} for number, (key, one) in enumerate(rows.items())}
    assert_strangers(when_one_joins(model, Weighted(), rows, micro_batch_size=8))


# ---- Data ----


class Forgetful(list[Row]):
    """Leaves out the rows of a single token, when asked for several."""

    def __getitems__(self, indices: list[int]) -> list[Row]:
        return [self[index] for index in indices if len(self[index]["input_ids"]) > 1]


def test_a_data_set_that_leaves_rows_out_attributes_none_to_another() -> None:
    model = build(BY_NAME["BERT"])
    rows = rows_with("classifier", [5, 9, 1, 12, 7], stranger=1)
    assert_strangers(when_one_joins(model, infer_task(model), rows, dataset=Forgetful))


@pytest.mark.parametrize(("name", "labels"), [("Llama", 1), ("GPT-2", 3)])
def test_a_row_with_few_labels_is_read_alike_alone_and_in_company(name: str, labels: int) -> None:
    model = build(BY_NAME[name])
    rows = rows_with("causal_lm", [33, 41, 70], stranger=34)
    for one in rows.values():
        one["labels"] = [-100] * (len(one["labels"]) - labels) + one["labels"][-labels:]
    for shortcuts in SHORTCUTS:
        found = when_one_joins(model, infer_task(model), rows, shortcuts=shortcuts, micro_batch_size=8)
        assert_strangers(found)
