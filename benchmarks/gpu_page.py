"""What `gpu.py` measured, as a plot beside its JSON and as the tables of docs/benchmarks.md.

python benchmarks/gpu_page.py docs/benchmarks/nvidia-h200.json
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from plot import grouped_bars
from tables import insert, table
from workloads import ROOT

SHAPES = {"1.3b": "OPT-1.3B", "6.7b": "OPT-6.7B", "13b": "OPT-13B"}
MODES = {"lora": "LoRA", "full": "all"}


def cases(results: dict[str, Any]) -> Iterator[tuple[str, str, dict[str, Any], dict[str, Any]]]:
    """Title, K, what was measured with K directions, and what was of the workload."""
    for shape, title in SHAPES.items():
        for mode, kind in MODES.items():
            workload = results.get(shape, {}).get(mode, {})
            for key, run in workload.items():
                if key.startswith("K=") and "over_floor" in run["runs"].get("ours", {}):
                    yield f"{title}, {kind}", key.removeprefix("K="), run, workload


def draw(results: dict[str, Any], path: Path) -> None:
    """Writes the plot as an SVG."""
    import matplotlib as mpl

    mpl.use("svg")
    mpl.rcParams["svg.hashsalt"] = "peft_dpzero"
    from matplotlib import pyplot as plt

    figure, (times, memory) = plt.subplots(1, 2, figsize=(10, 3.6), width_ratios=(2, 1))
    made = list(cases(results))
    _bars(
        times,
        [(f"{title.replace(', ', chr(10))}\nK = {k}", _times(run)) for title, k, run, _ in made],
        "seconds a step / floor's",
        f"{results['device']}, {results['settings']['dtype']}",
    )
    first = [(title.replace(", ", "\n"), _memory(run, workload)) for title, k, run, workload in made if k == "1"]
    _bars(memory, first, "GiB above the loaded weights", "Peak memory, K = 1")
    for axes in (times, memory):
        axes.legend(fontsize=7, frameon=False)
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)


def _times(run: dict[str, Any]) -> dict[str, float]:
    return {"floor": 1.0} | {
        name: run["runs"][name]["over_floor"]["median"] for name in ("ours", "reference") if name in run["runs"]
    }


def _memory(run: dict[str, Any], workload: dict[str, Any]) -> dict[str, float]:
    peaks = {"inference": workload["inference"]} | run["runs"]
    names = ("inference", "ours", "reference")
    return {name: peaks[name]["peak_gib"] - workload["weights_gib"] for name in names if name in peaks}


def _bars(axes: Any, groups: list[tuple[str, dict[str, float]]], label: str, title: str) -> None:
    grouped_bars(axes, [bars for _, bars in groups], most=3)
    axes.set_xticks(range(len(groups)), [name for name, _ in groups], fontsize=8)
    axes.set_ylabel(label)
    axes.set_title(title, fontsize=10)
    axes.spines[["top", "right"]].set_visible(False)


def times_table(results: dict[str, Any]) -> str:
    rows = []
    for title, k, run, _ in cases(results):
        ours = run["runs"]["ours"]
        reference = _spread(run["reference_over_ours"]) if "reference_over_ours" in run else "–"
        over = [
            _spread(ours["over_floor"]),
            reference,
            f"{ours['peak_gib']:.1f}",
            f"{ours['memory_over_inference']:.2f}",
        ]
        rows.append((f"{title}, K = {k}", _spread(ours["seconds"]), *over))
    header = ("model", "our seconds a step", "over the floor's", "reference over ours", "peak, GiB", "over inference's")
    return table(header, rows)


def checks_table(results: dict[str, Any]) -> str:
    """What was compared, how much of it differed, and what a planted fault showed."""
    bits, rows = results["bits"], results["strangers"]
    updates = bits["updates"].values()
    planted = [*bits["planted"].items(), *rows["planted"].items()]
    small = [
        results[shape]["lora"]["strangers"] for shape in SHAPES if "strangers" in results.get(shape, {}).get("lora", {})
    ]
    lines = [
        (
            "entries of directions",
            sum(one["compared"] for one in bits["directions"].values()),
            bits["directions"].values(),
        ),
        ("numbers of points, weights and optimizer states", sum(one["compared"] for one in updates), updates),
        ("rows among others, small models", rows["compared"], rows["settings"]),
        ("rows among others, OPT of the sizes below", sum(one["compared"] for one in small), small),
        (
            "lists of rows and their neighbors",
            len(results["contributions"]["settings"]),
            results["contributions"]["settings"],
        ),
    ]
    made = [(name, f"{count:,}", f"{sum(one.get('differ', 0) for one in ones):,}") for name, count, ones in lines]
    made += [(f"planted: {name}", f"{one['compared']:,}", f"{one['differ']:,}") for name, one in planted]
    return table(("compared", "number", "of which differ"), made)


def _spread(value: dict[str, float]) -> str:
    return f"{value['median']:.3g} ({value['min']:.3g} to {value['max']:.3g})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path)
    path: Path = parser.parse_args().results
    results = json.loads(path.read_text(encoding="utf-8"))
    draw(results, path.with_suffix(".svg"))
    page = ROOT / "docs" / "benchmarks.md"
    insert(page, "gpu checks", checks_table(results))
    insert(page, "gpu times", times_table(results))


if __name__ == "__main__":
    main()
