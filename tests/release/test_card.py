"""What a release holds and what its card says: names, numbers, figures, a picture, and lines of Python that run."""

from __future__ import annotations

import hashlib
import json
import math
import os
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import torch
from huggingface_hub import EvalResult, ModelCard
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import AutoPeftModelForSequenceClassification, LoraConfig, PromptTuningConfig, get_peft_model
from peft_dpzero import DPZeroConfig, DPZeroError, DPZeroTrainer, verify
from peft_dpzero.release.base_name import base_name
from peft_dpzero.release.evaluation import metrics_of
from peft_dpzero.release.numbers import rounded_up
from peft_dpzero.release.picture import spending
from transformers import (
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    DataCollatorWithPadding,
    GenerationConfig,
)

from hub_load import usage_snippet
from release.releases import failures
from tiny import LORA_TARGETS, TASK_TYPES, arguments, config, tiny_dataset, tiny_model, word_tokenizer

AUTO = {
    "classifier": AutoModelForSequenceClassification,
    "causal_lm": AutoModelForCausalLM,
    "masked_lm": AutoModelForMaskedLM,
}


def trained(
    folder: Path, kind: str = "classifier", adapter: bool = True, dpzero: DPZeroConfig | None = None, **changes: Any
) -> DPZeroTrainer:
    """Three steps, from a base in folder/base that is loaded by its path."""
    base = tiny_model(kind)
    if kind == "classifier":
        base.config.id2label, base.config.label2id = {0: "bad", 1: "good"}, {"bad": 0, "good": 1}
    base.save_pretrained(folder / "base")
    model = AUTO[kind].from_pretrained(folder / "base")
    if adapter:
        torch.manual_seed(0)
        model = get_peft_model(
            model, LoraConfig(task_type=TASK_TYPES[kind], r=2, target_modules=LORA_TARGETS[kind], lora_alpha=64)
        )
    run = DPZeroTrainer(
        model,
        arguments(folder / "out", logging_steps=1),
        train_dataset=tiny_dataset(kind),
        dpzero_config=dpzero or config(),
        **({"processing_class": word_tokenizer()} | changes),
    )
    run.train()
    return run


def files_with(folder: Path, text: str) -> set[str]:
    return {path.name for path in folder.rglob("*") if path.is_file() and text.encode() in path.read_bytes()}


def test_a_base_in_a_folder_leaves_no_path_and_is_checked_all_the_same(tmp_path: Path) -> None:
    run, release = trained(tmp_path), tmp_path / "release"
    run.save_model(str(release))
    assert json.loads((release / "adapter_config.json").read_text())["base_model_name_or_path"] is None
    assert not files_with(release, str(tmp_path))
    card = ModelCard.load(release / "README.md")
    assert card.data.base_model is None
    assert not [tag for tag in card.data.tags if tag.startswith("base_model")]
    assert "The base was a folder, and is not named here" in card.text
    header = json.loads((release / "dpzero_journal").read_text().splitlines()[0])["header"]
    assert f"`{header['frozen']['sha256']}`" in card.text
    assert not failures(release, tmp_path / "base")


