"""What the benchmarks compare does the same work: the floor's layouts, the reference's losses and ours agree."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from peft_dpzero.estimation.losses import Losses

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))
from transformers import OPTConfig, OPTForCausalLM, set_seed

import floor
from headlines import headlines
from reference import Reference
from timing import linear_fit, spread
from workloads import Workload, causal_lm, llama

SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}


def make(name: str) -> Workload:
    settings = {"batch_size": 8, "micro_batch_size": 4, "lengths": (3, 40), "count": 9}
    if name == "llama":
        return llama("lora", SIZES | {"vocab_size": 60, "intermediate_size": 32}, **settings)
    set_seed(0)
    config = OPTConfig(**SIZES, ffn_dim=32, word_embed_proj_dim=32, vocab_size=60, max_position_embeddings=64)
    return causal_lm("opt", OPTForCausalLM(config), "full", **settings)


@pytest.mark.parametrize("name", ["llama", "opt"])
def test_every_layout_of_the_floor_gives_the_same_logits(name: str) -> None:
    workload = make(name)
    run = floor.runner(workload)
    found = {}
    for candidate in floor.candidates(workload, passes=2):
        candidate.prepare(0, workload.rows)
        with torch.no_grad():
            logits = torch.cat([run(laid) for laid in candidate._laid[1]])
        found[candidate.name] = logits[logits.sum(dim=1).argsort()]
    expected = found["equal"]
    assert expected.shape == (sum(label != -100 for row in workload.rows for label in row["labels"]), 60)
    for logits in found.values():
        repeats = len(logits) // len(expected)
        torch.testing.assert_close(logits, expected.repeat_interleave(repeats, dim=0), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["llama", "opt"])
def test_the_reference_has_our_losses(name: str) -> None:
    workload = make(name)
    reference = Reference(workload)
    losses = reference.losses(reference.collate(workload.rows)).double()
    ours = Losses(workload.model, workload.task, lambda batch: batch)(workload.collate(workload.rows))
    torch.testing.assert_close(losses, ours, rtol=1e-5, atol=1e-6)


def test_the_reference_restores_its_parameters_nearly() -> None:
    workload = make("llama")
    reference = Reference(workload)
    before = [parameter.detach().clone() for parameter in reference.parameters]
    for scale in (1, -2, 1):
        reference.perturb(3, scale)
    for parameter, old in zip(reference.parameters, before, strict=True):
        torch.testing.assert_close(parameter.detach(), old, rtol=0, atol=1e-6)


def test_headlines_quote_what_is_worst_for_us() -> None:
    def run(over_floor: float, lead: float) -> dict[str, dict[str, float]]:
        return {"ours_over_floor": spread([over_floor]), "reference_over_ours": spread([lead])}

    sections = {"minilm_lora": {"k1": run(1.1, 3.0), "k16": run(1.2, 9.0)}, "minilm_full": {"k1": run(1.6, 2.5)}}
    found = {key: value["median"] for key, value in headlines(sections).items()}
    assert found == {"lora_step_over_floor": 1.2, "full_step_over_floor": 1.6, "reference_over_ours_minilm": 2.5}


def test_linear_fit() -> None:
    fit = linear_fit([1, 2, 3], [3.0, 5.0, 7.0])
    assert fit == {"slope": 2.0, "intercept": 1.0, "r_squared": 1.0}
