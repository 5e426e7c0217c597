"""The Trainer's manners: batches, steps, logs, checkpoints, interruptions."""

from __future__ import annotations

import contextlib
import json
import logging
import traceback
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft_dpzero import (
    DPZeroConfig,
    DPZeroError,
    DPZeroSGD,
    DPZeroTrainer,
    DPZeroTrainerMixin,
    FunctionTask,
    PrivateStepError,
    Verbalizer,
)
from peft_dpzero.estimation.batching import LogicalBatch
from peft_dpzero.mechanism.noise import ExactNoise
from peft_dpzero.mechanism.private_sum import PrivateDifferences
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import (
    ProgressCallback,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    Trainer,
    TrainerCallback,
    default_data_collator,
)

from tiny import adapted, arguments, config, tiny_dataset, tiny_lora, tiny_model, word_tokenizer


def trainer(folder: Path, model: Any = None, dpzero: DPZeroConfig | None = None, **changes: Any) -> DPZeroTrainer:
    keywords = {key: changes.pop(key) for key in list(changes) if key in KEYWORDS}
    keywords.setdefault("train_dataset", tiny_dataset("classifier"))
    return DPZeroTrainer(model or adapted(), arguments(folder, **changes), dpzero_config=dpzero or config(), **keywords)


KEYWORDS = {"train_dataset", "eval_dataset", "compute_metrics", "callbacks", "optimizers", "data_collator"}


def weights(model: Any) -> torch.Tensor:
    return torch.cat([p.detach().flatten().clone() for p in model.parameters()])


def journal(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "dpzero_journal").read_text().splitlines()][1:]


@pytest.mark.parametrize(
    ("changes", "batch", "steps"),
    [
        ({"max_steps": -1, "num_train_epochs": 3, "gradient_accumulation_steps": 3}, 12, 18),
        ({"max_steps": -1, "num_train_epochs": 0.5}, 4, 8),
        ({"max_steps": 5, "num_train_epochs": 3, "gradient_accumulation_steps": 8}, 32, 5),
    ],
)
def test_batch_accumulation_and_epochs_set_the_plan(
    changes: dict[str, Any], batch: int, steps: int, tmp_path: Path
) -> None:
    run = trainer(tmp_path, **changes)
    plan = run.privacy_plan
    assert (plan.expected_batch_size, plan.sample_rate, plan.steps) == (batch, batch / 64, steps)
    assert run.train().global_step == steps
    assert [entry["step"] for entry in journal(tmp_path)] == list(range(steps))
    assert run.privacy_record()["steps"] == steps


