"""Tiny releases for tests, and the hands of somebody who edits them and makes every hash anew."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from peft_dpzero import DPZeroTrainer, verify

from release.test_journal import rechained
from tiny import arguments, config, tiny_dataset, tiny_model

RECORD, CONFIG, ADAPTER = "privacy_record.json", "dpzero_config.json", "adapter_config.json"
CARD, JOURNAL = "README.md", "dpzero_journal"
LORA = LoraConfig(task_type="SEQ_CLS", r=2, target_modules=["query"])


def trained(folder: Path, resume: bool = False, steps: int = 5, **changes: Any) -> DPZeroTrainer:
    """A few steps of LoRA; the base goes to folder/base and the release to folder/release."""
    tiny_model("classifier").save_pretrained(folder / "base")
    torch.manual_seed(5)
    data = tiny_dataset("classifier")
    if "privacy_unit" in changes:
        data = data.add_column(changes["privacy_unit"], [f"u{row // 2}" for row in range(len(data))])
    run = DPZeroTrainer(
        get_peft_model(tiny_model("classifier"), LORA),
        arguments(folder / "out", max_steps=steps, logging_steps=2),
        train_dataset=data,
        dpzero_config=config(**changes),
    )
    run.train(resume_from_checkpoint=resume)
    run.save_model(str(folder / "release"))
    return run


def statuses(release: Path, base: Any = None) -> dict[str, str]:
    return {check.name: check.status for check in verify(release, base)}


def failures(release: Path, base: Any = None) -> set[str]:
    return {name for name, status in statuses(release, base).items() if status == "FAILED"}


def read(path: Path) -> dict[str, Any]:
    return dict(json.loads(path.read_text()))


def edit(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    content = read(path)
    change(content)
    path.write_text(json.dumps(content))


def reseal(folder: Path) -> None:
    """Makes the hashes in the record fit the files again."""

    def anew(record: dict[str, Any]) -> None:
        lines = [json.loads(line) for line in (folder / JOURNAL).read_bytes().splitlines()]
        record["journal"] = {"entries": sum("step" in line for line in lines), "sha256": lines[-1]["sha256"]}
        if "files" in record:
            record["files"] = {n: hashlib.sha256((folder / n).read_bytes()).hexdigest() for n in record["files"]}

    edit(folder / RECORD, anew)


def edit_journal(folder: Path, change: Callable[[list[dict[str, Any]]], Any]) -> None:
    """Changes a journal's lines and makes its chain and the record's hashes anew."""
    lines = [json.loads(line) for line in (folder / JOURNAL).read_bytes().splitlines()]
    change(lines)
    (folder / JOURNAL).write_bytes(rechained(lines))
    reseal(folder)


def paths_to(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Where a JSON value has something that can be changed."""
    if isinstance(value, dict) and value:
        return [found for key, inner in value.items() for found in paths_to(inner, (*path, key))]
    return [path]


def other(value: Any) -> Any:
    """A value of the same kind that is not the same."""
    match value:
        case bool():
            return not value
        case int() | float():
            return value * 2 + 1
        case str():
            return value + "x"
        case list() if value and isinstance(value[0], dict):
            key = next(iter(value[0]))
            return [{**value[0], key: other(value[0][key])}, *value[1:]]
        case list():
            return [*value, "x"]
        case dict():
            return {"x": 1}
        case _:
            return 7


def change_at(content: dict[str, Any], path: tuple[Any, ...]) -> None:
    for key in path[:-1]:
        content = content[key]
    content[path[-1]] = other(content[path[-1]])
