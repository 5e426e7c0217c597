"""A private run on disk: its plan, the journal that it goes on with, its steps, and what it says of itself.

The Trainer holds a `RunOnDisk`, and a loop of one's own a `Run`, which adds what the Trainer does for itself.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from torch import nn

from peft_dpzero.checks.data import check_dataset
from peft_dpzero.config import DEFAULT_DISTRIBUTION, DISTRIBUTION_IN_BASIS, DPZeroConfig
from peft_dpzero.errors import DPZeroError
from peft_dpzero.estimation.batching import Collator, LogicalBatches
from peft_dpzero.estimation.losses import Losses
from peft_dpzero.estimation.sampling import PoissonSampler, new_secret, seeded_secret
from peft_dpzero.estimation.shapes import Shapes
from peft_dpzero.estimation.units import units_by_column
from peft_dpzero.mechanism.plan import PrivacyPlan
from peft_dpzero.mechanism.private_sum import Released
from peft_dpzero.modules import is_sharded, lora_factors
from peft_dpzero.perturbation.basis import Basis
from peft_dpzero.perturbation.perturbation import Perturbation
from peft_dpzero.processes import AcceleratedProcesses
from peft_dpzero.public.settings import Settings
from peft_dpzero.release.bundle import EVIDENCE
from peft_dpzero.release.frozen import frozen_header
from peft_dpzero.release.journal import Journal, JournalSegment
from peft_dpzero.release.ledger import record_of
from peft_dpzero.release.optimizer import DPZeroOptimizer
from peft_dpzero.release.record import privacy_record
from peft_dpzero.release.writing import save_beside
from peft_dpzero.step import PrivateStep, StepReport
from peft_dpzero.training.agreed_basis import agreed_basis
from peft_dpzero.training.entering import enter_journal, open_journal
from peft_dpzero.training.planning import plan_for, steps_of
from peft_dpzero.training.settling import Sizes, settings_of
from peft_dpzero.training.sharding import reshard


class RunOnDisk:
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
        units: whose each example is; None if each is its own.
        basis: that directions lie in; None if they point anywhere.
        chosen: the settings that were chosen and not given, once they are known.
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
        self._asked = config
        self.config = config.settled() if config.is_settled and config.minutes is None else config
        self.dataset = dataset
        self.expected_batch_size = expected_batch_size
        self.logging_steps = logging_steps
        unit = config.privacy_unit
        self.units = None if unit is None else units_by_column(dataset, unit, config.max_examples_per_unit)
        self.num_units = len(dataset) if self.units is None else len(self.units)
        self.accelerator = accelerator or Accelerator()
        self.processes = AcceleratedProcesses(self.accelerator)
        self.steps = steps_of(epochs, self.num_units, expected_batch_size) if steps is None else steps
        self.segments: list[JournalSegment] = []
        self._plan = self._plan_for() if config.minutes is None else None
        self.basis: Basis | None = None
        self.chosen: Settings | None = None
        self.journal: Journal | None = None
        self.step: PrivateStep | None = None
        self.last: Released | None = None
        self.losses: dict[int, float] = {}
        self.listeners: list[Callable[[Released], None]] = []

    @property
    def plan(self) -> PrivacyPlan:
        """q, σ, T and what they cost.

        Raises:
            DPZeroError: the config says `minutes`, and training has not begun: sizes are not chosen yet.
        """
        if self._plan is None:
            raise DPZeroError("With minutes=…, the plan is known when training has measured how long passes take.")
        return self._plan

    @property
    def rows_a_unit(self) -> int:
        """How many rows a unit may have in a step."""
        return 1 if self.units is None else self.units.max_examples

    @property
    def expected_rows(self) -> float:
        """Rows that a process draws in a step, on average, or at most so many if units hold several."""
        units = self.expected_batch_size / self.processes.count
        return units * self.rows_a_unit

    def keep_still(self, model: nn.Module) -> None:
        """Takes from what is trained LoRA's A where B is 0, or where a run goes on what it did not train.

        No loss feels A then. Noise would move it all the same, and with it what a move of B does.
        (FFA-LoRA: arXiv 2403.12313.)
        """
        factors = list(lora_factors(model))
        if self._goes_on:
            trained = {name for name, _, _ in self.segments[0].header["trainable"]}
            for name, own, _ in factors:
                own.requires_grad_(name in trained)
            return
        for _, own, other in factors:
            if own.requires_grad and other.requires_grad and bool(own.any()) and not bool(other.any()):
                own.requires_grad_(False)

    def perturbation(self, model: nn.Module, streamed: frozenset[str] = frozenset()) -> Perturbation:
        """The run's directions over the trainable parameters of `model`."""
        config = self.config
        distribution = config.direction_distribution or DEFAULT_DISTRIBUTION
        return Perturbation(model, config.direction_seed, distribution, streamed, self.basis)

    def take_settings(self, find: Callable[[], Settings | None], in_step: bool = False) -> None:
        """Gives a new run the settings that `find` makes on the first process, where the config leaves them open.

        Args:
            find: measures, without a private row.
            in_step: whether it runs on all processes, since its passes take all of them.

        Raises:
            DPZeroError: a run that goes on was made with settings that were given, and now they are not.
        """
        if self._goes_on:
            if not self.config.is_settled:
                raise DPZeroError(
                    "The run that goes on was made with clipping_threshold and smoothing_parameter given: give the "
                    "values in its dpzero_config.json."
                )
        elif not self.config.is_settled or self.config.minutes is not None:
            if in_step:
                found = find()
                self._settle(self.processes.on_main(lambda: found))
            else:
                self._settle(self.processes.on_main(find))
            self._plan = self._plan_for()

    def take_basis(self, find: Callable[[], Basis] | None = None) -> None:
        """Gives this run the basis that its journal names, or for a new run the one that `find` makes."""
        self.lie_in(agreed_basis(self.journal, self.processes, find))

    def lie_in(self, basis: Basis | None) -> None:
        """From now on directions are of `basis`: at right angles, unless the user or the journal has others."""
        self.basis = basis
        if basis is not None and self._asked.direction_distribution is None:
            made = self.segments[0].header["config"] if self._goes_on else {}
            distribution = made.get("direction_distribution", DISTRIBUTION_IN_BASIS)
            self.config = self.config.replace(direction_distribution=distribution)
            if self._plan is not None:
                self._plan = self._plan_for()

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
            self.segments = self.processes.on_main(lambda: self._opened_journal(Path(folder), resume).segments)
            if self._goes_on:
                self._settle(settings_of(self.segments))
            if steps is not None or epochs is not None:
                self.steps = steps or steps_of(epochs or 1.0, self.num_units, self.expected_batch_size)
            if self.chosen is not None or self.config.minutes is None:
                self._plan = self._plan_for()
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
        frozen = None
        if is_sharded(model := perturbation.model):
            reshard(model)
            frozen = frozen_header(model, perturbation.parameters)

        def entered() -> list[JournalSegment]:
            assert self.journal is not None
            enter_journal(self.journal, self.plan, perturbation, optimizer, self._chosen, at_checkpoint, frozen)
            return self.journal.segments

        self.segments = self.processes.on_main(entered)

    def batches(self, dataset: Any, collate: Collator, shapes: Shapes, seed: int = 0) -> LogicalBatches:
        """This process's share of the run's private batches.

        Args:
            dataset: the run's, or a view of it with fewer columns.
            collate: makes a row (1, …) of a list of one example.
            shapes: how rows are padded, and which share a pass.
            seed: of the sampling, where the run is to be deterministic; else the operating system has one.
        """
        secret = seeded_secret(seed) if self.config.deterministic else new_secret()
        sampler = PoissonSampler(self.plan.num_units, self.plan.sample_rate, secret)
        rank, count = self.accelerator.process_index, self.processes.count
        return LogicalBatches(dataset, sampler, collate, shapes, rank, count, self.units)

    def begin(
        self,
        model: nn.Module,
        batches: LogicalBatches,
        losses: Losses,
        perturbation: Perturbation,
        optimizer: DPZeroOptimizer,
        idle: Callable[[], object] | None = None,
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
            idle=idle,
        )
        made = {replayed.released.step + 1: replayed.released.loss for replayed in self.step.replayed}
        self.losses = {done: loss for done, loss in made.items() if loss is not None}

    def release(self, number: int) -> StepReport:
        """Makes the release of step `number`, or takes it from the journal. See `PrivateStep`."""
        if self.step is None:
            raise RuntimeError("The run has not started: call release(number) within `with run.started(…):`.")
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
        return privacy_record(self.plan, made, self.losses, self.basis.digest() if self.basis else None, self._chosen)

    @property
    def _chosen(self) -> dict[str, Any] | None:
        return None if self.chosen is None else self.chosen.to_dict()

    def sizes(self, most_rows: int | None, max_tokens: int | None = None, **of_time: Any) -> Sizes:
        """What the settings must suit; `of_time` as in `Sizes`, where the config says `minutes`."""
        timed = {"batch": self.expected_batch_size} | of_time
        return Sizes(self.num_units, self.rows_a_unit, self.processes.count, most_rows, max_tokens, **timed)

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

    @property
    def _goes_on(self) -> bool:
        return any(segment.entries for segment in self.segments)

    def _settle(self, chosen: Settings | None) -> None:
        self.chosen = chosen
        if chosen is not None:
            self.config = chosen.settled(self.config)
            self.expected_batch_size = chosen.expected_batch_size or self.expected_batch_size
            self.steps = chosen.steps or self.steps
            if chosen.basis_size is not None and self.basis is not None:
                self.basis = self.basis.first(chosen.basis_size)

    def _plan_for(self) -> PrivacyPlan:
        sizes = (self.num_units, self.expected_batch_size, self.steps)
        return plan_for(self.config, *sizes, self.logging_steps, self.segments)

    def _opened_journal(self, folder: Path, resume: bool) -> Journal:
        self.journal = open_journal(folder, resume)
        return self.journal
