"""Fills in what the pages take from the code."""

from __future__ import annotations

import dataclasses
from typing import Any

from peft_dpzero import DPZeroConfig

MARK = "<!-- the fields of DPZeroConfig -->"


def on_page_markdown(markdown: str, **kwargs: Any) -> str:
    """Called by MkDocs for each page: puts the table of DPZeroConfig's fields where `MARK` stands."""
    rows = [f"| `{f.name}` | `{f.default!r}` | {f.metadata['help']} |" for f in dataclasses.fields(DPZeroConfig)]
    return markdown.replace(MARK, "\n".join(["| field | default | |", "|---|---|---|", *rows]))
