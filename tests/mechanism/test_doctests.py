"""The examples in the mechanism's docstrings, worked by hand."""

from __future__ import annotations

import doctest
from types import ModuleType

import pytest
from peft_dpzero.mechanism import accountant, clipping, laplace


@pytest.mark.parametrize("module", [accountant, clipping, laplace], ids=lambda module: module.__name__)
def test_the_examples_hold(module: ModuleType) -> None:
    result = doctest.testmod(module)
    assert result.attempted > 0
    assert result.failed == 0
