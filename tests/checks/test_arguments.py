"""What is refused, before any data is read."""

from __future__ import annotations

import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from datasets import IterableDataset
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from peft_dpzero import (
    DPZeroAdamW,
    DPZeroConfig,
    DPZeroError,
    DPZeroOptimizer,
    DPZeroSGD,
    DPZeroTrainer,
    DPZeroTrainerMixin,
    infer_task,
)
from peft_dpzero.checks.arguments import check_arguments
from peft_dpzero.checks.probe import Probe
from peft_dpzero.estimation.shapes import Shapes
from peft_dpzero.perturbation.perturbation import Perturbation
from transformers import (
    DataCollatorWithFlattening,
    GPT2Config,
    GPT2LMHeadModel,
    Trainer,
    TrainingArguments,
)

from tiny import adapted, arguments, config, tiny_dataset, tiny_model


class Unreadable(torch.utils.data.Dataset):  # type: ignore[type-arg]
    """Has a length and columns, and fails when a row is read."""

    def __init__(self, length: int = 64, columns: tuple[str, ...] = ("input_ids", "attention_mask", "labels")) -> None:
        self.length = length
        self.column_names = list(columns)

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> Any:
        raise AssertionError("data was read")


def refused(folder: Path, words: str, model: Any = None, dpzero: DPZeroConfig | None = None, **changes: Any) -> None:
    data = changes.pop("train_dataset", Unreadable())
    names = ("data_collator", "compute_loss_func", "processing_class", "optimizers", "optimizer_cls_and_kwargs")
    keywords = {key: changes.pop(key) for key in names if key in changes}
    with pytest.raises(DPZeroError, match=words):
        DPZeroTrainer(
            adapted() if model is None else model,
            arguments(folder, **changes),
            train_dataset=data,
            dpzero_config=dpzero or config(),
            **keywords,
        ).train()
    assert not (folder / "dpzero_journal").exists()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("deepspeed", "config.json"),
        ("fp16", True),
        ("neftune_noise_alpha", 5.0),
        ("auto_find_batch_size", True),
        ("torch_empty_cache_steps", 4),
        ("label_smoothing_factor", 0.1),
        ("include_num_input_tokens_seen", "all"),
        ("train_sampling_strategy", "group_by_length"),
        ("group_by_length", True),
        ("debug", ["underflow_overflow"]),
        ("use_liger_kernel", True),
        ("bf16_full_eval", True),
        ("packing", True),
        ("padding_free", True),
        ("hub_strategy", "all_checkpoints"),
    ],
)
def test_arguments_that_break_privacy_are_refused_by_name(name: str, value: Any) -> None:
    check_arguments(SimpleNamespace())
    with pytest.raises(DPZeroError, match=name):
        check_arguments(SimpleNamespace(**{name: value}))


def test_data_that_cannot_be_sampled_is_refused(tmp_path: Path) -> None:
    stream = IterableDataset.from_generator(lambda: iter(tiny_dataset("classifier")))
    refused(tmp_path, "iterable or streaming", train_dataset=stream)
    refused(tmp_path, "missing", train_dataset=None)
    refused(tmp_path, "empty", train_dataset=Unreadable(0))
    refused(tmp_path, "no 'labels' column", train_dataset=Unreadable(columns=("input_ids", "text")))


def test_impossible_budgets_are_refused(tmp_path: Path) -> None:
    refused(tmp_path, "larger than the data", per_device_train_batch_size=65)
    refused(tmp_path, "1/N", dpzero=config(target_delta=1 / 64))
    refused(tmp_path, "no steps", max_steps=-1, num_train_epochs=0)
    refused(tmp_path, "num_train_epochs", dpzero=config(minutes=1.0), max_steps=-1, num_train_epochs=2)


def test_losses_and_collators_that_join_examples_are_refused(tmp_path: Path) -> None:
    refused(tmp_path, "joins examples", data_collator=DataCollatorWithFlattening())
    refused(tmp_path, "set optim", optimizer_cls_and_kwargs=(torch.optim.SGD, {}))
    refused(tmp_path, "per_example_loss", compute_loss_func=lambda outputs, labels, num_items_in_batch: 0.0)


