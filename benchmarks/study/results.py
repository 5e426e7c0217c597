"""One JSON file a run, whole or not there."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from workloads import ROOT

from .cells import Cell

Result = dict[str, Any]
PAGE = ROOT / "docs" / "study.md"


def atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Lets `write` make a file beside `path`, and puts it in its place once it is on the disk."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{os.getpid()}")
    write(part)
    with part.open("rb") as file:
        os.fsync(file.fileno())
    part.replace(path)


def path_of(cell: Cell, folder: Path) -> Path:
    """Where a cell's result lies."""
    return folder / "results" / f"{cell.name}.json"


def save(result: Result, path: Path) -> None:
    atomically(path, lambda part: part.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n"))


def read_all(folder: Path) -> list[Result]:
    """All results in `folder`, by name."""
    return [json.loads(path.read_text()) for path in sorted((folder / "results").glob("[!.]*.json"))]


def reported(page: Path) -> list[Result]:
    """The results that the report at `page` was made from."""
    gathered = page.with_suffix("") / "results.json"
    return json.loads(gathered.read_text()) if gathered.exists() else []


def gather(results: Iterable[Result], page: Path) -> None:
    """Gathers what a report at `page` is made from in one compact file."""
    lines = ",\n".join(json.dumps(result, ensure_ascii=False) for result in results)
    atomically(page.with_suffix("") / "results.json", lambda part: part.write_text(f"[\n{lines}\n]\n"))


def missing(cells: Iterable[Cell], folder: Path) -> list[Cell]:
    """The cells that have no result yet."""
    return [cell for cell in cells if not path_of(cell, folder).exists()]