@pytest.mark.parametrize(("kind", "adapter"), [*((kind, True) for kind in AUTO), ("classifier", False)])
def test_the_cards_python_runs(kind: str, adapter: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, release = trained(tmp_path, kind, adapter), tmp_path / "release"
    run.save_model(str(release))
    lines = usage_snippet((release / "README.md").read_text())
    capsys.readouterr()
    names: dict[str, Any] = {}
    exec(lines.replace("FOLDER_OF_THE_BASE", str(tmp_path / "base")).replace("THIS_REPOSITORY", str(release)), names)
    assert capsys.readouterr().out.strip()
    row = torch.arange(5, 13)[None]
    with torch.no_grad():
        torch.testing.assert_close(names["model"](input_ids=row).logits, run.model.eval()(input_ids=row).logits)
    if kind == "classifier":
        assert names["model"].config.id2label == {0: "bad", 1: "good"}


def test_a_release_holds_the_tokenizer_its_template_and_the_generation_config(tmp_path: Path) -> None:
    tokenizer = word_tokenizer()
    tokenizer.chat_template = "{{ messages[0].content }}"
    run = trained(tmp_path, "causal_lm", processing_class=None, data_collator=DataCollatorWithPadding(tokenizer))
    run.model.get_base_model().generation_config.max_new_tokens = 7
    run.save_model(str(tmp_path / "release"))
    assert (tmp_path / "release" / "chat_template.jinja").read_text() == tokenizer.chat_template
    assert (tmp_path / "release" / "tokenizer.json").exists()
    assert GenerationConfig.from_pretrained(tmp_path / "release").max_new_tokens == 7
    assert not failures(tmp_path / "release", tmp_path / "base")


def test_what_is_told_for_the_card_stays_for_later_saves(tmp_path: Path) -> None:
    run, release = trained(tmp_path), tmp_path / "release"
    run.create_model_card(finetuned_from="org/base", license="mit", tasks="text-classification", dataset="Reviews")
    assert ModelCard.load(tmp_path / "out" / "README.md").data.base_model == "org/base"
    run.save_model(str(release))
    card = ModelCard.load(release / "README.md")
    assert (card.data.base_model, card.data.license, card.data.datasets) == ("org/base", "mit", None)
    assert json.loads((release / "adapter_config.json").read_text())["base_model_name_or_path"] == "org/base"
    assert 'from_pretrained("org/base"' in card.text
    assert not failures(release, tmp_path / "base")


def test_a_named_base_resolves_where_it_lies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, release = trained(tmp_path), tmp_path / "release"
    run.create_model_card(base_model="org/base")
    run.save_model(str(release))
    (tmp_path / "org").mkdir()
    os.rename(tmp_path / "base", tmp_path / "org" / "base")
    monkeypatch.chdir(tmp_path)
    loaded = AutoPeftModelForSequenceClassification.from_pretrained(release).eval()
    row = torch.arange(5, 13)[None]
    with torch.no_grad():
        torch.testing.assert_close(loaded(input_ids=row).logits, run.model.eval()(input_ids=row).logits)


def test_a_base_is_called_by_its_hub_name_or_not_at_all(tmp_path: Path) -> None:
    model = tiny_model("classifier")
    assert base_name(model) is None
    for place, name in {
        "org/base": "org/base",
        "base": "base",
        str(tmp_path): None,
        str(tmp_path / "gone"): None,
        "~/base": None,
        "C:\\models\\base": None,
        "a/b/c": None,
        "/home/me/.cache/huggingface/hub/models--org--base/snapshots/0123abc": "org/base",
        "/home/me/.cache/huggingface/hub/models--base/snapshots/0123abc": "base",
    }.items():
        model.name_or_path = place
        assert base_name(model) == name, place
    model.name_or_path = str(tmp_path)
    assert base_name(model, "org/given") == "org/given"
    for wrong in (str(tmp_path), "", "a/b/c"):
        with pytest.raises(DPZeroError, match="name on the Hub"):
            base_name(model, wrong)


def test_a_prompts_tokenizer_is_no_path_either(tmp_path: Path) -> None:
    base, release = tiny_model("causal_lm"), tmp_path / "release"
    base.save_pretrained(tmp_path / "base")
    word_tokenizer().save_pretrained(tmp_path / "tokenizer")
    prompt = PromptTuningConfig(
        task_type="CAUSAL_LM",
        num_virtual_tokens=2,
        prompt_tuning_init="TEXT",
        prompt_tuning_init_text="w5 w6",
        tokenizer_name_or_path=str(tmp_path / "tokenizer"),
    )
    given = arguments(tmp_path / "out", max_steps=1)
    model = get_peft_model(base, prompt)
    run = DPZeroTrainer(model, given, train_dataset=tiny_dataset("causal_lm"), dpzero_config=config())
    run.train()
    run.save_model(str(release))
    assert json.loads((release / "adapter_config.json").read_text())["tokenizer_name_or_path"] == "tokenizer"
    assert not files_with(release, str(tmp_path))
    assert not failures(release, tmp_path / "base")


@given(st.floats(1e-12, 1e12))
@settings(deadline=None, derandomize=True)
def test_a_bound_is_never_rounded_down(value: float) -> None:
    shown = rounded_up(value)
    assert value <= shown <= value * 1.001
    assert float(f"{shown:.4g}") == shown


def test_a_card_shows_four_digits_and_no_less_than_was_spent(tmp_path: Path) -> None:
    run, release = trained(tmp_path, dpzero=config(noise_multiplier=1.23456789)), tmp_path / "release"
    run.save_model(str(release))
    record = json.loads((release / "privacy_record.json").read_text())
    claims = ModelCard.load(release / "README.md").data.privacy
    assert record["epsilon"] <= claims["epsilon"] == rounded_up(record["epsilon"])
    assert (claims["noise_multiplier"], claims["delta"]) == (1.235, 1e-5)
    text = (release / "README.md").read_text()
    assert f"({claims['epsilon']:g}, 1e-05)-differential privacy" in text
    factor = rounded_up(math.exp(claims["epsilon"]))
    plain = next(line for line in text.splitlines() if line.startswith("In plain words: had one training example been"))
    assert plain.endswith(f"by a factor of at most e^ε = {factor:g}, give or take δ = 1e-05.")
    assert str(record["epsilon"]) not in text


def test_the_picture_shows_what_was_spent_and_released_and_is_hashed(tmp_path: Path) -> None:
    for name, dpzero, panels in (
        ("private", config(train_loss="private"), 2),
        ("withheld", config(), 1),
        ("laplace", config(mechanism="laplace", target_delta=0, num_directions=1), 1),
    ):
        run, release = trained(tmp_path / name, dpzero=dpzero), tmp_path / name / "release"
        run.save_model(str(release))
        drawn = (release / "privacy.svg").read_bytes()
        record = json.loads((release / "privacy_record.json").read_text())
        assert record["files"]["privacy.svg"] == hashlib.sha256(drawn).hexdigest()
        lines = ElementTree.fromstring(drawn).findall(".//{http://www.w3.org/2000/svg}polyline")
        assert len(lines) == panels
        assert "(privacy.svg)" in (release / "README.md").read_text()
        points = spending(record)
        assert points[0] == (0.0, 0.0)
        assert points[-1] == (3.0, record["epsilon"])
        assert points == sorted(points)
        assert [spent for _, spent in points] == sorted(spent for _, spent in points)
        assert str(tmp_path) not in drawn.decode()
    run = trained(tmp_path / "none", dpzero=config(deterministic=True))
    run.save_model(str(tmp_path / "none" / "release"))
    assert not (tmp_path / "none" / "release" / "privacy.svg").exists()
    assert "privacy.svg" not in (tmp_path / "none" / "release" / "README.md").read_text()


def test_figures_of_evaluation_are_shown_if_given_and_named_if_their_data_is(tmp_path: Path) -> None:
    run, release = trained(tmp_path, eval_dataset=tiny_dataset("classifier", 8)), tmp_path / "release"
    measured = run.evaluate()
    run.save_model(str(release))
    assert "## Evaluation" not in (release / "README.md").read_text()
    run.create_model_card(eval_results=measured)
    run.save_model(str(release))
    card = ModelCard.load(release / "README.md")
    assert card.data.eval_results is None
    assert f"| loss | {float(format(measured['eval_loss'], '.4g'))} |" in card.text
    assert "The guarantee does not cover them" in card.text
    assert "runtime" not in card.text
    run.create_model_card(datasets="org/reviews")
    found = ModelCard.load(tmp_path / "out" / "README.md").data.eval_results
    assert [(one.dataset_type, one.metric_type) for one in found] == [("org/reviews", "loss")]
    own = [EvalResult("text-classification", "org/held-out", "Held out", "f1", 0.5)]
    assert metrics_of(own) == {"f1": 0.5}
    with pytest.raises(DPZeroError, match="eval_results"):
        run.create_model_card(eval_results=0.9)


def test_every_name_in_a_release_belongs_there(tmp_path: Path) -> None:
    run = trained(tmp_path, "causal_lm")
    run.save_model(str(tmp_path / "release"))
    assert {check.name: check.status for check in verify(tmp_path / "release")}["files"] == "ok"
