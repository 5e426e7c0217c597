"""How a release is loaded: the card's lines of Python, or the command that makes its weights."""

from __future__ import annotations

from typing import Any

import transformers
from transformers.modelcard import TASK_MAPPING

from peft_dpzero.modules import unwrapped

USAGE_HEADING = "## How to use it"
REPOSITORY, BASE = "THIS_REPOSITORY", "FOLDER_OF_THE_BASE"
_AUTO = {
    "text-classification": "AutoModelForSequenceClassification",
    "token-classification": "AutoModelForTokenClassification",
    "text-generation": "AutoModelForCausalLM",
    "text2text-generation": "AutoModelForSeq2SeqLM",
    "fill-mask": "AutoModelForMaskedLM",
    "question-answering": "AutoModelForQuestionAnswering",
}
# Tasks whose pipeline takes one text.
_OF_TEXT = ("text-classification", "token-classification", "text-generation", "fill-mask")
_NAMES_LABELS = ("text-classification", "token-classification")
_REPLAY = """This repository holds no weights: the base model and the journal make them, with peft_dpzero installed.

```bash
peft-dpzero replay {base} {repository} OUT
```
"""
_OWN_CLASS = """The base is a `{kind}`, a class that transformers does not have. With it in `base`:

```python
from peft import PeftModel

model = PeftModel.from_pretrained(base, "{repository}")
```
"""


def pipeline_tag(model: Any) -> str | None:
    """The Hub's name for what the model's class does; None if transformers knows no such class."""
    kind = type(unwrapped(model)).__name__
    return next((task for task, kinds in TASK_MAPPING.items() if kind in set(_flat(kinds.values()))), None)


def label_names(model: Any) -> dict[int, str] | None:
    """A classifier's names of its classes, by their number."""
    names = getattr(getattr(unwrapped(model), "config", None), "id2label", None)
    return {int(number): str(name) for number, name in names.items()} if _names_labels(model) and names else None


def usage(model: Any, base: str | None, repository: str | None, tokenizer: Any, has_weights: bool) -> str:
    """The card's section on loading.

    Args:
        model: the trained one.
        base: its base's name on the Hub.
        repository: the release's own.
        tokenizer: the release's, or None.
        has_weights: whether the release holds them, and not the journal alone.
    """
    own, named = repository or REPOSITORY, base or BASE
    if not has_weights:
        text = _REPLAY.format(base=named, repository=own)
    elif (auto := _auto_class(model)) is None:
        kind = type(unwrapped(model)).__name__
        text = _OWN_CLASS.format(kind=kind, repository=own) if _is_adapter(model) else f"It is a `{kind}`.\n"
    else:
        lines = _python(model, auto, named, own, tokenizer)
        text = "\n".join(("```python", *lines, "```", ""))
        if _is_adapter(model) and base is None:
            text += "\nThe base was a folder, and is not named here; the hash of its weights is below.\n"
    return f"{USAGE_HEADING}\n\n{text}"


def _python(model: Any, auto: str, base: str, repository: str, tokenizer: Any) -> list[str]:
    names = label_names(model)
    adapter, task = _is_adapter(model), pipeline_tag(model)
    piped = tokenizer is not None and task in _OF_TEXT
    imported = ", ".join((auto, *(("AutoTokenizer", "pipeline") if piped else ())))
    labels = f", id2label={names!r}" if names and adapter else ""
    lines = ["from peft import PeftModel"] if adapter else []
    lines += [f"from transformers import {imported}", ""]
    if adapter:
        lines += [
            f'base = {auto}.from_pretrained("{base}"{labels})',
            f'model = PeftModel.from_pretrained(base, "{repository}").eval()',
        ]
    else:
        lines.append(f'model = {auto}.from_pretrained("{repository}").eval()')
    if piped:
        lines += [
            f'tokenizer = AutoTokenizer.from_pretrained("{repository}")',
            f'run = pipeline("{task}", model=model, tokenizer=tokenizer)',
            f"print(run({_example(task, tokenizer)!r}))",
        ]
    return lines


def _example(task: str | None, tokenizer: Any) -> str | list[dict[str, str]]:
    """What a pipeline for the task can be given."""
    if task == "fill-mask":
        return f"This is {tokenizer.mask_token}."
    text = "A text of the kind it was trained on."
    return [{"role": "user", "content": text}] if task == "text-generation" and tokenizer.chat_template else text


def _auto_class(model: Any) -> str | None:
    kind = type(unwrapped(model)).__name__
    found = _AUTO.get(pipeline_tag(model) or "")
    return found or (kind if hasattr(transformers, kind) else None)


def _names_labels(model: Any) -> bool:
    return pipeline_tag(model) in _NAMES_LABELS


def _is_adapter(model: Any) -> bool:
    return hasattr(model, "peft_config")


def _flat(values: Any) -> list[str]:
    return [name for value in values for name in ([value] if isinstance(value, str) else value)]
