"""How far the discrete Gaussian on a grid is from the continuous one that is accounted for, as the grid gets finer.

    python benchmarks/grid_gap.py

Prints δ at a fixed ε for one release of sensitivity Δ grid units and scale σΔ, and the same of the continuous Gaussian.
"""

from __future__ import annotations

import math

from dp_accounting.pld.privacy_loss_mechanism import AdjacencyType, DiscreteGaussianPrivacyLoss, GaussianPrivacyLoss

SIGMA, EPSILON = 1.0, 2.0
GRIDS = (1, 4, 16, 64, 256, 1024, 4096)


def gaps(rate: float) -> list[tuple[int, float, float]]:
    """(Δ, δ of the discrete Gaussian, its excess over the continuous one's as a share) for each grid."""
    worst = AdjacencyType.REMOVE
    continuous = GaussianPrivacyLoss(SIGMA, sampling_prob=rate, adjacency_type=worst).get_delta_for_epsilon(EPSILON)
    rows = []
    for grid in GRIDS:
        loss = DiscreteGaussianPrivacyLoss(
            SIGMA * grid,
            sensitivity=grid,
            truncation_bound=math.ceil(12 * SIGMA * grid),
            sampling_prob=rate,
            adjacency_type=worst,
        )
        delta = float(loss.get_delta_for_epsilon(EPSILON))
        rows.append((grid, delta, delta / float(continuous) - 1.0))
    return rows


def main() -> None:
    for rate in (1.0, 0.1):
        print(f"σ = {SIGMA:g}, ε = {EPSILON:g}, q = {rate:g}")
        for grid, delta, excess in gaps(rate):
            print(f"  Δ = {grid:5d}   δ = {delta:.6e}   excess {excess:+.1e}")


if __name__ == "__main__":
    main()
