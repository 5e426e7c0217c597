"""A chat model's release: its template goes with it, and plain transformers talks to it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from peft_dpzero import DPZeroTrainer
from transformers import AutoModelForCausalLM, AutoTokenizer, DataCollatorForSeq2Seq, PreTrainedTokenizerBase, pipeline

from hub_load import usage_snippet
from release.releases import failures
from tiny import RELEASE, arguments, config, tiny_model, word_tokenizer

TEMPLATE = (
    "{% for message in messages %}{{ '[BOS] ' + message.content + ' [EOS] ' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '[BOS] ' }}{% endif %}"
)
SAVED = {"chat_template.jinja", "generation_config.json", "tokenizer.json", "tokenizer_config.json"}


def talk(number: int) -> list[dict[str, str]]:
    return [
        {"role": "user", "content": f"w{5 + number} w{6 + number}"},
        {"role": "assistant", "content": f"w{20 + number}"},
    ]


def rows(tokenizer: PreTrainedTokenizerBase, count: int = 32) -> Dataset:
    """Talks as tokens, of which the answer is to be learned."""
    made: list[dict[str, Any]] = []
    for number in range(count):
        prompt = tokenizer.apply_chat_template(talk(number)[:1], add_generation_prompt=True)["input_ids"]
        ids = tokenizer.apply_chat_template(talk(number))["input_ids"]
        made.append({"input_ids": ids, "labels": [-100] * len(prompt) + ids[len(prompt) :]})
    return Dataset.from_list(made)


def trained(folder: Path, template: str | dict[str, str]) -> DPZeroTrainer:
    """Two steps from a base that `org/base` names from within `folder`, with a checkpoint after each."""
    tokenizer, base = word_tokenizer(), folder / "org" / "base"
    tokenizer.chat_template = template
    model = tiny_model("causal_lm")
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        setattr(model.config, name, getattr(tokenizer, name))
        setattr(model.generation_config, name, getattr(tokenizer, name))
    model.save_pretrained(base)
    tokenizer.save_pretrained(base)
    tokenizer = AutoTokenizer.from_pretrained(base)
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(base),
        LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj", "v_proj"], lora_alpha=64),
    )
    trainer = DPZeroTrainer(
        model,
        arguments(folder / "release", max_steps=2, save_strategy="steps", save_steps=1),
        train_dataset=rows(tokenizer),
        data_collator=DataCollatorForSeq2Seq(tokenizer),
        processing_class=tokenizer,
        dpzero_config=config(),
    )
    trainer.train()
    trainer.create_model_card(base_model="org/base")
    trainer.save_model()
    return trainer


def answer(run: Any, question: list[dict[str, str]]) -> str:
    talk = run(question, do_sample=False, max_new_tokens=4)[0]["generated_text"]
    assert [message["role"] for message in talk] == ["user", "assistant"]
    return str(talk[-1]["content"])


def test_a_release_talks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    trainer, release = trained(tmp_path, TEMPLATE), tmp_path / "release"
    assert {path.name for path in release.iterdir()} == RELEASE | SAVED | {"checkpoint-1", "checkpoint-2"}
    assert (release / "chat_template.jinja").read_text() == TEMPLATE
    assert not failures(release, tmp_path / "org" / "base")

    monkeypatch.chdir(tmp_path)
    question = talk(3)[:1]
    ours = pipeline("text-generation", model=trainer.model, tokenizer=trainer.processing_class)
    assert answer(pipeline("text-generation", model="release"), question) == answer(ours, question)

    lines = usage_snippet((release / "README.md").read_text())
    assert "'role': 'user'" in lines
    capsys.readouterr()
    exec(lines.replace("THIS_REPOSITORY", "release"), {})
    assert "'role': 'assistant'" in capsys.readouterr().out


def test_every_template_of_a_tokenizer_goes_with_the_release(tmp_path: Path) -> None:
    templates = {"default": TEMPLATE, "tool_use": f"[BOS] {TEMPLATE}"}
    trained(tmp_path, templates)
    release = tmp_path / "release"
    assert AutoTokenizer.from_pretrained(release).chat_template == templates
    assert not failures(release, tmp_path / "org" / "base")
    (release / "additional_chat_templates" / "tool_use.jinja").write_text("another")
    assert failures(release) == {"hashes"}
