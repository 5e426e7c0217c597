"""Which models are known to compute each row of a micro-batch by itself.

Known are stock transformers architectures of which this package's tests compare, bit for bit, every row's differences
with and without neighbors (`tests/zoo`). Rows of all other models go through one at a time, which needs no trust.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from peft_dpzero.estimation.preferences import PairTask
from peft_dpzero.estimation.tasks import ClassificationTask, FunctionTask, Seq2SeqTask, Task, TokenTask
from peft_dpzero.estimation.verbalizer import Verbalizer
from peft_dpzero.modules import class_of, text_config, unwrapped

# Tasks that read a row's loss from that row's outputs and labels alone.
ROWWISE_TASKS = (TokenTask, Seq2SeqTask, ClassificationTask, Verbalizer, FunctionTask)

KNOWN_TYPES = (
    *("albert", "bert", "bloom", "deberta-v2", "distilbert", "electra", "falcon", "gemma", "gemma2"),
    *("gemma3_text", "gpt2", "gpt_neox", "llama", "mistral", "modernbert", "opt", "phi3", "qwen2", "qwen3", "roberta"),
)
KNOWN_ATTENTION = ("eager", "sdpa")
KNOWN_DTYPES = (torch.float64, torch.float32, torch.bfloat16)
_STOCK = ("torch.nn.", "transformers.", "bitsandbytes.")
_ADAPTERS = ("peft.peft_model", "peft.utils.", "peft.tuners.tuners_utils")
_TUNERS = ("ia3", "loha", "lokr", "lora", "p_tuning", "prefix_tuning", "prompt_tuning", "vera")


def reason_to_separate(model: Any, task: Task) -> str | None:
    """Why the rows of a model are not known to be strangers to each other in a pass; None if they are.

    Args:
        model: a transformers model, with or without a PEFT adapter.
        task: the run's losses.
    """
    if isinstance(task, PairTask):
        return "a pass holds the two sequences of one pair"
    if type(task) not in ROWWISE_TASKS:
        return f"{type(task).__name__} is a task of your own"
    base = unwrapped(model)
    config = getattr(base, "config", None)
    if getattr(config, "is_encoder_decoder", False):
        return f"a pass of {type(base).__name__} has two lengths, of which not all pairs can be tried"
    kind = getattr(config, "model_type", None)
    if kind not in KNOWN_TYPES:
        return f"{type(base).__name__} is of a type ({kind}) that is not known to keep rows apart"
    attention = getattr(config, "_attn_implementation", None)
    if attention not in KNOWN_ATTENTION:
        return f"attention by {attention} is not known to keep rows apart"
    for name, module in model.named_modules():
        if not _is_known(module):
            return f"{name or 'the model'} is a {type(module).__name__}, which is not known to keep rows apart"
    for name, parameter in model.named_parameters():
        if parameter.is_floating_point() and parameter.dtype not in KNOWN_DTYPES:
            dtype = str(parameter.dtype).removeprefix("torch.")
            return f"{name} is in {dtype}, in which models are not known to keep rows apart"
    return None


def _is_known(module: nn.Module) -> bool:
    where = class_of(module).__module__
    if where.startswith((*_STOCK, *_ADAPTERS)):
        return True
    parts = where.split(".")
    return parts[:2] == ["peft", "tuners"] and parts[2] in _TUNERS


def positions_of(model: Any) -> int | None:
    """How many positions a row may take in the model, an adapter's virtual tokens apart; None if that has no limit."""
    limit = getattr(text_config(getattr(model, "config", None)), "max_position_embeddings", None)
    if not isinstance(limit, int) or limit < 1:
        return None
    adapter = getattr(model, "active_peft_config", None)
    return limit - int(getattr(adapter, "num_virtual_tokens", None) or 0)