def test_models_that_cannot_be_tuned_are_refused(tmp_path: Path) -> None:
    frozen = tiny_model("classifier").requires_grad_(False)
    refused(tmp_path, "frozen", model=frozen)

    broken = adapted()
    next(broken.parameters()).data[0] = float("nan")
    refused(tmp_path, "NaN or infinity", model=broken)

    unused = tiny_model("classifier").requires_grad_(False)
    unused.extra = torch.nn.Linear(2, 2)
    refused(tmp_path, "do not reach", model=unused)

    named = get_peft_model(tiny_model("classifier"), LoraConfig(target_modules=["query"]), adapter_name="private")
    refused(tmp_path, "named 'default'", model=named)

    second = adapted()
    second.add_adapter("private", LoraConfig(target_modules=["query"]))
    second.set_adapter("private")
    refused(tmp_path, "adapters default, private", model=second)

    injected = tiny_model("classifier")
    injected.add_adapter(LoraConfig(r=2, target_modules=["query"]))
    refused(tmp_path, "get_peft_model", model=injected)


def test_a_model_that_would_be_built_again_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DPZeroError, match=r"pass model=model_init\(\)"):
        DPZeroTrainer(
            args=arguments(tmp_path), train_dataset=Unreadable(), dpzero_config=config(), model_init=lambda: adapted()
        )


class BatchStatistics(torch.nn.BatchNorm1d):
    """Batch norm over tokens that stays in train mode."""

    def __init__(self, features: int) -> None:
        super().__init__(features, track_running_stats=False)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return super().forward(hidden.flatten(0, -2)).view_as(hidden)


class Centred(torch.nn.Module):
    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return hidden - hidden.mean(0)


class CapacityDropping(torch.nn.Module):
    """Serves the first tokens of the batch only, as a mixture of experts with a capacity does."""

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        served = torch.arange(hidden.shape[:-1].numel()).view(*hidden.shape[:-1], 1) < 8
        return hidden * served


def test_batch_statistics_are_refused(tmp_path: Path) -> None:
    base = tiny_model("classifier")
    base.bert.encoder.layer[0].output.dropout = BatchStatistics(16)
    refused(tmp_path, "batch norm", model=adapted(base))


@pytest.mark.parametrize("mixing", [Centred(), CapacityDropping()])
def test_rows_of_a_model_that_mixes_examples_go_one_at_a_time(mixing: torch.nn.Module, tmp_path: Path) -> None:
    base = tiny_model("classifier")
    base.bert.encoder.layer[0].output.dropout = mixing
    sizes: set[int] = set()
    base.classifier.register_forward_pre_hook(lambda module, args: sizes.add(len(args[0])))
    run = DPZeroTrainer(
        adapted(base), arguments(tmp_path), train_dataset=tiny_dataset("classifier"), dpzero_config=config()
    )
    with pytest.warns(UserWarning, match="one at a time"):
        run.train()
    assert sizes == {1}


def gpt2() -> Any:
    sizes = {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 64}
    return GPT2LMHeadModel(GPT2Config(vocab_size=60, pad_token_id=0, bos_token_id=1, eos_token_id=1, **sizes)).eval()


@pytest.mark.parametrize("kind", ["gpt2", "causal_lm", "seq2seq", "prompt"])
def test_padding_on_the_right_moves_no_example(kind: str) -> None:
    if kind == "prompt":
        prompt = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
        model = get_peft_model(tiny_model("causal_lm"), prompt).eval()
    else:
        model = gpt2() if kind == "gpt2" else tiny_model(kind)
    probe = Probe(model, torch.device("cpu"), infer_task(model))
    shapes = probe.fit_shapes(Perturbation(model), Shapes(64, 8))
    assert probe.reason is None or kind == "seq2seq"
    assert shapes.limit == {"gpt2": 64, "causal_lm": 64, "seq2seq": None, "prompt": 61}[kind]


def test_mixing_behind_a_head_of_zeros_is_found() -> None:
    base = tiny_model("classifier")
    base.bert.encoder.layer[0].output.dropout = Centred()
    torch.nn.init.zeros_(base.classifier.weight)
    probe = Probe(base, torch.device("cpu"), infer_task(base), asserted=True)
    assert probe.fit_shapes(Perturbation(base), Shapes(64, 8)).alone


def test_an_adapter_that_is_off_is_refused(tmp_path: Path) -> None:
    config_without_head = LoraConfig(r=2, target_modules=["query", "value"])
    model = get_peft_model(tiny_model("classifier"), config_without_head)
    model.base_model.disable_adapter_layers()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_" in name)
    refused(tmp_path, "do not reach", model=model)


def test_several_gpus_in_one_process_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(TrainingArguments, "n_gpu", property(lambda self: 2))
    refused(tmp_path, "nn.DataParallel")


