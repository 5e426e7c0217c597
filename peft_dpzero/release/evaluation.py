"""Figures of evaluation on a card, if the user gives them: the guarantee does not cover them, and the card says so."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from huggingface_hub import EvalResult

from peft_dpzero.errors import DPZeroError
from peft_dpzero.release.numbers import short

_PREFIXES = ("eval_", "test_")
# What `Trainer.evaluate` returns beside metrics.
_NO_METRICS = ("runtime", "samples_per_second", "steps_per_second", "epoch", "model_preparation_time")
_HEADING = """## Evaluation

These figures were computed on data outside the training set. The guarantee does not cover them.
"""


def metrics_of(given: Any) -> dict[str, float]:
    """Metrics by their plain names, in four significant digits.

    Args:
        given: what `Trainer.evaluate` or the `metrics` of `Trainer.predict` gave; or a list of `EvalResult`.

    Raises:
        DPZeroError: neither of them.
    """
    if _is_results(given):
        return {result.metric_name or result.metric_type: short(result.metric_value) for result in given}
    if not isinstance(given, Mapping):
        raise DPZeroError("eval_results must be what trainer.evaluate() returned, or a list of EvalResult.")
    plain = {_without_prefix(name): value for name, value in given.items()}
    return {
        name: short(float(value))
        for name, value in plain.items()
        if name not in _NO_METRICS and isinstance(value, (int, float))
    }


def results_of(given: Any, task: str | None, datasets: str | Sequence[str] | None) -> list[EvalResult] | None:
    """The `model-index` of a card; None where the task, or the one data set, is not known by name."""
    if _is_results(given):
        return list(given)
    names = [datasets] if isinstance(datasets, str) else list(datasets or ())
    if task is None or len(names) != 1:
        return None
    return [EvalResult(task, names[0], names[0], name, value) for name, value in metrics_of(given).items()]


def evaluation_section(given: Any) -> str:
    """The figures as a table, with what they are not."""
    rows = (f"| {name} | {value} |" for name, value in metrics_of(given).items())
    return "\n".join((_HEADING, "| metric | value |", "|---|---|", *rows, ""))


def _is_results(given: Any) -> bool:
    return isinstance(given, Sequence) and bool(given) and all(isinstance(one, EvalResult) for one in given)


def _without_prefix(name: str) -> str:
    return next((name.removeprefix(prefix) for prefix in _PREFIXES if name.startswith(prefix)), name)
