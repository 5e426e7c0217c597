"""The tasks: rated texts of four kinds, as positive or negative and as stars."""

from __future__ import annotations

import bisect
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from workloads import ROOT

from .cells import FULL, Size

sys.path.append(str(ROOT / "integrations" / "trainer"))
from reviews import SETS, public_texts, rated_texts

# Mean ratings from −4 to 4 at which one more star begins.
STARS = (-2.0, -0.5, 0.5, 2.0)
# Texts rated nearer to 0 have no sign.
NEUTRAL = 0.3

Rows = list[tuple[str, int]]


@dataclass(frozen=True)
class Task:
    """A set of texts and how its ratings are read.

    Attributes:
        texts: one of `SETS`.
        stars: five classes from the mean rating, instead of its sign.
        tuned_on: the task on which settings for this one are chosen.
    """

    texts: str
    stars: bool
    tuned_on: str

    @property
    def classes(self) -> int:
        return len(STARS) + 1 if self.stars else 2

    def labelled(self, archive: Path, texts: str) -> Rows:
        """(text, class) of a set's texts, without those that have none."""
        rated = rated_texts(archive, texts)
        if self.stars:
            return [(text, bisect.bisect_right(STARS, rating)) for rating, text in rated]
        return [(text, int(rating > 0)) for rating, text in rated if abs(rating) >= NEUTRAL]


def _tuned_on(name: str) -> str:
    return "movies" if name == "nyt" else "nyt"


TASKS = {name: Task(name, False, _tuned_on(name)) for name in SETS}
TASKS |= {f"{name}-stars": Task(name, True, f"{_tuned_on(name)}-stars") for name in SETS}


@dataclass(frozen=True)
class Data:
    """A task's rows.

    Attributes:
        train: private.
        held_out: what accuracy is measured on; with two classes the rows that `rated_as_labels` holds out.
        public: of the other sets, with their own ratings, which only methods read that need public labels.
        public_text: of the other sets, as in the demo.
    """

    train: Rows
    held_out: Rows
    public: Rows
    public_text: list[str]


def load(task: Task, archive: Path, size: Size) -> Data:
    """Reads a task's rows, of which the held-out ones and the public ones are the same for all seeds."""
    rows = task.labelled(archive, task.texts)
    order = np.random.RandomState(0).permutation(len(rows))
    held_out = [rows[i] for i in order[: FULL.held_out][: size.held_out]]
    train = [rows[i] for i in order[FULL.held_out :][: size.rows]]
    others = [row for name in SETS if name != task.texts for row in task.labelled(archive, name)]
    chosen = np.random.RandomState(0).permutation(len(others))[: size.public]
    text = public_texts(archive, task.texts, size.public)
    return Data(train, held_out, [others[i] for i in chosen], text)
