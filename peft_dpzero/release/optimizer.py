"""SGD on the released estimate: a `torch.optim.Optimizer` that needs no gradients."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from peft_dpzero.mechanism.private_sum import Released
from peft_dpzero.perturbation.perturbation import Perturbation, add_shift


@dataclass(frozen=True)
class Estimate:
    """A released gradient estimate Σ_k ĝ_k z_k, not written out.

    Attributes:
        released: what left the step, with ĝ.
        perturbation: makes the directions z_k, over the parameters.
        learning_rates: for a release out of a journal those that it was applied with, one a group or one for all; None
            takes the groups' own.
    """

    released: Released
    perturbation: Perturbation
    learning_rates: tuple[float, ...] | None = None


class DPZeroOptimizer(torch.optim.Optimizer):
    """θ ← θ − η (Σ_k ĝ_k z_k + weight decay · θ), post-processing of what was released.

    Learning-rate schedules, parameter groups and checkpoints work as with any torch optimizer. Parameters in half
    precision get a float32 master copy in the optimizer's state, so that small updates add up.

    Args:
        params: parameters or groups, as for `torch.optim.SGD`.
        lr: η.
        weight_decay: L2 coefficient, added to the gradient.
        momentum: factor of the running sum of past estimates; 0 keeps none.
    """

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]],
        lr: float = 1e-3,
        weight_decay: float = 0.0,
        momentum: float = 0.0,
    ) -> None:
        if lr < 0:
            raise ValueError(f"lr must be >= 0, got {lr!r}.")
        if weight_decay < 0:
            raise ValueError(f"weight_decay must be >= 0, got {weight_decay!r}.")
        if not 0 <= momentum < 1:
            raise ValueError(f"momentum must lie in [0, 1), got {momentum!r}.")
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})

    @property
    def learning_rates(self) -> tuple[float, ...]:
        """η of each group, as of now."""
        return tuple(float(group["lr"]) for group in self.param_groups)

    def settings(self, perturbation: Perturbation) -> list[dict[str, Any]]:
        """What the update depends on besides η: weight decay, momentum and parameter names of each group."""
        names = {parameter: name for name, parameter in perturbation.parameters.items()}
        return [
            {
                "weight_decay": group["weight_decay"],
                "momentum": group["momentum"],
                "params": [names[parameter] for parameter in group["params"] if parameter in names],
            }
            for group in self.param_groups
        ]

    @torch.no_grad()
    def step(self, estimate: Estimate | None = None) -> None:  # type: ignore[override]
        """Applies one step's estimate.

        Raises:
            RuntimeError: there is none: without gradients it cannot come from elsewhere.
            ValueError: its learning rates are not as many as there are groups.
        """
        if not isinstance(estimate, Estimate):
            raise RuntimeError("There is no release to apply: call step(estimate) with what a PrivateStep made.")
        perturbation, released = estimate.perturbation, estimate.released
        rates = self.learning_rates if estimate.learning_rates is None else estimate.learning_rates
        if len(rates) == 1:
            rates *= len(self.param_groups)
        if len(rates) != len(self.param_groups):
            raise ValueError(f"{len(rates)} learning rates for {len(self.param_groups)} groups of parameters.")
        names = {parameter: name for name, parameter in perturbation.parameters.items()}
        values: dict[str, Tensor] = {}
        updates: dict[str, Callable[[slice, Tensor], None]] = {}
        for group, rate in zip(self.param_groups, rates, strict=True):
            for parameter in group["params"]:
                if parameter in names:
                    name = names[parameter]
                    values[name] = self._value(parameter)
                    updates[name] = self._update(parameter, values[name].view(-1), group, rate)

        def apply(name: str, part: slice, gradient: Tensor) -> None:
            if name in updates:
                updates[name](part, gradient)

        perturbation.visit(released.step, dict(enumerate(released.coefficients)), apply)
        for name, value in values.items():
            parameter = perturbation.parameters[name]
            if value.data_ptr() != parameter.data_ptr():
                parameter.copy_(value)

    def _value(self, parameter: Tensor) -> Tensor:
        """What is updated: the float32 master copy, or the parameter's own memory if that is one contiguous piece."""
        wide = torch.promote_types(parameter.dtype, torch.float32)
        if parameter.dtype == wide:
            return parameter.detach().contiguous()
        state = self.state[parameter]
        if "master" not in state:
            state["master"] = parameter.detach().to(wide, memory_format=torch.contiguous_format)
        master: Tensor = state["master"]
        return master

    def _update(
        self, parameter: Tensor, value: Tensor, group: dict[str, Any], rate: float
    ) -> Callable[[slice, Tensor], None]:
        """How a piece of a flattened value takes its piece of the estimate, which is overwritten."""
        decay, momentum = group["weight_decay"], group["momentum"]
        if momentum:
            velocity = (
                self.state[parameter].setdefault("momentum", torch.zeros_like(value).view(parameter.shape)).view(-1)
            )

        def update(part: slice, gradient: Tensor) -> None:
            if decay:
                gradient.add_(value[part].mul(decay))
            if momentum:
                gradient.copy_(velocity[part].mul_(momentum).add_(gradient))
            add_shift(value[part], gradient.mul_(-rate), out=value[part])

        return update

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As in torch, but the float32 state of a half-precision parameter stays float32."""
        super().load_state_dict(state_dict)
        saved = state_dict["state"]
        order = [parameter for group in self.param_groups for parameter in group["params"]]
        for index, state in saved.items():
            for key, value in state.items():
                self.state[order[index]][key] = value.clone().to(order[index].device)
