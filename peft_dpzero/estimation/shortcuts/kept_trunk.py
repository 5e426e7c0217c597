"""What lies below the first perturbed layer, computed once a run for each row.

Where adapters sit in the upper layers only, all that reaches these from below is a function of a row alone, the same at
every step. `KeptTrunk` computes it when a row is first drawn and reads it from then on: a pass is given what the last
of the lower layers puts out, and those below it do not run. Rows that were drawn before go through the same passes as
rows that were not.

Such activations are as private as their rows. They lie in a file that has no name, which no other process can open and
which is gone when this one ends, however it ends.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import Tensor, nn

from peft_dpzero.estimation.shapes import may_have_company, stacked_rows
from peft_dpzero.estimation.shortcuts.trunk import SharedTrunk, outermost, products
from peft_dpzero.modules import Forward, hooked, replaced_forwards

# Bytes that are kept at most, and the share of the free space that they may take.
MOST_BYTES = 4 << 30
SHARE_OF_FREE_SPACE = 0.5

# At least this share of the trunk's products must not run again.
WORTHWHILE = 0.5

# What a model is called with.
Inputs = Mapping[str, Any]


class KeptTrunk:
    """The rows' activations at one place of a model.

    Args:
        last: its output (b, …) is what is kept.
        below: modules whose outputs, of the same shape, only `last` or others of them need.
        sequences: how many of a pass's sequences are one row: the model may let these meet, and they stay together.
        loud: what stands for the outputs of `below` is large: in a test nothing that is read may change by it.
    """

    def __init__(self, last: nn.Module, below: Sequence[nn.Module], sequences: int = 1, *, loud: bool = False) -> None:
        self.last = last
        self.below = tuple(below)
        self.sequences = sequences
        self.loud = loud
        self._rows = _RowFile()

    @contextmanager
    def given(self, inputs: Inputs) -> Iterator[None]:
        """Within the block passes over these rows are given what is kept of them, if all of it is.

        Of rows without `input_ids`, which may take another way through the model than those of the trial, nothing is.
        """
        found = [self._rows.get(key) for key in map(_digest, self._rows_of(inputs))]
        kept = [row for row in found if row is not None]
        if not kept or len(kept) < len(found):
            yield
            return
        hidden = torch.cat(kept)
        instead = 100 * hidden.cos() if self.loud else hidden
        below = {module: _constant(instead) for module in self.below}
        with replaced_forwards(below | {self.last: _constant(hidden)}):
            yield

    def fill(self, passes: Sequence[Inputs], run: Callable[[Inputs], object]) -> None:
        """Computes what is not kept of these rows, while there is room.

        Args:
            passes: what the model is given in a step. Rows of one shape go in as many at a time as in one of these, so
                that no pass has a shape that the run's own have not.
            run: one forward pass.
        """
        sizes: dict[Hashable, set[int]] = {}
        missing: dict[Hashable, dict[bytes, dict[str, Any]]] = {}
        for inputs in (one for one in passes if "input_ids" in one):
            rows = self._rows_of(inputs)
            shape = _shape(rows[0])
            sizes.setdefault(shape, set()).add(len(rows))
            new = {key: row for row in rows if not self._rows.has(key := _digest(row))}
            missing.setdefault(shape, {}).update(new)
        for shape, new in missing.items():
            left = list(new.items())
            while left and not self._rows.full:
                size = min((size for size in sizes[shape] if size >= len(left)), default=max(sizes[shape]))
                some, left = left[:size], left[size:]
                joined = stacked_rows([row for _, row in some] + [some[0][1]] * (size - len(some)))
                for (key, _), made in zip(some, self._computed(joined, run), strict=False):
                    self._rows.put(key, made)

    def _computed(self, inputs: Inputs, run: Callable[[Inputs], object]) -> Sequence[Tensor]:
        """What `last` puts out for each row; what is above it does not run.

        Nothing if it is not called, or leaves gaps in memory: what is read from the file has none, and what comes next
        may round otherwise.
        """
        found: list[Tensor] = []

        def end(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
            found.append(output)
            raise _Reached

        with hooked([self.last.register_forward_hook(end)]), suppress(_Reached):
            run(inputs)
        return torch.split(found[0], self.sequences) if found and found[0].is_contiguous() else ()

    def _rows_of(self, inputs: Inputs) -> list[dict[str, Any]]:
        """`inputs` of each row by itself. What is not laid out by rows belongs to each."""
        count = _count(inputs)

        def part(value: Any, start: int) -> Any:
            by_rows = isinstance(value, Tensor) and value.ndim and value.shape[0] == count
            return value[start : start + self.sequences] if by_rows else value

        starts = range(0, count, self.sequences)
        return [{key: part(value, start) for key, value in inputs.items()} for start in starts]


class _Reached(Exception):
    """A pass got as far as it had to."""


class _RowFile:
    """Tensors by key, in a file without a name."""

    def __init__(self) -> None:
        self._file = tempfile.TemporaryFile(buffering=0)  # noqa: SIM115 (open as long as this object)
        free = shutil.disk_usage(tempfile.gettempdir()).free
        # The launcher says how many processes of this machine have a file each.
        self._room = min(MOST_BYTES, int(SHARE_OF_FREE_SPACE * free / int(os.environ.get("LOCAL_WORLD_SIZE", 1))))
        self._places: dict[bytes, tuple[int, torch.Size, torch.dtype]] = {}
        self._end = 0

    @property
    def full(self) -> bool:
        """Whether there is no room for more."""
        return self._end >= self._room

    def has(self, key: bytes) -> bool:
        return key in self._places

    def put(self, key: bytes, row: Tensor) -> None:
        data = _bytes(row)
        try:
            self._file.seek(self._end)
            written = self._file.write(data)
        except OSError:  # Others have filled the disk, or the user has set a limit.
            written = 0
        if written < len(data):
            self._room = 0
            return
        # In this order: whatever interrupts, no later row is written over this one.
        start, self._end = self._end, self._end + written
        self._places[key] = start, row.shape, row.dtype

    def get(self, key: bytes) -> Tensor | None:
        if key not in self._places:
            return None
        start, shape, dtype = self._places[key]
        data = bytearray(shape.numel() * dtype.itemsize)
        self._file.seek(start)
        self._file.readinto(data)
        return torch.frombuffer(data, dtype=dtype).view(shape)


def find_kept(
    trunk: SharedTrunk, run: Callable[[], object], keeps_losses: Callable[[KeptTrunk], bool], sequences: int = 1
) -> KeptTrunk | None:
    """The highest place of which it is enough to keep the activations, or None if most of the trunk would run on.

    Args:
        trunk: of the model.
        run: one forward pass on public, made-up input.
        keeps_losses: whether losses on made-up tokens stay the same, bit for bit, with this.
        sequences: see `KeptTrunk`.
    """
    shapes: dict[nn.Module, torch.Size | None] = {}

    def note(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        once = module not in shapes and isinstance(output, Tensor) and output.ndim == 3 and output.is_contiguous()
        shapes[module] = output.shape if once else None

    with hooked([module.register_forward_hook(note) for module in trunk.unmoved]):
        run()
    ended = [module for module, shape in shapes.items() if shape is not None]
    while ended:
        last = ended.pop()
        alike = {module for module in ended if shapes[module] == shapes[last]}.difference(last.modules())
        below = outermost(trunk.model, alike.__contains__)
        # Those of another shape, as keys with fewer heads, leave most of the trunk to run.
        worthwhile = products([last, *below]) >= WORTHWHILE * products(trunk.modules)
        if worthwhile and all(keeps_losses(KeptTrunk(last, below, sequences, loud=loud)) for loud in (False, True)):
            return KeptTrunk(last, below, sequences)
    return None


def _constant(output: Tensor) -> Forward:
    return lambda *args, **kwargs: output


def _count(inputs: Inputs) -> int:
    return next(value.shape[0] for value in inputs.values() if isinstance(value, Tensor) and value.ndim)


def _shape(row: Inputs) -> Hashable:
    """What rows share that may go in one pass."""
    forms = ((value.shape, value.dtype) if isinstance(value, Tensor) else repr(value) for value in row.values())
    return may_have_company(row), tuple(row), tuple(forms)


def _digest(row: Inputs) -> bytes:
    """Equal for equal rows only."""
    made = hashlib.sha256(repr(_shape(row)).encode())
    for value in row.values():
        if isinstance(value, Tensor):
            made.update(_bytes(value))
    return made.digest()


def _bytes(tensor: Tensor) -> bytes:
    return tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes()