def test_optimizers_that_need_gradients_are_refused(tmp_path: Path) -> None:
    model = adapted()
    refused(tmp_path, "AdamW", model=model, optimizers=(torch.optim.AdamW(model.parameters()), None))


def test_a_budget_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="target_epsilon"):
        DPZeroConfig(target_epsilon=0.0, target_delta=1e-5)


def test_custom_samplers_are_refused(tmp_path: Path) -> None:
    class Ordered(Trainer):
        def _get_train_sampler(self, train_dataset: Any = None) -> Any:
            return torch.utils.data.SequentialSampler(train_dataset)

    class Private(DPZeroTrainerMixin, Ordered):
        pass

    with pytest.raises(DPZeroError, match="sampler"):
        Private(adapted(), arguments(tmp_path), train_dataset=Unreadable(), dpzero_config=config())


def test_a_config_is_required_and_searches_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DPZeroError, match="dpzero_config"):
        DPZeroTrainer(adapted(), arguments(tmp_path), train_dataset=Unreadable())
    run = DPZeroTrainer(adapted(), arguments(tmp_path), train_dataset=Unreadable(), dpzero_config=config())
    with pytest.raises(DPZeroError, match="ε"):
        run.hyperparameter_search()


def test_a_loss_that_is_already_averaged_is_refused(tmp_path: Path) -> None:
    run = DPZeroTrainer(
        adapted(),
        arguments(tmp_path),
        train_dataset=tiny_dataset("classifier"),
        dpzero_config=config(),
        per_example_loss=lambda outputs, labels: outputs.logits.mean(),
    )
    with pytest.raises(DPZeroError, match="neither averaged over the batch"):
        run.train()


def test_missing_labels_in_a_batch_name_the_fix(tmp_path: Path) -> None:
    rows = [{"input_ids": [5, 6, 7], "attention_mask": [1, 1, 1]}] * 64
    run = DPZeroTrainer(adapted(), arguments(tmp_path), train_dataset=rows, dpzero_config=config())
    with pytest.raises(DPZeroError, match="no 'labels'"):
        run.train()


@pytest.mark.parametrize(
    ("changes", "kind", "settings"),
    [
        ({}, DPZeroAdamW, {"betas": (0.9, 0.999), "eps": 1e-8}),
        (
            {"optim": "adamw_torch", "adam_beta2": 0.99, "adam_epsilon": 1e-6},
            DPZeroAdamW,
            {"betas": (0.9, 0.99), "eps": 1e-6},
        ),
        ({"optim": "sgd", "weight_decay": 0.1}, DPZeroSGD, {"momentum": 0.0, "weight_decay": 0.1}),
        ({"optim": "sgd", "optim_args": "momentum=0.5"}, DPZeroSGD, {"momentum": 0.5}),
    ],
)
def test_the_optimizer_is_what_the_arguments_ask_for(
    changes: dict[str, Any], kind: type[DPZeroOptimizer], settings: dict[str, Any], tmp_path: Path
) -> None:
    run = DPZeroTrainer(
        adapted(), arguments(tmp_path, **changes), train_dataset=tiny_dataset("classifier"), dpzero_config=config()
    )
    optimizer = run.create_optimizer()
    assert type(optimizer) is kind
    assert settings.items() <= optimizer.param_groups[0].items()


def test_other_optimizers_are_refused(tmp_path: Path) -> None:
    refused(tmp_path, "optim=.*adafactor.* use one of them", optim="adafactor")
    refused(tmp_path, "DPZeroSGD has no nesterov", optim="sgd", optim_args="nesterov=true")


@pytest.mark.parametrize(("changes", "warns"), [({"learning_rate": 5e-5}, True), ({"learning_rate": 5e-3}, False)])
def test_a_learning_rate_that_moves_nothing_is_told(changes: dict[str, Any], warns: bool, tmp_path: Path) -> None:
    run = DPZeroTrainer(
        adapted(),
        arguments(tmp_path, max_steps=4, **changes),
        train_dataset=tiny_dataset("classifier"),
        dpzero_config=config(),
    )
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        run.train()
    assert any("moves no number by more than 0.0002" in str(one.message) for one in told) is warns


@pytest.mark.parametrize("smoothing", [1e-8, 3.0])
def test_points_too_near_or_too_far_are_refused(smoothing: float) -> None:
    with pytest.raises(ValueError, match="smoothing_parameter must lie between 1e-06 and 1"):
        config(smoothing_parameter=smoothing)
