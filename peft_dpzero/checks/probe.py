"""The start-up probe: the model and the loss on made-up tokens, before any data is read."""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers.utils.logging import tqdm

from peft_dpzero.checks.architectures import ROWWISE_TASKS, positions_of, reason_to_separate
from peft_dpzero.checks.causes import Dependence, dependence_error, first_difference, told
from peft_dpzero.checks.freed import return_freed_memory
from peft_dpzero.checks.row_bits import RowBits, all_alike, row_bits
from peft_dpzero.checks.shortcuts import SCALE, Trials, find_shortcuts, find_trunk
from peft_dpzero.checks.synthetic import ProbeBatch, SyntheticRows, thinned
from peft_dpzero.config import SettledConfig
from peft_dpzero.errors import DPZeroError
from peft_dpzero.estimation.differences import points_of
from peft_dpzero.estimation.losses import Losses, MicroBatch
from peft_dpzero.estimation.shapes import (
    LENGTHS_PER_OCTAVE,
    LENGTHS_PER_OCTAVE_ELSEWHERE,
    LENGTHS_PER_OCTAVE_PERTURBED,
    PASS_TOKENS,
    PASS_TOKENS_ELSEWHERE,
    PASS_TOKENS_PERTURBED,
    SHORTEST_STEP_PERTURBED,
    Shapes,
    powers_of_two,
)
from peft_dpzero.estimation.state import KeptState
from peft_dpzero.estimation.tasks import FunctionTask, Task, TokenTask
from peft_dpzero.modules import watched, with_precision
from peft_dpzero.perturbation.perturbation import Perturbation, Point

logger = logging.getLogger(__name__)

# Up to which lengths it is tried whether rows keep their bits.
_LONGEST = 1024
# Of fewer rows a step than so many times the points that can be stacked, each goes alone, without padding: measured.
_ROWS_A_POINT = 4
# Seconds after which progress is shown.
_PATIENCE = 5


