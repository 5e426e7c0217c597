"""One of four processes on one machine is ended by SIGKILL in the middle of a step."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft_dpzero.release.journal import read_journal

from distributed_run import DIES_AT
from launches import Launched, launch

pytestmark = pytest.mark.cluster

PROCESSES = 4


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Launched:
    folder = tmp_path_factory.mktemp("whole")
    result = launch(PROCESSES, folder)
    assert result.returncode == 0, result.stderr[-3000:]
    return Launched(PROCESSES, folder)


@pytest.mark.parametrize("way", ["unsent", "sent"])
def test_a_killed_rank_stops_the_others_and_costs_nothing(whole: Launched, tmp_path: Path, way: str) -> None:
    assert launch(PROCESSES, tmp_path, "--die", way).returncode != 0
    journal = tmp_path / "dying" / "dpzero_journal"
    # What was sent before the kill may still be released, once.
    assert len(read_journal(journal).entries) in {DIES_AT, DIES_AT + (way == "sent")}
    result = launch(PROCESSES, tmp_path, "--resume")
    assert result.returncode == 0, result.stderr[-3000:]
    resumed = Launched(PROCESSES, tmp_path)
    assert resumed.journal("dying") == whole.journal("whole")
    for ours, theirs in zip(resumed.tensors("resumed"), whole.tensors("whole"), strict=True):
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
