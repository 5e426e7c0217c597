"""The one-run audit: canaries in the data by coins, one private training run, and guesses from what it released.

Steinke, Nasr and Jagielski, "Privacy Auditing with One (1) Training Run" (NeurIPS 2023, arXiv 2305.08846), white-box:
the attacker follows θ_t, which is public, and knows every canary, so it knows the row v_jt that canary j would have
added to step t. It reads the coins off s_t = Σ_j b_jt v_jt + (others) + noise, of which only s_t comes from the run.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from transformers.trainer_utils import IntervalStrategy, SaveStrategy

from peft_dpzero.auditing.bounds import epsilon_lower_bound
from peft_dpzero.auditing.canaries import CanaryData, Row, random_canaries
from peft_dpzero.errors import DPZeroError
from peft_dpzero.estimation.batching import LogicalBatches
from peft_dpzero.estimation.differences import estimate_differences
from peft_dpzero.estimation.losses import Losses
from peft_dpzero.estimation.sampling import PoissonSampler, new_secret
from peft_dpzero.mechanism.private_sum import Released, clipped_rows_of_own
from peft_dpzero.training.trainer import DPZeroTrainerMixin

AddCanaries = Callable[[Any], CanaryData]


@dataclass(frozen=True)
class AuditResult:
    """What one audited run showed.

    Attributes:
        epsilon_lower_bound: no (ε, δ) guarantee with a smaller ε holds, at `confidence`.
        claimed_epsilon: what the accountant proves for the run; None if it claims nothing.
        delta: δ of both.
        canaries: coins tossed. guesses: coins guessed. correct: coins guessed right.
        confidence: probability that the lower bound holds.
        steps: releases of the run.
    """

    epsilon_lower_bound: float
    claimed_epsilon: float | None
    delta: float
    canaries: int
    guesses: int
    correct: int
    confidence: float
    steps: int

    @property
    def refutes_claim(self) -> bool:
        """Whether the lower bound lies above the claim, which then is wrong at `confidence`."""
        return self.claimed_epsilon is not None and self.epsilon_lower_bound > self.claimed_epsilon

    def to_dict(self) -> dict[str, Any]:
        """The fields and `refutes_claim`, JSON-ready."""
        return {**asdict(self), "refutes_claim": self.refutes_claim}


def audit(
    build_trainer: Callable[[AddCanaries], DPZeroTrainerMixin],
    canaries: int | Sequence[Row] = 200,
    *,
    guesses: int | None = None,
    confidence: float = 0.95,
) -> AuditResult:
    """Trains once with canaries in the data and bounds ε from below.

    The run is a real one: it spends its ε on the user's data, beside that of any other run. It trains in a temporary
    folder, saves nothing, evaluates nothing and pushes nothing; what comes back is made of canaries and releases.

    Args:
        build_trainer: takes a function that adds the canaries to a data set, and returns a trainer whose
            `train_dataset` is what that function returned. The model is trained in place.
        canaries: rows as `train_dataset` holds them, or how many to make of random tokens and labels.
        guesses: how many coins to guess, half of them "present" and half "absent"; half of the canaries if None. Fix
            it before you look at a result.
        confidence: of the lower bound.

    Raises:
        DPZeroError: fewer than 4 canaries, odd or too many guesses, several processes, a trainer that pushes or whose
            data lacks the canaries.
    """
    count = canaries if isinstance(canaries, int) else len(canaries)
    guesses = count // 4 * 2 if guesses is None else guesses
    if count < 4 or guesses % 2 or not 2 <= guesses <= count:
        raise DPZeroError(f"At least 4 canaries and an even number of guesses among them, got {count} and {guesses}.")
    generator = np.random.default_rng()
    present = generator.random(count) < 0.5
    added: list[CanaryData] = []

    def add_canaries(data: Any) -> CanaryData:
        added.append(CanaryData(data, present))
        return added[-1]

    trainer = build_trainer(add_canaries)
    if len(added) != 1 or trainer.train_dataset is not added[0]:
        raise DPZeroError("build_trainer must call its argument once, on the train_dataset that the trainer gets.")
    data = added[0]
    if isinstance(canaries, int):
        size = trainer.model.get_input_embeddings().num_embeddings
        data.canaries = random_canaries(data.data, count, size, generator)
    else:
        data.canaries = list(canaries)
    if (unit := trainer.dpzero_config.privacy_unit) is not None:
        owners = data.unit_values(unit)[len(data.data) :]
        data.canaries = [{**row, unit: owner} for row, owner in zip(data.canaries, owners, strict=True)]
    watch = _Watch(trainer, data.canaries)
    _train_quietly(trainer, watch)
    order = np.argsort(watch.scores())
    half = guesses // 2
    correct = int((~present[order[:half]]).sum() + present[order[-half:]].sum())
    record = trainer.privacy_record()
    bound = epsilon_lower_bound(correct, guesses, record["delta"], confidence, count)
    return AuditResult(
        bound, record["epsilon"], record["delta"], count, guesses, correct, confidence, int(record["steps"])
    )


def _train_quietly(trainer: DPZeroTrainerMixin, watch: _Watch) -> None:
    if trainer.args.world_size > 1:
        raise DPZeroError("An audit runs in one process: launch it without accelerate.")
    if trainer.args.push_to_hub:
        raise DPZeroError("An audited run must not be released: build the trainer with push_to_hub=False.")
    trainer.release_listeners.append(watch.observe)
    with TemporaryDirectory() as folder:
        trainer.args.output_dir = folder
        trainer.args.save_strategy = SaveStrategy.NO
        trainer.args.eval_strategy = IntervalStrategy.NO
        trainer.args.load_best_model_at_end = False
        trainer.train()


class _Watch:
    """Sees each release as it becomes public, and the rows that the canaries would add at that θ."""

    def __init__(self, trainer: DPZeroTrainerMixin, canaries: Sequence[Row]) -> None:
        self.trainer = trainer
        self.canaries = canaries
        self.gram = np.zeros((len(canaries), len(canaries)))
        self.match = np.zeros(len(canaries))

    def observe(self, released: Released) -> None:
        """Listens to a release, at the θ that it was made at."""
        plan = self.trainer.privacy_plan
        threshold = released.clipping_threshold
        bound = 1.0 if threshold == float("inf") else threshold
        sums = np.array(released.coefficients) * plan.expected_batch_size * len(released.coefficients) / bound
        rows = self._rows(released.step, threshold) / bound
        self.gram += rows @ rows.T
        self.match += rows @ (sums - plan.sample_rate / 2 * rows.sum(axis=0))

    def _rows(self, step: int, threshold: float) -> np.ndarray:
        """The canaries' clipped differences: (m, K) float64."""
        trainer, config = self.trainer, self.trainer.privacy_plan.config.settled()
        everybody = PoissonSampler(len(self.canaries), 1.0, new_secret())
        private = trainer.run.step
        assert private is not None
        batches = LogicalBatches(list(self.canaries), everybody, trainer.private_collator(), private.batches.shapes)  # type: ignore[arg-type]
        differences = estimate_differences(
            Losses(trainer.model, trainer.task, trainer._prepare_inputs),
            batches.draw(step),
            private.perturbation,
            step=step,
            num_directions=config.num_directions,
            smoothing_parameter=config.smoothing_parameter,
            difference=config.difference,
        )
        return np.asarray(clipped_rows_of_own(differences, config, threshold).numpy())

    def scores(self) -> np.ndarray:
        """How much of each canary's rows is in the releases: (m,) float64, the linear least-squares estimate.

        With w_j = q · coin_j of mean q/2 and variance q²/4, and s_t = Σ_j w_j v_jt + rest, the rest's variance being
        the noise's and the sampling's, the estimate is (V Vᵀ + λ)⁻¹ V (s − E s), λ = 4 · variance / q². Canaries with
        similar rows are so told apart, where ⟨s_t, v_jt⟩ alone would mix them up.
        """
        plan = self.trainer.privacy_plan
        q, count = plan.sample_rate, len(self.canaries)
        sampling = q * (1 - q) * count / 2 / plan.config.settled().num_directions
        floor = 1e-9 * float(np.trace(self.gram)) / count + 1e-300
        ridge = max(4 * (plan.noise_multiplier**2 + sampling) / q**2, floor)
        return np.linalg.solve(self.gram + ridge * np.eye(count), self.match)
