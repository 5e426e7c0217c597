"""The model at θ + s·z, with θ itself never written.

A perturbed copy takes the place of each parameter's storage and the original is put back by reference, so the
restore is exact bit for bit, also after an exception or Ctrl-C, and no arithmetic can drift.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from peft_dpzero.errors import DPZeroError
from peft_dpzero.modules import adapter_parameters
from peft_dpzero.perturbation.basis import Basis, BasisDirections
from peft_dpzero.perturbation.directions import Action, Directions
from peft_dpzero.perturbation.streaming import streamed

# Directions of a step are kept while they are together below this many entries (16 MiB of float32), those in a basis,
# which take longer to make, below this many (64 MiB).
KEPT_ENTRIES = 1 << 22
KEPT_ENTRIES_IN_BASIS = 1 << 24
# On a GPU, whose passes are cheaper the more points they have: 128 MiB.
KEPT_ENTRIES_ON_GPU = 1 << 25
# Below this many entries (256 MiB of float32) a copy of θ costs little: it serves all micro-batches of a pass, and its
# memory is used again by the next, since the system takes as long to hand out pages as threads take to fill them.
STREAMED_ENTRIES = 1 << 26

# What is made and used at once on a GPU: 64 MiB of float32.
_GPU_PIECE_ENTRIES = 1 << 24

logger = logging.getLogger(__name__)

# (direction k, scale s): the point θ + s·z_k.
Point = tuple[int, float]


class Perturbation:
    """The perturbed parameters θ of a model: those with `requires_grad`, each storage once.

    Arithmetic is in float32 (float64 if a parameter is float64), each product and each sum rounded on its own, so
    that results do not depend on threads, nor on whether a direction was kept or made again. A half-precision
    parameter is perturbed from its float32 value and rounded once; its float32 master copy is the optimizer's affair.

    Directions of at most `KEPT_ENTRIES` entries (`KEPT_ENTRIES_ON_GPU` on a GPU) are kept during a step, as many as
    fit. Larger ones are made anew, piece by piece, whenever they are used, and never exist as a whole.

    A perturbed copy of θ lives beside θ during a pass, except for `streamed` parameters, which are copied module by
    module (`streaming.py`), once a call.

    Args:
        model: the model; its trainable parameters are θ.
        seed: public direction seed.
        distribution: see `Directions`.
        streamed: names of the parameters to copy module by module, from `find_streamed`.
        basis: over θ; directions then lie in its span, with random coordinates.

    Raises:
        DPZeroError: no parameter has `requires_grad`, or one lies on the meta device.
    """

    def __init__(
        self,
        model: nn.Module,
        seed: int = 0,
        distribution: str = "gaussian",
        streamed: Collection[str] = (),
        basis: Basis | None = None,
    ) -> None:
        self.model = model
        self.streamed = frozenset(streamed)
        self.parameters: dict[str, nn.Parameter] = {
            name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad
        }
        if not self.parameters:
            raise DPZeroError(
                "The model is frozen: no parameter has requires_grad. Add an adapter with "
                "peft.get_peft_model, or call requires_grad_() on the parameters to tune."
            )
        for name, parameter in self.parameters.items():
            if parameter.is_meta:
                raise DPZeroError(f"Parameter {name} is offloaded (meta device): keep what is trained in memory.")
        self.basis = basis
        self._seed, self._distribution = seed, distribution
        named = self.parameters.items()
        self.directions: Directions | BasisDirections = (
            Directions(named, seed, distribution)
            if basis is None
            else BasisDirections(basis, named, seed, distribution)
        )
        self._wide = torch.float32
        for parameter in self.parameters.values():
            self._wide = torch.promote_types(self._wide, parameter.dtype)
        self._spare: dict[str, Tensor] = {}
        self._kept_step = -1
        self._kept: dict[tuple[int, torch.device], Tensor] = {}

    @property
    def with_adapter(self) -> dict[str, nn.Parameter]:
        """θ and what else the adapter is saved with, by name: all that a run's start is made of beside its base."""
        return {**self.parameters, **adapter_parameters(self.model)}

    def narrowed(self, size: int) -> Perturbation:
        """The same in the first `size` vectors of the basis alone."""
        assert self.basis is not None
        return Perturbation(self.model, self._seed, self._distribution, self.streamed, self.basis.first(size))

    def z(self, step: int, direction: int, name: str) -> Tensor:
        """z of one parameter, on the parameter's device: float32, the parameter's shape."""
        parameter = self.parameters[name]
        if self._keeps:
            vector = self._vector(step, direction, parameter.device)
            return self.directions.view(vector, name)
        assert isinstance(self.directions, Directions), "those in a basis are kept"
        return self.directions.entry(step, direction, name, device=parameter.device)

    def coordinates(self, step: int, coefficients: Mapping[int, float]) -> Tensor:
        """Σ_k c_k z_k in the basis: (r,) float64."""
        assert isinstance(self.directions, BasisDirections)
        return self.directions.coordinates(step, coefficients)

    def moved(self, coordinates: Tensor) -> dict[str, Tensor]:
        """Σ_i c_i v_i of the basis for coordinates (r,): by name for its parameters, in their shapes, float32."""
        assert isinstance(self.directions, BasisDirections)
        vector = self.directions.basis.combined(coordinates[None])[0]
        names = self.directions.basis.names
        return {name: self.directions.view(vector, name).to(self.parameters[name].device) for name in names}

    @contextmanager
    def at(self, step: int, direction: int, scale: float) -> Iterator[None]:
        """Within the block the model is at θ + scale·z; afterwards it is at θ, bit for bit.

        The perturbed copies may be overwritten by the next call: clone an output that is a view of a parameter.
        """
        originals = {name: parameter.data for name, parameter in self.parameters.items()}
        held = {name: value for name, value in originals.items() if name not in self.streamed}
        names = {parameter: name for name, parameter in self.parameters.items()}
        copies, self._spare = self._spare, {}

        def perturbed(parameters: Iterable[nn.Parameter]) -> list[Tensor]:
            some = {names[parameter]: originals[names[parameter]] for parameter in parameters}
            new = {name: _like(value) for name, value in some.items()}
            self._move(some, new, step, direction, scale)
            return list(new.values())

        try:
            copies = {name: _like(value, copies.get(name)) for name, value in held.items()}
            self._move(held, copies, step, direction, scale)
            for name, copy in copies.items():
                self.parameters[name].data = copy
            with streamed(self.model, {self.parameters[n]: originals[n] for n in self.streamed}, perturbed):
                yield
        finally:
            self._put_back(originals)
            if not self.is_large:
                self._spare = copies

    @property
    def is_large(self) -> bool:
        """Whether a copy of θ costs so much that it is made module by module, where the model allows it."""
        return not self._keeps and self.directions.num_entries >= STREAMED_ENTRIES

    @property
    def num_coordinates(self) -> int:
        """In how many dimensions directions lie."""
        return int(self.directions.num_entries) if self.basis is None else self.basis.size

    @property
    def most_stacked(self) -> int:
        """How many points `stacked` may be asked for: as many as together have so many entries as are kept."""
        return self._most_kept // int(self.directions.num_entries)

    @torch.no_grad()
    def stacked(self, step: int, points: Sequence[Point]) -> dict[str, Tensor]:
        """The parameters at P points, bit for bit as `at` makes them: by name, (P, …) each.

        The P points' parameters exist at once.
        """
        copies: dict[str, Tensor] = {}
        for device in {parameter.device for parameter in self.parameters.values()}:
            scales = torch.tensor([[scale] for _, scale in points], dtype=self._wide, device=device)
            vectors = torch.stack([self._vector(step, k, device) for k, _ in points]).to(self._wide).mul_(scales)
            for name, parameter in self.parameters.items():
                if parameter.device == device:
                    shift = self.directions.view(vectors, name)
                    copies[name] = shift.add_(parameter.detach()).to(parameter.dtype)
        return copies

    def _put_back(self, originals: Mapping[str, Tensor]) -> None:
        try:
            for name, value in originals.items():
                self.parameters[name].data = value
        except KeyboardInterrupt:
            for name, value in originals.items():
                self.parameters[name].data = value
            raise

    def visit(
        self,
        step: int,
        coefficients: Mapping[int, float],
        action: Action,
        names: Collection[str] | None = None,
    ) -> None:
        """Calls `action(name, part, Σ_k c_k z_k)` for pieces of the flattened parameters until all were seen.

        The sums are one-dimensional, on the parameter's device, and may be changed but not kept. Several threads may
        call `action` at once, for disjoint pieces, without autograd. `names` picks parameters, None all.
        """
        names = self.parameters.keys() if names is None else names
        if self._keeps:
            for name, total in self._kept_sums(step, coefficients, names):
                action(name, slice(0, total.numel()), total.view(-1))
            return
        assert isinstance(self.directions, Directions), "those in a basis are kept"
        on_cpu = [name for name in names if self.parameters[name].device.type == "cpu"]
        self.directions.visit(step, coefficients, action, names=on_cpu, dtype=self._wide)
        for name in names:
            device, numel = self.parameters[name].device, self.directions.numel(name)
            for start in range(0, 0 if device.type == "cpu" else numel, _GPU_PIECE_ENTRIES):
                part = slice(start, min(start + _GPU_PIECE_ENTRIES, numel))
                pieces = (self.directions.entry(step, k, name, part, device).view(-1) for k in coefficients)
                action(name, part, self._sum(coefficients, pieces))

    @property
    def _most_kept(self) -> int:
        first = next(iter(self.parameters.values()))
        return KEPT_ENTRIES if first.device.type == "cpu" else KEPT_ENTRIES_ON_GPU

    @property
    def _keeps(self) -> bool:
        return self.basis is not None or self.directions.num_entries <= self._most_kept

    def _vector(self, step: int, direction: int, device: torch.device) -> Tensor:
        if step != self._kept_step:
            self._kept.clear()
            self._kept_step = step
        key = (direction, device)
        if key not in self._kept:
            vector = self.directions.vector(step, direction, device)
            most = self._most_kept if self.basis is None else max(self._most_kept, KEPT_ENTRIES_IN_BASIS)
            if self._kept and (len(self._kept) + 1) * vector.numel() > most:
                # The newest makes room, so that the first ones last and both sides of a direction share one.
                self._kept.popitem()
            self._kept[key] = vector
        return self._kept[key]

    def _kept_sums(
        self, step: int, coefficients: Mapping[int, float], names: Collection[str]
    ) -> Iterator[tuple[str, Tensor]]:
        for device in {self.parameters[name].device for name in names}:
            total = self._sum(coefficients, (self._vector(step, k, device) for k in coefficients))
            for name in names:
                if self.parameters[name].device == device:
                    yield name, self.directions.view(total, name)

    def _sum(self, coefficients: Mapping[int, float], directions: Iterable[Tensor]) -> Tensor:
        terms = (z.to(self._wide).mul(c) for c, z in zip(coefficients.values(), directions, strict=True))
        total = next(terms)
        for term in terms:
            total.add_(term)
        return total

    def _move(
        self, originals: Mapping[str, Tensor], copies: Mapping[str, Tensor], step: int, direction: int, scale: float
    ) -> None:
        """Writes originals + scale·z to `copies`."""
        if self._keeps:
            for name, shift in self._kept_sums(step, {direction: scale}, originals.keys()):
                add_shift(originals[name], shift, out=copies[name])
            return
        values = {name: value.reshape(-1) for name, value in originals.items()}
        flat = {name: copy.view(-1) for name, copy in copies.items()}

        def move(name: str, part: slice, shift: Tensor) -> None:
            add_shift(values[name][part], shift, out=flat[name][part])

        self.visit(step, {direction: scale}, move, originals.keys())


def _like(value: Tensor, spare: Tensor | None = None) -> Tensor:
    """Contiguous memory for a value of the same shape, dtype and device: `spare`, if it is such, or new."""
    wanted = (value.shape, value.dtype, value.device, torch.is_inference_mode_enabled())
    if spare is not None and (spare.shape, spare.dtype, spare.device, spare.is_inference()) == wanted:
        return spare
    return torch.empty(value.shape, dtype=value.dtype, device=value.device)


def add_shift(value: Tensor, shift: Tensor, out: Tensor) -> None:
    """out ← value + shift, added in the wider of the two dtypes; `out` may be `value`."""
    if value.dtype == shift.dtype:
        torch.add(value, shift, out=out)
    else:
        out.copy_(shift.add_(value))
