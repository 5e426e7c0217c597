"""LoRA as one product and narrowed layers: the plain losses, and refused where they would not be."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft_dpzero import TokenTask, infer_task
from peft_dpzero.checks.probe import Probe
from peft_dpzero.estimation.differences import losses_at
from peft_dpzero.estimation.losses import Losses, Shortcuts
from peft_dpzero.estimation.shortcuts.merged_lora import MergedLora
from peft_dpzero.estimation.shortcuts.read_positions import NarrowedLayers
from peft_dpzero.perturbation.perturbation import Perturbation
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel

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


# ---- LoRA as one product ----


@pytest.mark.parametrize("changes", [{}, {"target_modules": "all-linear"}, {"use_rslora": True}])
@pytest.mark.parametrize("kind", LORA_TARGETS)
def test_merged_lora_gives_the_plain_losses_and_writes_no_weight(kind: str, changes: dict[str, Any]) -> None:
    model = tiny_lora(kind, **changes).eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    one, task = rows_of([7, 3, 5]), infer_task(model)
    if kind == "classifier":
        one["labels"] = torch.tensor([0, 1, 1])
    merged = MergedLora(model, always=True)
    assert merged.layers
    plain = at_points(model, task, one)
    torch.testing.assert_close(at_points(model, task, one, Shortcuts(merged_lora=merged)), plain, rtol=1e-5, atol=1e-6)
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
    torch.testing.assert_close(at_points(model, task, one, Shortcuts(merged_lora=merged)), plain, rtol=1e-5, atol=1e-5)


def test_adapters_that_are_more_than_a_product_stay_apart() -> None:
    assert not MergedLora(tiny_lora("causal_lm", use_dora=True)).layers
    assert not MergedLora(tiny_lora("causal_lm").to(torch.bfloat16)).layers
    assert not MergedLora(tiny_model("causal_lm")).layers
    assert MergedLora(tiny_lora("causal_lm").to(torch.float64)).layers


def test_the_active_adapters_are_merged_and_a_disabled_one_is_not() -> None:
    model = tiny_lora("causal_lm").eval()
    model.add_adapter("second", LoraConfig(r=3, target_modules=LORA_TARGETS["causal_lm"], init_lora_weights=False))
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


@pytest.mark.parametrize("build", [tiny_lora, tiny_model])
@pytest.mark.parametrize("kind", LORA_TARGETS)
def test_the_last_layers_are_found_to_the_last_attention_and_no_further(kind: str, build: Any) -> None:
    model = build(kind).eval()
    last = chosen(model).read_positions
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
    assert chosen(model).read_positions is None


def test_narrowed_layers_leave_out_what_is_not_read() -> None:
    model = tiny_lora("causal_lm").eval()
    last = chosen(model).read_positions
    assert last is not None
    one = rows_of([9])
    one["labels"][:, :-2] = -100
    outputs: list[Tensor] = []
    layer = model.get_base_model().model.layers[1].mlp.down_proj
    layer.register_forward_hook(lambda module, args, output: outputs.append(output))
    Losses(model, TokenTask(1), dict, Shortcuts(read_positions=last))(one)
    read = torch.zeros(1, 9, dtype=torch.bool)
    read[0, 6:8] = True
    assert torch.equal(outputs[0].abs().sum(dim=2) != 0, read)


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
