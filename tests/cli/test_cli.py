"""The command line: what it shows, what it trains, and what its errors look like."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from datasets import ClassLabel, Dataset, Features, Value
from huggingface_hub import ModelCard
from peft import PeftModel
from peft_dpzero import DPZeroConfig, DPZeroTrainer, make_plan
from peft_dpzero.cli.app import run
from peft_dpzero.cli.data import Encoder, class_names, with_class_indices
from peft_dpzero.cli.plan import default_delta
from peft_dpzero.cli.settings import DataSettings, read_settings
from peft_dpzero.errors import DPZeroError
from peft_dpzero.mechanism.accountant import COARSE_INTERVAL, Accountant
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    PreTrainedTokenizerFast,
)

from tiny import tiny_model

EXAMPLE = Path(__file__).parents[2] / "integrations" / "cli"
WORDS = [
    "[PAD]",
    "[UNK]",
    "[CLS]",
    "[SEP]",
    "[MASK]",
    "</s>",
    "great",
    "terrible",
    "It",
    "was",
    ".",
    "good",
    "bad",
    "film",
    "plot",
    "the",
    "a",
    "it",
    "is",
]
SENTENCES = ["the film is good", "the plot is bad", "a good plot", "a bad film it is"]
ROWS = {"sentence": SENTENCES * 4, "mark": [1, 0, 1, 0] * 4}
AUTO = {
    "classifier": AutoModelForSequenceClassification,
    "masked_lm": AutoModelForMaskedLM,
    "causal_lm": AutoModelForCausalLM,
}
Recipe = dict[str, Any]


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    words = {word: index for index, word in enumerate(WORDS)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", mask_token="[MASK]", eos_token="</s>"
    )


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bases")
    for kind in AUTO:
        tiny_model(kind).save_pretrained(folder / kind)
        tiny_tokenizer().save_pretrained(folder / kind)
    return folder


@pytest.fixture
def recipe(tmp_path: Path, bases: Path) -> Recipe:
    """A sequence classification run on a csv file."""
    Dataset.from_dict(ROWS).to_csv(tmp_path / "rows.csv")
    return {
        "model": str(bases / "classifier"),
        "task": "sequence-classification",
        "data": {"train": "rows.csv", "text": "sentence", "label": "mark"},
        "adapter": {"kind": "lora", "r": 2},
        "dpzero": {"target_epsilon": 8.0, "target_delta": 1e-3, "num_directions": 2},
        "training": {
            "output_dir": "out",
            "max_steps": 2,
            "per_device_train_batch_size": 4,
            "learning_rate": 0.01,
            "save_strategy": "no",
            "disable_tqdm": True,
            "use_cpu": True,
        },
    }


@pytest.fixture
def train(tmp_path: Path) -> Callable[..., int]:
    """Writes a recipe as YAML and runs `train` on it."""

    def call(recipe: Recipe, *options: str) -> int:
        path = tmp_path / "run.yaml"
        path.write_text(yaml.safe_dump(recipe), encoding="utf-8")
        return run(["train", str(path), *options])

    return call


def error_line(capsys: pytest.CaptureFixture[str]) -> str:
    """The error, which must be the last and only message; progress bars may come before it."""
    captured = capsys.readouterr()
    assert "Traceback" not in captured.err
    lines = [line for line in captured.err.splitlines() if line.startswith("peft-dpzero: ")]
    assert len(lines) == 1
    assert captured.err.endswith(lines[0] + "\n")
    return lines[0]


def cells(output: str) -> dict[str, list[str]]:
    """Rows of the tables in `output`, by their first cell."""
    rows = [line.strip("│").split("│") for line in output.splitlines() if line.startswith("│")]
    return {row[0].strip(): [cell.strip() for cell in row[1:]] for row in rows}


# ---- plan ----


def test_the_version_is_the_packages(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["--version"]) == 0
    assert capsys.readouterr().out == f"peft-dpzero {version('peft_dpzero')}\n"


def test_plan_shows_the_library_numbers(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "160")
    options = "--examples 2000 --batch-size 50 --epochs 0.5 --epsilon 1 --clipping-threshold 4 --num-directions 9"
    assert run(["plan", *options.split(), "--no-table"]) == 0
    config = DPZeroConfig(target_epsilon=1.0, target_delta=5e-5, clipping_threshold=4.0, num_directions=9)
    plan = make_plan(config, 2000, 50, 20)
    sigma = plan.noise_multiplier
    shown = {name.partition(":")[0]: values[0] for name, values in cells(capsys.readouterr().out).items()}
    assert shown["noise multiplier σ"] == f"{sigma:.4g}"
    assert shown["ε proven (PLD)"] == f"{plan.epsilon():.4f}"
    assert shown["δ"] == "5e-05"
    assert shown["steps T"] == "20 (0.5 epochs)"
    assert shown["sample rate q"] == "0.025"
    assert shown["clipping threshold C"] == "4"
    assert shown["noise σC on each of a step's K sums"] == f"{4 * sigma:.4g}"
    assert shown["C / B"] == "0.08"
    assert shown["noise σC / B on the mean"] == f"{4 * sigma / 50:.4g}"
    assert shown["σ√K / B"] == f"{3 * sigma / 50:.3g} (K = 9)"


def test_plan_table_holds_a_calibrated_sigma_for_each_choice(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "160")
    options = "-n 1000 -b 100 -t 40 -e 1 -d 1e-5 --num-directions 4 --neighboring replace_one"
    assert run(["plan", *options.split(), "--epsilons", "1,2", "--step-counts", "80,40"]) == 0
    output = capsys.readouterr().out
    assert output.index("40 steps") < output.index("80 steps")
    accountant = Accountant("replace_one", 1e-5, "gaussian", COARSE_INTERVAL)
    for epsilon in (1, 2):
        expected = []
        for steps in (40, 80):
            sigma = accountant.noise_multiplier(epsilon, 0.1, steps)
            expected.append(f"{sigma:.3g} ({sigma * 2 / 100:.0%})")
        assert cells(output)[str(epsilon)] == expected


def test_the_table_grid_never_understates_sigma_and_hardly_overstates_it() -> None:
    accountants = (
        Accountant("add_or_remove_one", 1e-5, "gaussian"),
        Accountant("add_or_remove_one", 1e-5, "gaussian", COARSE_INTERVAL),
    )
    fine, coarse = (accountant.noise_multiplier(1.0, 0.02, 100) for accountant in accountants)
    # Both are calibrated to 0.1 %.
    assert 0.999 * fine <= coarse <= 1.01 * fine


@pytest.mark.parametrize(("examples", "delta"), [(1000, 1e-4), (10_000, 1e-5), (4000, 2e-5), (9300, 1e-5), (3, 0.03)])
def test_default_delta_is_a_tenth_of_one_over_n_rounded_down(examples: int, delta: float) -> None:
    assert default_delta(examples) == delta


def test_plan_says_how_it_chose_delta(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["plan", "-n", "4000", "-b", "40", "-t", "10", "--no-table"]) == 0
    assert "1/(10 N), rounded down to one digit: 2e-05" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("-n 100 -b 10", "exactly one of --steps and --epochs"),
        ("-n 100 -b 10 -t 4 --epochs 1", "exactly one of --steps and --epochs"),
        ("-n 100 -b 10 --epochs -1", "--epochs must be a number above 0"),
        ("-n 100 -b 101 -t 4", "--batch-size 101 is larger than --examples 100"),
        ("-n 100 -b 10 -t 4 -e 0", "target_epsilon must be a finite number above 0"),
        ("-n 100 -b 10 -t 4 -d 0.1", "target_delta=0.1 is not below 1/N"),
        ("-n 100 -b 10 -t 4 --neighboring both", "neighboring must be one of add_or_remove_one, replace_one"),
        ("-n 100 -b 10 -t 4 --epsilons 1;2", "--epsilons must be numbers above 0"),
        ("-n 100 -b 10 -t 4 --step-counts 10,2.5", "--step-counts must be numbers above 0"),
        ("-n many -b 10 -t 4", "'--examples'"),
        ("-t 4", "Missing option '--examples'"),
        ("-n 100 -t 4 --batchsize 3", "No such option: --batchsize"),
    ],
)
def test_plan_errors_are_one_line(options: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["plan", *options.split()]) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert captured.err.count("\n") == 1
    assert not captured.out


def test_an_unknown_command_names_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["trian"]) == 2
    assert "train" in error_line(capsys)


def test_no_arguments_show_the_commands(capsys: pytest.CaptureFixture[str]) -> None:
    assert run([]) == 0
    output = capsys.readouterr().out
    assert "plan" in output
    assert "train" in output


# ---- train ----


@pytest.mark.parametrize("suffix", ["csv", "jsonl", "parquet"])
def test_train_classifies_from_every_file_format(
    suffix: str, recipe: Recipe, train: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    table = Dataset.from_dict({**ROWS, "mark": ["up" if mark else "down" for mark in ROWS["mark"]]})
    writer = {"csv": table.to_csv, "jsonl": table.to_json, "parquet": table.to_parquet}[suffix]
    writer(tmp_path / f"rows.{suffix}")
    recipe["data"] |= {"train": f"rows.{suffix}", "eval": f"rows.{suffix}"}
    assert train(recipe) == 0
    shown = cells(capsys.readouterr().out)
    record = json.loads((tmp_path / "out" / "privacy_record.json").read_text())
    assert shown["noise multiplier σ"] == [f"{record['noise_multiplier']:.4g}"]
    assert shown["ε spent"] == [f"{record['epsilon']:.4g}"]
    assert shown["δ"] == ["0.001"]
    assert shown["steps"] == ["2"]
    assert shown["evaluation accuracy"][0] in {f"{100 * k / 16:.2f}%" for k in range(17)}
    assert record["sample_rate"] == 4 / 16


@pytest.mark.parametrize(
    ("kind", "task", "text", "words"),
    [
        ("classifier", "sequence-classification", "sentence", None),
        ("causal_lm", "causal-lm", "the film : {sentence}", None),
        ("masked_lm", "verbalizer-masked", "{sentence} It was {mask} .", {0: "terrible", 1: "great"}),
        ("masked_lm", "verbalizer-masked", "{sentence} It was {mask} .", {0: "terrible film", 1: "great"}),
        ("causal_lm", "verbalizer-causal", "{sentence} It was", {0: "terrible", 1: "great"}),
        ("causal_lm", "verbalizer-causal", "{sentence} It was", {0: "terrible film", 1: "great"}),
    ],
)
@pytest.mark.parametrize("adapter", ["lora", "prefix", "prompt", "ia3"])
def test_every_task_and_adapter_trains_and_loads_with_plain_peft(
    kind: str,
    task: str,
    text: str,
    words: dict[int, str] | None,
    adapter: str,
    recipe: Recipe,
    bases: Path,
    train: Callable[..., int],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    recipe |= {"model": str(bases / kind), "task": task, "adapter": {"kind": adapter}}
    recipe["data"] |= {"text": text, "eval": "rows.csv"}
    if words:
        recipe["data"]["label_words"] = words
    if task == "causal-lm":
        del recipe["data"]["label"]
    assert train(recipe) == 0
    shown = cells(capsys.readouterr().out)
    assert ("evaluation perplexity" if task == "causal-lm" else "evaluation accuracy") in shown

    ids = torch.tensor([[6, 7, 8, 9]])
    logits = []
    for learning_rate in (0.01, 0.0):
        if learning_rate == 0.0:
            recipe["training"] |= {"learning_rate": 0.0, "output_dir": "untrained"}
            assert train(recipe) == 0
        folder = tmp_path / recipe["training"]["output_dir"]
        loaded = PeftModel.from_pretrained(AUTO[kind].from_pretrained(bases / kind), folder).eval()
        with torch.no_grad():
            logits.append(loaded(input_ids=ids, attention_mask=torch.ones_like(ids)).logits)
    assert torch.isfinite(logits[0]).all()
    # The same start from the same seed, so that the difference is what was learnt.
    assert not torch.equal(*logits)


def test_full_tuning_saves_a_whole_model_with_its_class_names(
    recipe: Recipe, train: Callable[..., int], tmp_path: Path
) -> None:
    recipe["adapter"] = {"kind": "full"}
    recipe["data"]["labels"] = [1, 0]
    assert train(recipe) == 0
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out")
    assert model.config.id2label == {0: "1", 1: "0"}


def test_a_base_in_a_folder_gets_the_name_that_is_given(
    recipe: Recipe, train: Callable[..., int], tmp_path: Path
) -> None:
    recipe["training"] |= {"save_strategy": "steps", "save_steps": 1}
    assert train(recipe | {"base_model": "organization/model"}) == 0
    for release in (tmp_path / "out", tmp_path / "out" / "checkpoint-1"):
        adapter = json.loads((release / "adapter_config.json").read_text())
        assert adapter["base_model_name_or_path"] == "organization/model"
        assert ModelCard.load(release / "README.md").data.base_model == "organization/model"


def test_no_copy_of_the_data_stays_in_a_cache(
    recipe: Recipe, train: Callable[..., int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = tmp_path / "cache"
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", cache)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()
    assert train(recipe) == 0
    assert not list((tmp_path / "temporary").rglob("*.arrow"))
    assert not cache.exists() or not list(cache.rglob("*.arrow"))


def test_a_named_dataset_brings_its_class_names_and_splits(
    recipe: Recipe, train: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    features = Features({"sentence": Value("string"), "mark": ClassLabel(names=["down", "up"])})
    for split in ("train", "validation"):
        Dataset.from_dict(ROWS, features=features).to_parquet(tmp_path / "named" / "data" / f"{split}-0.parquet")
    recipe["data"] |= {"train": "named", "eval": "named"}
    recipe["adapter"] = {"kind": "full"}
    assert train(recipe) == 0
    assert "evaluation accuracy" in cells(capsys.readouterr().out)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["id2label"] == {"0": "down", "1": "up"}


@pytest.mark.slow
def test_the_length_of_a_long_row_is_not_printed(recipe: Recipe, tmp_path: Path, bases: Path) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.model_max_length = 32
    shutil.copytree(bases / "classifier", tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    rows = {"sentence": [*ROWS["sentence"], " ".join(["film"] * 173)], "mark": [*ROWS["mark"], 1]}
    Dataset.from_dict(rows).to_csv(tmp_path / "rows.csv")
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(recipe | {"model": str(tmp_path / "base")}), encoding="utf-8")
    command = [sys.executable, "-m", "peft_dpzero.cli.app", "train", str(path)]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=240)
    assert result.returncode == 0, result.stderr
    assert "173" not in result.stdout + result.stderr
    assert "longer than" not in result.stdout + result.stderr


@pytest.mark.slow
def test_a_finished_folder_is_not_trained_into_again_and_resuming_releases_nothing_twice(
    recipe: Recipe, train: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe["training"] |= {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    assert train(recipe) == 0
    journal = (tmp_path / "out" / "dpzero_journal").read_bytes()
    adapter = (tmp_path / "out" / "adapter_model.safetensors").read_bytes()
    capsys.readouterr()
    assert train(recipe) == 2
    assert "add --resume" in error_line(capsys)
    shutil.rmtree(tmp_path / "out" / "checkpoint-4")
    assert train(recipe, "--resume") == 0
    assert (tmp_path / "out" / "dpzero_journal").read_bytes() == journal
    assert (tmp_path / "out" / "adapter_model.safetensors").read_bytes() == adapter


def test_the_example_runs(bases: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = shutil.copytree(EXAMPLE, tmp_path / "cli")
    text = (folder / "movie.yaml").read_text(encoding="utf-8")
    changed = yaml.safe_load(text) | {"model": str(bases / "masked_lm"), "adapter": {"kind": "lora"}}
    changed["training"] |= {"max_steps": 2, "use_cpu": True, "disable_tqdm": True}
    (folder / "movie.yaml").write_text(yaml.safe_dump(changed), encoding="utf-8")
    assert run(["train", str(folder / "movie.yaml")]) == 0
    assert "evaluation accuracy" in cells(capsys.readouterr().out)
    assert (folder / "runs" / "movie" / "adapter_model.safetensors").exists()


def test_the_documentation_shows_the_example() -> None:
    page = (EXAMPLE.parents[1] / "docs" / "cli.md").read_text(encoding="utf-8")
    assert (EXAMPLE / "movie.yaml").read_text(encoding="utf-8") in page


# ---- errors of train ----

SETTINGS_ERRORS: list[tuple[Callable[[Recipe], Any], str]] = [
    (lambda r: r.pop("model"), "'model' is missing"),
    (lambda r: r.update(modle="x"), "'modle' is not a section of run.yaml: did you mean 'model'?"),
    (
        lambda r: r.update(learning_rate=0.1),
        "'learning_rate' is not a section of run.yaml: it belongs under 'training:'",
    ),
    (lambda r: r.update(dpzero=3), "'dpzero' must hold keys of its own"),
    (lambda r: r.update(model="./nowhere"), "model: there is no folder"),
    (lambda r: r.update(model=3), "model must be a folder or a Hub name"),
    (lambda r: r.update(base_model="./folder"), "base_model must be a name on the Hub"),
    (lambda r: r.update(task="classification"), "did you mean 'sequence-classification'?"),
    (lambda r: r["data"].pop("text"), "data.text is missing"),
    (lambda r: r["data"].pop("label"), "data.label is missing for task sequence-classification"),
    (lambda r: r.update(task="causal-lm"), "data.label has no use in task causal-lm"),
    (lambda r: r.update(task="verbalizer-masked"), "data.label_words is missing"),
    (lambda r: r["data"].update(label_words={0: "a"}), "data.label_words has no use"),
    (lambda r: r["data"].update(txt="x"), "data.txt is not a known key: did you mean 'text'?"),
    (lambda r: r["data"].update(train="none.csv"), "data.train: there is no file"),
    (lambda r: r["data"].update(eval="./none"), "data.eval: there is no file"),
    (lambda r: r["data"].update(train="run.yaml"), "must end in one of .csv, .jsonl, .json, .parquet"),
    (lambda r: r["data"].update(text="{sentence"), "data.text is no template"),
    (lambda r: r["data"].update(text="{sentence.x}"), "column names in braces only"),
    (lambda r: r["data"].update(text="{sentence} It was {mask}"), "data.text and {mask}"),
    (lambda r: r["data"].update(max_length=0), "data.max_length must be at least 1"),
    (lambda r: r["data"].update(max_length="long"), "data.max_length must be an integer, got 'long'"),
    (lambda r: r["adapter"].update(kind="lore"), "did you mean 'lora'?"),
    (lambda r: r["adapter"].update(rank=2), "adapter.rank is not a known key"),
    (lambda r: r["adapter"].update(lora_alfa=2), "did you mean 'lora_alpha'?"),
    (lambda r: r["adapter"].update(r="two"), "adapter.r must be an integer, got 'two'"),
    (lambda r: r.update(adapter={"kind": "full", "r": 2}), "adapter.r is not a known key: this kind takes none"),
    (lambda r: r["dpzero"].update(target_epsilom=1), "did you mean 'target_epsilon'?"),
    (lambda r: r["dpzero"].update(target_epsilon=0), "dpzero: target_epsilon must be a finite number above 0"),
    (lambda r: r["dpzero"].update(target_epsilon="two"), "dpzero.target_epsilon must be a number, got 'two'"),
    (lambda r: r["dpzero"].pop("target_delta"), "dpzero: target_delta is missing"),
    (lambda r: r["dpzero"].update(difference="centre"), "dpzero: difference must be one of central, forward"),
    (lambda r: r["training"].pop("output_dir"), "training.output_dir is missing"),
    (lambda r: r["training"].update(output_dir="rows.csv"), "is a file; name a folder"),
    (lambda r: r["training"].update(learning_rat=1), "did you mean 'learning_rate'?"),
    (lambda r: r["training"].update(learning_rate="fast"), "training.learning_rate must be a number, got 'fast'"),
    (lambda r: r["training"].update(learning_rate=-1.0), "training: lr must be >= 0"),
    (lambda r: r["training"].update(max_steps=True), "training.max_steps must be an integer, got True"),
    (lambda r: r["training"].update(save_strategy="never"), "training.save_strategy must be one of no, steps"),
    (lambda r: r["training"].update(per_device_train_batch_size=0), "must be at least 1, got 0"),
    (lambda r: r["training"].update(auto_find_batch_size=True), "training: auto_find_batch_size=True cannot be used"),
]


@pytest.mark.parametrize(("change", "message"), SETTINGS_ERRORS, ids=[message for _, message in SETTINGS_ERRORS])
def test_a_wrong_setting_is_one_line_before_data_is_read(
    change: Callable[[Recipe], Any],
    message: str,
    recipe: Recipe,
    train: Callable[..., int],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("peft_dpzero.cli.data.load_dataset", lambda *_, **__: pytest.fail("data was read"))
    change(recipe)
    assert train(recipe) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert captured.err.startswith("peft-dpzero: ")
    assert captured.err.count("\n") == 1


DATA_ERRORS: list[tuple[Callable[[Recipe], Any], str]] = [
    (lambda r: r["data"].update(text="review"), "data.train has no column 'review': its columns are sentence, mark"),
    (lambda r: r["data"].update(label="label"), "data.train has no column 'label'"),
    (lambda r: r["data"].update(label="sentence", labels=["up", "down"]), "holds a value that is none of the classes"),
    (lambda r: r["data"].update(labels=["1", "1"]), "needs at least two different classes"),
    (lambda r: r["data"].update(max_length=65), "data.max_length can be at most 64"),
    (lambda r: r["data"].update(text="{sentence} a b c", max_length=2), "alone is longer than the 2 tokens"),
    (lambda r: r["data"].update(public=r["data"]["train"]), "data.public is data.train, which is private"),
    (lambda r: r["data"].update(train="no_such_dataset"), "the dataset 'no_such_dataset' cannot be loaded"),
    (lambda r: r["dpzero"].update(target_delta=0.5), "target_delta=0.5 is not below 1/N"),
    (lambda r: r["training"].update(per_device_train_batch_size=17), "larger than the data (16 examples)"),
    (lambda r: r["training"].update(max_steps=-1, num_train_epochs=0), "The run has no steps"),
    (lambda r: r["training"].update(eval_strategy="steps", eval_steps=1), "training: You have set"),
    (lambda r: r["adapter"].update(r=-1), "adapter: `r` should be a positive integer"),
    (lambda r: r["adapter"].update(target_modules=["nowhere"]), "adapter: No modules were targeted"),
    (lambda r: r.update(model="no_such_model"), "model 'no_such_model' cannot be loaded"),
]


@pytest.mark.parametrize(("change", "message"), DATA_ERRORS, ids=[message for _, message in DATA_ERRORS])
def test_a_setting_that_does_not_fit_data_or_model_is_one_line(
    change: Callable[[Recipe], Any],
    message: str,
    recipe: Recipe,
    train: Callable[..., int],
    capsys: pytest.CaptureFixture[str],
) -> None:
    change(recipe)
    assert train(recipe) == 2
    line = error_line(capsys)
    assert message in line
    assert not any(sentence in line for sentence in SENTENCES)


@pytest.mark.parametrize("marks", [[0.5, 1.5], [None, 1.0]])
def test_labels_that_are_no_classes_are_refused(marks: list[float]) -> None:
    table = Dataset.from_dict({"mark": marks})
    with pytest.raises(DPZeroError, match="must hold integers, true/false or text"):
        class_names(table, "mark", None)


def test_broken_files_are_one_line(
    recipe: Recipe, train: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "broken.jsonl").write_text('{"sentence": "secret"\n{', encoding="utf-8")
    recipe["data"]["train"] = "broken.jsonl"
    assert train(recipe) == 2
    line = error_line(capsys)
    assert "cannot be read as json" in line
    assert "secret" not in line


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("model: [", "is not valid YAML"),
        ("model: a\nmodel: b\n", "the key 'model' appears twice"),
        ("- a\n", "must hold sections"),
        ("", "must hold sections"),
    ],
)
def test_unreadable_yaml_is_one_line(
    text: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(text, encoding="utf-8")
    assert run(["train", str(path)]) == 2
    assert message in error_line(capsys)


def test_a_missing_yaml_file_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["train", str(tmp_path / "none.yaml")]) == 2
    assert "none.yaml cannot be read: No such file" in error_line(capsys)


def test_an_unexpected_failure_with_data_in_hand_quotes_none_of_it(
    recipe: Recipe,
    train: Callable[..., int],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail(self: Encoder, values: dict[str, str]) -> list[int]:
        raise ValueError(values["sentence"])

    monkeypatch.setattr(Encoder, "_ids", fail)
    assert train(recipe) == 1
    line = error_line(capsys)
    assert "ValueError while tokenising the data" in line
    assert not any(sentence in line for sentence in SENTENCES)


@pytest.mark.parametrize(
    ("command", "method", "doing"),
    [
        ("train", "train", "training"),
        ("train", "evaluate", "evaluating"),
        ("tune", "tune_on", "measuring"),
        ("audit", "train", "auditing"),
    ],
)
def test_a_failure_of_the_trainer_quotes_none_of_the_data(
    command: str,
    method: str,
    doing: str,
    recipe: Recipe,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail(self: DPZeroTrainer, *args: Any, **kwargs: Any) -> None:
        raise ValueError(SENTENCES[0])

    for name in ("train", "save_model"):
        monkeypatch.setattr(DPZeroTrainer, name, lambda *_, **__: None)
    monkeypatch.setattr(DPZeroTrainer, method, fail)
    recipe["data"]["eval"] = "rows.csv"
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(recipe), encoding="utf-8")
    assert run([command, str(path)]) == 1
    shown = "".join(capsys.readouterr())
    assert f"ValueError while {doing}" in shown
    assert SENTENCES[0] not in shown


def interruptible() -> None:
    """In a new process: those that a shell starts in the background ignore interrupts, and so would their children."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def interrupted(process: subprocess.Popen[str]) -> str:
    """What a process wrote that was interrupted: again, if the first time fell where Python drops exceptions."""
    for _ in range(3):
        os.kill(process.pid, signal.SIGINT)
        try:
            return process.communicate(timeout=30)[1]
        except subprocess.TimeoutExpired:
            continue
    raise AssertionError("three interrupts did not end the run")


