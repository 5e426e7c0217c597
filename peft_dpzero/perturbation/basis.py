"""Directions in a subspace: z = Σ_i w_i v_i, with w random and v_1 … v_r a public basis.

The vectors hold multiples of 2⁻¹⁵, and weights are rounded to 26 bits of the largest, so that every sum is one of
integers below 2⁵³ in float64, which is exact: the same bits in any order, on any threads, one by one or many at once.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from peft_dpzero.config import MOST_VECTORS
from peft_dpzero.errors import DPZeroError
from peft_dpzero.perturbation.directions import Directions
from peft_dpzero.perturbation.orthogonal import OrthogonalCoordinates

_FRACTION_BITS = 15
_WEIGHT_BITS = 26
# Entries that are combined at once, and directions that are made at once.
_COLUMNS = 1 << 15
_TOGETHER = 128
_COORDINATES = "coordinates"


class Basis:
    """r vectors over the d entries of some parameters.

    Args:
        vectors: (r, d) int16, in units of 2⁻¹⁵.
        names: the parameters, in the order of their entries. Others stay where they are.
    """

    def __init__(self, vectors: Tensor, names: Sequence[str]) -> None:
        if vectors.dtype != torch.int16 or vectors.ndim != 2 or not 1 <= len(vectors) <= MOST_VECTORS:
            raise ValueError(f"A basis has 1 to {MOST_VECTORS} vectors of int16, got {vectors.dtype} {vectors.shape}.")
        self.vectors = vectors.cpu().contiguous()
        self.names = tuple(names)

    @classmethod
    def of(cls, vectors: Tensor, names: Sequence[str]) -> Basis:
        """The basis nearest to (r, d) floating-point `vectors` with entries in [−1, 1]."""
        units = vectors.to(torch.float64, copy=True).mul_(2**_FRACTION_BITS).round_()
        return cls(units.clamp_(-(2**_FRACTION_BITS) + 1, 2**_FRACTION_BITS - 1).to(torch.int16), names)

    @property
    def size(self) -> int:
        """r."""
        return self.vectors.shape[0]

    def first(self, size: int) -> Basis:
        """The basis of the first `size` vectors alone, the longest of which has length 1 again."""
        if size == self.size:
            return self
        vectors = self.vectors[:size].double()
        return Basis.of(vectors / vectors.norm(dim=1).amax(), self.names)

    @torch.no_grad()
    def combined(self, weights: Tensor) -> Tensor:
        """Σ_i w_i v_i for each row of `weights` (P, r): (P, d) float32. What is below 2⁻²⁶ of the largest is lost."""
        _, exponents = np.frexp(weights.double().abs().amax(dim=1, keepdim=True).numpy())
        unit = torch.from_numpy(np.ldexp(1.0, exponents - _WEIGHT_BITS))  # [P, 1]
        whole = weights.double().div(unit).round()
        made = torch.empty(len(weights), self.vectors.shape[1])
        for start in range(0, made.shape[1], _COLUMNS):
            part = slice(start, start + _COLUMNS)
            made[:, part] = (whole @ self.vectors[:, part].double()).mul_(unit * 2.0**-_FRACTION_BITS)
        return made

    def digest(self) -> str:
        """SHA-256 of the vectors and the names."""
        described = json.dumps([list(self.vectors.shape), self.names]).encode()
        return hashlib.sha256(described + self.vectors.numpy().astype("<i2").tobytes()).hexdigest()


class BasisDirections:
    """Directions whose coordinates in a basis are random; as `Directions`, of which it has what small models need.

    Args:
        basis: over some of `parameters`.
        parameters: (name, parameter) pairs.
        seed: the public direction seed.
        distribution: of the coordinates: "orthogonal" (see `OrthogonalCoordinates`) or one of `Directions`'.

    Raises:
        DPZeroError: the basis is over other parameters.
    """

    def __init__(
        self, basis: Basis, parameters: Iterable[tuple[str, nn.Parameter]], seed: int, distribution: str
    ) -> None:
        self.basis = basis
        self._shapes = {name: parameter.shape for name, parameter in parameters}
        self._parts: dict[str, slice] = {}
        self.num_entries = 0
        for name in basis.names:
            start, self.num_entries = self.num_entries, self.num_entries + self._shapes.get(name, torch.Size()).numel()
            self._parts[name] = slice(start, self.num_entries)
        if not self._parts.keys() <= self._shapes.keys() or self.num_entries != basis.vectors.shape[1]:
            raise DPZeroError("The basis is over other parameters than the trainable ones: it is another adapter's.")
        self._coordinates = _coordinates(basis.size, seed, distribution)
        self._made: tuple[int, int, Tensor] = (-1, -1, torch.empty(0))

    def vector(self, step: int, direction: int, device: torch.device | str = "cpu") -> Tensor:
        """z of the basis's parameters: (d,) float32, not to be written to."""
        block, number = divmod(direction, _TOGETHER)
        if self._made[:2] != (step, block):
            first = block * _TOGETHER
            weights = torch.stack([self._coordinates(step, k) for k in range(first, first + _TOGETHER)])
            self._made = step, block, self.basis.combined(weights)
        return self._made[2][number].to(device)

    def view(self, vector: Tensor, name: str) -> Tensor:
        """One parameter's entries in a `vector` (d,) or in each of (P, d), in the parameter's shape."""
        shape = (*vector.shape[:-1], *self._shapes[name])
        return vector[..., self._parts[name]].reshape(shape) if name in self._parts else vector.new_zeros(shape)

    def coordinates(self, step: int, coefficients: Mapping[int, float]) -> Tensor:
        """Σ_k c_k w_k: (r,) float64."""
        total = torch.zeros(self.basis.size, dtype=torch.float64)
        for direction, coefficient in coefficients.items():
            total += self._coordinates(step, direction) * coefficient
        return total


def _coordinates(size: int, seed: int, distribution: str) -> Callable[[int, int], Tensor]:
    """Makes w of (step, direction): (r,) float64."""
    if distribution == "orthogonal":
        return OrthogonalCoordinates(size, seed).entry
    independent = Directions([(_COORDINATES, nn.Parameter(torch.zeros(size), requires_grad=False))], seed, distribution)
    return lambda step, direction: independent.entry(step, direction, _COORDINATES).double()
