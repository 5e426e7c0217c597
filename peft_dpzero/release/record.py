"""The privacy record and the model card: what is claimed of an adapter, in numbers and in words."""

from __future__ import annotations

import json
import math
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

from peft_dpzero.mechanism.accountant import ACCOUNTANT, INTERVAL, PrivacyPlan, accountant_version
from peft_dpzero.mechanism.clipping import SENSITIVITY

RECORD_NAME = "privacy_record.json"
CARD_NAME = "README.md"

_NEIGHBORS = {
    "add_or_remove_one": "data sets that differ by the presence of one training example",
    "replace_one": "data sets of equal size that differ in the content of one training example",
}


def privacy_record(plan: PrivacyPlan, steps: int) -> dict[str, Any]:
    """The JSON-ready record of a run that has made `steps` releases.

    `epsilon` is what PLD proves for them, or null where nothing is guaranteed. `segments` is what it composes: one
    entry, or several if the run was continued; `noise_multiplier` and `sample_rate` are then the last one's.
    """
    config = plan.config
    spent = plan.epsilon(steps)
    return {
        "format_version": 1,
        "guarantee": _guarantee(plan),
        "epsilon": None if math.isinf(spent) else spent,
        "delta": config.target_delta,
        "noise_multiplier": plan.noise_multiplier,
        "sample_rate": plan.sample_rate,
        "steps": steps,
        "segments": [asdict(segment) for segment in plan.segments(steps)],
        "planned_steps": plan.steps,
        "neighboring": config.neighboring,
        "mechanism": "poisson_sampled_discrete_gaussian",
        "sampling": "poisson",
        "privacy_unit": "example",
        "accountant": {
            "name": ACCOUNTANT,
            "version": accountant_version(),
            "value_discretization_interval": INTERVAL,
        },
        "deterministic": config.deterministic,
        "expected_batch_size": plan.expected_batch_size,
        "clipping_threshold": _finite(config.clipping_threshold),
        "grid_units_per_clipping_threshold": SENSITIVITY,
        "num_directions": config.num_directions,
        "smoothing_parameter": config.smoothing_parameter,
        "difference": config.difference,
        "direction_distribution": config.direction_distribution,
        "direction_seed": config.direction_seed,
        "train_loss": config.train_loss,
        "evaluation_data": "treated as public",
        "not_covered": _not_covered(plan),
        "versions": {name: version(name) for name in ("peft_dpzero", "torch", "transformers", "peft", "opendp")},
    }


def save_record(record: dict[str, Any], folder: Path) -> Path:
    """Writes `privacy_record.json` and returns its path."""
    path = folder / RECORD_NAME
    path.write_text(json.dumps(record, indent=2, allow_nan=False) + "\n", encoding="utf-8")
    return path


def save_card(record: dict[str, Any], folder: Path, base_model: str | None, library: str, **card_data: Any) -> Path:
    """Writes the model card, replacing any that PEFT or the Trainer wrote, and returns its path.

    Args:
        record: from `privacy_record`.
        folder: where README.md goes.
        base_model: the base model's Hub name, or None if it has none.
        library: "peft" or "transformers".
        card_data: further fields of `huggingface_hub.ModelCardData`, such as language, license or tags.
    """
    tags = card_data.pop("tags", None) or []
    data = ModelCardData(
        base_model=base_model,
        library_name=library,
        tags=["dpzero", "differential-privacy", "zeroth-order", *([tags] if isinstance(tags, str) else tags)],
        **card_data,
        privacy={
            key: record[key]
            for key in (
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
        },
    )
    path = folder / CARD_NAME
    ModelCard(f"---\n{data.to_yaml()}\n---\n\n{_card_text(record, base_model)}").save(path)
    return path


def _guarantee(plan: PrivacyPlan) -> str:
    if plan.config.deterministic:
        return "none: deterministic mode, in which sampling and noise are predictable"
    if plan.noise_multiplier == 0:
        return "none: no noise was added"
    return "(epsilon, delta)-differential privacy of the released values and of all that is computed from them"


def _not_covered(plan: PrivacyPlan) -> list[str]:
    gaps = [
        "evaluation data and every decision based on it",
        "the choice of hyper-parameters, if it looked at the training data",
        "the base model's own training data",
        "how long steps took",
        "the number of training examples, which sample_rate reveals",
    ]
    if plan.config.train_loss == "nonprivate":
        gaps.append("the training loss, which was logged without noise (train_loss='nonprivate')")
    return gaps


def _finite(value: float) -> float | None:
    return None if math.isinf(value) else value


def _card_text(record: dict[str, Any], base_model: str | None) -> str:
    name = f"`{base_model}`" if base_model else "a base model"
    noun = "adapter" if record["epsilon"] is not None else "model"
    lines = [
        f"# Fine-tuned {noun} of {name}",
        "",
        "Trained with forward passes only by peft_dpzero, an implementation "
        "of DPZero ([arXiv 2310.09639](https://arxiv.org/abs/2310.09639)).",
        "",
        "## Privacy",
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
        f"`{RECORD_NAME}` holds every number that the accountant needs.",
        "",
    ]
    return "\n".join(lines)


_CARD_ROWS = (
    ("noise multiplier σ", "noise_multiplier"),
    ("sample rate q", "sample_rate"),
    ("steps released", "steps"),
    ("directions a step K", "num_directions"),
    ("clipping threshold C", "clipping_threshold"),
    ("smoothing parameter λ", "smoothing_parameter"),
    ("expected batch size", "expected_batch_size"),
    ("training loss", "train_loss"),
)


def _statement(record: dict[str, Any]) -> list[str]:
    if record["epsilon"] is None:
        return [f"**This model has no privacy guarantee** ({record['guarantee'].removeprefix('none: ')})."]
    return [
        f"Training satisfies **({record['epsilon']:.4g}, {record['delta']:g})-differential privacy** for every single "
        "training example.",
        "",
        f"Neighbouring data sets are {_NEIGHBORS[record['neighboring']]} (`{record['neighboring']}`). For any two of "
        f"them and any set of outcomes, the probabilities of that set differ by a factor of at most "
        f"e^ε = {math.exp(record['epsilon']):.3g}, up to δ = {record['delta']:g}. The privacy unit is one example: "
        "somebody who contributed several is protected less.",
        "",
        f"The bound composes {record['steps']} releases of a discrete Gaussian mechanism on Poisson samples, computed "
        f"by {record['accountant']['name']} {record['accountant']['version']}. The released values, the directions "
        "and the weights are all public; the weights are a function of the other two and of the base model.",
    ]
