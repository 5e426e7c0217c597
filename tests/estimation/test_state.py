"""What a pass leaves behind in a model is put back."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
import torch
from peft_dpzero.estimation.state import KeptState
from torch import Tensor, nn

from tiny import tiny_model


class Forgetless(nn.Module):
    """Keeps what it sees in every way that a module has."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("written", torch.zeros(2))
        self.register_buffer("replaced", torch.zeros(2))
        self.register_buffer("absent", None)
        self.tensor = torch.zeros(2)
        self.count = 0
        self.name: str | None = None
        self.cache: dict[int, Tensor] = {0: torch.zeros(1)}
        self.history = [1]
        self.kinds = {"a"}
        self.deep: dict[str, Any] = {"rope": {"longest": 0, "sizes": [0]}, "pair": (torch.zeros(1), [0])}
        self.shape = (1, 2)

    def meet(self) -> None:
        self.written += 1
        self.replaced = torch.ones(2)
        self.absent = torch.ones(3)
        self.register_buffer("late", torch.ones(1), persistent=False)
        self.tensor.add_(1)
        self.count += 1
        self.name = "seen"
        self.another = 5
        self.cache[1] = torch.ones(1)
        self.history.append(2)
        self.kinds.add("b")
        self.deep["rope"]["longest"] = 9
        self.deep["rope"]["sizes"].append(9)
        self.deep["pair"][0].add_(1)
        self.deep["pair"][1].append(9)
        self.shape = (3, 4)


def contents(module: Forgetless) -> dict[str, Any]:
    plain = {key: value for key, value in vars(module).items() if not key.startswith("_")}
    return {**plain, **module._buffers, "history": list(module.history), "kinds": set(module.kinds)}


def test_everything_a_module_keeps_is_put_back_and_named() -> None:
    module = Forgetless()
    before = contents(module)
    values = {key: value.clone() for key, value in before.items() if isinstance(value, Tensor)}
    state = KeptState(nn.Sequential(module))
    for _ in range(2):
        with state.kept():
            module.meet()
        after = contents(module)
        assert after.keys() == before.keys()
        assert all(torch.equal(after[key], values[key]) for key in values)
        assert all(after[key] == before[key] for key in ("count", "name", "history", "kinds"))
        assert list(module.cache) == [0]
        assert module.deep["rope"] == {"longest": 0, "sizes": [0]}
        assert module.deep["pair"] == (torch.zeros(1), [0])
        assert module.shape == (1, 2)
    module.meet()
    assert {"0.replaced", "0.late", "0.count", "0.another", "0.name", "0.absent"} <= set(state.restore())
    assert state.restore() == []


def test_it_is_put_back_after_an_error() -> None:
    module = Forgetless()
    state = KeptState(module)

    def interrupted() -> None:
        with state.kept():
            module.meet()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert module.count == 0


def test_a_stock_model_changes_nothing() -> None:
    model = tiny_model("causal_lm")
    state = KeptState(model)
    model(torch.tensor([[5, 6, 7]]))
    assert state.restore() == []


def test_every_pass_draws_the_same_and_leaves_the_generators_where_they_were() -> None:
    state = KeptState(nn.Linear(2, 2))
    torch.rand(7), np.random.rand(7), random.random()
    before = torch.get_rng_state(), np.random.get_state(), random.getstate()
    drawn = []
    for _ in range(2):
        with state.kept():
            drawn.append((torch.rand(3).tolist(), np.random.rand(3).tolist(), random.random()))
    assert drawn[0] == drawn[1]
    after = torch.get_rng_state(), np.random.get_state(), random.getstate()
    assert torch.equal(before[0], after[0])
    assert np.array_equal(before[1][1], after[1][1])
    assert before[2] == after[2]
