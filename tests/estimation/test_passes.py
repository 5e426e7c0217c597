"""Every way to make passes cheaper gives the losses of the plain pass."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from peft import IA3Config, PrefixTuningConfig, PromptTuningConfig, get_peft_model
from peft_dpzero import Task, TokenTask, Verbalizer, infer_task
from peft_dpzero.checks.probe import Probe
from peft_dpzero.estimation.differences import losses_at
from peft_dpzero.estimation.losses import Losses, Shortcuts
from peft_dpzero.estimation.shortcuts.label_logits import OutputHead
from peft_dpzero.perturbation.perturbation import Perturbation, Point
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from tiny import VOCABULARY, tiny_lora, tiny_model

CPU = torch.device("cpu")
POINTS: list[Point] = [(0, 1e-2), (0, -1e-2), (1, 1e-2), (2, 0.0)]


class Words:
    """The part of a tokenizer that a verbalizer reads: a word of n letters has n tokens."""

    mask_token_id, unk_token_id = 4, None

    def __call__(self, word: str, add_special_tokens: bool = False) -> dict[str, list[int]]:
        return {"input_ids": [10 + ord(letter) % 40 for letter in word]}


MODELS: dict[str, tuple[str, Callable[[], Any]]] = {
    "LoRA": ("classifier", lambda: tiny_lora("classifier")),
    "LoRA on the last layer": ("classifier", lambda: tiny_lora("classifier", layers_to_transform=[1])),
    "LoRA and head": ("classifier", lambda: tiny_lora("classifier", modules_to_save=["classifier"])),
    "full classifier": ("classifier", lambda: tiny_model("classifier")),
    "causal LM": ("causal_lm", lambda: tiny_lora("causal_lm")),
    "causal LM, head in LoRA": ("causal_lm", lambda: tiny_lora("causal_lm", target_modules=["q_proj", "lm_head"])),
    "full causal LM": ("causal_lm", lambda: tiny_model("causal_lm")),
    "masked LM": ("masked_lm", lambda: tiny_lora("masked_lm")),
    "IA3": (
        "causal_lm",
        lambda: get_peft_model(
            tiny_model("causal_lm"),
            IA3Config(task_type="CAUSAL_LM", target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]),
        ),
    ),
    "prefix": (
        "causal_lm",
        lambda: get_peft_model(
            tiny_model("causal_lm"), PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
        ),
    ),
    "prompt": (
        "causal_lm",
        lambda: get_peft_model(
            tiny_model("causal_lm"), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
        ),
    ),
}


def batch(kind: str, rows: int = 3, length: int = 7) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(5)
    ids = torch.randint(5, VOCABULARY, (rows, length), generator=generator)
    mask = torch.ones_like(ids)
    mask[0, -2:] = 0
    unlabelled = torch.rand(ids.shape, generator=generator) < 0.5
    labels = torch.arange(rows) % 2 if kind == "classifier" else ids.masked_fill(unlabelled, -100)
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def lone(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """The batch's second row, which is not padded."""
    return {key: value[1:2] for key, value in batch.items()}


def at_all(losses: Losses, one: dict[str, Tensor], model: Any, points: Sequence[Point] = POINTS) -> Tensor:
    return losses_at(losses, [one], Perturbation(model), 0, points)[0]


@pytest.mark.parametrize("name", MODELS)
def test_the_probes_choice_gives_the_plain_losses(name: str) -> None:
    kind, build = MODELS[name]
    model = build().eval()
    task = infer_task(model)
    chosen = Probe(model, CPU, task=task).losses(Perturbation(model), dict)
    for one in (batch(kind), lone(batch(kind))):
        plain = at_all(Losses(model, task, dict), one, model)
        assert plain.shape == (len(POINTS), len(one["input_ids"]))
        torch.testing.assert_close(at_all(chosen, one, model), plain, rtol=1e-5, atol=1e-6)
    assert (chosen.points_at_once(one) > 1) == chosen.shortcuts.stacked
    assert chosen.shortcuts.stacked or name in ("prefix", "prompt")
    assert (chosen.shortcuts.label_logits is not None) == (kind != "classifier")


