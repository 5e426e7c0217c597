"""Checks of a device before anything is timed on it: what it makes has the CPU's bits, and rows are strangers.

    python benchmarks/gpu.py --only bits strangers contributions

Each check counts what it compared and what differed, which has to be 0. Beside each stands what it finds when a fault
is planted, which must not be 0.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from typing import Any

import torch
from peft_dpzero import DPZeroAdamW, DPZeroSGD, Estimate, infer_task
from peft_dpzero.mechanism.private_sum import Released
from peft_dpzero.perturbation import directions
from peft_dpzero.perturbation.basis import Basis
from peft_dpzero.perturbation.directions import Directions, gpu_kernel
from peft_dpzero.perturbation.perturbation import KEPT_ENTRIES, Perturbation
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from workloads import ROOT

sys.path.append(str(ROOT / "tests"))
from zoo.architectures import BY_NAME, Architecture, build
from zoo.neighbors import FEW, POISON, differences, rows_of

Counts = dict[str, Any]
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
DISTRIBUTIONS = ("gaussian", "rademacher", "sphere")
COEFFICIENTS = (0.37, -1.9, 0.0123)
# Rows a micro-batch, and tokens a row: shapes that are met in a run.
ROWS = (2, 3, 5, 8, 16)
LENGTHS = (16, 48, 96, 200)


def bits(found: Counts, device: torch.device) -> None:
    """Directions, points and updates against the CPU's."""
    found["directions"] = check_directions(device)
    found["updates"] = check_updates(device)
    found["planted"] = {
        "one quantile of 65,536 off by its last bit": plant_quantile(device),
        "one coefficient off by its last bit": plant_ulp(device),
    }
    found["differ"] = sum(one["differ"] for made in ("directions", "updates") for one in found[made].values())


def strangers_everywhere(found: Counts, device: torch.device) -> None:
    """Rows among others, in fixed shapes, by model, dtype and attention."""
    found["planted"] = {"a layer that adds a 2⁻¹⁶th of the mean over rows": plant_coupling(device)}
    found["settings"] = []
    for setting in check_strangers(device):
        found["settings"].append(setting)
        found["compared"], found["differ"] = (
            sum(one.get(key, 0) for one in found["settings"]) for key in ("compared", "differ")
        )


def contributions(found: Counts, device: torch.device) -> None:
    """Rows' clipped differences, by the package's own passes, among neighboring lists of rows."""
    found["settings"] = []
    for setting in check_contributions(device):
        found["settings"].append(setting)
        found["differ"] = sum(one["differ"] for one in found["settings"])


