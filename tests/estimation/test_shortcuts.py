"""Narrowed layers: the plain losses, and refused where they would not be."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig
from peft_dpzero import TokenTask, infer_task
from peft_dpzero.checks import shortcuts as shortcuts_tried
from peft_dpzero.checks.probe import Probe
from peft_dpzero.estimation.differences import losses_at
from peft_dpzero.estimation.losses import Losses, Shortcuts
from peft_dpzero.estimation.shortcuts.last_attention import LastAttention, last_attention
from peft_dpzero.estimation.shortcuts.places import Places
from peft_dpzero.estimation.shortcuts.read_positions import NarrowedLayers
from peft_dpzero.estimation.shortcuts.stacked_attention import FoldedAttention
from peft_dpzero.estimation.shortcuts.stacked_products import product
from peft_dpzero.perturbation.perturbation import Perturbation
from torch import Tensor, nn
from torch.func import vmap
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from tiny import LORA_TARGETS, VOCABULARY, tiny_lora, tiny_model

CPU = torch.device("cpu")
POINTS = [(0, 1e-2), (0, -1e-2), (1, 1e-2), (2, 0.0)]
UPPER = {
    "classifier": {"output.LayerNorm", "output.dense", "intermediate_act_fn", "intermediate.dense", "query"},
    "causal_lm": {"norm", "down_proj", "up_proj", "gate_proj", "act_fn", "o_proj", "q_proj"},
    "masked_lm": {"transform.LayerNorm", "transform.dense", "output.dense", "intermediate.dense", "query"},
}
LOWER = {
    "classifier": {"key", "value", "pooler", "classifier", "layer.0", "embeddings"},
    "causal_lm": {"k_proj", "v_proj", "input_layernorm", "lm_head", "layers.0", "embed_tokens"},
    "masked_lm": {"key", "value", "layer.0", "embeddings"},
}


def chosen(model: Any, task: Any = None) -> Shortcuts:
    return Probe(model, CPU, task=task or infer_task(model)).losses(Perturbation(model), dict).shortcuts


def at_points(model: Any, task: Any, one: dict[str, Tensor], shortcuts: Shortcuts | None = None) -> Tensor:
    return losses_at(Losses(model, task, dict, shortcuts or Shortcuts()), [one], Perturbation(model), 0, POINTS)[0]


def rows_of(lengths: list[int], left: bool = False, seed: int = 0) -> dict[str, Tensor]:
    """Rows of random tokens, all of whose tokens are labels."""
    width = max(lengths)
    ids = torch.randint(5, VOCABULARY, (len(lengths), width), generator=torch.Generator().manual_seed(seed))
    columns, sizes = torch.arange(width), torch.tensor(lengths)[:, None]
    mask = (columns >= width - sizes if left else columns < sizes).long()
    return {"input_ids": ids * mask, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}


# ---- The last layers, at what is read ----


@pytest.mark.parametrize("build", [tiny_lora, tiny_model])
@pytest.mark.parametrize("kind", LORA_TARGETS)
def test_the_last_layers_are_found_to_the_last_attention_and_no_further(kind: str, build: Any) -> None:
    model = build(kind).eval()
    last = chosen(model).read_positions
    assert last is not None
    names = {module: name for name, module in model.named_modules()}
    found = [names[inside] for module in last.modules for inside in module.modules()]
    for suffix in UPPER[kind]:
        assert any(name.endswith(suffix) for name in found), suffix
    for part in LOWER[kind]:
        assert not any(name.endswith(part) or f".{part}." in name for name in found), part
    assert last.attention is not None
    assert last.attention.hands_over
    assert ".1." in names[last.attention.module]
    adapted = build is tiny_lora and {"value", "v_proj"} & set(LORA_TARGETS[kind])
    assert not adapted or names[last.attention.values].endswith(("value", "v_proj"))


def test_queries_are_narrowed_though_a_kernel_rounds_by_those_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    attend = ALL_ATTENTION_FUNCTIONS["sdpa"]

    def rounding(module: nn.Module, query: Tensor, *args: Any, **settings: Any) -> Any:
        far = 8 * query.abs().max()
        return attend(module, (query + far) - far, *args, **settings)

    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS, "sdpa", rounding)
    model = tiny_lora("classifier").eval()
    last = chosen(model).read_positions
    assert last is not None
    layer = model.base_model.model.bert.encoder.layer[1]
    assert layer.attention.self.query in last.modules
    assert layer.attention.self.value not in last.modules


def test_a_head_that_pools_over_all_tokens_is_not_narrowed() -> None:
    class MeanPooler(nn.Module):
        def forward(self, hidden: Tensor) -> Tensor:
            return hidden.mean(dim=1)

    model = tiny_model("classifier").eval()
    model.bert.pooler = MeanPooler()
    assert chosen(model).read_positions is None


def test_narrowed_layers_leave_out_what_is_not_read() -> None:
    model = tiny_lora("causal_lm").eval()
    last = chosen(model).read_positions
    assert last is not None
    one = rows_of([9])
    one["labels"][:, :-2] = -100
    outputs: list[Tensor] = []
    layer = model.get_base_model().model.layers[1]
    layer.mlp.register_forward_hook(lambda module, args, output: outputs.append(output))
    layer.self_attn.o_proj.register_forward_hook(lambda module, args, output: outputs.append(output))
    Losses(model, TokenTask(1), dict, Shortcuts(read_positions=last))(one)
    read = torch.zeros(1, 9, dtype=torch.bool)
    read[0, 6:8] = True
    assert all(torch.equal(output.abs().sum(dim=2) != 0, read) for output in outputs)


def attention_of(groups: int, is_causal: bool) -> nn.Module:
    module = nn.Module()
    module.num_key_value_groups, module.is_causal = groups, is_causal
    return module


@given(
    rows=st.integers(1, 5),
    length=st.integers(3, 9),
    positions=st.integers(1, 2),
    groups=st.sampled_from([1, 2]),
    mask=st.sampled_from(["none", "bool", "added", "one for all"]),
    is_causal=st.booleans(),
    seed=st.integers(0, 99),
)
@settings(max_examples=60, deadline=None)
def test_an_attention_asked_at_few_places_gives_there_what_all_of_it_gives(
    rows: int, length: int, positions: int, groups: int, mask: str, is_causal: bool, seed: int
) -> None:
    torch.manual_seed(seed)
    query = torch.randn(rows, 4, length, 6, dtype=torch.float64)
    key, value = torch.randn(2, rows, 4 // groups, length, 6, dtype=torch.float64)
    allowed = (torch.rand(rows, 1, length, length) < 0.6) | torch.eye(length, dtype=torch.bool)
    masks = {
        "none": None,
        "bool": allowed,
        "added": torch.zeros(allowed.shape, dtype=torch.float64).masked_fill(~allowed, -torch.inf),
        "one for all": allowed[:1],
    }
    read = torch.stack([torch.randperm(length)[:positions] for _ in range(rows)])
    lines = torch.arange(rows)[:, None].expand_as(read)
    places = Places(lambda _: (lines.reshape(-1), read.reshape(-1)))
    module = attention_of(groups, is_causal)
    call = {"module": module, "query": query, "key": key, "value": value, "attention_mask": masks[mask], "scaling": 0.3}
    attend = ALL_ATTENTION_FUNCTIONS["sdpa"]
    whole, _ = attend(**call)
    with LastAttention(module).narrowed(places):
        made, _ = ALL_ATTENTION_FUNCTIONS["sdpa"](**call)
    assert ALL_ATTENTION_FUNCTIONS["sdpa"] is attend
    torch.testing.assert_close(made[lines, read], whole[lines, read], rtol=1e-10, atol=1e-12)


def test_an_output_that_is_changed_on_its_way_is_not_handed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shortcuts_tried, "reason_to_separate", lambda model, task: None)

    class Gated(nn.Module):
        def __init__(self, layer: nn.Module) -> None:
            super().__init__()
            self.layer = layer

        def forward(self, hidden: Tensor) -> Tensor:
            return self.layer(torch.tanh(30 * hidden))

    model = tiny_lora("causal_lm").eval()
    attention = model.base_model.model.model.layers[1].self_attn
    attention.o_proj = Gated(attention.o_proj)
    last = chosen(model).read_positions
    assert last is not None
    assert attention.o_proj.layer in last.modules
    assert last.attention is not None
    assert not last.attention.hands_over


def test_values_that_are_changed_before_the_attention_are_not_held_back() -> None:
    class Doubled(nn.Module):
        """Looks like an attention's layer of values, and what it makes is changed before it is weighted."""

        def __init__(self, layer: nn.Module) -> None:
            super().__init__()
            self.layer = layer

        def forward(self, hidden: Tensor) -> Tensor:
            return torch.tanh(self.layer(hidden))

    model = tiny_lora("classifier").eval()
    inner = model.base_model.model.bert.encoder.layer[1].attention.self
    inner.value = Doubled(inner.value)
    found = last_attention(model, Probe(model, CPU, task=infer_task(model)).run)
    assert found == LastAttention(inner)


