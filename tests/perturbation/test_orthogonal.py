"""Directions at right angles: exactly so, random in every step, and the same bits for ever."""

from __future__ import annotations

import hashlib

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft_dpzero import DPZeroError
from peft_dpzero.perturbation.orthogonal import OrthogonalCoordinates, angles
from peft_dpzero.perturbation.perturbation import Perturbation
from torch import Tensor, nn


def block(size: int, seed: int, step: int, turn: int = 0) -> Tensor:
    """All directions between which there are right angles: (D, r)."""
    made = OrthogonalCoordinates(size, seed)
    first = turn * angles(size)
    return torch.stack([made.entry(step, k) for k in range(first, first + angles(size))])


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 300), st.integers(0, 2**63 - 1), st.integers(0, 2**31), st.integers(0, 3))
def test_a_full_turn_tells_every_gradient_exactly(size: int, seed: int, step: int, turn: int) -> None:
    made = block(size, seed, step, turn)
    assert torch.equal(made.abs(), torch.ones_like(made))
    assert torch.equal(made.T @ made, angles(size) * torch.eye(size, dtype=torch.float64))
    if size == angles(size):
        assert torch.equal(made @ made.T, size * torch.eye(size, dtype=torch.float64))


def test_steps_turns_and_seeds_differ() -> None:
    made = [block(32, *address) for address in ((0, 0, 0), (0, 1, 0), (0, 0, 1), (1, 0, 0))]
    assert len({hashlib.sha256(one.numpy().tobytes()).hexdigest() for one in made}) == len(made)


@pytest.mark.parametrize(("size", "directions"), [(32, 1), (32, 8), (20, 8)])
def test_fewer_tell_it_on_average_with_the_error_that_the_planner_expects(size: int, directions: int) -> None:
    coordinates = OrthogonalCoordinates(size, seed=5)
    gradient = torch.linspace(-1, 2, size, dtype=torch.float64)
    estimates = []
    for step in range(3000):
        made = torch.stack([coordinates.entry(step, k) for k in range(directions)])
        estimates.append(made.T @ (made @ gradient) / directions)
    mean = torch.stack(estimates).mean(dim=0)
    squared = torch.stack([(one - gradient).square().sum() for one in estimates]).mean() / gradient.square().sum()
    expected = size * (1 / directions - 1 / angles(size))
    assert float(squared) == pytest.approx(expected, rel=0.08)
    assert float((mean - gradient).norm() / gradient.norm()) < 4 * (expected / 3000) ** 0.5


def test_bits_are_fixed() -> None:
    digest = hashlib.sha256(block(100, seed=7, step=3).to(torch.int8).numpy().tobytes()).hexdigest()
    assert digest == "7990bf1008ec175775537a46d75d5e07c2f5dadd3c0500d9b87a3b485303be03"


def test_they_need_a_basis() -> None:
    with pytest.raises(DPZeroError, match="basis of public_text"):
        Perturbation(nn.Linear(2, 2), 0, "orthogonal")
