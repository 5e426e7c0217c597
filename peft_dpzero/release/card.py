"""The model card: what the release is, how it is used, what the privacy record says, and what the user adds."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

from peft_dpzero.release.base_name import base_name
from peft_dpzero.release.digests import model_files
from peft_dpzero.release.evaluation import evaluation_section, results_of
from peft_dpzero.release.picture import PICTURE_NAME
from peft_dpzero.release.statement import card_claims, card_statement
from peft_dpzero.release.usage import label_names, pipeline_tag, usage

CARD_NAME = "README.md"
_TAGS = ("dpzero", "differential-privacy", "zeroth-order")
# What the Trainer's own method, or TRL's, calls them.
_OTHER_NAMES = {
    "finetuned_from": "base_model",
    "tasks": "pipeline_tag",
    "dataset_tags": "datasets",
    "dataset_name": "datasets",
}
_UNUSED = ("dataset", "dataset_args")


def card_fields(given: Mapping[str, Any]) -> dict[str, Any]:
    """What the user gives for a card, under the names of `huggingface_hub.ModelCardData`."""
    return {_OTHER_NAMES.get(key, key): value for key, value in given.items() if key not in _UNUSED}


def save_card(
    record: dict[str, Any],
    folder: Path,
    model: Any,
    *,
    repository: str | None = None,
    tokenizer: Any = None,
    **card_data: Any,
) -> Path:
    """Writes the model card, replacing any that PEFT or the Trainer wrote, and returns its path.

    Args:
        record: from `privacy_record`.
        folder: the release's, with its weights and its picture. README.md goes there.
        model: the trained one: its base is named if that has a Hub name.
        repository: the release's name on the Hub, if that is known.
        tokenizer: the release's, if it has one.
        card_data: further fields of `huggingface_hub.ModelCardData`, such as base_model, language, license, datasets
            or tags, or by the names that `Trainer.create_model_card` has for them. `eval_results` may be what
            `Trainer.evaluate` returned.
    """
    fields = card_fields(card_data)
    base = base_name(model, fields.pop("base_model", None))
    given = fields.pop("eval_results", None)
    tags = fields.pop("tags", None) or []
    task = fields.pop("pipeline_tag", None) or pipeline_tag(model)
    adapter = hasattr(model, "peft_config")
    if adapter and (names := label_names(model)):
        fields["id2label"] = names
    name = fields.pop("model_name", None)
    results = None if given is None else results_of(given, task, fields.get("datasets"))
    data = ModelCardData(
        base_model=base,
        library_name="peft" if adapter else "transformers",
        pipeline_tag=task,
        tags=[*_TAGS, *(_peft_tags(model, base) if adapter else ()), *([tags] if isinstance(tags, str) else tags)],
        model_name=name or ((repository or "private model").rpartition("/")[2] if results else None),
        eval_results=results,
        **fields,
        privacy=card_claims(record),
    )
    parts = [
        _head(adapter, base, data.datasets),
        usage(model, base, repository, tokenizer, bool(model_files(folder))),
        card_statement(record),
    ]
    if (folder / PICTURE_NAME).exists():
        parts.append(f"![ε spent and released losses over steps]({PICTURE_NAME})\n")
    if given is not None:
        parts.append(evaluation_section(given))
    path = folder / CARD_NAME
    ModelCard(f"---\n{data.to_yaml()}\n---\n\n" + "\n".join(parts)).save(path)
    return path


def _head(adapter: bool, base: str | None, datasets: Any) -> str:
    trained = "" if not datasets else f" on {', '.join([datasets] if isinstance(datasets, str) else datasets)}"
    return (
        f"# Fine-tuned {'adapter' if adapter else 'model'} of {f'`{base}`' if base else 'a base model'}\n\n"
        f"Trained{trained} with forward passes only by peft_dpzero, an implementation "
        "of DPZero ([arXiv 2310.09639](https://arxiv.org/abs/2310.09639)).\n"
    )


def _peft_tags(model: Any, base: str | None) -> list[str]:
    """The tags of PEFT's own card, with the base by its Hub name or not at all."""
    with tempfile.TemporaryDirectory() as folder:
        model.create_or_update_model_card(folder)
        tags = ModelCard.load(Path(folder) / CARD_NAME).data.tags or []
    named = [f"base_model:adapter:{base}"] if base else []
    return [tag for tag in tags if not tag.startswith("base_model:")] + named
