"""Settings that are chosen before training: from what is public, within the time that there is."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft_dpzero import DPZeroConfig, DPZeroTrainer, verify
from peft_dpzero.checks.passes import try_model
from peft_dpzero.cli.app import run as command
from peft_dpzero.cli.tune import _filled
from peft_dpzero.errors import DPZeroError
from peft_dpzero.estimation.losses import Losses
from peft_dpzero.estimation.tasks import infer_task
from peft_dpzero.mechanism.accountant import COARSE_INTERVAL, Accountant
from peft_dpzero.perturbation.perturbation import Perturbation
from peft_dpzero.public.scales import Seconds, find_slopes, measure_slopes, rows_to_read
from peft_dpzero.public.settings import Settings, choose_sizes, learning_rate, rough_noise
from peft_dpzero.release.journal import read_journal
from peft_dpzero.training import settling
from peft_dpzero.training import trainer as training
from peft_dpzero.training.measured_rows import MOST_ROWS, rows_to_measure

from tiny import adapted, arguments, tiny_dataset, tiny_model

OPEN: dict[str, Any] = {"target_epsilon": 4.0, "target_delta": 1e-4}


def trainer(folder: Path, data: Any = None, changes: dict[str, Any] | None = None, **settings: Any) -> DPZeroTrainer:
    return DPZeroTrainer(
        adapted(),
        arguments(folder, **settings),
        train_dataset=tiny_dataset("classifier", 256) if data is None else data,
        dpzero_config=DPZeroConfig(**(OPEN | (changes or {}))),
    )


@pytest.mark.parametrize(("epsilon", "rate", "steps"), [(2.0, 0.01, 500), (1.0, 0.05, 100), (8.0, 0.02, 1000)])
def test_rough_noise_is_near_the_accountants(epsilon: float, rate: float, steps: int) -> None:
    config = DPZeroConfig(target_epsilon=epsilon, target_delta=1e-5)
    proven = Accountant.of(config, COARSE_INTERVAL).noise_multiplier(epsilon, rate, steps)
    assert rough_noise(config, rate, steps) == pytest.approx(proven, rel=0.25)


def test_laplace_noise_is_told_exactly() -> None:
    config = DPZeroConfig(target_epsilon=2.0, target_delta=0, mechanism="laplace")
    proven = Accountant.of(config).noise_multiplier(2.0, 0.01, 30)
    assert rough_noise(config, 0.01, 30) == proven


def test_the_time_that_private_rows_take_to_read_decides_on_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seconds = [0.0]

    class Slow(torch.utils.data.Dataset[Any]):
        column_names = ("input_ids", "attention_mask", "labels", "user")
        rows = tiny_dataset("classifier", 64)

        def __len__(self) -> int:
            return len(self.rows)

        def __getitem__(self, index: int) -> Any:
            seconds[0] += 1.0
            return {**self.rows[index], "user": index % 32}

    class Stop(Exception):
        pass

    def stop(self: DPZeroTrainer, deadline: float) -> None:
        assert seconds[0] >= 64
        raise Stop(deadline - seconds[0])

    monkeypatch.setattr(training, "time", SimpleNamespace(monotonic=lambda: seconds[0]))
    monkeypatch.setattr(DPZeroTrainer, "_prepare_run", stop)
    with pytest.raises(Stop, match="120"):
        trainer(tmp_path, Slow(), {"minutes": 2.0, "privacy_unit": "user"}).train()


def test_sizes_fit_the_time_and_follow_what_is_given() -> None:
    config, seconds = DPZeroConfig(**OPEN), Seconds(row=1e-3, again=1e-3, point=1e-3)
    for budget in (60.0, 600.0):
        choice = choose_sizes(config, seconds, num_units=5000, entries=[256], budget=budget)
        assert 0.5 * budget < choice.pace.seconds(choice.steps) <= 1.01 * budget
    given = choose_sizes(
        config.replace(num_directions=3), seconds, num_units=5000, entries=[256], budget=60.0, batch=80, steps=20
    )
    assert (given.num_directions, given.expected_batch_size, given.steps) == (3, 80, 20)
    with pytest.raises(DPZeroError, match="minutes at least"):
        choose_sizes(config, Seconds(1.0, 1.0, 1.0), num_units=5000, entries=[256], budget=60.0)


def test_rows_that_are_kept_allow_for_more() -> None:
    config = DPZeroConfig(**OPEN, num_directions=16)
    anew, kept = (
        choose_sizes(config, Seconds(0.02, again, 1e-4), num_units=2000, entries=[64], budget=200.0)
        for again in (0.02, 0.0)
    )
    assert (kept.expected_batch_size, kept.steps) > (anew.expected_batch_size, anew.steps)
    assert kept.pace.later < kept.pace.first == pytest.approx(0.05 + kept.expected_batch_size * (0.02 + 32 * 1e-4))


def test_of_batches_that_are_near_the_accountant_decides() -> None:
    config, seconds = DPZeroConfig(**OPEN), Seconds(row=1e-3, again=1e-3, point=1e-3)
    choice = choose_sizes(config, seconds, num_units=5000, entries=[256], budget=100.0)
    proven = Accountant.of(config).noise_multiplier(
        config.target_epsilon or 0, choice.expected_batch_size / 5000, choice.steps
    )
    assert choice.variance.noise == pytest.approx(256 * (proven / choice.expected_batch_size) ** 2, rel=0.03)


def test_directions_at_right_angles_are_no_more_than_there_are() -> None:
    plenty = Seconds(row=1e-6, again=1e-6, point=1e-6)
    config = DPZeroConfig(**OPEN, direction_distribution="orthogonal")
    choice = choose_sizes(config, plenty, num_units=5000, entries=[20], budget=600.0)
    assert choice.num_directions == 32
    assert choice.variance.directions == 0
    independent = choose_sizes(DPZeroConfig(**OPEN), plenty, num_units=5000, entries=[20], budget=600.0)
    assert independent.num_directions > 32


def test_directions_lie_in_as_many_coordinates_as_time_tells() -> None:
    config = DPZeroConfig(**OPEN, direction_distribution="orthogonal")

    def chosen(point: float) -> tuple[int, int]:
        seconds = Seconds(row=0.0, again=0.0, point=point)
        choice = choose_sizes(config, seconds, num_units=9000, entries=[64, 128, 256], budget=200.0)
        return choice.entries, choice.num_directions

    assert chosen(1e-6) == (256, 256)
    assert chosen(5e-5) == (128, 128)
    assert chosen(1e-2)[0] == 64


def test_slopes_are_read_of_as_many_rows_as_time_affords() -> None:
    slow = Seconds(row=0.5, again=0.0, point=0.1)
    assert rows_to_read(slow, 100.0) == 20
    assert rows_to_read(slow, 1.0) == 0


def test_a_step_that_was_disturbed_is_timed_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    timed, honest = [], settling._seconds_a_step

    def disturbed(*args: Any) -> float:
        timed.append(honest(*args) + (0 if timed else 1000.0))
        return timed[-1]

    monkeypatch.setattr(settling, "_seconds_a_step", disturbed)
    run = trainer(tmp_path, changes={"minutes": 1.0})
    measured = run.tune_on()
    assert measured.seconds_a_step == min(timed)
    assert len(timed) == 2


def test_slopes_are_those_of_autograd_and_lambda_lies_between_rounding_and_curvature() -> None:
    model = adapted().eval()
    perturbation, task = Perturbation(model), infer_task(model)
    tried = try_model(perturbation, task, DPZeroConfig(**OPEN), dict, device=torch.device("cpu"))
    rows, source = rows_to_measure(tried, [])
    assert source == "made-up rows"
    rows = rows[:4]
    slopes = measure_slopes(tried.passes.losses, rows, perturbation, "central")
    assert 1e-4 < slopes.smoothing_parameter < 1
    expected = []
    for row in rows:
        loss = task.losses(model(**task.inputs(row)), row).sum()
        names = list(perturbation.parameters)
        gradients = torch.autograd.grad(loss, list(perturbation.parameters.values()))
        along = [
            sum(float((g * perturbation.z(0, k, n)).sum()) for n, g in zip(names, gradients, strict=True))
            for k in range(4)
        ]
        expected.append(math.sqrt(sum(d * d for d in along) / 4))
    assert slopes.sizes == pytest.approx(sorted(expected), rel=0.02)


def test_no_two_made_up_rows_are_alike_so_that_none_is_kept_when_a_step_is_timed() -> None:
    model = adapted().eval()
    tried = try_model(Perturbation(model), infer_task(model), DPZeroConfig(**OPEN), dict, device=torch.device("cpu"))
    rows, _ = rows_to_measure(tried, [])
    assert len({tuple(row["input_ids"][0].tolist()) for row in rows}) == len(rows) == MOST_ROWS
    assert len({row["input_ids"].shape for row in rows}) > 16


@pytest.mark.parametrize(("bend", "difference"), [(0.0, "forward"), (1e9, "central")])
def test_one_side_is_read_unless_the_loss_bends(bend: float, difference: str) -> None:
    model = adapted().eval()
    perturbation, plain = Perturbation(model), infer_task(model)
    start = {name: parameter.detach().clone() for name, parameter in perturbation.parameters.items()}

    class Bent(type(plain)):  # type: ignore[misc]
        def losses(self, outputs: Any, batch: Any) -> torch.Tensor:
            far = sum(float((p.detach() - start[n]).square().sum()) for n, p in perturbation.parameters.items())
            return super().losses(outputs, batch) + bend * far

    rows, _ = rows_to_measure(
        try_model(perturbation, plain, DPZeroConfig(**OPEN), dict, device=torch.device("cpu")), []
    )
    rows, losses = rows[:4], Losses(model, Bent(), dict)
    assert find_slopes(losses, rows, perturbation, DPZeroConfig(**OPEN)).difference == difference
    given = DPZeroConfig(**OPEN, difference="central")
    assert find_slopes(losses, rows, perturbation, given).difference == "central"


def test_a_rate_makes_noise_wander_as_far_whatever_the_scale_and_the_steps() -> None:
    moved = [learning_rate(size, steps) * size * math.sqrt(steps) for size in (0.1, 30.0) for steps in (30, 3000)]
    assert max(moved) < 1.1 * min(moved)


def test_what_is_open_is_chosen_noted_and_kept(tmp_path: Path) -> None:
    open_noise = {"target_epsilon": None, "noise_multiplier": 1.0}
    run = trainer(tmp_path, changes=open_noise, max_steps=3, per_device_train_batch_size=8)
    run.train()
    run.save_model(str(tmp_path / "release"))
    record = json.loads((tmp_path / "release" / "privacy_record.json").read_text())
    assert record["chosen"] == read_journal(tmp_path / "dpzero_journal").segments[0].header["chosen"]
    numbers = {"clipping_threshold", "smoothing_parameter", "num_directions"}
    assert record["chosen"].keys() == {"source", "difference", *numbers}
    assert record["difference"] == record["chosen"]["difference"]
    assert (record["clipping"], record["num_directions"]) == ("adaptive", 16)
    assert not [check for check in verify(tmp_path / "release") if check.status == "FAILED"]
    longer = trainer(tmp_path, changes=open_noise, max_steps=5, per_device_train_batch_size=8)
    longer.train(resume_from_checkpoint=True)
    assert longer.privacy_record()["chosen"] == record["chosen"]
    assert longer.privacy_record()["steps"] == 5


def test_given_values_stay(tmp_path: Path) -> None:
    given = {"clipping_threshold": 3.0, "smoothing_parameter": 0.01, "num_directions": 2}
    run = trainer(tmp_path, changes=given, max_steps=1)
    run.train()
    record = run.privacy_record()
    assert {key: record[key] for key in given} == given
    assert (record["chosen"], record["clipping"]) == (None, "fixed")
    some = trainer(tmp_path / "some", changes={"clipping_threshold": 3.0}, max_steps=1)
    some.train()
    assert some.privacy_record()["clipping_threshold"] == 3.0
    assert "clipping_threshold" not in some.privacy_record()["chosen"]


def test_private_rows_have_no_part_in_what_is_chosen(tmp_path: Path) -> None:
    chosen = []
    for name, token in (("one", 3), ("other", 50)):
        rows = [{"input_ids": [token] * 9, "attention_mask": [1] * 9, "labels": token % 2}] * 64
        run = trainer(tmp_path / name, rows, max_steps=1, remove_unused_columns=False)
        run.train()
        chosen.append(run.privacy_record()["chosen"])
    assert chosen[0] == chosen[1]


def test_time_decides_sizes_and_a_run_goes_on_with_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(settling, "measure_seconds", lambda *_: Seconds(row=1e-3, again=1e-3, point=1e-3))
    monkeypatch.setattr(settling, "_seconds_a_step", lambda *_: 3.0)
    changes, default = {"minutes": 1.0}, {"max_steps": -1, "per_device_train_batch_size": 8, "learning_rate": 5e-5}
    run = trainer(tmp_path, changes=changes, **default)
    with pytest.raises(DPZeroError, match="measured how long"):
        _ = run.privacy_plan
    with pytest.warns(UserWarning, match="steps are all that `minutes` allow"):
        run.train()
    chosen = run.privacy_record()["chosen"]
    assert chosen.keys() >= {"expected_batch_size", "steps", "learning_rate", "num_directions"}
    assert 10 <= chosen["steps"] <= 18
    assert run.state.global_step == chosen["steps"] == run.privacy_plan.steps
    assert run.privacy_record()["epsilon"] <= 4.0
    again = trainer(tmp_path, changes=changes, **default)
    again.train(resume_from_checkpoint=True)
    assert again.privacy_record()["chosen"] == chosen
    assert again.privacy_record()["steps"] == chosen["steps"]
    for name, value in run.model.state_dict().items():
        assert torch.equal(value, again.model.state_dict()[name])


def test_with_time_explicit_arguments_stay(tmp_path: Path) -> None:
    run = trainer(
        tmp_path,
        changes={"minutes": 2.0, "num_directions": 2},
        max_steps=12,
        per_device_train_batch_size=32,
        learning_rate=3e-3,
    )
    run.train()
    record = run.privacy_record()
    assert (record["steps"], record["expected_batch_size"]) == (12, 32)
    assert not record["chosen"].keys() & {"steps", "expected_batch_size", "learning_rate"}


def test_tuning_refuses_the_training_data_and_changes_nothing(tmp_path: Path) -> None:
    run = trainer(tmp_path, max_steps=1)
    with pytest.raises(DPZeroError, match="public_dataset is the training data"):
        run.tune_on(run.train_dataset)
    run.public_text = run.train_dataset
    with pytest.raises(DPZeroError, match="public_text is the training data"):
        run.tune_on()
    run.public_text = None
    before = {name: value.clone() for name, value in run.model.state_dict().items()}
    measured = run.tune_on(tiny_dataset("classifier", 40), minutes=1.0)
    assert measured.settings.source == "public text"
    assert all(torch.equal(value, run.model.state_dict()[name]) for name, value in before.items())
    assert not list(tmp_path.iterdir())


def test_a_loss_that_cannot_be_measured_is_told(tmp_path: Path) -> None:
    def wants_more(outputs: Any, labels: torch.Tensor) -> torch.Tensor:
        raise KeyError("scores")

    run = DPZeroTrainer(
        adapted(),
        arguments(tmp_path, max_steps=1),
        train_dataset=tiny_dataset("classifier"),
        dpzero_config=DPZeroConfig(**OPEN),
        per_example_loss=wants_more,
    )
    with pytest.raises(DPZeroError, match="give clipping_threshold and smoothing_parameter"):
        run.train()


def test_a_suggested_run_is_read_as_it_was_written(tmp_path: Path) -> None:
    run = tmp_path / "run.yaml"
    run.write_text(
        "model: base\ntask: verbalizer-masked\ndata: {train: a.csv, text: a, label_words: {0: no, 1: yes}}\n"
        "dpzero: {target_epsilon: 4, target_delta: 0, mechanism: laplace, minutes: 3}\ntraining: {output_dir: out}\n"
    )
    chosen = Settings("made-up rows", clipping_threshold=2.0, num_directions=1, steps=30)
    filled = _filled(run, SimpleNamespace(settings=chosen), "public.csv")  # type: ignore[arg-type]
    assert filled["data"] == {"train": "a.csv", "text": "a", "label_words": {0: "no", 1: "yes"}, "public": "public.csv"}
    assert "clipping" not in filled["dpzero"], "Laplace noise has no adaptive clipping"
    assert "minutes" not in filled["dpzero"]
    DPZeroConfig(**filled["dpzero"])


def test_the_command_writes_a_run_that_trains(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from transformers import BertTokenizer

    base = tmp_path / "base"
    tiny_model("classifier").save_pretrained(base)
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "good", "bad", "film", "a"]
    (base / "vocab.txt").write_text("\n".join(words))
    BertTokenizer(str(base / "vocab.txt")).save_pretrained(base)
    for name, count in (("train", 200), ("public", 20)):
        rows = "".join(f"a {w} film {'a ' * (i % 5)},{w}\n" for i in range(count // 2) for w in ("good", "bad"))
        (tmp_path / f"{name}.csv").write_text("text,label\n" + rows)
    (tmp_path / "run.yaml").write_text(
        "model: base\ntask: sequence-classification\ndata: {train: train.csv, text: text, label: label}\n"
        "dpzero: {target_epsilon: 4.0, target_delta: 1.0e-4, num_directions: 2}\n"
        "training: {output_dir: out, use_cpu: true, max_steps: 12}\n"
    )
    options = ["tune", str(tmp_path / "run.yaml"), "--public", str(tmp_path / "public.csv"), "--minutes", "1"]
    assert command([*options, "--output", str(tmp_path / "tuned.yaml")]) == 0
    printed = capsys.readouterr().out
    assert "norm of a row's K differences" in printed
    assert "signal / noise" in printed
    assert command([*options, "--output", str(tmp_path / "tuned.yaml")]) == 2
    assert "learning_rate" in (tmp_path / "tuned.yaml").read_text()
    assert command([*options, "--output", str(tmp_path.parent / "tuned.yaml")]) == 2
    assert "beside" in capsys.readouterr().err
    assert command(["train", str(tmp_path / "tuned.yaml")]) == 0
    assert (tmp_path / "out" / "privacy_record.json").exists()
    assert (tmp_path / "out" / "dpzero_basis.safetensors").exists(), "the public file was left out"
