"""What is saved is put in place as a whole, and known by name."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from peft_dpzero import DPZeroTrainer, verify
from peft_dpzero.release.bundle import is_released, is_tolerated
from peft_dpzero.release.staging import put_in_place, staging
from safetensors.torch import save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from release.releases import RECORD, failures, trained
from tiny import arguments, explicit, tiny_dataset, tiny_model


@pytest.mark.parametrize(
    "name",
    [
        "model-1-of-2.safetensors",
        "model-00001-of-00002.safetensors.tmp",
        "model-x/00001-of-00002.safetensors",
        "sub/adapter_model.safetensors",
        "sub/model-00001-of-00002.safetensors",
        "model-00001-of-00002.safetensors\n",
        "model-evil.safetensors",
        "training_args.bin",
    ],
)
def test_names_are_exact(name: str) -> None:
    assert not is_tolerated(name)
    assert is_released("model-00001-of-00002.safetensors")


def test_only_what_was_written_is_known(tmp_path: Path) -> None:
    folder = tmp_path / "out"
    (folder / "sub").mkdir(parents=True)
    for stray in ("model.safetensors", "config.json", "sub/adapter_model.safetensors"):
        (folder / stray).write_bytes(b"somebody's")
    run = trained(tmp_path)
    journal = folder / "dpzero_journal"
    before = journal.stat().st_ino
    run.save_model()
    assert run._written is not None
    saved, names = run._written
    assert saved == folder
    assert set(names) == {path.name for path in (tmp_path / "release").iterdir()}
    assert names[-2:] == ("README.md", RECORD)
    assert journal.stat().st_ino == before, "the journal that is written to stays"
    assert (folder / "model.safetensors").read_bytes() == b"somebody's"


def test_a_crash_while_files_are_put_in_place_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = trained(tmp_path)
    release, real = tmp_path / "release", os.replace
    older = tmp_path / "older"
    shutil.copytree(release, older)
    with torch.no_grad():
        for parameter in run.run.perturbation(run.model).parameters.values():
            parameter.add_(1.0)
    steps = len(list(release.iterdir()))
    for crash in range(1, steps):
        shutil.rmtree(release)
        shutil.copytree(older, release)
        made: list[Path] = []

        def dying(source: Path, target: Path, made: list[Path] = made, crash: int = crash) -> None:
            if len(made) == crash:
                raise KeyboardInterrupt
            made.append(target)
            real(source, target)

        monkeypatch.setattr(os, "replace", dying)
        with pytest.raises(KeyboardInterrupt):
            run.save_model(str(release))
        monkeypatch.setattr(os, "replace", real)
        weights = any(path.name == "adapter_model.safetensors" for path in made)
        assert bool(failures(release)) == weights, made
    run.save_model(str(release))
    assert not failures(release)


def test_what_a_killed_process_left_goes_with_the_next_save(tmp_path: Path) -> None:
    left = tmp_path / ".dpzero-unfinished-abc"
    left.mkdir()
    (left / "half").write_text("")
    with staging(tmp_path) as staged:
        assert not left.exists()
        (staged / "file").write_text("new")
        assert put_in_place(staged, tmp_path) == ("file",)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_parts_of_an_older_model_go(tmp_path: Path) -> None:
    save_file({"x": torch.ones(1)}, tmp_path / "model-00001-of-00002.safetensors")
    run = DPZeroTrainer(
        tiny_model("classifier"),
        arguments(tmp_path, max_steps=1),
        train_dataset=tiny_dataset("classifier"),
        dpzero_config=explicit(noise_multiplier=1.0, target_delta=1e-5, num_directions=2),
    )
    run.train()
    run.save_model()
    assert not failures(tmp_path)
    assert not (tmp_path / "model-00001-of-00002.safetensors").exists()


def test_a_release_has_its_tokenizer_and_checkpoints_beside_it_do_not_count(tmp_path: Path) -> None:
    words = {"[UNK]": 0, "[PAD]": 1, **{f"w{i}": i + 2 for i in range(30)}}
    raw = Tokenizer(WordLevel(words, unk_token="[UNK]"))
    PreTrainedTokenizerFast(tokenizer_object=raw, unk_token="[UNK]", pad_token="[PAD]").save_pretrained(
        tmp_path / "base"
    )
    run = DPZeroTrainer(
        tiny_model("classifier"),
        arguments(tmp_path / "out", max_steps=2, save_strategy="steps", save_steps=1),
        train_dataset=tiny_dataset("classifier"),
        processing_class=AutoTokenizer.from_pretrained(tmp_path / "base"),
        dpzero_config=explicit(noise_multiplier=1.0, target_delta=1e-5),
    )
    run.train()
    run.save_model()
    assert AutoTokenizer.from_pretrained(tmp_path / "out")("w3")["input_ids"] == [5]
    assert str(tmp_path) not in "".join(p.read_text() for p in (tmp_path / "out").glob("tokenizer*.json"))
    assert (tmp_path / "out" / "checkpoint-2").is_dir()
    assert not [check for check in verify(tmp_path / "out") if check.status == "FAILED"]
    assert {"tokenizer.json", "tokenizer_config.json"} <= json.loads((tmp_path / "out" / RECORD).read_text())[
        "files"
    ].keys()
