"""What runs under the model: compilers, attention kernels, quantized and offloaded base weights."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate import cpu_offload, disk_offload, dispatch_model
from accelerate.hooks import AlignDevicesHook
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from peft_dpzero import DPZeroConfig, DPZeroError, DPZeroTrainer, TokenTask, infer_task, replay_journal, verify
from peft_dpzero.checks.probe import Probe
from peft_dpzero.checks.quantized import check_quantization
from peft_dpzero.estimation.differences import losses_at
from peft_dpzero.estimation.losses import Losses, Shortcuts
from peft_dpzero.perturbation.perturbation import Perturbation
from peft_dpzero.training.offloading import bring_trained_into_memory
from safetensors.torch import load_file
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch.nn.utils.rnn import pad_sequence
from transformers import (
    AutoModelForCausalLM,
    BertForSequenceClassification,
    LlamaForCausalLM,
    PreTrainedModel,
    TrainerCallback,
)

from tiny import VOCABULARY, arguments, bert_config, llama_config, tiny_dataset, tiny_model, token_rows

pytestmark = pytest.mark.filterwarnings("ignore:TorchaoLoraLinear was instantiated")
CPU = torch.device("cpu")
POINTS = [(0, 1e-2), (0, -1e-2), (1, 1e-2), (1, -1e-2)]
TARGETS = {"classifier": ["query", "value"], "causal_lm": ["q_proj", "v_proj"]}


def lora(base: Any, **changes: Any) -> Any:
    """LoRA on a classifier or a causal LM, away from its start at zero if the base is in memory."""
    torch.manual_seed(3)
    kind = "causal_lm" if isinstance(base, LlamaForCausalLM) else "classifier"
    settings: dict[str, Any] = {"r": 2, "target_modules": TARGETS[kind], "init_lora_weights": False}
    task = {"classifier": "SEQ_CLS", "causal_lm": "CAUSAL_LM"}[kind]
    return get_peft_model(base, LoraConfig(**(settings | {"task_type": task} | changes))).eval()


def one_layer(kind: str) -> PreTrainedModel:
    """A smaller model than `tiny_model(kind)`: compiling takes long."""
    torch.manual_seed(0)
    if kind == "causal_lm":
        return LlamaForCausalLM(llama_config(num_hidden_layers=1)).eval()
    return BertForSequenceClassification(bert_config(num_hidden_layers=1)).eval()


def rows_of_many_lengths(kind: str, count: int = 64) -> Dataset:
    ids = [row[: 4 + i % 13] for i, row in enumerate(token_rows(count, 16))]
    labels = ids if kind == "causal_lm" else [i % 2 for i in range(count)]
    return Dataset.from_dict({"input_ids": ids, "labels": labels})


def padded(rows: list[dict[str, Any]]) -> dict[str, Tensor]:
    ids = [torch.tensor(row["input_ids"]) for row in rows]
    batch = {
        "input_ids": pad_sequence(ids, batch_first=True),
        "attention_mask": pad_sequence([torch.ones_like(row) for row in ids], batch_first=True),
    }
    if isinstance(rows[0]["labels"], int):
        return batch | {"labels": torch.tensor([row["labels"] for row in rows])}
    return batch | {"labels": pad_sequence(ids, batch_first=True, padding_value=-100)}


def trainer(folder: Path, model: Any, data: Dataset, callbacks: Any = None, **changes: Any) -> DPZeroTrainer:
    config = DPZeroConfig(
        noise_multiplier=1.0,
        target_delta=1e-5,
        num_directions=2,
        clipping_threshold=10.0,
        smoothing_parameter=1e-3,
        deterministic=True,
    )
    return DPZeroTrainer(
        model,
        arguments(folder, **changes),
        train_dataset=data,
        data_collator=padded,
        callbacks=callbacks,
        dpzero_config=config,
    )


def released(folder: Path) -> Tensor:
    lines = (folder / "dpzero_journal").read_text().splitlines()[1:]
    return torch.tensor([json.loads(line)["values"] for line in lines], dtype=torch.float64)


def assert_released_alike(one: Path, other: Path) -> None:
    """Up to float32 rounding of the losses: 500 steps of the grid are 0.05 % of the clipping threshold."""
    torch.testing.assert_close(released(one), released(other), rtol=0, atol=500)


def trained(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def assert_same_weights(one: nn.Module, other: nn.Module) -> None:
    first, second = trained(one), trained(other)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


def batch(kind: str, rows: int = 3, length: int = 7) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(5)
    ids = torch.randint(5, VOCABULARY, (rows, length), generator=generator)
    labels = ids if kind == "causal_lm" else ids[:, 0] % 2
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


# ---- torch.compile ----


@pytest.fixture
def compiler(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "no")  # TrainingArguments(torch_compile=True) sets it for good.
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


class Graphs(TrainerCallback):
    """How many graphs were compiled by the end of each step."""

    def __init__(self) -> None:
        self.counts: list[int] = []

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self.counts.append(counters["stats"]["unique_graphs"])


@pytest.mark.slow
@pytest.mark.usefixtures("compiler")
@pytest.mark.parametrize(("how", "kind"), [("passed in", "causal_lm"), ("torch_compile", "classifier")])
def test_compiled_runs_release_what_plain_ones_do_and_stop_compiling(kind: str, how: str, tmp_path: Path) -> None:
    plain = trainer(tmp_path / "plain", lora(one_layer(kind)), rows_of_many_lengths(kind), max_steps=8)
    plain.train()
    model, settings = lora(one_layer(kind)), {"torch_compile": True, "torch_compile_backend": "eager"}
    if how == "passed in":
        model, settings = torch.compile(model, dynamic=True, backend="eager"), {}
    graphs = Graphs()
    run = trainer(tmp_path / "run", model, rows_of_many_lengths(kind), [graphs], max_steps=8, **settings)
    run.train()
    assert_released_alike(tmp_path / "run", tmp_path / "plain")
    # A static graph, dynamic ones of several rows and of one row.
    assert graphs.counts[4:] == graphs.counts[4:5] * 4
    assert 1 <= graphs.counts[-1] <= 4
    assert not counters["graph_break"]

    run.save_model(str(tmp_path / "saved"))
    names = load_file(tmp_path / "saved" / "adapter_model.safetensors").keys()
    assert not [name for name in names if "_orig_mod" in name]
    assert_same_weights(
        PeftModel.from_pretrained(one_layer(kind), tmp_path / "saved", is_trainable=True), plain_model(run)
    )
    assert_same_weights(replay_journal(lora(one_layer(kind)), tmp_path / "run"), plain_model(run))


def plain_model(run: DPZeroTrainer) -> nn.Module:
    return run.accelerator.unwrap_model(run.model, keep_torch_compile=False)


@pytest.mark.slow
@pytest.mark.usefixtures("compiler")
@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler")
def test_inductor_follows_the_perturbed_parameters() -> None:
    model = lora(one_layer("classifier"))
    task, perturbation = infer_task(model), Perturbation(model)
    plain, compiled = Losses(model, task, dict), Losses(torch.compile(model, dynamic=True), task, dict)
    for length in (6, 9):
        many = [batch("classifier", 4, length)]
        torch.testing.assert_close(
            losses_at(compiled, many, perturbation, 0, POINTS), losses_at(plain, many, perturbation, 0, POINTS)
        )
    assert counters["stats"]["unique_graphs"] == 1


def freezing(graph: torch.fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
    """A backend that keeps the parameters that it was first shown."""
    kept = [value.detach().clone() if isinstance(value, nn.Parameter) else None for value in inputs]
    return lambda *values: graph(*(v if k is None else k for v, k in zip(values, kept, strict=True)))


@pytest.mark.usefixtures("compiler")
def test_a_compiler_that_freezes_parameters_is_refused(tmp_path: Path) -> None:
    model = torch.compile(lora(one_layer("classifier")), dynamic=True, backend=freezing)
    with pytest.raises(DPZeroError, match="freezing"):
        trainer(tmp_path, model, tiny_dataset("classifier")).train()
    assert not released(tmp_path).numel()


@pytest.mark.usefixtures("compiler")
def test_models_compiled_in_place_or_in_part_are_refused(tmp_path: Path) -> None:
    whole, part = lora(tiny_model("classifier")), lora(tiny_model("classifier"))
    whole.compile(backend="eager")
    layers = part.base_model.model.bert.encoder.layer
    layers[1] = torch.compile(layers[1], backend="eager")
    for model in (whole, part):
        with pytest.raises(DPZeroError, match="compiled in place"):
            trainer(tmp_path, model, tiny_dataset("classifier"))


# ---- Attention ----


@pytest.mark.parametrize("kind", ["classifier", "causal_lm"])
def test_attention_implementations_release_the_same(kind: str, tmp_path: Path) -> None:
    for implementation in ("eager", "sdpa"):
        base = tiny_model(kind)
        base.set_attn_implementation(implementation)
        assert base.config._attn_implementation == implementation
        trainer(tmp_path / implementation, lora(base), rows_of_many_lengths(kind)).train()
    assert_released_alike(tmp_path / "sdpa", tmp_path / "eager")


# ---- Quantized bases ----


@pytest.fixture
def base_folder(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    config = llama_config(hidden_size=64, intermediate_size=64)
    LlamaForCausalLM(config).save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def loaded(folder: Path, **settings: Any) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **settings)


def int8_by_torchao(folder: Path) -> PreTrainedModel:
    quantization = pytest.importorskip("torchao.quantization")
    model = loaded(folder)
    quantization.quantize_(model, quantization.Int8WeightOnlyConfig())
    return model


def int8_by_transformers(folder: Path) -> PreTrainedModel:
    quantization = pytest.importorskip("torchao.quantization")
    from transformers import TorchAoConfig

    return loaded(folder, quantization_config=TorchAoConfig(quantization.Int8WeightOnlyConfig()), device_map="cpu")


def by_bitsandbytes(folder: Path, **settings: Any) -> PreTrainedModel:
    pytest.importorskip("bitsandbytes")
    from transformers import BitsAndBytesConfig

    return loaded(folder, quantization_config=BitsAndBytesConfig(**settings), device_map="cpu")


def nf4(folder: Path) -> PreTrainedModel:
    return by_bitsandbytes(
        folder,
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
    )


def frozen_bytes(model: nn.Module) -> dict[str, bytes]:
    """What all that is not trained is made of."""

    def plain(tensor: Any) -> list[Tensor]:
        if hasattr(tensor, "__tensor_flatten__"):
            return [part for name in tensor.__tensor_flatten__()[0] for part in plain(getattr(tensor, name))]
        return [tensor]

    names = trained(model).keys()
    return {
        name: b"".join(bytes(part.contiguous().view(torch.uint8).flatten().tolist()) for part in plain(value))
        for name, value in model.state_dict().items()
        if name not in names and isinstance(value, Tensor)
    }


@pytest.mark.parametrize("quantized", [int8_by_torchao, int8_by_transformers, nf4])
def test_quantized_bases_train_under_lora(
    quantized: Callable[[Path], PreTrainedModel], base_folder: Path, tmp_path: Path, capfd: Any
) -> None:
    model = lora(quantized(base_folder))
    start, frozen = trained(model), frozen_bytes(model)
    assert all(p.dtype == torch.float32 for p in start.values())
    run = trainer(tmp_path, model, rows_of_many_lengths("causal_lm"))
    run.train()
    assert run._passes.losses.shortcuts.stacked
    assert run._passes.losses.shortcuts.label_logits is not None
    assert frozen_bytes(model) == frozen
    assert not any(torch.equal(start[name], value) for name, value in trained(model).items())
    assert "batching rule" not in capfd.readouterr().err

    run.save_model(str(tmp_path / "saved"))
    assert_same_weights(replay_journal(lora(quantized(base_folder)), tmp_path), model)
    # What was released does not depend on how the base was stored.
    checks = {check.name: check.status for check in verify(tmp_path / "saved", base_folder)}
    assert (checks["weights"], checks["replay"]) == ("ok", "ok")


@pytest.mark.parametrize("quantized", [int8_by_torchao, nf4])
def test_stacked_points_are_plain_ones_on_quantized_bases(
    quantized: Callable[[Path], PreTrainedModel], base_folder: Path
) -> None:
    model = lora(quantized(base_folder))
    one, perturbation, task = [batch("causal_lm", rows=1)], Perturbation(model), TokenTask(1)
    plain, stacked = Losses(model, task, dict), Losses(model, task, dict, Shortcuts(stacked=True))
    torch.testing.assert_close(
        losses_at(stacked, one, perturbation, 0, POINTS), losses_at(plain, one, perturbation, 0, POINTS)
    )


@pytest.mark.filterwarnings("ignore:MatMul8bitLt")
def test_outlier_columns_couple_examples_and_are_refused(base_folder: Path, tmp_path: Path) -> None:
    layer = by_bitsandbytes(base_folder, load_in_8bit=True).model.layers[0].self_attn.q_proj.eval()
    states = torch.randn(2, 3, 64)
    beside_outlier = torch.stack([states[0], 20 * states[1]])
    with torch.no_grad():
        assert not torch.equal(layer(states)[0], layer(beside_outlier)[0])
    for threshold in (6.0, 0.0):
        model = lora(by_bitsandbytes(base_folder, load_in_8bit=True, llm_int8_threshold=threshold))
        run = trainer(tmp_path / str(threshold), model, tiny_dataset("causal_lm"), max_steps=1)
        if threshold:
            with pytest.raises(DPZeroError, match="llm_int8_threshold"):
                run.train()
        else:
            assert run.train().global_step == 1


def test_llm_int8_layers_are_known_by_name_and_threshold() -> None:
    class Linear8bitLt(nn.Linear):
        state = SimpleNamespace(threshold=6.0)

    model = nn.Sequential(nn.Linear(2, 2), Linear8bitLt(2, 2))
    with pytest.raises(DPZeroError, match=r"^1 is an LLM.int8"):
        check_quantization(model)
    Linear8bitLt.state.threshold = 0.0
    check_quantization(model)


def test_a_quantized_weight_with_nan_is_refused(base_folder: Path, tmp_path: Path) -> None:
    model = lora(int8_by_torchao(base_folder))
    model.get_base_model().model.layers[0].mlp.up_proj.weight.scale.fill_(torch.nan)
    with pytest.raises(DPZeroError, match="up_proj"):
        trainer(tmp_path, model, tiny_dataset("causal_lm")).train()


# ---- Offloaded bases ----

DEVICE_MAP = {
    "model.embed_tokens": "cpu",
    "model.rotary_emb": "cpu",
    "model.norm": "cpu",
    "lm_head": "cpu",
    "model.layers.0": "disk",
    "model.layers.1": "disk",
}


def lora_on_offloaded(folder: Path, offload: Path, **changes: Any) -> Any:
    return lora(loaded(folder, device_map=DEVICE_MAP, offload_folder=offload), **changes)


def dispatched_lora(folder: Path, offload: Path, **changes: Any) -> Any:
    model = lora(loaded(folder), **changes)
    dispatch_model(model.get_base_model(), DEVICE_MAP, main_device="cpu", offload_dir=offload)
    return model


def lora_offloaded_to_disk(folder: Path, offload: Path, **changes: Any) -> Any:
    return disk_offload(lora(loaded(folder), **changes), offload, execution_device=CPU)


def lora_offloaded_to_cpu(folder: Path, offload: Path, **changes: Any) -> Any:
    return cpu_offload(lora(loaded(folder), **changes), execution_device=CPU)


OFFLOADED = [lora_on_offloaded, dispatched_lora, lora_offloaded_to_disk, lora_offloaded_to_cpu]


def test_weights_that_were_loaded_onto_the_disk_are_not_trained(base_folder: Path, tmp_path: Path) -> None:
    model = loaded(base_folder, device_map=DEVICE_MAP, offload_folder=tmp_path / "offload").requires_grad_(True)
    with pytest.raises(DPZeroError, match="is trained and was loaded onto the disk"):
        trainer(tmp_path / "full", model, tiny_dataset("causal_lm")).train()


@pytest.mark.parametrize("offloaded", OFFLOADED)
def test_offloaded_bases_train_as_in_memory(
    offloaded: Callable[[Path, Path], Any], base_folder: Path, tmp_path: Path
) -> None:
    data = rows_of_many_lengths("causal_lm")
    model = offloaded(base_folder, tmp_path / "offload")
    run = trainer(tmp_path / "offloaded", model, data)
    assert not any(p.is_meta for p in model.parameters() if p.requires_grad)
    in_memory = lora(loaded(base_folder))
    start = trained(model)
    with torch.no_grad():
        for name, parameter in in_memory.named_parameters():
            if parameter.requires_grad:
                # PEFT gives LoRA on an offloaded base no values: those are drawn by us.
                assert offloaded is lora_on_offloaded or torch.equal(parameter, start[name])
                parameter.copy_(start[name])
    run.train()
    assert sum(p.is_meta for p in model.parameters()) > 10
    trainer(tmp_path / "memory", in_memory, data).train()
    assert torch.equal(released(tmp_path / "offloaded"), released(tmp_path / "memory"))
    assert_same_weights(model, in_memory)

    run.save_model(str(tmp_path / "saved"))
    checks = {check.name: check.status for check in verify(tmp_path / "saved", base_folder)}
    assert (checks["start"], checks["weights"], checks["replay"]) == ("ok", "ok", "ok")


def test_lora_on_an_offloaded_base_starts_as_peft_starts_it(base_folder: Path, tmp_path: Path) -> None:
    for start in (True, "gaussian"):
        model = lora_on_offloaded(base_folder, tmp_path / "offload", init_lora_weights=start)
        bring_trained_into_memory(model)
        for name, value in trained(model).items():
            assert bool(value.any()) == ("lora_A" in name)


@pytest.mark.parametrize("offloaded", [lora_offloaded_to_disk, lora_offloaded_to_cpu])
def test_stacked_points_load_offloaded_weights_once(
    offloaded: Callable[..., Any], base_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loads = 0
    load = AlignDevicesHook.pre_forward

    def counted(hook: AlignDevicesHook, *args: Any, **kwargs: Any) -> Any:
        nonlocal loads
        loads += hook.offload
        return load(hook, *args, **kwargs)

    monkeypatch.setattr(AlignDevicesHook, "pre_forward", counted)
    counts: dict[str, int] = {}
    for name, layers in {"everywhere": None, "on the last layer": [1]}.items():
        model = offloaded(base_folder, tmp_path / name, layers_to_transform=layers)
        bring_trained_into_memory(model)
        perturbation, task = Perturbation(model), TokenTask(1)
        chosen = Probe(model, CPU, task=task).losses(perturbation, dict)
        alone = Losses(model, task, dict, replace(chosen.shortcuts, stacked=False))
        for kind, losses in {"plain": Losses(model, task, dict), "shared": alone, "stacked": chosen}.items():
            loads = 0
            losses_at(losses, [batch("causal_lm")], perturbation, 0, POINTS)
            counts[f"{kind}, {name}"] = loads
    once = counts["stacked, everywhere"]
    assert once > 10
    assert counts["plain, everywhere"] == counts["plain, on the last layer"] == len(POINTS) * once
    # The shared trunk is loaded once too, without stacking.
    assert once == counts["stacked, on the last layer"] < counts["shared, on the last layer"]
    assert counts["shared, on the last layer"] < counts["shared, everywhere"] < counts["plain, everywhere"]


def test_a_trained_bias_beside_offloaded_weights_is_refused(tmp_path: Path) -> None:
    model = cpu_offload(lora(tiny_model("classifier"), bias="all"), execution_device=CPU)
    with pytest.raises(DPZeroError, match="keep that module in memory"):
        trainer(tmp_path, model, tiny_dataset("classifier"))
