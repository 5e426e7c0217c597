"""Whether a row's contribution depends on the other rows: neighboring lists of rows, compared bit for bit.

`prepared` is the only place that knows how the package turns rows into contributions.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from accelerate.utils import send_to_device
from peft_dpzero import DPZeroConfig, DPZeroError, Task
from peft_dpzero.checks.probe import Probe
from peft_dpzero.estimation.batching import LogicalBatches
from peft_dpzero.estimation.differences import estimate_differences
from peft_dpzero.estimation.losses import Losses
from peft_dpzero.estimation.sampling import PoissonSampler
from peft_dpzero.estimation.shapes import Shapes
from peft_dpzero.mechanism.contribution import Contributions
from peft_dpzero.perturbation.perturbation import Perturbation
from torch import Tensor, nn

from zoo.architectures import VOCABULARY

Row = dict[str, Any]
Run = Callable[[Sequence[Row]], Tensor]

CONFIG = DPZeroConfig(
    noise_multiplier=1.0, target_delta=1e-5, num_directions=3, smoothing_parameter=1e-3, clipping_threshold=1.0
)
# Grid units of a contribution whose norm is C.
THRESHOLD = 1 << 20
IGNORE = -100
# So many that a micro-batch of any of the harness's lengths has several rows.
EXPECTED_ROWS = 512
SHORTCUTS = ("chosen", "plain")
# Its embedding is NaN once the model is prepared; one row has it.
POISON = VOCABULARY - 1


# ---- The package's own path: all that must change with its API ----


def prepared(
    model: Any,
    task: Task,
    *,
    shortcuts: str = "chosen",
    dataset: Callable[[Sequence[Row]], Any] = list,
    micro_batch_size: int = 4,
) -> Run:
    """What makes rows' contributions as a run would: all rows are sampled, λ = 1e-3, K = 3, C = 1.

    Args:
        model: in eval mode.
        task: the run's.
        shortcuts: "chosen" takes those that a run would take, "plain" none.
        dataset: makes the data set of rows.
        micro_batch_size: as `per_device_train_batch_size`.

    Returns: rows → their contributions (n, K) int64, one step's.

    Raises:
        DPZeroError: the model or the task is refused.
    """
    perturbation = Perturbation(model, CONFIG.direction_seed, CONFIG.direction_distribution)
    device = next(model.parameters()).device
    place = partial(send_to_device, device=device)
    probe = Probe(model, device, task)
    shapes = probe.fit_shapes(perturbation, Shapes(EXPECTED_ROWS, micro_batch_size))
    probe.check_reach(perturbation)
    losses = probe.losses(perturbation, place) if shortcuts == "chosen" else Losses(model, task, place)
    shapes = probe.tried_shapes(perturbation, losses, shapes, CONFIG)

    def run(rows: Sequence[Row]) -> Tensor:
        sampler = PoissonSampler(len(rows), 1.0, bytes(32))
        batches = LogicalBatches(dataset(rows), sampler, padded, shapes)
        estimated = estimate_differences(
            losses,
            batches.draw(0),
            perturbation,
            step=0,
            num_directions=CONFIG.num_directions,
            smoothing_parameter=CONFIG.smoothing_parameter,
            difference=CONFIG.settled().difference,
        )
        return Contributions(CONFIG).rows(0, estimated._rows, estimated._losses, CONFIG.clipping_threshold)

    return run


# ---- Rows ----


def padded(rows: Sequence[Row]) -> dict[str, Tensor]:
    """Rows as a batch, padded on the right to its longest."""
    batch: dict[str, Tensor] = {}
    for key in rows[0]:
        values = [torch.as_tensor(row[key]) for row in rows]
        filler = IGNORE if key == "labels" else 0
        batch[key] = nn.utils.rnn.pad_sequence(values, True, filler) if values[0].ndim else torch.stack(values)
    return batch


def row(kind: str, length: int, seed: int, token: int | None = None) -> Row:
    """A random row with labels for a task of this kind.

    Args:
        kind: of an `Architecture`.
        length: tokens.
        seed: decides the tokens.
        token: stands in the middle, instead of a random one.
    """
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(5, POISON, (length,), generator=generator).tolist()
    if token is not None:
        ids[length // 2] = token
    labels: dict[str, Any] = {
        "classifier": seed % 3,
        "causal_lm": list(ids),
        "masked_lm": [word if place % 3 == 0 else IGNORE for place, word in enumerate(ids)],
        "seq2seq": ids[: 1 + length // 4],
    }
    return {"input_ids": ids, "attention_mask": [1] * length, "labels": labels[kind]}


# Some are equal, one is a single token, two are powers of two, some are past the tiny models' windows and lengths.
LENGTHS = (5, 9, 1, 12, 7, 8, 5, 16, 34, 9, 23, 40, 17)
# The strangers: short, past every limit that the tiny models have, exactly a power of two, and one that makes NaN.
STRANGERS = {"a short row": 2, "the longest row": 70, "a row of 32 tokens": 32, "a row that makes NaN": 6}
PLACES = {"first": 0, "in the middle": len(LENGTHS) // 2, "last": len(LENGTHS)}


@dataclass(frozen=True)
class Neighbor:
    """Another list of rows, one away from the first: `keys` are a number for its rows and a name for strangers."""

    name: str
    keys: tuple[Hashable, ...]


BASE = tuple(range(len(LENGTHS)))


def _added(stranger: str, place: str) -> Neighbor:
    at = PLACES[place]
    return Neighbor(f"{stranger}, {place}", (*BASE[:at], stranger, *BASE[at:]))


def _replaced(stranger: str, place: str) -> Neighbor:
    at = min(PLACES[place], len(BASE) - 1)
    return Neighbor(f"{stranger} instead of another, {place}", (*BASE[:at], stranger, *BASE[at + 1 :]))


def _removed(at: int) -> Neighbor:
    return Neighbor(f"without row {at}", (*BASE[:at], *BASE[at + 1 :]))


# The same rows once more, when strangers have been there, would show what they left behind.
AGAIN = Neighbor("the same rows again", BASE)
ALL = (
    *(_added(stranger, place) for stranger in STRANGERS for place in PLACES),
    *(_replaced(stranger, place) for stranger, place in zip(STRANGERS, (*PLACES, "last"), strict=True)),
    *(_removed(at) for at in (0, LENGTHS.index(max(LENGTHS)))),
    AGAIN,
)
FEW = (
    _added("the longest row", "last"),
    _added("a row that makes NaN", "first"),
    _replaced("a row of 32 tokens", "in the middle"),
    _removed(0),
    AGAIN,
)


def rows_of(kind: str) -> dict[Hashable, Row]:
    """The rows of `BASE` and the strangers, by key."""
    rows: dict[Hashable, Row] = {index: row(kind, length, 100 + index) for index, length in enumerate(LENGTHS)}
    for number, (name, length) in enumerate(STRANGERS.items()):
        rows[name] = row(kind, length, 200 + number, POISON if "NaN" in name else None)
    return rows


# ---- The comparison ----


@dataclass(frozen=True)
class Finding:
    """What became of the other rows' contributions.

    Attributes:
        outcome: "equal", "differs" or "refused".
        detail: the neighbor that changes most, or the refusal.
        rows: how many other rows changed.
        largest: the largest change of one, over C.
        total: the change of their sum, over C.
        alone: every pass held one row.
    """

    outcome: str
    detail: str = ""
    rows: int = 0
    largest: float = 0.0
    total: float = 0.0
    alone: bool = False

    @property
    def independent(self) -> bool:
        """No other row changed, or nothing was run."""
        return self.outcome in ("equal", "refused")

    def __str__(self) -> str:
        if self.outcome != "differs":
            return ": ".join(filter(None, (self.outcome, self.detail)))
        return f"differs: {self.detail}: {self.rows} rows, one by {self.largest:.2g} C, their sum by {self.total:.2g} C"


def contributions(model: Any, task: Task, rows: Sequence[Row], *, shortcuts: str = "chosen", **more: Any) -> Tensor:
    """Every row's contribution, (n, K) int64; see `prepared`."""
    return prepared(model, task, shortcuts=shortcuts, **more)(rows)


