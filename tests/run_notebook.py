"""Executes docs/notebook.ipynb beside a Hub on loopback. As a program, it renews the notebook's outputs."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Any

import nbformat
from nbclient import NotebookClient
from nbformat import NotebookNode

from hub_server import HubServer

NOTEBOOK = Path(__file__).parents[1] / "docs" / "notebook.ipynb"
TIMEOUT = 900


def executed(parameters: dict[str, Any]) -> NotebookNode:
    """The notebook after a run with `parameters` in place of its own."""
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    cell = next(cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", ()))
    given = cell.source
    cell.source += "".join(f"\n{name} = {value!r}" for name, value in parameters.items())
    client = NotebookClient(notebook, timeout=TIMEOUT, resources={"metadata": {"path": NOTEBOOK.parent}})
    with HubServer() as hub, tempfile.TemporaryDirectory() as home:
        client.execute(env=environment(hub.endpoint, home))
    cell.source = given
    return notebook


def environment(endpoint: str, home: str) -> dict[str, str]:
    """Of a kernel that knows no Hub but the one on loopback."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    hub = {"HF_ENDPOINT": endpoint, "HF_TOKEN": "hf_any", "HF_HOME": home, "HF_HUB_DISABLE_XET": "1"}
    return kept | hub | {"NO_PROXY": "127.0.0.1"}


def main() -> None:
    notebook = executed({})
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)
        # Warnings name files of this machine.
        if "outputs" in cell:
            cell.outputs = [output for output in cell.outputs if output.get("name") != "stderr"]
    nbformat.write(notebook, NOTEBOOK)


if __name__ == "__main__":
    main()
