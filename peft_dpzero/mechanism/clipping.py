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
    """γ = C / 2²⁰: the value of one integer of the grid.

    >>> grid_unit(3.0) * 2**20
    3.0
    """
    return clipping_threshold / SENSITIVITY


def clip(differences: Tensor, clipping_threshold: float) -> Tensor:
    """v_i = d_i · min(1, C / ‖d_i‖₂), and 0 where a unit's row is not finite.

    Args:
        differences: (n, K) float64.
        clipping_threshold: C > 0; infinity clips nothing.

    Returns: (n, K) float64.

    A row of norm 5 comes down to 2.5, one of norm 1 stays:

    >>> clip(torch.tensor([[3.0, 4.0], [0.0, 1.0]], dtype=torch.float64), 2.5).tolist()
    [[1.5, 2.0], [0.0, 1.0]]
    """
    rows = _Polar(differences, clipping_threshold)
    return torch.where(rows.fits, rows.cartesian, rows.direction * clipping_threshold)


def clipped_over_threshold(differences: Tensor, clipping_threshold: float) -> tuple[Tensor, Tensor]:
    """clip(d_i) / C, of norm at most 1 but for rounding, whatever the scales of d and C.

    Args:
        differences: (n, K) float64; rows that are not finite give 0.
        clipping_threshold: C, finite and above 0.

    Returns: (n, K) float64, and whether each row was within C, (n, 1) bool.
    """
    rows = _Polar(differences, clipping_threshold)
    return torch.where(rows.fits, rows.cartesian / clipping_threshold, rows.direction), rows.fits


def normalized(differences: Tensor, clipping_threshold: float) -> Tensor:
    """d_i / (‖d_i‖₂ + 0.01·C): automatic clipping (Bu et al. 2023), over C. 0 where a row is not finite.

    Args:
        differences: (n, K) float64.
        clipping_threshold: C, finite and above 0.

    Returns: (n, K) float64, of norm below 1 but for rounding.
    """
    rows = _Polar(differences, clipping_threshold)
    return rows.direction / (1.0 + STABILITY * rows.threshold_over_norm)


def to_grid(contributions: Tensor) -> Tensor:
    """Rounds each row, of L2 norm at most 1, toward zero onto the grid of 2⁻²⁰.

    Args:
        contributions: (n, m) float64, finite.

    Returns: (n, m) int64 whose rows have squared norm at most 2⁴⁰, checked in integers.

    Raises:
        RuntimeError: the check failed, which would be a bug here; no value is shown.

    0.6 · 2²⁰ = 629145.6 and −0.8 · 2²⁰ = −838860.8:

    >>> to_grid(torch.tensor([[0.6, -0.8]], dtype=torch.float64)).tolist()
    [[629145, -838860]]
    """
    units = contributions.mul(float(SENSITIVITY)).trunc().to(torch.int64)
    # Rounding in floating point can leave a row a hair above the bound: one step toward zero mends it.
    units = torch.where(_too_long(units), units - units.sign(), units)
    if bool(_too_long(units).any()):
        raise RuntimeError("A clipped row exceeds the sensitivity bound: please report this as a bug.")
    return units


class _Polar:
    """Rows as norm and direction, such that neither squares nor d / C can overflow; 0 for rows that are not finite."""

    def __init__(self, differences: Tensor, clipping_threshold: float) -> None:
        tiny = torch.finfo(torch.float64).tiny
        finite = torch.isfinite(differences).all(dim=1, keepdim=True)
        self.cartesian = torch.where(finite, differences, 0.0)
        # A row over its largest entry has a norm from 1 to √K.
        largest = self.cartesian.abs().amax(dim=1, keepdim=True).clamp(min=tiny)
        scaled = self.cartesian / largest
        norm = scaled.norm(dim=1, keepdim=True)
        self.direction: Tensor = scaled / norm.clamp(min=tiny)
        self.fits: Tensor = largest <= clipping_threshold / norm
        self.threshold_over_norm: Tensor = clipping_threshold / norm / largest


def _too_long(units: Tensor) -> Tensor:
    return units.square().sum(dim=1, keepdim=True) > SENSITIVITY**2