def test_adapters_that_are_more_than_a_product_are_not_held_back() -> None:
    def values_of(model: Any) -> Any:
        found = last_attention(model, Probe(model.eval(), CPU, task=infer_task(model)).run)
        assert found is not None
        return found.values

    assert values_of(tiny_lora("classifier", use_dora=True)) is None
    assert values_of(tiny_lora("classifier").to(torch.bfloat16)) is None
    assert values_of(tiny_model("classifier")) is None
    assert values_of(tiny_lora("classifier").to(torch.float64)) is not None


def test_values_of_the_active_adapters_are_held_back_and_of_a_disabled_one_are_not() -> None:
    model = tiny_lora("causal_lm").eval()
    model.add_adapter("second", LoraConfig(r=3, target_modules=LORA_TARGETS["causal_lm"], init_lora_weights=False))
    one, task, shortcuts = rows_of([7]), TokenTask(1), chosen(model)
    one["labels"][:, :4] = -100
    assert shortcuts.read_positions is not None
    assert shortcuts.read_positions.attention is not None
    assert shortcuts.read_positions.attention.values is not None

    def narrowed() -> float:
        made = Losses(model, task, dict, shortcuts)(one)
        torch.testing.assert_close(made, Losses(model, task, dict)(one), rtol=1e-5, atol=1e-6)
        return float(made)

    found = set()
    for adapters in (["default"], ["second"], ["default", "second"]):
        model.base_model.set_adapter(adapters)
        found.add(narrowed())
    with model.disable_adapter():
        found.add(narrowed())
    assert len(found) == 4


