"""The privacy record: what is claimed of a release, in numbers."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

from peft_dpzero.mechanism.accountant import Accountant
from peft_dpzero.mechanism.clipping import SENSITIVITY
from peft_dpzero.mechanism.plan import PrivacyPlan

RECORD_NAME = "privacy_record.json"
# Version 1 has no table of files, and version 2 does not name the base.
RECORD_VERSION = 3


def privacy_record(
    plan: PrivacyPlan,
    steps: int,
    losses: Mapping[int, float] | None = None,
    basis: str | None = None,
    chosen: dict[str, Any] | None = None,
    base: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """The JSON-ready record of a run that has made `steps` releases.

    `epsilon` is what the accountant proves for them, or null where nothing is guaranteed. `segments` is what it
    composes: one entry, or several if the run was continued; `noise_multiplier` and `sample_rate` are then the last
    one's. `losses` are the private mean losses, by the number of steps done. `basis` is the digest of what public text
    told about the model, and `chosen` the settings that were chosen before training, and what from. `base` is the class
    of the base model and a hash of its frozen weights.
    """
    config = plan.config.settled()
    accountant, spent = Accountant.of(config), plan.epsilon(steps)
    return {
        "format_version": RECORD_VERSION,
        "guarantee": _guarantee(plan, steps),
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
        "public_basis": basis,
        "chosen": chosen,
        "base_model": base,
        "not_covered": _not_covered(plan, basis),
        "versions": {name: version(name) for name in ("peft_dpzero", "torch", "transformers", "peft", "opendp")},
    }


def save_record(record: dict[str, Any], folder: Path) -> Path:
    """Writes `privacy_record.json` and returns its path."""
    path = folder / RECORD_NAME
    path.write_text(json.dumps(record, indent=2, allow_nan=False) + "\n", encoding="utf-8")
    return path


def _guarantee(plan: PrivacyPlan, steps: int) -> str:
    if plan.config.deterministic:
        return "none: deterministic mode, in which sampling and noise are predictable"
    if plan.noise_multiplier == 0:
        return "none: no noise was added"
    if any(segment.noise_multiplier == 0 for segment in plan.segments(steps)):
        return "none: no noise was added in some steps"
    kind = "epsilon" if plan.config.mechanism == "laplace" else "(epsilon, delta)"
    return f"{kind}-differential privacy of the released values and of all that is computed from them"


def _not_covered(plan: PrivacyPlan, basis: str | None) -> list[str]:
    gaps = [
        "evaluation data and every decision based on it",
        "the choice of hyper-parameters, if it looked at the training data",
        "the base model's own training data",
        "how long steps took",
        "whether the run stopped at an error, which a single example may cause",
        "the number of privacy units, which sample_rate reveals",
    ]
    if basis is not None:
        gaps.append("the public text that the basis of directions was made of")
    if plan.config.rows_asserted_independent:
        gaps.append("that rows do not reach each other in the model or the loss, which the user asserted")
    if plan.config.train_loss == "nonprivate":
        gaps.append("the training loss, which was logged without noise (train_loss='nonprivate')")
    return gaps


def _finite(value: float) -> float | None:
    return None if math.isinf(value) else value
