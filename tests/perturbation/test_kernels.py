"""The GPU kernel in Triton's interpreter against the CPU, where Triton is installed."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from peft_dpzero.perturbation.directions import gpu_kernel

COMPARE = """
import torch
from peft_dpzero.perturbation.directions import gpu_kernel
from peft_dpzero.perturbation.kernels import fill
from peft_dpzero.perturbation.philox import Stream, gaussian_table

table = torch.from_numpy(gaussian_table())
for signs in (False, True):
    for address, block, size in (((0, 0, 0), 0, 16), ((2**63 - 1, 10**6, 4095), 2**40, 9001), ((1, 1, 1), 1, 1)):
        made, wanted = torch.empty(size), torch.empty(size)
        fill(made, table, *address, block, signs)
        Stream(*address, signs).fill(block, wanted.numpy())
        assert torch.equal(made, wanted)
assert gpu_kernel(torch.device("cpu")) is fill
"""


def test_the_kernel_makes_the_bits_of_the_cpu() -> None:
    pytest.importorskip("triton")
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    done = subprocess.run([sys.executable, "-c", COMPARE], capture_output=True, text=True, timeout=120, env=environment)
    assert done.returncode == 0, done.stderr


def test_without_triton_there_is_no_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "triton", None)
    monkeypatch.delitem(sys.modules, "peft_dpzero.perturbation.kernels", raising=False)
    assert gpu_kernel.__wrapped__(torch.device("cpu")) is None
