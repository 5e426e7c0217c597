"""The model card: what the privacy record says, in words and in YAML."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

from peft_dpzero.release.record import RECORD_NAME

CARD_NAME = "README.md"
PRIVACY_HEADING = "## Privacy"

_CLAIMS = (
    "guarantee",
    "epsilon",
    "delta",
    "neighboring",
    "privacy_unit",
    "mechanism",
    "noise_multiplier",
    "sample_rate",
    "steps",
    "deterministic",
)
_NEIGHBORS = {
    "add_or_remove_one": "data sets that differ by the presence of {unit}",
    "replace_one": "data sets of equal size that differ in the content of {unit}",
}


def save_card(record: dict[str, Any], folder: Path, model: Any, **card_data: Any) -> Path:
    """Writes the model card, replacing any that PEFT or the Trainer wrote, and returns its path.

    Args:
        record: from `privacy_record`.
        folder: where README.md goes.
        model: the trained one: its base is named if that has a Hub name.
        card_data: further fields of `huggingface_hub.ModelCardData`, such as language, license or tags.
    """
    base_model, library = hub_name(model), "peft" if hasattr(model, "peft_config") else "transformers"
    tags = card_data.pop("tags", None) or []
    data = ModelCardData(
        base_model=base_model,
        library_name=library,
        tags=["dpzero", "differential-privacy", "zeroth-order", *([tags] if isinstance(tags, str) else tags)],
        **card_data,
        privacy=card_claims(record),
    )
    path = folder / CARD_NAME
    ModelCard(f"---\n{data.to_yaml()}\n---\n\n{_card_text(record, base_model, library)}").save(path)
    return path


def hub_name(model: Any) -> str | None:
    """The base model's name if it can be a Hub name; a local path is nobody's business."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    name = str(getattr(getattr(base, "config", None), "_name_or_path", "") or "")
    return name if name.count("/") <= 1 and name and not Path(name).exists() else None


def card_claims(record: dict[str, Any]) -> dict[str, Any]:
    """What the card's YAML says under `privacy`."""
    return {key: record[key] for key in _CLAIMS}


def card_statement(record: dict[str, Any]) -> str:
    """All that the card's text says of the run: the guarantee, its gaps and the settings. A function of the record."""
    lines = [
        PRIVACY_HEADING,
        "",
        *_statement(record),
        "",
        "Not covered:",
        "",
        *(f"- {gap}" for gap in record["not_covered"]),
        "",
        "## How it was trained",
        "",
        "| setting | value |",
        "|---|---|",
        *(f"| {label} | {record[key]} |" for label, key in _CARD_ROWS),
        "",
        *_loss_table(record),
        f"`{RECORD_NAME}` holds every number that the accountant needs.",
        "",
    ]
    return "\n".join(lines)


def _card_text(record: dict[str, Any], base_model: str | None, library: str) -> str:
    name = f"`{base_model}`" if base_model else "a base model"
    noun = "adapter" if library == "peft" else "model"
    lines = [
        f"# Fine-tuned {noun} of {name}",
        "",
        "Trained with forward passes only by peft_dpzero, an implementation "
        "of DPZero ([arXiv 2310.09639](https://arxiv.org/abs/2310.09639)).",
        "",
        card_statement(record),
    ]
    return "\n".join(lines)


_CARD_ROWS = (
    ("noise multiplier σ", "noise_multiplier"),
    ("sample rate q", "sample_rate"),
    ("steps released", "steps"),
    ("directions a step K", "num_directions"),
    ("clipping", "clipping"),
    ("clipping threshold C", "clipping_threshold"),
    ("smoothing parameter λ", "smoothing_parameter"),
    ("expected batch size", "expected_batch_size"),
    ("training loss", "train_loss"),
)
_LOSS_ROWS = 20


def _loss_table(record: dict[str, Any]) -> list[str]:
    """The released losses, about twenty of them, with the last."""
    losses = list((record["released_losses"] or {}).items())
    if not losses:
        return []
    every = -(-len(losses) // _LOSS_ROWS)
    shown = losses[::-1][::every][::-1]
    rows = (f"| {step} | {loss:.3f} |" for step, loss in shown)
    return ["| step | training loss (noisy, within the ε) |", "|---|---|", *rows, ""]


def _statement(record: dict[str, Any]) -> list[str]:
    if record["epsilon"] is None:
        return [f"**This model has no privacy guarantee** ({record['guarantee'].removeprefix('none: ')})."]
    column = None if record["privacy_unit"] == "example" else record["privacy_unit"]
    pure = record["mechanism"].endswith("laplace")
    budget = f"{record['epsilon']:.4g}" if pure else f"({record['epsilon']:.4g}, {record['delta']:g})"
    protected = "every single training example" if column is None else f"all examples of one `{column}` together"
    unit = "one training example" if column is None else f"all the examples of one `{column}`"
    whose = (
        "The privacy unit is one example: somebody who contributed several is protected less."
        if column is None
        else f"The privacy unit is one value of `{column}`, however many examples it has."
    )
    slack = "" if pure else f", up to δ = {record['delta']:g}"
    accountant = " ".join(str(record["accountant"][k]) for k in ("name", "version") if k in record["accountant"])
    neighbors = _NEIGHBORS[record["neighboring"]].format(unit=unit)
    return [
        f"Training satisfies **{budget}-differential privacy** for {protected}.",
        "",
        f"Neighboring data sets are {neighbors} (`{record['neighboring']}`). "
        "For any two of them and any set of outcomes, the probabilities of that set differ by a factor of at most "
        f"{_factor(record['epsilon'])}{slack}. {whose}",
        "",
        f"The bound composes {record['steps']} releases of a discrete {'Laplace' if pure else 'Gaussian'} mechanism on "
        f"Poisson samples, computed by {accountant}. The released values, the directions "
        "and the weights are all public; the weights are a function of the other two and of the base model.",
    ]


def _factor(epsilon: float) -> str:
    try:
        return f"e^ε = {math.exp(epsilon):.3g}"
    except OverflowError:
        return "e^ε"
