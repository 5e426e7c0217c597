"""The optimizer against its formula."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from peft_dpzero import DPZeroAdamW, DPZeroOptimizer, DPZeroSGD, Estimate, Released
from peft_dpzero.perturbation.perturbation import Perturbation
from torch import nn


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_updates_equal_the_formula(momentum: float) -> None:
    model = nn.Linear(5, 3)
    perturbation = Perturbation(model, seed=1)
    groups = [{"params": [model.weight], "weight_decay": 0.1}, {"params": [model.bias], "lr": 0.5}]
    optimizer = DPZeroSGD(groups, lr=0.2, momentum=momentum)
    theta = {name: p.detach().double().clone() for name, p in model.named_parameters()}
    velocity = {name: torch.zeros_like(value) for name, value in theta.items()}
    for step in range(4):
        coefficients = (0.3 * step, -1.0)
        optimizer.step(Estimate(Released(step, (1, 2), coefficients, 1.0), perturbation))
        for name, (rate, decay) in {"weight": (0.2, 0.1), "bias": (0.5, 0.0)}.items():
            z = [perturbation.directions.entry(step, k, name).double() for k in range(2)]
            gradient = coefficients[0] * z[0] + coefficients[1] * z[1] + decay * theta[name]
            velocity[name] = momentum * velocity[name] + gradient
            theta[name] = theta[name] - rate * velocity[name]
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.detach().double(), theta[name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("betas", [(0.9, 0.999), (0.0, 0.5)])
def test_adamw_is_torchs_on_the_same_gradient(betas: tuple[float, float]) -> None:
    model, reference = nn.Linear(5, 3), nn.Linear(5, 3).double()
    reference.load_state_dict(model.state_dict())
    perturbation = Perturbation(model, seed=1)

    def groups(of: nn.Linear) -> list[dict[str, Any]]:
        return [{"params": [of.weight], "weight_decay": 0.1}, {"params": [of.bias], "lr": 0.5}]

    settings = {"lr": 0.2, "betas": betas, "eps": 1e-3, "weight_decay": 0.0}
    ours, torchs = DPZeroAdamW(groups(model), **settings), torch.optim.AdamW(groups(reference), **settings)
    for step in range(6):
        coefficients = (0.3 * step, -1.0)
        ours.step(Estimate(Released(step, (1, 2), coefficients, 1.0), perturbation))
        for name, parameter in reference.named_parameters():
            z = [perturbation.directions.entry(step, k, name).double() for k in range(2)]
            parameter.grad = coefficients[0] * z[0] + coefficients[1] * z[1]
        torchs.step()
        if step == 2:
            saved = ours.state_dict()
            ours = DPZeroAdamW(groups(model), **settings)
            ours.load_state_dict(saved)
    for parameter, expected in zip(model.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(parameter.detach().double(), expected.detach(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("build", "told"),
    [
        (lambda p: DPZeroSGD(p, lr=-1.0), "lr must be >= 0"),
        (lambda p: DPZeroSGD(p, momentum=1.0), "momentum must lie in"),
        (lambda p: DPZeroAdamW(p, betas=(0.9, 1.0)), "betas must lie in"),
        (lambda p: DPZeroAdamW(p, eps=0.0), "eps must be > 0"),
        (lambda p: DPZeroAdamW(p, weight_decay=-0.1), "weight_decay must be >= 0"),
    ],
)
def test_bad_settings_are_told(build: Callable[[list[torch.Tensor]], DPZeroOptimizer], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        build([torch.zeros(1)])


def test_a_release_is_used_once() -> None:
    model = nn.Linear(2, 2)
    optimizer = DPZeroSGD(model.parameters(), lr=0.1)
    optimizer.step(Estimate(Released(0, (1,), (1.0,), 1.0), Perturbation(model)))
    with pytest.raises(RuntimeError, match="no release to apply"):
        optimizer.step()


def test_small_updates_add_up_in_half_precision() -> None:
    model = nn.Linear(64, 64).bfloat16()
    nn.init.ones_(model.weight)
    perturbation = Perturbation(model)
    optimizer = DPZeroSGD(model.parameters(), lr=1e-5)
    total = torch.zeros(64, 64, dtype=torch.float64)
    for step in range(300):
        optimizer.step(Estimate(Released(0, (1,), (1.0,), 1.0), perturbation))
        total += 1e-5 * perturbation.directions.entry(0, 0, "weight").double()
        if step == 150:
            saved = optimizer.state_dict()
            optimizer = DPZeroSGD(model.parameters(), lr=1e-5)
            optimizer.load_state_dict(saved)
            assert optimizer.state[model.weight]["master"].dtype == torch.float32
    torch.testing.assert_close(optimizer.state[model.weight]["master"].double(), 1 - total, rtol=1e-4, atol=1e-5)
    assert torch.equal(model.weight, optimizer.state[model.weight]["master"].bfloat16())
    assert not torch.equal(model.weight, torch.ones_like(model.weight))


def test_adamw_rounds_each_operation_once() -> None:
    """As NumPy's operations do, which are IEEE 754's on every machine: torch's root on a CPU is not."""
    model = nn.Linear(300, 200, bias=False)
    nn.init.zeros_(model.weight)
    perturbation = Perturbation(model, seed=1)
    optimizer = DPZeroAdamW(model.parameters(), lr=0.5, betas=(0.5, 0.625), eps=2.0**-20)
    optimizer.step(Estimate(Released(0, (1,), (0.3,), 1.0), perturbation))
    gradient = perturbation.directions.entry(0, 0, "weight").numpy() * np.float32(0.3)
    root = np.sqrt(gradient * gradient * np.float32(0.375))
    unbias = math.sqrt(0.375)
    wanted = gradient * np.float32(0.5) / (root + np.float32(2.0**-20 * unbias)) * np.float32(-unbias)
    np.testing.assert_array_equal(model.weight.detach().numpy(), wanted)
