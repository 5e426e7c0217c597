"""Draws docs/architecture.svg, the way that an example takes: `python docs/draw_architecture.py`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

WIDTH, HEIGHT = 1000, 450
SECRET, DOOR, PUBLIC, QUIET = "#fde7e7", "#fff3c4", "#e2f3e6", "#eef1f5"


@dataclass(frozen=True)
class Box:
    """A part of the package, or what goes in or comes out."""

    x: int
    y: int
    title: str
    lines: Sequence[str]
    width: int = 148
    height: int = 86

    def draw(self) -> Iterator[str]:
        yield (
            f'<rect x="{self.x}" y="{self.y}" width="{self.width}" height="{self.height}" rx="8" fill="#fff" '
            'stroke="#555"/>'
        )
        middle = self.x + self.width / 2
        yield f'<text x="{middle}" y="{self.y + 22}" text-anchor="middle" font-weight="bold">{self.title}</text>'
        for number, line in enumerate(self.lines):
            y = self.y + 42 + 16 * number
            yield f'<text x="{middle}" y="{y}" text-anchor="middle" font-size="12">{line}</text>'


ROW = 96
BOXES = {
    "data": Box(24, ROW, "your data", ["one example", "or one user"]),
    "draw": Box(196, ROW, "batches", ["joins with chance q;", "padded by itself"]),
    "losses": Box(368, ROW, "losses", ["at θ + λz and θ − λz,", "forward passes only"]),
    "sum": Box(560, ROW, "private_sum", ["clip, round, add up,", "exact noise:", "K integers"]),
    "optimizer": Box(752, ROW - 50, "optimizer", ["θ ← θ − η Σ ĝₖ zₖ"], width=224, height=66),
    "journal": Box(752, ROW + 30, "journal", ["written before it is used"], width=224, height=66),
    "release": Box(752, ROW + 110, "record, card, adapter", ["what is saved and pushed"], width=224, height=66),
    "z": Box(368, ROW + 126, "perturbation/", ["z from (seed, step, k);", "θ is never written"]),
    "checks": Box(24, 352, "checks/", ["may this run start?", "made-up rows only"], width=290, height=80),
    "training": Box(355, 352, "training/, cli/", ["drive step.py,", "see public values only"], width=290, height=80),
    "auditing": Box(686, 352, "auditing/", ["what do the releases", "give away?"], width=290, height=80),
}
ARROWS = (
    ("data", "draw", ""),
    ("draw", "losses", ""),
    ("losses", "sum", "dᵢₖ"),
    ("sum", "optimizer", ""),
    ("sum", "journal", ""),
    ("sum", "release", ""),
)


def arrow(start: Box, end: Box, label: str) -> Iterator[str]:
    """From the right side of a box to the left side of another."""
    x1, y1 = start.x + start.width, start.y + start.height / 2
    x2, y2 = end.x, end.y + end.height / 2
    yield f'<line x1="{x1}" y1="{y1}" x2="{x2 - 6}" y2="{y2}" stroke="#333" marker-end="url(#tip)"/>'
    if label:
        yield f'<text x="{(x1 + x2) / 2}" y="{(y1 + y2) / 2 - 8}" text-anchor="middle" font-size="11">{label}</text>'


def area(x: int, width: int, color: str, title: str, top: int = 16, height: int = 310) -> Iterator[str]:
    """A colored background and its name."""
    yield f'<rect x="{x}" y="{top}" width="{width}" height="{height}" rx="12" fill="{color}"/>'
    yield f'<text x="{x + 12}" y="{top + 20}" font-size="13" fill="#444">{title}</text>'


def picture() -> str:
    """The whole SVG."""
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-family="sans-serif" '
        'font-size="14">',
        '<defs><marker id="tip" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="8" markerHeight="8" orient="auto">'
        '<path d="M0 0 8 4 0 8z" fill="#333"/></marker></defs>',
        *area(8, 524, SECRET, "secret: estimation/"),
        *area(540, 188, DOOR, "the one door: mechanism/"),
        *area(736, 256, PUBLIC, "public: release/"),
        *area(8, 984, QUIET, "", 334, 110),
    ]
    for start, end, label in ARROWS:
        parts += arrow(BOXES[start], BOXES[end], label)
    z, losses = BOXES["z"], BOXES["losses"]
    middle = z.x + z.width / 2
    parts.append(
        f'<line x1="{middle}" y1="{z.y}" x2="{middle}" y2="{losses.y + losses.height + 6}" stroke="#333" '
        'marker-end="url(#tip)"/>'
    )
    for box in BOXES.values():
        parts += box.draw()
    return "\n".join([*parts, "</svg>", ""])


if __name__ == "__main__":
    Path(__file__).with_name("architecture.svg").write_text(picture(), encoding="utf-8")
