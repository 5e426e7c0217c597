"""Several processes by `accelerate launch` (gloo, CPU), and models with a device map."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from peft import LoraConfig, get_peft_model
from peft_dpzero import DPZeroConfig, DPZeroError, DPZeroSGD, DPZeroTrainer, infer_task, make_plan
from peft_dpzero.estimation.batching import LogicalBatches
from peft_dpzero.estimation.losses import Losses
from peft_dpzero.estimation.sampling import PoissonSampler, new_secret
from peft_dpzero.estimation.shapes import Shapes
from peft_dpzero.perturbation.perturbation import Perturbation
from peft_dpzero.processes import AcceleratedProcesses
from peft_dpzero.release.journal import read_journal
from peft_dpzero.step import PrivateStep
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import distributed_run
from distributed_run import INTERRUPTED_AT, LOGICAL_BATCH, NUM_DIRECTIONS, STEPS
from launches import Launched, distance, launch
from tiny import RELEASE, arguments, tiny_dataset, tiny_model


@pytest.fixture(scope="module", params=[2, pytest.param(3, marks=pytest.mark.slow)])
def launched(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Launched:
    folder = tmp_path_factory.mktemp(f"ranks{request.param}")
    result = launch(request.param, folder)
    assert result.returncode == 0, result.stderr[-3000:]
    return Launched(request.param, folder)


@pytest.fixture(scope="module")
def single(tmp_path_factory: pytest.TempPathFactory) -> DPZeroTrainer:
    trainer = distributed_run.make_trainer(tmp_path_factory.mktemp("single"), world_size=1)
    trainer.train()
    return trainer


def test_processes_are_connected_by_gloo(launched: Launched) -> None:
    for report in launched.reports():
        assert (report["processes"], report["backend"]) == (launched.processes, "gloo")


def test_ranks_start_apart_and_end_bit_identical(launched: Launched) -> None:
    first, *others = launched.tensors("start")
    assert all(distance(first, other) > 0.1 for other in others)
    first, *others = launched.tensors("whole")
    assert all(torch.equal(first[name], other[name]) for other in others for name in first)


def test_ranks_agree_with_the_single_process(launched: Launched, single: DPZeroTrainer) -> None:
    start, end, alone = launched.tensors("start")[0], launched.tensors("whole")[0], distributed_run.trained(single)
    assert distance(start, alone) > 1e-3
    assert distance(end, alone) < 1e-5


def test_a_step_sends_the_sums_and_nothing_else(launched: Launched) -> None:
    payload = 8 * NUM_DIRECTIONS
    for report in launched.reports():
        assert report["step_traffic"] == [[["allreduce_", payload], ["broadcast_", payload]]] * STEPS
        largest_parameter = max(4 * t.numel() for t in launched.tensors("start")[0].values())
        # Before the first step, the journal's header goes round too.
        header = len(json.dumps(launched.journal("whole")[0]))
        assert max(size for _, size in report["train_traffic"]) <= max(largest_parameter, 2 * header)


def test_the_model_is_not_wrapped(launched: Launched) -> None:
    assert [report["wrapped"] for report in launched.reports()] == [["PeftModel"]] * launched.processes


def test_one_rank_writes_the_journal_and_each_release_once(launched: Launched) -> None:
    assert [report["has_journal"] for report in launched.reports()] == [True] + [False] * (launched.processes - 1)
    steps = [line.get("step", "header") for line in launched.journal("whole")]
    assert steps == ["header", *range(STEPS)]


def test_the_saved_files_are_those_of_one_process(launched: Launched) -> None:
    files = {path.name for path in (launched.folder / "whole").iterdir() if path.is_file()}
    # A run without a guarantee has no ε to draw.
    assert files == RELEASE - {"privacy.svg"}
    record = json.loads((launched.folder / "whole" / "privacy_record.json").read_text())
    assert (record["steps"], record["expected_batch_size"]) == (STEPS, LOGICAL_BATCH)


def test_an_interrupted_run_ends_as_the_whole_one(launched: Launched) -> None:
    for whole, resumed in zip(launched.tensors("whole"), launched.tensors("resumed"), strict=True):
        assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    whole, resumed = launched.journal("whole"), launched.journal("interrupted")
    assert INTERRUPTED_AT < STEPS
    assert [line.get("values") for line in resumed] == [line.get("values") for line in whole]


@pytest.mark.parametrize("way", ["exit", pytest.param("raise", marks=pytest.mark.slow)])
def test_a_rank_that_dies_stops_the_others(tmp_path: Path, way: str) -> None:
    result = launch(2, tmp_path, "--die", way)
    assert result.returncode != 0
    journal = (tmp_path / "dying" / "dpzero_journal").read_text().splitlines()
    # Rank 1 dies after step 5's update, so that step 6 is not released.
    assert len(journal) == 1 + distributed_run.DIES_AT


def test_unconnected_processes_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = arguments(tmp_path)
    monkeypatch.setenv("WORLD_SIZE", "2")
    config = DPZeroConfig(noise_multiplier=1.0, target_delta=1e-3)
    with pytest.raises(DPZeroError, match="ACCELERATE_USE_CPU"):
        DPZeroTrainer(
            tiny_model("classifier"), settings, train_dataset=tiny_dataset("classifier"), dpzero_config=config
        )


@pytest.mark.slow
def test_ranks_with_different_runs_stop_before_the_first_release(tmp_path: Path) -> None:
    result = launch(2, tmp_path, "--disagree")
    assert result.returncode == 0, result.stderr[-3000:]
    raised = [json.loads((tmp_path / f"raised-{rank}.json").read_text()) for rank in range(2)]
    assert raised[0] == raised[1]
    for kind, words in {
        "shuffle": "shuffle with a fixed seed",
        "rows": "num_units",
        "settings": "clipping_threshold",
        "adapter": "trainable parameters",
    }.items():
        assert words in raised[0][kind]
        assert len((tmp_path / kind / "dpzero_journal").read_text().splitlines()) == 1


def private_step(world_size: int, accelerator: Accelerator | None) -> PrivateStep:
    model = distributed_run.lora_model(seed=0)
    plan = make_plan(
        DPZeroConfig(noise_multiplier=1.0, target_delta=1e-3, clipping_threshold=10.0, smoothing_parameter=1e-3),
        64,
        8,
        3,
    )
    sampler = PoissonSampler(64, plan.sample_rate, new_secret())
    batches = LogicalBatches(tiny_dataset("classifier"), sampler, list, Shapes(8, 4), 0, world_size)
    perturbation = Perturbation(model)
    optimizer = DPZeroSGD(perturbation.parameters.values())
    losses = Losses(model, infer_task(model), dict)
    return PrivateStep(
        model,
        plan,
        batches=batches,
        losses=losses,
        perturbation=perturbation,
        optimizer=optimizer,
        accelerator=accelerator,
    )


def test_a_step_refuses_batches_sharded_for_other_processes() -> None:
    private_step(1, Accelerator(cpu=True))
    with pytest.raises(DPZeroError, match="count more than once"):
        private_step(2, Accelerator(cpu=True))


def test_a_step_without_accelerator_refuses_a_launch_of_several(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(DPZeroError, match="Pass the Accelerator"):
        private_step(2, None)


def test_a_step_samples_with_the_first_processes_key(monkeypatch: pytest.MonkeyPatch) -> None:
    key = torch.arange(32, dtype=torch.uint8)

    def broadcast(self: AcceleratedProcesses, tensor: torch.Tensor) -> torch.Tensor:
        return key if tensor.dtype == torch.uint8 else tensor

    monkeypatch.setattr(AcceleratedProcesses, "broadcast", broadcast)
    step = private_step(1, Accelerator(cpu=True))
    wanted = PoissonSampler(64, step.plan.sample_rate, bytes(range(32)))
    assert step.batches._sampler.draw(0).tolist() == wanted.draw(0).tolist()


@pytest.fixture(scope="module")
def saved_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    tiny_model("causal_lm").save_pretrained(folder)
    return folder


WHOLE_ON_CPU: dict[str, str] = {"": "cpu"}
SECOND_LAYER_ON_DISK = {
    "model.embed_tokens": "cpu",
    "model.layers.0": "cpu",
    "model.layers.1": "disk",
    "model.norm": "cpu",
    "model.rotary_emb": "cpu",
    "lm_head": "cpu",
}


def mapped_trainer(saved: Path, out: Path, device_map: dict[str, str] | None, layers: list[int]) -> DPZeroTrainer:
    placing = {"device_map": device_map, "offload_folder": str(out / "offload")} if device_map else {}
    base = AutoModelForCausalLM.from_pretrained(saved, **placing)
    torch.manual_seed(0)
    lora = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], layers_to_transform=layers, init_lora_weights=False)
    config = DPZeroConfig(noise_multiplier=0.5, target_delta=1e-3, num_directions=2, deterministic=True)
    return DPZeroTrainer(
        get_peft_model(base, lora), arguments(out), train_dataset=tiny_dataset("causal_lm"), dpzero_config=config
    )


@pytest.mark.parametrize("device_map", [WHOLE_ON_CPU, SECOND_LAYER_ON_DISK], ids=["cpu", "disk"])
def test_a_device_map_changes_no_release(saved_model: Path, tmp_path: Path, device_map: dict[str, str]) -> None:
    plain = mapped_trainer(saved_model, tmp_path / "plain", None, layers=[0])
    mapped = mapped_trainer(saved_model, tmp_path / "mapped", device_map, layers=[0])
    offloaded = any(parameter.is_meta for parameter in mapped.model.parameters())
    assert offloaded == ("disk" in device_map.values())
    for trainer in (plain, mapped):
        trainer.train()
        trainer.save_model()
    journals = [read_journal(tmp_path / name / "dpzero_journal") for name in ("plain", "mapped")]
    assert journals[0].entries == journals[1].entries
    assert (journals[1].segments[0].header["frozen"]["sha256"] is None) == offloaded
    adapters = [load_file(tmp_path / name / "adapter_model.safetensors") for name in ("plain", "mapped")]
    assert distance(*adapters) == 0


def test_an_adapter_on_offloaded_layers_is_trained_in_memory(saved_model: Path, tmp_path: Path) -> None:
    trainer = mapped_trainer(saved_model, tmp_path, SECOND_LAYER_ON_DISK, layers=[0, 1])
    trained = {name: p for name, p in trainer.model.named_parameters() if p.requires_grad}
    assert any("layers.1." in name for name in trained)
    before = {name: p.detach().clone() for name, p in trained.items()}
    trainer.train()
    assert not any(torch.equal(p, before[name]) for name, p in trained.items())
