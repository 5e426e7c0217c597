"""Two hosts, emulated by network namespaces, with two processes on each."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from subprocess import Popen

import pytest
import torch
from peft_dpzero import DPZeroConfig, make_plan
from peft_dpzero.release.journal import read_journal
from safetensors.torch import load_file

import distributed_run
from distributed_run import DIES_AT, LOGICAL_BATCH, STEPS, WIRE_DIRECTIONS, WIRE_STEPS
from emulated_hosts import PROCESSES_A_HOST, Host, Unavailable, two_hosts, wait_for
from launches import LAUNCH_TIMEOUT, Launched, distance

pytestmark = pytest.mark.cluster

PROCESSES = 2 * PROCESSES_A_HOST
# Seconds that a process waits for the others when the cable is out.
PATIENCE = 20
# What frames, acknowledgements and the launcher's own messages may add to the bytes that are sent.
OVERHEAD = 1.25

Hosts = tuple[Host, Host]


@pytest.fixture
def hosts(cable: Hosts) -> Iterator[Hosts]:
    """Both hosts; what a test leaves running on them ends with it."""
    yield cable
    for host in cable:
        host.kill()


@pytest.fixture(scope="module")
def cable() -> Iterator[Hosts]:
    with ExitStack() as stack:
        try:
            made = stack.enter_context(two_hosts())
        except Unavailable as reason:
            pytest.skip(f"no network namespaces: {reason}")
        yield made


def start(hosts: Hosts, folder: Path, *arguments: object, hidden: Path | None = None) -> list[Popen[str]]:
    """`distributed_run.py` on both; `hidden` as in `Host.start`, for the second."""
    script = str(distributed_run.__file__)
    return [
        host.start(folder / f"host-{host.number}.txt", script, folder, *arguments, hidden=hidden if number else None)
        for number, host in enumerate(hosts)
    ]


def run(hosts: Hosts, folder: Path, *arguments: object, hidden: Path | None = None) -> Launched:
    processes = start(hosts, folder, *arguments, hidden=hidden)
    wait_for(processes, LAUNCH_TIMEOUT)
    printed = "".join((folder / f"host-{host.number}.txt").read_text()[-3000:] for host in hosts)
    assert [process.returncode for process in processes] == [0, 0], printed
    return Launched(PROCESSES, folder)


def releases(folder: Path) -> int:
    return len(read_journal(folder / "dying" / "dpzero_journal").entries)


@pytest.fixture(scope="module")
def whole(cable: Hosts, tmp_path_factory: pytest.TempPathFactory) -> Launched:
    return run(cable, tmp_path_factory.mktemp("hosts"))


def test_four_ranks_on_two_hosts_end_bit_identical(whole: Launched) -> None:
    assert {(report["processes"], report["backend"]) for report in whole.reports()} == {(PROCESSES, "gloo")}
    first, *others = whole.tensors("whole")
    assert all(torch.equal(first[name], other[name]) for other in others for name in first)


def test_two_hosts_agree_with_one_process(whole: Launched, tmp_path: Path) -> None:
    single = distributed_run.make_trainer(tmp_path, world_size=1)
    single.train()
    start, end, alone = whole.tensors("start")[0], whole.tensors("whole")[0], distributed_run.trained(single)
    assert distance(start, alone) > 1e-3
    assert distance(end, alone) < 1e-5


def test_one_rank_of_one_host_journals_each_release_once(whole: Launched) -> None:
    assert [report["has_journal"] for report in whole.reports()] == [True, False, False, False]
    assert [line.get("step", "header") for line in whole.journal("whole")] == ["header", *range(STEPS)]


def test_what_crosses_the_cable_is_the_parameters_once_and_then_the_sums(hosts: Hosts, tmp_path: Path) -> None:
    run(hosts, tmp_path, "--wire")
    found = [json.loads((tmp_path / f"wire-{rank}.json").read_text()) for rank in range(PROCESSES)]
    sums = 8 * WIRE_DIRECTIONS
    # Ranks 0 and 1 are on one host. The tree of a broadcast crosses the cable twice, 0 → 2 and 1 → 3, and so do the
    # edges of the ring of an all-reduce, each with 2 (W − 1) / W of the tensor.
    step = 2 * sums + 2 * 2 * (PROCESSES - 1) / PROCESSES * sums
    start = 2 * 4 * found[0]["adapter"]
    for crossed in found:
        assert step <= crossed["steps"] / WIRE_STEPS <= OVERHEAD * step
        assert start <= crossed["start"] <= OVERHEAD * start


def test_a_cable_that_is_pulled_out_stops_both_hosts(hosts: Hosts, whole: Launched, tmp_path: Path) -> None:
    processes = start(hosts, tmp_path, "--die", "wait", "--timeout", PATIENCE)
    wait_for(tmp_path / "waiting", LAUNCH_TIMEOUT)
    with hosts[1].unplugged():
        (tmp_path / "waiting").unlink()
        wait_for(processes, LAUNCH_TIMEOUT)
    assert all(process.returncode != 0 for process in processes)
    assert releases(tmp_path) == DIES_AT
    resumed = run(hosts, tmp_path, "--resume")
    assert resumed.journal("dying") == whole.journal("whole")
    for ours, theirs in zip(resumed.tensors("resumed"), whole.tensors("whole"), strict=True):
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


@pytest.mark.parametrize("number", [0, 1])
def test_a_host_that_dies_stops_the_other_and_costs_nothing(hosts: Hosts, tmp_path: Path, number: int) -> None:
    processes = start(hosts, tmp_path, "--die", "wait", "--private")
    wait_for(tmp_path / "waiting", LAUNCH_TIMEOUT)
    hosts[number].kill()
    (tmp_path / "waiting").unlink()
    wait_for(processes, LAUNCH_TIMEOUT)
    assert all(process.returncode != 0 for process in processes)
    assert releases(tmp_path) == DIES_AT
    before = read_journal(tmp_path / "dying" / "dpzero_journal").entries
    run(hosts, tmp_path, "--resume", "--private")
    entries = read_journal(tmp_path / "dying" / "dpzero_journal").entries
    assert entries[:DIES_AT] == before
    assert [entry.step for entry in entries] == list(range(STEPS))
    plan = make_plan(DPZeroConfig(**distributed_run.OPTIONS), distributed_run.ROWS, LOGICAL_BATCH, STEPS)
    record = json.loads((tmp_path / "dying" / "privacy_record.json").read_text())
    assert record["epsilon"] == plan.epsilon()


def test_hosts_need_no_folder_in_common_until_there_is_a_checkpoint(
    hosts: Hosts, whole: Launched, tmp_path: Path
) -> None:
    processes = start(hosts, tmp_path, "--die", "exit", hidden=tmp_path)
    wait_for(processes, LAUNCH_TIMEOUT)
    assert releases(tmp_path) == DIES_AT
    resumed = run(hosts, tmp_path, "--resume", hidden=tmp_path)
    assert resumed.journal("dying") == whole.journal("whole")
    ours, theirs = load_file(tmp_path / "resumed-0.safetensors"), whole.tensors("whole")[0]
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
