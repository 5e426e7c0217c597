"""Whatever has `requires_grad`: it moves, is restored exactly inside a step, saves, and loads with plain PEFT."""

from __future__ import annotations

import functools
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
from transformers import TrainerCallback

import load_adapter
from tiny import arguments, tiny_dataset, tiny_model

BERT = ["query", "value"]
LLAMA = ["q_proj", "v_proj"]


def bias_only(model: Any) -> Any:
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.endswith("bias"))
    return model


def full(model: Any) -> Any:
    return model


def peft(config: Any) -> Callable[[Any], Any]:
    return lambda model: get_peft_model(model, config)


CASES: dict[str, tuple[str, Callable[[Any], Any]]] = {
    "lora": ("causal_lm", peft(LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=LLAMA))),
    "lora_head": ("classifier", peft(LoraConfig(task_type="SEQ_CLS", r=2, target_modules=BERT))),
    "lora_started": (
        "classifier",
        peft(LoraConfig(task_type="SEQ_CLS", r=2, target_modules=BERT, init_lora_weights=False)),
    ),
    "lora_embedding": (
        "causal_lm",
        peft(LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["embed_tokens"])),
    ),
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
    "full": ("causal_lm", full),
}
WITHOUT_PEFT = (bias_only, full)
# LoRA's factors that move no output at the start, as PEFT makes them.
STILL = ("lora_A", "lora_embedding_B")


def logits_inputs(kind: str) -> dict[str, torch.Tensor]:
    ids = torch.tensor(tiny_dataset(kind, 3)["input_ids"][:])
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    return inputs | ({"decoder_input_ids": ids[:, :4].contiguous()} if kind == "seq2seq" else {})


class Restored(TrainerCallback):
    """Checks, between each step's passes and its update, that the model is as it was before the step."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.steps = 0

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        self.before = {name: value.clone() for name, value in self.model.state_dict().items()}

    def on_pre_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        for name, value in self.model.state_dict().items():
            assert torch.equal(value, self.before[name]), name
        self.steps += 1


def trained(case: str, folder: Path) -> Path:
    """Trains `case` and saves the base model, the result and its logits in `folder`."""
    kind, adapt = CASES[case]
    base = tiny_model(kind)
    base.save_pretrained(folder / "base")
    model = adapt(base)
    inputs = logits_inputs(kind)
    with torch.no_grad():
        untrained = model.eval()(**inputs).logits
    start = {name: (p.detach().clone(), p.requires_grad) for name, p in model.named_parameters()}
    restored = Restored(model)
    trainer = DPZeroTrainer(
        model,
        arguments(folder / "saved", max_steps=3, learning_rate=0.3, lr_scheduler_type="constant"),
        train_dataset=tiny_dataset(kind),
        dpzero_config=DPZeroConfig(noise_multiplier=0.5, target_delta=1e-5, num_directions=2),
        callbacks=[restored],
    )
    trainer.train()
    assert restored.steps == 3
    for name, parameter in model.named_parameters():
        value, trainable = start[name]
        moves = trainable and (case == "lora_started" or not any(still in name for still in STILL))
        assert torch.equal(parameter, value) != moves, name

    trainer.save_model()
    with torch.no_grad():
        logits = model.eval()(**inputs).logits
    assert (logits - untrained).abs().max() > 1e-4
    save_file(inputs | {"logits": logits.contiguous()}, folder / "logits.safetensors")
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Trains a case at its first use."""
    return functools.cache(lambda case: trained(case, tmp_path_factory.mktemp(case)))


@pytest.mark.parametrize("case", CASES)
def test_training_moves_what_is_trainable_restores_it_in_a_step_and_saves(
    case: str, folders: Callable[[str], Path]
) -> None:
    saved = {path.name for path in (folders(case) / "saved").iterdir()}
    plain = {"adapter_model.safetensors", "adapter_config.json"}
    assert plain <= saved if CASES[case][1] not in WITHOUT_PEFT else "model.safetensors" in saved


def test_saved_models_load_in_a_process_without_this_package(folders: Callable[[str], Path]) -> None:
    script = Path(load_adapter.__file__)
    command = [sys.executable, str(script), *(str(folders(case)) for case in CASES)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert f"{len(CASES)} models agree" in done.stdout
