"""The methods, each a function from a start, a budget and an ε to what became of the model."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from .adamw import adamw
from .base import Method
from .first_order import first_order_in_basis
from .opacus_adamw import opacus_adamw
from .opacus_kept import opacus_kept
from .ours import aggzo, dpzero, ours, ours_given, ours_without_privacy, ours_without_public
from .pazo import pazo
from .published import published
from .zero_shot import zero_shot

_ONE_DIRECTION = tuple({"learning_rate": rate} for rate in (1e-4, 1e-3, 1e-5, 1e-2, 1e-1))
_MANY_DIRECTIONS = tuple({"learning_rate": rate} for rate in (1e-3, 1e-4, 1e-2, 1e-1, 3e-1, 1.0))
# Opacus's: (η, C, B).
_FIRST_ORDER = tuple((rate, 0.1, 256) for rate in (1e-3, 5e-4, 2e-3))
_FIRST_ORDER += tuple((rate, 1.0, 256) for rate in (1e-3, 5e-4, 2e-3, 5e-3, 1e-2, 2e-2))
_FIRST_ORDER += tuple((rate, 3.0, 256) for rate in (5e-3, 1e-2, 2e-2))
_FIRST_ORDER += tuple((rate, 1.0, 128) for rate in (5e-3, 1e-2, 2e-2))

_KEPT = tuple((rate, 1.0, 256) for rate in (1e-3, 5e-4, 2e-3, 5e-3, 1e-2))
_KEPT += tuple((rate, 1.0, 1024) for rate in (1e-3, 2e-3, 5e-3, 1e-2))


def _opacus_grid(settings: Iterable[tuple[float, float, int]]) -> tuple[dict[str, Any], ...]:
    return tuple({"learning_rate": rate, "clipping_threshold": most, "batch": rows} for rate, most, rows in settings)


METHODS: dict[str, Method] = {
    method.name: method
    for method in (
        Method("zero-shot", "zero-shot (the start)", zero_shot, private=False, trains=False),
        Method("adamw", "AdamW, LoRA, without privacy", adamw, private=False),
        Method("zo", "zeroth-order, without privacy", ours_without_privacy, private=False),
        Method("ours", "peft_dpzero, defaults, public text", ours),
        Method("ours-no-public", "peft_dpzero, defaults, no public basis", ours_without_public),
        Method("dpzero", "DPZero (K = 1), our accountant", dpzero, grid=_ONE_DIRECTION),
        Method("published", "DPZero's published step and noise", published, grid=_ONE_DIRECTION),
        *(Method(f"aggzo-{k}", f"DP-AggZO, K = {k}", aggzo(k), grid=_MANY_DIRECTIONS) for k in (16, 64, 256)),
        Method(
            "pazo-p",
            "PAZO-P",
            pazo,
            grid=tuple(
                {"learning_rate": rate, "public_batches": count} for rate in (1e-1, 1e-2, 1.0) for count in (3, 6, 10)
            ),
        ),
        Method("first-order-basis", "first-order DP in our public basis", first_order_in_basis),
        Method("opacus", "Opacus, DP-AdamW, LoRA", opacus_adamw, grid=_opacus_grid(_FIRST_ORDER)),
        Method("opacus-kept", "Opacus over a kept trunk", opacus_kept, grid=_opacus_grid(_KEPT)),
    )
}

# What only the sweep runs.
SWEPT = Method("ours-given", "peft_dpzero, η and C given", ours_given)
# What a cell may name.
ALL_METHODS = METHODS | {SWEPT.name: SWEPT}

__all__ = ["ALL_METHODS", "METHODS", "SWEPT", "Method"]
