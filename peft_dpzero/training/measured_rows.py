"""The rows on which settings are measured before training: public ones, or made-up ones. None is private."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import islice
from random import Random
from typing import Any

from peft_dpzero.checks.passes import TriedModel
from peft_dpzero.checks.probe import Probe
from peft_dpzero.checks.synthetic import ProbeBatch
from peft_dpzero.errors import DPZeroError
from peft_dpzero.estimation.losses import MicroBatch
from peft_dpzero.estimation.shapes import Shapes, as_row

MADE_UP, PUBLIC = "made-up rows", "public text"
# Rows that are looked at: about as many as a step has, since a row that comes twice is cheaper the second time.
MOST_ROWS = 1024
# Of made-up rows: the longest, unless `max_length` is less, and between which parts of it their lengths lie.
_LONGEST = 64
_SHORTEST_PART, _LONGEST_PART = 0.25, 0.75


def rows_to_measure(tried: TriedModel, public: Sequence[MicroBatch]) -> tuple[Sequence[MicroBatch], str]:
    """Rows to measure on, and what they are.

    Raises:
        DPZeroError: there are no public ones, and none can be made up.
    """
    if public:
        return public, PUBLIC
    if tried.probe is None:
        raise DPZeroError(
            "The model reads no tokens, so that nothing can be measured on made-up ones: give clipping_threshold and "
            "smoothing_parameter, or public_text."
        )
    return _made_up_batches(tried.probe, tried.passes.shapes), MADE_UP


def public_batches(rows: Sequence[Any], collate: Callable[[list[Any]], Any], tried: TriedModel) -> list[MicroBatch]:
    """Public rows as micro-batches of one, padded as in training; those that training would leave out are."""
    shapes = tried.passes.shapes
    made = (as_row(collate([row])) for row in islice(rows, MOST_ROWS))
    return [shapes.padded(row) for row in made if shapes.fits(row)]


def _made_up_batches(probe: Probe, shapes: Shapes) -> list[MicroBatch]:
    """Made-up rows of many lengths as micro-batches of one."""
    longest = min(bound for bound in (shapes.max_length, shapes.limit, _LONGEST) if bound)
    drawn = Random(0)
    parts = (drawn.uniform(_SHORTEST_PART, _LONGEST_PART) for _ in range(MOST_ROWS))
    rows = probe.data.rows_of([max(1, int(part * longest)) for part in parts])
    return [probe.data.batch(ProbeBatch([row], 0, len(row))) for row in rows]
