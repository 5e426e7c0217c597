"""The plan of a run on disk: how many steps it takes, and what those that were made leave."""

from __future__ import annotations

import math
from collections.abc import Sequence

from peft_dpzero.config import DPZeroConfig
from peft_dpzero.mechanism.accountant import Segment
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
            return plan
    return planned(releases(made))
