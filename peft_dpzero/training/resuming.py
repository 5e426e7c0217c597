"""How a run starts, goes on after a crash, or is continued: its journal, its checkpoint and its plan."""

from __future__ import annotations

import functools
import json
import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import broadcast_object_list
from transformers.trainer_utils import get_last_checkpoint

from peft_dpzero.checks.arguments import check_dataset
from peft_dpzero.config import DPZeroConfig
from peft_dpzero.errors import DPZeroError
from peft_dpzero.estimation.units import Units, units_by_column
from peft_dpzero.mechanism.accountant import Segment
from peft_dpzero.mechanism.plan import PrivacyPlan, make_plan
from peft_dpzero.perturbation.perturbation import Perturbation
from peft_dpzero.release.digests import files_digest
from peft_dpzero.release.header import in_version, plan_header, releases
from peft_dpzero.release.journal import JOURNAL_NAME, Journal, JournalSegment
from peft_dpzero.release.optimizer import DPZeroOptimizer
from peft_dpzero.release.record import RECORD_NAME
from peft_dpzero.release.start import load_start, save_start

if TYPE_CHECKING:
    from transformers import Trainer as _Host
else:
    _Host = object


class ResumingMixin(_Host):  # type: ignore[misc]
    """The plan of a private Trainer's run, and the journal that it goes on with."""

    dpzero_config: DPZeroConfig
    logical_batch_size: int
    _plan: PrivacyPlan | None
    _journal: Journal | None
    _segments: list[JournalSegment]
    _dpzero_optimizer: DPZeroOptimizer

    @property
    def privacy_plan(self) -> PrivacyPlan:
        """q, σ, T and what they cost; calibrated at first use, before any data is read."""
        if self._plan is None:
            self._plan = self._make_plan()
        return self._plan

    def _make_plan(self, spent: tuple[Segment, ...] = ()) -> PrivacyPlan:
        units, steps = self._num_units, self._requested_steps()
        return make_plan(
            self.dpzero_config, units, self.logical_batch_size, steps, spent, self._logging_interval(steps)
        )

    @functools.cached_property
    def _units(self) -> Units | None:
        """Whose each example is; None if each is its own."""
        config = self.dpzero_config
        check_dataset(self.train_dataset)
        if config.privacy_unit is None:
            return None
        return units_by_column(self.train_dataset, config.privacy_unit, config.max_examples_per_unit)

    @property
    def _num_units(self) -> int:
        return len(self.train_dataset) if self._units is None else len(self._units)

    @property
    def _steps_per_epoch(self) -> int:
        return math.ceil(self._num_units / self.logical_batch_size)

    def _requested_steps(self) -> int:
        if self.args.max_steps > 0:
            return int(self.args.max_steps)
        return math.ceil(float(self.args.num_train_epochs) * self._steps_per_epoch)

    def _logging_interval(self, steps: int) -> int:
        every = float(self.args.logging_steps)
        return math.ceil(steps * every) if every < 1 else int(every)

    def _plan_after(self, segments: list[JournalSegment]) -> PrivacyPlan:
        """The plan of the last of `segments` if its steps are asked for, else of a new one after them."""
        if not segments:
            return self.privacy_plan
        earlier, planned = releases(segments[:-1]), segments[-1].header["steps"]
        capped = self.dpzero_config.noise_multiplier is not None and self.dpzero_config.target_epsilon is not None
        if capped or self._requested_steps() <= planned:
            plan = self._make_plan(earlier)
            if plan.steps <= planned:
                return plan
        return self._make_plan(releases(segments))

    @contextmanager
    def _journalled(self, resume: str | bool | None) -> Iterator[None]:
        """Holds the run's journal, with the plan that goes on with it.

        Raises:
            DPZeroError: the output folder holds another run's releases, or is in use.
        """
        try:
            self._segments = self._on_main_process(lambda: self._read_journal(resume))
            self._plan = self._plan_after([segment for segment in self._segments if segment.entries])
            if self._plan.steps < self._requested_steps():
                warnings.warn(
                    f"Training stops after {self._plan.steps} steps: the next would pass target_epsilon.", stacklevel=4
                )
                self.args.max_steps = self._plan.steps
            yield
        finally:
            if self._journal is not None:
                self._journal.close()

    def _read_journal(self, resume: str | bool | None) -> list[JournalSegment]:
        self._journal = Journal(Path(self.args.output_dir) / JOURNAL_NAME)
        if (made := len(self._journal.entries)) and not resume:
            raise DPZeroError(
                f"{self._journal.path} holds {made} releases of an earlier run on this data: call "
                "train(resume_from_checkpoint=True) to go on, or use another output_dir."
            )
        return self._journal.segments

    def _enter_segment(self, perturbation: Perturbation, resume: str | bool | None) -> str | None:
        """Writes the segment's header, or checks the one that is there. Returns the checkpoint to start from."""

        def enter() -> tuple[str | None, list[JournalSegment]]:
            assert self._journal is not None
            checkpoint = self._checkpoint(resume)
            self._begin(perturbation, started=checkpoint is not None)
            return checkpoint, self._journal.segments

        checkpoint: str | None
        checkpoint, self._segments = self._on_main_process(enter)
        return checkpoint

    def _checkpoint(self, resume: str | bool | None) -> str | None:
        assert self._journal is not None
        if not resume:
            return None
        folder = Path(self.args.output_dir)
        # Without a journal, what the checkpoints cost is unknown.
        steps = len(self._journal.entries)
        newest = Path(get_last_checkpoint(folder) or "") if resume is True and folder.is_dir() else Path(str(resume))
        if (step := checkpoint_step(newest)) > steps:
            raise DPZeroError(
                f"The checkpoint is at step {step} but the journal holds {steps} releases, so the ε spent is unknown: "
                f"put {JOURNAL_NAME} of that run into output_dir."
            )
        if resume is True:
            return last_whole_checkpoint(folder)
        if not is_whole(newest):
            raise DPZeroError(
                f"{newest} is incomplete or damaged: pass resume_from_checkpoint=True for one that is not."
            )
        return str(newest)

    def _begin(self, perturbation: Perturbation, started: bool) -> None:
        assert self._journal is not None
        folder = Path(self.args.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        start = self._segments[0].header["start"] if self._journal.entries else None
        if start is None:
            save_start(self.model, perturbation, folder)
        elif not started:
            load_start(perturbation, folder, start)
        self.create_optimizer()
        self._dpzero_optimizer.state.clear()
        header = plan_header(self.privacy_plan, perturbation, self._dpzero_optimizer, self.model, start)
        if self._journal.entries:
            header = in_version(header, self._segments[0].header["format_version"])
        self._journal.begin(header)

    def _on_main_process(self, work: Any) -> Any:
        """What `work` returns or raises on the first process, on all of them."""
        shared: list[Any] = [None, None]
        if self.is_world_process_zero():
            try:
                shared[0] = work()
            except DPZeroError as error:
                if self.args.world_size == 1:
                    raise
                shared[1] = error
        if self.args.world_size > 1:
            broadcast_object_list(shared)
        if shared[1] is not None:
            raise DPZeroError(str(shared[1]))
        return shared[0]


def last_whole_checkpoint(folder: Path) -> str | None:
    """The newest checkpoint in `folder` that was written to its end; None if there is none."""
    steps = {checkpoint_step(path): path for path in folder.glob("checkpoint-*") if path.is_dir()}
    return next((str(steps[step]) for step in sorted(steps, reverse=True) if is_whole(steps[step])), None)


def is_whole(checkpoint: Path) -> bool:
    """Whether all of a checkpoint is there: its weights as its record has them, its optimizer, its state."""
    try:
        record = json.loads((checkpoint / RECORD_NAME).read_text(encoding="utf-8"))
        state = json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
        for name in ("optimizer.pt", "scheduler.pt"):
            torch.load(checkpoint / name, map_location="cpu", weights_only=True)
        weights = record["weights"]
        return bool(weights["step"] == state["global_step"] and weights["file_sha256"] == files_digest(checkpoint))
    except Exception:
        # However torn a file is, the answer is that it is not whole.
        return False


def checkpoint_step(checkpoint: Path) -> int:
    """The number of steps done at a folder named checkpoint-N; 0 for another name."""
    digits = checkpoint.name.rpartition("-")[2]
    return int(digits) if digits.isdigit() else 0
