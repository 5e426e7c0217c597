"""Releases that hold what they claim, and each way to tamper with one."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft_dpzero import DPZeroConfig, DPZeroTrainer, verify
from peft_dpzero.cli import run as command_line
from safetensors.torch import load_file, save_file

from release.test_journal import rechained
from tiny import arguments, tiny_dataset, tiny_model


def trained(folder: Path, **changes: Any) -> None:
    torch.manual_seed(5)
    lora = LoraConfig(task_type="SEQ_CLS", r=2, target_modules=["query"])
    run = DPZeroTrainer(
        get_peft_model(tiny_model("classifier"), lora),
        arguments(folder / "out", max_steps=5),
        train_dataset=tiny_dataset("classifier"),
        dpzero_config=DPZeroConfig(
            **({"noise_multiplier": 1.0, "target_delta": 1e-5, "num_directions": 2} | changes),
        ),
    )
    run.train()
    run.save_model(str(folder / "release"))


@pytest.fixture(scope="module")
def honest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("honest")
    tiny_model("classifier").save_pretrained(folder / "base")
    trained(folder)
    return folder


def statuses(release: Path, base: Path | None = None) -> dict[str, str]:
    return {check.name: check.status for check in verify(release, base)}


def test_an_honest_release_passes(honest: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = statuses(honest / "release")
    assert {name for name, status in found.items() if status != "ok"} == {"replay"}
    assert set(statuses(honest / "release", honest / "base").values()) == {"ok"}
    assert command_line(["verify", str(honest / "release")]) == 0
    assert "holds what it claims" in capsys.readouterr().out


def test_a_journal_release_is_checked_by_replaying_it(honest: Path, tmp_path: Path) -> None:
    trained(tmp_path)
    release = tmp_path / "release"
    (release / "adapter_model.safetensors").unlink()
    assert statuses(release, honest / "base")["weights"] == "FAILED"


def test_a_pure_release_is_accounted_as_one(tmp_path: Path) -> None:
    trained(tmp_path, mechanism="laplace", target_delta=0, num_directions=1)
    checks = {check.name: check for check in verify(tmp_path / "release")}
    assert {name for name, check in checks.items() if check.status == "FAILED"} == set()
    assert checks["ε by PLD"].status == "ok"


def edited(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def record(**changes: Any) -> Callable[[Path], None]:
    return lambda folder: edited(folder / "privacy_record.json", **changes)


def all_epsilons(folder: Path) -> None:
    claimed = json.loads((folder / "privacy_record.json").read_text())["epsilon"]
    for name in ("privacy_record.json", "README.md"):
        text = (folder / name).read_text()
        assert repr(claimed) in text
        (folder / name).write_text(text.replace(repr(claimed), "0.125"))


def all_sigmas(folder: Path) -> None:
    for name in ("privacy_record.json", "README.md", "dpzero_config.json"):
        text = (folder / name).read_text()
        (folder / name).write_text(text.replace('noise_multiplier": 1.0', 'noise_multiplier": 2.0'))


def lines(folder: Path, change: Callable[[list[bytes]], list[bytes]]) -> None:
    path = folder / "dpzero_journal"
    path.write_bytes(b"".join(change(path.read_bytes().splitlines(keepends=True))))


def scaled(folder: Path) -> None:
    path = folder / "adapter_model.safetensors"
    save_file({name: tensor * 1.01 for name, tensor in load_file(path).items()}, path, {"format": "pt"})


def raised_rate(folder: Path) -> None:
    """The learning rate of an entry raised, and every hash that does not need the base recomputed."""
    path = folder / "dpzero_journal"
    entries = [json.loads(line) for line in path.read_bytes().splitlines()]
    entries[2]["lr"] *= 10
    path.write_bytes(rechained(entries))
    head = json.loads(path.read_bytes().splitlines()[-1])["sha256"]
    edited(folder / "privacy_record.json", journal={"entries": 5, "sha256": head})


TAMPERINGS: dict[str, tuple[Callable[[Path], Any], set[str]]] = {
    "ε lowered in the record": (record(epsilon=0.1), {"ε by PLD", "card"}),
    "ε lowered everywhere": (all_epsilons, {"ε by PLD"}),
    "σ raised everywhere but in the journal": (all_sigmas, {"ε by PLD", "journal settings"}),
    "σ raised in the record": (record(noise_multiplier=3.0), {"record", "config", "card"}),
    "delta raised": (record(delta=1e-3), {"ε by PLD", "config", "card", "journal settings"}),
    "guarantee hidden": (record(deterministic=True), {"guarantee", "config", "card", "journal settings"}),
    "last entries removed": (lambda f: lines(f, lambda ls: ls[:-2]), {"journal", "journal settings", "replay"}),
    "middle entry removed": (lambda f: lines(f, lambda ls: ls[:2] + ls[3:]), {"journal", "replay"}),
    "last line torn": (lambda f: lines(f, lambda ls: [*ls[:-1], ls[-1][:-9]]), {"journal", "replay"}),
    "adapter swapped": (scaled, {"weights", "replay"}),
    "start swapped": (
        lambda f: shutil.copyfile(f / "adapter_model.safetensors", f / "dpzero_start.safetensors"),
        {"start", "replay"},
    ),
    "learning rate raised, all hashes redone": (raised_rate, {"replay"}),
    "extra pickle": (lambda f: torch.save({}, f / "training_args.bin"), {"files"}),
    "extra folder": (lambda f: shutil.copytree(f, f / "checkpoint-3"), {"files"}),
    "config changed": (lambda f: edited(f / "dpzero_config.json", clipping_threshold=1.0), {"config"}),
    "record gone": (lambda f: (f / "privacy_record.json").unlink(), {"guarantee", "journal", "weights"}),
    "journal gone": (lambda f: (f / "dpzero_journal").unlink(), {"journal", "replay"}),
    "adapter gone": (lambda f: (f / "adapter_model.safetensors").unlink(), {"weights"}),
}


@pytest.mark.parametrize("what", TAMPERINGS)
def test_tampering_is_caught(what: str, honest: Path, tmp_path: Path) -> None:
    tamper, caught = TAMPERINGS[what]
    release = tmp_path / "release"
    shutil.copytree(honest / "release", release)
    tamper(release)
    failed = {name for name, status in statuses(release, honest / "base").items() if status == "FAILED"}
    assert caught <= failed
    assert command_line(["verify", str(release), "--base", str(honest / "base")]) == 1


@pytest.mark.parametrize("changes", [{"deterministic": True}, {"noise_multiplier": 0}])
def test_runs_without_privacy_are_told(changes: dict[str, Any], tmp_path: Path) -> None:
    trained(tmp_path, **changes)
    checks = {check.name: check for check in verify(tmp_path / "release")}
    assert {name for name, check in checks.items() if check.status == "FAILED"} == {"guarantee"}
    assert "NO privacy guarantee" in checks["guarantee"].reason
