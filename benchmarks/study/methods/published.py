"""The step of the code published with DPZero, with its own batches and noise.

Batches are shuffled; σ comes from Rényi DP as if they were Poisson samples, and the sum's noise is 2σC. That noise is a
function of the direction's seed, so that whoever holds the weights can find it: as run there is no guarantee. What its
size would prove, were it secret, is recomputed: a row is in one batch an epoch and moves that sum by C at most, so that
e epochs compose e Gaussian mechanisms of noise multiplier 2σ, with nothing gained from sampling.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from dp_accounting import GaussianDpEvent, PoissonSampledDpEvent, SelfComposedDpEvent

from reference import Reference
from workloads import Workload

from ..cells import DELTA
from ..clock import Clock
from ..mechanism import pld_epsilon, published_noise_multiplier
from ..models import Row, Start
from .base import Outcome, root_mean_square
from .ours import PUBLISHED_MOVE, PUBLISHED_ROWS

PASSES_A_ROW = 2
# Public rows and directions that the threshold is measured on.
MEASURED_ROWS, MEASURED_DIRECTIONS = 32, 4


def published(
    start: Start, clock: Clock, epsilon: float | None, seed: int, folder: Path, *, learning_rate: float
) -> Outcome:
    assert epsilon is not None
    np.random.seed(seed)
    rows = min(PUBLISHED_ROWS, start.size.batch)
    step = reference_of(start, rows)
    step.lr = learning_rate
    step.clipping_threshold = usual_difference(step, start.public[:MEASURED_ROWS])
    epoch = len(start.train) // rows  # the rest of an epoch would get too little noise
    before = start.weights()
    tried = start.some_rows(rows)
    steps = clock.steps(PASSES_A_ROW * rows, lambda: step(0, tried))
    start.restore(before)
    step.noise = published_noise_multiplier(epsilon, rows / len(start.train), steps)

    random = np.random.RandomState(seed)
    order = np.concatenate([random.permutation(len(start.train))[: epoch * rows] for _ in range(-(-steps // epoch))])
    made = 0
    for made in range(1, steps + 1):
        chosen = order[(made - 1) * rows : made * rows]
        step(made - 1, [start.train[i] for i in chosen])
        if clock.is_over:
            break
    clock.stop()
    return Outcome(
        made,
        float(PASSES_A_ROW * rows * made),
        what_its_noise_proves(epsilon, step.noise, rows / len(start.train), made, math.ceil(made / epoch)),
        {
            "learning_rate": learning_rate,
            "batch": rows,
            "planned_steps": steps,
            "clipping_threshold": step.clipping_threshold,
            "smoothing_parameter": step.smoothing_parameter,
        },
    )


def what_its_noise_proves(claimed: float, sigma: float, rate: float, steps: int, epochs: int) -> dict[str, Any]:
    """The ε that is claimed, and those that noise of 2σC would prove if it were secret."""
    release = GaussianDpEvent(2 * sigma)
    return {
        "epsilon": None,
        "epsilon_claimed": claimed,
        "epsilon_if_secret": pld_epsilon(SelfComposedDpEvent(release, epochs)),
        "epsilon_if_secret_and_poisson": pld_epsilon(SelfComposedDpEvent(PoissonSampledDpEvent(rate, release), steps)),
        "delta": DELTA,
        "noise_multiplier": sigma,
        "statement": "no guarantee: the noise is a function of the direction's seed",
    }


def reference_of(start: Start, rows: int) -> Reference:
    """The published step over the start's model, with its padding, passes and perturbing in place."""
    workload = Workload(
        "study",
        "lora",
        start.model,
        start.train,
        start.loss,
        start.collate,
        rows,
        rows,
        start.words,
        start.tokenizer.pad_token_id,
    )
    reference = Reference(workload, candidates=False)
    reference.smoothing_parameter = PUBLISHED_MOVE
    return reference


def usual_difference(step: Reference, public: list[Row]) -> float:
    """The root mean square of public rows' differences along random directions."""
    batch, differences = step.collate(public), []
    for seed in range(MEASURED_DIRECTIONS):
        step.perturb(seed, 1)
        plus = step.losses(batch)
        step.perturb(seed, -2)
        minus = step.losses(batch)
        step.perturb(seed, 1)
        differences.append((plus - minus) / (2 * step.smoothing_parameter))
    return root_mean_square(torch.stack(differences))
