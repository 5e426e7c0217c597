"""The tasks: rated texts of four kinds, as positive or negative, as stars, and to be written on."""

from __future__ import annotations

import bisect
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from workloads import ROOT

from .cells import FULL, Size

sys.path.append(str(ROOT / "integrations" / "trainer"))
from reviews import SETS, public_texts, rated_texts

# Mean ratings from −4 to 4 at which one more star begins.
STARS = (-2.0, -0.5, 0.5, 2.0)
# Texts rated nearer to 0 have no sign.
NEUTRAL = 0.3

# A text and its class; None where its own second half is what is to be written.
Rows = list[tuple[str, int | None]]


@dataclass(frozen=True)
class Task:
    """A set of texts and what is learned of them.

    Attributes:
        texts: one of `SETS`.
        learned: the sign of a text's mean rating, one of five classes of it, or to write on: the text's second half
            after its first.
        tuned_on: the task on which settings for this one are chosen.
    """

    texts: str
    learned: Literal["sign", "stars", "ending"]
    tuned_on: str

    @property
    def classes(self) -> int:
        """0 where text is written."""
        return {"sign": 2, "stars": len(STARS) + 1, "ending": 0}[self.learned]

    def labelled(self, archive: Path, texts: str) -> Rows:
        """A set's texts with what is to be learned, without those that have no sign where that is it."""
        rated = rated_texts(archive, texts)
        if self.learned == "ending":
            return [(text, None) for _, text in rated]
        if self.learned == "stars":
            return [(text, bisect.bisect_right(STARS, rating)) for rating, text in rated]
        return [(text, int(rating > 0)) for rating, text in rated if abs(rating) >= NEUTRAL]


def _tuned_on(name: str) -> str:
    return "movies" if name == "nyt" else "nyt"


TASKS = {name: Task(name, "sign", _tuned_on(name)) for name in SETS}
TASKS |= {f"{name}-stars": Task(name, "stars", f"{_tuned_on(name)}-stars") for name in SETS}
TASKS |= {f"{name}-endings": Task(name, "ending", f"{_tuned_on(name)}-endings") for name in SETS}


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