def test_interrupting_a_real_run_prints_one_line(recipe: Recipe, tmp_path: Path) -> None:
    recipe["training"] |= {"max_steps": 100_000, "lr_scheduler_type": "constant"}
    recipe["dpzero"] = {"noise_multiplier": 5.0, "target_delta": 1e-3}
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(recipe), encoding="utf-8")
    command = [sys.executable, "-m", "peft_dpzero.cli.app", "train", str(path)]
    streams = {"stderr": subprocess.PIPE, "stdout": subprocess.DEVNULL}
    with subprocess.Popen(command, text=True, preexec_fn=interruptible, **streams) as process:
        try:
            journal = tmp_path / "out" / "dpzero_journal"
            while not (journal.exists() and journal.read_bytes().count(b"\n") > 2) and process.poll() is None:
                time.sleep(0.05)
            errors = interrupted(process)
        finally:
            process.kill()
    assert process.returncode == 130
    assert "Traceback" not in errors
    assert errors.splitlines()[-1].startswith("peft-dpzero: interrupted")


# ---- reading settings and rows ----


def test_yaml_numbers_and_words_mean_what_they_look_like(recipe: Recipe, tmp_path: Path) -> None:
    text = yaml.safe_dump(recipe).replace("learning_rate: 0.01", "learning_rate: 1e-5")
    path = tmp_path / "run.yaml"
    path.write_text(text.replace("save_strategy: 'no'", "save_strategy: no"), encoding="utf-8")
    settings = read_settings(path)
    assert settings.training.learning_rate == 1e-5
    assert settings.training.save_strategy == "no"


