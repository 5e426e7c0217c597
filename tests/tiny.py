"""Tiny random models, data and Trainer arguments for tests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft_dpzero.estimation.batching import LogicalBatch
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    BertForTokenClassification,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    T5Config,
    T5ForConditionalGeneration,
    TrainingArguments,
)

VOCABULARY = 60


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
