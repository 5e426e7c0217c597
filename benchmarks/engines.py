"""What compiling and offloading cost or save: losses at θ ± λz of the same rows, in alternation.

    python benchmarks/engines.py compiled [--rounds R] [--threads N]
    python benchmarks/engines.py offloaded [--rounds R] [--threads N]
    python benchmarks/engines.py half

`compiled`: torch.compile(model, dynamic=True) over the passes that the probe chooses, LoRA on the MiniLM (movie
sentences; needs `make demo` to have run once, for its data) and on a random Llama. `offloaded`: a random Llama that
Accelerate keeps on disk, against how many tokens points are stacked up to. `half`: differences with a bfloat16 base
against those with the same weights in float32, for two λ.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from typing import Any

import torch
from accelerate import disk_offload
from peft_dpzero.checks.probe import Probe
from peft_dpzero.estimation import losses as passes
from peft_dpzero.estimation.differences import losses_at
from peft_dpzero.estimation.losses import Losses, Shortcuts
from peft_dpzero.estimation.shapes import Shapes
from peft_dpzero.perturbation.perturbation import Perturbation
from peft_dpzero.training.offloading import bring_trained_into_memory
from torch import Tensor
from torch._dynamo.utils import counters

from ours import Batches
from timing import alternate, ratios
from workloads import Row, Workload, llama, minilm

POINTS = [(0, 1e-3), (0, -1e-3)]
CPU = torch.device("cpu")
# Whatever lengths come, these rounds meet a micro-batch of one row and ones of several.
WARM_UP = 6
LIMITS = (0, 512, 1 << 14)
SMALL = {"hidden_size": 384, "intermediate_size": 1024, "num_hidden_layers": 6, "vocab_size": 8000}


class Passes:
    """Losses of a step's rows at `POINTS`."""

    def __init__(self, workload: Workload, losses: Losses, perturbation: Perturbation) -> None:
        self.batches = Batches(workload, b"engines").logical(Shapes(workload.batch_size, workload.micro_batch_size))
        self.losses = losses
        self.perturbation = perturbation

    def __call__(self, number: int, rows: list[Row]) -> None:
        losses_at(self.losses, self.batches.draw(number).micro_batches, self.perturbation, number, POINTS)


class Stacked:
    """`Passes` with points stacked up to so many tokens; 0 stacks none."""

    def __init__(self, run: Passes, limit: int) -> None:
        self.run = run
        self.limit = limit

    def __call__(self, number: int, rows: list[Row]) -> None:
        passes.STACKED_TOKENS_OFFLOADED = self.limit
        self.run(number, rows)


def compiled(rounds: int) -> None:
    makers: dict[str, Callable[[], Workload]] = {
        "minilm lora": lambda: minilm("lora"),
        "llama lora": lambda: llama("lora", SMALL | {"num_attention_heads": 6}, batch_size=8, micro_batch_size=4),
    }
    for title, make in makers.items():
        workload = make()
        perturbation = Perturbation(workload.model)
        chosen = Probe(workload.model, CPU, task=workload.task).losses(perturbation, dict)
        other = Losses(
            torch.compile(workload.model, dynamic=True),
            workload.task,
            dict,
            Shortcuts(label_logits=chosen.shortcuts.label_logits),
        )
        contenders = {
            "chosen": Passes(workload, chosen, perturbation),
            "compiled": Passes(workload, other, perturbation),
        }
        counters.clear()
        start = time.perf_counter()
        contenders["compiled"](0, [])
        first = time.perf_counter() - start
        times = alternate(contenders, lambda number: [], rounds, warm_up=WARM_UP)
        report(title, times, "compiled", "chosen")
        print(f"    first step {first:.0f} s, {counters['stats']['unique_graphs']} graph(s) in all")


def offloaded(rounds: int) -> None:
    for length in (64, 256):
        workload = llama("lora", batch_size=4, micro_batch_size=4, lengths=(length // 2, length), count=64)
        with tempfile.TemporaryDirectory() as folder:
            disk_offload(workload.model, folder, execution_device=CPU)
            bring_trained_into_memory(workload.model)
            perturbation = Perturbation(workload.model)
            chosen = Probe(workload.model, CPU, task=workload.task).losses(perturbation, dict)
            run = Passes(workload, chosen, perturbation)
            contenders: dict[str, Any] = {f"up to {limit}": Stacked(run, limit) for limit in LIMITS}
            times = alternate(contenders, lambda number: [], rounds)
            for name in list(contenders)[1:]:
                report(f"rows of up to {length} tokens, stacked {name} tokens", times, name, "up to 0")


def half(_: int) -> None:
    workload = minilm("lora")
    torch.manual_seed(0)
    for name, parameter in workload.model.named_parameters():
        parameter.requires_grad_("lora_" in name)
        if "lora_B" in name:
            parameter.data.normal_(std=0.02)
    one = [workload.collate(workload.rows[:8])]
    found: dict[tuple[torch.dtype, float], Tensor] = {}
    for dtype in (torch.bfloat16, torch.float32):  # The second finds weights that bfloat16 holds.
        for parameter in workload.model.parameters():
            parameter.data = parameter.data.to(torch.float32 if parameter.requires_grad else dtype)
        for scale in (1e-3, 1e-2):
            points = [(k, side * scale) for k in range(8) for side in (1, -1)]
            losses = Losses(workload.model, workload.task, dict)
            values = losses_at(losses, one, Perturbation(workload.model), 0, points)[0]
            found[dtype, scale] = ((values[0::2] - values[1::2]) / (2 * scale)).flatten()
    for scale in (1e-3, 1e-2):
        pair = torch.stack([found[torch.bfloat16, scale], found[torch.float32, scale]])
        print(f"λ = {scale:g}: correlation of bfloat16 differences with float32 ones {torch.corrcoef(pair)[0, 1]:.2f}")


def report(title: str, times: dict[str, list[float]], over: str, under: str) -> None:
    found = ratios(times, over, under)
    print(
        f"{title:60s} {statistics.median(times[over]):6.2f} s, {statistics.median(found):.2f} × "
        f"{'unstacked' if under == 'up to 0' else under} [{min(found):.2f} – {max(found):.2f}]",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=["compiled", "offloaded", "half"])
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    {"compiled": compiled, "offloaded": offloaded, "half": half}[options.part](options.rounds)


if __name__ == "__main__":
    main()