def named(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def unequal(ones: Iterable[Tensor], others: Iterable[Tensor]) -> Counts:
    """How many entries were compared, and how many have other bits; NaN equals NaN."""
    compared = differ = 0
    for one, other in zip(ones, others, strict=True):
        one, other = one.detach().cpu(), other.detach().cpu()
        same = (one == other) | (one.isnan() & other.isnan())
        compared += same.numel()
        differ += int((~same).sum())
    return {"compared": compared, "differ": differ}


# ---- Directions ----


def check_directions(device: torch.device, large: int = 20_000_000) -> dict[str, Counts]:
    """Entries made on the device against the CPU's, by distribution."""
    parameters = [(str(size), nn.Parameter(torch.empty(size))) for size in (1, 35, 1_000_003, large)]
    found: dict[str, Counts] = {}
    for distribution in DISTRIBUTIONS:
        made = Directions(parameters, seed=2**62 + 3, distribution=distribution)
        names = [name for name, _ in parameters]
        found[distribution] = unequal(
            *([made.entry(7, 4095, name, device=where) for name in names] for where in (device, "cpu"))
        )
    return found


def plant_quantile(device: torch.device, entries: int = 1 << 20) -> Counts:
    """One of the 65,536 quantiles is off by its last bit."""
    table = directions._table(torch.device("cpu")).clone()
    table[1234] = torch.nextafter(table[1234], torch.tensor(0.0))
    made = Directions([("θ", nn.Parameter(torch.empty(entries)))], seed=3, distribution="gaussian")
    wanted = made.entry(0, 0, "θ")
    fill = gpu_kernel(device) if device.type == "cuda" else None
    if fill is None:
        found = torch.where(wanted == directions._table(torch.device("cpu"))[1234], table[1234], wanted)
    else:
        found = torch.empty(entries, device=device)
        fill(found, table.to(device), 3, 0, 0, 0, False)
    return unequal([found], [wanted])


# ---- Points and updates ----


def check_updates(device: torch.device, widths: tuple[int, ...] = (2500, 6000)) -> dict[str, Counts]:
    """Points θ + λz_k, and weights and optimizer state after three steps, against the CPU's, by dtype, rule and size.

    Args:
        widths: of layers whose directions a CPU makes anew piece by piece, and a GPU those of the last.
    """
    rules: dict[str, Callable[[Any], Any]] = {
        "sgd": lambda p: DPZeroSGD(p, lr=1e-2, momentum=0.9, weight_decay=1e-2),
        "adamw": lambda p: DPZeroAdamW(p, lr=1e-2, weight_decay=1e-2),
    }
    found: dict[str, Counts] = {}
    for size, basis in ((120, False), (120, True), *((width, False) for width in widths)):
        for dtype in DTYPES:
            for rule, make in rules.items():
                if basis and rule == "sgd":  # Weight decay has no place in a basis.
                    continue
                ones, others = (
                    moved(where, size, dtype, DPZeroAdamW if basis else make, basis)
                    for where in (device, torch.device("cpu"))
                )
                title = f"{size}×{size} {named(dtype)} {rule}{' in a basis' if basis else ''}"
                found[title] = unequal(ones, others)
    return found


def plant_ulp(device: torch.device) -> Counts:
    """A released coefficient is off by one part in 2²³ on the device."""
    ones, others = (
        moved(device, 120, torch.float32, DPZeroAdamW, coefficients=(COEFFICIENTS[0] * (1 + ulp), *COEFFICIENTS[1:]))
        for ulp in (2.0**-23, 0.0)
    )
    return unequal(ones, others)


def moved(
    device: torch.device,
    size: int,
    dtype: torch.dtype,
    rule: Callable[[Any], Any],
    basis: bool = False,
    coefficients: tuple[float, ...] = COEFFICIENTS,
) -> list[Tensor]:
    """Everything that three steps of released coefficients make of a layer: points, stacked points, weights, state."""
    generator = torch.Generator().manual_seed(1)
    model = nn.Linear(size, size)
    for parameter in model.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator).to(device, dtype)
    names = [name for name, _ in model.named_parameters()]
    entries = sum(parameter.numel() for parameter in model.parameters())
    vectors = torch.rand(5, entries, generator=generator) * 2 - 1 if basis else None
    perturbation = Perturbation(model, seed=11, basis=None if vectors is None else Basis.of(vectors, names))
    optimizer = rule(model.parameters())
    seen: list[Tensor] = []
    for step in range(3):
        with perturbation.at(step, 1, 1e-3):
            seen += [parameter.detach().clone() for parameter in model.parameters()]
        if 2 * entries <= KEPT_ENTRIES:  # A GPU would stack more than the CPU that it is compared with.
            seen += perturbation.stacked(step, [(0, 1e-3), (2, -1e-3)]).values()
        optimizer.step(Estimate(Released(step, (), coefficients, 1.0), perturbation))
    state = [value for entry in optimizer.state.values() for value in entry.values() if isinstance(value, Tensor)]
    return [*seen, *model.parameters(), *state]


# ---- Rows ----

_SIZES = {"vocab_size": 1000, "hidden_size": 384, "num_hidden_layers": 3, "num_attention_heads": 6}
MODELS = {
    "Llama": replace(
        BY_NAME["Llama"], changes=_SIZES | {"num_key_value_heads": 2, "head_dim": 64, "intermediate_size": 1024}
    ),
    "OPT": replace(BY_NAME["OPT"], changes=_SIZES | {"word_embed_proj_dim": 384, "ffn_dim": 1536}),
    "BERT": replace(BY_NAME["BERT"], changes=_SIZES | {"intermediate_size": 1536}),
}
# Of "flash" the rows have no padding, since that backend takes no mask.
ATTENTIONS: dict[str, Callable[[], AbstractContextManager[None]]] = {
    "eager": nullcontext,
    "sdpa": nullcontext,
    "sdpa, flash backend": lambda: sdpa_kernel(SDPBackend.FLASH_ATTENTION),
}


