"""What all methods have in common."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor


class DoesNotFit(Exception):
    """The method cannot do anything sensible in this budget."""


@dataclass
class Outcome:
    """What a method did.

    Attributes:
        steps: updates made.
        passes: of private rows through the model, expected where batches are secret; a backward counts as two more.
        privacy: ε, δ and what they are a statement about; {} if nothing is private.
        settings: all that was chosen, whoever chose it.
    """

    steps: int = 0
    passes: float = 0.0
    privacy: dict[str, Any] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)


def root_mean_square(values: Tensor) -> float:
    """The usual size of differences, which thresholds are set to."""
    return float(values.square().mean().sqrt())


# (start, clock, epsilon, seed, folder, **settings) → what was done: trains `start.model` in place.
#   start: model and rows. clock: runs already. epsilon: None without privacy. seed: of what need not be secret.
#   folder: for what the method leaves besides the model; it does not exist yet. settings: one of the method's grid.
Train = Callable[..., Outcome]


@dataclass(frozen=True)
class Method:
    """A method and what is published of it.

    Attributes:
        name: in cells.
        title: in tables.
        train: the method.
        private: whether it has an ε.
        trains: whether it has a budget.
        grid: settings to try on another task; the first is taken where that was not done.
    """

    name: str
    title: str
    train: Train
    private: bool = True
    trains: bool = True
    grid: tuple[Mapping[str, Any], ...] = ({},)
