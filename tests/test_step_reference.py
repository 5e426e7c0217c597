"""One Trainer step against an independent float64 computation from the formulas."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PrefixTuningConfig, get_peft_model
from peft_dpzero import DPZeroConfig, DPZeroTrainer
from peft_dpzero.perturbation.directions import Directions
from torch import Tensor

from tiny import arguments, tiny_dataset, tiny_model

ROWS = 6
RATE = 0.1
SMOOTHING = 1e-2


def adapted(kind: str, adapter: str) -> Any:
    task = {"classifier": "SEQ_CLS", "causal_lm": "CAUSAL_LM"}[kind]
    names = {"classifier": ["query", "value"], "causal_lm": ["q_proj", "v_proj"]}[kind]
    configs = {
        "lora": LoraConfig(task_type=task, r=2, target_modules=names, init_lora_weights=False),
        "prefix": PrefixTuningConfig(task_type=task, num_virtual_tokens=3),
    }
    return get_peft_model(tiny_model(kind), configs[adapter]).double().eval()


def example_loss(model: Any, kind: str, row: dict[str, Any]) -> Tensor:
    """−log p of the label, or its mean over the predicted tokens, straight from the logits."""
    ids = torch.tensor([row["input_ids"]])
    log_p = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[0].log_softmax(-1)
    if kind == "classifier":
        return -log_p[row["labels"]]
    return -torch.stack([log_p[t, ids[0, t + 1]] for t in range(ids.shape[1] - 1)]).mean()


@torch.no_grad()
def reference_update(model: Any, kind: str, config: DPZeroConfig) -> dict[str, Tensor]:
    """−η/(B·K) Σ_i Σ_k clip(d_i)_k z_k for each parameter, one example and one direction at a time."""
    rows = list(tiny_dataset(kind, ROWS))
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    directions = Directions(trained.items(), config.direction_seed, config.direction_distribution)
    start = {name: p.clone() for name, p in trained.items()}
    zs = [{n: directions.entry(0, k, n).double() for n in trained} for k in range(config.num_directions)]

    def losses(scale: float, z: dict[str, Tensor]) -> Tensor:
        for name, p in trained.items():
            p.copy_(start[name] + scale * z[name])
        values = torch.stack([example_loss(model, kind, row) for row in rows])
        for name, p in trained.items():
            p.copy_(start[name])
        return values

    columns = []
    for z in zs:
        if config.settled().difference == "central":
            columns.append((losses(SMOOTHING, z) - losses(-SMOOTHING, z)) / (2 * SMOOTHING))
        else:
            columns.append((losses(SMOOTHING, z) - losses(0.0, z)) / SMOOTHING)
    d = torch.stack(columns, dim=1)
    v = torch.stack([row * min(1.0, config.clipping_threshold / float(row.norm())) for row in d])
    g = v.sum(0) / (ROWS * config.num_directions)
    return {name: -RATE * sum(float(g[k]) * zs[k][name] for k in range(len(zs))) for name in trained}


def trained_update(model: Any, kind: str, config: DPZeroConfig, folder: Path) -> dict[str, Tensor]:
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    start = {name: p.detach().clone() for name, p in trained.items()}
    settings = arguments(
        folder,
        max_steps=1,
        per_device_train_batch_size=ROWS,
        learning_rate=RATE,
        lr_scheduler_type="constant",
        optim="sgd",
    )
    DPZeroTrainer(model, settings, train_dataset=tiny_dataset(kind, ROWS), dpzero_config=config).train()
    return {name: p.detach() - start[name] for name, p in trained.items()}


def relative_error(got: dict[str, Tensor], wanted: dict[str, Tensor]) -> float:
    a = torch.cat([got[name].flatten() for name in wanted])
    b = torch.cat([wanted[name].flatten() for name in wanted])
    return float((a - b).norm() / b.norm())


@pytest.mark.parametrize("difference", ["central", "forward"])
@pytest.mark.parametrize("num_directions", [1, 5])
@pytest.mark.parametrize("adapter", ["lora", "prefix"])
@pytest.mark.parametrize("kind", ["classifier", "causal_lm"])
def test_unclipped_noiseless_step_equals_the_formula(
    kind: str, adapter: str, num_directions: int, difference: str, tmp_path: Path
) -> None:
    config = DPZeroConfig(
        noise_multiplier=0,
        target_delta=1e-5,
        clipping_threshold=float("inf"),
        num_directions=num_directions,
        smoothing_parameter=SMOOTHING,
        difference=difference,
    )
    model = adapted(kind, adapter)
    wanted = reference_update(model, kind, config)
    assert relative_error(trained_update(model, kind, config, tmp_path), wanted) < 1e-5


def test_clipped_step_clips_the_vector_of_directions(tmp_path: Path) -> None:
    model = adapted("classifier", "lora")
    config = DPZeroConfig(
        noise_multiplier=0,
        target_delta=1e-5,
        clipping_threshold=0.05,
        num_directions=5,
        smoothing_parameter=SMOOTHING,
    )
    wanted = reference_update(model, "classifier", config)
    unclipped = reference_update(model, "classifier", config.replace(clipping_threshold=float("inf")))
    assert relative_error(unclipped, wanted) > 0.5
    assert relative_error(trained_update(model, "classifier", config, tmp_path), wanted) < 1e-4
