"""Tiny random models of the stock architectures: what they are made of, and which of their layers are trained."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers
from peft import LoraConfig, get_peft_model
from torch import nn

VOCABULARY = 80
HIDDEN = 16
# What length-dependent code changes its ways at: shorter than the longest row of the harness, longer than most.
WINDOW = 16
ORIGINAL_POSITIONS = 32
POSITIONS = 256

HEADS = {
    "classifier": transformers.AutoModelForSequenceClassification,
    "causal_lm": transformers.AutoModelForCausalLM,
    "masked_lm": transformers.AutoModelForMaskedLM,
    "seq2seq": transformers.AutoModelForSeq2SeqLM,
}
TASK_TYPES = {"classifier": "SEQ_CLS", "causal_lm": "CAUSAL_LM", "masked_lm": None, "seq2seq": "SEQ_2_SEQ_LM"}

Changes = Mapping[str, Any]

_COMMON: Changes = {"vocab_size": VOCABULARY, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_BERT: Changes = {
    "hidden_size": HIDDEN,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "max_position_embeddings": POSITIONS,
    "num_labels": 3,
}
_LLAMA: Changes = {
    "hidden_size": HIDDEN,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "intermediate_size": 32,
    "max_position_embeddings": POSITIONS,
}
_PHI: Changes = {key: value for key, value in _LLAMA.items() if key != "head_dim"}
_GEMMA: Changes = {**_LLAMA, "query_pre_attn_scalar": 8, "sliding_window": WINDOW}
_T5: Changes = {
    "d_model": HIDDEN,
    "d_kv": 8,
    "d_ff": 32,
    "num_layers": 2,
    "num_decoder_layers": 2,
    "num_heads": 2,
    "decoder_start_token_id": 0,
}
_BART: Changes = {
    "d_model": HIDDEN,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 32,
    "decoder_ffn_dim": 32,
    "max_position_embeddings": POSITIONS,
    "decoder_start_token_id": 2,
}
_GPT2: Changes = {"n_embd": HIDDEN, "n_layer": 2, "n_head": 2, "n_positions": POSITIONS}
_DEEPSEEK: Changes = {
    **_PHI,
    "num_key_value_heads": 2,
    "q_lora_rank": 8,
    "kv_lora_rank": 8,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 4,
    "v_head_dim": 8,
    "n_routed_experts": 4,
    "n_group": 2,
    "topk_group": 1,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "first_k_dense_replace": 1,
}
_SWITCH: Changes = {
    **_T5,
    "num_experts": 2,
    "expert_capacity": 16,
    "num_sparse_encoder_layers": 1,
    "num_sparse_decoder_layers": 1,
}
_NLLB: Changes = {**_BART, "num_experts": 2, "encoder_sparse_step": 2, "decoder_sparse_step": 2}
# Hybrid attention of both kinds within two layers.
_BOTH_KINDS: Changes = {"layer_types": ["sliding_attention", "full_attention"]}


@dataclass(frozen=True)
class Architecture:
    """A stock architecture, as small as it goes.

    Attributes:
        name: in tests and tables.
        kind: "classifier", "causal_lm", "masked_lm" or "seq2seq".
        config: name of the config class in transformers.
        sizes: the config's settings.
        targets: modules that LoRA adapts; none trains every parameter but the embeddings.
        notes: what is special about it.
    """

    name: str
    kind: str
    config: str
    sizes: Changes
    targets: tuple[str, ...]
    notes: str = ""
    changes: Changes = field(default_factory=dict)

    def make_config(self) -> Any:
        """A new config."""
        return getattr(transformers, self.config)(**{**_COMMON, **self.sizes, **self.changes})


def _rope(kind: str, **settings: Any) -> Changes:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 10_000.0, **settings}}


def _llama(name: str, notes: str = "", **changes: Any) -> Architecture:
    return Architecture(name, "causal_lm", "LlamaConfig", _LLAMA, ("q_proj", "v_proj"), notes, changes)


_FACTORS = [1.0 + 0.1 * i for i in range(4)]
_LONG_FACTORS = [2.0 + 0.5 * i for i in range(4)]
_LONGROPE = _rope(
    "longrope",
    short_factor=_FACTORS,
    long_factor=_LONG_FACTORS,
    factor=POSITIONS / ORIGINAL_POSITIONS,
    original_max_position_embeddings=ORIGINAL_POSITIONS,
)
_SCALED: Changes = {"factor": POSITIONS / ORIGINAL_POSITIONS, "original_max_position_embeddings": ORIGINAL_POSITIONS}
_ATTENTION = ("q_proj", "v_proj")
_BERT_ATTENTION = ("query", "value")

ARCHITECTURES = (
    Architecture("BERT", "classifier", "BertConfig", _BERT, _BERT_ATTENTION),
    Architecture("BERT, masked LM", "masked_lm", "BertConfig", _BERT, _BERT_ATTENTION),
    Architecture("BERT, all parameters", "classifier", "BertConfig", _BERT, ()),
    Architecture("RoBERTa", "classifier", "RobertaConfig", _BERT, _BERT_ATTENTION, "positions count from the padding"),
    Architecture(
        "DeBERTa v2",
        "classifier",
        "DebertaV2Config",
        {**_BERT, "relative_attention": True, "pos_att_type": ["p2c", "c2p"], "position_buckets": 16},
        ("query_proj", "value_proj"),
        "relative positions in buckets",
    ),
    Architecture(
        "DistilBERT",
        "classifier",
        "DistilBertConfig",
        {
            "dim": HIDDEN,
            "n_layers": 2,
            "n_heads": 2,
            "hidden_dim": 32,
            "max_position_embeddings": POSITIONS,
            "num_labels": 3,
        },
        ("q_lin", "v_lin"),
    ),
    Architecture("ELECTRA", "classifier", "ElectraConfig", {**_BERT, "embedding_size": HIDDEN}, _BERT_ATTENTION),
    Architecture(
        "ModernBERT",
        "classifier",
        "ModernBertConfig",
        {**_BERT, "local_attention": WINDOW, "cls_token_id": 1, "sep_token_id": 2, **_BOTH_KINDS},
        ("Wqkv",),
        "local and global attention",
    ),
    Architecture(
        "ALBERT",
        "masked_lm",
        "AlbertConfig",
        {**_BERT, "embedding_size": HIDDEN},
        _BERT_ATTENTION,
        "one layer, called twice",
    ),
    Architecture(
        "BigBird",
        "masked_lm",
        "BigBirdConfig",
        {**_BERT, "block_size": 8, "num_random_blocks": 1},
        _BERT_ATTENTION,
        "leaves block-sparse attention for good after a short pass",
    ),
    Architecture(
        "Longformer", "classifier", "LongformerConfig", {**_BERT, "attention_window": 8}, _BERT_ATTENTION, "windows"
    ),
    Architecture(
        "XLNet",
        "classifier",
        "XLNetConfig",
        {"d_model": HIDDEN, "n_layer": 2, "n_head": 2, "d_inner": 32, "num_labels": 3},
        ("layer_1", "layer_2"),
    ),
    Architecture(
        "ESM",
        "masked_lm",
        "EsmConfig",
        {**_BERT, "position_embedding_type": "rotary", "mask_token_id": 3, "token_dropout": True},
        _BERT_ATTENTION,
        "scales by a row's share of mask tokens",
    ),
    Architecture(
        "GPT-2",
        "causal_lm",
        "GPT2Config",
        _GPT2,
        ("c_attn",),
    ),
    Architecture(
        "OPT",
        "causal_lm",
        "OPTConfig",
        {
            "hidden_size": HIDDEN,
            "word_embed_proj_dim": HIDDEN,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "ffn_dim": 32,
            "max_position_embeddings": POSITIONS,
        },
        _ATTENTION,
        "positions from the attention mask",
    ),
    Architecture("GPT-NeoX", "causal_lm", "GPTNeoXConfig", {**_BERT, "is_decoder": True}, ("query_key_value",)),
    _llama("Llama"),
    Architecture("Llama, classifier", "classifier", "LlamaConfig", {**_LLAMA, "num_labels": 3}, _ATTENTION),
    _llama("Llama, linear RoPE", **_rope("linear", factor=4.0)),
    _llama(
        "Llama, dynamic RoPE",
        "frequencies follow the longest row met",
        max_position_embeddings=ORIGINAL_POSITIONS,
        **_rope("dynamic", factor=4.0),
    ),
    _llama("Llama, YaRN", **_rope("yarn", **_SCALED)),
    _llama("Llama, llama3 RoPE", **_rope("llama3", low_freq_factor=1.0, high_freq_factor=4.0, **_SCALED)),
    _llama("Llama, longrope", "frequencies follow the longest row of a pass", **_LONGROPE),
    Architecture(
        "Mistral", "causal_lm", "MistralConfig", {**_LLAMA, "sliding_window": WINDOW}, _ATTENTION, "sliding window"
    ),
    Architecture("Qwen2", "causal_lm", "Qwen2Config", _PHI, _ATTENTION),
    Architecture("Qwen3", "causal_lm", "Qwen3Config", _LLAMA, _ATTENTION),
    Architecture("Gemma", "causal_lm", "GemmaConfig", _LLAMA, _ATTENTION),
    Architecture("Gemma 2", "causal_lm", "Gemma2Config", {**_GEMMA, **_BOTH_KINDS}, _ATTENTION, "window and soft caps"),
    Architecture(
        "Gemma 3", "causal_lm", "Gemma3TextConfig", {**_GEMMA, **_BOTH_KINDS}, _ATTENTION, "two kinds of RoPE"
    ),
    Architecture("Phi-3", "causal_lm", "Phi3Config", _PHI, ("qkv_proj",)),
    Architecture(
        "Phi-3, longrope",
        "causal_lm",
        "Phi3Config",
        {**_PHI, "original_max_position_embeddings": ORIGINAL_POSITIONS, **_LONGROPE},
        ("qkv_proj",),
        "frequencies follow the longest row of a pass",
    ),
    Architecture(
        "Falcon",
        "causal_lm",
        "FalconConfig",
        {"hidden_size": HIDDEN, "num_hidden_layers": 2, "num_attention_heads": 2, "max_position_embeddings": POSITIONS},
        ("query_key_value",),
    ),
    Architecture(
        "Falcon, ALiBi",
        "causal_lm",
        "FalconConfig",
        {"hidden_size": HIDDEN, "num_hidden_layers": 2, "num_attention_heads": 2, "alibi": True},
        ("query_key_value",),
        "ALiBi from the attention mask",
    ),
    Architecture(
        "BLOOM",
        "causal_lm",
        "BloomConfig",
        {"hidden_size": HIDDEN, "n_layer": 2, "n_head": 2},
        ("query_key_value",),
        "ALiBi from the attention mask",
    ),
    Architecture(
        "Mixtral",
        "causal_lm",
        "MixtralConfig",
        {**_LLAMA, "num_local_experts": 4, "num_experts_per_tok": 2},
        _ATTENTION,
        "experts meet the tokens of all rows",
    ),
    Architecture(
        "Qwen2-MoE",
        "causal_lm",
        "Qwen2MoeConfig",
        {
            **_PHI,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 16,
            "shared_expert_intermediate_size": 16,
        },
        _ATTENTION,
        "experts meet the tokens of all rows",
    ),
    Architecture("GPT-J", "causal_lm", "GPTJConfig", {**_GPT2, "rotary_dim": 4}, _ATTENTION),
    Architecture(
        "XGLM",
        "causal_lm",
        "XGLMConfig",
        {"d_model": HIDDEN, "ffn_dim": 32, "num_layers": 2, "attention_heads": 2, "max_position_embeddings": 32},
        _ATTENTION,
        "its table of positions grows with the longest row",
    ),
    Architecture("MPT", "causal_lm", "MptConfig", {"d_model": HIDDEN, "n_heads": 2, "n_layers": 2}, ("Wqkv",), "ALiBi"),
    Architecture(
        "Reformer",
        "causal_lm",
        "ReformerConfig",
        {
            "hidden_size": HIDDEN,
            "attention_head_size": 8,
            "num_attention_heads": 2,
            "feed_forward_size": 32,
            "attn_layers": ["local", "lsh"],
            "axial_pos_shape": [16, 16],
            "axial_pos_embds_dim": [8, 8],
            "max_position_embeddings": POSITIONS,
            "lsh_attn_chunk_length": 8,
            "local_attn_chunk_length": 8,
            "num_buckets": 4,
            "is_decoder": True,
        },
        ("query", "value"),
        "hashes at random, in eval mode too",
    ),
    Architecture(
        "GPT-OSS",
        "causal_lm",
        "GptOssConfig",
        {**_LLAMA, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": WINDOW, **_BOTH_KINDS},
        _ATTENTION,
        "experts meet the tokens of all rows",
    ),
    Architecture(
        "PhiMoE",
        "causal_lm",
        "PhimoeConfig",
        {**_PHI, "num_local_experts": 4},
        _ATTENTION,
        "experts meet the tokens of all rows",
    ),
    Architecture(
        "DeepSeek-V3",
        "causal_lm",
        "DeepseekV3Config",
        _DEEPSEEK,
        ("kv_b_proj",),
        "experts meet the tokens of all rows",
    ),
    Architecture(
        "Switch Transformers", "seq2seq", "SwitchTransformersConfig", _SWITCH, ("q", "v"), "a capacity for each row"
    ),
    Architecture("NLLB-MoE", "seq2seq", "NllbMoeConfig", _NLLB, _ATTENTION, "experts meet the tokens of all rows"),
    Architecture(
        "NLLB-MoE, small capacity",
        "seq2seq",
        "NllbMoeConfig",
        _NLLB,
        _ATTENTION,
        "experts drop what is past a share of the batch",
        {"moe_eval_capacity_token_fraction": 0.3},
    ),
    Architecture("T5", "seq2seq", "T5Config", _T5, ("q", "v")),
    Architecture("BART", "seq2seq", "BartConfig", _BART, _ATTENTION),
    Architecture("mBART", "seq2seq", "MBartConfig", _BART, _ATTENTION),
    Architecture(
        "LongT5",
        "seq2seq",
        "LongT5Config",
        {**_T5, "local_radius": 7, "encoder_attention_type": "transient-global", "global_block_size": 4},
        ("q", "v"),
        "local and global blocks",
    ),
    Architecture(
        "Mamba 2",
        "causal_lm",
        "Mamba2Config",
        {
            "hidden_size": HIDDEN,
            "num_hidden_layers": 2,
            "state_size": 8,
            "num_heads": 4,
            "head_dim": 8,
            "n_groups": 1,
            "chunk_size": 8,
        },
        ("in_proj",),
        "no attention, chunks",
    ),
    Architecture(
        "Mamba",
        "causal_lm",
        "MambaConfig",
        {"hidden_size": HIDDEN, "num_hidden_layers": 2, "state_size": 8, "time_step_rank": 2},
        ("in_proj", "x_proj"),
        "no attention",
    ),
)
BY_NAME = {architecture.name: architecture for architecture in ARCHITECTURES}


def build(architecture: Architecture, dtype: torch.dtype = torch.float32, attention: str | None = None) -> Any:
    """A new random model in eval mode, the same each time, with weights of its own for the output embedding.

    Raises:
        ValueError: the architecture does not have this attention.
    """
    model = untuned(architecture, attention)
    if not architecture.targets:
        model.get_input_embeddings().requires_grad_(False)
        return model.to(dtype).eval()
    lora = LoraConfig(
        r=2,
        task_type=TASK_TYPES[architecture.kind],
        target_modules=list(architecture.targets),
        init_lora_weights=False,
        fan_in_fan_out=architecture.config == "GPT2Config",
    )
    return get_peft_model(model, lora).to(dtype).eval()


def untuned(architecture: Architecture, attention: str | None = None) -> Any:
    """As `build`, without LoRA and in float32.

    Raises:
        ValueError: the architecture does not have this attention.
    """
    torch.manual_seed(0)
    settings = {} if attention is None else {"attn_implementation": attention}
    model = HEADS[architecture.kind].from_config(architecture.make_config(), **settings)
    _untie(model)
    return model


def _untie(model: Any) -> None:
    """Gives the output embedding a copy: what is put into the input embedding must not show in other rows' logits."""
    output = model.get_output_embeddings()
    if output is not None and output.weight is model.get_input_embeddings().weight:
        output.weight = nn.Parameter(output.weight.detach().clone())


def attentions(architecture: Architecture) -> list[str]:
    """The attention implementations that the architecture has among "eager" and "sdpa"."""

    def has(attention: str) -> bool:
        try:
            untuned(architecture, attention)
        except ValueError:
            return False
        return True

    return [attention for attention in ("eager", "sdpa") if has(attention)]
