"""The header of a journal's segment: the public facts that its releases were made under."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from peft_dpzero.config import SettledConfig
from peft_dpzero.mechanism.accountant import Segment
from peft_dpzero.mechanism.plan import PrivacyPlan
from peft_dpzero.modules import class_of, unwrapped
from peft_dpzero.perturbation.perturbation import Perturbation
from peft_dpzero.release.adapter import adapter_header
from peft_dpzero.release.digests import start_digest
from peft_dpzero.release.frozen import frozen_header
from peft_dpzero.release.journal import JournalSegment
from peft_dpzero.release.optimizer import DPZeroOptimizer

FORMAT_VERSION = 5
# Version 2 lacks `requested`, `adapter` and `frozen`; version 3 lacks `basis`, and its updates are SGD; version 4 lacks
# `chosen` and `minutes`.
READABLE_VERSIONS = (2, 3, 4, 5)
_SINCE_3 = ("requested", "adapter", "frozen")
_SINCE_4 = ("basis",)
_SINCE_5 = ("chosen",)
CONFIG_SINCE_5 = ("minutes",)


def plan_header(
    plan: PrivacyPlan,
    perturbation: Perturbation,
    optimizer: DPZeroOptimizer,
    start: str | None = None,
    chosen: dict[str, Any] | None = None,
    frozen: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """All that replaying, accounting and checking need, JSON-ready.

    Args:
        plan: the segment's plan.
        perturbation: over the model. Its class and number of labels are noted, so that its base can be built again,
            with its adapter's configuration and a hash of its frozen weights.
        optimizer: what applies the releases.
        chosen: the settings that were chosen and not given, and what from.
        frozen: from `frozen_header`, if all processes had to take part; None makes it here.
        start: digest of the run's start; None takes parameters as they are now.
    """
    model = perturbation.model
    requested = plan.config if plan.requested is None else plan.requested
    base = unwrapped(model)
    return {
        "format_version": FORMAT_VERSION,
        "config": {k: str(v) if v == math.inf else v for k, v in asdict(plan.config.settled()).items()},
        "requested": {key: getattr(requested, key) for key in ("target_epsilon", "noise_multiplier")},
        "chosen": chosen,
        "sample_rate": plan.sample_rate,
        "expected_batch_size": plan.expected_batch_size,
        "first_step": plan.first_step,
        "steps": plan.steps,
        "loss_interval": plan.loss_interval,
        "model": {
            "class": class_of(base).__name__,
            "num_labels": getattr(getattr(base, "config", None), "num_labels", None),
        },
        "trainable": [
            [name, str(p.dtype).removeprefix("torch."), list(p.shape)] for name, p in perturbation.parameters.items()
        ],
        "adapter": adapter_header(model),
        "frozen": frozen_header(model, perturbation.parameters) if frozen is None else frozen,
        "basis": None if perturbation.basis is None else perturbation.basis.digest(),
        "optimizer": optimizer.settings(perturbation),
        "start": start_digest(perturbation.with_adapter, perturbation.parameters) if start is None else start,
    }


def in_version(header: dict[str, Any], version: int) -> dict[str, Any]:
    """`header` as an older version of this package would have written it, for a run that was begun by one."""
    since = ((3, _SINCE_3), (4, _SINCE_4), (5, _SINCE_5))
    missing = {key for first, keys in since if version < first for key in keys}
    kept = {key: value for key, value in header.items() if key not in missing} | {"format_version": version}
    if version < 5:
        kept["config"] = {key: value for key, value in header["config"].items() if key not in CONFIG_SINCE_5}
    return kept


def segment_config(segment: JournalSegment) -> SettledConfig:
    """The settings of a segment, with σ calibrated."""
    values = segment.header["config"]
    return SettledConfig.from_dict({key: math.inf if value == "inf" else value for key, value in values.items()})


def releases(segments: Sequence[JournalSegment]) -> tuple[Segment, ...]:
    """What the accountant needs to know of the entries of `segments`."""
    return tuple(
        Segment(s.header["config"]["noise_multiplier"], s.header["sample_rate"], len(s.entries)) for s in segments
    )
