"""The figures of docs/study.md, made from result files alone."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path

import tables

from . import plots, sweep
from .beside import differences
from .cells import Budget
from .methods import METHODS
from .results import Result, gather, read_all, reported
from .summary import NOTHING, Groups, grouped, spread

MARK = "study"
RECOMPUTED = {
    "epsilon_if_secret": "ε, if its noise were secret",
    "epsilon_if_secret_and_poisson": "ε, if batches were Poisson samples too",
}


def write_report(folder: Path, page: Path) -> None:
    """Gathers `folder`'s results into one compact file beside the page, and writes the page's tables and plots of it.

    Results of earlier reports stay; of a cell that was run again the newer one is taken.
    """
    results = {json.dumps(r["cell"]): r for r in (*reported(page), *read_all(folder))}
    gather([results[key] for key in sorted(results)], page)
    groups = grouped(results.values())
    pictures = plots.draw_all(groups, page.with_suffix(""))
    if not page.exists():
        marks = (f"<!-- {mark} -->\n<!-- end of {mark} -->\n" for mark in (MARK, sweep.MARK))
        page.write_text("\n".join(("# The study\n", *marks)))
    tables.insert(page, MARK, rendered(groups, [picture.relative_to(page.parent) for picture in pictures]))
    tables.insert(page, sweep.MARK, sweep.rendered(results.values()))


def rendered(groups: Groups, pictures: Sequence[Path] = ()) -> str:
    """Markdown: for each model and task its plots and a table for each budget."""
    parts = [ran(groups)]
    for model, task in sorted({(key.model, key.task) for key in groups}):
        parts.append(f"### {model}, {task}")
        parts += [f"![{model}, {task}]({picture})" for picture in pictures if picture.stem == f"{model}_{task}"]
        of_task = {key: results for key, results in groups.items() if (key.model, key.task) == (model, task)}
        for budget in sorted({key.budget for key in of_task if key.budget is not None}):
            compared = differences(of_task, budget)
            parts += [f"**{words(budget)}**", budget_table(of_task, budget), *([compared] if compared else [])]
    if any(key.method == "published" for key in groups):
        parts += ["### What the published noise proves", recomputed(groups)]
    return "\n\n".join(parts)


def ran(groups: Groups) -> str:
    """What has been run, in a sentence."""
    if not groups:
        return NOTHING
    number = sum(map(len, groups.values()))
    every = [result for results in groups.values() for result in results]
    seeds = sorted({len(results) for results in groups.values()})
    machines = sorted({_machine(result) for result in every})
    held_out = sorted({result["held_out"] for result in every})
    timed = [result for result in every if result["seconds"]]
    share = statistics.median([r["cpu_seconds"] / (r["seconds"] * r["machine"]["threads"]) for r in timed] or [0.0])
    return (
        f"{number} runs with {_from_to(seeds)} seeds each, of {' and '.join(machines)}; accuracy in per cent of "
        f"{_from_to(held_out)} held-out rows: mean ± standard deviation (seeds). The median run used {share:.0%} of "
        "the time of the cores it was promised: where that is well below 100 %, the machine was busy with other things "
        "and wall clocks are not equal."
    )


def budget_table(groups: Groups, budget: Budget) -> str:
    """Accuracy in per cent by method and ε, and what the runs took: mean ± standard deviation (seeds)."""
    epsilons = sorted({key.epsilon for key in groups if key.epsilon is not None})
    header = ["method", *(f"ε = {epsilon:g}" for epsilon in epsilons), "no ε", "seconds", "passes", "extra MiB"]
    rows = []
    for name, method in METHODS.items():
        of_method = {
            key.epsilon: results
            for key, results in groups.items()
            if key.method == name and key.budget in (budget, None)
        }
        if not of_method:
            continue
        accuracies = [_accuracy(of_method.get(epsilon)) for epsilon in (*epsilons, None)]
        every = [result for results in of_method.values() for result in results]
        costs = [spread(every, "seconds"), spread(every, "passes"), spread(every, "extra_mib")]
        shown = ["–" if cost is None else f"{cost.mean:,.0f}" for cost in costs]
        rows.append([method.title, *accuracies, *(shown if method.trains else ["–"] * 3)])
    return tables.table(header, rows)


def words(budget: Budget) -> str:
    if budget.unit == "p":
        return f"{budget.amount:,.0f} passes"
    return f"{budget.amount / 60:g} minutes" if budget.amount >= 60 else f"{budget.amount:g} seconds"


def _accuracy(results: list[Result] | None) -> str:
    if results is None:
        return "–"
    found = spread(results, "accuracy")
    return "does not fit" if found is None else found.shown(100)


def recomputed(groups: Groups) -> str:
    """What the published recipe's noise proves, by budget and claimed ε."""
    rows = []
    for key, results in groups.items():
        if key.method == "published" and key.budget is not None:
            found = [spread(results, lambda result, name=name: result["privacy"][name]) for name in RECOMPUTED]
            shown = ["–" if one is None else one.shown(digits=2) for one in found]
            rows.append([f"{key.model}, {key.task}", words(key.budget), f"{key.epsilon:g}", *shown])
    return tables.table(["", "budget", "ε claimed", *RECOMPUTED.values()], rows)


def _machine(result: Result) -> str:
    machine = result["machine"]
    return f"{machine['threads']} thread{'s' * (machine['threads'] > 1)} of {machine['cores']} cores"


def _from_to(values: Iterable[float]) -> str:
    values = list(values)
    return f"{values[0]:,}" if len(values) == 1 else f"{values[0]:,} to {values[-1]:,}"
