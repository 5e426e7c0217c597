"""`peft-dpzero audit`, on a YAML run and on a script."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
import yaml
from datasets import Dataset
from peft_dpzero.auditing.one_run import AuditResult
from peft_dpzero.cli.app import run
from peft_dpzero.cli.audit import audit_table
from rich.console import Console
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from tiny import VOCABULARY, tiny_model

SCRIPT = """
from pathlib import Path
from peft_dpzero import DPZeroConfig, DPZeroTrainer
from tiny import arguments, tiny_dataset, tiny_model

def build_trainer(add_canaries):
    return DPZeroTrainer(
        tiny_model("classifier"),
        arguments(Path({folder!r}) / "out", max_steps=1, save_strategy="steps", save_steps=1),
        train_dataset=add_canaries(tiny_dataset("classifier", 8)),
        dpzero_config=DPZeroConfig(noise_multiplier=1.0, target_delta=1e-3, num_directions=1),
    )
"""


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    """A run on a masked LM with a verbalizer, the task that asks most of a canary."""
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "good", "bad", *(f"w{i}" for i in range(VOCABULARY - 7))]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", mask_token="[MASK]"
    ).save_pretrained(tmp_path / "base")
    tiny_model("masked_lm").save_pretrained(tmp_path / "base")
    rows = {"text": [f"w{i} w{i + 1} w{2 * i}" for i in range(20)], "label": ["no", "yes"] * 10}
    Dataset.from_dict(rows).to_csv(tmp_path / "rows.csv")
    content = {
        "model": "base",
        "task": "verbalizer-masked",
        "data": {
            "train": "rows.csv",
            "text": "{text} w1 {mask}",
            "label": "label",
            "label_words": {"no": "bad", "yes": "good"},
        },
        "adapter": {"kind": "lora", "r": 2, "target_modules": ["query"]},
        "dpzero": {"noise_multiplier": 1.0, "target_delta": 1e-3, "num_directions": 2},
        "training": {
            "output_dir": "out",
            "max_steps": 2,
            "per_device_train_batch_size": 16,
            "use_cpu": True,
            "logging_steps": 1,
            "report_to": [],
        },
    }
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(content), encoding="utf-8")
    return path


def test_a_yaml_run_is_audited_and_leaves_nothing_behind(recipe: Path, capfd: pytest.CaptureFixture[str]) -> None:
    before = sorted(recipe.parent.iterdir())
    assert run(["audit", str(recipe), "--canaries", "24", "--json"]) == 0
    result = json.loads(capfd.readouterr().out)
    assert (result["canaries"], result["guesses"], result["steps"]) == (24, 12, 2)
    assert 0 <= result["epsilon_lower_bound"] < result["claimed_epsilon"]
    assert result["refutes_claim"] is False
    assert "spent ε" in result["warning"]
    assert sorted(recipe.parent.iterdir()) == before


def test_a_script_is_audited_and_the_table_says_what_it_cost(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    script = tmp_path / "run.py"
    script.write_text(SCRIPT.format(folder=str(tmp_path)), encoding="utf-8")
    assert run(["audit", str(script), "-m", "8", "--guesses", "4"]) == 0
    output = capfd.readouterr().out
    for words in ("ε claimed (PLD)", "ε at least, at 0.95 confidence", "of 4", "may be released"):
        assert words in output
    assert not list((tmp_path / "out").rglob("*"))


@pytest.mark.parametrize(
    ("name", "content", "options", "message"),
    [
        ("run.py", "", [], "defines no function build_trainer"),
        ("run.py", "raise KeyError('secret')", [], "KeyError while running run.py"),
        ("run.py", None, [], "There is no file"),
        ("run.yaml", None, [], "cannot be read"),
        ("run.py", "", ["--confidence", "1.5"], "--confidence must lie strictly between 0 and 1"),
        ("run.py", "build_trainer = print", ["--guesses", "3"], "even number of guesses"),
    ],
)
def test_errors_are_one_line(
    name: str,
    content: str | None,
    options: list[str],
    message: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    if content is not None:
        (tmp_path / name).write_text(content, encoding="utf-8")
    assert run(["audit", str(tmp_path / name), *options]) in (1, 2)
    captured = capsys.readouterr()
    assert message in captured.err
    assert captured.err.count("\n") == 1
    assert "secret" not in captured.err
    assert not captured.out


def test_the_table_marks_a_refuted_claim_and_a_missing_one() -> None:
    def shown(claim: float | None) -> str:
        console = Console(width=120, record=True, file=io.StringIO())
        console.print(audit_table(AuditResult(2.5, claim, 1e-5, 100, 50, 49, 0.95, 10)))
        return console.export_text()

    assert "2.5, above the claim" in shown(2.0)
    assert "above the claim" not in shown(3.0)
    assert "none: this run gives no privacy" in shown(None)
