"""What a step costs over W workers, in seconds and bytes, as docs/scaling.md derives it.

B: expected rows a step. K: directions. d: entries of the trained parameters. Bytes are those that one worker receives.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from scipy.stats import poisson

ENTRY_BYTES = 4
SUM_BYTES = 8


@dataclass(frozen=True)
class Worker:
    """Seconds of one worker's step, with central differences.

    Attributes:
        fixed: f, whatever the step holds.
        perturbing: v a direction: making z, going to θ ± λz, and what passes cost however few rows they hold.
        updating: u a direction: moving θ by it.
        row: a row, whatever K: what a shared trunk takes.
        row_direction: a row and direction, at its two points.
    """

    fixed: float
    perturbing: float
    updating: float
    row: float
    row_direction: float

    @property
    def row_point(self) -> float:
        """p: a row's pass at one point, the trunk's part included."""
        return self.row + self.row_direction / 2

    @property
    def trunk_share(self) -> float:
        """t: the trunk's part of such a pass."""
        return self.row / self.row_point

    def seconds(self, rows: float, evaluated: int, moved: int) -> float:
        """A step over `rows`, of `evaluated` directions, that moves θ by `moved`."""
        passes = rows * (self.row + evaluated * self.row_direction)
        return self.fixed + evaluated * self.perturbing + moved * self.updating + passes


@dataclass(frozen=True)
class Network:
    """What a message takes.

    Attributes:
        latency: a, seconds from one worker to another.
        bandwidth: bytes a second and worker.
    """

    latency: float
    bandwidth: float


@dataclass(frozen=True)
class Cost:
    """Of one step: seconds, and the bytes that a worker receives."""

    seconds: float
    received: float


def most_rows(batch_size: float, workers: int, together: int = 1) -> float:
    """Expected rows of the worker that has most, when each has Poisson(B / W), in passes of `together` rows."""
    mean = batch_size / workers
    passes = np.arange(math.ceil((mean + 12 * math.sqrt(mean) + 40) / together))
    at_most = poisson.cdf(passes * together, mean) ** workers
    return float(together * (1 - at_most).sum())


def data_parallel(batch_size: float, directions: int, workers: int, worker: Worker, network: Network) -> Cost:
    """Each worker takes its share of the rows and all directions: what the package does."""
    seconds = worker.seconds(most_rows(batch_size, workers) if workers > 1 else batch_size, directions, directions)
    if workers == 1:
        return Cost(seconds, 0.0)
    received = SUM_BYTES * directions * (2 * (workers - 1) / workers + 1)
    hops = 2 * (workers - 1) + math.ceil(math.log2(workers))
    return Cost(seconds + hops * network.latency + received / network.bandwidth, received)


def direction_parallel(batch_size: float, directions: int, workers: int, worker: Worker, network: Network) -> Cost:
    """Each worker takes all rows and its share of the directions: at most K workers have any. Not implemented."""
    workers = min(workers, directions)
    seconds = worker.seconds(batch_size, math.ceil(directions / workers), directions)
    if workers == 1:
        return Cost(seconds, 0.0)
    received = SUM_BYTES * directions * (batch_size * (workers - 1) / workers + 1)
    hops = workers - 1 + math.ceil(math.log2(workers))
    return Cost(seconds + hops * network.latency + received / network.bandwidth, received)


def collective_seconds(workers: int, network: Network, tree: bool) -> float:
    """What a step's all-reduce and broadcast wait for: a ring and a tree, as gloo's are, or two trees and a third."""
    depth = math.ceil(math.log2(workers))
    return ((2 * depth if tree else 2 * (workers - 1)) + depth) * network.latency


def gradient_bytes(trained: int, workers: int) -> float:
    """What a worker receives in each step of first-order data-parallel training: an all-reduce of the gradient."""
    return 2 * (workers - 1) / workers * ENTRY_BYTES * trained


def predicted_seconds(rows: list[int], directions: int, worker: Worker, cores: int) -> float:
    """A data-parallel step of workers with `rows` each that share a machine's cores, one core a worker at a time."""
    each = [worker.seconds(count, directions, directions) for count in rows]
    return max(max(each), sum(each) / cores)
