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
from peft_dpzero.cli.app import run as command_line
from peft_dpzero.release.adapter import adapter_header
from peft_dpzero.release.frozen import frozen_header
from peft_dpzero.release.header import in_version
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForSequenceClassification

from release.releases import (
    ADAPTER,
    CARD,
    CONFIG,
    JOURNAL,
    LORA,
    RECORD,
    edit,
    edit_journal,
    failures,
    statuses,
    trained,
)
from release.test_journal import rechained
from tiny import arguments, tiny_dataset, tiny_model


@pytest.fixture(scope="module")
def honest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("honest")
    trained(folder)
    return folder


def test_an_honest_release_passes(honest: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = statuses(honest / "release")
    assert {name for name, status in found.items() if status != "ok"} == {"base", "replay"}
    assert set(statuses(honest / "release", honest / "base").values()) == {"ok"}
    assert command_line(["verify", str(honest / "release")]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert "whether the weights follow from the journal was not checked" in printed
    assert "a consistent forgery looks the same" in printed
    assert command_line(["verify", str(honest / "release"), "--base", str(honest / "base")]) == 0
    assert "the weights are a function of base, start and journal" in " ".join(capsys.readouterr().out.split())


def test_what_a_download_notes_beside_the_files_is_not_of_the_release(honest: Path, tmp_path: Path) -> None:
    release = shutil.copytree(honest / "release", tmp_path / "release")
    (release / ".cache" / "huggingface" / "download").mkdir(parents=True)
    (release / ".cache" / "huggingface" / "download" / "README.md.metadata").write_text("etag")
    assert not failures(release)


def test_a_journal_release_is_checked_by_replaying_it(honest: Path, tmp_path: Path) -> None:
    trained(tmp_path).save_journal(str(tmp_path / "journal"))
    found = statuses(tmp_path / "journal", tmp_path / "base")
    assert {name for name, status in found.items() if status != "ok"} == {"weights"}
    assert command_line(["replay", str(honest / "base"), str(tmp_path / "journal"), str(tmp_path / "made")]) == 0
    found = statuses(tmp_path / "made", tmp_path / "base")
    assert {name for name, status in found.items() if status != "ok"} == {"weights"}
    assert command_line(["replay", str(honest / "base"), str(tmp_path / "release"), str(tmp_path / "again")]) == 0
    assert set(statuses(tmp_path / "again", tmp_path / "base").values()) == {"ok"}


def test_another_base_is_told_but_not_another_head_that_training_replaced(honest: Path) -> None:
    def moved(name: str) -> nn.Module:
        model = tiny_model("classifier")
        with torch.no_grad():
            model.get_parameter(name).add_(0.5)
        return get_peft_model(model, LORA)

    assert failures(honest / "release", moved("bert.embeddings.LayerNorm.bias")) == {"base"}
    assert failures(honest / "release", moved("classifier.bias")) == set()


def test_a_base_in_half_precision_is_recognised_in_full(tmp_path: Path) -> None:
    tiny_model("classifier").to(torch.bfloat16).float().save_pretrained(tmp_path / "base")
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "base").to(torch.bfloat16)
    run = DPZeroTrainer(
        get_peft_model(model, LORA),
        arguments(tmp_path / "out", max_steps=2),
        train_dataset=tiny_dataset("classifier"),
        dpzero_config=DPZeroConfig(noise_multiplier=1.0, target_delta=1e-5, num_directions=2),
    )
    run.train()
    run.save_model(str(tmp_path / "release"))
    assert statuses(tmp_path / "release", tmp_path / "base")["base"] == "ok"


def test_what_cannot_be_hashed_is_said() -> None:
    model = tiny_model("classifier")
    trained_names = {"classifier.weight", "classifier.bias"}
    assert frozen_header(model, trained_names)["sha256"]
    model.bert.pooler.to("meta")
    assert frozen_header(model, trained_names) == {"sha256": None, "reason": "weights of the base were offloaded"}
    model = tiny_model("classifier")
    model.hf_quantizer = object()
    assert frozen_header(model, trained_names) == {"sha256": None, "reason": "the base was quantized"}


def test_a_release_of_an_older_version_is_checked_as_far_as_it_goes(honest: Path, tmp_path: Path) -> None:
    release = tmp_path / "release"
    shutil.copytree(honest / "release", release)
    edit(
        release / RECORD,
        lambda record: [record.pop("files"), record.pop("base_model"), record.update(format_version=1)],
    )

    def older(lines: list[dict[str, Any]]) -> None:
        lines[0]["header"] = in_version(lines[0]["header"], 2)

    edit_journal(release, older)
    checks = {check.name: check for check in verify(release, honest / "base")}
    assert {name for name, check in checks.items() if check.status != "ok"} == {"hashes", "adapter", "card", "base"}
    assert all(checks[name].reason == "made by an older version" for name in ("hashes", "adapter", "card", "base"))
    edit(release / CONFIG, lambda config: config.update(clipping_threshold=1.0))
    assert failures(release, honest / "base") == {"config"}


def test_a_pure_release_is_accounted_as_one(tmp_path: Path) -> None:
    trained(tmp_path, mechanism="laplace", target_delta=0, num_directions=1)
    checks = {check.name: check for check in verify(tmp_path / "release")}
    assert {name for name, check in checks.items() if check.status == "FAILED"} == set()


def test_a_release_under_replacement_is_accounted_as_one(tmp_path: Path) -> None:
    trained(tmp_path, neighboring="replace_one")
    checks = {check.name: check for check in verify(tmp_path / "release", tmp_path / "base")}
    assert {name for name, check in checks.items() if check.status != "ok"} == {"ε by RDP"}
    assert checks["ε by RDP"].reason == "Rényi DP does not cover this mechanism under this relation"
    assert "replace_one, of each example" in checks["guarantee"].reason


def test_a_configuration_that_peft_adds_to_with_each_model_is_the_same() -> None:
    lora = LoraConfig(task_type="SEQ_CLS", r=2, target_modules=["query"])
    first, second = (adapter_header(get_peft_model(tiny_model("classifier"), lora)) for _ in range(2))
    assert first == second


def test_names_that_an_older_journal_holds_twice_are_the_same(honest: Path, tmp_path: Path) -> None:
    release = shutil.copytree(honest / "release", tmp_path / "release")
    edit_journal(release, lambda lines: lines[0]["header"]["adapter"]["modules_to_save"].append("score"))
    assert not failures(release)


@pytest.fixture(scope="module")
def continued(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("continued")
    trained(folder)
    trained(folder, resume=True, steps=7)
    return folder


@pytest.mark.parametrize("changes", [{"deterministic": True}, {"neighboring": "replace_one"}, {"target_delta": 1e-9}])
def test_a_segment_with_other_settings_than_the_next_is_told(
    changes: dict[str, Any], continued: Path, tmp_path: Path
) -> None:
    release = shutil.copytree(continued / "release", tmp_path / "release")
    edit_journal(release, lambda lines: None)
    assert not failures(release, continued / "base")
    edit_journal(release, lambda lines: lines[0]["header"]["config"].update(changes))
    assert failures(release) == {"journal"}


def test_a_run_of_an_older_version_goes_on(tmp_path: Path) -> None:
    trained(tmp_path)
    path = tmp_path / "out" / "dpzero_journal"
    lines = [json.loads(line) for line in path.read_bytes().splitlines()[:-2]]
    lines[0]["header"] = in_version(lines[0]["header"], 2)
    path.write_bytes(rechained(lines))
    trained(tmp_path, resume=True)
    assert failures(tmp_path / "release", tmp_path / "base") == set()
    assert statuses(tmp_path / "release")["hashes"] == "ok"


def record(**changes: Any) -> Callable[[Path], None]:
    return lambda folder: edit(folder / RECORD, lambda content: content.update(changes))


def all_sigmas(folder: Path) -> None:
    for name in (RECORD, CARD, CONFIG):
        text = (folder / name).read_text()
        (folder / name).write_text(text.replace('noise_multiplier": 1.0', 'noise_multiplier": 2.0'))


def lines(folder: Path, change: Callable[[list[bytes]], list[bytes]]) -> None:
    path = folder / JOURNAL
    path.write_bytes(b"".join(change(path.read_bytes().splitlines(keepends=True))))


def scaled(folder: Path) -> None:
    path = folder / "adapter_model.safetensors"
    save_file({name: tensor * 1.01 for name, tensor in load_file(path).items()}, path, {"format": "pt"})


def raised_rate(folder: Path) -> None:
    edit_journal(folder, lambda entries: entries[2].update(lr=entries[2]["lr"] * 10))


def more_values(folder: Path) -> None:
    edit_journal(folder, lambda entries: entries[2]["values"].append(1234))


def values_as_floats(folder: Path) -> None:
    edit_journal(folder, lambda entries: entries[2].update(values=[float(value) for value in entries[2]["values"]]))


def fewer_steps_planned(folder: Path) -> None:
    edit_journal(folder, lambda entries: entries[0]["header"].update(steps=3))


TAMPERINGS: dict[str, tuple[Callable[[Path], Any], set[str]]] = {
    "ε lowered in the record": (record(epsilon=0.1), {"ε", "card"}),
    "σ raised everywhere but in the journal": (all_sigmas, {"hashes", "record", "config"}),
    "σ raised in the record": (record(noise_multiplier=3.0), {"record", "card"}),
    "delta raised": (record(delta=1e-3), {"record", "card"}),
    "unit renamed": (record(privacy_unit="user"), {"record", "card"}),
    "gaps hidden": (record(not_covered=[]), {"record", "card"}),
    "last entries removed": (lambda f: lines(f, lambda ls: ls[:-2]), {"hashes", "record", "ε", "journal", "replay"}),
    "middle entry removed": (lambda f: lines(f, lambda ls: ls[:2] + ls[3:]), {"journal", "record", "replay"}),
    "last line torn": (lambda f: lines(f, lambda ls: [*ls[:-1], ls[-1][:-9]]), {"journal", "record", "replay"}),
    "adapter swapped": (scaled, {"hashes", "weights", "replay"}),
    "start swapped": (
        lambda f: shutil.copyfile(f / "adapter_model.safetensors", f / "dpzero_start.safetensors"),
        {"hashes", "start", "replay"},
    ),
    "learning rate raised, all hashes redone": (raised_rate, {"replay"}),
    "a value more, all hashes redone": (more_values, {"journal"}),
    "values that are not integers, all hashes redone": (values_as_floats, {"journal"}),
    "more releases than planned, all hashes redone": (fewer_steps_planned, {"journal"}),
    "lora_alpha raised": (lambda f: edit(f / ADAPTER, lambda c: c.update(lora_alpha=8000)), {"hashes", "adapter"}),
    "extra pickle": (lambda f: torch.save({}, f / "training_args.bin"), {"files"}),
    "extra folder": (lambda f: shutil.copytree(f, f / "checkpoint-x"), {"files"}),
    "extra weights": (lambda f: save_file({"x": torch.ones(1)}, f / "model.safetensors"), {"hashes"}),
    "config changed": (lambda f: edit(f / CONFIG, lambda c: c.update(clipping_threshold=1.0)), {"config"}),
    "record gone": (lambda f: (f / RECORD).unlink(), {"guarantee", "journal", "weights"}),
    "journal gone": (lambda f: (f / JOURNAL).unlink(), {"hashes", "ε", "journal", "replay"}),
    "adapter gone": (lambda f: (f / "adapter_model.safetensors").unlink(), {"hashes", "weights"}),
}


@pytest.mark.parametrize("what", TAMPERINGS)
def test_tampering_is_caught(what: str, honest: Path, tmp_path: Path) -> None:
    tamper, caught = TAMPERINGS[what]
    release = tmp_path / "release"
    shutil.copytree(honest / "release", release)
    tamper(release)
    assert caught <= failures(release, honest / "base")
    assert command_line(["verify", str(release), "--base", str(honest / "base")]) == 1


@pytest.mark.parametrize("changes", [{"deterministic": True}, {"noise_multiplier": 0}])
def test_runs_without_privacy_are_told(changes: dict[str, Any], tmp_path: Path) -> None:
    trained(tmp_path, **changes)
    checks = {check.name: check for check in verify(tmp_path / "release")}
    assert {name for name, check in checks.items() if check.status == "FAILED"} == {"guarantee"}
    assert "NO privacy guarantee" in checks["guarantee"].reason
