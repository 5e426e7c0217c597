"""Weights made again from base and journal alone."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftConfig, PrefixTuningConfig, get_peft_model
from peft_dpzero import DPZeroAdamW, DPZeroConfig, DPZeroError, DPZeroSGD, DPZeroTrainer, replay_journal, verify
from peft_dpzero.release.rebuild import rebuild
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSequenceClassification, BertForSequenceClassification, LlamaForCausalLM

from tiny import adapted, arguments, tiny_dataset, tiny_model


def trained(folder: Path, model: Any, kind: str, rule: str = "sgd", **changes: Any) -> DPZeroTrainer:
    """A private run with a schedule, momentum and weight decay in two groups of unequal learning rates."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups = [{"params": parameters[::2], "weight_decay": 0.1}, {"params": parameters[1::2], "lr": 0.03}]
    options = {"noise_multiplier": 1.0, "target_delta": 1e-5, "num_directions": 3} | changes
    run = DPZeroTrainer(
        model,
        arguments(folder, max_steps=6, warmup_steps=2),
        train_dataset=tiny_dataset(kind),
        dpzero_config=DPZeroConfig(**options),
        optimizers=(DPZeroAdamW(groups) if rule == "adamw" else DPZeroSGD(groups, lr=0.01, momentum=0.7), None),
    )
    run.train()
    run.save_model()
    return run


def same(saved: Path, made: Path, name: str = "model.safetensors") -> bool:
    ours, theirs = load_file(saved / name), load_file(made / name)
    return list(ours) == list(theirs) and all(torch.equal(ours[key], theirs[key]) for key in ours)


@pytest.mark.parametrize(
    ("adapter", "distribution"),
    [
        (LoraConfig(task_type="SEQ_CLS", r=2, target_modules=["query"]), "gaussian"),
        (PrefixTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=3), "sphere"),
    ],
)
def test_adapters_come_out_of_the_journal(adapter: PeftConfig, distribution: str, tmp_path: Path) -> None:
    base = tiny_model("classifier")
    base.save_pretrained(tmp_path / "base")
    trained(tmp_path / "run", get_peft_model(base, adapter), "classifier", direction_distribution=distribution)
    torch.manual_seed(77)
    fresh = get_peft_model(AutoModelForSequenceClassification.from_pretrained(tmp_path / "base"), adapter)
    replay_journal(fresh, tmp_path / "run").save_pretrained(tmp_path / "made")
    assert same(tmp_path / "run", tmp_path / "made", "adapter_model.safetensors")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_an_adapter_keeps_still_comes_out_too(dtype: torch.dtype, tmp_path: Path) -> None:
    base = tiny_model("classifier")
    base.save_pretrained(tmp_path / "base")
    model = adapted(base).to(dtype)
    trained(tmp_path / "run", model, "classifier")
    torch.manual_seed(77)
    rebuild(str(tmp_path / "base"), str(tmp_path / "run"), tmp_path / "made", None)
    assert same(tmp_path / "run", tmp_path / "made", "adapter_model.safetensors")
    checks = verify(tmp_path / "run", base=tmp_path / "base")
    assert {check.status for check in checks if check.name in ("base", "start", "replay")} == {"ok"}
    path = tmp_path / "run" / "dpzero_start.safetensors"
    save_file({name: 2 * tensor if "lora_A" in name else tensor for name, tensor in load_file(path).items()}, path)
    assert next(check.status for check in verify(tmp_path / "run") if check.name == "start") == "FAILED"


def test_a_start_may_hold_nothing_of_the_base(tmp_path: Path) -> None:
    model = adapted()
    trained(tmp_path, model, "classifier")
    path = tmp_path / "dpzero_start.safetensors"
    frozen = next((name, p) for name, p in model.named_parameters() if "word_embeddings" in name)
    save_file(load_file(path) | {frozen[0]: frozen[1].detach() + 1.0}, path)
    with pytest.raises(DPZeroError, match="does not fit"):
        replay_journal(adapted(), tmp_path)


@pytest.mark.parametrize("rule", ["sgd", "adamw"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_full_models_come_out_of_the_journal(dtype: torch.dtype, rule: str, tmp_path: Path) -> None:
    model = tiny_model("causal_lm")
    model.save_pretrained(tmp_path / "base")
    trained(tmp_path / "run", model.to(dtype), "causal_lm", rule, clipping_threshold=float("inf"), noise_multiplier=0)
    made = replay_journal(LlamaForCausalLM.from_pretrained(tmp_path / "base"), tmp_path / "run")
    made.to(dtype).save_pretrained(tmp_path / "made")
    assert same(tmp_path / "run", tmp_path / "made")
    assert not (tmp_path / "run" / "dpzero_start.safetensors").exists()


def test_another_start_is_refused(tmp_path: Path) -> None:
    model = tiny_model("classifier")
    trained(tmp_path, model, "classifier")
    with pytest.raises(DPZeroError, match="not those that the run started from"):
        replay_journal(model, tmp_path)
    with pytest.raises(DPZeroError, match="has no parameter"):
        replay_journal(tiny_model("causal_lm"), tmp_path)


@pytest.mark.slow
def test_the_command_line_rebuilds_a_release_in_a_new_process(tmp_path: Path) -> None:
    model = BertForSequenceClassification(tiny_model("classifier").config)
    model.save_pretrained(tmp_path / "base")
    trained(tmp_path / "run", model, "classifier").save_journal(str(tmp_path / "journal"))
    sizes = {path.name: path.stat().st_size for path in (tmp_path / "journal").iterdir()}
    claims = {"README.md", "dpzero_config.json", "dpzero_journal", "privacy.svg", "privacy_record.json"}
    assert set(sizes) == claims | {"config.json"}
    assert sum(sizes.values()) < 20_000
    command = [sys.executable, "-m", "peft_dpzero.cli.app", "replay"]
    paths = [str(tmp_path / name) for name in ("base", "journal", "made")]
    done = subprocess.run([*command, *paths], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert same(tmp_path / "run", tmp_path / "made")
    again = subprocess.run([*command, *paths], capture_output=True, text=True, check=False)
    assert again.returncode == 2
    assert "not an empty folder" in again.stderr