@pytest.mark.parametrize("kind", ["classifier", "causal_lm"])
def test_points_that_are_stacked_over_a_narrowed_attention_give_each_points_own_losses(kind: str) -> None:
    model = tiny_lora(kind, layers_to_transform=[1]).eval()
    task, shortcuts, perturbation = infer_task(model), chosen(model), Perturbation(model)
    assert shortcuts.read_positions is not None
    assert shortcuts.read_positions.attention is not None
    one = rows_of([7, 3, 5] if kind == "classifier" else [7])
    one["labels"] = (
        torch.tensor([0, 1, 1]) if kind == "classifier" else one["labels"].index_fill(1, torch.arange(4), -100)
    )
    losses = Losses(model, task, dict, shortcuts)
    stacked = losses.stacked(one, perturbation.stacked(0, POINTS))
    torch.testing.assert_close(stacked, at_points(model, task, one), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("mask", [None, (3, 1, 5, 5), (1, 1, 5, 5), (3, 2, 5, 5), (5, 5), (4, 3, 1, 5, 5)])
@pytest.mark.parametrize("keys", [0, None])
def test_attention_over_stacked_points_is_each_points_own(mask: tuple[int, ...] | None, keys: int | None) -> None:
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(4, 3, 2, 5, 8, generator=generator) for _ in range(3))
    allowed = None if mask is None else torch.rand(mask, generator=generator) < 0.8
    if keys is None:
        key, value = key[0], value[0]
    dims = 0, keys, keys, 0 if mask is not None and len(mask) == 5 else None

    def attend(*args: Any) -> Tensor:
        query, key, value, mask = args
        return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, is_causal=False)

    with FoldedAttention(), torch.no_grad():
        found = vmap(attend, in_dims=dims)(query, key, value, allowed)
    for point in range(4):
        own = (x if dim is None else x[point] for x, dim in zip((query, key, value, allowed), dims, strict=True))
        torch.testing.assert_close(found[point], attend(*own), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("in_dims", [(0, None), (None, 0), (0, 0), (2, None), (None, 1)])
@pytest.mark.parametrize("leading", [(), (3,), (2, 3)])
def test_a_product_with_one_stacked_factor_is_each_points_product(
    in_dims: tuple[int | None, int | None], leading: tuple[int, ...]
) -> None:
    sizes = ((*leading, 4, 5), (*leading, 5, 6))
    factors = [torch.randn(7, *size, dtype=torch.float64) for size in sizes]
    given = [f[0] if dim is None else f.movedim(0, dim) for f, dim in zip(factors, in_dims, strict=True)]
    made = torch.vmap(product, in_dims)(*given)
    left, right = (f[:1] if dim is None else f for f, dim in zip(factors, in_dims, strict=True))
    torch.testing.assert_close(made, left @ right)


def test_each_row_keeps_a_line_of_its_own() -> None:
    seen: list[torch.Size] = []

    class Shift(nn.Linear):
        def forward(self, hidden: Tensor) -> Tensor:
            seen.append(hidden.shape)
            return super().forward(hidden)

    dense = Shift(16, 16)
    last = NarrowedLayers([dense])
    with last.narrowed(lambda length: (torch.arange(3), torch.zeros(3, dtype=torch.int64))):
        dense(torch.randn(3, 7, 16))
    # One more fills up to a multiple of four.
    assert seen == [(4, 1, 16)]


def test_modules_of_unknown_types_are_not_narrowed() -> None:
    class Shift(nn.Linear):
        """Looks like a linear layer, and shifts along the sequence."""

        def forward(self, hidden: Tensor) -> Tensor:
            return super().forward(hidden) + hidden.roll(1, dims=1).mean(-1, keepdim=True)

    model = tiny_model("classifier").eval()
    model.bert.encoder.layer[1].output.dense = Shift(32, 16)
    last = chosen(model).read_positions
    assert last is None or not any(isinstance(module, Shift) for module in last.modules)
