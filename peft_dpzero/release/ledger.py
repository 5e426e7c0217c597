"""What a journal amounts to: the plan of its run and the record of its releases, made from the journal alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from peft_dpzero.mechanism.plan import PrivacyPlan
from peft_dpzero.release.header import releases, segment_config
from peft_dpzero.release.journal import JournalSegment
from peft_dpzero.release.record import privacy_record
from peft_dpzero.release.replay import replayed_releases


def plan_of(segments: Sequence[JournalSegment]) -> PrivacyPlan:
    """The plan that the last of `segments` was released under."""
    last = segments[-1]
    header = last.header
    batch = header["expected_batch_size"]
    return PrivacyPlan(
        segment_config(last),
        round(batch / header["sample_rate"]),
        batch,
        header["steps"],
        releases(segments[:-1]),
        header["loss_interval"],
    )


def record_of(segments: Sequence[JournalSegment]) -> dict[str, Any]:
    """The privacy record of all that `segments` released."""
    made = [entry.released for entry in replayed_releases(segments)]
    losses = {released.step + 1: released.loss for released in made if released.loss is not None}
    header = segments[0].header
    base = {"class": header["model"]["class"], "frozen_sha256": header.get("frozen", {}).get("sha256")}
    found = {key: header.get(key) for key in ("basis", "chosen")}
    return privacy_record(plan_of(segments), len(made), losses, **found, base=base)
