"""Our step, made of a run's parts, of which benchmarks leave out some."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import torch
from accelerate import Accelerator
from accelerate.utils import send_to_device
from peft_dpzero import DPZeroConfig, DPZeroSGD, make_plan
from peft_dpzero.checks.probe import Probe
from peft_dpzero.checks.shortcuts import find_streamed
from peft_dpzero.estimation.batching import LogicalBatches
from peft_dpzero.estimation.losses import PLAIN
from peft_dpzero.estimation.sampling import PoissonSampler
from peft_dpzero.estimation.shapes import Shapes
from peft_dpzero.perturbation.perturbation import Perturbation
from peft_dpzero.step import PrivateStep

from workloads import Row, Workload

STEPS = 100_000


class Batches:
    """Which rows a step reads: a Poisson sample under a key that is known, so that all contenders get the same ones."""

    def __init__(self, workload: Workload, key: bytes = b"benchmark") -> None:
        self.workload = workload
        self.rows = workload.rows
        self.sampler = PoissonSampler(len(workload.rows), workload.batch_size / len(workload.rows), key)

    def __call__(self, step: int) -> list[Row]:
        return [self.rows[i] for i in self.sampler.draw(step)]

    def logical(self, shapes: Shapes, rank: int = 0, workers: int = 1) -> LogicalBatches:
        """The same rows in micro-batches: those of worker `rank`."""
        return LogicalBatches(self.rows, self.sampler, self.workload.collate, shapes, rank, workers)


class Ours:
    """`PrivateStep` and the optimizer's update: sampling, directions, passes, clipping, noise and all.

    Args:
        workload: what is trained.
        num_directions: K.
        without: a field of `Shortcuts` that is switched off.
        streams: whether large θ is perturbed module by module, as in a run, or as a whole.
        like: another step over the workload, whose passes are taken untried, and whose optimizer.
        accelerator: of the processes among which rows are split.

    Attributes:
        reason: why rows go one at a time, or None.
    """

    def __init__(
        self,
        workload: Workload,
        num_directions: int,
        without: str | None = None,
        streams: bool = True,
        like: Ours | None = None,
        accelerator: Accelerator | None = None,
    ) -> None:
        config = DPZeroConfig(
            num_directions=num_directions,
            noise_multiplier=1.0,
            target_delta=1e-5,
            clipping_threshold=200.0,
            smoothing_parameter=1e-3,
        )
        rank, workers = (accelerator.process_index, accelerator.num_processes) if accelerator else (0, 1)
        plan = make_plan(config, len(workload.rows), workload.batch_size, STEPS)
        perturbation = Perturbation(workload.model, config.direction_seed, config.direction_distribution)
        self.optimizer = like.optimizer if like else DPZeroSGD(perturbation.parameters.values(), lr=1e-6)
        device = next(workload.model.parameters()).device
        workload.model.eval()
        probe = Probe(workload.model, device, task=workload.task)
        self.reason: str | None = like.reason if like else None
        if like is None:
            longest = max(len(row["input_ids"]) for row in workload.rows)
            sizes = Shapes(workload.batch_size / workers, workload.micro_batch_size, max_length=longest)
            shapes = probe.fit_shapes(perturbation, sizes)
            losses = probe.losses(perturbation, partial(send_to_device, device=device))
            self.reason = probe.reason
        else:
            losses, shapes = like.losses, like.shapes
        self.shortcuts = losses.shortcuts
        if without is not None:
            off = replace(self.shortcuts, **{without: getattr(PLAIN, without)})
            losses = losses.with_shortcuts(off)
        if streams and (streamed := find_streamed(perturbation, probe.run)):
            perturbation = Perturbation(
                workload.model, config.direction_seed, config.direction_distribution, streamed=streamed
            )
        self.losses = losses
        self.shapes = shapes if like else probe.tried_shapes(perturbation, losses, shapes, config.settled())
        batches = Batches(workload).logical(self.shapes, rank, workers)
        self._new_step = partial(
            PrivateStep,
            workload.model,
            plan,
            batches=batches,
            losses=losses,
            perturbation=perturbation,
            optimizer=self.optimizer,
            accelerator=accelerator,
            rows_ahead=1,  # one step is measured at a time
        )
        self.step = self._new_step()

    def prepare(self, number: int, rows: list[Row]) -> None:
        """A run of its own: within one, a step releases once, and it is measured many times."""
        self.step = self._new_step()

    def __call__(self, number: int, rows: list[Row]) -> None:
        self.optimizer.step(self.step(number).estimate)


def no_grad_evaluation(workload: Workload, rows: list[Row]) -> None:
    """What the Trainer's evaluation would run: padded micro-batches of rows sorted by length, losses and all."""
    ordered = sorted(rows, key=lambda row: len(row["input_ids"]))
    device = next(workload.model.parameters()).device
    with torch.no_grad():
        for start in range(0, len(ordered), workload.micro_batch_size):
            batch = send_to_device(workload.collate(ordered[start : start + workload.micro_batch_size]), device)
            workload.task.losses(workload.model(**workload.task.inputs(batch)), batch)
