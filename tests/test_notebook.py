"""The docs' notebook: it runs from the data to the Hub, and its outputs are those of one whole run."""

from __future__ import annotations

import json
import re
from pathlib import Path

import nbformat
import pytest

from run_notebook import NOTEBOOK, executed

ARCHIVE = NOTEBOOK.parents[1] / ".cache" / "vaderSentiment-3.3.2.tar.gz"
TINY = {"MINUTES": None, "STEPS": 5, "PUBLIC_TEXTS": 40, "START_STEPS": 2, "BASIS": 8, "HELD_OUT": 40}
OF_A_MACHINE = re.compile(r"(?<![.\w])/(?:home|root|tmp|work|usr|opt|Users)/|site-packages|127\.0\.0\.1|localhost")


@pytest.mark.slow
@pytest.mark.skipif(not ARCHIVE.exists(), reason=f"make {ARCHIVE.parent.name}/{ARCHIVE.name} fetches the data")
def test_the_notebook_runs(tmp_path: Path) -> None:
    cells = executed(TINY | {"OUTPUT": str(tmp_path / "run")}).cells
    shown = json.dumps([cell.get("outputs") for cell in cells])
    assert "differential privacy" in shown
    assert "FAILED" not in shown
    assert (tmp_path / "run" / "adapter_model.safetensors").exists()


def test_the_committed_outputs_are_of_one_run_and_name_no_place() -> None:
    cells = [cell for cell in nbformat.read(NOTEBOOK, as_version=4).cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    outputs = [output for cell in cells for output in cell.outputs]
    assert outputs
    assert not [output for output in outputs if output.output_type == "error" or output.get("name") == "stderr"]
    assert not OF_A_MACHINE.search(json.dumps(outputs, ensure_ascii=False))
