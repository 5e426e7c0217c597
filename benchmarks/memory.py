"""Peak memory of a training step against a no-grad evaluation of the same micro-batch.

    python benchmarks/memory.py [--json FILE] [--batch 8] [--length 256] [--num-directions 16]

Each measurement is a process of its own, which builds the same random causal LM (about 100M parameters, float32) with
LoRA on all linear layers and the same micro-batch. The peak is that of the resident set over the measured section
(VmHWM, reset before it through /proc/self/clear_refs), or of the whole process where the kernel has no such thing.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft_dpzero import DPZeroConfig, DPZeroSGD, TokenTask, make_plan
from peft_dpzero.estimation.batching import LogicalBatches
from peft_dpzero.estimation.losses import Losses
from peft_dpzero.estimation.sampling import PoissonSampler, new_secret
from peft_dpzero.estimation.shapes import Shapes
from peft_dpzero.perturbation.perturbation import Perturbation
from peft_dpzero.step import PrivateStep
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, set_seed

MIB = 1 << 20
SECTIONS = {
    "evaluate": "no-grad evaluation, logits only",
    "evaluate_with_labels": "no-grad evaluation with labels (mean loss)",
    "train": "DPZero training steps",
}


def build_model() -> PeftModel:
    set_seed(0)
    config = LlamaConfig(
        vocab_size=32_000,
        hidden_size=768,
        intermediate_size=2048,
        num_hidden_layers=11,
        num_attention_heads=12,
        num_key_value_heads=12,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
    )
    return get_peft_model(LlamaForCausalLM(config), LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear"))


def micro_batch(size: int, length: int) -> dict[str, Tensor]:
    ids = torch.randint(0, 32_000, (size, length), generator=torch.Generator().manual_seed(1))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}


def evaluation(model: PeftModel, batch: dict[str, Tensor], labels: bool) -> Callable[[], None]:
    inputs = {key: value for key, value in batch.items() if labels or key != "labels"}
    model.eval()

    @torch.no_grad()
    def run() -> None:
        for _ in range(2):
            model(**inputs)

    return run


def training(model: PeftModel, batch: dict[str, Tensor], num_directions: int) -> Callable[[], None]:
    size = len(batch["labels"])
    rows = [{key: value[i] for key, value in batch.items()} for i in range(size)]
    plan = make_plan(
        DPZeroConfig(
            noise_multiplier=1.0,
            target_delta=1e-3,
            num_directions=num_directions,
            clipping_threshold=200.0,
            smoothing_parameter=1e-3,
        ),
        num_units=size,
        expected_batch_size=size,
        steps=2,
    )
    sampler = PoissonSampler(size, plan.sample_rate, new_secret())

    def collate(rows: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        return {key: torch.stack([row[key] for row in rows]) for key in rows[0]}

    def run() -> None:
        perturbation = Perturbation(model)
        optimizer = DPZeroSGD(perturbation.parameters.values(), lr=1e-4)
        batches = LogicalBatches(rows, sampler, collate, Shapes(size, size))
        losses = Losses(model, TokenTask(shift=1), lambda batch: batch)
        step = PrivateStep(model, plan, batches=batches, losses=losses, perturbation=perturbation, optimizer=optimizer)
        for number in range(plan.steps):
            optimizer.step(step(number).estimate)

    return run


def resident_mib(field: str) -> float | None:
    """VmRSS (now) or VmHWM (peak) of this process, where the system tells."""
    status = Path("/proc/self/status")
    if not status.exists():
        return None
    line = next(line for line in status.read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) / 1024


def reset_peak() -> bool:
    """Lowers VmHWM to the present resident set; False where that cannot be done."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def measure(section: str, options: argparse.Namespace) -> dict[str, Any]:
    torch.set_num_threads(1)
    model = build_model()
    batch = micro_batch(options.batch, options.length)
    run = {
        "evaluate": lambda: evaluation(model, batch, labels=False),
        "evaluate_with_labels": lambda: evaluation(model, batch, labels=True),
        "train": lambda: training(model, batch, options.num_directions),
    }[section]()
    loaded = resident_mib("VmRSS")
    is_reset = reset_peak()
    run()
    unit = 1 if sys.platform == "darwin" else 1024
    whole = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / MIB
    peak = (resident_mib("VmHWM") if is_reset else None) or whole
    return {
        "section": section,
        "parameters": sum(p.numel() for p in model.parameters()),
        "trainable": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "loaded_mib": loaded,
        "peak_mib": peak,
        "peak_over_loaded_mib": None if loaded is None else peak - loaded,
        "process_peak_mib": whole,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=8, help="rows of the micro-batch")
    parser.add_argument("--length", type=int, default=256, help="tokens a row")
    parser.add_argument("--num-directions", type=int, default=16)
    parser.add_argument("--json", type=Path, help="write the measurements to this file")
    parser.add_argument("--section", choices=list(SECTIONS), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.section:
        print(json.dumps(measure(options.section, options)))
        return

    rows = {}
    for section in SECTIONS:
        command = [sys.executable, __file__, *sys.argv[1:], "--section", section]
        output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
        rows[section] = json.loads(output.splitlines()[-1])
    base = rows["evaluate"]
    print(f"{base['parameters']:,} parameters, {base['trainable']:,} of them trainable")
    print(f"{options.batch} rows of {options.length} tokens, K = {options.num_directions}")
    print(f"{'':44}{'peak MiB':>10}{'above loaded':>14}{'ratio':>8}")
    for section, row in rows.items():
        row["ratio"] = row["peak_mib"] / base["peak_mib"]
        above = "" if row["peak_over_loaded_mib"] is None else f"{row['peak_over_loaded_mib']:.0f}"
        print(f"{SECTIONS[section]:44}{row['peak_mib']:10.0f}{above:>14}{row['ratio']:8.3f}")
    if options.json:
        settings = {name: getattr(options, name) for name in ("batch", "length", "num_directions")}
        options.json.write_text(json.dumps({"settings": settings, "measurements": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
