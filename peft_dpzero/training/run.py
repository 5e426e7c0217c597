"""A private run on disk: its plan, the journal that it goes on with, its steps, and what it says of itself.

The Trainer and a loop of one's own hold one `Run` each:

    run = Run(config, rows, expected_batch_size=64, steps=500)
    with run.started(model, optimizer, collate, "out"):
        for number in range(run.plan.steps):
            optimizer.step(run.release(number).estimate)
    run.save(model, "out")
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.utils import is_compiled_module, send_to_device
from torch import nn

from peft_dpzero.checks.arguments import check_weights
from peft_dpzero.checks.data import check_collator, check_dataset
from peft_dpzero.checks.passes import fit_passes
from peft_dpzero.config import DPZeroConfig
from peft_dpzero.errors import DPZeroError
from peft_dpzero.estimation.batching import Collator, LogicalBatches, without_column
from peft_dpzero.estimation.losses import Losses
from peft_dpzero.estimation.sampling import PoissonSampler, new_secret
from peft_dpzero.estimation.shapes import Shapes
from peft_dpzero.estimation.tasks import Task, as_task
from peft_dpzero.estimation.units import units_by_column
from peft_dpzero.mechanism.accountant import Segment
from peft_dpzero.mechanism.plan import PrivacyPlan, make_plan
from peft_dpzero.mechanism.private_sum import Released
from peft_dpzero.perturbation.basis import Basis
from peft_dpzero.perturbation.perturbation import Perturbation
from peft_dpzero.processes import AcceleratedProcesses
from peft_dpzero.release.bundle import EVIDENCE
from peft_dpzero.release.header import in_version, plan_header, releases
from peft_dpzero.release.journal import JOURNAL_NAME, Journal, JournalSegment
from peft_dpzero.release.ledger import record_of
from peft_dpzero.release.optimizer import DPZeroOptimizer
from peft_dpzero.release.record import privacy_record
from peft_dpzero.release.staging import put_in_place, staging
from peft_dpzero.release.start import load_start, save_basis, save_start
from peft_dpzero.release.writing import save_beside
from peft_dpzero.step import PrivateStep, StepReport
from peft_dpzero.training.agreed_basis import agreed_basis


class Run:
    """One private run over one data set.

    Args:
        config: the mechanism and its budget.
        dataset: the private rows, map-style.
        expected_batch_size: B, the logical batch over all processes, in privacy units.
        steps: T; None for `epochs`.
        epochs: how often each unit is drawn, on average.
        logging_steps: steps between two released losses, or below 1 their share of all; used with
            `train_loss="private"`.
        accelerator: of all processes; by default a new one.

    Attributes:
        plan: q, σ, T and what they cost.
        units: whose each example is; None if each is its own.
        basis: that directions lie in; None if they point anywhere.
        journal: open within `opened`, on the process that writes it; None elsewhere.
        segments: the journal's, as they were when it was opened.
        step: makes the releases; None before `begin`.
        last: the latest release.
        losses: the released losses, by the number of steps done.
        listeners: called with each release before it moves the parameters.

    Raises:
        DPZeroError: data that cannot be sampled, or a plan that cannot be.
    """

    def __init__(
        self,
        config: DPZeroConfig,
        dataset: Any,
        *,
        expected_batch_size: int,
        steps: int | None = None,
        epochs: float = 1.0,
        logging_steps: float = 0,
        accelerator: Accelerator | None = None,
    ) -> None:
        check_dataset(dataset)
        self.config = config
        self.dataset = dataset
        self.expected_batch_size = expected_batch_size
        self.logging_steps = logging_steps
        unit = config.privacy_unit
        self.units = None if unit is None else units_by_column(dataset, unit, config.max_examples_per_unit)
        self.num_units = len(dataset) if self.units is None else len(self.units)
        self.accelerator = accelerator or Accelerator()
        self.processes = AcceleratedProcesses(self.accelerator)
        self.steps = self._steps(steps, epochs)
        self.plan = self._make_plan()
        self.basis: Basis | None = None
        self.journal: Journal | None = None
        self.segments: list[JournalSegment] = []
        self.step: PrivateStep | None = None
        self.last: Released | None = None
        self.losses: dict[int, float] = {}
        self.listeners: list[Callable[[Released], None]] = []

    # ---- A loop of one's own ----

    @contextmanager
    def started(
        self,
        model: nn.Module,
        optimizer: DPZeroOptimizer,
        collate: Collator,
        folder: str | Path,
        *,
        task: Task | None = None,
        most_rows: int = 64,
    ) -> Iterator[None]:
        """Within the block `release` makes the run's releases, with those of an interrupted run in `folder` first.

        Args:
            model: on its device. Its trainable parameters go to where the run started.
            optimizer: over them.
            collate: makes a row (1, …) of a list of one example.
            folder: for the journal, which is written before each release is used.
            task: how losses are read; by default that of the model's class.
            most_rows: rows that go through the model at once at most.

        Raises:
            DPZeroError: `folder` holds another run's journal or is in use; or the model cannot be trained privately.
        """
        if is_compiled_module(model):
            raise DPZeroError("A compiled model is trained by DPZeroTrainer: pass the model itself here.")
        check_collator(collate)
        check_weights(model)
        place = partial(send_to_device, device=self.accelerator.device)
        if (unit := self.config.privacy_unit) is not None:
            collate = without_column(collate, unit)
        with self.opened(folder, resume=True):
            self.take_basis()
            passes = fit_passes(
                self.perturbation(model),
                as_task(task, model),
                self.config,
                place,
                device=self.accelerator.device,
                expected_rows=self.expected_rows,
                most_rows=most_rows,
            )
            perturbation = self.perturbation(model, passes.streamed)
            self.enter(perturbation, optimizer)
            batches = self.batches(self.dataset, collate, passes.shapes)
            self.begin(model, batches, passes.losses, perturbation, optimizer)
            yield

    def save(self, model: Any, folder: str | Path, **card_data: Any) -> None:
        """Saves the model with its configuration, journal, record and card.

        Args:
            model: the trained one.
            folder: for the release.
            card_data: see `DPZeroTrainer.create_model_card`.
        """
        if self.processes.is_main_process:
            with staging(Path(folder)) as staged:
                model.save_pretrained(staged)
                self.save_claims(model, staged, **card_data)
                put_in_place(staged, Path(folder), self.evidence_in(Path(folder)))

    # ---- The run's course ----

    @property
    def expected_rows(self) -> float:
        """Rows that a process draws in a step, on average, or at most so many if units hold several."""
        units = self.expected_batch_size / self.processes.count
        return units * (1 if self.units is None else self.units.max_examples)

    def perturbation(self, model: nn.Module, streamed: frozenset[str] = frozenset()) -> Perturbation:
        """The run's directions over the trainable parameters of `model`."""
        config = self.config
        return Perturbation(model, config.direction_seed, config.direction_distribution, streamed, self.basis)

    def take_basis(self, find: Callable[[], Basis] | None = None) -> None:
        """Gives this run the basis that its journal names, or for a new run the one that `find` makes."""
        self.basis = agreed_basis(self.journal, self.processes, find)

    @contextmanager
    def opened(
        self, folder: str | Path, *, resume: bool, steps: int | None = None, epochs: float | None = None
    ) -> Iterator[None]:
        """Within the block this run holds the journal in `folder`, with the plan that goes on with it.

        Args:
            folder: made by `enter` if there is none.
            resume: whether to go on with the releases that are there.
            steps: T, if it is not the one that this object was made with.
            epochs: in its place.

        Raises:
            DPZeroError: `folder` holds another run's releases, or is in use.
        """
        try:
            self.segments = self.processes.on_main(lambda: self._read(Path(folder) / JOURNAL_NAME, resume))
            self.plan = self._plan_for(self.steps if steps is epochs is None else self._steps(steps, epochs or 1.0))
            self.step = None
            yield
        finally:
            if self.journal is not None:
                self.journal.close()

    def enter(self, perturbation: Perturbation, optimizer: DPZeroOptimizer, at_checkpoint: bool = False) -> None:
        """Writes the header of the releases to come, or checks the one that is there.

        Args:
            perturbation: over the model. Its parameters go to the run's start, unless the run is `at_checkpoint`.
            optimizer: what applies the releases.

        Raises:
            DPZeroError: the journal is of a run with other settings, or the start is not that run's.
        """
        optimizer.state.clear()
        self.segments = self.processes.on_main(lambda: self._enter(perturbation, optimizer, at_checkpoint))

    def batches(self, dataset: Any, collate: Collator, shapes: Shapes, secret: bytes | None = None) -> LogicalBatches:
        """This process's share of the run's private batches.

        Args:
            dataset: the run's, or a view of it with fewer columns.
            collate: makes a row (1, …) of a list of one example.
            shapes: how rows are padded, and which share a pass.
            secret: the sampling key; by default a new one of the operating system's.
        """
        sampler = PoissonSampler(self.plan.num_units, self.plan.sample_rate, secret or new_secret())
        rank, count = self.accelerator.process_index, self.processes.count
        return LogicalBatches(dataset, sampler, collate, shapes, rank, count, self.units)

    def begin(
        self,
        model: nn.Module,
        batches: LogicalBatches,
        losses: Losses,
        perturbation: Perturbation,
        optimizer: DPZeroOptimizer,
    ) -> None:
        """Connects what a step is made of. Arguments as for `PrivateStep`."""
        self.step = PrivateStep(
            model,
            self.plan,
            batches=batches,
            losses=losses,
            perturbation=perturbation,
            optimizer=optimizer,
            journal=self.journal,
            segments=self.segments,
            accelerator=self.accelerator,
        )
        made = {replayed.released.step + 1: replayed.released.loss for replayed in self.step.replayed}
        self.losses = {done: loss for done, loss in made.items() if loss is not None}

    def release(self, number: int) -> StepReport:
        """Makes the release of step `number`, or takes it from the journal. See `PrivateStep`."""
        assert self.step is not None, "begin() comes first"
        report = self.step(number)
        released = self.last = report.estimate.released
        for listener in self.listeners:
            listener(released)
        if released.loss is not None:
            self.losses[number + 1] = released.loss
        return report

    def record(self) -> dict[str, Any]:
        """The privacy record of the releases made so far."""
        if self.journal is not None and self.journal.segments:
            return record_of(self.journal.segments)
        made = sum(len(one.entries) for one in self.segments) if self.step is None else self.step.made
        return privacy_record(self.plan, made, self.losses, self.basis.digest() if self.basis else None)

    def evidence_in(self, folder: Path) -> tuple[str, ...]:
        """The names of what lies in `folder` because the run goes on there."""
        own = self.journal is not None and self.journal.path.parent.resolve() == folder.resolve()
        return EVIDENCE if own else ()

    def save_claims(self, model: Any, folder: Path, step: int | None = None, **card_data: Any) -> None:
        """Writes the configuration, the journal, the picture, the record and the card beside a saved model.

        Args:
            model: the one that was saved.
            folder: where it was saved.
            step: how many releases its weights are made of; None for all.
            card_data: see `save_card`.
        """
        perturbation = self.perturbation(model)
        save_beside(folder, self.config, self.record(), self.journal, perturbation, step, **card_data)

    def _steps(self, steps: int | None, epochs: float) -> int:
        return math.ceil(epochs * math.ceil(self.num_units / self.expected_batch_size)) if steps is None else steps

    def _make_plan(self, spent: tuple[Segment, ...] = ()) -> PrivacyPlan:
        every = self.logging_steps
        interval = math.ceil(self.steps * every) if every < 1 else int(every)
        return make_plan(self.config, self.num_units, self.expected_batch_size, self.steps, spent, interval)

    def _plan_for(self, steps: int) -> PrivacyPlan:
        """The plan of the last segment with releases if its steps are asked for, else of a new one after them."""
        changed, self.steps = steps != self.steps, steps
        segments = [segment for segment in self.segments if segment.entries]
        if not segments:
            return self._make_plan() if changed else self.plan
        earlier, planned = releases(segments[:-1]), segments[-1].header["steps"]
        capped = self.config.noise_multiplier is not None and self.config.target_epsilon is not None
        if capped or steps <= planned:
            plan = self._make_plan(earlier)
            if plan.steps <= planned:
                return plan
        return self._make_plan(releases(segments))

    def _read(self, path: Path, resume: bool) -> list[JournalSegment]:
        self.journal = Journal(path)
        if (made := len(self.journal.entries)) and not resume:
            raise DPZeroError(
                f"{path} holds {made} releases of an earlier run on this data: call "
                "train(resume_from_checkpoint=True) to go on, or use another output_dir."
            )
        return self.journal.segments

    def _enter(
        self, perturbation: Perturbation, optimizer: DPZeroOptimizer, at_checkpoint: bool
    ) -> list[JournalSegment]:
        assert self.journal is not None
        folder, model = self.journal.path.parent, perturbation.model
        folder.mkdir(parents=True, exist_ok=True)
        start = self.segments[0].header["start"] if self.journal.entries else None
        if start is None:
            save_start(model, perturbation, folder)
            save_basis(self.basis, folder)
        elif not at_checkpoint:
            load_start(perturbation, folder, start)
        header = plan_header(self.plan, perturbation, optimizer, model, start)
        if self.journal.entries:
            header = in_version(header, self.segments[0].header["format_version"])
        self.journal.begin(header)
        return self.journal.segments
