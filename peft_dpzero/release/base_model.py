"""The model that a journal starts from, built from the name of its base."""

from __future__ import annotations

import importlib
import inspect
from pathlib import Path
from typing import Any

import transformers
from peft import PeftConfig, get_peft_model
from torch import nn
from transformers import AutoConfig

from peft_dpzero.errors import DPZeroError
from peft_dpzero.modules import module_from
from peft_dpzero.release.adapter import ADAPTER_CONFIG_NAME
from peft_dpzero.release.journal import JOURNAL_NAME, read_journal


def load_start_model(base: str | Path, folder: Path, model_class: str | None = None) -> nn.Module:
    """The base model, with an untrained adapter on it if the release in `folder` is one.

    Args:
        base: a folder or a Hub name.
        folder: holds `dpzero_journal`, and `adapter_config.json` for an adapter.
        model_class: `module:Class` or `file.py:Class`, for a class that transformers does not have.

    Raises:
        DPZeroError: the class is unknown, or the model cannot be loaded.
    """
    noted = read_journal(folder / JOURNAL_NAME).segments[0].header["model"]
    kind = _named_class(model_class) if model_class else _transformers_class(noted["class"])
    try:
        model: nn.Module = kind.from_pretrained(base, **_head(kind, base, noted["num_labels"]))
        if (folder / ADAPTER_CONFIG_NAME).exists():
            adapter = PeftConfig.from_pretrained(folder)
            adapter.inference_mode, adapter.base_model_name_or_path = False, None
            if hasattr(adapter, "prompt_tuning_init"):
                # The start is on file, and the tokenizer that it was made with may not be.
                adapter.prompt_tuning_init = "RANDOM"
            model = get_peft_model(model, adapter)
    except Exception as error:
        raise DPZeroError(f"{base} cannot be loaded as {kind.__name__}: {error}") from None
    model.eval()
    return model


def _head(kind: Any, base: str | Path, num_labels: int | None) -> dict[str, Any]:
    """The number of labels, where it is not the base's own."""
    config = getattr(kind, "config_class", None) or AutoConfig
    own = config.from_pretrained(base)
    return {} if num_labels in (None, getattr(own, "num_labels", None)) else {"num_labels": num_labels}


def _transformers_class(name: str) -> Any:
    kind = getattr(transformers, name, None)
    if not inspect.isclass(kind):
        raise DPZeroError(
            f"The model's class {name} is not one of transformers: name it with --model-class module:Class or "
            "file.py:Class, or build the model in Python and call peft_dpzero.replay_journal."
        )
    return kind


def _named_class(name: str) -> Any:
    module_name, _, class_name = name.rpartition(":")
    try:
        is_file = module_name.endswith(".py")
        module = module_from(Path(module_name)) if is_file else importlib.import_module(module_name)
        return getattr(module, class_name)
    except Exception as error:
        raise DPZeroError(f"--model-class {name} cannot be imported: {error}") from None
