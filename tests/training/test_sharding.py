"""Frozen weights sharded by FSDP2 among four processes (gloo, CPU)."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate import ParallelismConfig
from peft import PeftModel
from peft_dpzero import DPZeroError, DPZeroTrainer, infer_task
from peft_dpzero.checks.passes import TriedModel
from peft_dpzero.cli.app import run as command_line
from peft_dpzero.estimation.losses import Losses
from peft_dpzero.estimation.preferences import DPOTask
from peft_dpzero.release.journal import read_journal
from peft_dpzero.training.sharding import UnitOrder, check_accelerator, check_sharded_run, sharding_asked
from torch import Tensor, nn

import launches
import sharded_run
from launches import Launched
from sharded_run import KILLED_IN, KINDS, STEPS
from tiny import adapted, arguments, config, tiny_model

PROCESSES = 4
BY_LAUNCHER = ["--use_fsdp", "--fsdp_version=2", "--fsdp_auto_wrap_policy=TRANSFORMER_BASED_WRAP"]
IN_TWO_GROUPS = [
    "--use_parallelism_config",
    "--parallelism_config_dp_replicate_size=2",
    "--parallelism_config_dp_shard_size=2",
]


launch = partial(launches.launch, PROCESSES, script=sharded_run)


class PlainTrainer(DPZeroTrainer):
    """One process, with plain passes."""

    def _tried(self, *args: Any) -> TriedModel:
        tried = super()._tried(*args)
        plain = Losses(self.model, self.task, self._prepare_inputs)
        return replace(tried, passes=replace(tried.passes, losses=plain))


@pytest.fixture(scope="module", params=[pytest.param(PROCESSES, marks=pytest.mark.slow)])
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sharded")
    result = launch(folder)
    assert result.returncode == 0, result.stderr[-6000:]
    return folder


@pytest.fixture(scope="module")
def kinds(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("kinds")
    result = launch(folder, "--kinds")
    assert result.returncode == 0, result.stderr[-6000:]
    return folder


@pytest.fixture(scope="module")
def reports(folder: Path) -> list[dict[str, Any]]:
    return Launched(PROCESSES, folder).reports()


@pytest.fixture(scope="module")
def single(tmp_path_factory: pytest.TempPathFactory) -> DPZeroTrainer:
    trainer = sharded_run.make_trainer(tmp_path_factory.mktemp("single"), trainer=PlainTrainer)
    trainer.train()
    return trainer


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def steps_of(folder: Path) -> list[int]:
    return [entry.step for entry in read_journal(folder / "dpzero_journal").entries]


def test_each_rank_holds_its_part_of_what_is_frozen_and_all_that_is_trained(reports: list[dict[str, Any]]) -> None:
    for report in reports:
        # Neither frozen and not sharded, nor trained and sharded.
        assert report["misplaced"] == []
        assert report["local"] == pytest.approx(report["whole"] / PROCESSES, rel=0.05)


def test_ranks_draw_unevenly_and_run_as_many_passes(reports: list[dict[str, Any]]) -> None:
    drawn = list(zip(*(report["drawn"] for report in reports), strict=True))
    assert any(min(step) == 0 < max(step) for step in drawn)
    # Two sides of two directions.
    expected = [4 * max(step) for step in drawn]
    assert [report["passes"] for report in reports] == [expected] * PROCESSES


def test_ranks_end_with_the_bits_of_one_process_of_plain_passes(folder: Path, single: DPZeroTrainer) -> None:
    assert all(same(one, sharded_run.trained(single)) for one in Launched(PROCESSES, folder).tensors("whole"))
    folders = (folder / "whole", Path(str(single.args.output_dir)))
    sharded, alone = (read_journal(where / "dpzero_journal") for where in folders)
    assert sharded.entries == alone.entries
    # Among others the hash of the base.
    assert sharded.segments == alone.segments


def test_ranks_agree_with_a_process_that_takes_shortcuts(folder: Path, tmp_path: Path) -> None:
    trainer = sharded_run.make_trainer(tmp_path)
    trainer.train()
    ended, sharded = sharded_run.trained(trainer), Launched(PROCESSES, folder).tensors("whole")[0]
    assert max(float((ended[name] - sharded[name]).abs().max()) for name in ended) < 1e-5


def test_losses_have_the_bits_of_the_whole_model(reports: list[dict[str, Any]], single: DPZeroTrainer) -> None:
    whole = sharded_run.losses_of(single, "causal_lm")
    assert [report["losses"] for report in reports] == [whole] * PROCESSES


@pytest.mark.cluster
@pytest.mark.parametrize("kind", KINDS)
def test_losses_of_other_models_and_units_do_too(kinds: Path, kind: str, tmp_path: Path) -> None:
    whole = sharded_run.losses_of(sharded_run.make_trainer(tmp_path, kind), kind)
    assert [report["losses"][kind] for report in Launched(PROCESSES, kinds).reports()] == [whole] * PROCESSES


@pytest.mark.cluster
@pytest.mark.parametrize("kind", ["kept", "in_two_groups"])
def test_units_that_stay_whole_and_replicas_change_nothing(kinds: Path, kind: str, single: DPZeroTrainer) -> None:
    assert all(same(one, sharded_run.trained(single)) for one in Launched(PROCESSES, kinds).tensors(kind))


@pytest.mark.cluster
def test_each_group_holds_the_weights_once(kinds: Path) -> None:
    for report in Launched(PROCESSES, kinds).reports():
        assert report["local"]["in_two_groups"] == pytest.approx(2 * report["local"]["kept"], rel=0.05)


def test_evaluation_is_that_of_one_process(reports: list[dict[str, Any]], single: DPZeroTrainer) -> None:
    # Ten rows among four processes: two are seen twice by the gathering, and left out of it.
    assert all(report["evaluated"] == reports[0]["evaluated"] for report in reports)
    assert reports[0]["evaluated"][1] == pytest.approx(single.evaluate()["eval_loss"], rel=1e-5)


@pytest.mark.cluster
def test_a_release_is_verified(kinds: Path, tmp_path: Path) -> None:
    tiny_model("causal_lm").save_pretrained(tmp_path)
    assert command_line(["verify", str(kinds / "private"), "--base", str(tmp_path)]) == 0


def test_a_release_loads_with_peft_alone(folder: Path) -> None:
    loaded = PeftModel.from_pretrained(tiny_model("causal_lm"), folder / "whole")
    kept = {name: p for name, p in loaded.named_parameters() if "lora_" in name}
    assert same(kept, Launched(PROCESSES, folder).tensors("whole")[0])


@pytest.mark.cluster
def test_what_is_left_open_is_measured_in_step(kinds: Path) -> None:
    record = json.loads((kinds / "private" / "privacy_record.json").read_text())
    assert record["chosen"]["source"] == "made-up rows"
    assert 0 < record["epsilon"] <= 4.0
    assert steps_of(kinds / "private") == list(range(STEPS))


@pytest.mark.cluster
def test_a_killed_rank_stops_the_others_and_the_run_goes_on(folder: Path, tmp_path: Path) -> None:
    assert launch(tmp_path, "--kill", how=BY_LAUNCHER + IN_TWO_GROUPS).returncode != 0
    assert steps_of(tmp_path / "killed") == list(range(KILLED_IN))
    result = launch(tmp_path, "--resume", how=BY_LAUNCHER)
    assert result.returncode == 0, result.stderr[-6000:]
    resumed, whole = Launched(PROCESSES, tmp_path).tensors("resumed"), Launched(PROCESSES, folder).tensors("whole")
    assert all(same(*pair) for pair in zip(resumed, whole, strict=True))
    journals = [read_journal(where / "dpzero_journal") for where in (tmp_path / "killed", folder / "whole")]
    assert journals[0].entries == journals[1].entries
    records = [json.loads((p / "privacy_record.json").read_text()) for p in (tmp_path / "killed", folder / "whole")]
    # PEFT writes a set of modules in any order.
    files = [record.pop("files") for record in records]
    assert records[0] == records[1]
    assert files[0].keys() == files[1].keys()


@pytest.mark.cluster
def test_a_row_that_one_rank_cannot_read_stops_all(tmp_path: Path) -> None:
    result = launch(tmp_path, "--bad-row", how=BY_LAUNCHER)
    assert result.returncode != 0
    assert "a private text" not in result.stdout + result.stderr
    assert "PrivateStepError" in result.stderr
    assert len(steps_of(tmp_path / "bad")) < STEPS


REFUSED = {
    "version": "FSDP1",
    "offload": "CPU offloading",
    "full": "get_peft_model",
    "compiled": "torch_compile",
    "public": "public_text",
    "minutes": "minutes",
    "batches": "even_batches",
    "no block": "transformer_layer_cls_to_wrap",
    "unknown block": "NoSuchLayer",
    "models": "different models",
    "again": "sharded already",
    "generate": "outside a pass",
    "tune_on": "tune_on",
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused_is_refused_on_all_ranks(reports: list[dict[str, Any]], name: str) -> None:
    for report in reports:
        assert REFUSED[name] in report["raised"][name]


def test_one_process_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DPZeroError, match="accelerate launch"):
        sharded_run.make_trainer(tmp_path, **sharded_run.SHARDED)


def of_two_processes(**changes: Any) -> Any:
    """What is looked at of a Trainer before its model is sharded."""
    model = adapted()
    trainer = {
        "accelerator": SimpleNamespace(num_processes=2),
        "args": SimpleNamespace(accelerator_config=SimpleNamespace(even_batches=True)),
        "model": model,
        "task": infer_task(model),
        "public_text": None,
        "dpzero_config": config(),
        "_compiles": False,
    }
    return SimpleNamespace(**(trainer | changes))


def test_dpo_is_refused() -> None:
    check_sharded_run(of_two_processes())
    with pytest.raises(DPZeroError, match="DPOTrainer runs its reference"):
        check_sharded_run(of_two_processes(task=DPOTask(0.1)))


@pytest.mark.parametrize(
    ("name", "told"), [("hf_quantizer", "load the base in bfloat16"), ("hf_device_map", "load it without one")]
)
def test_bases_that_were_quantized_or_placed_are_refused(name: str, told: str) -> None:
    trainer = of_two_processes()
    setattr(trainer.model.get_base_model(), name, {"": 0})
    with pytest.raises(DPZeroError, match=told):
        check_sharded_run(trainer)


def test_sharding_is_asked_by_arguments_or_by_the_launcher(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert sharding_asked(arguments(tmp_path)) is None
    asked = sharding_asked(arguments(tmp_path, fsdp=True, fsdp_config={"reshard_after_forward": False}))
    assert asked is not None
    assert not asked.plugin.reshard_after_forward
    assert asked.replicas == 1
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("FSDP_VERSION", "1")
    with pytest.raises(DPZeroError, match="FSDP1"):
        sharding_asked(arguments(tmp_path))
    with pytest.raises(DPZeroError, match="XLA"):
        sharding_asked(arguments(tmp_path, fsdp=True, fsdp_config={"xla": True}))


@pytest.mark.parametrize("size", ["tp_size", "cp_size", "dp_replicate_size"])
def test_an_accelerator_that_splits_is_refused(size: str) -> None:
    sizes = ParallelismConfig(**{"dp_shard_size": 2, size: 2})
    accelerator: Any = SimpleNamespace(parallelism_config=sizes, num_processes=4, distributed_type="MULTI_CPU")
    with pytest.raises(DPZeroError, match=size):
        check_accelerator(accelerator)


FSDP: dict[str, Any] = {"fsdp_plugin_args": {"fsdp_version": 2}}


@pytest.mark.parametrize(
    ("sizes", "asked", "replicas"),
    [({"dp_replicate_size": 2, "dp_shard_size": 2}, FSDP, 2), ({"dp_shard_size": 4}, FSDP, 1), ({}, FSDP, 1)],
)
def test_groups_of_processes_can_be_asked_for(sizes: dict[str, int], asked: dict[str, Any], replicas: int) -> None:
    args = SimpleNamespace(world_size=4, parallelism_config=ParallelismConfig(**sizes), **asked)
    sharding = sharding_asked(args)
    assert sharding is not None
    assert sharding.replicas == replicas


@pytest.mark.parametrize(
    ("sizes", "asked", "told"),
    [
        ({"dp_shard_size": 2, "tp_size": 2}, FSDP, "tp_size"),
        ({"dp_shard_size": 2, "sp_size": 2}, {}, "sp_size"),
        ({"dp_replicate_size": 2, "dp_shard_size": 4}, FSDP, "of 8 processes, and there are 4"),
        ({"dp_replicate_size": 2}, {}, "of 2 processes, and there are 4"),
        ({"dp_replicate_size": 2, "dp_shard_size": 2}, {}, "fsdp=True"),
        ({"dp_replicate_size": 4}, FSDP, "give both"),
    ],
)
def test_other_parallelism_is_refused(sizes: dict[str, int], asked: dict[str, Any], told: str) -> None:
    args = SimpleNamespace(world_size=4, parallelism_config=ParallelismConfig(**sizes), **asked)
    with pytest.raises(DPZeroError, match=told):
        sharding_asked(args)


def test_replicas_of_whole_models_are_plain_data_parallelism() -> None:
    args = SimpleNamespace(world_size=4, parallelism_config=ParallelismConfig(dp_replicate_size=4))
    assert sharding_asked(args) is None


def test_an_accelerator_of_fsdp_is_refused() -> None:
    accelerator: Any = SimpleNamespace(parallelism_config=None, num_processes=4, distributed_type="FSDP")
    with pytest.raises(DPZeroError, match="made before"):
        check_accelerator(accelerator)


class Skipping(nn.Module):
    """Runs its second layer for some rows only."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(2, 2), nn.Linear(2, 2)

    def forward(self, row: Tensor) -> Tensor:
        hidden: Tensor = self.first(row)
        return self.second(hidden) if row.sum() > 0 else hidden


@pytest.mark.parametrize("first", [1.0, -1.0])
def test_a_pass_in_another_order_stops_before_it_gathers(first: float) -> None:
    model = Skipping()
    UnitOrder(model, [model.first, model.second])
    gathered: list[nn.Module] = []
    model.second.register_forward_pre_hook(lambda module, args: gathered.append(module))
    for _ in range(2):
        model(torch.full((1, 2), first))
    before = len(gathered)
    with pytest.raises(DPZeroError, match="out of turn"):
        model(torch.full((1, 2), -first))
    assert len(gathered) == before
    # The next pass starts anew.
    model(torch.full((1, 2), first))


def test_a_unit_outside_of_a_pass_is_refused() -> None:
    model = Skipping()
    UnitOrder(model, [model.first, model.second])
    with pytest.raises(DPZeroError, match="outside a pass"):
        model.second(torch.ones(1, 2))
