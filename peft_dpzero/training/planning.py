"""The plan of a run on disk: how many steps it takes, and what those that were made leave."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from peft_dpzero.config import DPZeroConfig
from peft_dpzero.mechanism.accountant import TOLERANCE, Segment
from peft_dpzero.mechanism.plan import PrivacyPlan, make_plan
from peft_dpzero.release.header import releases
from peft_dpzero.release.journal import JournalSegment


def steps_of(epochs: float, num_units: int, batch: int) -> int:
    """Steps in which each unit is drawn `epochs` times on average."""
    return math.ceil(epochs * math.ceil(num_units / batch))


def plan_for(
    config: DPZeroConfig,
    num_units: int,
    batch: int,
    steps: int,
    logging_steps: float,
    segments: Sequence[JournalSegment] = (),
) -> PrivacyPlan:
    """The plan of the last segment with releases if its steps are asked for, else of a new one after them.

    Args:
        config: the user's settings.
        num_units: N.
        batch: B.
        steps: T, earlier segments' steps counted.
        logging_steps: steps between two released losses, or below 1 their share of all.
        segments: the journal's.
    """

    def planned(spent: tuple[Segment, ...] = ()) -> PrivacyPlan:
        interval = math.ceil(steps * logging_steps) if logging_steps < 1 else int(logging_steps)
        return make_plan(config, num_units, batch, steps, spent, interval)

    made = [segment for segment in segments if segment.entries]
    if not made:
        return planned()
    earlier, last = releases(made[:-1]), made[-1].header["steps"]
    capped = config.noise_multiplier is not None and config.target_epsilon is not None
    if capped or steps <= last:
        plan = planned(earlier)
        if plan.steps <= last:
            return _as_noted(plan, made[-1].header)
    return planned(releases(made))


def _as_noted(plan: PrivacyPlan, header: Mapping[str, Any]) -> PrivacyPlan:
    """`plan` with the σ that its segment began with, if that is as good: another processor, or version of a library,
    may calibrate to other last digits."""
    noted = header["config"]["noise_multiplier"]
    target = header.get("requested", {}).get("target_epsilon")  # not in the oldest journals
    asked = None if plan.requested is None else plan.requested.target_epsilon
    if plan.sample_rate != header["sample_rate"] or asked is None or asked != target:
        return plan
    if not isinstance(noted, float) or not math.isclose(noted, plan.noise_multiplier, rel_tol=TOLERANCE):
        return plan
    as_noted = replace(plan, config=plan.config.replace(noise_multiplier=noted))
    return as_noted if as_noted.epsilon() <= asked else plan
