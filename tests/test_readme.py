"""The lines that README and the landing page begin with run as they stand, with stand-ins for what the Hub holds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import datasets
import pytest
from datasets import Dataset
from peft_dpzero import DPZeroTrainer
from transformers import AutoModelForMaskedLM, AutoTokenizer, BertForMaskedLM

from tiny import bert_config, word_tokenizer

ROOT = Path(__file__).parents[1]
PAGES = (ROOT / "README.md", ROOT / "docs" / "index.md")
# Of a tenth of a minute no steps would be left on a busy machine.
MINUTES = ("minutes=30", "minutes=0.5")


def first_lines(page: Path) -> str:
    return page.read_text().split("```python\n", 1)[1].split("```", 1)[0]


def test_both_pages_begin_with_the_same_lines() -> None:
    assert len({first_lines(page) for page in PAGES}) == 1


def test_the_first_lines_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    texts = [f"a film about {number} and {number % 7} more" for number in range(400)]
    tokenizer = word_tokenizer(" ".join([*texts, "It was terrible great ."]).split())
    rows = Dataset.from_dict({"text": texts, "label": [number % 2 for number in range(400)]})
    model = BertForMaskedLM(bert_config(vocab_size=len(tokenizer)))
    asked: list[str] = []

    def given(value: Any) -> Any:
        return lambda name, **options: (asked.append(name), value)[1]

    monkeypatch.setattr(datasets, "load_dataset", given(rows))
    monkeypatch.setattr(AutoTokenizer, "from_pretrained", given(tokenizer))
    monkeypatch.setattr(AutoModelForMaskedLM, "from_pretrained", given(model))
    monkeypatch.setattr(DPZeroTrainer, "push_to_hub", lambda self: self.save_model())
    monkeypatch.chdir(tmp_path)
    lines = first_lines(PAGES[0])
    assert MINUTES[0] in lines
    exec(lines.replace(*MINUTES), {})
    record = json.loads((tmp_path / "runs" / "private" / "privacy_record.json").read_text())
    assert 0 < record["epsilon"] <= 2.0
    assert record["steps"] >= 10
    assert asked == ["FacebookAI/roberta-base", "FacebookAI/roberta-base", "cornell-movie-review-data/rotten_tomatoes"]