def check_strangers(device: torch.device, architectures: dict[str, Architecture] = MODELS) -> Iterator[Counts]:
    """For each model, dtype and attention: rows whose loss or logits change a bit with their company or their place."""
    for name, architecture in architectures.items():
        for dtype in DTYPES:
            for attention, backend in ATTENTIONS.items():
                setting = {"model": name, "dtype": named(dtype), "attention": attention}
                try:
                    model = build(architecture, dtype, attention.partition(",")[0]).to(device)
                    with backend():
                        yield setting | strangers(model, padded="flash" not in attention)
                except RuntimeError as error:
                    yield setting | {"refused": str(error).splitlines()[0][:120]}


def plant_coupling(device: torch.device, architecture: Architecture = MODELS["Llama"]) -> Counts:
    """A layer adds to each row a 2⁻¹⁶th of the mean over rows."""
    model = build(architecture).to(device)
    with coupled(model):
        return strangers(model)


@contextmanager
def coupled(model: nn.Module) -> Iterator[None]:
    def mix(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        return output + output.mean(dim=0, keepdim=True) * 2.0**-16

    layer = next(module for name, module in model.named_modules() if name.endswith("v_proj.base_layer"))
    handle = layer.register_forward_hook(mix)
    try:
        yield
    finally:
        handle.remove()


@torch.no_grad()
def strangers(model: Any, padded: bool = True, rows: Iterable[int] = ROWS, lengths: Iterable[int] = LENGTHS) -> Counts:
    """A row among others, at each place of each shape, against the same row in the first batch of that shape."""
    compared = differ = alone = 0
    for length in lengths:
        lone = None
        for count in rows:
            wanted = None
            for place in range(count):
                losses, logits = _outputs(model, _company(model, count, length, place, padded))
                own = losses[place], logits[place]
                if wanted is None:
                    wanted = own
                    lone = lone or _own(_outputs(model, _company(model, 1, length, 0, padded)))
                    alone += not _same(own, lone)
                    continue
                compared += 1
                differ += not _same(own, wanted)
    return {"compared": compared, "differ": differ, "shapes_unlike_a_row_alone": alone}


def _own(outputs: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    return outputs[0][0], outputs[1][0]


def _same(one: tuple[Tensor, Tensor], other: tuple[Tensor, Tensor]) -> bool:
    return torch.equal(one[0], other[0]) and torch.equal(one[1], other[1])


def _company(model: Any, count: int, length: int, place: int, padded: bool) -> dict[str, Tensor]:
    """The row under test at `place`, among rows that its place decides, of which every third is all padding but one."""
    generator = torch.Generator().manual_seed(length)
    row = torch.randint(5, POISON, (length,), generator=generator)
    generator.manual_seed(1000 * length + 50 * count + place)
    ids = torch.randint(5, POISON, (count, length), generator=generator)
    sizes = torch.randint(1, length, (count,), generator=generator)
    sizes[::3] = 1
    ids[place], sizes[place] = row, length - 2
    mask = torch.arange(length) < (sizes[:, None] if padded else torch.full((count, 1), length))
    batch = {"input_ids": ids * mask, "attention_mask": mask.long()}
    device = next(model.parameters()).device
    return {key: value.to(device) for key, value in batch.items()}


def _outputs(model: Any, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Losses (b,), and logits (b, …) at the tokens that the tested row has."""
    ids, mask, task = batch["input_ids"], batch["attention_mask"], infer_task(model)
    labels = ids.masked_fill(mask == 0, -100) if task.token_labels else ids[:, 0] % 3
    outputs = model(**batch)
    logits = outputs.logits[:, :-2] if task.token_labels else outputs.logits
    return task.losses(outputs, batch | {"labels": labels}), logits


def check_contributions(device: torch.device, architectures: dict[str, Architecture] = MODELS) -> Iterator[Counts]:
    """What the package's own passes make of rows and of neighboring lists of rows, as in the tests' zoo."""
    for attention in ("sdpa", "eager"):
        for dtype in (torch.bfloat16, torch.float32, torch.float16):
            for name, architecture in architectures.items():
                model = build(architecture, dtype, attention).to(device)
                rows = rows_of(architecture.kind)
                found = differences(model, infer_task(model), rows, neighbors=FEW, poisons=True)
                yield {
                    "model": name,
                    "dtype": named(dtype),
                    "attention": attention,
                    "outcome": found.outcome,
                    "detail": found.detail,
                    "differ": found.rows,
                    "one_row_at_a_time": found.alone,
                }
