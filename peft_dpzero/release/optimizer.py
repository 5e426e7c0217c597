"""Updates by the released estimate: `torch.optim.Optimizer`s that need no gradients."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from peft_dpzero.errors import DPZeroError
from peft_dpzero.mechanism.private_sum import Released
from peft_dpzero.perturbation.perturbation import Perturbation, add_shift

Parameters = Iterable[Tensor] | Iterable[dict[str, Any]]
# Takes a piece of the flattened estimate ĝ, which it may overwrite, and changes that piece of the parameter.
Update = Callable[[slice, Tensor], None]
State = dict[str, Tensor]
# What moves in a basis has its state under this name.
_COORDINATES = "coordinates"


@dataclass(frozen=True)
class Estimate:
    """A released gradient estimate Σ_k ĝ_k z_k, not written out.

    Attributes:
        released: what left the step, with ĝ.
        perturbation: makes the directions z_k, over the parameters.
        learning_rates: those that the journal holds for it, one a group or one for all; None takes the groups' own.
    """

    released: Released
    perturbation: Perturbation
    learning_rates: tuple[float, ...] | None = None


class DPZeroOptimizer(torch.optim.Optimizer):
    """What updates by a released estimate share; use `DPZeroAdamW` or `DPZeroSGD`.

    All of it is post-processing of what was released. Learning-rate schedules, parameter groups and checkpoints work as
    with any torch optimizer. Parameters in half precision get a float32 master copy in the optimizer's state, so that
    small updates add up.
    """

    # Fields of a group, besides η, that the update depends on.
    hyperparameters: ClassVar[tuple[str, ...]] = ()
    # The rule's name in the journal; that of SGD is not written.
    rule: ClassVar[str | None] = None

    @property
    def learning_rates(self) -> tuple[float, ...]:
        """η of each group, as of now."""
        return tuple(float(group["lr"]) for group in self.param_groups)

    def settings(self, perturbation: Perturbation) -> list[dict[str, Any]]:
        """What the update depends on besides η, JSON-ready: its rule, hyper-parameters and parameter names by group."""
        names = {parameter: name for name, parameter in perturbation.parameters.items()}
        rule = {} if self.rule is None else {"rule": self.rule}
        return [
            {
                **rule,
                **{key: group[key] for key in self.hyperparameters},
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
            raise RuntimeError("There is no release to apply: call optimizer.step(run.release(number).estimate).")
        perturbation, released = estimate.perturbation, estimate.released
        rates = self.learning_rates if estimate.learning_rates is None else estimate.learning_rates
        if len(rates) == 1:
            rates *= len(self.param_groups)
        if len(rates) != len(self.param_groups):
            raise ValueError(f"{len(rates)} learning rates for {len(self.param_groups)} groups of parameters.")
        if perturbation.basis is not None:
            self._move_in_basis(perturbation, released, rates)
            return
        names = {parameter: name for name, parameter in perturbation.parameters.items()}
        values: dict[str, Tensor] = {}
        updates: dict[str, Update] = {}
        for group, rate in zip(self.param_groups, rates, strict=True):
            for parameter in group["params"]:
                if parameter in names:
                    name = names[parameter]
                    values[name] = self._value(parameter)
                    updates[name] = self._update(self.state[parameter], values[name].view(-1), group, rate)

        def apply(name: str, part: slice, gradient: Tensor) -> None:
            if name in updates:
                updates[name](part, gradient)

        perturbation.visit(released.step, dict(enumerate(released.coefficients)), apply)
        for name, value in values.items():
            _write_back(value, perturbation.parameters[name])

    def _move_in_basis(self, perturbation: Perturbation, released: Released, rates: Sequence[float]) -> None:
        """Applies an estimate whose directions lie in a basis: the rule works on coordinates there, from 0."""
        group = self.param_groups[0]
        if len(set(rates)) > 1 or any(other["weight_decay"] for other in self.param_groups):
            raise ValueError("In a basis all parameters have one learning rate and no weight decay.")
        estimate = perturbation.coordinates(released.step, dict(enumerate(released.coefficients)))
        moved = torch.zeros_like(estimate)
        state: dict[Any, State] = self.state
        self._update(state[_COORDINATES], moved, group, rates[0])(slice(None), estimate)
        for name, shift in perturbation.moved(moved).items():
            parameter = perturbation.parameters[name]
            value = self._value(parameter)
            add_shift(value, shift, out=value)
            _write_back(value, parameter)

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

    def _update(self, state: State, value: Tensor, group: dict[str, Any], rate: float) -> Update:
        """The update of one step, of a flattened `value` that has a `state`."""
        raise NotImplementedError

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As in torch, but the float32 state of a half-precision parameter stays float32."""
        super().load_state_dict(state_dict)
        saved = state_dict["state"]
        order = [parameter for group in self.param_groups for parameter in group["params"]]
        for index, state in saved.items():
            if index == _COORDINATES:
                continue
            for key, value in state.items():
                self.state[order[index]][key] = value.clone().to(order[index].device)


