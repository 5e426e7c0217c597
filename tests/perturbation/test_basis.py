"""Directions in a basis: exact sums, the same bits however they are made, and updates in coordinates."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft_dpzero import DPZeroAdamW, DPZeroError, DPZeroSGD, Estimate, Released
from peft_dpzero.perturbation.basis import Basis
from peft_dpzero.perturbation.perturbation import Perturbation
from peft_dpzero.release.start import BASIS_NAME, load_basis, save_basis
from torch import Tensor, nn

UNIT = 2.0**-15


def basis_over(model: nn.Module, size: int = 5, seed: int = 0) -> Basis:
    entries = sum(p.numel() for p in model.parameters())
    vectors = torch.randn(size, entries, generator=torch.Generator().manual_seed(seed)) / entries**0.5
    return Basis.of(vectors, [name for name, _ in model.named_parameters()])


def flat(tensors: dict[str, Tensor]) -> Tensor:
    return torch.cat([tensor.flatten() for tensor in tensors.values()])


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 70), st.integers(1, 9), st.integers(0, 2**31), st.floats(1e-30, 1e30))
def test_sums_are_those_of_float64_and_the_same_bits_one_by_one(size: int, rows: int, seed: int, scale: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    basis = Basis(torch.randint(-(2**15), 2**15, (size, 33), generator=generator).to(torch.int16), ["p"])
    weights = torch.randn(rows, size, generator=generator, dtype=torch.float64) * scale
    made = basis.combined(weights)
    expected = weights @ basis.vectors.double() * UNIT
    largest = float(weights.abs().max()) * size
    torch.testing.assert_close(made.double(), expected, rtol=1e-6, atol=largest * 2.0**-24)
    for row, one in zip(weights, made, strict=True):
        assert torch.equal(basis.combined(row[None])[0], one)


def test_threads_change_no_bit() -> None:
    basis = Basis(torch.randint(-(2**15), 2**15, (64, 70_000)).to(torch.int16), ["p"])
    weights = torch.randn(16, 64)
    before = torch.get_num_threads()
    made = []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            made.append(basis.combined(weights))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(*made)


def test_no_weights_make_nothing() -> None:
    basis = Basis(torch.ones(3, 4, dtype=torch.int16), ["p"])
    assert torch.equal(basis.combined(torch.zeros(2, 3)), torch.zeros(2, 4))


@pytest.mark.parametrize("distribution", ["gaussian", "rademacher", "sphere", "orthogonal"])
def test_points_are_theta_plus_a_vector_of_the_span(distribution: str) -> None:
    model = nn.Sequential(nn.Linear(7, 5), nn.Linear(5, 2))
    basis = basis_over(model)
    perturbation = Perturbation(model, seed=3, distribution=distribution, basis=basis)
    theta = {name: p.detach().clone() for name, p in model.named_parameters()}
    points = [(0, 0.5), (0, -0.5), (20, 0.25)]
    stacked = perturbation.stacked(1, points)
    for number, (k, scale) in enumerate(points):
        with perturbation.at(1, k, scale):
            moved = {name: p.detach().clone() for name, p in model.named_parameters()}
        assert all(torch.equal(moved[name], stacked[name][number]) for name in moved)
        shift = (flat(moved) - flat(theta)).double() / scale
        coordinates = torch.linalg.lstsq(basis.vectors.double().T * UNIT, shift).solution
        torch.testing.assert_close(basis.vectors.double().T @ coordinates * UNIT, shift, rtol=1e-3, atol=1e-5)
        expected = perturbation.directions.coordinates(1, {k: 1.0})  # type: ignore[union-attr]
        torch.testing.assert_close(coordinates, expected, rtol=1e-3, atol=1e-4)
    assert all(torch.equal(p, theta[name]) for name, p in model.named_parameters())


@pytest.mark.parametrize("rule", ["sgd", "adamw"])
def test_the_rule_works_on_coordinates(rule: str) -> None:
    model = nn.Sequential(nn.Linear(7, 5), nn.Linear(5, 2))
    basis = basis_over(model)
    perturbation = Perturbation(model, seed=3, basis=basis)
    start = flat(dict(model.named_parameters())).detach().double()
    coordinates = nn.Parameter(torch.zeros(basis.size, dtype=torch.float64))
    if rule == "sgd":
        ours, torchs = (
            kind(parameters, lr=0.1, momentum=0.9)
            for kind, parameters in ((DPZeroSGD, model.parameters()), (torch.optim.SGD, [coordinates]))
        )
    else:
        ours = DPZeroAdamW(model.parameters(), lr=0.1)
        torchs = torch.optim.AdamW([coordinates], lr=0.1, weight_decay=0.0)
    for step in range(5):
        coefficients = (0.3, -1.0 - step)
        ours.step(Estimate(Released(step, (1, 2), coefficients, 1.0), perturbation))
        coordinates.grad = sum(
            c * perturbation.directions.coordinates(step, {k: 1.0})  # type: ignore[union-attr]
            for k, c in enumerate(coefficients)
        )
        torchs.step()
        if step == 2:
            saved = ours.state_dict()
            ours = type(ours)(model.parameters(), lr=0.1, **({"momentum": 0.9} if rule == "sgd" else {}))
            ours.load_state_dict(saved)
    expected = start + coordinates.detach() @ basis.vectors.double() * UNIT
    torch.testing.assert_close(flat(dict(model.named_parameters())).detach().double(), expected, rtol=1e-5, atol=1e-5)


def test_in_a_basis_all_parameters_move_alike() -> None:
    model = nn.Sequential(nn.Linear(7, 5), nn.Linear(5, 2))
    perturbation = Perturbation(model, basis=basis_over(model))
    estimate = Estimate(Released(0, (1,), (1.0,), 1.0), perturbation)
    groups = [{"params": list(model[0].parameters())}, {"params": list(model[1].parameters()), "lr": 0.5}]
    with pytest.raises(ValueError, match="one learning rate"):
        DPZeroSGD(groups, lr=0.1).step(estimate)
    with pytest.raises(ValueError, match="no weight decay"):
        DPZeroSGD(model.parameters(), lr=0.1, weight_decay=0.1).step(estimate)


def test_a_basis_is_kept_with_its_digest(tmp_path: Path) -> None:
    model = nn.Linear(7, 5)
    basis = basis_over(model)
    save_basis(basis, tmp_path)
    assert torch.equal(load_basis(tmp_path, basis.digest()).vectors, basis.vectors)
    with pytest.raises(DPZeroError, match="not the basis of this run"):
        load_basis(tmp_path, basis_over(model, seed=1).digest())
    with pytest.raises(DPZeroError, match="another adapter's"):
        Perturbation(nn.Linear(7, 6), basis=basis)
    save_basis(None, tmp_path)
    assert not (tmp_path / BASIS_NAME).exists()
    with pytest.raises(DPZeroError, match="cannot be read"):
        load_basis(tmp_path, basis.digest())
    with pytest.raises(ValueError, match="int16"):
        Basis(torch.zeros(3, 4), ["p"])
