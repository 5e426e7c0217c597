"""Fills in what the pages take from the code, and turns formulas into MathML, which browsers show without a script."""

from __future__ import annotations

import dataclasses
import re
from typing import Any

from latex2mathml.converter import convert
from peft_dpzero import DPZeroConfig

MARK = "<!-- the fields of DPZeroConfig -->"
# $$ … $$ stands apart, \\( … \\) in a line.
FORMULA = re.compile(r"\$\$(?P<block>.+?)\$\$|\\\((?P<inline>.+?)\\\)", re.DOTALL)


def on_page_markdown(markdown: str, **kwargs: Any) -> str:
    """Called by MkDocs for each page: the table of DPZeroConfig's fields goes where `MARK` stands."""
    rows = [f"| `{f.name}`<br>`{f.default!r}` | {f.metadata['help']} |" for f in dataclasses.fields(DPZeroConfig)]
    table = "\n".join(["| field, and its default | |", "|---|---|", *rows])
    return FORMULA.sub(_mathml, markdown.replace(MARK, table))


def _mathml(formula: re.Match[str]) -> str:
    if (block := formula["block"]) is not None:
        return f'<div class="formula">{convert(block.strip(), display="block")}</div>'
    return convert(formula["inline"])
