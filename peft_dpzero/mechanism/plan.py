"""The plan of a run: what couples sampling, noise and accounting."""

from __future__ import annotations

import math
from dataclasses import dataclass

from peft_dpzero.config import DPZeroConfig
from peft_dpzero.errors import DPZeroError
from peft_dpzero.mechanism.accountant import COARSE_INTERVAL, INTERVAL, Accountant, Segment, first_releases


@dataclass(frozen=True)
class PrivacyPlan:
    """What couples sampling, noise and accounting, decided once before the first step.

    Attributes:
        config: with `noise_multiplier` calibrated.
        num_units: N. expected_batch_size: B. sample_rate: q = B / N.
        steps: T, the last step's number plus one, earlier segments counted.
        spent: the segments that were released before this plan's own, for a run that is continued.
        loss_interval: steps between released losses, with train_loss="private".
        requested: the user's own config, in which σ need not be known yet.
    """

    config: DPZeroConfig
    num_units: int
    expected_batch_size: int
    steps: int
    spent: tuple[Segment, ...] = ()
    loss_interval: int = 0
    requested: DPZeroConfig | None = None

    @property
    def first_step(self) -> int:
        """The number of this plan's first step: 0 unless the run is continued."""
        return sum(segment.steps for segment in self.spent)

    @property
    def sample_rate(self) -> float:
        """q = B / N."""
        return self.expected_batch_size / self.num_units

    @property
    def noise_multiplier(self) -> float:
        """σ."""
        assert self.config.noise_multiplier is not None
        return self.config.noise_multiplier

    def epsilon(self, steps: int | None = None, interval: float = INTERVAL) -> float:
        """The ε that `steps` releases (all T by default) cost; inf where nothing is guaranteed."""
        if not self.config.is_private:
            return math.inf
        return Accountant.of(self.config, interval).epsilon(self.segments(steps))

    def running_epsilon(self, steps: int) -> float:
        """A quick upper bound on `epsilon(steps)` for a log, never above the target that σ was calibrated to."""
        if not self.config.is_private:
            return math.inf
        asked = None if self.requested is None else self.requested.target_epsilon
        about = self.epsilon(interval=COARSE_INTERVAL) if asked is None else asked
        spent = Accountant.of(self.config).quick_epsilon(self.segments(steps), about)
        return spent if asked is None else min(spent, asked)

    def segments(self, steps: int | None = None) -> tuple[Segment, ...]:
        """What the first `steps` releases (all T by default) are made of."""
        own = Segment(self.noise_multiplier, self.sample_rate, self.steps - self.first_step)
        return first_releases((*self.spent, own), self.steps if steps is None else steps)


def make_plan(
    config: DPZeroConfig,
    num_units: int,
    expected_batch_size: int,
    steps: int,
    spent: tuple[Segment, ...] = (),
    loss_interval: int = 0,
) -> PrivacyPlan:
    """Checks the run's sizes and calibrates σ if only an ε is asked for.

    Given both σ and ε, the plan ends before the step that would pass ε.

    Args:
        config: the user's settings.
        num_units: N, privacy units in the training data.
        expected_batch_size: B, the logical batch, in units.
        steps: T, with the steps of `spent`.
        spent: what was released before, for a run that is continued: it counts against `target_epsilon`.
        loss_interval: steps between released losses; needed, and used, with train_loss="private" only.

    Raises:
        DPZeroError: an empty data set, a batch larger than the data, δ of 1/N or more, no steps, or none that
            `target_epsilon` affords.
    """
    if num_units < 1:
        raise DPZeroError("train_dataset is empty: there is nothing to train on.")
    if steps < 1:
        raise DPZeroError("The run has no steps: set max_steps or num_train_epochs above 0.")
    if config.train_loss == "private" and loss_interval < 1:
        raise DPZeroError("train_loss='private' needs the steps between two released losses: set logging_steps.")
    if config.train_loss == "private" and loss_interval > steps:
        raise DPZeroError(f"logging_steps={loss_interval} releases no loss in {steps} steps: lower it.")
    noun = "examples" if config.privacy_unit is None else f"different values of {config.privacy_unit!r}"
    if expected_batch_size > num_units:
        raise DPZeroError(
            f"The logical batch ({expected_batch_size} = per_device_train_batch_size × gradient_accumulation_steps × "
            f"processes) is larger than the data ({num_units} {noun}): lower one of them."
        )
    accountant = Accountant.of(config)
    if config.is_private and accountant.delta >= 1 / num_units:
        raise DPZeroError(
            f"target_delta={accountant.delta:g} is not below 1/N = {1 / num_units:.3g}: such a δ would allow "
            f"publishing somebody's data outright. Use at most {0.1 / num_units:.1g}."
        )
    requested, sample_rate = config, expected_batch_size / num_units
    first = sum(segment.steps for segment in spent)
    if config.noise_multiplier is None:
        assert config.target_epsilon is not None
        sigma = accountant.noise_multiplier(config.target_epsilon, sample_rate, steps - first, spent)
        config = config.replace(target_epsilon=None, noise_multiplier=sigma)
    elif config.target_epsilon is not None:
        wanted = Segment(config.noise_multiplier, sample_rate, steps - first)
        steps = first + accountant.affordable_steps(config.target_epsilon, wanted, spent)
        if steps == first:
            raise DPZeroError(
                f"Not one {'more ' if spent else ''}step with noise_multiplier={config.noise_multiplier:g} stays "
                f"within target_epsilon={config.target_epsilon:g}: raise either."
            )
    return PrivacyPlan(config, num_units, expected_batch_size, steps, spent, loss_interval, requested)
