"""The header of a journal's segment: the public facts that its releases were made under."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from peft_dpzero.config import DPZeroConfig
from peft_dpzero.mechanism.accountant import Segment
from peft_dpzero.mechanism.plan import PrivacyPlan
from peft_dpzero.perturbation import Perturbation
from peft_dpzero.release.digests import parameters_digest
from peft_dpzero.release.journal import JournalSegment
from peft_dpzero.release.optimizer import DPZeroOptimizer

FORMAT_VERSION = 2


def plan_header(
    plan: PrivacyPlan,
    perturbation: Perturbation,
    optimizer: DPZeroOptimizer,
    model: Any = None,
    start: str | None = None,
) -> dict[str, Any]:
    """All that replaying and accounting need, JSON-ready.

    Args:
        plan: the segment's plan.
        perturbation: over the model.
        optimizer: what applies the releases.
        model: the model, whose class and number of labels are noted, so that its base can be built again.
        start: digest of the trained parameters at the start of the run; None takes them as they are now.
    """
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    return {
        "format_version": FORMAT_VERSION,
        "config": {k: str(v) if v == math.inf else v for k, v in asdict(plan.config).items()},
        "sample_rate": plan.sample_rate,
        "expected_batch_size": plan.expected_batch_size,
        "first_step": plan.first_step,
        "steps": plan.steps,
        "loss_interval": plan.loss_interval,
        "model": {
            "class": type(base).__name__,
            "num_labels": getattr(getattr(base, "config", None), "num_labels", None),
        },
        "trainable": [
            [name, str(p.dtype).removeprefix("torch."), list(p.shape)] for name, p in perturbation.parameters.items()
        ],
        "optimizer": optimizer.settings(perturbation),
        "start": parameters_digest(perturbation) if start is None else start,
    }


def segment_config(segment: JournalSegment) -> DPZeroConfig:
    """The settings of a segment, with σ calibrated."""
    values = segment.header["config"]
    return DPZeroConfig.from_dict({key: math.inf if value == "inf" else value for key, value in values.items()})


def releases(segments: Sequence[JournalSegment]) -> tuple[Segment, ...]:
    """What the accountant needs to know of the entries of `segments`."""
    return tuple(
        Segment(s.header["config"]["noise_multiplier"], s.header["sample_rate"], len(s.entries)) for s in segments
    )
