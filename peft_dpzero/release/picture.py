"""A picture for the card: ε spent over steps, and the released losses, drawn as SVG from the record alone."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any, NamedTuple

from peft_dpzero.mechanism.accountant import Accountant, Segment, first_releases
from peft_dpzero.release.numbers import rounded_up, thinned

PICTURE_NAME = "privacy.svg"
_WIDTH, _HEIGHT = 640, 220
_LEFT, _RIGHT, _TOP, _BOTTOM = 64, 24, 40, 40
_POINTS = 12
_MOST_LOSSES = 200
# So few points are drawn as dots, too: a single one has no line.
_FEW = 20
Point = tuple[float, float]


def save_picture(record: dict[str, Any], folder: Path) -> Path | None:
    """Writes `privacy.svg` and returns its path; None, and no file, where no ε is claimed or nothing was released."""
    path = folder / PICTURE_NAME
    if record["epsilon"] is None or not record["steps"]:
        path.unlink(missing_ok=True)
        return None
    charts = [_Chart("ε spent", "#1f5fa8", spending(record), 0.0, rounded_up(record["epsilon"]))]
    losses = [(float(step), loss) for step, loss in (record["released_losses"] or {}).items()]
    if losses:
        losses = [*thinned(losses, _MOST_LOSSES)]
        values = [0.0, *(loss for _, loss in losses)]
        charts.append(_Chart("training loss (noisy, within the ε)", "#a8501f", losses, min(values), max(values)))
    path.write_text(_svg(charts, record["steps"]), encoding="utf-8")
    return path


def spending(record: dict[str, Any]) -> list[Point]:
    """(step, ε after it) from no step to all, about a dozen points; each ε is an upper bound."""
    steps, total = int(record["steps"]), float(record["epsilon"])
    mechanism = record["mechanism"].rpartition("_")[2]
    accountant = Accountant(record["neighboring"], record["delta"], mechanism)
    segments = [Segment(**segment) for segment in record["segments"]]
    made = sorted({-(-steps * point // _POINTS) for point in range(1, _POINTS)} - {0, steps})
    between = [(step, accountant.quick_epsilon(first_releases(segments, step), total)) for step in made]
    return [(0.0, 0.0), *((float(step), min(epsilon, total)) for step, epsilon in between), (float(steps), total)]


class _Chart(NamedTuple):
    title: str
    color: str
    points: list[Point]
    low: float
    high: float


def _svg(charts: Sequence[_Chart], steps: int) -> str:
    height = _HEIGHT * len(charts)
    panels = "\n".join(_panel(chart, steps, number * _HEIGHT) for number, chart in enumerate(charts))
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {height}" width="{_WIDTH}" height="{height}" '
        'font-family="sans-serif" font-size="13" fill="#333">\n'
        f'<rect width="{_WIDTH}" height="{height}" fill="#fff"/>\n{panels}\n</svg>\n'
    )


def _panel(chart: _Chart, steps: int, offset: int) -> str:
    left, right = _LEFT, _WIDTH - _RIGHT
    high, low = offset + _TOP, offset + _HEIGHT - _BOTTOM
    span = (chart.high - chart.low) or 1.0
    places = [
        (f"{left + (right - left) * step / steps:.1f}", f"{low - (low - high) * (value - chart.low) / span:.1f}")
        for step, value in chart.points
    ]
    line = " ".join(map(",".join, places))
    dots = (f'<circle cx="{x}" cy="{y}" r="3" fill="{chart.color}"/>' for x, y in places if len(places) <= _FEW)
    return "\n".join(
        (
            f'<text x="{left}" y="{high - 16}" font-size="15">{escape(chart.title)}</text>',
            f'<path d="M{left},{high}V{low}H{right}" fill="none" stroke="#999"/>',
            f'<polyline points="{line}" fill="none" stroke="{chart.color}" stroke-width="2"/>',
            *dots,
            f'<text x="{left - 8}" y="{high + 5}" text-anchor="end">{chart.high:.4g}</text>',
            f'<text x="{left - 8}" y="{low + 5}" text-anchor="end">{chart.low:.4g}</text>',
            f'<text x="{left}" y="{low + 20}" text-anchor="middle">0</text>',
            f'<text x="{right}" y="{low + 20}" text-anchor="end">{steps} steps</text>',
        )
    )
