"""Each leak of a stock Trainer, found there by the same check that DPZeroTrainer passes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft_dpzero import DPZeroConfig, DPZeroTrainer
from transformers import Trainer

from tiny import arguments, tiny_dataset, tiny_model


@dataclass
class Run:
    """What is left of a finished run."""

    folder: Path
    trainer: Any
    output: Any
    console: str
    batches: list[list[int]]


class Watched(torch.utils.data.Dataset):  # type: ignore[type-arg]
    """A data set that notes which rows were read together."""

    def __init__(self) -> None:
        self.rows = list(tiny_dataset("classifier", 32))
        self.batches: list[list[int]] = []

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Any:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: list[int]) -> list[Any]:
        self.batches.append(list(indices))
        return [self.rows[i] for i in indices]


def finished(kind: type[Trainer], folder: Path, capsys: pytest.CaptureFixture[str]) -> Run:
    model = get_peft_model(
        tiny_model("classifier"), LoraConfig(task_type="SEQ_CLS", r=2, target_modules=["query", "value"])
    )
    data = Watched()
    extra = (
        {"dpzero_config": DPZeroConfig(noise_multiplier=1.0, target_delta=1e-5, num_directions=2)}
        if kind is DPZeroTrainer
        else {}
    )
    settings = arguments(folder, max_steps=24, logging_steps=8, save_strategy="steps", save_steps=8)
    trainer = kind(model, settings, train_dataset=data, **extra)
    output = trainer.train()
    trainer.save_model()
    return Run(folder, trainer, output, capsys.readouterr().out, data.batches)


def raw_loss(run: Run) -> bool:
    logged = any("loss" in log or "train_loss" in log for log in run.trainer.state.log_history)
    state = (run.folder / "checkpoint-24" / "trainer_state.json").read_text()
    return logged or '"loss"' in state or "loss'" in run.console or run.output.training_loss == run.output.training_loss


def token_counts(run: Run) -> bool:
    return run.trainer.state.total_flos > 0 or "total_flos" in run.output.metrics


def training_arguments(run: Run) -> bool:
    return any(run.folder.rglob("training_args.bin"))


def random_state(run: Run) -> bool:
    return any(run.folder.rglob("rng_state*"))


def fixed_batch_sizes(run: Run) -> bool:
    return len({len(batch) for batch in run.batches}) == 1


def everyone_once_an_epoch(run: Run) -> bool:
    epoch = [index for batch in run.batches[:8] for index in batch]
    return sorted(epoch) == list(range(32))


CHECKS = [raw_loss, token_counts, training_arguments, random_state, fixed_batch_sizes, everyone_once_an_epoch]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[type[Trainer], Run]:
    return {}


@pytest.mark.parametrize("leaks", CHECKS)
def test_stock_trainer_leaks_and_ours_does_not(
    leaks: Callable[[Run], bool],
    runs: dict[type[Trainer], Run],
    tmp_path_factory: pytest.TempPathFactory,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for kind in (Trainer, DPZeroTrainer):
        if kind not in runs:
            runs[kind] = finished(kind, tmp_path_factory.mktemp(kind.__name__), capsys)
    assert leaks(runs[Trainer])
    assert not leaks(runs[DPZeroTrainer])


def test_fixed_seeds_repeat_a_stock_run_but_not_ours(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    stock = [finished(Trainer, tmp_path / f"stock{i}", capsys).batches for i in range(2)]
    ours = [finished(DPZeroTrainer, tmp_path / f"ours{i}", capsys).batches for i in range(2)]
    assert stock[0] == stock[1]
    assert ours[0] != ours[1]


def test_empty_batches_are_normal_steps(tmp_path: Path) -> None:
    model = get_peft_model(tiny_model("classifier"), LoraConfig(task_type="SEQ_CLS", r=2, target_modules=["query"]))
    trainer = DPZeroTrainer(
        model,
        arguments(tmp_path, max_steps=12, per_device_train_batch_size=1),
        train_dataset=tiny_dataset("classifier", 64),
        dpzero_config=DPZeroConfig(noise_multiplier=1.0, target_delta=1e-5, num_directions=2, deterministic=True),
    )
    trainer.train()
    sampler = trainer._step.batches._sampler
    assert 0 in [sampler.draw(step).size for step in range(12)]
    assert len((tmp_path / "dpzero_journal").read_text().splitlines()) == 13


def test_a_saved_folder_holds_the_release_and_nothing_else(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = finished(DPZeroTrainer, tmp_path, capsys)
    run.trainer.save_model(str(tmp_path / "release"))
    assert {path.name for path in (tmp_path / "release").iterdir()} == {
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
        "dpzero_config.json",
        "privacy_record.json",
    }
