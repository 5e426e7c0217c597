"""Tunes all parameters, pushes the journal alone, and makes the model again. usage: hub_journal.py FOLDER"""

from __future__ import annotations

import sys
from pathlib import Path

from peft_dpzero import DPZeroConfig, DPZeroTrainer, verify
from peft_dpzero.cli.app import run
from safetensors.torch import load_file

from tiny import arguments, tiny_dataset, tiny_model

REPOSITORY = "user/tuned-model"


def main() -> None:
    folder = Path(sys.argv[1])
    model = tiny_model("causal_lm")
    model.save_pretrained(folder / "base")
    trainer = DPZeroTrainer(
        model,
        arguments(folder / "run", hub_model_id=REPOSITORY, hub_token="hf_secret"),
        train_dataset=tiny_dataset("causal_lm"),
        dpzero_config=DPZeroConfig(noise_multiplier=1.0, target_delta=1e-5, num_directions=2),
    )
    trainer.train()
    trainer.push_to_hub(format="journal")
    trainer.save_model(str(folder / "saved"))

    status = {check.name: check.status for check in verify(REPOSITORY, folder / "base")}
    assert {name for name, found in status.items() if found != "ok"} == {"adapter", "start", "weights"}, status
    assert run(["replay", str(folder / "base"), REPOSITORY, str(folder / "made")]) == 0
    saved, made = (load_file(folder / name / "model.safetensors") for name in ("saved", "made"))
    assert list(saved) == list(made)
    assert all(saved[name].equal(made[name]) for name in saved)


if __name__ == "__main__":
    main()
