"""The optimizer against its formula."""

from __future__ import annotations

import pytest
import torch
from peft_dpzero import DPZeroOptimizer, Estimate, Released
from peft_dpzero.perturbation.perturbation import Perturbation
from torch import nn


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_updates_equal_the_formula(momentum: float) -> None:
    model = nn.Linear(5, 3)
    perturbation = Perturbation(model, seed=1)
    groups = [{"params": [model.weight], "weight_decay": 0.1}, {"params": [model.bias], "lr": 0.5}]
    optimizer = DPZeroOptimizer(groups, lr=0.2, momentum=momentum)
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


def test_a_release_is_used_once() -> None:
    model = nn.Linear(2, 2)
    optimizer = DPZeroOptimizer(model.parameters(), lr=0.1)
    optimizer.step(Estimate(Released(0, (1,), (1.0,), 1.0), Perturbation(model)))
    with pytest.raises(RuntimeError, match="no release to apply"):
        optimizer.step()


def test_small_updates_add_up_in_half_precision() -> None:
    model = nn.Linear(64, 64).bfloat16()
    nn.init.ones_(model.weight)
    perturbation = Perturbation(model)
    optimizer = DPZeroOptimizer(model.parameters(), lr=1e-5)
    total = torch.zeros(64, 64, dtype=torch.float64)
    for step in range(300):
        optimizer.step(Estimate(Released(0, (1,), (1.0,), 1.0), perturbation))
        total += 1e-5 * perturbation.directions.entry(0, 0, "weight").double()
        if step == 150:
            saved = optimizer.state_dict()
            optimizer = DPZeroOptimizer(model.parameters(), lr=1e-5)
            optimizer.load_state_dict(saved)
            assert optimizer.state[model.weight]["master"].dtype == torch.float32
    torch.testing.assert_close(optimizer.state[model.weight]["master"].double(), 1 - total, rtol=1e-4, atol=1e-5)
    assert torch.equal(model.weight, optimizer.state[model.weight]["master"].bfloat16())
    assert not torch.equal(model.weight, torch.ones_like(model.weight))