class DPZeroSGD(DPZeroOptimizer):
    """m ← μm + ĝ + wθ, θ ← θ − ηm, with ĝ = Σ_k ĝ_k z_k.

    Args:
        params: parameters or groups, as for `torch.optim.SGD`.
        lr: η.
        weight_decay: w, the L2 coefficient.
        momentum: μ; 0 keeps no state.
    """

    hyperparameters = ("weight_decay", "momentum")

    def __init__(self, params: Parameters, lr: float = 1e-3, weight_decay: float = 0.0, momentum: float = 0.0) -> None:
        _check_rates(lr, weight_decay)
        if not 0 <= momentum < 1:
            raise ValueError(f"momentum must lie in [0, 1), got {momentum!r}.")
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})

    def _update(self, state: State, value: Tensor, group: dict[str, Any], rate: float) -> Update:
        decay, momentum = group["weight_decay"], group["momentum"]
        velocity = _held(state, "momentum", value) if momentum else None

        def update(part: slice, gradient: Tensor) -> None:
            if decay:
                gradient.add_(value[part].mul(decay))
            if velocity is not None:
                gradient.copy_(velocity[part].mul_(momentum).add_(gradient))
            add_shift(value[part], gradient.mul_(-rate), out=value[part])

        return update


class DPZeroAdamW(DPZeroOptimizer):
    """AdamW (arXiv 1711.05101, Algorithm 2) on the released estimate ĝ = Σ_k ĝ_k z_k.

    m ← β₁m + (1 − β₁)ĝ, v ← β₂v + (1 − β₂)ĝ², θ ← (1 − ηw)θ − η m̂ / (√v̂ + ε), with m̂ and v̂ corrected for their
    start at 0. A step moves each number by about η at most, whatever the size of the losses.

    Args:
        params: parameters or groups, as for `torch.optim.AdamW`.
        lr: η.
        betas: β₁ and β₂.
        eps: ε.
        weight_decay: w.
    """

    hyperparameters = ("weight_decay", "betas", "eps")
    rule = "adamw"

    def __init__(
        self,
        params: Parameters,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
    ) -> None:
        _check_rates(lr, weight_decay)
        if not all(0 <= beta < 1 for beta in betas):
            raise ValueError(f"betas must lie in [0, 1), got {betas!r}.")
        if eps <= 0:
            raise ValueError(f"eps must be > 0, got {eps!r}.")
        super().__init__(params, {"lr": lr, "betas": tuple(betas), "eps": eps, "weight_decay": weight_decay})

    def _update(self, state: State, value: Tensor, group: dict[str, Any], rate: float) -> Update:
        state["step"] = state.get("step", torch.zeros((), dtype=torch.int64)) + 1
        (beta1, beta2), steps = group["betas"], int(state["step"])
        mean, square = (_held(state, name, value) for name in ("exp_avg", "exp_avg_sq"))
        # η m̂ / (√v̂ + ε) with the corrections taken out of the division.
        unbias = math.sqrt(1 - beta2**steps)
        scale, eps, shrink = rate * unbias / (1 - beta1**steps), group["eps"] * unbias, 1 - rate * group["weight_decay"]

        # One operation at a time: fused ones round otherwise at the ends of pieces, and replay wants the same bits.
        def update(part: slice, gradient: Tensor) -> None:
            mean[part].mul_(beta1).add_(gradient.mul(1 - beta1))
            square[part].mul_(beta2).add_(gradient.mul_(gradient).mul_(1 - beta2))
            torch.div(mean[part], _root(square[part]).add_(eps), out=gradient)
            if shrink != 1:
                value[part].mul_(shrink)
            add_shift(value[part], gradient.mul_(-scale), out=value[part])

        return update


_RULES: dict[str | None, type[DPZeroOptimizer]] = {kind.rule: kind for kind in (DPZeroSGD, DPZeroAdamW)}


def optimizer_of(settings: list[dict[str, Any]], perturbation: Perturbation) -> DPZeroOptimizer:
    """The optimizer that has these `settings`, at η = 0.

    Args:
        settings: as `DPZeroOptimizer.settings` gives them.
        perturbation: over the model.

    Raises:
        DPZeroError: this version does not know the rule.
    """
    rules = {group.get("rule") for group in settings}
    if len(rules) != 1 or not rules <= _RULES.keys():
        raise DPZeroError(f"The journal's updates follow a rule that this version does not know: {rules}.")
    kind = _RULES[rules.pop()]
    groups = [
        {key: group[key] for key in kind.hyperparameters}
        | {"params": [perturbation.parameters[name] for name in group["params"]]}
        for group in settings
    ]
    return kind(groups, lr=0.0)  # type: ignore[call-arg]


def _held(state: State, name: str, like: Tensor) -> Tensor:
    """A flat view of what is kept under `name`; at first, zeros like `like`."""
    if name not in state:
        state[name] = torch.zeros_like(like)
    return state[name].view(-1)


def _root(square: Tensor) -> Tensor:
    """√, rounded once, with the same bits on every machine: on CPUs torch's own is off by one at times."""
    return torch.from_numpy(np.sqrt(square.numpy())) if square.device.type == "cpu" else square.sqrt()


def _write_back(value: Tensor, parameter: Tensor) -> None:
    """Rounds a master copy to its parameter; a value in the parameter's own memory is there already."""
    if value.data_ptr() != parameter.data_ptr():
        parameter.copy_(value)


def _check_rates(lr: float, weight_decay: float) -> None:
    if lr < 0:
        raise ValueError(f"lr must be >= 0, got {lr!r}.")
    if weight_decay < 0:
        raise ValueError(f"weight_decay must be >= 0, got {weight_decay!r}.")
