"""One SVG a model and task: accuracy against ε, minutes, passes and memory."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib import pyplot as plt

from .methods import METHODS
from .summary import Groups, Key, Spread, spread

# The ε at which budgets and memory are compared, or the nearest that was run.
MIDDLE = 2.0
Place = Callable[[Key, list[dict[str, Any]]], float | None]


def draw_all(groups: Groups, folder: Path) -> list[Path]:
    """Writes the plots of all models and tasks in `groups`, and returns their paths."""
    made = []
    for model, task in sorted({(key.model, key.task) for key in groups}):
        path = folder / f"{model}_{task}.svg"
        draw({key: some for key, some in groups.items() if (key.model, key.task) == (model, task)}, path)
        made.append(path)
    return made


def draw(groups: Groups, path: Path) -> None:
    """Writes the four panels of one model and task."""
    plt.switch_backend("svg")
    mpl.rcParams["svg.hashsalt"] = "peft_dpzero"
    figure, panels = plt.subplots(1, 4, figsize=(15, 4), sharey=True)
    epsilons = {key.epsilon for key in groups if key.epsilon is not None}
    middle = min(epsilons, key=lambda epsilon: abs(epsilon - MIDDLE), default=None)
    budgets = {unit: max((b for b in _budgets(groups) if b.unit == unit), default=None) for unit in "sp"}
    longest = budgets["s"] or budgets["p"]

    def at_middle(key: Key) -> bool:
        return key.epsilon in (middle, None)

    _panel(panels[0], groups, lambda key, _: key.epsilon if key.budget == longest else None, "ε", log=True)
    _levels(panels[0], {key: some for key, some in groups.items() if key.epsilon is None}, longest)
    _panel(panels[1], groups, _budget_of("s", 60, at_middle), f"minutes, ε = {middle:g}" if middle else "minutes")
    _panel(panels[2], groups, _budget_of("p", 1e6, at_middle), "million passes of private rows")

    def memory(key: Key, results: list[dict[str, Any]]) -> float | None:
        found = spread(results, "extra_mib")
        return found.mean if found and at_middle(key) and key.budget == longest else None

    _panel(panels[3], groups, memory, "peak memory above the start, MiB")
    panels[0].set_ylabel("held-out accuracy, %")
    handles = {label: line for axes in panels for line, label in zip(*axes.get_legend_handles_labels(), strict=True)}
    figure.legend(handles.values(), handles.keys(), loc="lower center", ncols=4, fontsize=7, frameon=False)
    figure.tight_layout(rect=(0, 0.22, 1, 1))
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)


def _budgets(groups: Groups) -> set[Any]:
    return {key.budget for key in groups if key.budget is not None}


def _budget_of(unit: str, scale: float, wanted: Callable[[Key], bool]) -> Place:
    def place(key: Key, _: list[dict[str, Any]]) -> float | None:
        return key.budget.amount / scale if key.budget and key.budget.unit == unit and wanted(key) else None

    return place


def _panel(axes: Any, groups: Groups, place: Place, label: str, log: bool = False) -> None:
    """A line with bars of one standard deviation for each method, over where `place` puts its results."""
    for number, (name, method) in enumerate(METHODS.items()):
        points: list[tuple[float, Spread]] = []
        for key, results in groups.items():
            where, found = place(key, results), spread(results, "accuracy")
            if key.method == name and where is not None and found is not None:
                points.append((where, found))
        if points:
            points.sort(key=lambda point: point[0])
            heights = [100 * found.mean for _, found in points]
            bars = [100 * (found.deviation or 0.0) for _, found in points]
            axes.errorbar([x for x, _ in points], heights, bars, label=method.title, **_style(number, name))
    if log and axes.lines:
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter("{x:g}")
    axes.set_xlabel(label)
    axes.spines[["top", "right"]].set_visible(False)


def _levels(axes: Any, groups: Groups, budget: Any) -> None:
    """What has no ε, as dotted lines."""
    for number, (name, method) in enumerate(METHODS.items()):
        for key, results in groups.items():
            found = spread(results, "accuracy")
            if key.method == name and key.budget in (budget, None) and found is not None:
                style = _style(number, name)
                axes.axhline(100 * found.mean, color=style["color"], linestyle=":", linewidth=1, label=method.title)


def _style(number: int, name: str) -> dict[str, Any]:
    return {
        "color": plt.get_cmap("tab20")(number),
        "marker": "osD^vP*X"[number % 8],
        "markersize": 4,
        "linewidth": 2.5 if name == "ours" else 1,
        "capsize": 2,
    }
