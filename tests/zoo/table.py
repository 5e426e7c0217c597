"""Writes the table of docs/zoo.md, between its markers, from a run of every architecture.

PYTHONPATH=tests:benchmarks python tests/zoo/table.py [--page docs/zoo.md] [--jobs 2]
"""

from __future__ import annotations

import argparse
import logging
import multiprocessing
import os
import warnings
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch
import transformers

from tables import insert
from zoo.architectures import ARCHITECTURES, Architecture, attentions
from zoo.neighbors import ALL, SHORTCUTS, Finding
from zoo.test_zoo import DTYPES, examined

ROOT = Path(__file__).resolve().parents[2]
HEADER = ("architecture", "weights", "attention", "other rows", "what it does")


def main() -> None:
    """Runs everything; the page is written if all are equal or refused, or with what differs."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--page", type=Path, default=ROOT / "docs" / "zoo.md")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="architectures side by side")
    chosen = parser.parse_args()
    lines = ["| " + " | ".join(HEADER) + " |", "|---" * len(HEADER) + "|"]
    fresh = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(chosen.jobs, mp_context=fresh, initializer=_quietly) as pool:
        for made in pool.map(_lines_of, range(len(ARCHITECTURES))):
            print("\n".join(made), flush=True)
            lines += made
    insert(chosen.page, "zoo", "\n".join(lines))


def _quietly() -> None:
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)


def _lines_of(number: int) -> list[str]:
    return list(_lines(ARCHITECTURES[number]))


def _lines(architecture: Architecture) -> Iterator[str]:
    """A line for each outcome, with the dtypes and attentions that have it."""
    outcomes: dict[str, list[tuple[str, str]]] = {}
    for attention in attentions(architecture):
        for dtype in DTYPES:
            found = [_examined(architecture.name, dtype, attention, shortcuts) for shortcuts in SHORTCUTS]
            outcomes.setdefault(_worst(found), []).append((str(dtype).removeprefix("torch."), attention))
    for outcome, settings in outcomes.items():
        dtypes, kinds = (", ".join(dict.fromkeys(values)) for values in zip(*settings, strict=True))
        yield "| " + " | ".join((architecture.name, dtypes, kinds, outcome, architecture.notes)) + " |"


def _examined(name: str, dtype: torch.dtype, attention: str, shortcuts: str) -> Finding:
    try:
        return examined(name, dtype, attention, shortcuts, ALL)
    except Exception as error:  # One architecture that fails must not hide the others.
        return Finding("fails", type(error).__name__)


def _worst(found: list[Finding]) -> str:
    """What is said of a setting, with and without shortcuts."""
    worst = max(found, key=lambda one: (not one.independent, one.outcome == "refused", one.total))
    if worst.outcome == "fails":
        return f"**fails**: {worst.detail}"
    if worst.outcome == "differs":
        return f"**differ**: {worst.rows} rows, their sum by {worst.total:.1g} C ({worst.detail})"
    if worst.outcome == "refused":
        return "refused: " + worst.detail.replace("|", "/").replace("\n", " ")
    return "equal, one row at a time" if all(one.alone for one in found) else "equal"


if __name__ == "__main__":
    main()