def points_of_passes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many points each pass over a stack has from now on."""
    passes: list[int] = []
    stacked = Losses.stacked

    def counted(self: Losses, one: dict[str, Tensor], parameters: dict[str, Tensor]) -> Tensor:
        passes.append(len(next(iter(parameters.values()))))
        return stacked(self, one, parameters)

    monkeypatch.setattr(Losses, "stacked", counted)
    return passes


@pytest.mark.parametrize("kind", ["classifier", "causal_lm", "masked_lm"])
def test_as_many_points_are_stacked_in_each_pass_as_on_a_gpu(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_lora(kind).eval()
    perturbation = Perturbation(model)
    losses = Losses(model, infer_task(model), dict, Shortcuts(stacked=True))
    monkeypatch.setattr(losses, "_on_gpu", True)
    one, points = batch(kind), [(k, 1e-2) for k in range(9)]
    monkeypatch.setattr("peft_dpzero.estimation.losses.STACKED_TOKENS_ON_GPU", 6 * one["input_ids"].numel())
    passes = points_of_passes(monkeypatch)
    found = losses_at(losses, [one], perturbation, 0, points)[0]
    assert passes == [5, 5]
    torch.testing.assert_close(
        found, at_all(Losses(model, losses.task, dict), one, model, points), rtol=1e-5, atol=1e-6
    )
    # Too few to be worth a pass over a stack.
    losses_at(losses, [one], perturbation, 0, points[:3])
    assert passes == [5, 5]


def test_points_are_stacked_above_a_trunk_as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_lora("classifier", layers_to_transform=[1]).eval()
    perturbation, task = Perturbation(model), infer_task(model)
    losses = Probe(model, CPU, task=task).losses(perturbation, dict).without_kept()
    assert losses.shortcuts.trunk is not None
    monkeypatch.setattr(losses, "_on_gpu", True)
    one, points = batch("classifier"), [(k, 1e-2) for k in range(9)]
    passes = points_of_passes(monkeypatch)
    found = losses_at(losses, [one], perturbation, 0, points)[0]
    assert passes == [9]
    torch.testing.assert_close(found, at_all(Losses(model, task, dict), one, model, points), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("words", [["a", "b"], ["ab", "cde", "f"]])
@pytest.mark.parametrize("kind", ["causal_lm", "masked_lm"])
def test_label_words_are_projected_alone(kind: str, words: list[str]) -> None:
    model = tiny_lora(kind).eval()
    task = Verbalizer(Words(), words, causal=kind == "causal_lm")
    one = batch(kind) | {"labels": torch.tensor([0, 1, 1])}
    one["input_ids"][:, 1 : 1 + task.longest] = Words.mask_token_id
    plain = at_all(Losses(model, task, dict), one, model)
    for stacked in (False, True):
        chosen = Losses(model, task, dict, Shortcuts(label_logits=OutputHead.of(model), stacked=stacked))
        torch.testing.assert_close(at_all(chosen, one, model), plain, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(at_all(chosen, lone(one), model), plain[:, 1:2], rtol=1e-5, atol=1e-6)


class Largest(TorchDispatchMode):
    """The most entries that a tensor of vocabulary width had."""

    entries = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        weight = func is torch.ops.aten.t.default
        if isinstance(out, Tensor) and not weight and out.ndim > 1 and out.shape[-1] == VOCABULARY:
            self.entries = max(self.entries, out.numel())
        return out


def test_no_logits_are_made_where_there_are_no_labels() -> None:
    model = tiny_lora("causal_lm").eval()
    one = lone(batch("causal_lm", length=12))
    one["labels"].fill_(-100)
    one["labels"][:, 5] = 7
    with Largest() as everywhere:
        Losses(model, TokenTask(1), dict)(one)
    with Largest() as at_labels:
        Losses(model, TokenTask(1), dict, Shortcuts(label_logits=OutputHead.of(model)))(one)
    assert (everywhere.entries, at_labels.entries) == (12 * VOCABULARY, VOCABULARY)


def test_a_head_that_does_more_than_project_falls_back() -> None:
    model = tiny_model("causal_lm")
    forward = model.forward

    def capped(*args: Any, **kwargs: Any) -> Any:
        out = forward(*args, **kwargs)
        out.logits = torch.tanh(out.logits * 30) / 30
        return out

    model.forward = capped
    chosen = Probe(model, CPU, task=TokenTask(1)).losses(Perturbation(model), dict)
    assert chosen.shortcuts.label_logits is None
    torch.testing.assert_close(
        at_all(chosen, batch("causal_lm"), model),
        at_all(Losses(model, TokenTask(1), dict), batch("causal_lm"), model),
    )


def test_a_users_own_losses_are_read_from_whole_outputs() -> None:
    class Own(TokenTask):
        def losses(self, outputs: Any, batch: Any) -> Tensor:
            return outputs.logits.float().mean(dim=(1, 2))

    model = tiny_model("causal_lm")
    losses: Task = Own(1)
    chosen = Probe(model, CPU, task=losses).losses(Perturbation(model), dict)
    assert chosen.shortcuts.label_logits is None
    assert at_all(chosen, batch("causal_lm"), model).shape == (len(POINTS), 3)


def test_stacked_parameters_are_those_of_single_points() -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        model = tiny_model("classifier").to(dtype)
        perturbation = Perturbation(model)
        together = perturbation.stacked(3, POINTS)
        for i, (direction, scale) in enumerate(POINTS):
            with perturbation.at(3, direction, scale):
                for name, parameter in perturbation.parameters.items():
                    assert torch.equal(together[name][i], parameter)
