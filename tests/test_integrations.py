"""The programs of `integrations/` run as a user would run them."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from peft_dpzero.release.numbers import rounded_up
from safetensors.torch import load_file

from tiny import RELEASE, tiny_model

INTEGRATIONS = Path(__file__).parents[1] / "integrations"
STEPS = 4
TIMEOUT = 240


def run(program: str, *arguments: object, launcher: tuple[str, ...] = ()) -> str:
    """Runs a program, alone or under a launcher, and returns what it printed."""
    command = [sys.executable, *launcher, str(INTEGRATIONS / program), *map(str, arguments)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true", "HF_HUB_OFFLINE": "1"}
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=TIMEOUT)
    assert result.returncode == 0, result.stderr[-3000:]
    return result.stdout


def check_release(folder: Path, steps: int, privacy: tuple[float, float], more: frozenset[str] = frozenset()) -> None:
    """The folder holds a release, with `more` files, and nothing else, made by `steps` steps within (ε, δ)."""
    assert {path.name for path in folder.iterdir()} == RELEASE | more
    record = json.loads((folder / "privacy_record.json").read_text())
    epsilon, delta = privacy
    assert (record["steps"], record["delta"]) == (steps, delta)
    assert 0.98 * epsilon < record["epsilon"] <= epsilon
    assert f"({rounded_up(record['epsilon']):g}, {delta:g})-differential privacy" in (folder / "README.md").read_text()
    assert len((folder / "dpzero_journal").read_text().splitlines()) == 1 + steps
    adapter = load_file(folder / "adapter_model.safetensors")
    # LoRA's B starts at zero, so it is the training that moved it.
    moved = [float(tensor.abs().max()) for name, tensor in adapter.items() if "lora_B" in name]
    assert moved
    assert min(moved) > 0


@pytest.fixture(scope="module")
def accelerate_run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    folder = tmp_path_factory.mktemp("accelerate")
    return folder, run("accelerate/train.py", "--output-dir", folder, "--steps", STEPS)


def test_own_loop_saves_a_release(accelerate_run: tuple[Path, str]) -> None:
    folder, printed = accelerate_run
    assert "processes 1 " in printed
    check_release(folder, STEPS, (2.0, 1e-5))


@pytest.mark.slow
def test_own_loop_goes_on_from_its_journal(accelerate_run: tuple[Path, str]) -> None:
    folder, _ = accelerate_run
    journal, adapter = folder / "dpzero_journal", folder / "adapter_model.safetensors"
    lines, whole = journal.read_bytes().splitlines(keepends=True), load_file(adapter)

    adapter.unlink()
    run("accelerate/train.py", "--output-dir", folder, "--steps", STEPS)
    assert journal.read_bytes().splitlines(keepends=True) == lines
    assert all(whole[name].equal(tensor) for name, tensor in load_file(adapter).items())

    journal.write_bytes(b"".join(lines[:-1]))
    run("accelerate/train.py", "--output-dir", folder, "--steps", STEPS)
    again = journal.read_bytes().splitlines(keepends=True)
    assert again[:-1] == lines[:-1]
    assert json.loads(again[-1])["values"] != json.loads(lines[-1])["values"]


@pytest.mark.slow
def test_own_loop_runs_under_accelerate_launch(tmp_path: Path) -> None:
    launcher = ("-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes=2", "--main_process_port=0")
    printed = run("accelerate/train.py", "--output-dir", tmp_path, "--steps", STEPS, launcher=launcher)
    assert printed.count("processes 2 ") == 1
    check_release(tmp_path, STEPS, (2.0, 1e-5))


@pytest.mark.skipif(find_spec("trl") is None, reason="TRL is not installed")
def test_sft_trainer_becomes_private(tmp_path: Path) -> None:
    printed = run("trl/train.py", "--output-dir", tmp_path, "--steps", STEPS)
    assert "loss on public data" in printed
    assert "'loss'" not in printed
    check_release(
        tmp_path, STEPS, (2.0, 1e-5), frozenset({"generation_config.json", "tokenizer.json", "tokenizer_config.json"})
    )


def test_what_a_model_writes_is_its_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(INTEGRATIONS / "generation"))
    overlap = importlib.import_module("overlap")
    model = tiny_model("causal_lm")
    ids = torch.tensor([[7, 8, 9, 0], [11, 12, 0, 0]])
    batch = {"input_ids": ids, "attention_mask": (ids > 0).long()}
    written = overlap.GreedyRouge(model, 3).written(model(**batch), batch)
    for row, prompt in zip(written, ([7, 8, 9], [11, 12]), strict=True):
        alone = torch.tensor([prompt])
        expected = model.generate(alone, max_new_tokens=3, min_new_tokens=3, do_sample=False, eos_token_id=None)
        assert row.tolist() == expected[0, len(prompt) :].tolist()


@pytest.mark.parametrize(
    ("written", "reference", "score"),
    [([3, 4], [3, 4], 1.0), ([3, 4], [4, 3], 0.5), ([3, 4, 5], [3, 5, -100], 0.8), ([3], [-100], 0.0)],
)
def test_rouge_l_is_the_f1_of_the_longest_common_subsequence(
    monkeypatch: pytest.MonkeyPatch, written: list[int], reference: list[int], score: float
) -> None:
    monkeypatch.syspath_prepend(str(INTEGRATIONS / "generation"))
    overlap = importlib.import_module("overlap")
    assert overlap.rouge_l(torch.tensor([written]), torch.tensor([reference])).item() == pytest.approx(score)