def test_rows_go_through_the_model_a_micro_batch_at_a_time(tmp_path: Path) -> None:
    model = adapted()
    run = trainer(tmp_path, model, max_steps=2, per_device_train_batch_size=8, gradient_accumulation_steps=8)
    sizes: list[int] = []
    losses = run.task.losses

    class Watch(TrainerCallback):
        def on_train_begin(self, *args: Any, **kwargs: Any) -> None:  # The probe is over.
            run.task.losses = lambda outputs, batch: sizes.append(len(batch["labels"])) or losses(outputs, batch)

    run.add_callback(Watch())
    run.train()
    # Rows of 8 tokens are padded to 12, 8 of which meet both sides of both directions in one pass.
    assert sizes == [8] * (64 // 8) * 2


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
    assert len(spent) == 4
    assert spent[-1] == pytest.approx(run.privacy_record()["epsilon"], rel=0.02)
    assert all(log["grad_norm"] > 0 for log in logs if "grad_norm" in log)
    assert [entry["lr"] for entry in journal(tmp_path)] == pytest.approx(rates)


def test_evaluation_averages_the_per_example_losses(tmp_path: Path) -> None:
    data = tiny_dataset("classifier", 10)
    run = trainer(tmp_path, eval_dataset=data)
    ids, labels = torch.tensor(data["input_ids"][:]), torch.tensor(data["labels"][:])
    with torch.no_grad():
        logits = run.model.eval()(input_ids=ids).logits.double()
    wanted = -logits.log_softmax(1)[range(10), labels].mean()
    assert run.evaluate()["eval_loss"] == pytest.approx(float(wanted), rel=1e-5)
    assert torch.allclose(torch.tensor(run.predict(data).predictions).double(), logits, atol=1e-5)


@pytest.mark.parametrize("prompted", [False, True])
def test_evaluation_makes_logits_where_losses_read_only(prompted: bool, tmp_path: Path) -> None:
    data = tiny_dataset("causal_lm", 10)
    task = None
    if prompted:
        data = data.remove_columns("labels").add_column("labels", [0, 1] * 5)
        task = Verbalizer(word_tokenizer(), ["w7", "w9"], causal=True)
    run = DPZeroTrainer(
        tiny_lora("causal_lm"),
        arguments(tmp_path, max_steps=1),
        train_dataset=data,
        eval_dataset=data,
        dpzero_config=config(),
        per_example_loss=task,
        data_collator=default_data_collator if prompted else None,
    )
    run.train()
    held_back: list[bool] = []
    head = run.model.get_output_embeddings()
    head.register_forward_hook(lambda module, args, output: held_back.append(output.numel() == 0))
    sparing, predicted = run.evaluate()["eval_loss"], run.predict(data).predictions
    # Two batches each; a language model's predictions are logits.
    assert sum(held_back) == (4 if prompted else 2)
    del run._passes
    held_back.clear()
    whole, logits = run.evaluate()["eval_loss"], run.predict(data).predictions
    assert sparing == pytest.approx(whole, rel=1e-6)
    assert np.allclose(predicted, logits, atol=1e-5)
    assert not any(held_back)


@pytest.mark.parametrize("train_loss", ["withheld", "nonprivate"])
def test_memory_is_neither_logged_nor_returned(train_loss: str, tmp_path: Path) -> None:
    settings = {"logging_steps": 1, "skip_memory_metrics": False, "eval_dataset": tiny_dataset("classifier", 8)}
    with pytest.warns(UserWarning, match="Memory metrics are switched off"):
        run = trainer(tmp_path, dpzero=config(train_loss=train_loss), **settings)
    output = run.train()
    returned = [output.metrics, run.evaluate(), run.predict(settings["eval_dataset"]).metrics]
    names = {name for log in [*run.state.log_history, *returned] for name in log}
    assert "train_runtime" in output.metrics
    assert not [name for name in names if "mem" in name]
    assert ("train_loss" in output.metrics) == (train_loss == "nonprivate")
    assert (output.training_loss is None) == (train_loss == "withheld")


def test_what_is_not_known_to_be_public_is_left_out_and_named_once(tmp_path: Path) -> None:
    class Talkative(TrainerCallback):
        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            run.log({"longest_row": 512.0, "batch_size": 7.0, "train_mem_cpu_alloc_delta": 5.0, "learning_rate": 0.1})

    data = tiny_dataset("classifier", 8)
    run = trainer(tmp_path, callbacks=[Talkative()])
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run.train()
        run.evaluate(data, metric_key_prefix="dev")
        run.log({"dev_loss": 1.0, "dev_mem_gpu_peaked_delta": 1.0, "test_loss": 1.0})
        run.evaluate(data, metric_key_prefix="train")
        run.log({"train_loss": 1.0, "train_secret": 1.0})
    named = [str(warning.message).partition(". What")[0] for warning in caught if "Not logged" in str(warning.message)]
    assert named[0].endswith(": batch_size, longest_row, train_mem_cpu_alloc_delta")
    assert named[1].endswith(": dev_mem_gpu_peaked_delta, test_loss")
    assert sum("longest_row" in line for line in named) == 1
    logged = {name for log in run.state.log_history for name in log}
    assert logged == {
        *("dev_loss", "dev_runtime", "dev_samples_per_second", "dev_steps_per_second"),
        *("train_runtime", "train_samples_per_second", "train_steps_per_second"),
        *("epoch", "epsilon", "learning_rate", "step"),
    }


def test_a_seq2seq_trainer_keeps_its_arguments_of_generation(tmp_path: Path) -> None:
    class Private(DPZeroTrainerMixin, Seq2SeqTrainer):
        pass

    given = Seq2SeqTrainingArguments(str(tmp_path), use_cpu=True, report_to=[], predict_with_generate=True)
    data = tiny_dataset("seq2seq", 8)
    run = Private(tiny_model("seq2seq"), given, train_dataset=data, dpzero_config=config())
    run.evaluate(data, metric_key_prefix="dev", max_new_tokens=3)
    assert "dev_loss" in run.state.log_history[-1]
    assert run._gen_kwargs["max_new_tokens"] == 3
    run.predict(data, max_new_tokens=2)
    assert run._gen_kwargs["max_new_tokens"] == 2


@pytest.mark.parametrize("where", ["arguments", "model", "embeddings"])
def test_gradient_checkpointing_is_switched_off(where: str, tmp_path: Path) -> None:
    lora = LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj"])
    model = get_peft_model(tiny_model("causal_lm"), lora)
    given = arguments(tmp_path, max_steps=1, gradient_checkpointing=where == "arguments")
    if where == "model":
        model.gradient_checkpointing_enable()
    elif where == "embeddings":
        model.enable_input_require_grads()
    warns = pytest.warns(UserWarning, match="no backward pass") if where == "arguments" else contextlib.nullcontext()
    with warns:
        run = DPZeroTrainer(model, given, train_dataset=tiny_dataset("causal_lm"), dpzero_config=config())
    assert run.train().global_step == 1
    assert not any(getattr(module, "gradient_checkpointing", False) for module in model.modules())
    assert given.gradient_checkpointing == (where == "arguments")


def test_tensorboard_and_callbacks_see_what_is_public(tmp_path: Path) -> None:
    seen: list[dict[str, float]] = []

    class Notes(TrainerCallback):
        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
            seen.append(dict(logs))

    trainer(tmp_path, callbacks=[Notes()], logging_steps=1, report_to=["tensorboard"]).train()
    assert [sorted(logs) for logs in seen[:3]] == [["epoch", "epsilon", "grad_norm", "learning_rate"]] * 3
    events = next(tmp_path.rglob("events.out.tfevents.*"))
    scalars = EventAccumulator(str(events.parent)).Reload()
    tags = set(scalars.Tags()["scalars"])
    assert {"train/learning_rate", "train/grad_norm", "train/epsilon"} <= tags
    assert not [tag for tag in tags if "loss" in tag or "flos" in tag]
    assert [event.value for event in scalars.Scalars("train/epsilon")] == pytest.approx(
        [logs["epsilon"] for logs in seen[:3]]
    )


def test_the_progress_bar_and_the_log_show_what_was_spent_and_released(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    dpzero = config(train_loss="private", clipping="adaptive", noise_multiplier=2.0)
    run = trainer(tmp_path, dpzero=dpzero, max_steps=4, logging_steps=2, disable_tqdm=False)
    run.train()
    last = [log for log in run.state.log_history if "epsilon" in log][-1]
    bar = capsys.readouterr().err
    assert f"ε={last['epsilon']:.4g}, loss={last['loss']:.4g}, C={last['clipping_threshold']:.4g}" in bar
    assert last["clipping_threshold"] == run.run.last.clipping_threshold != dpzero.clipping_threshold

    class Bar(ProgressCallback):
        pass

    run = trainer(tmp_path / "own", callbacks=[Bar()], disable_tqdm=False)
    run.remove_callback(ProgressCallback)
    assert sum(isinstance(callback, ProgressCallback) for callback in run.callback_handler.callbacks) == 1


def test_a_log_never_passes_a_tiny_target(tmp_path: Path) -> None:
    tiny = DPZeroConfig(target_epsilon=0.01, target_delta=1e-5, num_directions=2)
    run = trainer(tmp_path, dpzero=tiny, logging_steps=1)
    run.train()
    spent = [log["epsilon"] for log in run.state.log_history if "epsilon" in log]
    assert spent == sorted(set(spent))
    assert spent[-1] <= 0.01


def test_weight_decay_reaches_weights_and_spares_biases(tmp_path: Path) -> None:
    ends: dict[float, dict[str, torch.Tensor]] = {}
    start = {name: p.detach().clone() for name, p in adapted().named_parameters() if p.requires_grad}
    for decay in (0.0, 0.5):
        model = adapted()
        settings = {"max_steps": 1, "learning_rate": 0.1, "weight_decay": decay}
        trainer(tmp_path / str(decay), model, config(deterministic=True), **settings).train()
        ends[decay] = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
    for name, value in ends[0.0].items():
        wanted = torch.zeros_like(value) if name.endswith("bias") else 0.1 * 0.5 * start[name]
        torch.testing.assert_close(value - ends[0.5][name], wanted, rtol=0, atol=1e-6)


def test_resumed_run_equals_the_uninterrupted_one(tmp_path: Path) -> None:
    settings = {"max_steps": 8, "save_strategy": "steps", "save_steps": 3}
    whole = adapted()
    trainer(tmp_path / "whole", whole, config(deterministic=True), **settings).train()

    class Stop(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 5:
                raise KeyboardInterrupt

    cut = trainer(tmp_path / "cut", adapted(), config(deterministic=True), callbacks=[Stop()], **settings)
    with pytest.raises(KeyboardInterrupt):
        cut.train()
    assert len(journal(tmp_path / "cut")) == 5

    assert cut.privacy_record()["steps"] == 5

    model = adapted()
    forwards = 0

    def count(*args: Any) -> None:
        nonlocal forwards
        forwards += 1

    model.register_forward_hook(count)
    spent: dict[int, int] = {}

    class Forwards(TrainerCallback):
        def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
            self.before = forwards

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            spent[state.global_step - 1] = forwards - self.before

    resumed = trainer(tmp_path / "cut", model, config(deterministic=True), callbacks=[Forwards()], **settings)
    resumed.train(resume_from_checkpoint=True)
    assert list(spent) == [3, 4, 5, 6, 7]
    assert [step for step, passes in spent.items() if passes] == [5, 6, 7]
    assert journal(tmp_path / "cut") == journal(tmp_path / "whole")
    assert resumed.privacy_record()["steps"] == 8
    assert torch.equal(weights(model), weights(whole))


def test_a_resumed_private_run_counts_every_release_once(tmp_path: Path) -> None:
    class Stop(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 3:
                raise KeyboardInterrupt

    settings = {"max_steps": 5, "save_strategy": "steps", "save_steps": 2}
    with pytest.raises(KeyboardInterrupt):
        trainer(tmp_path, callbacks=[Stop()], **settings).train()
    before = journal(tmp_path)
    resumed = trainer(tmp_path, **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert journal(tmp_path)[:3] == before
    assert [entry["step"] for entry in journal(tmp_path)] == list(range(5))
    assert resumed.privacy_record()["epsilon"] == resumed.privacy_plan.epsilon(5)


def test_going_back_to_the_best_checkpoint_forgets_no_release(tmp_path: Path) -> None:
    worst = iter([1.0, 0.5, 0.25])
    run = trainer(
        tmp_path,
        max_steps=3,
        save_strategy="steps",
        save_steps=1,
        eval_strategy="steps",
        eval_steps=1,
        eval_dataset=tiny_dataset("classifier", 4),
        compute_metrics=lambda _: {"score": next(worst)},
        load_best_model_at_end=True,
        metric_for_best_model="score",
    )
    run.train()
    assert run.state.best_model_checkpoint.endswith("checkpoint-1")
    run.save_model(str(tmp_path / "best"))
    record = json.loads((tmp_path / "best" / "privacy_record.json").read_text())
    assert record["steps"] == 3
    for words in ("evaluation data", "the run stopped at an error"):
        assert any(words in gap for gap in record["not_covered"])


def test_a_folder_with_another_runs_journal_is_refused(tmp_path: Path) -> None:
    trainer(tmp_path, max_steps=2).train()
    with pytest.raises(DPZeroError, match="releases of an earlier run"):
        trainer(tmp_path, max_steps=2).train()
    with pytest.raises(DPZeroError, match=r"other settings \(config.noise_multiplier\)"):
        trainer(tmp_path, dpzero=config(noise_multiplier=2.0), max_steps=2).train(resume_from_checkpoint=True)


def test_resuming_a_finished_run_releases_nothing_more(tmp_path: Path) -> None:
    first = trainer(tmp_path, max_steps=2, save_strategy="steps", save_steps=2)
    first.train()
    released = (tmp_path / "dpzero_journal").read_bytes()
    again = trainer(tmp_path, max_steps=2)
    again.train(resume_from_checkpoint=True)
    assert (tmp_path / "dpzero_journal").read_bytes() == released
    assert torch.equal(weights(again.model), weights(first.model))


def test_a_checkpoint_without_its_journal_is_refused(tmp_path: Path) -> None:
    trainer(tmp_path, max_steps=2, save_strategy="steps", save_steps=1).train()
    (tmp_path / "dpzero_journal").unlink()
    with pytest.raises(DPZeroError, match="ε spent is unknown"):
        trainer(tmp_path, max_steps=2).train(resume_from_checkpoint=True)


CANARY = "CANARY 31337"


class Faulty(torch.utils.data.Dataset):  # type: ignore[type-arg]
    """Every row fails to load."""

    column_names = ("input_ids", "labels")

    def __len__(self) -> int:
        return 64

    def __getitem__(self, index: int) -> Any:
        raise ValueError(f"{CANARY} in row {index}")


def second_time(function: Any, error: BaseException) -> Any:
    """`function`, but its second call raises."""
    calls = iter(range(3))

    def failing(*args: Any, **kwargs: Any) -> Any:
        if next(calls, None) == 1:
            raise error
        return function(*args, **kwargs)

    return failing


def shown(error: BaseException) -> str:
    """All that any printer of exceptions could show, even one that looks at suppressed contexts."""
    chain: list[BaseException] = []
    link: BaseException | None = error
    while link is not None:
        chain.append(link)
        link = link.__cause__ or link.__context__
    return "".join("".join(traceback.format_exception(e, chain=False)) + str(e.args) for e in chain)


@pytest.mark.parametrize(
    ("error", "place"), [(KeyboardInterrupt(CANARY), "model"), (ZeroDivisionError(CANARY), "loss")]
)
def test_an_interrupted_step_restores_every_bit(error: BaseException, place: str, tmp_path: Path) -> None:
    model = adapted()
    start = weights(model)
    run = trainer(tmp_path, model, per_device_train_batch_size=32, gradient_accumulation_steps=2)

    class Plant(TrainerCallback):
        def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
            if place == "model":
                layer = model.base_model.model.bert.encoder.layer[1]
                layer.forward = second_time(layer.forward, error)
            else:
                run.task.losses = second_time(run.task.losses, error)

    run.add_callback(Plant())
    expected = KeyboardInterrupt if isinstance(error, KeyboardInterrupt) else PrivateStepError
    with pytest.raises(expected) as caught:
        run.train()
    assert torch.equal(weights(model), start)
    assert journal(tmp_path) == []
    if expected is PrivateStepError:
        assert "ZeroDivisionError in step 0" in str(caught.value)
        assert CANARY not in shown(caught.value)


def test_an_interrupt_before_the_update_leaves_the_step_to_the_journal(tmp_path: Path) -> None:
    class Interrupt(TrainerCallback):
        def on_pre_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
            raise KeyboardInterrupt

    model = adapted()
    start = weights(model)
    run = trainer(tmp_path, model, callbacks=[Interrupt()])
    with pytest.raises(KeyboardInterrupt):
        run.train()
    assert torch.equal(weights(model), start)
    assert len(journal(tmp_path)) == run.privacy_record()["steps"] == 1


@pytest.mark.parametrize("place", ["data set", "collator", "function"])
def test_errors_raised_over_private_data_show_none_of_it(place: str, tmp_path: Path) -> None:
    def fail(rows: Any, *args: Any) -> Any:
        raise KeyError(f"{CANARY}: {rows}")

    settings: dict[str, Any] = {"per_device_train_batch_size": 64}
    if place == "data set":
        settings["train_dataset"] = Faulty()
    if place == "collator":
        settings["data_collator"] = fail
    run = trainer(tmp_path, **settings)
    if place == "function":
        run.task = FunctionTask(fail)
    with pytest.raises(PrivateStepError) as caught:
        run.train()
    assert caught.value.__cause__ is None
    assert CANARY not in shown(caught.value)
    assert "made-up data" in str(caught.value)
    assert "the run stopped is public" in str(caught.value)


def test_what_others_print_over_private_data_is_not_shown(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    def talking(rows: Any) -> Any:
        warnings.warn(CANARY, stacklevel=1)
        logging.getLogger("transformers").error(CANARY)
        return default_data_collator(rows)

    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        trainer(tmp_path, data_collator=talking).train()
    logging.getLogger("transformers").error("heard again")
    assert CANARY not in caplog.text + "".join(str(one.message) for one in warned)
    assert "heard again" in caplog.text


def test_a_withheld_error_holds_no_row_in_its_frames(tmp_path: Path) -> None:
    run = trainer(tmp_path, per_device_train_batch_size=64)
    run.task = FunctionTask(lambda outputs, labels: 1 / 0)
    with pytest.raises(PrivateStepError) as caught:
        run.train()
    held = [value for frame, _ in traceback.walk_tb(caught.value.__traceback__) for value in frame.f_locals.values()]
    assert not [value for value in held if isinstance(value, (LogicalBatch, PrivateDifferences))]
    assert "input_ids" not in repr(LogicalBatch([{"input_ids": torch.ones(1, 2)}], [1]))


def test_optimizer_groups_keep_their_learning_rates(tmp_path: Path) -> None:
    model = adapted()
    head = [p for n, p in model.named_parameters() if p.requires_grad and "classifier" in n]
    rest = [p for n, p in model.named_parameters() if p.requires_grad and "classifier" not in n]
    before = [p.detach().clone() for p in rest]
    groups = [{"params": head, "lr": 0.5}, {"params": rest, "lr": 0.0}]
    started = [p.detach().clone() for p in head]
    trainer(tmp_path, model, optimizers=(DPZeroSGD(groups), None)).train()
    assert all(torch.equal(a, b) for a, b in zip(before, rest, strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(started, head, strict=True))


def test_any_trainer_subclass_can_become_private(tmp_path: Path) -> None:
    class Mine(Trainer):
        def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
            super().log(logs | {"mine": 1.0}, *args, **kwargs)

    class MinePrivate(DPZeroTrainerMixin, Mine):
        pass

    run = MinePrivate(
        adapted(),
        arguments(tmp_path, logging_steps=1),
        train_dataset=tiny_dataset("classifier"),
        dpzero_config=config(),
    )
    run.train()
    assert all("mine" in log and "loss" not in log for log in run.state.log_history)


def test_a_raw_loss_is_logged_only_on_request_and_stated(tmp_path: Path) -> None:
    everyone = {"per_device_train_batch_size": 64, "max_steps": 1, "logging_steps": 1}
    run = trainer(tmp_path, dpzero=config(train_loss="nonprivate", smoothing_parameter=1e-4), **everyone)
    before = run.evaluate(run.train_dataset)["eval_loss"]
    output = run.train()
    logged = [log["loss"] for log in run.state.log_history if "learning_rate" in log]
    assert logged == [pytest.approx(before, rel=1e-3)]
    assert output.training_loss == pytest.approx(before, rel=1e-3)
    run.save_model()
    record = json.loads((tmp_path / "privacy_record.json").read_text())
    assert record["train_loss"] == "nonprivate"
    assert any("training loss" in gap for gap in record["not_covered"])
    assert "train_loss='nonprivate'" in (tmp_path / "README.md").read_text()


def test_deterministic_runs_claim_nothing(tmp_path: Path) -> None:
    run = trainer(tmp_path, dpzero=config(deterministic=True), logging_steps=1)
    run.train()
    run.save_model()
    record = json.loads((tmp_path / "privacy_record.json").read_text())
    assert record["epsilon"] is None
    assert record["deterministic"] is True
    assert record["guarantee"].startswith("none")
    card = (tmp_path / "README.md").read_text()
    assert "no privacy guarantee" in card
    assert "satisfies" not in card


def test_saved_records_claim_the_releases_made(tmp_path: Path) -> None:
    run = trainer(tmp_path, max_steps=4, save_strategy="steps", save_steps=2)
    run.train()
    run.save_model(str(tmp_path / "end"))
    claims = [json.loads((tmp_path / name / "privacy_record.json").read_text()) for name in ("checkpoint-2", "end")]
    assert [claim["steps"] for claim in claims] == [2, 4]
    assert [claim["epsilon"] for claim in claims] == [run.privacy_plan.epsilon(2), run.privacy_plan.epsilon(4)]


def test_a_private_loss_is_logged_and_recorded_every_logging_steps(tmp_path: Path) -> None:
    dpzero = config(train_loss="private", noise_multiplier=0.5)
    run = trainer(tmp_path, dpzero=dpzero, max_steps=6, logging_steps=2, per_device_train_batch_size=64)
    output = run.train()
    logged = {log["step"]: log["loss"] for log in run.state.log_history if "loss" in log}
    assert sorted(logged) == [2, 4, 6]
    assert all(0.3 < loss < 1.1 for loss in logged.values())
    assert output.training_loss == pytest.approx(np.mean(list(logged.values())))
    run.save_model()
    record = json.loads((tmp_path / "privacy_record.json").read_text())
    assert output.metrics["train_loss"] == output.training_loss
    assert record["released_losses"] == {str(step): loss for step, loss in logged.items()}
    assert f"| 6 | {float(f'{logged[6]:.4g}')} |" in (tmp_path / "README.md").read_text()


def test_an_adaptive_threshold_survives_a_crash(tmp_path: Path) -> None:
    def run(folder: Path, **changes: Any) -> DPZeroTrainer:
        dpzero = config(clipping="adaptive", deterministic=True)
        return trainer(folder, dpzero=dpzero, max_steps=6, save_strategy="steps", save_steps=2, **changes)

    class Crash(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 5:
                raise KeyboardInterrupt

    whole = run(tmp_path / "whole")
    whole.train()
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "cut", callbacks=[Crash()]).train()
    resumed = run(tmp_path / "cut")
    resumed.train(resume_from_checkpoint=True)
    assert (tmp_path / "cut/dpzero_journal").read_bytes() == (tmp_path / "whole/dpzero_journal").read_bytes()
    assert torch.equal(weights(resumed.model), weights(whole.model))


def test_half_precision_passes_are_probed_as_they_run(tmp_path: Path) -> None:
    model = get_peft_model(tiny_model("causal_lm"), LoraConfig(task_type="CAUSAL_LM", r=2, init_lora_weights=False))
    run = trainer(tmp_path, model, train_dataset=tiny_dataset("causal_lm"), bf16=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        run.train()
    assert run.state.global_step == 3


def test_examples_beyond_the_public_bound_contribute_nothing(tmp_path: Path) -> None:
    data = tiny_dataset("classifier", length=9)
    for bound, moves in ((9, True), (8, False)):
        settings = {"noise_multiplier": 0.0, "max_length": bound, "deterministic": True}
        run = trainer(tmp_path / str(bound), dpzero=config(**settings), train_dataset=data, max_steps=1)
        before = weights(run.model)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            run.train()
        assert torch.equal(before, weights(run.model)) != moves


def test_a_plan_is_of_the_data_that_is_trained_on(tmp_path: Path) -> None:
    run = DPZeroTrainer(
        adapted(), arguments(tmp_path), train_dataset=tiny_dataset("classifier", count=40), dpzero_config=config()
    )
    assert run.privacy_plan.num_units == 40
    run.train_dataset = tiny_dataset("classifier", count=64)
    run.train()
    assert run.privacy_plan.num_units == 64
    assert run.privacy_record()["sample_rate"] == 4 / 64


def test_a_run_samples_and_adds_what_its_record_says(tmp_path: Path) -> None:
    run = trainer(tmp_path, dpzero=config(noise_multiplier=1.5), max_steps=1)
    run.train()
    record, sampler, noise = run.privacy_record(), run.run.step.batches._sampler, run.run.step.mechanism._noise
    assert (sampler.num_units, sampler.sample_rate) == (len(run.train_dataset), record["sample_rate"])
    assert type(noise) is ExactNoise
    assert noise.scale == record["noise_multiplier"] * record["grid_units_per_clipping_threshold"]
