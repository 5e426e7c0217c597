"""What sizes of a run give, simulated: the demo's last layer with gradients in place of forward passes.

    PYTHONPATH=.:benchmarks python benchmarks/last_layer.py --task tweets --runs 64x256x90 256x64x135
    PYTHONPATH=.:benchmarks python benchmarks/last_layer.py --task tweets --runs 64x256x90 --seeds 5 --sweep

A run rxBxT has T steps with B expected rows in a basis of r vectors. With as many directions at right angles as vectors
the differences tell a row's gradient in its coordinates, so that one gradient stands for r + 1 passes; what lies below
the last layer is computed once. Thresholds, rates and noise follow the package's rules; --sweep compares these with a
grid of fixed thresholds and rates. It is for choosing defaults on sets that are public: sampling and noise are seeded,
which gives no privacy.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from peft_dpzero import DPZeroConfig
from peft_dpzero.mechanism.contribution import THRESHOLD_RATE
from peft_dpzero.modules import hooked
from peft_dpzero.public.basis import find_basis
from peft_dpzero.public.rows import public_rows
from peft_dpzero.public.settings import learning_rate
from torch import Tensor
from torch.func import grad, vmap

from study.cells import FULL
from study.mechanism import PoissonGaussian, clipped
from study.models import LONGEST, Row, Start, started
from study.summary import Spread
from study.sweep import POINTS
from study.tasks import TASKS
from workloads import ROOT

TOGETHER, MEASURED, PUBLIC = 64, 256, 1000
FAR = -1e9
Weights = dict[str, Tensor]


class Sizes(NamedTuple):
    """r, B and T."""

    vectors: int
    batch: int
    steps: int


@dataclass(frozen=True)
class Rows:
    """Rows of like length as they enter the last layer.

    Attributes:
        hidden: (b, L, h).
        keys: (b, L, h) of its attention, which are not trained.
        mask: (b, L), 0 or far below.
        labels: (b,).
    """

    hidden: Tensor
    keys: Tensor
    mask: Tensor
    labels: Tensor

    @classmethod
    def of(cls, rows: Sequence[Rows]) -> Rows:
        """Rows of one each, padded."""
        longest = max(row.hidden.shape[1] for row in rows)

        def padded(name: str, value: float = 0.0) -> Tensor:
            made = (getattr(row, name) for row in rows)
            return torch.cat(
                [F.pad(one, (0, 0) * (one.ndim - 2) + (0, longest - one.shape[1]), value=value) for one in made]
            )

        return cls(padded("hidden"), padded("keys"), padded("mask", FAR), torch.cat([row.labels for row in rows]))


def together(rows: Sequence[Rows]) -> Iterator[Rows]:
    """Of like length, padded."""
    ordered = sorted(rows, key=lambda row: row.hidden.shape[1])
    for first in range(0, len(ordered), TOGETHER):
        yield Rows.of(ordered[first : first + TOGETHER])


def plain_name(name: str) -> str:
    """A parameter's name without PEFT's wrapping."""
    return name.removeprefix("base_model.model.")


@dataclass(frozen=True)
class Planned:
    """What all runs of the same sizes share.

    Attributes:
        sizes: theirs.
        vectors: (r, d), of the basis.
        usual: the usual norm of a public row's gradient in it, at the start.
        noise_multiplier: σ.
    """

    sizes: Sizes
    vectors: Tensor
    usual: float
    noise_multiplier: float


class LastLayer:
    """The last layer of a stock BERT classifier, with LoRA in its query, value and dense layers.

    Attributes:
        weights: what is trained.
        gradients: of each row's loss, (weights, hidden, keys, mask, labels) to (b, …) by name.
        outputs: logits, (weights, hidden, keys, mask) to (b, classes).
    """

    def __init__(self, start: Start) -> None:
        layers = start.model.base_model.model.bert.encoder.layer
        self.module, self.name = layers[-1], f"bert.encoder.layer.{len(layers) - 1}."
        used = (self.name, "bert.pooler.", "classifier.modules_to_save.")
        parameters = {plain_name(name): p for name, p in start.model.named_parameters()}
        read = {name: p.detach().clone() for name, p in parameters.items() if name.startswith(used)}
        self.weights = {name: value for name, value in read.items() if parameters[name].requires_grad}
        self.frozen = {name: value for name, value in read.items() if name not in self.weights}
        self.heads = start.model.config.num_attention_heads
        self.gradients = vmap(grad(self._loss), in_dims=(None, 0, 0, 0, 0))
        self.outputs = vmap(self._logits, in_dims=(None, 0, 0, 0))

    def _linear(self, weights: Weights, name: str, x: Tensor) -> Tensor:
        """LoRA of scale 1 beside the base."""
        down, up = weights[f"{name}.lora_A.default.weight"], weights[f"{name}.lora_B.default.weight"]
        return F.linear(x, weights[f"{name}.base_layer.weight"], weights[f"{name}.base_layer.bias"]) + x @ down.T @ up.T

    def _norm(self, weights: Weights, name: str, x: Tensor) -> Tensor:
        return F.layer_norm(x, x.shape, weights[f"{name}.LayerNorm.weight"], weights[f"{name}.LayerNorm.bias"], 1e-12)

    def _logits(self, trained: Weights, hidden: Tensor, keys: Tensor, mask: Tensor) -> Tensor:
        """Of one row. The attention's weights are applied before its values are made."""
        weights = self.frozen | trained
        first, width = hidden[0], hidden.shape[1] // self.heads
        query = self._linear(weights, self.name + "attention.self.query", first).view(self.heads, width)
        scores = torch.einsum("hd,lhd->hl", query, keys.view(-1, self.heads, width)) / math.sqrt(width)
        mixed = (scores + mask).softmax(dim=-1) @ hidden  # [heads, h]
        name = self.name + "attention.self.value"
        base, up = weights[f"{name}.base_layer.weight"], weights[f"{name}.lora_B.default.weight"]
        low = mixed @ weights[f"{name}.lora_A.default.weight"].T  # [heads, rank]
        values = sum(
            torch.einsum("hc,hdc->hd", x, matrix.view(self.heads, width, -1))
            for x, matrix in ((mixed, base), (low, up))
        )
        values = values.flatten() + weights[f"{name}.base_layer.bias"]
        name = self.name + "attention.output"
        attended = self._norm(weights, name, self._linear(weights, f"{name}.dense", values) + first)
        inner = F.gelu(self._linear(weights, self.name + "intermediate.dense", attended))
        name = self.name + "output"
        output = self._norm(weights, name, self._linear(weights, f"{name}.dense", inner) + attended)
        pooled = F.linear(output, weights["bert.pooler.dense.weight"], weights["bert.pooler.dense.bias"]).tanh()
        name = "classifier.modules_to_save.default"
        return F.linear(pooled, weights[f"{name}.weight"], weights[f"{name}.bias"])

    def _loss(self, trained: Weights, hidden: Tensor, keys: Tensor, mask: Tensor, label: Tensor) -> Tensor:
        return F.cross_entropy(self._logits(trained, hidden, keys, mask), label)

    @torch.no_grad()
    def entering(self, start: Start, rows: Iterable[Row]) -> list[Rows]:
        """Rows as they enter the layer, one each."""
        found, entered = list[Rows](), list[Tensor]()
        hook = self.module.register_forward_pre_hook(lambda module, inputs: entered.append(inputs[0]))
        with hooked([hook]):
            for batch in start.batches(list(rows)):
                start.model(**start.loss.inputs(batch))
                hidden = entered.pop()
                keys = self.module.attention.self.key(hidden)
                for number, length in enumerate(batch["attention_mask"].sum(dim=1).tolist()):
                    own = (slice(number, number + 1), slice(length))
                    found.append(Rows(hidden[own], keys[own], torch.zeros(1, length), batch["labels"][own[0]]))
        return found


