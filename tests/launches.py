"""Launches of several processes on this machine, and what they leave."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from safetensors.torch import load_file
from torch import Tensor

import distributed_run

LAUNCH_TIMEOUT = 240


def launch(
    processes: int,
    *script_arguments: object,
    script: ModuleType = distributed_run,
    how: Sequence[str] = ("--multi_gpu",),
) -> subprocess.CompletedProcess[str]:
    """Runs `script` by `accelerate launch`; `how` are its own options."""
    command = [sys.executable, "-m", "accelerate.commands.launch", *how, f"--num_processes={processes}"]
    command += ["--main_process_port=0", str(script.__file__), *map(str, script_arguments)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=LAUNCH_TIMEOUT)


@dataclass
class Launched:
    processes: int
    folder: Path

    def tensors(self, name: str) -> list[dict[str, Tensor]]:
        return [load_file(self.folder / f"{name}-{rank}.safetensors") for rank in range(self.processes)]

    def reports(self) -> list[dict[str, Any]]:
        return [json.loads((self.folder / f"report-{rank}.json").read_text()) for rank in range(self.processes)]

    def journal(self, run: str) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (self.folder / run / "dpzero_journal").read_text().splitlines()]


def distance(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    assert a.keys() == b.keys()
    return max(float((a[name] - b[name]).abs().max()) for name in a)
