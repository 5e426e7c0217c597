"""LoRA as one product, packed lines and narrowed layers: the plain losses, and refused where they would not be."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from peft_dpzero import Losses, Perturbation, Probe, TokenTask, Verbalizer, infer_task
from peft_dpzero.estimation.batching import dealt_parts
from peft_dpzero.estimation.differences import losses_at
from peft_dpzero.estimation.merging import MergedLora
from peft_dpzero.estimation.packing import LINE_TOKENS, Layout
from peft_dpzero.estimation.passes import Shortcuts
from test_passes import CPU, POINTS, TARGETS, Words, full, lora
from torch import Tensor, nn
from transformers import Gemma3ForCausalLM, Gemma3TextConfig, GPT2Config, GPT2LMHeadModel

from tiny import VOCABULARY, tiny_model

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
    return losses_at(Losses(model, task, dict, shortcuts or Shortcuts()), [one], Perturbation(model), 0, POINTS)


def rows_of(lengths: list[int], left: bool = False, seed: int = 0) -> dict[str, Tensor]:
    """Rows of random tokens, all of whose tokens are labels."""
    width = max(lengths)
    ids = torch.randint(5, VOCABULARY, (len(lengths), width), generator=torch.Generator().manual_seed(seed))
    columns, sizes = torch.arange(width), torch.tensor(lengths)[:, None]
    mask = (columns >= width - sizes if left else columns < sizes).long()
    return {"input_ids": ids * mask, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}


# ---- LoRA as one product ----


@pytest.mark.parametrize("changes", [{}, {"target_modules": "all-linear"}, {"use_rslora": True}])
@pytest.mark.parametrize("kind", TARGETS)
def test_merged_lora_gives_the_plain_losses_and_writes_no_weight(kind: str, changes: dict[str, Any]) -> None:
    model = lora(kind, **changes).eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    one, task = rows_of([7, 3, 5]), infer_task(model)
    if kind == "classifier":
        one["labels"] = torch.tensor([0, 1, 1])
    merged = MergedLora(model, always=True)
    assert merged.layers
    plain = at_points(model, task, one)
    torch.testing.assert_close(at_points(model, task, one, Shortcuts(lora=merged)), plain, rtol=1e-5, atol=1e-6)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not any("forward" in vars(module) for module in model.modules())


def test_merged_lora_takes_weights_that_are_stored_transposed() -> None:
    torch.manual_seed(0)
    config = GPT2Config(n_embd=16, n_layer=2, n_head=2, n_positions=64, vocab_size=VOCABULARY)
    settings = {"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True, "init_lora_weights": False}
    model = get_peft_model(GPT2LMHeadModel(config), LoraConfig(task_type="CAUSAL_LM", **settings)).eval()
    one, task, merged = rows_of([7, 3, 5]), infer_task(model), MergedLora(model, always=True)
    assert len(merged.layers) == 6
    plain = at_points(model, task, one)
    torch.testing.assert_close(at_points(model, task, one, Shortcuts(lora=merged)), plain, rtol=1e-5, atol=1e-5)


def test_adapters_that_are_more_than_a_product_stay_apart() -> None:
    assert not MergedLora(lora("causal_lm", use_dora=True)).layers
    assert not MergedLora(lora("causal_lm").to(torch.bfloat16)).layers
    assert not MergedLora(full("causal_lm")).layers
    assert MergedLora(lora("causal_lm").to(torch.float64)).layers


def test_the_active_adapters_are_merged_and_a_disabled_one_is_not() -> None:
    model = lora("causal_lm").eval()
    model.add_adapter("second", LoraConfig(r=3, target_modules=TARGETS["causal_lm"], init_lora_weights=False))
    one, merged = rows_of([7, 3]), MergedLora(model, always=True)
    for adapters in (["default"], ["second"], ["default", "second"]):
        model.base_model.set_adapter(adapters)
        plain = model(**one).logits
        with merged.merged():
            torch.testing.assert_close(model(**one).logits, plain, rtol=1e-5, atol=1e-6)
    with model.disable_adapter(), merged.merged():
        disabled = model(**one).logits
    with model.disable_adapter():
        assert torch.equal(model(**one).logits, disabled)


# ---- The last layers, at what is read ----


@pytest.mark.parametrize("build", [lora, full])
@pytest.mark.parametrize("kind", TARGETS)
def test_the_last_layers_are_found_to_the_last_attention_and_no_further(kind: str, build: Any) -> None:
    model = build(kind).eval()
    last = chosen(model).last
    assert last is not None
    names = {module: name for name, module in model.named_modules()}
    found = [names[module] for module in last.modules]
    for suffix in UPPER[kind]:
        assert any(name.endswith(suffix) for name in found), suffix
    for part in LOWER[kind]:
        assert not any(name.endswith(part) or f".{part}." in name for name in found), part


def test_a_head_that_pools_over_all_tokens_is_not_narrowed() -> None:
    class MeanPooler(nn.Module):
        def forward(self, hidden: Tensor) -> Tensor:
            return hidden.mean(dim=1)

    model = tiny_model("classifier").eval()
    model.bert.pooler = MeanPooler()
    assert chosen(model).last is None


def test_narrowed_layers_leave_out_what_is_not_read() -> None:
    model = lora("causal_lm").eval()
    last = chosen(model).last
    assert last is not None
    one = rows_of([9, 7, 9])
    one["labels"][:, :-2] = -100
    outputs: list[Tensor] = []
    layer = model.get_base_model().model.layers[1].mlp.down_proj
    layer.register_forward_hook(lambda module, args, output: outputs.append(output))
    Losses(model, TokenTask(1), dict, Shortcuts(last=last))(one)
    read = torch.zeros(3, 9, dtype=torch.bool)
    read[0, 6:8] = read[2, 6:8] = True
    assert torch.equal(outputs[0].abs().sum(dim=2) != 0, read)


# ---- Packed lines ----


def gemma(**changes: Any) -> Any:
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    sizes |= {"num_key_value_heads": 1, "head_dim": 8, "vocab_size": VOCABULARY, "pad_token_id": 0}
    torch.manual_seed(0)
    config = Gemma3TextConfig(**sizes, layer_types=["sliding_attention", "full_attention"], **changes)
    return get_peft_model(Gemma3ForCausalLM(config), LoraConfig(task_type="CAUSAL_LM", init_lora_weights=False))


@pytest.mark.parametrize("left", [False, True])
@pytest.mark.parametrize("name", ["llama", "sliding window", "eager"])
def test_packed_lines_give_the_plain_losses(name: str, left: bool) -> None:
    model = (gemma(sliding_window=4) if name == "sliding window" else lora("causal_lm")).eval()
    if name == "eager":
        model.get_base_model().set_attn_implementation("eager")
    task = infer_task(model)
    shortcuts = chosen(model, task)
    assert shortcuts.packs
    assert shortcuts.stacks
    for lengths in ([12, 3, 5, 9], [1, 1, 11], [8], [30] * 9 + [40]):
        one = rows_of(lengths, left)
        plain = at_points(model, task, one)
        torch.testing.assert_close(at_points(model, task, one, shortcuts), plain, rtol=1e-5, atol=2e-6)
        alone = Shortcuts(packs=True)
        torch.testing.assert_close(at_points(model, task, one, alone), plain, rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("words", [["a", "b"], ["ab", "cde", "f"]])
def test_label_words_are_read_from_packed_lines(words: list[str]) -> None:
    model = lora("causal_lm").eval()
    task = Verbalizer(Words(), words, causal=True)
    one = rows_of([12, 3, 5]) | {"labels": torch.tensor([0, 1, 1])}
    shortcuts = chosen(model, task)
    assert shortcuts.packs
    torch.testing.assert_close(
        at_points(model, task, one, shortcuts), at_points(model, task, one), rtol=1e-5, atol=2e-6
    )


def test_no_padding_goes_through_a_packed_pass() -> None:
    model = lora("causal_lm").eval()
    tokens: list[int] = []
    model.get_base_model().model.embed_tokens.register_forward_hook(
        lambda module, args, output: tokens.append(args[0].numel())
    )
    lengths = [60, 3, 5, 9, 44, 20, 33, 10, 4, 7]
    Losses(model, TokenTask(1), dict, Shortcuts(packs=True))(rows_of(lengths))
    assert sum(lengths) <= tokens[-1] <= 1.05 * sum(lengths)


@pytest.mark.parametrize("leak", [1e-6, 1.0])
def test_a_model_that_mixes_the_rows_of_a_line_is_not_packed(leak: float) -> None:
    model = lora("causal_lm").eval()
    inner = model.get_base_model().model
    forward = inner.forward

    def mixing(*args: Any, **kwargs: Any) -> Any:
        out = forward(*args, **kwargs)
        if kwargs.get("position_ids") is not None:
            out.last_hidden_state = out.last_hidden_state + leak * out.last_hidden_state.mean(dim=1, keepdim=True)
        return out

    inner.forward = mixing
    assert not chosen(model).packs


def test_a_model_without_packed_masks_is_not_packed() -> None:
    assert not chosen(lora("masked_lm")).packs
    assert not chosen(lora("classifier")).packs


def test_rows_with_gaps_or_little_padding_stay_padded() -> None:
    gap = torch.ones(2, 8, dtype=torch.long)
    gap[0, 3], gap[1, 4:] = 0, 0
    assert Layout.of(gap) is None
    assert Layout.of(torch.ones(4, 8, dtype=torch.long)) is None
    assert Layout.of(torch.tensor([[1, 1, 0], [0, 0, 0]])) is None


@given(st.lists(st.integers(1, 200), min_size=1, max_size=60), st.booleans())
def test_layouts_hold_each_token_once_in_even_lines(lengths: list[int], left: bool) -> None:
    one = rows_of(lengths, left)
    layout = Layout.of(one["attention_mask"])
    if layout is None:
        return
    rows, columns = one["attention_mask"].nonzero(as_tuple=True)
    lines, places = layout.places(rows, columns)
    assert len(set(zip(lines.tolist(), places.tolist(), strict=True))) == sum(lengths)
    ids = layout.packed(one)["input_ids"]
    assert torch.equal(ids[lines, places], one["input_ids"][rows, columns])
    assert torch.equal(layout.position_ids[lines, places], columns - layout.first[rows])
    assert ids.numel() <= 0.97 * one["input_ids"].numel()
    assert ids.shape[1] <= max(lengths) + 2 * LINE_TOKENS


# ---- Micro-batches of packed rows ----


@given(st.lists(st.integers(1, 90), min_size=1, max_size=120), st.integers(1, 400))
def test_dealt_parts_take_each_row_once_within_the_budget(sizes: list[int], budget: int) -> None:
    lengths = np.array(sizes)
    parts = dealt_parts(lengths, np.argsort(lengths, kind="stable"), budget)
    assert sorted(np.concatenate(parts).tolist()) == list(range(len(sizes)))
    assert all(lengths[part].sum() <= budget or len(part) == 1 for part in parts)
    if max(sizes) <= budget / 4:
        assert len(parts) <= 1.5 * lengths.sum() / budget + 1
