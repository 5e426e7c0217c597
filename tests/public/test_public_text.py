"""A basis from public text: what it spans, and runs whose directions lie in it."""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from peft_dpzero import (
    ClassificationTask,
    DPZeroConfig,
    DPZeroError,
    DPZeroTrainer,
    TokenTask,
    Verbalizer,
    replay_journal,
    verify,
)
from peft_dpzero.estimation import tasks
from peft_dpzero.estimation.shortcuts.label_logits import OutputHead
from peft_dpzero.public.basis import find_basis
from peft_dpzero.public.rows import public_rows
from peft_dpzero.release.start import BASIS_NAME
from peft_dpzero.training import settling
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import default_data_collator

from tiny import VOCABULARY, adapted, arguments, tiny_dataset, tiny_lora, tiny_model, token_rows, word_tokenizer


class Linear(nn.Module):
    """Logits x·Wᵀ and a parameter that nothing reads."""

    def __init__(self) -> None:
        super().__init__()
        self.idle = nn.Parameter(torch.zeros(3))
        self.layer = nn.Linear(12, 2)

    def forward(self, x: torch.Tensor) -> Any:
        logits = self.layer(x) + 0 * self.idle.sum()
        return type("Outputs", (), {"logits": logits})


def test_it_spans_the_gradients_and_leaves_out_what_they_do_not_move() -> None:
    torch.manual_seed(0)
    model = Linear()
    plane = torch.randn(2, 12)
    rows = [{"x": w @ plane, "labels": i % 2} for i, w in enumerate(torch.randn(60, 2))]
    basis = find_basis(model, ClassificationTask(), rows, default_data_collator, dict, size=8)
    assert basis.names == ("layer.weight", "layer.bias")
    # Two inputs' directions and the bias, each with the opposite sign for the other class.
    assert basis.size == 3
    vectors = basis.vectors.double() * 2.0**-15
    lengths = vectors.norm(dim=1)
    turned = vectors / lengths[:, None]
    torch.testing.assert_close(turned @ turned.T, torch.eye(3, dtype=torch.float64), rtol=0, atol=1e-3)
    gradient = torch.cat(
        [torch.outer(torch.tensor([1.0, -1.0]), plane[0] + plane[1]).flatten(), torch.ones(2)]
    ).double()
    gradient[-1] = -1
    inside = turned.T @ (turned @ gradient)
    torch.testing.assert_close(inside, gradient, rtol=0, atol=1e-2)


def test_vectors_are_longer_where_outputs_are_less_sensitive() -> None:
    torch.manual_seed(0)
    model = Linear()
    model.layer.bias.requires_grad_(False)
    # Two inputs, the second a hundredth as large; the gradients' energies differ by its square.
    signs = torch.randint(0, 2, (400, 2)) * 2.0 - 1
    rows = [{"x": torch.cat([pair * torch.tensor([1.0, 0.01]), torch.zeros(10)]), "labels": 0} for pair in signs]
    vectors = find_basis(model, ClassificationTask(), rows, default_data_collator, dict, size=2).vectors * 2.0**-15
    strong, weak = vectors.norm(dim=1).tolist()
    assert weak == pytest.approx(1, abs=1e-2)
    assert strong == pytest.approx(0.1, rel=0.1)


def test_when_time_is_over_it_is_made_of_as_many_texts_as_vectors() -> None:
    rows = [{"x": x, "labels": 0} for x in torch.randn(60, 12, generator=torch.Generator().manual_seed(0))]
    read: list[int] = []

    def collate(some: list[Any]) -> Any:
        read.append(len(some))
        return default_data_collator(some)

    basis = find_basis(Linear(), ClassificationTask(), rows, collate, dict, size=6, until=time.monotonic(), fewest=3)
    assert basis.size == 3
    assert len(read) <= 4
    find_basis(Linear(), ClassificationTask(), rows, collate, dict, size=3, until=time.monotonic() + 600)
    assert len(read) >= 12


