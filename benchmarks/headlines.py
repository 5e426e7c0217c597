"""The few numbers that the documentation quotes, from all that was measured."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from timing import spread

Spread = dict[str, float]


def headlines(sections: Mapping[str, Any]) -> dict[str, Spread]:
    """Each key's {median, min, max}, as far as its sections were run.

    Where several measurements answer a question, the one that is worst for us is quoted: the largest
    `lora_step_over_floor` of the models, the smaller lead of LoRA and full-parameter tuning over the reference, and
    the better of Opacus's two modes.
    """
    found: dict[str, Spread] = {}
    lora = [run for name, section in sections.items() if name.endswith("_lora") for run in _runs(section)]
    _put(found, "lora_step_over_floor", [run["ours_over_floor"] for run in lora], max)
    full = _runs(sections.get("minilm_full", {}))
    _put(found, "full_step_over_floor", [run["ours_over_floor"] for run in full], max)
    for model in ("minilm", "gemma"):
        runs = [run for mode in ("lora", "full") for run in _runs(sections.get(f"{model}_{mode}", {}))]
        leads = [run["reference_over_ours"] for run in runs if "reference_over_ours" in run]
        _put(found, f"reference_over_ours_{model}", leads, min)
    leads = [value for run in lora for name, value in run.items() if name.startswith("opacus")]
    _put(found, "opacus_over_ours", leads, min)
    if "memory" in sections:
        found |= _memory(sections["memory"])
    return found


def _memory(measured: Mapping[str, Any]) -> dict[str, Spread]:
    return {
        "extra_memory_over_opacus": max(
            (_ratio(measured["minilm ours"], measured[f"minilm opacus {mode}"]) for mode in ("hooks", "ghost")),
            key=lambda value: value["median"],
        ),
        "peak_memory_over_eval": _ratio(measured["llama train peak"], measured["llama evaluate peak"]),
    }


def _ratio(over: Sequence[float], under: Sequence[float]) -> Spread:
    return spread([a / b for a, b in zip(over, under, strict=True)])


def _runs(section: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    return [run for run in section.values() if isinstance(run, dict) and "ours_over_floor" in run]


def _put(found: dict[str, Spread], key: str, values: list[Spread], worst: Any) -> None:
    if values:
        found[key] = worst(values, key=lambda value: value["median"])
