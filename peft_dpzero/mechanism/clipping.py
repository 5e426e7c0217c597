"""Clipping a unit's K differences onto an integer grid, so that the sensitivity bound is exact."""

from __future__ import annotations

import torch
from torch import Tensor

GRID_BITS = 20
# C in grid units, and so the L2 sensitivity of the integer sum when one unit is added or removed.
SENSITIVITY = 1 << GRID_BITS


def grid_unit(clipping_threshold: float) -> float:
    """γ = C / 2²⁰: the value of one integer of the grid."""
    return clipping_threshold / SENSITIVITY


def clip(differences: Tensor, clipping_threshold: float) -> Tensor:
    """v_i = d_i · min(1, C / ‖d_i‖₂), and 0 where a unit's row is not finite.

    Args:
        differences: (n, K) float64.
        clipping_threshold: C > 0; infinity clips nothing.

    Returns: (n, K) float64.
    """
    rows, direction, fits = _polar(differences, clipping_threshold)
    return torch.where(fits, rows, direction * clipping_threshold)


def clip_to_grid(differences: Tensor, clipping_threshold: float) -> Tensor:
    """Clips each unit's row to L2 norm C and rounds it toward zero onto the grid of γ = C / 2²⁰.

    Args:
        differences: (n, K) float64; rows that are not finite contribute zero.
        clipping_threshold: C, finite and above 0.

    Returns: (n, K) int64 whose rows have squared norm at most 2⁴⁰, checked in integers.

    Raises:
        RuntimeError: the check failed, which would be a bug here; no value is shown.
    """
    rows, direction, fits = _polar(differences, clipping_threshold)
    units = torch.where(fits, rows / clipping_threshold, direction).mul(float(SENSITIVITY)).trunc().to(torch.int64)
    # Rounding in floating point can leave a row a hair above the bound: one step toward zero mends it.
    units = torch.where(_too_long(units), units - units.sign(), units)
    if bool(_too_long(units).any()):
        raise RuntimeError("A clipped row exceeds the sensitivity bound: please report this as a bug.")
    return units


def _polar(differences: Tensor, clipping_threshold: float) -> tuple[Tensor, Tensor, Tensor]:
    """The rows with 0 for those that are not finite, the rows over their norms, and which rows are within C."""
    finite = torch.isfinite(differences).all(dim=1, keepdim=True)
    rows = torch.where(finite, differences, 0.0)
    # A row over its largest entry has a norm from 1 to √K: neither its squares nor d / C can overflow.
    largest = rows.abs().amax(dim=1, keepdim=True).clamp(min=torch.finfo(torch.float64).tiny)
    scaled = rows / largest
    norm = scaled.norm(dim=1, keepdim=True)
    return rows, scaled / norm, largest <= clipping_threshold / norm


def _too_long(units: Tensor) -> Tensor:
    return units.square().sum(dim=1, keepdim=True) > SENSITIVITY**2
