"""One step of DPZero, top to bottom.

θ: the trainable parameters. λ smoothing_parameter, K num_directions, C clipping_threshold, σ noise_multiplier,
q = B / N sample_rate, γ = C / 2²⁰.

    1  sample    each unit joins the batch with probability q                        secret
    2  direct    z_1 … z_K from (seed, step, k)                                      public
    3  evaluate  ℓ_i(θ + λz_k), ℓ_i(θ − λz_k) in float32, without autograd           secret
    4  subtract  d_ik = (ℓ_i(θ + λz_k) − ℓ_i(θ − λz_k)) / 2λ                         secret
    5  clip      v_i = d_i · min(1, C / ‖d_i‖), rounded toward zero onto γℤ           secret
    6  release   s = Σ_i v_i / γ + discrete Gaussian of scale σC/γ; ĝ = γs / (B·K)    public from here
    7  update    θ by AdamW or SGD on Σ_k ĝ_k z_k                                     public

Steps 1 to 6 are `PrivateStep`; step 7 is `DPZeroOptimizer.step`, under any schedule.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

from accelerate import Accelerator
from torch import nn

from peft_dpzero.checks.agreement import check_agreement
from peft_dpzero.errors import DPZeroError, PrivateStepError, quiet
from peft_dpzero.estimation.batching import LogicalBatch, LogicalBatches
from peft_dpzero.estimation.differences import estimate_differences, points_of
from peft_dpzero.estimation.losses import Losses
from peft_dpzero.mechanism.plan import PrivacyPlan
from peft_dpzero.mechanism.private_sum import PrivateDifferences, PrivateSum
from peft_dpzero.perturbation.perturbation import Perturbation
from peft_dpzero.processes import AcceleratedProcesses, check_processes, share_parameters
from peft_dpzero.release.journal import Journal, JournalSegment
from peft_dpzero.release.optimizer import DPZeroOptimizer, Estimate
from peft_dpzero.release.replay import replayed_releases

# Rows of which what is kept is computed together, if a step has fewer.
ROWS_AHEAD = 512


@dataclass
class StepReport:
    """What leaves a step: the estimate, which is released, and the raw mean loss if the user asked for it."""

    estimate: Estimate
    nonprivate_loss: float | None = None


class PrivateStep:
    """Lines 1 to 6 of the step, journalled.

    With an accelerator, all processes take the first one's trainable parameters and sampling key when it is built.

    Args:
        model: the model; `eval()` is called on it at each step.
        plan: the run's plan, from `make_plan`.
        batches: the run's private batches.
        losses: per-example losses of `model`.
        perturbation: over `model`'s trainable parameters.
        optimizer: what will apply the releases: its learning rates are journalled with them.
        journal: where each release is written before it is used; None on processes that write nothing.
        segments: the journal's, with the releases made before a crash: they are applied again, not made again.
        accelerator: for several processes.
        idle: a pass over a made-up row, where every pass takes all processes: those that draw fewer rows than others
            fill up with it. None lets each run as many passes as it has.
        rows_ahead: steps are drawn ahead while they have so many rows together, if something is kept of rows.

    Attributes:
        made: how many steps of the run are released.
        replayed: the releases of `segments`.

    Raises:
        DPZeroError: the processes that were launched are not all connected or do not hold the same run, or `batches`
            is sharded otherwise.
    """

    def __init__(
        self,
        model: nn.Module,
        plan: PrivacyPlan,
        *,
        batches: LogicalBatches,
        losses: Losses,
        perturbation: Perturbation,
        optimizer: DPZeroOptimizer,
        journal: Journal | None = None,
        segments: Sequence[JournalSegment] = (),
        accelerator: Accelerator | None = None,
        idle: Callable[[], object] | None = None,
        rows_ahead: int = ROWS_AHEAD,
    ) -> None:
        self.model = model
        self.config = plan.config.settled()
        self.plan = plan
        self.batches = batches
        self.losses = losses
        self.perturbation = perturbation
        self.optimizer = optimizer
        self._update = optimizer.settings(perturbation)
        if not any(group["params"] for group in self._update):
            raise DPZeroError("The optimizer holds none of the parameters that are trained: make it over them.")
        self.journal = journal
        self.processes = AcceleratedProcesses(accelerator) if accelerator is not None else None
        self._idle = idle
        self.mechanism = PrivateSum(self.config, plan.expected_batch_size, self.processes, plan.loss_interval)
        self.replayed = replayed_releases(segments, self.mechanism)
        self.made = max(len(self.replayed), plan.first_step)
        self._rows_ahead = rows_ahead if losses.shortcuts.kept is not None else 1
        self._ahead: dict[int, LogicalBatch] = {}
        check_processes(self.processes.count if self.processes else 1, batches.world_size)
        if self.processes and self.processes.count > 1:
            check_agreement(plan, batches, perturbation, len(self.replayed), self.processes.gather)
        if self.processes:
            share_parameters(perturbation, self.processes)
            batches.share_key(self.processes.broadcast)

    def __call__(self, step: int) -> StepReport:
        """Makes step `step`'s release, or takes it from the journal if it was made before a crash.

        Raises:
            PrivateStepError: something failed while private data was in hand.
            DPZeroError: the optimizer's settings are not what they were.
            RuntimeError: `step` lies beyond the plan's T, or it or a later one was released by this object.
        """
        if step >= self.plan.steps:
            raise RuntimeError(f"Step {step} would pass the planned {self.plan.steps} steps and their ε.")
        if step < len(self.replayed):
            replayed = self.replayed[step]
            return StepReport(Estimate(replayed.released, self.perturbation, replayed.learning_rates))
        if step < self.made:
            raise RuntimeError(f"Step {step} or a later one was released before: each releases once, in order.")
        if self.optimizer.settings(self.perturbation) != self._update:
            raise DPZeroError(
                "Something changed the optimizer's settings during the run (OneCycleLR and CyclicLR do, unless "
                "cycle_momentum=False): the journal holds learning rates alone, and weights could not be made again."
            )
        return self._release(step)

    def _release(self, step: int) -> StepReport:
        self.model.eval()
        failure: PrivateStepError | None = None
        try:
            with quiet:
                differences = self._differences(step)
        except DPZeroError:
            raise
        except Exception as error:
            failure = PrivateStepError.withhold(f"in step {step}", error)
        if failure is not None:
            # Raised out here, it does not carry the withheld error as its __context__, nor rows in its frames.
            raise failure
        # Counted first: however the release ends, it is not made again.
        self.made = step + 1
        rates, journal = self.optimizer.learning_rates, self.journal
        record = None if journal is None else partial(journal.record, step, rates, self.config.direction_seed)
        released = self.mechanism.release(step, differences, record)
        return StepReport(Estimate(released, self.perturbation, rates), self.mechanism.raw_loss(differences))

    def _differences(self, step: int) -> PrivateDifferences:
        batch = self._drawn(step)
        lacking = self._lacking(len(batch.micro_batches))
        differences = estimate_differences(
            self.losses,
            batch,
            self.perturbation,
            step=step,
            num_directions=self.config.num_directions,
            smoothing_parameter=self.config.smoothing_parameter,
            difference=self.config.difference,
        )
        for _ in range(lacking):
            assert self._idle is not None
            self._idle()
        return differences

    def _drawn(self, step: int) -> LogicalBatch:
        """The batch of `step`. What is kept of rows is computed for some steps ahead, so that passes are fuller."""
        if step not in self._ahead:
            count = max(1, int(self._rows_ahead / max(1.0, self.batches.shapes.expected_rows)))
            self._ahead = {one: self.batches.draw(one) for one in range(step, min(step + count, self.plan.steps))}
            self.losses.prepare([rows for batch in self._ahead.values() for rows in batch.micro_batches])
        return self._ahead.pop(step)

    def _lacking(self, micro_batches: int) -> int:
        """How many passes this process runs less than another, if all must run as many."""
        if self._idle is None or self.processes is None:
            return 0
        points = points_of(self.config.num_directions, self.config.smoothing_parameter, self.config.difference)
        most: int = max(self.processes.gather(micro_batches))
        return len(points) * (most - micro_batches)
