"""Runs that die at any instant, and runs that are continued."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import dp_accounting
import pytest
import torch
from dp_accounting.pld import PLDAccountant
from peft import LoraConfig, PromptEncoderConfig, get_peft_model, get_peft_model_state_dict
from peft_dpzero import (
    DPZeroAdamW,
    DPZeroConfig,
    DPZeroError,
    DPZeroSGD,
    DPZeroTrainer,
    Run,
    infer_task,
    make_plan,
    verify,
)
from peft_dpzero.estimation.batching import LogicalBatches
from peft_dpzero.estimation.losses import Losses
from peft_dpzero.estimation.sampling import PoissonSampler, new_secret
from peft_dpzero.estimation.shapes import Shapes
from peft_dpzero.mechanism import accountant
from peft_dpzero.mechanism.accountant import Accountant, Segment
from peft_dpzero.perturbation.perturbation import Perturbation
from peft_dpzero.release.journal import Journal, read_journal
from peft_dpzero.step import PrivateStep
from peft_dpzero.training.entering import enter_journal, open_journal
from peft_dpzero.training.run import RunOnDisk
from safetensors.torch import load_file
from transformers import TrainerCallback, default_data_collator

import killed_runs
from tiny import adapted, arguments, config, tiny_dataset, tiny_model, trained

KILLS = 30


def live_and_die(folder: Path, kills: int, *options: str) -> dict[str, Any]:
    program = Path(killed_runs.__file__)
    command = [sys.executable, str(program), str(folder), str(kills), "11", *options]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return dict(json.loads(done.stdout.splitlines()[-1]))


@pytest.mark.slow
def test_thirty_kills_change_nothing(tmp_path: Path) -> None:
    counts = live_and_die(tmp_path, KILLS)["releases_at_kills"]
    assert len(counts) == KILLS
    assert len(set(counts)) > KILLS // 2
    assert counts[-1] < killed_runs.STEPS
    whole, killed = ((tmp_path / name / "dpzero_journal").read_bytes() for name in ("whole", "killed"))
    assert killed == whole
    steps = [entry.step for entry in read_journal(tmp_path / "killed" / "dpzero_journal").entries]
    assert steps == list(range(killed_runs.STEPS))
    ours, theirs = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("whole", "killed"))
    assert list(ours) == list(theirs)
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.slow
def test_killed_private_runs_release_each_step_once(tmp_path: Path) -> None:
    live_and_die(tmp_path, 6, "private")
    folder = tmp_path / "killed"
    entries = read_journal(folder / "dpzero_journal").entries
    assert [entry.step for entry in entries] == list(range(killed_runs.STEPS))
    assert len({entry.values for entry in entries}) == len(entries)
    plan = make_plan(DPZeroConfig(**killed_runs.OPTIONS), 8, 4, killed_runs.STEPS)
    assert json.loads((folder / "privacy_record.json").read_text())["epsilon"] == plan.epsilon()


def run(folder: Path, steps: int, seed: int = 0, **changes: Any) -> DPZeroTrainer:
    settings = {key: changes.pop(key) for key in ("save_strategy", "save_steps", "lr_scheduler_type") if key in changes}
    model, lora = tiny_model("classifier"), LoraConfig(task_type="SEQ_CLS", r=2, target_modules=["query"])
    torch.manual_seed(seed)
    return DPZeroTrainer(
        get_peft_model(model, lora),
        arguments(folder, max_steps=steps, **settings),
        train_dataset=tiny_dataset("classifier"),
        dpzero_config=config(**changes),
    )


def by_dp_accounting_alone(record: dict[str, Any]) -> float:
    accountant = PLDAccountant(dp_accounting.NeighboringRelation[record["neighboring"].upper()])
    for segment in record["segments"]:
        release = dp_accounting.GaussianDpEvent(segment["noise_multiplier"])
        sampled = dp_accounting.PoissonSampledDpEvent(segment["sample_rate"], release)
        accountant.compose(dp_accounting.SelfComposedDpEvent(sampled, segment["steps"]))
    return float(accountant.get_epsilon(record["delta"]))


def half_precision() -> Any:
    lora = LoraConfig(task_type="SEQ_CLS", r=2, target_modules=["query"])
    return get_peft_model(tiny_model("classifier").bfloat16(), lora, autocast_adapter_dtype=False)


def prompt_encoder() -> Any:
    return get_peft_model(tiny_model("classifier"), PromptEncoderConfig(task_type="SEQ_CLS", num_virtual_tokens=2))


@pytest.mark.parametrize("build", [half_precision, prompt_encoder])
def test_adapters_that_peft_loads_otherwise_go_on_where_they_were(build: Callable[[], Any], tmp_path: Path) -> None:
    class Stop(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 3:
                raise KeyboardInterrupt

    def trainer(name: str, seed: int, **options: Any) -> DPZeroTrainer:
        torch.manual_seed(seed)
        settings = {"save_strategy": "steps", "save_steps": 2, "learning_rate": 0.1}
        return DPZeroTrainer(
            build(),
            arguments(tmp_path / name, max_steps=5, **settings),
            train_dataset=tiny_dataset("classifier"),
            dpzero_config=config(deterministic=True),
            **options,
        )

    whole = trainer("whole", 0)
    whole.train()
    with pytest.raises(KeyboardInterrupt):
        trainer("cut", 0, callbacks=[Stop()]).train()
    resumed = trainer("cut", 9)
    resumed.train(resume_from_checkpoint=True)
    wanted, found = trained(whole), trained(resumed)
    assert wanted.keys() == found.keys()
    assert all(torch.equal(wanted[name], found[name]) and wanted[name].dtype == found[name].dtype for name in wanted)


def test_settings_that_the_journal_does_not_hold_may_not_change(tmp_path: Path) -> None:
    model = adapted()
    optimizer = DPZeroAdamW(p for p in model.parameters() if p.requires_grad)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.1, total_steps=9)
    run = DPZeroTrainer(
        model,
        arguments(tmp_path, max_steps=3),
        train_dataset=tiny_dataset("classifier"),
        dpzero_config=config(),
        optimizers=(optimizer, schedule),
    )
    with pytest.raises(DPZeroError, match="cycle_momentum=False"):
        run.train()


def test_a_rate_that_changes_before_the_update_is_not_taken(tmp_path: Path) -> None:
    def ended(late: float) -> list[torch.Tensor]:
        model = adapted()
        own = Run(config(deterministic=True), tiny_dataset("classifier"), expected_batch_size=8, steps=1)
        optimizer = DPZeroSGD((p for p in model.parameters() if p.requires_grad), lr=0.1)
        with own.started(model, optimizer, default_data_collator, tmp_path / str(late)):
            estimate = own.release(0).estimate
            optimizer.param_groups[0]["lr"] = late
            optimizer.step(estimate)
        return [p.detach() for p in model.parameters() if p.requires_grad]

    assert all(map(torch.equal, ended(0.1), ended(7.0)))


def test_another_processors_last_digits_of_the_noise_do_not_stop_a_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saving = {"save_strategy": "steps", "save_steps": 2, "target_epsilon": 0.4, "noise_multiplier": None}
    run(tmp_path, 4, **saving).train()
    noted = read_journal(tmp_path / "dpzero_journal").segments[0].header["config"]["noise_multiplier"]
    calibrate = accountant._pld_noise_multiplier
    monkeypatch.setattr(accountant, "_pld_noise_multiplier", lambda *args: calibrate(*args) * (1 + 1e-9))
    again = run(tmp_path, 4, **saving)
    assert again.train(resume_from_checkpoint=True).global_step == 4
    assert again.privacy_plan.noise_multiplier == noted


def test_a_run_that_began_without_noise_claims_nothing(tmp_path: Path) -> None:
    saving = {"save_strategy": "steps", "save_steps": 2}
    run(tmp_path, 2, noise_multiplier=0.0, **saving).train()
    more = run(tmp_path, 4, noise_multiplier=1.0, **saving)
    more.train(resume_from_checkpoint=True)
    record = more.privacy_record()
    assert record["epsilon"] is None
    assert record["guarantee"].startswith("none: no noise was added in some steps")


def test_of_two_runs_that_start_in_one_folder_the_second_is_refused_and_changes_nothing(tmp_path: Path) -> None:
    plan = make_plan(config(), 64, 4, 3)
    journals = [open_journal(tmp_path, resume=False) for _ in range(2)]
    models = [get_peft_model(tiny_model("classifier"), LoraConfig(target_modules=["query"])) for _ in range(2)]
    first, second = (Perturbation(model) for model in models)
    next(iter(second.parameters.values())).data += 1
    enter_journal(journals[0], plan, first, DPZeroSGD(first.parameters.values()), None, at_checkpoint=False)
    start = (tmp_path / "dpzero_start.safetensors").read_bytes()
    with pytest.raises(DPZeroError, match="Another process"):
        enter_journal(journals[1], plan, second, DPZeroSGD(second.parameters.values()), None, at_checkpoint=False)
    assert (tmp_path / "dpzero_start.safetensors").read_bytes() == start


def test_a_loop_of_ones_own_repeats_where_it_is_asked_to(tmp_path: Path) -> None:
    def released(folder: Path) -> list[Any]:
        data, model = tiny_dataset("classifier"), adapted()
        own = Run(config(deterministic=True), data, expected_batch_size=8, steps=3)
        optimizer = DPZeroSGD(p for p in model.parameters() if p.requires_grad)
        with own.started(model, optimizer, default_data_collator, folder):
            return [own.release(number).estimate.released.values for number in range(3)]

    assert released(tmp_path / "a") == released(tmp_path / "b")


@pytest.fixture(scope="module")
def alike(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("alike")
    for name in "ab":
        run(folder / name, 2, save_strategy="steps", save_steps=2).train()
    return folder


@pytest.fixture
def two_runs(alike: Path, tmp_path: Path) -> Path:
    """The folders a and b of two runs that chance alone tells apart."""
    return Path(shutil.copytree(alike, tmp_path / "runs"))


def test_a_checkpoint_of_another_run_is_refused_whatever_its_name(two_runs: Path) -> None:
    checkpoint = two_runs / "a" / "checkpoint-2"
    with pytest.raises(DPZeroError, match="is of another run"):
        run(two_runs / "b", 4).train(resume_from_checkpoint=str(checkpoint))
    renamed = shutil.copytree(checkpoint, two_runs / "best-2024")
    assert run(two_runs / "a", 4).train(resume_from_checkpoint=str(renamed)).global_step == 4


def test_another_runs_checkpoint_is_passed_over(two_runs: Path) -> None:
    checkpoint = two_runs / "b" / "checkpoint-2"
    own = checkpoint.rename(two_runs / "own")
    shutil.copytree(two_runs / "a" / "checkpoint-2", checkpoint)
    resumed = run(two_runs / "b", 2)
    resumed.train(resume_from_checkpoint=True)
    wanted, found = load_file(own / "adapter_model.safetensors"), get_peft_model_state_dict(resumed.model)
    assert wanted.keys() == found.keys()
    assert all(torch.equal(wanted[name], found[name]) for name in wanted)


def test_a_checkpoint_whose_releases_are_unknown_is_refused(two_runs: Path) -> None:
    checkpoint = two_runs / "a" / "checkpoint-2"
    (checkpoint / "dpzero_journal").unlink()
    with pytest.raises(DPZeroError, match="is of another run"):
        run(two_runs / "a", 4).train(resume_from_checkpoint=str(checkpoint))


@pytest.mark.parametrize("saving", [{"save_strategy": "no"}, {"save_strategy": "steps", "save_steps": 2}])
def test_a_finished_run_is_trained_further(saving: dict[str, Any], tmp_path: Path) -> None:
    tiny_model("classifier").save_pretrained(tmp_path / "base")
    first = run(tmp_path / "out", 4, target_epsilon=0.2, noise_multiplier=None, **saving)
    first.train()
    more = run(tmp_path / "out", 7, seed=9, target_epsilon=0.4, noise_multiplier=None, **saving)
    assert more.train(resume_from_checkpoint=True).global_step == 7
    record = more.privacy_record()
    assert [segment["steps"] for segment in record["segments"]] == [4, 3]
    assert (record["steps"], record["noise_multiplier"]) == (7, record["segments"][-1]["noise_multiplier"])
    assert 0.397 < record["epsilon"] <= 0.4
    assert record["epsilon"] == pytest.approx(by_dp_accounting_alone(record), abs=1e-3)
    more.save_model(str(tmp_path / "release"))
    assert {check.status for check in verify(tmp_path / "release", tmp_path / "base")} == {"ok"}
    with pytest.raises(DPZeroError, match="raise target_epsilon"):
        run(tmp_path / "out", 9, target_epsilon=0.4, noise_multiplier=None).train(resume_from_checkpoint=True)


def factors(trainer: DPZeroTrainer) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in trainer.model.named_parameters() if "lora_" in name}


@pytest.mark.parametrize("both", [False, True])
def test_a_run_goes_on_with_the_factors_that_it_trained(
    both: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = run(tmp_path / "out", 3, save_strategy="no")
    with monkeypatch.context() as patched:
        if both:  # as before A was kept still
            patched.setattr(RunOnDisk, "keep_still", lambda self, model: None)
        before = factors(first)
        first.train()
    after = factors(first)
    assert all(torch.equal(before[name], after[name]) != (both or "lora_B" in name) for name in before)
    more = run(tmp_path / "out", 5, seed=9, save_strategy="no")
    more.tune_on(minutes=0.1)  # as of a new run
    more.model.load_state_dict(first.model.state_dict())  # B is not 0
    more.train(resume_from_checkpoint=True)
    for name, value in factors(more).items():
        assert torch.equal(value, before[name]) != (both or "lora_B" in name), name


def test_a_start_without_what_was_frozen_is_one_of_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patched:
        patched.setattr("peft_dpzero.perturbation.perturbation.adapter_parameters", lambda model: {})
        run(tmp_path / "out", 3, save_strategy="no").train()
    assert run(tmp_path / "out", 5, save_strategy="no").train(resume_from_checkpoint=True).global_step == 5


def test_a_continued_run_resumes_within_its_segment(tmp_path: Path) -> None:
    options = {"deterministic": True, "lr_scheduler_type": "constant"}
    whole = run(tmp_path / "whole", 9, **options)
    whole.train()
    for steps in (3, 6, 9):
        cut = run(tmp_path / "cut", steps, **options)
        cut.train(resume_from_checkpoint=True)
        cut = run(tmp_path / "cut", steps, **options)
        cut.train(resume_from_checkpoint=True)
    assert [len(segment.entries) for segment in read_journal(tmp_path / "cut" / "dpzero_journal").segments] == [3] * 3
    ours, theirs = (dict(trainer.model.named_parameters()) for trainer in (whole, cut))
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_other_settings_or_fewer_steps_do_not_continue_a_run(tmp_path: Path) -> None:
    run(tmp_path, 4).train()
    for steps, changes in ((3, {}), (4, {"num_directions": 3}), (6, {"clipping_threshold": 2.0})):
        with pytest.raises(DPZeroError, match="other settings"):
            run(tmp_path, steps, **changes).train(resume_from_checkpoint=True)
    assert len(read_journal(tmp_path / "dpzero_journal").segments) == 1


def test_training_stops_before_the_step_that_would_pass_its_epsilon(tmp_path: Path) -> None:
    sigma = {"noise_multiplier": 4.0}
    accountant = Accountant("add_or_remove_one", 1e-5, "gaussian")
    cap = accountant.epsilon([Segment(4.0, 4 / 64, 23)]) * 1.001
    capped = run(tmp_path, 40, target_epsilon=cap, **sigma)
    with pytest.warns(UserWarning, match="would pass target_epsilon"):
        done = capped.train().global_step
    spent, one_more = (accountant.epsilon([Segment(4.0, 4 / 64, steps)]) for steps in (done, done + 1))
    assert done == 23
    assert spent <= cap < one_more
    assert capped.privacy_record()["epsilon"] == spent
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        assert run(tmp_path, 40, target_epsilon=cap, **sigma).train(resume_from_checkpoint=True).global_step == done
    with pytest.raises(DPZeroError, match="Not one step"):
        run(tmp_path / "none", 40, target_epsilon=0.001, **sigma).train()


def test_without_a_checkpoint_a_run_goes_on_from_its_start(tmp_path: Path) -> None:
    whole = run(tmp_path, 4, deterministic=True)
    whole.train(resume_from_checkpoint=True)
    path = tmp_path / "dpzero_journal"
    path.write_bytes(b"".join(path.read_bytes().splitlines(keepends=True)[:3]))
    again = run(tmp_path, 4, seed=123, deterministic=True)
    again.train(resume_from_checkpoint=True)
    ours, theirs = (dict(trainer.model.named_parameters()) for trainer in (whole, again))
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_ctrl_c_while_a_release_goes_to_disk_forgets_no_epsilon(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stopped = run(tmp_path / "out", 6)
    real = os.fsync

    def interrupted(file: int) -> None:
        real(file)
        path = tmp_path / "out" / "dpzero_journal"
        if path.exists() and path.read_bytes().count(b'"step"') == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupted)
    with pytest.raises(KeyboardInterrupt):
        stopped.train()
    monkeypatch.setattr(os, "fsync", real)
    assert stopped.state.global_step == 2
    assert stopped.privacy_record()["steps"] == 3
    assert stopped.privacy_record()["epsilon"] == stopped.privacy_plan.epsilon(3)
    stopped.save_model(str(tmp_path / "early"))
    statuses = {check.name: check.status for check in verify(tmp_path / "early")}
    assert "FAILED" not in statuses.values()
    assert stopped.train(resume_from_checkpoint=True).global_step == 6
    assert [entry.step for entry in read_journal(tmp_path / "out" / "dpzero_journal").entries] == list(range(6))


def step_without_a_journal() -> PrivateStep:
    model, data = tiny_model("classifier"), tiny_dataset("classifier")
    plan = make_plan(
        DPZeroConfig(
            noise_multiplier=1.0, target_delta=1e-5, num_directions=2, clipping_threshold=10.0, smoothing_parameter=1e-3
        ),
        len(data),
        4,
        3,
    )
    perturbation, task = Perturbation(model), infer_task(model)
    optimizer = DPZeroSGD(perturbation.parameters.values())
    batches = LogicalBatches(
        data, PoissonSampler(len(data), plan.sample_rate, new_secret()), default_data_collator, Shapes(4, 4)
    )
    losses = Losses(model, task, lambda batch: batch)
    return PrivateStep(model, plan, batches=batches, losses=losses, perturbation=perturbation, optimizer=optimizer)


def test_a_step_without_a_journal_releases_once_and_in_order() -> None:
    step = step_without_a_journal()
    step(1)
    for number in (1, 0):
        with pytest.raises(RuntimeError, match="releases once, in order"):
            step(number)
    step(2)
    with pytest.raises(RuntimeError, match="planned 3 steps"):
        step(3)


def test_a_release_that_was_interrupted_is_not_made_again(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*args: Any) -> None:
        raise KeyboardInterrupt

    step = step_without_a_journal()
    monkeypatch.setattr(step.mechanism, "release", interrupted)
    with pytest.raises(KeyboardInterrupt):
        step(0)
    assert step.made == 1
    with pytest.raises(RuntimeError, match="releases once, in order"):
        step(0)


def test_a_new_journals_name_is_put_on_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[Path] = []
    monkeypatch.setattr("peft_dpzero.release.journal.sync_folder", synced.append)
    for _ in range(2):
        Journal(tmp_path / "dpzero_journal", {"steps": 3}).close()
        assert synced == [tmp_path]


@pytest.mark.parametrize(
    "file", ["adapter_model.safetensors", "optimizer.pt", "trainer_state.json", "privacy_record.json"]
)
def test_a_half_written_checkpoint_is_passed_over(file: str, tmp_path: Path) -> None:
    saving = {"save_strategy": "steps", "save_steps": 2, "deterministic": True}
    whole = run(tmp_path, 6, **saving)
    whole.train()
    shutil.rmtree(tmp_path / "checkpoint-6")
    torn = tmp_path / "checkpoint-4" / file
    torn.write_bytes(torn.read_bytes()[:-40])
    with pytest.raises(DPZeroError, match="incomplete or damaged"):
        run(tmp_path, 6, **saving).train(resume_from_checkpoint=str(torn.parent))
    again = run(tmp_path, 6, **saving)
    again.train(resume_from_checkpoint=True)
    ours, theirs = (dict(trainer.model.named_parameters()) for trainer in (whole, again))
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
