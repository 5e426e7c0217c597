"""The privacy record and the model card: what is claimed of an adapter, in numbers and in words."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

from peft_dpzero.mechanism.accountant import Accountant
from peft_dpzero.mechanism.clipping import SENSITIVITY
from peft_dpzero.mechanism.plan import PrivacyPlan

RECORD_NAME = "privacy_record.json"
CARD_NAME = "README.md"

_NEIGHBORS = {
    "add_or_remove_one": "data sets that differ by the presence of {unit}",
    "replace_one": "data sets of equal size that differ in the content of {unit}",
}


def privacy_record(plan: PrivacyPlan, steps: int, losses: Mapping[int, float] | None = None) -> dict[str, Any]:
    """The JSON-ready record of a run that has made `steps` releases.

    `epsilon` is what the accountant proves for them, or null where nothing is guaranteed. `segments` is what it
    composes: one entry, or several if the run was continued; `noise_multiplier` and `sample_rate` are then the last
    one's. `losses` are the private mean losses, by the number of steps done.
    """
    config = plan.config
    accountant, spent = Accountant.of(config), plan.epsilon(steps)
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
        "mechanism": accountant.event_name,
        "sampling": "poisson",
        "privacy_unit": config.privacy_unit or "example",
        "row_independence": "asserted by the user" if config.rows_asserted_independent else "by construction",
        "max_examples_per_unit": config.max_examples_per_unit if config.privacy_unit else None,
        "accountant": accountant.describe(plan.segments()),
        "deterministic": config.deterministic,
        "expected_batch_size": plan.expected_batch_size,
        "clipping": config.clipping,
        "clipping_threshold": _finite(config.clipping_threshold),
        "clipping_quantile": config.clipping_quantile if config.clipping == "adaptive" else None,
        "grid_units_per_clipping_threshold": SENSITIVITY,
        "num_directions": config.num_directions,
        "smoothing_parameter": config.smoothing_parameter,
        "difference": config.difference,
        "direction_distribution": config.direction_distribution,
        "direction_seed": config.direction_seed,
        "train_loss": config.train_loss,
        "released_losses": {str(step): loss for step, loss in (losses or {}).items()} or None,
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
    ModelCard(f"---\n{data.to_yaml()}\n---\n\n{_card_text(record, base_model, library)}").save(path)
    return path


def _guarantee(plan: PrivacyPlan) -> str:
    if plan.config.deterministic:
        return "none: deterministic mode, in which sampling and noise are predictable"
    if plan.noise_multiplier == 0:
        return "none: no noise was added"
    kind = "epsilon" if plan.config.mechanism == "laplace" else "(epsilon, delta)"
    return f"{kind}-differential privacy of the released values and of all that is computed from them"


def _not_covered(plan: PrivacyPlan) -> list[str]:
    gaps = [
        "evaluation data and every decision based on it",
        "the choice of hyper-parameters, if it looked at the training data",
        "the base model's own training data",
        "how long steps took",
        "whether the run stopped at an error, which a single example may cause",
        "the number of privacy units, which sample_rate reveals",
    ]
    if plan.config.train_loss == "nonprivate":
        gaps.append("the training loss, which was logged without noise (train_loss='nonprivate')")
    return gaps


def _finite(value: float) -> float | None:
    return None if math.isinf(value) else value


def _card_text(record: dict[str, Any], base_model: str | None, library: str) -> str:
    name = f"`{base_model}`" if base_model else "a base model"
    noun = "adapter" if library == "peft" else "model"
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
        *_loss_table(record),
        f"`{RECORD_NAME}` holds every number that the accountant needs.",
        "",
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
        f"Neighbouring data sets are {neighbors} (`{record['neighboring']}`). "
        "For any two of them and any set of outcomes, the probabilities of that set differ by a factor of at most "
        f"e^ε = {math.exp(record['epsilon']):.3g}{slack}. {whose}",
        "",
        f"The bound composes {record['steps']} releases of a discrete {'Laplace' if pure else 'Gaussian'} mechanism on "
        f"Poisson samples, computed by {accountant}. The released values, the directions "
        "and the weights are all public; the weights are a function of the other two and of the base model.",
    ]
