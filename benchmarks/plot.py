"""The measurements at a glance: seconds a step of each contender over the floor's, and memory above the weights."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

COLOURS = {
    "floor": "#9e9e9e",
    "ours": "#3f51b5",
    "reference": "#ef6c00",
    "opacus hooks": "#00897b",
    "opacus ghost": "#80cbc4",
}
GROUPS = {
    "minilm_lora": "MiniLM\nLoRA",
    "minilm_full": "MiniLM\nall",
    "gemma_lora": "Gemma\nLoRA",
    "gemma_full": "Gemma\nall",
    "llama_lora": "100M Llama\nLoRA",
}


def draw(results: dict[str, Any], path: Path) -> None:
    """Writes the plot of `results` (as `run.py` writes them) as an SVG."""
    import matplotlib as mpl

    mpl.use("svg")
    mpl.rcParams["svg.hashsalt"] = "peft_dpzero"
    from matplotlib import pyplot as plt

    figure, (times, memory) = plt.subplots(1, 2, figsize=(10, 3.6), width_ratios=(3, 1))
    _times(times, results["sections"])
    _memory(memory, results["sections"].get("memory", {}))
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)


def _times(axes: Any, sections: dict[str, Any]) -> None:
    groups = [(title, sections[name]["k1"]) for name, title in GROUPS.items() if name in sections]
    grouped_bars(axes, [_over_floor(run) for _, run in groups])
    axes.set_xticks(range(len(groups)), [title for title, _ in groups])
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter("")
    axes.set_ylabel("seconds a step / floor's")
    axes.set_title("K = 1: two forward passes", fontsize=10)
    if groups:
        axes.legend(fontsize=7, frameon=False)
    axes.spines[["top", "right"]].set_visible(False)


def _over_floor(run: dict[str, Any]) -> dict[str, float]:
    floor = run["seconds"][f"floor {run['floor_layout']}"]["median"]
    return {"floor": 1.0} | {n: run["seconds"][n]["median"] / floor for n in COLOURS if n in run["seconds"]}


def grouped_bars(axes: Any, groups: Sequence[Mapping[str, float]], most: int | None = None) -> None:
    """Bars of each group side by side, named once, with their heights; wide as if there were `most` in a group."""
    seen: set[str] = set()
    for x, bars in enumerate(groups):
        width = 0.8 / (most or len(bars))
        for i, (name, height) in enumerate(bars.items()):
            left = x + (i - (len(bars) - 1) / 2) * width
            colour = COLOURS.get(name, "#bdbdbd")
            axes.bar(left, height, width, color=colour, label=None if name in seen else name)
            axes.annotate(f"{height:.2g}", (left, height), ha="center", va="bottom", fontsize=7)
            seen.add(name)


def _memory(axes: Any, measured: dict[str, Any]) -> None:
    for x, name in enumerate(name for name in COLOURS if f"minilm {name}" in measured):
        height = statistics.median(measured[f"minilm {name}"])
        axes.bar(x, height, color=COLOURS[name])
        axes.annotate(f"{height:.0f}", (x, height), ha="center", va="bottom", fontsize=7)
    axes.set_xticks([])
    axes.set_ylabel("MiB above the loaded weights")
    axes.set_title("Peak memory, MiniLM, LoRA", fontsize=10)
    axes.spines[["top", "right"]].set_visible(False)
