"""The tables of docs/benchmarks.md, written between its markers from what was measured."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

_PROFILED = {
    "minilm upper": "MiniLM, LoRA in the upper third, K = 64",
    "minilm lora": "MiniLM, LoRA, K = 1",
    "minilm full": "MiniLM, all, K = 1",
}
MARKED = "<!-- {0} -->\n(.*?)<!-- end of {0} -->"


def write(results: dict[str, Any], page: Path) -> None:
    """Replaces each marked table whose section was measured."""
    sections = results["sections"]
    made = {"headlines": _headlines(results), "times": _times(sections)}
    if "memory" in sections:
        made["memory"] = _memory(sections["memory"])
    if "scaling" in sections:
        made["scaling"] = _scaling(sections["scaling"])
    if "profile" in sections:
        made["profile"] = _profile(sections["profile"])
    for name, text in made.items():
        insert(page, name, text)


def insert(page: Path, name: str, text: str) -> None:
    """Replaces what is between the markers `name` of a page."""
    replacement = f"<!-- {name} -->\n{text}\n<!-- end of {name} -->"
    old = page.read_text(encoding="utf-8")
    page.write_text(re.sub(MARKED.format(name), lambda _: replacement, old, flags=re.DOTALL), encoding="utf-8")


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(header) + " |", "|---" + "|---:" * (len(header) - 1) + "|"]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in rows])


def spread(value: dict[str, float]) -> str:
    return f"{value['median']:.2f} ({value['min']:.2f} to {value['max']:.2f})"


def _headlines(results: dict[str, Any]) -> str:
    rows = [(f"`{key}`", spread(value)) for key, value in results.items() if key != "sections"]
    return table(("key", "median (min to max)"), rows)


def _times(sections: dict[str, Any]) -> str:
    rows = []
    for section, runs in sections.items():
        for run in runs.values():
            if not isinstance(run, dict) or "ours_over_floor" not in run:
                continue
            title = f"{section.replace('_', ', ')}, K = {run['num_directions']}"
            ours = f"{run['seconds']['ours']['median']:.3g}"
            rows.append((title, "floor", ours, f"{1 / run['ours_over_floor']['median']:.2f}"))
            others = [key for key in run if key.endswith("_over_ours")]
            rows += [(title, key.removesuffix("_over_ours"), ours, spread(run[key])) for key in others]
    return table(("model", "contender", "our seconds a step", "contender's time over ours"), rows)


def _memory(measured: dict[str, Any]) -> str:
    rows = []
    for name, values in measured.items():
        if isinstance(values, list) and name.startswith(("minilm", "gemma")):
            rows.append((name, f"{sorted(values)[len(values) // 2]:.0f}"))
    return table(("LoRA", "peak above the loaded weights, MiB"), rows)


def _scaling(found: dict[str, Any]) -> str:
    rows = [
        (f"seconds against {name}", f"{found[name]['slope']:.3g} each", f"R² = {found[name]['r_squared']:.4f}")
        for name in ("tokens", "directions")
    ]
    small, large = found["vocabulary"]["sizes"]
    for name, value in found["vocabulary"]["seconds_ratio"].items():
        rows.append((f"vocabulary of {large:,} over {small:,}, {name}", spread(value), ""))
    return table(("step's time", "", ""), rows)


def _profile(found: dict[str, Any]) -> str:
    parts = []
    for name, title in _PROFILED.items():
        rows = [(f"`{where}`", f"{share:.1%}") for where, share in found[name]["shares"].items()]
        parts.append(table((title, "share"), rows))
    return "\n\n".join(parts)
