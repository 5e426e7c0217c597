"""What a card says of a run, as a function of the record: the guarantee, its gaps and the settings."""

from __future__ import annotations

import math
from typing import Any

from peft_dpzero.release.numbers import rounded_up, short, thinned
from peft_dpzero.release.record import RECORD_NAME

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


def card_claims(record: dict[str, Any]) -> dict[str, Any]:
    """What the card's YAML says under `privacy`: ε and δ rounded up, the rest to four digits."""
    claims = {key: short(record[key]) for key in _CLAIMS}
    bounds = {key: rounded_up(record[key]) for key in ("epsilon", "delta") if record[key] is not None}
    return claims | bounds


def card_statement(record: dict[str, Any]) -> str:
    """All that the card's text says of the run, and that nothing else on the card may contradict."""
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
        *(f"| {label} | {short(record[key])} |" for label, key in _CARD_ROWS),
        *_base_row(record),
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


def _base_row(record: dict[str, Any]) -> list[str]:
    sha256 = (record["base_model"] or {}).get("frozen_sha256")
    return [f"| SHA-256 of the base's frozen weights | `{sha256}` |"] if sha256 else []


def _loss_table(record: dict[str, Any]) -> list[str]:
    """The released losses, about twenty of them, with the last."""
    losses = list((record["released_losses"] or {}).items())
    if not losses:
        return []
    rows = (f"| {step} | {short(loss)} |" for step, loss in thinned(losses, _LOSS_ROWS))
    return ["| step | training loss (noisy, within the ε) |", "|---|---|", *rows, ""]


def _statement(record: dict[str, Any]) -> list[str]:
    if record["epsilon"] is None:
        return [f"**This model has no privacy guarantee** ({record['guarantee'].removeprefix('none: ')})."]
    column = None if record["privacy_unit"] == "example" else record["privacy_unit"]
    pure = record["mechanism"].endswith("laplace")
    epsilon, delta = (rounded_up(record[key]) for key in ("epsilon", "delta"))
    budget = f"{epsilon:g}" if pure else f"({epsilon:g}, {delta:g})"
    protected = "every single training example" if column is None else f"all examples of one `{column}` together"
    unit = "one training example" if column is None else f"all the examples of one `{column}`"
    whose = (
        "The privacy unit is one example: somebody who contributed several is protected less."
        if column is None
        else f"The privacy unit is one value of `{column}`, however many examples it has."
    )
    slack = "" if pure else f", up to δ = {delta:g}"
    accountant = " ".join(str(record["accountant"][k]) for k in ("name", "version") if k in record["accountant"])
    replaced = record["neighboring"] == "replace_one"
    neighbors = _NEIGHBORS[record["neighboring"]].format(unit=unit)
    return [
        f"Training satisfies **{budget}-differential privacy** for {protected}.",
        "",
        f"Neighboring data sets are {neighbors} (`{record['neighboring']}`). "
        "For any two of them and any set of outcomes, the probabilities of that set differ by a factor of at most "
        f"{_factor(record['epsilon'])}{slack}. {whose}",
        "",
        f"In plain words: had {unit} {'other content' if replaced else 'been left out'}, the chance of anything that "
        "somebody can learn from this release would have been larger or smaller by a factor of at most "
        f"{_factor(record['epsilon'])}{'' if pure else f', give or take δ = {delta:g}'}.",
        "",
        f"The bound composes {record['steps']} releases of a discrete {'Laplace' if pure else 'Gaussian'} mechanism on "
        f"Poisson samples, computed by {accountant}. The released values, the directions "
        "and the weights are all public; the weights are a function of the other two and of the base model.",
    ]


def _factor(epsilon: float) -> str:
    try:
        return f"e^ε = {rounded_up(math.exp(rounded_up(epsilon))):g}"
    except OverflowError:
        return "e^ε"
