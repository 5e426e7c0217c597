"""Tiny random models, data and Trainer arguments for tests."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from peft_dpzero import DPZeroConfig, DPZeroTrainer
from peft_dpzero.estimation.batching import LogicalBatch
from peft_dpzero.mechanism.clipping import clipped_over_threshold, to_grid
from tokenizers import Tokenizer as Words
from tokenizers import models, pre_tokenizers
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    BertForTokenClassification,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
    TrainingArguments,
)

VOCABULARY = 60
# The files of a released adapter, all of them.
RELEASE = {
    "README.md",
    "adapter_config.json",
    "adapter_model.safetensors",
    "dpzero_config.json",
    "dpzero_journal",
    "dpzero_start.safetensors",
    "privacy.svg",
    "privacy_record.json",
}


def bert_config(**changes: Any) -> BertConfig:
    sizes: dict[str, Any] = {
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 32,
        "max_position_embeddings": 64,
        "vocab_size": VOCABULARY,
        "num_labels": 2,
    }
    return BertConfig(**(sizes | changes))


def llama_config(**changes: Any) -> LlamaConfig:
    sizes: dict[str, Any] = {
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "intermediate_size": 32,
        "max_position_embeddings": 64,
        "vocab_size": VOCABULARY,
        "pad_token_id": 0,
    }
    return LlamaConfig(**(sizes | changes))


def t5_config(**changes: Any) -> T5Config:
    sizes: dict[str, Any] = {
        "d_model": 16,
        "d_kv": 8,
        "d_ff": 32,
        "num_layers": 2,
        "num_heads": 2,
        "vocab_size": VOCABULARY,
        "decoder_start_token_id": 0,
    }
    return T5Config(**(sizes | changes))


def tiny_model(kind: str) -> PreTrainedModel:
    """A random model: 'classifier', 'causal_lm', 'masked_lm', 'tagger' or 'seq2seq'."""
    torch.manual_seed(0)
    makers = {
        "classifier": lambda: BertForSequenceClassification(bert_config()),
        "causal_lm": lambda: LlamaForCausalLM(llama_config()),
        "masked_lm": lambda: BertForMaskedLM(bert_config()),
        "tagger": lambda: BertForTokenClassification(bert_config(num_labels=3)),
        "seq2seq": lambda: T5ForConditionalGeneration(t5_config()),
    }
    return makers[kind]().eval()


def token_rows(count: int, length: int = 8, seed: int = 1) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(5, VOCABULARY, (count, length), generator=generator).tolist()


def tiny_dataset(kind: str, count: int = 64, length: int = 8) -> Dataset:
    """Rows of equal length that suit `tiny_model(kind)` and the default collator."""
    rows = token_rows(count, length)
    labels: list[Any] = {
        "classifier": [i % 2 for i in range(count)],
        "tagger": [[t % 3 for t in row] for row in rows],
    }.get(kind, rows)
    return Dataset.from_dict({"input_ids": rows, "attention_mask": [[1] * length] * count, "labels": labels})


def word_tokenizer(known: Iterable[str] = tuple(f"w{i}" for i in range(5, VOCABULARY))) -> PreTrainedTokenizerFast:
    """Five special tokens, then the `known` words: by default w5, w6 … by their numbers."""
    special = ["[PAD]", "[UNK]", "[MASK]", "[EOS]", "[BOS]"]
    numbers = {word: i for i, word in enumerate([*special, *dict.fromkeys(known)])}
    words = Words(models.WordLevel(numbers, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    names = ("pad_token", "unk_token", "mask_token", "eos_token", "bos_token")
    return PreTrainedTokenizerFast(tokenizer_object=words, **dict(zip(names, special, strict=True)))


def arguments(output_dir: Path, **changes: Any) -> TrainingArguments:
    settings: dict[str, Any] = {
        "max_steps": 3,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-2,
        "report_to": [],
        "save_strategy": "no",
        "disable_tqdm": True,
        "use_cpu": True,
    }
    return TrainingArguments(str(output_dir), **(settings | changes))


def drawn_values(batch: LogicalBatch, key: str) -> list[Any]:
    """What the data's rows hold under `key`, in the micro-batches' order, made-up rows left out."""
    each = zip(batch.micro_batches, batch.counts, strict=True)
    return [value for micro_batch, count in each for value in micro_batch[key][:count].tolist()]


LORA_TARGETS = {"classifier": ["query", "value"], "causal_lm": ["q_proj", "v_proj"], "masked_lm": ["query"]}
TASK_TYPES = {"classifier": "SEQ_CLS", "causal_lm": "CAUSAL_LM", "masked_lm": None}


def tiny_lora(kind: str, **changes: Any) -> PeftModel:
    """`tiny_model(kind)` with an adapter whose effect is not zero at the start."""
    settings = {"task_type": TASK_TYPES[kind], "r": 2, "target_modules": LORA_TARGETS[kind], "init_lora_weights": False}
    return get_peft_model(tiny_model(kind), LoraConfig(**(settings | changes)))


def explicit(**options: Any) -> DPZeroConfig:
    """A config that leaves nothing to be measured."""
    return DPZeroConfig(**({"clipping_threshold": 10.0, "smoothing_parameter": 1e-3} | options))


def config(**changes: Any) -> DPZeroConfig:
    """Two directions and noise, without calibration."""
    return explicit(**({"noise_multiplier": 1.0, "target_delta": 1e-5, "num_directions": 2} | changes))


def adapted(model: PreTrainedModel | None = None) -> PeftModel:
    """LoRA on a tiny classifier, or on `model`, that starts at zero as PEFT's does."""
    torch.manual_seed(3)
    settings = LoraConfig(task_type="SEQ_CLS", r=2, target_modules=["query", "value"])
    return get_peft_model(tiny_model("classifier") if model is None else model, settings)


def trained(trainer: DPZeroTrainer) -> dict[str, Tensor]:
    """What a trainer has trained, as it is now."""
    return {name: p.detach().clone() for name, p in trainer.model.named_parameters() if p.requires_grad}


class SwitchLayer(nn.Module):
    """Two experts, each of which serves the first tokens of a batch up to a capacity."""

    def __init__(self, capacity: int) -> None:
        super().__init__()
        self.router = nn.Linear(16, 2)
        self.experts = nn.ModuleList([nn.Linear(16, 16), nn.Linear(16, 16)])
        self.capacity = capacity

    def forward(self, hidden: Tensor) -> Tensor:
        tokens = hidden.flatten(0, -2)
        chosen = self.router(tokens).argmax(-1)
        served = torch.zeros_like(tokens)
        for index, expert in enumerate(self.experts):
            own = (chosen == index).nonzero().flatten()[: self.capacity]
            served[own] = expert(tokens[own])
        return served.view_as(hidden)


def clip_to_grid(differences: Tensor, clipping_threshold: float) -> Tensor:
    """Clips each unit's row to L2 norm C and rounds it toward zero onto the grid of γ = C / 2²⁰.

    Args:
        differences: (n, K) float64; rows that are not finite contribute zero.
        clipping_threshold: C, finite and above 0.

    Returns: (n, K) int64 whose rows have squared norm at most 2⁴⁰, checked in integers.
    """
    return to_grid(clipped_over_threshold(differences, clipping_threshold)[0])
