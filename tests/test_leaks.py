"""Each leak of a stock Trainer, found there by the same check that DPZeroTrainer passes."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.data_loader import BatchSamplerShard
from peft_dpzero import DPZeroConfig, DPZeroError, DPZeroTrainer
from peft_dpzero.estimation.batching import LogicalBatches
from peft_dpzero.estimation.sampling import PoissonSampler, new_secret
from peft_dpzero.estimation.shapes import Shapes
from torch.utils.data import BatchSampler, DataLoader, SequentialSampler
from transformers import Trainer, TrainerCallback

from tiny import RELEASE, adapted, arguments, drawn_values, tiny_dataset, tiny_model

Kind = type[Trainer]
PUBLIC_LOGS = {
    "learning_rate",
    "grad_norm",
    "epsilon",
    "clipping_threshold",
    "epoch",
    "step",
    "train_runtime",
    "train_samples_per_second",
    "train_steps_per_second",
}
CHECKPOINT = RELEASE | {"optimizer.pt", "scheduler.pt", "trainer_state.json"}
TOKEN = "hf_canary"
# Ten digits, which no hash and no released value holds by chance.
SEED = 2718281828


class Watched(torch.utils.data.Dataset):  # type: ignore[type-arg]
    """A data set that notes which rows were read."""

    def __init__(self, count: int = 32) -> None:
        self.rows = list(tiny_dataset("classifier", count))
        self.read: list[int] = []

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Any:
        self.read.append(index)
        return self.rows[index]


class Pace(TrainerCallback):
    """Notes how many rows had been read at the start and at the end of each step."""

    def __init__(self, data: Watched) -> None:
        self.data = data
        self.starts: list[int] = []
        self.ends: list[int] = []

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        self.starts.append(len(self.data.read))

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self.ends.append(len(self.data.read))


@dataclass
class Run:
    """What is left of a finished run."""

    folder: Path
    trainer: Any
    output: Any
    console: str
    read: list[int]
    starts: list[int]
    ends: list[int]


def build(kind: Kind, folder: Path, data: Any, model: Any = None, **changes: Any) -> Any:
    callbacks = changes.pop("callbacks", None)
    collator = changes.pop("data_collator", None)
    private = {"dpzero_config": DPZeroConfig(noise_multiplier=1.0, target_delta=1e-5, num_directions=2)}
    return kind(
        adapted() if model is None else model,
        arguments(folder, **changes),
        train_dataset=data,
        data_collator=collator,
        callbacks=callbacks,
        **(private if issubclass(kind, DPZeroTrainer) else {}),
    )


def finished(kind: Kind, folder: Path, capsys: pytest.CaptureFixture[str]) -> Run:
    data = Watched()
    pace = Pace(data)
    saving = {"logging_steps": 8, "save_strategy": "steps", "save_steps": 8}
    trainer = build(kind, folder, data, max_steps=24, seed=SEED, hub_token=TOKEN, callbacks=[pace], **saving)
    output = trainer.train()
    trainer.save_model()
    trainer.create_model_card()
    return Run(folder, trainer, output, capsys.readouterr().out, data.read, pace.starts, pace.ends)


def loss_in_logs(run: Run) -> bool:
    return any({"loss", "train_loss"} & set(log) for log in run.trainer.state.log_history)


def loss_in_saved_state(run: Run) -> bool:
    return 'loss"' in (run.folder / "checkpoint-24" / "trainer_state.json").read_text()


def loss_on_console(run: Run) -> bool:
    assert "learning_rate" in run.console
    return "loss" in run.console


def loss_in_output(run: Run) -> bool:
    return run.output.training_loss is not None or "train_loss" in run.output.metrics


def token_counts(run: Run) -> bool:
    saved = json.loads((run.folder / "checkpoint-24" / "trainer_state.json").read_text())
    return run.trainer.state.total_flos > 0 or saved["total_flos"] > 0 or "total_flos" in run.output.metrics


def logs_that_are_not_public(run: Run) -> bool:
    return any(set(log) - PUBLIC_LOGS for log in run.trainer.state.log_history)


def training_arguments(run: Run) -> bool:
    return any(run.folder.rglob("training_args.bin"))


def is_in_a_file(text: str, run: Run) -> bool:
    return any(text.encode() in path.read_bytes() for path in run.folder.rglob("*") if path.is_file())


def hub_token(run: Run) -> bool:
    return is_in_a_file(TOKEN, run)


def seed(run: Run) -> bool:
    return is_in_a_file(str(SEED), run)


def random_state(run: Run) -> bool:
    return any(run.folder.rglob("rng_state*"))


def more_than_the_release(run: Run) -> bool:
    run.trainer.save_model(str(run.folder / "release"))
    names = {path.name for path in (run.folder / "release").iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors"} <= names
    return bool(names - RELEASE or {path.name for path in (run.folder / "checkpoint-24").iterdir()} - CHECKPOINT)


def fixed_batch_sizes(run: Run) -> bool:
    return all(read % 4 == 0 for read in run.ends)


def everyone_once_an_epoch(run: Run) -> bool:
    return sorted(run.read[:32]) == list(range(32))


def reading_ahead(run: Run) -> bool:
    assert len(run.ends) == 24
    return run.starts != [0, *run.ends[:-1]]


def restored_randomness(run: Run) -> bool:
    """Whether a checkpoint that holds RNG states, wherever it comes from, rolls the global one back."""
    checkpoint = run.folder.with_name(f"{run.folder.name}-state")
    checkpoint.mkdir()
    Trainer._save_rng_state(run.trainer, str(checkpoint))
    assert random_state(Run(checkpoint, None, None, "", [], [], []))
    torch.manual_seed(1)
    before = torch.get_rng_state()
    run.trainer._load_rng_state(str(checkpoint))
    return not torch.equal(before, torch.get_rng_state())


LEAKS = [
    loss_in_logs,
    loss_in_saved_state,
    loss_on_console,
    loss_in_output,
    token_counts,
    logs_that_are_not_public,
    training_arguments,
    hub_token,
    seed,
    random_state,
    more_than_the_release,
    fixed_batch_sizes,
    everyone_once_an_epoch,
    reading_ahead,
    restored_randomness,
]


@pytest.fixture(scope="module")
def runs() -> dict[Kind, Run]:
    return {}


@pytest.mark.parametrize("leaks", LEAKS)
def test_stock_trainer_leaks_and_ours_does_not(
    leaks: Callable[[Run], bool],
    runs: dict[Kind, Run],
    tmp_path_factory: pytest.TempPathFactory,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for kind in (Trainer, DPZeroTrainer):
        if kind not in runs:
            runs[kind] = finished(kind, tmp_path_factory.mktemp(kind.__name__), capsys)
    assert leaks(runs[Trainer])
    assert not leaks(runs[DPZeroTrainer])


def fixed_seeds_repeat_the_batches(kind: Kind, folder: Path) -> bool:
    seen = []
    for i in range(2):
        data = Watched()
        build(kind, folder / str(i), data, max_steps=8, seed=SEED, data_seed=SEED).train()
        seen.append(data.read)
    return seen[0] == seen[1]


def fixed_seeds_repeat_the_masks(kind: Kind, folder: Path) -> bool:
    """A collator that masks at random; all rows are in every batch, so that sampling changes nothing."""
    seen: list[list[list[float]]] = []
    for i in range(2):
        drawn: list[list[float]] = []

        def masking(rows: list[Any], drawn: list[list[float]] = drawn) -> dict[str, Any]:
            drawn.append(torch.rand(4).tolist())
            return {
                "input_ids": torch.tensor([row["input_ids"] for row in rows]),
                "labels": torch.tensor([row["label"] if "label" in row else row["labels"] for row in rows]),
            }

        size = {"max_steps": 2, "per_device_train_batch_size": 32}
        build(kind, folder / str(i), Watched(), seed=SEED, data_collator=masking, **size).train()
        seen.append(drawn)
    return seen[0] == seen[1]


def token_count_on_request(kind: Kind, folder: Path) -> bool:
    try:
        trainer = build(kind, folder, Watched(), include_num_input_tokens_seen=True, logging_steps=1)
    except DPZeroError:
        return False
    trainer.train()
    return trainer.state.num_input_tokens_seen > 0


def loss_depends_on_the_batchs_items(kind: Kind, folder: Path) -> bool:
    trainer = build(kind, folder, tiny_dataset("causal_lm"), tiny_model("causal_lm"))
    rows = torch.tensor(tiny_dataset("causal_lm", 2)["input_ids"][:])
    batch = {"input_ids": rows, "labels": rows}
    items = trainer._get_num_items_in_batch([batch], torch.device("cpu"))
    alone, among = (trainer.compute_loss(trainer.model, dict(batch), num_items_in_batch=n) for n in (items, 1000))
    return items is not None or not torch.equal(alone, among)


class Buckets(torch.nn.Module):
    """In place of DistributedDataParallel."""

    def __init__(self, module: torch.nn.Module, **kwargs: Any) -> None:
        super().__init__()


def wrapped_for_gradients(kind: Kind, folder: Path) -> bool:
    """Whether several processes would train under DDP, with buckets as large as what is trained."""
    trainer = build(kind, folder, Watched())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(trainer.accelerator), "multi_device", property(lambda self: True))
        patch.setattr(torch.nn.parallel, "DistributedDataParallel", Buckets)
        return isinstance(trainer.accelerator.prepare_model(trainer.model), Buckets)


def empty_batch_stops_it(kind: Kind, folder: Path) -> bool:
    if kind is Trainer:

        class PoissonSampled(Trainer):
            """As one would add Poisson sampling to a stock Trainer."""

            def get_train_dataloader(self) -> DataLoader[Any]:
                return DataLoader(
                    self.train_dataset,  # type: ignore[arg-type]
                    batch_sampler=[[0, 1], [], [2]],
                    collate_fn=self.data_collator,
                )

        trainer = build(PoissonSampled, folder, tiny_dataset("classifier"))
    else:
        # A step is empty with probability 0.36: 60 are not all filled but for a chance of 1e-12.
        pace = Pace(data := Watched(64))
        trainer = build(kind, folder, data, max_steps=60, per_device_train_batch_size=1, callbacks=[pace])
    try:
        done = trainer.train().global_step
    except IndexError:
        return True
    if kind is DPZeroTrainer:
        assert len(set(pace.ends)) < done == len((folder / "dpzero_journal").read_text().splitlines()) - 1
    return False


def examples_counted_twice(kind: Kind, folder: Path) -> bool:
    """A batch shared by 3 processes, of a size that they do not divide."""
    data = list(range(10))
    if kind is Trainer:
        batches = BatchSampler(SequentialSampler(data), batch_size=4, drop_last=False)
        shards = [BatchSamplerShard(batches, num_processes=3, process_index=rank) for rank in range(3)]
        seen = [i for shard in shards for batch in shard for i in batch]
    else:
        sampler = PoissonSampler(len(data), 1.0, new_secret())
        made = data, sampler, lambda rows: {"row": torch.tensor(rows)}, Shapes(expected_rows=4, most_rows=2)
        ranks = [LogicalBatches(*made, rank, 3) for rank in range(3)]
        seen = [row for rank in ranks for row in drawn_values(rank.draw(0), "row")]
    assert set(seen) == set(data)
    return len(seen) > len(set(seen))


TRAPS = [
    fixed_seeds_repeat_the_batches,
    fixed_seeds_repeat_the_masks,
    token_count_on_request,
    loss_depends_on_the_batchs_items,
    wrapped_for_gradients,
    empty_batch_stops_it,
    examples_counted_twice,
]


@pytest.mark.parametrize("falls_into", TRAPS)
def test_stock_trainer_falls_into_a_trap_and_ours_does_not(
    falls_into: Callable[[Kind, Path], bool], tmp_path: Path
) -> None:
    assert falls_into(Trainer, tmp_path / "stock")
    assert not falls_into(DPZeroTrainer, tmp_path / "ours")


@pytest.mark.slow
def test_noise_differs_although_every_seed_is_fixed(tmp_path: Path) -> None:
    values = []
    for i in range(2):
        torch.manual_seed(SEED)
        settings = {"per_device_train_batch_size": 32, "seed": SEED, "data_seed": SEED}
        build(DPZeroTrainer, tmp_path / str(i), Watched(), **settings).train()
        lines = (tmp_path / str(i) / "dpzero_journal").read_text().splitlines()[1:]
        values.append([json.loads(line)["values"] for line in lines])
    assert all(a != b for ones, others in zip(*values, strict=True) for a, b in zip(ones, others, strict=True))


def test_a_step_leaves_the_global_generator_alone(tmp_path: Path) -> None:
    states: list[torch.Tensor] = []

    class Notes(TrainerCallback):
        def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
            states.append(torch.get_rng_state())

        on_pre_optimizer_step = on_step_begin

    build(DPZeroTrainer, tmp_path, Watched(), callbacks=[Notes()]).train()
    assert len(states) == 6
    assert all(torch.equal(before, after) for before, after in zip(states[::2], states[1::2], strict=True))


def test_columns_that_the_model_does_not_take_never_reach_it_and_the_unit_is_the_example(tmp_path: Path) -> None:
    data = tiny_dataset("classifier").add_column("user", [i % 4 for i in range(64)])
    trainer = build(DPZeroTrainer, tmp_path, data)
    columns: set[str] = set()
    collate = trainer.data_collator
    trainer.data_collator = lambda rows: columns.update(*rows) or collate(rows)
    trainer.train()
    assert columns == {"input_ids", "attention_mask", "labels"}
    assert trainer.privacy_record()["privacy_unit"] == "example"
