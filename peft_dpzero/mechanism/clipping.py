"""Bounding a unit's contribution, exactly: clipping, then an integer grid on which the bound is checked."""

from __future__ import annotations

import torch
from torch import Tensor

GRID_BITS = 20
# C in grid units, and so the L2 sensitivity of the integer sum when one unit is added or removed.
SENSITIVITY = 1 << GRID_BITS
# Automatic clipping's stability constant, relative to C (Bu et al. 2023, where C = 1).
STABILITY = 0.01


def grid_unit(clipping_threshold: float) -> float:
    """γ = C / 2²⁰: the value of one integer of the grid."""
    return clipping_threshold / SENSITIVITY


def norms(rows: Tensor) -> Tensor:
    """L2 norms of rows without overflow: (n, K) → (n, 1) float64."""
    largest = rows.abs().amax(dim=1, keepdim=True).clamp(min=torch.finfo(torch.float64).tiny)
    scaled: Tensor = rows / largest
    return scaled.square().sum(dim=1, keepdim=True).sqrt() * largest


def clip(differences: Tensor, clipping_threshold: float) -> Tensor:
    """v_i = d_i · min(1, C / ‖d_i‖₂), and 0 where a unit's row is not finite.

    Args:
        differences: (n, K) float64.
        clipping_threshold: C > 0; infinity clips nothing.

    Returns: (n, K) float64.
    """
    rows = _finite(differences)
    return rows * (clipping_threshold / norms(rows)).clamp(max=1.0)


def normalise(differences: Tensor, clipping_threshold: float) -> Tensor:
    """v_i = C · d_i / (‖d_i‖₂ + 0.01·C), automatic clipping (Bu et al. 2023); 0 where a row is not finite.

    Args:
        differences: (n, K) float64.
        clipping_threshold: C, finite and above 0.

    Returns: (n, K) float64.
    """
    rows = _finite(differences)
    return rows * (clipping_threshold / (norms(rows) + STABILITY * clipping_threshold))


def to_grid(contributions: Tensor) -> Tensor:
    """Rounds each row, of L2 norm at most 1, toward zero onto the grid of 2⁻²⁰.

    Args:
        contributions: (n, m) float64, finite.

    Returns: (n, m) int64 whose rows have squared norm at most 2⁴⁰, checked in integers.

    Raises:
        RuntimeError: the check failed, which would be a bug here; no value is shown.
    """
    units = contributions.mul(float(SENSITIVITY)).trunc().to(torch.int64)
    # Rounding in floating point can leave a row a hair above the bound: one step toward zero mends it.
    units = torch.where(_too_long(units), units - units.sign(), units)
    if bool(_too_long(units).any()):
        raise RuntimeError("A clipped row exceeds the sensitivity bound: please report this as a bug.")
    return units


def clip_to_grid(differences: Tensor, clipping_threshold: float) -> Tensor:
    """Clips each unit's row to L2 norm C and rounds it toward zero onto the grid of γ = C / 2²⁰.

    Args:
        differences: (n, K) float64; rows that are not finite contribute zero.
        clipping_threshold: C, finite and above 0.

    Returns: (n, K) int64 whose rows have squared norm at most 2⁴⁰, checked in integers.
    """
    return to_grid(clip(differences / clipping_threshold, 1.0))


def _finite(rows: Tensor) -> Tensor:
    return torch.where(torch.isfinite(rows).all(dim=1, keepdim=True), rows, 0.0)


def _too_long(units: Tensor) -> Tensor:
    return units.square().sum(dim=1, keepdim=True) > SENSITIVITY**2
