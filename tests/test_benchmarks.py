"""What the benchmarks compare does the same work: the floor's layouts, the reference's losses and ours agree."""

from __future__ import annotations

import gc
import json
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from peft_dpzero.estimation.losses import Losses

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))
from transformers import OPTConfig, OPTForCausalLM, set_seed

import cost_model
import device_checks
import floor
import gpu
import gpu_page
import one_worker
import workers
from cost_model import Network, Worker
from headlines import headlines
from reference import Reference
from timing import linear_fit, spread
from workloads import Workload, causal_lm, llama
from zoo import architectures as zoo_architectures

SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}


def make(name: str) -> Workload:
    settings = {"batch_size": 8, "micro_batch_size": 4, "lengths": (3, 40), "count": 9}
    if name == "llama":
        return llama("lora", SIZES | {"vocab_size": 60, "intermediate_size": 32}, **settings)
    set_seed(0)
    config = OPTConfig(**SIZES, ffn_dim=32, word_embed_proj_dim=32, vocab_size=60, max_position_embeddings=64)
    return causal_lm("opt", OPTForCausalLM(config), "full", **settings)


@pytest.mark.parametrize("name", ["llama", "opt"])
def test_every_layout_of_the_floor_gives_the_same_logits(name: str) -> None:
    workload = make(name)
    run = floor.runner(workload)
    found = {}
    for candidate in floor.candidates(workload, passes=2):
        candidate.prepare(0, workload.rows)
        with torch.no_grad():
            logits = torch.cat([run(laid) for laid in candidate._laid[1]])
        found[candidate.name] = logits[logits.sum(dim=1).argsort()]
    expected = found["equal"]
    assert expected.shape == (sum(label != -100 for row in workload.rows for label in row["labels"]), 60)
    for logits in found.values():
        repeats = len(logits) // len(expected)
        torch.testing.assert_close(logits, expected.repeat_interleave(repeats, dim=0), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["llama", "opt"])
def test_the_reference_has_our_losses(name: str) -> None:
    workload = make(name)
    reference = Reference(workload)
    losses = reference.losses(reference.collate(workload.rows)).double()
    ours = Losses(workload.model, workload.task, lambda batch: batch)(workload.collate(workload.rows))
    torch.testing.assert_close(losses, ours, rtol=1e-5, atol=1e-6)


def test_the_reference_restores_its_parameters_nearly() -> None:
    workload = make("llama")
    reference = Reference(workload)
    before = [parameter.detach().clone() for parameter in reference.parameters]
    for scale in (1, -2, 1):
        reference.perturb(3, scale)
    for parameter, old in zip(reference.parameters, before, strict=True):
        torch.testing.assert_close(parameter.detach(), old, rtol=0, atol=1e-6)


def test_headlines_quote_what_is_worst_for_us() -> None:
    def run(over_floor: float, lead: float) -> dict[str, dict[str, float]]:
        return {"ours_over_floor": spread([over_floor]), "reference_over_ours": spread([lead])}

    sections = {"minilm_lora": {"k1": run(1.1, 3.0), "k16": run(1.2, 9.0)}, "minilm_full": {"k1": run(1.6, 2.5)}}
    found = {key: value["median"] for key, value in headlines(sections).items()}
    assert found == {"lora_step_over_floor": 1.2, "full_step_over_floor": 1.6, "reference_over_ours_minilm": 2.5}


def test_linear_fit() -> None:
    fit = linear_fit([1, 2, 3], [3.0, 5.0, 7.0])
    assert fit == {"slope": 2.0, "intercept": 1.0, "r_squared": 1.0}


