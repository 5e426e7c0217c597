"""The processes of a run: what travels between them."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast, broadcast_object_list, gather_object
from torch import Tensor

from peft_dpzero.errors import DPZeroError
from peft_dpzero.perturbation.perturbation import Perturbation

_T = TypeVar("_T")


class AcceleratedProcesses:
    """The processes of an Accelerate launch, as the mechanism needs them."""

    def __init__(self, accelerator: Accelerator) -> None:
        self.accelerator = accelerator
        self.is_main_process = bool(accelerator.is_main_process)
        self.count = int(accelerator.num_processes)

    def sum(self, tensor: Tensor) -> Tensor:
        """Sum over processes, on the CPU."""
        reduced = self.accelerator.reduce(tensor.to(self.accelerator.device), "sum")
        return torch.as_tensor(reduced).to("cpu")

    def gather(self, value: Any) -> list[Any]:
        """Every process's `value`, in the order of their ranks."""
        return list(gather_object([value]))

    def broadcast(self, tensor: Tensor) -> Tensor:
        """The first process's tensor, on the CPU."""
        return torch.as_tensor(broadcast(tensor.to(self.accelerator.device))).to("cpu")

    def on_main(self, work: Callable[[], _T]) -> _T:
        """What `work` returns on the first process, or the DPZeroError that it raises there, on all of them."""
        shared: list[Any] = [None, None]
        if self.is_main_process:
            try:
                shared[0] = work()
            except DPZeroError as error:
                if self.count == 1:
                    raise
                shared[1] = error
        if self.count > 1:
            broadcast_object_list(shared)
        if shared[1] is not None:
            raise DPZeroError(str(shared[1]))
        result: _T = shared[0]
        return result


def share_parameters(perturbation: Perturbation, processes: AcceleratedProcesses) -> None:
    """Gives every process the first one's adapter and what is trained, so that all start from the same model."""
    with torch.no_grad():
        for parameter in perturbation.with_adapter.values():
            parameter.copy_(processes.broadcast(parameter.detach()))


def check_processes(connected: int, shards: int) -> None:
    """Refuses processes that would each make releases of their own, or a batch that is not split among all.

    Args:
        connected: processes that take part in the sums.
        shards: parts into which each logical batch is split.

    Raises:
        DPZeroError: fewer are connected than were launched, or the parts are not as many.
    """
    launched = int(os.environ.get("WORLD_SIZE") or 1)
    if connected < launched:
        raise DPZeroError(
            f"{launched} processes were launched but {connected} take part: each would spend the ε on its own. Pass "
            "the Accelerator, and on a machine without GPU set use_cpu=True or ACCELERATE_USE_CPU=true."
        )
    if shards != connected:
        raise DPZeroError(
            f"A batch is split in {shards} but {connected} processes take part, so an example could count more than "
            "once: launch all of them by accelerate or torchrun."
        )
