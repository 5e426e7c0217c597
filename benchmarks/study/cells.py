"""What a run of the study is: its task, model, method, budget, ε and seed."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

DELTA = 1e-5


@dataclass(frozen=True, order=True)
class Budget:
    """Either seconds of wall clock or passes of private rows through the model.

    Attributes:
        unit: "s" or "p".
        amount: how many.
    """

    unit: str
    amount: float

    @classmethod
    def of(cls, text: str) -> Budget:
        """Reads "120s", "2m" or "1000000p"."""
        amount, unit = float(text[:-1]), text[-1]
        if unit not in "smp" or amount <= 0:
            raise ValueError(f"A budget is seconds (90s), minutes (2m) or passes (1000000p), got {text!r}.")
        return cls("s", 60 * amount) if unit == "m" else cls(unit, amount)

    def __str__(self) -> str:
        return f"{self.amount:.15g}{self.unit}"


@dataclass(frozen=True)
class Size:
    """How much of everything a study uses.

    Attributes:
        rows: private rows at most.
        held_out: rows that accuracy is measured on.
        public: public texts.
        start_steps: steps of learning from label words and public text.
        basis: vectors of the public basis; None leaves them to `peft_dpzero`.
        batch: rows a step at most, for methods that name their batch.
        move: λ of our methods; None measures it, which takes a while.
    """

    rows: int = 1_000_000
    held_out: int = 1000
    public: int = 4000
    start_steps: int = 150
    basis: int | None = None
    batch: int = 1_000_000
    move: float | None = None


FULL = Size()
QUICK = Size(rows=48, held_out=30, public=48, start_steps=2, basis=8, batch=8, move=1e-2)


@dataclass(frozen=True)
class Cell:
    """One run.

    Attributes:
        task: a key of `TASKS`.
        model: a key of `MODELS`.
        method: a key of `METHODS`.
        budget: None for what does not train.
        epsilon: None for what is not private.
        seed: of the start, the order of public data and, without privacy, of private data. Noise and sampling of
            private methods are secret.
        settings: which of the method's grid; None takes what tuning on another task chose, or else the first.
    """

    task: str
    model: str
    method: str
    budget: Budget | None
    epsilon: float | None
    seed: int
    settings: int | None = None

    @property
    def name(self) -> str:
        """Tells the cell from all others, as a file's name may."""
        privacy = "nonprivate" if self.epsilon is None else f"eps{self.epsilon:g}"
        parts = [self.model, self.task, self.method, str(self.budget or "start"), privacy, f"seed{self.seed}"]
        return "_".join(parts + ([] if self.settings is None else [f"settings{self.settings}"]))

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready, as `of` reads it."""
        return asdict(self) | {"budget": None if self.budget is None else str(self.budget)}

    @classmethod
    def of(cls, values: dict[str, Any]) -> Cell:
        """Reads what `to_dict` made."""
        budget = values["budget"]
        return cls(**(values | {"budget": None if budget is None else Budget.of(budget)}))
