"""The Trainer's manners: batches, steps, logs, checkpoints, interruptions."""

from __future__ import annotations

import json
import traceback
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft_dpzero import (
    DPZeroConfig,
    DPZeroError,
    DPZeroOptimizer,
    DPZeroTrainer,
    DPZeroTrainerMixin,
    PrivateStep,
    PrivateStepError,
)
from transformers import Trainer, TrainerCallback

from tiny import arguments, tiny_dataset, tiny_model


def adapter() -> Any:
    torch.manual_seed(3)
    return get_peft_model(
        tiny_model("classifier"), LoraConfig(task_type="SEQ_CLS", r=2, target_modules=["query", "value"])
    )


def config(**changes: Any) -> DPZeroConfig:
    return DPZeroConfig(**({"noise_multiplier": 1.0, "target_delta": 1e-5, "num_directions": 2} | changes))


def trainer(folder: Path, model: Any = None, dpzero: DPZeroConfig | None = None, **changes: Any) -> DPZeroTrainer:
    keywords = {key: changes.pop(key) for key in list(changes) if key in KEYWORDS}
    keywords.setdefault("train_dataset", tiny_dataset("classifier"))
    return DPZeroTrainer(model or adapter(), arguments(folder, **changes), dpzero_config=dpzero or config(), **keywords)


KEYWORDS = {"train_dataset", "eval_dataset", "compute_metrics", "callbacks", "optimizers", "data_collator"}


def weights(model: Any) -> torch.Tensor:
    return torch.cat([p.detach().flatten().clone() for p in model.parameters() if p.requires_grad])


def journal(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "dpzero_journal").read_text().splitlines()][1:]


def test_epochs_and_accumulation_set_the_plan(tmp_path: Path) -> None:
    run = trainer(tmp_path, max_steps=-1, num_train_epochs=3, gradient_accumulation_steps=3)
    plan = run.privacy_plan
    assert (plan.expected_batch_size, plan.sample_rate, plan.steps) == (12, 12 / 64, 18)
    assert run.train().global_step == 18
    assert [entry["step"] for entry in journal(tmp_path)] == list(range(18))


def test_evaluation_metrics_and_schedule(tmp_path: Path) -> None:
    run = trainer(
        tmp_path,
        max_steps=4,
        logging_steps=1,
        warmup_steps=2,
        eval_strategy="steps",
        eval_steps=2,
        eval_dataset=tiny_dataset("classifier", 16),
        compute_metrics=lambda p: {"accuracy": float((np.argmax(p.predictions, 1) == p.label_ids).mean())},
    )
    run.train()
    logs = run.state.log_history
    assert [log["step"] for log in logs if "eval_accuracy" in log] == [2, 4]
    rates = [log["learning_rate"] for log in logs if "learning_rate" in log]
    assert rates == pytest.approx([0.0, 0.005, 0.01, 0.005])
    spent = [log["epsilon"] for log in logs if "epsilon" in log]
    assert spent == sorted(spent)
    assert all(log["grad_norm"] > 0 for log in logs if "grad_norm" in log)


def test_resumed_run_equals_the_uninterrupted_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = {"max_steps": 8, "save_strategy": "steps", "save_steps": 3}
    whole = adapter()
    trainer(tmp_path / "whole", whole, config(deterministic=True), **settings).train()

    class Stop(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 5:
                raise KeyboardInterrupt

    cut = trainer(tmp_path / "cut", adapter(), config(deterministic=True), callbacks=[Stop()], **settings)
    with pytest.raises(KeyboardInterrupt):
        cut.train()
    assert len(journal(tmp_path / "cut")) == 5

    model = adapter()
    resumed = trainer(tmp_path / "cut", model, config(deterministic=True), **settings)
    fresh: list[int] = []
    release = PrivateStep._release

    def noted(self: PrivateStep, step: int) -> Any:
        fresh.append(step)
        return release(self, step)

    monkeypatch.setattr(PrivateStep, "_release", noted)
    resumed.train(resume_from_checkpoint=True)
    assert fresh == [5, 6, 7]
    assert [entry["step"] for entry in journal(tmp_path / "cut")] == list(range(8))
    assert torch.equal(weights(model), weights(whole))


def test_a_folder_with_another_runs_journal_is_refused(tmp_path: Path) -> None:
    trainer(tmp_path, max_steps=2).train()
    with pytest.raises(DPZeroError, match="releases of an earlier run"):
        trainer(tmp_path, max_steps=2).train()
    with pytest.raises(DPZeroError, match="other settings"):
        trainer(tmp_path, dpzero=config(noise_multiplier=2.0), max_steps=2).train()


def test_a_checkpoint_without_its_journal_is_refused(tmp_path: Path) -> None:
    trainer(tmp_path, max_steps=2, save_strategy="steps", save_steps=1).train()
    (tmp_path / "dpzero_journal").unlink()
    with pytest.raises(DPZeroError, match="ε spent is unknown"):
        trainer(tmp_path, max_steps=2).train(resume_from_checkpoint=True)


@pytest.mark.parametrize("error", [KeyboardInterrupt, ZeroDivisionError])
def test_an_interrupted_step_restores_every_bit(error: type[BaseException], tmp_path: Path) -> None:
    model = adapter()
    start = weights(model)
    run = trainer(tmp_path, model)
    calls = 0
    losses = run.task.losses

    def failing(outputs: Any, batch: Any) -> torch.Tensor:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise error("CANARY 31337")
        return losses(outputs, batch)

    run.task.losses = failing
    expected = error if error is KeyboardInterrupt else PrivateStepError
    with pytest.raises(expected) as caught:
        run.train()
    assert torch.equal(weights(model), start)
    if expected is PrivateStepError:
        shown = "".join(traceback.format_exception(caught.value))
        assert "ZeroDivisionError" in shown
        assert "CANARY" not in shown


def test_optimizer_groups_keep_their_learning_rates(tmp_path: Path) -> None:
    model = adapter()
    head = [p for n, p in model.named_parameters() if p.requires_grad and "classifier" in n]
    rest = [p for n, p in model.named_parameters() if p.requires_grad and "classifier" not in n]
    before = [p.detach().clone() for p in rest]
    groups = [{"params": head, "lr": 0.5}, {"params": rest, "lr": 0.0}]
    trainer(tmp_path, model, optimizers=(DPZeroOptimizer(groups), None)).train()
    assert all(torch.equal(a, b) for a, b in zip(before, rest, strict=True))


def test_gradient_optimizers_are_refused(tmp_path: Path) -> None:
    model = adapter()
    run = trainer(tmp_path, model, optimizers=(torch.optim.AdamW(model.parameters()), None))
    with pytest.raises(DPZeroError, match="AdamW"):
        run.train()


def test_any_trainer_subclass_can_become_private(tmp_path: Path) -> None:
    class Mine(Trainer):
        def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
            super().log(logs | {"mine": 1.0}, *args, **kwargs)

    class MinePrivate(DPZeroTrainerMixin, Mine):
        pass

    run = MinePrivate(
        adapter(),
        arguments(tmp_path, logging_steps=1),
        train_dataset=tiny_dataset("classifier"),
        dpzero_config=config(),
    )
    run.train()
    assert all("mine" in log and "loss" not in log for log in run.state.log_history)


def test_a_raw_loss_is_logged_only_on_request_and_stated(tmp_path: Path) -> None:
    run = trainer(tmp_path, dpzero=config(train_loss="nonprivate"), logging_steps=1)
    run.train()
    assert all(log["loss"] > 0 for log in run.state.log_history if "learning_rate" in log)
    assert any("training loss" in gap for gap in run.privacy_record()["not_covered"])