def differences(
    model: Any,
    task: Task,
    rows: dict[Hashable, Row],
    base: Sequence[Hashable] = BASE,
    neighbors: Sequence[Neighbor] = ALL,
    *,
    poisons: bool = False,
    **settings: Any,
) -> Finding:
    """Compares the contributions of rows that two lists share, for `base` and each neighbor.

    Args:
        model: in eval mode.
        task: the run's.
        rows: by key.
        base: the keys of the first list.
        neighbors: the other lists, met in this order by the same model.
        poisons: gives the token `POISON` an embedding of NaN once the model has been accepted.
        settings: those of `prepared`.

    A `DPZeroError` that only a neighbor raises is no refusal, and goes through.
    """
    with _widest_pass(model) as widths:
        try:
            run = prepared(model, task, **settings)
            widths.clear()
            expected = dict(zip(base, run([rows[key] for key in base]), strict=True))
        except DPZeroError as refusal:
            return Finding("refused", str(refusal))
        if poisons:
            with torch.no_grad():
                model.get_input_embeddings().weight[POISON] = torch.nan
        worst = Finding("equal")
        for neighbor in neighbors:
            found = dict(zip(neighbor.keys, run([rows[key] for key in neighbor.keys]), strict=True))
            worst = max(worst, _compared(neighbor.name, expected, found), key=lambda finding: finding.total)
    alone = max(widths, default=0) == 1
    return Finding(worst.outcome, worst.detail, worst.rows, worst.largest, worst.total, alone)


def _compared(name: str, ones: dict[Hashable, Tensor], others: dict[Hashable, Tensor]) -> Finding:
    shared = [(others[key] - one).double() / THRESHOLD for key, one in ones.items() if key in others]
    if not shared:
        return Finding("equal")
    changes = torch.stack(shared)
    norms = changes.norm(dim=1)
    count = int(norms.count_nonzero())
    if not count:
        return Finding("equal")
    # Changes can cancel in the sum, and are still changes.
    total = max(float(changes.sum(dim=0).norm()), 2.0**-40)
    return Finding("differs", name, count, float(norms.max()), total)


@contextmanager
def _widest_pass(model: nn.Module) -> Iterator[list[int]]:
    """Collects how many rows each pass holds."""
    widths: list[int] = []

    def note(module: nn.Module, args: Any, inputs: dict[str, Any]) -> None:
        widths.extend(len(value) for key, value in inputs.items() if key == "input_ids")

    handle = model.register_forward_pre_hook(note, with_kwargs=True)
    try:
        yield widths
    finally:
        handle.remove()