@pytest.mark.parametrize("scaled", [False, True])
def test_a_language_models_logits_are_made_at_labels_alone_if_its_head_only_projects(
    scaled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_lora("causal_lm")
    if scaled:
        made = model.base_model.model.forward

        def forward(*args: Any, **inputs: Any) -> Any:
            outputs = made(*args, **inputs)
            outputs.logits = outputs.logits * 2
            return outputs

        model.base_model.model.forward = forward
    rows = [{"input_ids": ids, "labels": [-100] * 6 + ids[6:]} for ids in token_rows(12)]
    monkeypatch.setattr(tasks, "CHUNK_ENTRIES", 8 * VOCABULARY)
    made_logits: list[int] = []

    def note(head: nn.Module, inputs: Any, logits: torch.Tensor) -> None:
        made_logits.append(logits.numel() // VOCABULARY)

    handle = model.get_output_embeddings().register_forward_hook(note)
    basis = find_basis(model, TokenTask(1), rows, default_data_collator, dict, size=3)
    handle.remove()
    labels, positions, texts = 2, 8, 12
    assert sum(made_logits) == labels + positions + texts * (positions if scaled else labels)
    with monkeypatch.context() as patched:
        patched.setattr(OutputHead, "of", lambda model: None)
        plain = find_basis(model, TokenTask(1), rows, default_data_collator, dict, size=3)
    assert basis.names == plain.names
    spanned, wanted = (each.vectors.double() * 2.0**-15 for each in (basis, plain))
    torch.testing.assert_close(spanned.T @ spanned, wanted.T @ wanted, rtol=0, atol=1e-3)


def config(**changes: Any) -> DPZeroConfig:
    values: dict[str, Any] = {"noise_multiplier": 1.0, "target_delta": 1e-5, "num_directions": 3, "basis_size": 6}
    return DPZeroConfig(**(values | changes))


def trained(
    folder: Path, text: Any = None, resume: bool = False, steps: int = 4, dpzero: Any = None, **changes: Any
) -> DPZeroTrainer:
    data = tiny_dataset("classifier")
    torch.manual_seed(5)
    run = DPZeroTrainer(
        adapted(),
        arguments(folder, max_steps=steps, **changes),
        train_dataset=data,
        public_text=data.remove_columns("labels") if text is None else text,
        dpzero_config=dpzero or config(),
    )
    run.train(resume_from_checkpoint=resume)
    run.save_model()
    return run


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter_model.safetensors")


def test_a_run_is_verified_and_made_again_from_its_journal(tmp_path: Path) -> None:
    tiny_model("classifier").save_pretrained(tmp_path / "base")
    run = trained(tmp_path / "run")
    assert run.run.basis.names
    assert not [name for name in run.run.basis.names if "lora_A" in name]
    record = json.loads((tmp_path / "run" / "privacy_record.json").read_text())
    assert record["public_basis"] == run.run.basis.digest()
    assert record["direction_distribution"] == "orthogonal"
    assert any("public text" in gap for gap in record["not_covered"])
    fresh = adapted()
    replay_journal(fresh, tmp_path / "run").save_pretrained(tmp_path / "made")
    ours, again = weights(tmp_path / "run"), weights(tmp_path / "made")
    assert all(torch.equal(ours[name], again[name]) for name in ours)
    checks = verify(tmp_path / "run", base=tmp_path / "base")
    assert not [check for check in checks if check.status == "FAILED"]


def test_a_run_goes_on_with_the_directions_that_it_began_with(tmp_path: Path) -> None:
    kept = {"save_strategy": "steps", "save_steps": 2}
    trained(tmp_path / "run", dpzero=config(direction_distribution="gaussian"), **kept)
    resumed = trained(tmp_path / "run", resume=True, steps=6)
    assert resumed.privacy_record()["direction_distribution"] == "gaussian"
    assert len(resumed.run.journal.entries) == 6


def test_another_basis_is_told(tmp_path: Path) -> None:
    trained(tmp_path / "run")
    path = tmp_path / "run" / BASIS_NAME
    with safe_open(path, "pt") as file:
        vectors, names = file.get_tensor("vectors"), file.metadata()
    vectors[0, 0] += 1
    save_file({"vectors": vectors}, path, names)
    fresh = adapted()
    with pytest.raises(DPZeroError, match="not the basis of this run"):
        replay_journal(fresh, tmp_path / "run")
    assert [check.name for check in verify(tmp_path / "run") if check.status == "FAILED"]


def test_a_run_goes_on_with_the_basis_that_it_began_with(tmp_path: Path) -> None:
    first = trained(tmp_path / "run", save_strategy="steps", save_steps=2)
    shutil.rmtree(tmp_path / "run" / "checkpoint-4")
    text = tiny_dataset("classifier", count=20).remove_columns("labels")
    resumed = trained(tmp_path / "run", text, resume=True, steps=6)
    assert resumed.run.basis.digest() == first.run.basis.digest()
    assert len(resumed.run.journal.entries) == 6
    fresh = adapted()
    replay_journal(fresh, tmp_path / "run").save_pretrained(tmp_path / "made")
    ours, again = weights(tmp_path / "run"), weights(tmp_path / "made")
    assert all(torch.equal(ours[name], again[name]) for name in ours)


def test_with_minutes_a_run_keeps_the_vectors_that_time_tells(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    choose = settling.choose_sizes
    offered: list[Any] = []

    def three(*args: Any, entries: Any, **sizes: Any) -> Any:
        offered.append(entries)
        return choose(*args, entries=[3], **sizes)

    monkeypatch.setattr(settling, "choose_sizes", three)
    open_ended = config(basis_size=None, num_directions=None, minutes=1.0)
    first = trained(tmp_path / "run", dpzero=open_ended, save_strategy="steps", save_steps=2)
    assert offered[0][-1] > 3
    assert float(first.run.basis.vectors.double().norm(dim=1).amax()) == pytest.approx(2**15, rel=1e-3)
    record = first.privacy_record()
    assert record["chosen"]["basis_size"] == first.run.basis.size == 3
    assert record["public_basis"] == first.run.basis.digest()
    resumed = trained(tmp_path / "run", resume=True, steps=6, dpzero=open_ended)
    assert resumed.run.basis.digest() == first.run.basis.digest()
    assert len(offered) == 1
    fresh = adapted()
    replay_journal(fresh, tmp_path / "run").save_pretrained(tmp_path / "made")
    ours, again = weights(tmp_path / "run"), weights(tmp_path / "made")
    assert all(torch.equal(ours[name], again[name]) for name in ours)


def test_rows_get_labels_that_nobody_gave() -> None:
    model, rows = tiny_model("classifier"), tiny_dataset("classifier", count=40)
    made = public_rows(rows, ClassificationTask(), model, None)
    assert {row["labels"] for row in made} == {0, 1}
    assert [row["labels"] for row in made] != rows["labels"][:]
    tokens = tiny_dataset("causal_lm", count=3).remove_columns("labels")
    assert all(row["labels"] == row["input_ids"] for row in public_rows(tokens, TokenTask(1), model, None))


def test_texts_without_the_prompt_are_told_of() -> None:
    tokenizer = word_tokenizer()
    model, words = tiny_lora("masked_lm"), Verbalizer(tokenizer, ["w7", "w8"], causal=False)
    prompted = [{"input_ids": [9, 10, tokenizer.mask_token_id], "attention_mask": [1] * 3, "labels": 1}]
    bare = [{"input_ids": [9, 10, 11], "attention_mask": [1] * 3, "labels": 0}]
    with pytest.raises(DPZeroError, match="mask token too"):
        find_basis(model, words, bare, default_data_collator, dict, size=1)
    basis = find_basis(model, words, [*bare, *prompted], default_data_collator, dict, size=1)
    assert torch.equal(basis.vectors, find_basis(model, words, prompted, default_data_collator, dict, size=1).vectors)


def test_what_is_missing_is_told(tmp_path: Path) -> None:
    with pytest.raises(DPZeroError, match="public_text is empty"):
        trained(tmp_path / "a", [])
    with pytest.raises(DPZeroError, match="pass processing_class=tokenizer"):
        trained(tmp_path / "b", ["some text"] * 9)
    with pytest.raises(DPZeroError, match="weight_decay"):
        trained(tmp_path / "c", weight_decay=0.1)
    for folder in "abc":
        assert not (tmp_path / folder / "dpzero_journal").exists()