class Probe:
    """Runs a text model on made-up tokens.

    Args:
        model: takes `input_ids` and `attention_mask`, returns `.logits`.
        device: where the inputs go.
        task: the run's losses; None compares logits alone.
        asserted: whether the user vouches that the model and the task keep the rows of a micro-batch apart.

    Attributes:
        reason: why rows go through the model one at a time; None if several share a pass.
    """

    def __init__(self, model: Any, device: torch.device, task: Task | None = None, asserted: bool = False) -> None:
        self.model = model
        self.task = task or Task()
        self.reason = None if asserted else reason_to_separate(model, self.task)
        self.data = SyntheticRows(model, device, task)

    @staticmethod
    def suits(model: nn.Module) -> bool:
        """Whether the model reads tokens, so that a probe can be made up."""
        return hasattr(model, "config") and getattr(model, "main_input_name", "input_ids") == "input_ids"

    @cached_property
    def _precise(self) -> bool:
        return with_precision(self.model, self.run)[1]

    @property
    def _tolerance(self) -> float:
        return 3e-4 if self._precise else 0.1

    @property
    def _shown(self) -> ProbeBatch:
        return self.data.together(0) if self.reason is None else self.data.alone(0)

    @torch.no_grad()
    def run(self) -> Tensor:
        """Logits of made-up rows: (b, …)."""
        return torch.as_tensor(self.model(**Task().inputs(self.data.batch(self._shown))).logits)

    def fit_shapes(self, perturbation: Perturbation, shapes: Shapes) -> Shapes:
        """`shapes` with what the model and the task ask for; one row a pass if rows are not known to be strangers.

        Nor are they if a made-up row's loss depends on its batch-mates, at θ or near it: `reason` then says how. Rows
        share passes at lengths only that `tried_shapes` finds.

        Args:
            perturbation: over the model.
            shapes: the sizes that the user decides.

        Raises:
            DPZeroError: a row's loss depends on chance, which nothing mends.
        """
        shapes = replace(
            shapes,
            limit=positions_of(self.model),
            pad_token_id=self.data.pad,
            token_labels=self.task.token_labels,
            lengths_per_octave=LENGTHS_PER_OCTAVE.get(self.data.device.type, LENGTHS_PER_OCTAVE_ELSEWHERE),
            pass_tokens=PASS_TOKENS.get(self.data.device.type, PASS_TOKENS_ELSEWHERE),
        )
        if perturbation.is_large:
            shapes = replace(
                shapes,
                lengths_per_octave=LENGTHS_PER_OCTAVE_PERTURBED,
                pass_tokens=max(shapes.pass_tokens, PASS_TOKENS_PERTURBED),
                perturbs_each_pass=True,
                shortest_step=SHORTEST_STEP_PERTURBED,
            )
        alone = self.data.alone(0)
        if any(self._differences(alone, alone, exactly=True)):
            raise dependence_error(Dependence("chance", *self._locate(alone, alone)))
        if self.reason is None and (found := self._dependence(perturbation)) is not None:
            self.reason = told(found)
        return replace(shapes, alone=self.reason is not None)

    def check_reach(self, perturbation: Perturbation) -> None:
        """Refuses trainable parameters that do not influence the output.

        Raises:
            DPZeroError: moving them all changes no logit.
        """
        before = self.run()
        with perturbation.at(0, 0, SCALE):
            after = self.run()
        if torch.equal(before, after):
            raise DPZeroError(
                "The trainable parameters do not reach the logits: is the adapter active (model.set_adapter) and on "
                "modules that the model uses?"
            )

    def losses(self, perturbation: Perturbation, place: Callable[[MicroBatch], MicroBatch]) -> Losses:
        """The run's losses by the cheapest passes that give the plain ones' values here."""
        batch, lone = self._made_up(self._shown), self._made_up(self.data.alone(1))
        for made in (batch, lone) if isinstance(self.task, TokenTask) else ():
            if "labels" in made:
                made["labels"] = thinned(made["labels"])
        trials = Trials(self.model, self.task, batch, lone, perturbation, self._tolerance / 30)
        found = find_shortcuts(trials, find_trunk(self.model, perturbation, self.run), self.run)
        return Losses(self.model, self.task, place, found)

    def idle(self) -> Callable[[], object]:
        """A pass over a made-up row of which no loss is read."""
        return partial(Losses(self.model, _Unread(), dict), self.data.batch(self.data.alone(0)))

    def tried_shapes(
        self,
        perturbation: Perturbation,
        losses: Losses,
        shapes: Shapes,
        config: SettledConfig,
        likely: Sequence[int] = (),
        until: float | None = None,
    ) -> Shapes:
        """`shapes` with the padded lengths, and the numbers of rows, at which rows may share a pass: those at which no
        bit of a row depends on how many other rows there are, what they hold, and where it stands among them.

        Each is tried with `losses` on this machine, in the passes that a run with `config` takes; a longer row than was
        tried goes alone. So does each if its own points, stacked, fill a pass as well as other rows would.

        Args:
            perturbation: over the model.
            losses: how rows' losses are read.
            shapes: from `fit_shapes`, with the run's numbers of rows.
            config: the run's settings.
            likely: tokens of rows that are like the run's: the lengths that most of them have are tried first.
            until: when no further length is tried, by `time.monotonic`; of numbers of rows then only powers of two are,
                and none above what `likely` lets a step expect of the length.
        """
        if shapes.alone or not self.suits(losses.model):
            return shapes
        # From the last on, as the first may be θ itself, where an adapter can have no effect.
        points = points_of(config.num_directions, SCALE, config.difference)[::-1]
        stacks = losses.shortcuts.stacked and losses.shortcuts.trunk is None
        if stacks and shapes.expected_rows <= _ROWS_A_POINT * min(len(points), perturbation.most_stacked):
            return shapes
        together = dict(shapes.together)
        common = Counter(shapes.shared_length(tokens) for tokens in likely)
        lengths = sorted(shapes.lengths(_LONGEST), key=lambda length: -common[length])
        for number, length in enumerate(tqdm(lengths, desc="Trying shapes", delay=_PATIENCE)):
            if until is not None and time.monotonic() > until:
                logger.info("Time for trying shapes is over: rows of %d lengths go alone.", len(lengths) - number)
                break
            wanted = shapes.wanted_counts(length)
            if until is not None:
                expected = shapes.expected_rows * common[length] / len(likely) if likely else wanted[-1]
                wanted = powers_of_two(min(wanted[-1], round(expected)))
            if wanted == [1]:
                continue
            counts = self._alike_counts(perturbation, losses, length, wanted, points)
            if counts and counts[-1] > 1:
                together[length] = counts
        return replace(shapes, together=together)

    def _alike_counts(
        self, perturbation: Perturbation, losses: Losses, length: int, counts: list[int], points: Sequence[Point]
    ) -> list[int]:
        """The numbers of rows among which a row of this padded length keeps its bits: those that give what the largest
        gives in which it keeps them."""
        own = max(1, length - 1 - len(self.data.slots))
        lengths = [1 + own * i // counts[-1] for i in range(counts[-1])]
        row, *strangers = self.data.rows_of([own, *lengths, *reversed(lengths)])
        alike: list[int] = []
        reference: RowBits | None = None
        for count in reversed(counts):
            places = [range(first, count, 2) for first in range(min(2, count))]
            # In the first short ones come before the row, in the second long ones.
            companies = [
                [row if i in mine else others[i] for i in range(count)]
                for mine, others in zip(places, (strangers[: counts[-1]], strangers[counts[-1] :]), strict=False)
            ]
            batches = [self.data.batch(ProbeBatch(rows, 0, length)) for rows in companies]
            same = True
            try:
                for one in row_bits(perturbation, losses, batches, places, points):
                    reference = reference or one
                    same = same and all_alike(reference, one)
            except Exception as error:  # A user's function may want labels that nobody can make up.
                logger.info("Rows of %d tokens go one at a time: %s on made-up ones.", length, type(error).__name__)
                return []
            return_freed_memory()
            if same:
                alike.insert(0, count)
            elif not alike:
                reference = None
        return alike

    def _dependence(self, perturbation: Perturbation) -> Dependence | None:
        state, together = KeptState(self.model), self.data.together(0)
        # Parameters that start at zero, as LoRA's B, would hide what they multiply.
        for scale in (0.0, SCALE):
            with perturbation.at(0, 0, scale), state.kept():
                for index in range(len(together.rows)):
                    alone, company = self.data.alone(index), replace(together, index=index)
                    if any(self._differences(alone, company)):
                        return self._diagnose(alone, company)
        return None

    @torch.no_grad()
    def _read(self, probed: ProbeBatch) -> tuple[Tensor | None, Tensor | None]:
        """The tested row's logits at its own tokens and its loss, in float64; None for what cannot be told."""
        batch = self._made_up(probed)
        outputs = self.model(**self._inputs(batch))
        logits = torch.as_tensor(outputs.logits)
        row = None
        if len(logits) == len(probed.rows):
            row = logits[probed.index].double()
            if row.ndim == 2 and not self.data.encoder_decoder:
                row = self.data.own_tokens(row, probed)
        return row, self._loss(outputs, batch, probed)

    def _made_up(self, probed: ProbeBatch) -> dict[str, Any]:
        return self.task.made_up(self.data.batch(probed))

    def _inputs(self, batch: dict[str, Any]) -> dict[str, Any]:
        try:
            return self.task.inputs(batch)
        except Exception:  # A user's task may want columns that nobody can make up.
            if type(self.task) in ROWWISE_TASKS:
                raise
            return Task().inputs(batch)

    def _loss(self, outputs: Any, batch: dict[str, Any], probed: ProbeBatch) -> Tensor | None:
        ours = type(self.task) in ROWWISE_TASKS and type(self.task) is not FunctionTask
        # In half precision rounding alone can turn a user's yes into a no.
        if "labels" not in batch or not (ours or self._precise):
            return None
        try:
            losses = self.task.losses(outputs, batch)
        except Exception:
            if ours:
                raise
            logger.info("per_example_loss does not take made-up labels: that it keeps examples apart is not probed.")
            return None
        return losses[probed.index].double() if losses.shape == (len(probed.rows),) else None

    def _differences(self, one: ProbeBatch, other: ProbeBatch, exactly: bool = False) -> tuple[bool, bool]:
        """Whether the tested row's logits differ between the two batches, and whether its loss does."""
        (logits, loss), (other_logits, other_loss) = self._read(one), self._read(other)
        scale = 0.0 if logits is None else float(logits.abs().max())
        tolerance = 0.0 if exactly else self._tolerance
        by_logits = _apart(logits, other_logits, tolerance * scale)
        by_loss = _apart(loss, other_loss, tolerance * max(scale, 0.0 if loss is None else float(loss.abs())))
        return by_logits, by_loss

    def _diagnose(self, alone: ProbeBatch, company: ProbeBatch) -> Dependence:
        """Narrows the difference between two batches down to one circumstance and the first module that shows it."""
        alone = ProbeBatch([alone.rows[alone.index]], 0, len(alone.rows[alone.index]))
        padded = replace(alone, width=company.width)
        refilled = replace(padded, filler=self.data.other_token)
        strangers = [row if i == company.index else row.flip(0) for i, row in enumerate(company.rows)]
        circumstances = (
            ("chance", company, company),
            ("masked tokens", padded, refilled),
            ("padding", alone, padded),
            ("neighbors", company, replace(company, rows=strangers)),
            ("place", padded, company),
        )
        for circumstance, one, other in circumstances:
            by_logits, by_loss = self._differences(one, other)
            if by_logits or by_loss:
                return Dependence(circumstance, *self._locate(one, other), only_in_loss=not by_logits)
        return Dependence("place", *self._locate(alone, company))

    def _locate(self, one: ProbeBatch, other: ProbeBatch) -> tuple[str, nn.Module | None]:
        first, second = self._states(one), self._states(other)
        name = first_difference(first, second, self._tolerance)
        return ("", None) if name is None else (name, self.model.get_submodule(name))

    def _states(self, probed: ProbeBatch) -> dict[tuple[str, int], Tensor | None]:
        """What belongs to the tested row in the output of each module call."""
        with watched(self.model, lambda output: self.data.own_part(output.clone(), probed)) as seen:
            self._read(probed)
        return seen


class _Unread(Task):
    def losses(self, outputs: Any, batch: Mapping[str, Any]) -> Tensor:
        return torch.zeros(len(batch["input_ids"]))


def _apart(one: Tensor | None, other: Tensor | None, tolerance: float) -> bool:
    if one is None or other is None:
        return False
    return not torch.allclose(one, other, rtol=0, atol=tolerance, equal_nan=True)
