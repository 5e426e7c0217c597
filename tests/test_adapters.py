"""Whatever has `requires_grad`: it moves, is restored exactly inside a step, saves, and loads with plain PEFT."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import IA3Config, LoraConfig, PrefixTuningConfig, PromptTuningConfig, get_peft_model
from peft_dpzero import DPZeroConfig, DPZeroTrainer
from safetensors.torch import save_file

from tiny import arguments, tiny_dataset, tiny_model

BERT = ["query", "value"]
LLAMA = ["q_proj", "v_proj"]


def bias_only(model: Any) -> Any:
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.endswith("bias"))
    return model


def peft(config: Any) -> Callable[[Any], Any]:
    return lambda model: get_peft_model(model, config)


CASES: dict[str, tuple[str, Callable[[Any], Any]]] = {
    "lora": ("causal_lm", peft(LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=LLAMA))),
    "lora_head": ("classifier", peft(LoraConfig(task_type="SEQ_CLS", r=2, target_modules=BERT))),
    "modules_to_save": (
        "masked_lm",
        peft(LoraConfig(r=2, target_modules=BERT, modules_to_save=["cls"])),
    ),
    "prefix": ("causal_lm", peft(PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3))),
    "prefix_classifier": ("classifier", peft(PrefixTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=3))),
    "prompt": ("causal_lm", peft(PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3))),
    "ia3": (
        "causal_lm",
        peft(IA3Config(task_type="CAUSAL_LM", target_modules=[*LLAMA, "down_proj"], feedforward_modules=["down_proj"])),
    ),
    "tagger": ("tagger", peft(LoraConfig(task_type="TOKEN_CLS", r=2, target_modules=BERT))),
    "seq2seq": ("seq2seq", peft(LoraConfig(task_type="SEQ_2_SEQ_LM", r=2, target_modules=["q", "v"]))),
    "bias": ("classifier", bias_only),
    "full": ("causal_lm", lambda model: model),
}


def logits_inputs(kind: str) -> dict[str, torch.Tensor]:
    ids = torch.tensor(tiny_dataset(kind, 3)["input_ids"][:])
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    return inputs | ({"decoder_input_ids": ids[:, :4].contiguous()} if kind == "seq2seq" else {})


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("adapters")


@pytest.mark.parametrize("case", CASES)
def test_training_moves_restores_and_saves(case: str, root: Path) -> None:
    kind, adapt = CASES[case]
    folder = root / case
    base = tiny_model(kind)
    base.save_pretrained(folder / "base")
    model = adapt(base)
    frozen = {n: p.detach().clone() for n, p in model.named_parameters() if not p.requires_grad}
    start = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
    trainer = DPZeroTrainer(
        model,
        arguments(folder / "saved", max_steps=3, learning_rate=0.3),
        train_dataset=tiny_dataset(kind),
        dpzero_config=DPZeroConfig(noise_multiplier=0.5, target_delta=1e-5, num_directions=2),
    )

    def untouched(args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 0:
            for name, parameter in model.named_parameters():
                if name in start:
                    assert torch.equal(parameter, start[name]), name

    trainer.callback_handler.callbacks[0].on_pre_optimizer_step = untouched
    trainer.train()
    assert any(not torch.equal(p, start[n]) for n, p in model.named_parameters() if n in start)
    assert all(torch.equal(p, frozen[n]) for n, p in model.named_parameters() if n in frozen)

    trainer.save_model()
    inputs = logits_inputs(kind)
    with torch.no_grad():
        logits = model.eval()(**inputs).logits
    save_file(inputs | {"logits": logits.contiguous()}, folder / "logits.safetensors")


def test_saved_models_load_in_a_process_without_this_package(root: Path) -> None:
    folders = [str(path) for path in sorted(root.iterdir()) if (path / "logits.safetensors").exists()]
    assert len(folders) == len(CASES)
    script = str(Path(__file__).with_name("load_adapter.py"))
    done = subprocess.run([sys.executable, script, *folders], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert f"{len(CASES)} models agree" in done.stdout
