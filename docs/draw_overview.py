"""Draws docs/overview.svg, what a step does and what it costs: `python docs/draw_overview.py`.

The bars are medians of docs/benchmarks/cpu.json, which `make bench` writes.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterator, Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

from draw_architecture import DOOR, PUBLIC, QUIET, SECRET, Box, area, arrow

WIDTH, HEIGHT = 760, 352
AREAS = {SECRET: "secret", DOOR: "the one door", PUBLIC: "public, (ε, δ)-private"}
TEXTS = {
    "private rows": ["each joins a step by chance;", "its loss at two near points,", "forward passes only"],
    "one noisy sum": ["clipped and rounded,", "exact noise for ε and δ,", "nothing else passes"],
    "a few numbers a step": ["move the adapter, and fill", "journal, record and card:", "anybody can check them"],
}
BOXES = [Box(24 + 252 * i, 50, title, lines, 208) for i, (title, lines) in enumerate(TEXTS.items())]
NAMES = {"ours": "peft_dpzero", "opacus hooks": "DP-SGD (Opacus)", "reference": "DPZero as published"}
OURS, OTHERS = "#3f51b5", "#9aa3b5"
LEFT, RIGHT = 24, 400
LONGEST, THICK = 150, 24


def bars(x: int, y: int, title: str, values: Mapping[str, float], form: str) -> Iterator[str]:
    """Horizontal bars with their names before them and their values behind them."""
    yield f'<text x="{x}" y="{y}" font-size="14" font-weight="bold">{title}</text>'
    for number, (name, value) in enumerate(values.items()):
        top = y + 16 + number * (THICK + 10)
        length = LONGEST * value / max(values.values())
        yield f'<text x="{x + 138}" y="{top + 17}" font-size="13" text-anchor="end">{NAMES[name]}</text>'
        color = OURS if name == "ours" else OTHERS
        yield f'<rect x="{x + 146}" y="{top}" width="{length:.1f}" height="{THICK}" rx="3" fill="{color}"/>'
        yield f'<text x="{x + 152 + length:.1f}" y="{top + 17}" font-size="13">{value:{form}}</text>'


def picture(sections: dict[str, Any]) -> str:
    """The whole SVG."""
    seconds = {name: sections["minilm_lora"]["k1"]["seconds"][name]["median"] for name in NAMES}
    memory = {name: statistics.median(sections["memory"][f"minilm {name}"]) for name in NAMES}
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-family="sans-serif" '
        'font-size="15">',
        '<defs><marker id="tip" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="8" markerHeight="8" orient="auto">'
        '<path d="M0 0 8 4 0 8z" fill="#333"/></marker></defs>',
        f'<rect width="{WIDTH}" height="{HEIGHT}" rx="12" fill="#fff"/>',
    ]
    for box, (color, title) in zip(BOXES, AREAS.items(), strict=True):
        parts += area(box.x - 16, box.width + 32, color, title, 8, 148)
    parts += area(8, WIDTH - 16, QUIET, "a LoRA step of a MiniLM on 2 cores, about 256 rows", 168, 176)
    for start, end in pairwise(BOXES):
        parts += arrow(start, end, "")
    for box in BOXES:
        parts += box.draw()
    parts += bars(LEFT, 222, "seconds", seconds, ".1f")
    parts += bars(RIGHT, 222, "memory above the loaded weights, MiB", memory, ".0f")
    return "\n".join([*parts, "</svg>", ""])


if __name__ == "__main__":
    here = Path(__file__).parent
    measured = json.loads((here / "benchmarks" / "cpu.json").read_text(encoding="utf-8"))
    (here / "overview.svg").write_text(picture(measured["sections"]), encoding="utf-8")
