"""One of the workers that `workers.py` launches: its steps over its share of the rows.

torchrun --nproc-per-node 2 benchmarks/one_worker.py MODE BATCH DIRECTIONS STEPS OUTPUT.json
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from transformers import LlamaConfig, LlamaForCausalLM, set_seed

from ours import Ours
from workloads import Workload, causal_lm

SHAPE = {"vocab_size": 1000, "hidden_size": 128, "intermediate_size": 344, "num_hidden_layers": 6}
SHAPE |= {"num_attention_heads": 4, "num_key_value_heads": 4, "max_position_embeddings": 64}
LENGTHS = (16, 48)
MICRO_BATCH = 16


def workload(mode: str, batch_size: int) -> Workload:
    """A random Llama of a million parameters, on rows of 16 to 48 tokens.

    Args:
        mode: "upper": LoRA in the upper third of the layers, above a shared trunk; or "full".
        batch_size: B.
    """
    set_seed(0)
    base = LlamaForCausalLM(LlamaConfig(**SHAPE, tie_word_embeddings=True, pad_token_id=0))
    return causal_lm("llama", base, mode, batch_size, MICRO_BATCH, LENGTHS, count=4 * batch_size)


def rows_of(ours: Ours, step: int) -> int:
    """How many rows this worker has in a step."""
    return ours.step.batches.draw(step).num_units


def measured(mode: str, batch_size: int, directions: int, steps: int) -> dict[str, Any]:
    """Seconds of each step, from when all workers begin it to when the last one ends it; seconds of a core that the
    busiest one took; and each worker's rows."""
    torch.set_num_threads(1)
    accelerator = Accelerator(cpu=True)
    ours = Ours(workload(mode, batch_size), directions, accelerator=accelerator)
    ours(0, [])
    found = []
    for step in range(1, steps + 1):
        accelerator.wait_for_everyone()
        start, core = time.perf_counter(), time.process_time()
        ours(step, [])
        spent = {"seconds": time.perf_counter() - start, "core": time.process_time() - core}
        found.append(spent | {"rows": rows_of(ours, step)})
    each = gather_object([found])
    return {
        "workers": accelerator.num_processes,
        **{name: [max(worker[step][name] for worker in each) for step in range(steps)] for name in ("seconds", "core")},
        "rows": [[worker[step]["rows"] for worker in each] for step in range(steps)],
        "sums": _seconds_of_sums(accelerator, directions) if accelerator.num_processes > 1 else 0.0,
    }


def _seconds_of_sums(accelerator: Accelerator, directions: int, repeats: int = 200) -> float:
    """An all-reduce and a broadcast of what a step releases."""
    sums = torch.zeros(directions, dtype=torch.int64)
    accelerator.wait_for_everyone()
    start = time.perf_counter()
    for _ in range(repeats):
        torch.distributed.all_reduce(sums)
        torch.distributed.broadcast(sums, 0)
    return (time.perf_counter() - start) / repeats


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("mode", choices=["upper", "full"])
    parser.add_argument("batch_size", type=int)
    parser.add_argument("directions", type=int)
    parser.add_argument("steps", type=int)
    parser.add_argument("output", type=Path)
    options = parser.parse_args()
    found = measured(options.mode, options.batch_size, options.directions, options.steps)
    accelerator = Accelerator(cpu=True)
    if accelerator.is_main_process:
        options.output.write_text(json.dumps(found))
    accelerator.end_training()


if __name__ == "__main__":
    main()