def test_the_gpu_script_checks_and_times_on_a_cpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(gpu.DIRECTIONS, "tiny", ((1,), (1,)))
    monkeypatch.setitem(gpu_page.SHAPES, "tiny", "tiny OPT")
    monkeypatch.setattr(gpu, "FLOORS", ("equal", "packed 512"))
    monkeypatch.setattr(gc, "collect", lambda: 0)  # Takes long among all that the tests import.
    output = tmp_path / "cpu.json"
    sizes = ["--batch", "8", "--length", "16", "--vocab-size", "100", "--rounds", "2", "--dtype", "float32"]
    gpu.main(["--only", "tiny", "--device", "cpu", *sizes, "--output", str(output)])
    results = json.loads(output.read_text())
    assert "failed" not in results["tiny"]
    found = list(gpu_page.cases(results))
    assert [(title, k) for title, k, *_ in found] == [("tiny OPT, LoRA", "1"), ("tiny OPT, all", "1")]
    assert results["tiny"]["lora"]["strangers"]["differ"] == 0
    gpu_page.draw(results, tmp_path / "cpu.svg")
    assert (tmp_path / "cpu.svg").exists()
    assert "tiny OPT, all, K = 1" in gpu_page.times_table(results)


def test_a_part_that_takes_too_long_is_stopped() -> None:
    with pytest.raises(gpu.Overtime), gpu.at_most(0.05):
        time.sleep(5)


def test_device_checks_see_planted_faults() -> None:
    cpu, name = torch.device("cpu"), "Llama"
    small = zoo_architectures.BY_NAME[name]
    assert device_checks.check_directions(cpu, large=1000)["sphere"]["differ"] == 0
    assert all(found["differ"] == 0 for found in device_checks.check_updates(cpu, widths=(50,)).values())
    assert device_checks.plant_quantile(cpu, entries=1 << 18)["differ"] > 0
    assert device_checks.plant_ulp(cpu)["differ"] > 0
    model = zoo_architectures.build(small)
    settings = {"rows": (2, 3), "lengths": (8,)}
    assert device_checks.strangers(model, **settings)["differ"] == 0
    with device_checks.coupled(model):
        assert device_checks.strangers(model, **settings)["differ"] == 3


def test_the_cost_of_workers_is_measured_and_modelled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gc, "collect", lambda: 0)
    monkeypatch.setitem(one_worker.SHAPE, "num_hidden_layers", 3)
    monkeypatch.delitem(workers.MODES, "full")
    output = tmp_path / "workers.json"
    workers.main(["--quick", "--output", str(output)])
    found = json.loads(output.read_text())
    run = found["modes"]["upper"]
    worker = Worker(**run["constants"])
    assert worker.row_point > 0
    assert min(run["constants"].values()) >= 0
    assert [one["workers"] for one in run["checked"]] == [1]
    assert workers.workers_table(found).count("\n") == 1 + len(workers.WORKERS)


def test_workers_share_rows_or_directions() -> None:
    worker, network = Worker(0.5, 0.1, 0.2, 1.0, 4.0), Network(latency=1e-3, bandwidth=1e6)
    assert (worker.row_point, worker.trunk_share) == (3.0, 1 / 3)
    alone = cost_model.data_parallel(100, 8, 1, worker, network)
    assert alone == cost_model.direction_parallel(100, 8, 1, worker, network)
    assert alone.seconds == pytest.approx(0.5 + 8 * (0.1 + 0.2) + 100 * (1.0 + 8 * 4.0))
    by_rows, by_directions = (
        parallel(100, 8, 4, worker, network) for parallel in (cost_model.data_parallel, cost_model.direction_parallel)
    )
    # Sums of 8 directions, once reduced and once broadcast; or 8 differences of each row, then the sums.
    assert (by_rows.received, by_directions.received) == (8 * 8 * (1.5 + 1), 8 * 8 * (75 + 1))
    assert by_directions.seconds - by_directions.received / 1e6 == pytest.approx(
        0.5 + 2 * 0.1 + 8 * 0.2 + 100 * (1.0 + 2 * 4.0) + 5e-3
    )
    assert cost_model.direction_parallel(100, 8, 9, worker, network) == cost_model.direction_parallel(
        100, 8, 8, worker, network
    )


def test_the_rows_of_the_busiest_worker() -> None:
    assert cost_model.most_rows(30, 1) == pytest.approx(30)
    drawn = np.random.default_rng(0).poisson(30 / 10, size=(20_000, 10)).max(axis=1)
    assert cost_model.most_rows(30, 10) == pytest.approx(drawn.mean(), rel=0.01)
    assert cost_model.most_rows(30, 10, together=4) == pytest.approx((-(-drawn // 4) * 4).mean(), rel=0.01)