def test_paths_are_relative_to_the_yaml_file(recipe: Recipe, tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(recipe), encoding="utf-8")
    settings = read_settings(path)
    assert settings.training.output_dir == str(tmp_path / "out")
    assert settings.data.train == str(tmp_path / "rows.csv")


@pytest.mark.parametrize(
    ("values", "given", "names", "indices"),
    [
        (["up", "down", "up"], None, ["down", "up"], [1, 0, 1]),
        ([10, 9, 10], None, ["9", "10"], [1, 0, 1]),
        ([True, False, True], None, ["False", "True"], [1, 0, 1]),
        (["up", "down", "up"], ["up", "down"], ["up", "down"], [0, 1, 0]),
        ([1, 0, 1], [1, 0, 2], ["1", "0", "2"], [0, 1, 0]),
    ],
)
def test_classes_are_sorted_unless_named(
    values: list[Any], given: list[Any] | None, names: list[str], indices: list[int]
) -> None:
    table = Dataset.from_dict({"mark": values})
    assert class_names(table, "mark", given) == names
    assert with_class_indices(table, "mark", names)["labels"][:] == indices


@pytest.mark.parametrize("given", [["up", "down"], ["1", "0"]])
def test_class_labels_are_named_or_numbered(given: list[str]) -> None:
    features = Features({"mark": ClassLabel(names=["down", "up"])})
    table = Dataset.from_dict({"mark": [0, 1, 1]}, features=features)
    assert with_class_indices(table, "mark", given)["labels"][:] == [1, 0, 0]


def test_long_texts_are_shortened_and_the_template_is_kept() -> None:
    tokenizer = tiny_tokenizer()
    data = DataSettings(train="", text="{a} It was {mask} . {b}")
    encoder = Encoder(tokenizer, data, 8, mask_text=tokenizer.mask_token)
    ids = encoder({"a": "the film " * 50, "b": "[MASK] good", "labels": 1})["input_ids"]
    words = tokenizer.convert_ids_to_tokens(ids)
    assert len(words) <= 8
    assert [word for word in words if word in ("It", "was", "[MASK]", ".", "good")] == [
        "It",
        "was",
        "[MASK]",
        ".",
        "good",
    ]
    assert words[0] == "the"


@pytest.mark.parametrize(("text", "expected"), [("a film", "a film </s>"), (None, "</s>")])
def test_plain_text_is_its_own_target_and_ends(text: str | None, expected: str) -> None:
    tokenizer = tiny_tokenizer()
    row = Encoder(tokenizer, DataSettings(train="", text="a"), 8, causal_lm=True)({"a": text})
    assert tokenizer.convert_ids_to_tokens(row["input_ids"]) == expected.split()
    assert row["labels"] == row["input_ids"]