class Simulation:
    """A task's rows at the start of a run, with a basis of `size` vectors, of which runs take the first."""

    def __init__(self, task: str, size: int) -> None:
        start = started("minilm", task, 0, FULL, ROOT / "runs" / "study")
        public = public_rows(start.public_text, start.loss, start.model, start.tokenizer, LONGEST)
        self.layer = LastLayer(start)
        self.rows, held_out, self.public = (
            self.layer.entering(start, rows) for rows in (start.train, start.held_out, public[:PUBLIC])
        )
        self.held_out = list(together(held_out))
        basis = find_basis(start.model, start.loss, public, start.collate, dict, size)
        self.vectors = basis.vectors.float() * 2.0**-15
        self.names = [plain_name(name) for name in basis.names]

    def weights(self, vectors: Tensor, coordinates: Tensor) -> Weights:
        """θ₀ + Vᵀw."""
        weights = self.layer.weights
        moved = (coordinates @ vectors).split([weights[name].numel() for name in self.names])
        return weights | {
            name: weights[name] + move.view_as(weights[name]) for name, move in zip(self.names, moved, strict=True)
        }

    def gradients(self, vectors: Tensor, weights: Weights, rows: Sequence[Rows]) -> Tensor:
        """Of each row's loss, in coordinates: (b, r)."""
        parts = [torch.zeros(0, len(vectors))]
        for some in together(rows):
            made = self.layer.gradients(weights, some.hidden, some.keys, some.mask, some.labels)
            parts.append(torch.cat([made[name].flatten(1) for name in self.names], dim=1) @ vectors.T)
        return torch.cat(parts)

    def accuracy(self, weights: Weights) -> float:
        """On the held-out rows."""
        right = sum(
            int((self.layer.outputs(weights, some.hidden, some.keys, some.mask).argmax(dim=1) == some.labels).sum())
            for some in self.held_out
        )
        return right / sum(len(some.labels) for some in self.held_out)

    def planned(self, sizes: Sizes, epsilon: float) -> Planned:
        """For runs of these sizes."""
        vectors = self.vectors[: sizes.vectors] / self.vectors[sizes.vectors - 1].norm()  # as if found alone: longest 1
        usual = float(self.gradients(vectors, self.layer.weights, self.public[:MEASURED]).norm(dim=1).mean())
        mechanism = PoissonGaussian(epsilon, len(self.rows), sizes.batch, sizes.steps, usual)
        return Planned(sizes, vectors, usual, mechanism.noise_multiplier)

    def run(self, plan: Planned, seed: int, point: Mapping[str, float] | None = None) -> float:
        """Accuracy after a run, with the package's η and adaptive C or with those of a sweep's `point`."""
        (size, batch, steps), vectors = plan.sizes, plan.vectors
        threshold, rate = plan.usual, learning_rate(plan.usual, steps)
        if point is not None:
            threshold, rate = point["usual_norms"] * plan.usual, point["learning_rate"]
        generator = torch.Generator().manual_seed(seed)
        coordinates = torch.zeros(size, requires_grad=True)
        optimizer = torch.optim.AdamW([coordinates], weight_decay=0.0)
        for step in range(steps):
            joined = torch.rand(len(self.rows), generator=generator) < batch / len(self.rows)
            weights = self.weights(vectors, coordinates.detach())
            rows = [self.rows[number] for number in joined.nonzero().flatten().tolist()]
            gradients = self.gradients(vectors, weights, rows)
            noise = plan.noise_multiplier * threshold * torch.randn(size, generator=generator)
            coordinates.grad = (clipped(gradients, threshold).sum(dim=0) + noise) / batch
            if point is None:
                below = int((gradients.norm(dim=1) <= threshold).sum())
                threshold *= math.exp(-THRESHOLD_RATE * (below / batch - DPZeroConfig.clipping_quantile))
            optimizer.param_groups[0]["lr"] = rate * (1 - step / steps)
            optimizer.step()
        return self.accuracy(self.weights(vectors, coordinates.detach()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--task", choices=[name for name, task in TASKS.items() if task.learned == "sign"], required=True
    )
    parser.add_argument("--runs", nargs="+", required=True, metavar="rxBxT")
    parser.add_argument("--epsilon", type=float, default=2.0)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--sweep", action="store_true", help="a grid of learning rates and thresholds, too")
    options = parser.parse_args()
    torch.set_num_threads(1)
    runs = [Sizes(*map(int, run.split("x"))) for run in options.runs]
    simulation = Simulation(options.task, max(sizes.vectors for sizes in runs))
    print(f"{options.task}: {simulation.accuracy(simulation.layer.weights):.1%} at the start", flush=True)

    def shown(plan: Planned, point: Mapping[str, float] | None = None) -> str:
        return Spread.of(simulation.run(plan, seed, point) for seed in range(options.seeds)).shown(100)

    for sizes in runs:
        plan = simulation.planned(sizes, options.epsilon)
        without = shown(replace(plan, noise_multiplier=0.0))
        title = f"r = {sizes.vectors}, B = {sizes.batch}, T = {sizes.steps}"
        print(f"{title}: {shown(plan)}; without the noise, all else the same, {without}", flush=True)
        for point in POINTS if options.sweep else ():
            rate, norms = point["learning_rate"], point["usual_norms"]
            print(f"  η = {rate:g}, C = {norms:g} × usual: {shown(plan, point)}", flush=True)


if __name__ == "__main__":
    main()
