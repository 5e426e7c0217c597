"""`peft-dpzero train`: a checked run, from its settings to the saved model and a table of results."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from accelerate import PartialState
from peft import get_peft_model
from rich.console import Console
from rich.table import Table
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorForTokenClassification,
    DataCollatorWithPadding,
    EvalPrediction,
    set_seed,
)

from peft_dpzero.cli.data import Encoder, class_names, encode, load_table, token_limit, with_class_indices
from peft_dpzero.cli.explain import explained
from peft_dpzero.cli.settings import RunSettings, read_settings
from peft_dpzero.errors import DPZeroError, withheld
from peft_dpzero.estimation.verbalizer import Verbalizer
from peft_dpzero.release.journal import JOURNAL_NAME
from peft_dpzero.release.numbers import rounded_up
from peft_dpzero.training.trainer import DPZeroTrainer

_MODELS = {
    "sequence-classification": AutoModelForSequenceClassification,
    "causal-lm": AutoModelForCausalLM,
    "verbalizer-masked": AutoModelForMaskedLM,
    "verbalizer-causal": AutoModelForCausalLM,
}


class TrainingRun:
    """One run. What needs no data is checked when it is made.

    Args:
        settings: from `read_settings`.
        resume: go on from the last checkpoint in the output folder.
        tuning: nothing is trained, so that the output folder may hold a run.

    Raises:
        DPZeroError: the model, its tokenizer, a label word or the output folder does not serve.
    """

    def __init__(self, settings: RunSettings, resume: bool = False, tuning: bool = False) -> None:
        self.settings = settings
        self.resume = resume or bool(settings.training.resume_from_checkpoint)
        if not tuning:
            self._check_output_folder()
        with explained(f"model {settings.model!r} cannot be loaded"):
            AutoConfig.from_pretrained(settings.model)
            self.tokenizer = AutoTokenizer.from_pretrained(settings.model)
        if self.tokenizer.pad_token is None:
            if self.tokenizer.eos_token is None:
                raise DPZeroError("The model's tokenizer has neither a padding nor an end-of-text token: set one.")
            self.tokenizer.pad_token = self.tokenizer.eos_token
        self.verbalizer = self._verbalizer()

    def train(self) -> Table:
        """Trains, saves and evaluates. Returns the table of results."""
        settings = self.settings
        trainer = self.trainer()
        if settings.base_model is not None:
            trainer.describe_release(base_model=settings.base_model)
        with withheld("training"):
            trainer.train(resume_from_checkpoint=settings.training.resume_from_checkpoint or self.resume or None)
        with explained(f"the result cannot be saved in {settings.training.output_dir}"):
            trainer.save_model()
        metrics = {}
        if trainer.eval_dataset is not None:
            with withheld("evaluating"):
                metrics = trainer.evaluate()
        return results(trainer.privacy_record(), metrics)

    def trainer(self, prepare: Callable[[Any], Any] | None = None) -> DPZeroTrainer:
        """The run's trainer.

        Args:
            prepare: makes the training data out of the tokenized rows; None leaves them as they are.
        """
        settings = self.settings
        names, tables = self._tables()
        # The adapter's start is public, and resuming needs the same one.
        set_seed(settings.training.seed)
        model = self._model(names)
        encoder = self._encoder(model)
        datasets = {part: encode(table, encoder) for part, table in tables.items()}
        with explained("training"):
            return DPZeroTrainer(
                model=model,
                args=settings.training,
                train_dataset=prepare(datasets["train"]) if prepare else datasets["train"],
                eval_dataset=datasets.get("eval"),
                data_collator=self._collator(),
                compute_metrics=accuracy if settings.classifies else None,
                dpzero_config=settings.dpzero,
                per_example_loss=self.verbalizer,
                public_text=datasets.get("public"),
            )

    def _check_output_folder(self) -> None:
        folder = Path(self.settings.training.output_dir)
        if folder.exists() and not folder.is_dir():
            raise DPZeroError(f"training.output_dir: {folder} is a file; name a folder.")
        if self.resume:
            if not (self.settings.training.resume_from_checkpoint or (folder / JOURNAL_NAME).exists()):
                raise DPZeroError(f"There is no journal in {folder} to resume from: train without --resume.")
        elif (folder / JOURNAL_NAME).exists():
            raise DPZeroError(
                f"{folder} holds the releases of an earlier run: add --resume to go on with it, or set another "
                "training.output_dir."
            )

    def _verbalizer(self) -> Verbalizer | None:
        words = self.settings.data.label_words
        if words is None:
            return None
        causal = self.settings.task == "verbalizer-causal"
        with explained("data.label_words"):
            return Verbalizer(self.tokenizer, [str(word) for word in words.values()], causal=causal)

    def _tables(self) -> tuple[list[str], dict[str, Any]]:
        data = self.settings.data
        tables = {part: load_table(data, part) for part in ("train", "eval", "public") if getattr(data, part)}
        if data.label is None:
            return [], tables
        given = data.labels if data.label_words is None else list(data.label_words)
        names = class_names(tables["train"], data.label, given)
        labelled = {part: table for part, table in tables.items() if part != "public"}
        return names, tables | {part: with_class_indices(t, data.label, names) for part, t in labelled.items()}

    def _model(self, names: list[str]) -> Any:
        settings = self.settings
        options: dict[str, Any] = {}
        if settings.task == "sequence-classification":
            indices = {name: index for index, name in enumerate(names)}
            options = {"id2label": {index: name for name, index in indices.items()}, "label2id": indices}
        with explained(f"model {settings.model!r} cannot be loaded for task {settings.task}"):
            model = _MODELS[settings.task].from_pretrained(settings.model, **options)
        model.config.pad_token_id = self.tokenizer.pad_token_id
        if settings.adapter is None:
            return model
        with explained("adapter"):
            return get_peft_model(model, settings.adapter)

    def _encoder(self, model: Any) -> Encoder:
        settings, verbalizer = self.settings, self.verbalizer
        virtual = getattr(settings.adapter, "num_virtual_tokens", None) or 0
        appended = verbalizer.longest if verbalizer is not None and verbalizer.appended else 0
        limit = token_limit(settings.data.max_length, self.tokenizer, model.config, virtual + appended)
        masks = verbalizer.longest if verbalizer is not None and not verbalizer.causal else 0
        mask_text = masks * self.tokenizer.mask_token if masks else ""
        return Encoder(self.tokenizer, settings.data, limit, mask_text, causal_lm=settings.task == "causal-lm")

    def _collator(self) -> Any:
        if self.settings.task == "causal-lm":
            return DataCollatorForTokenClassification(self.tokenizer)
        return DataCollatorWithPadding(self.tokenizer)


def accuracy(prediction: EvalPrediction) -> dict[str, float]:
    """The share of examples whose highest score is their label's."""
    return {"accuracy": float(np.mean(np.argmax(prediction.predictions, axis=-1) == prediction.label_ids))}


def results(record: dict[str, Any], metrics: dict[str, float]) -> Table:
    """What came out, as a table."""
    epsilon = "none: this run gives no privacy" if record["epsilon"] is None else f"{rounded_up(record['epsilon']):g}"
    rows = {
        "noise multiplier σ": f"{record['noise_multiplier']:.4g}",
        "ε spent": epsilon,
        "δ": f"{record['delta']:g}",
        "steps": str(record["steps"]),
    }
    if "eval_loss" in metrics:
        rows["evaluation loss"] = f"{metrics['eval_loss']:.4f}"
        if "eval_accuracy" in metrics:
            rows["evaluation accuracy"] = f"{metrics['eval_accuracy']:.2%}"
        else:
            rows["evaluation perplexity"] = f"{math.exp(min(metrics['eval_loss'], 700.0)):.2f}"
    table = Table(show_header=False)
    for name, value in rows.items():
        table.add_row(name, value)
    return table


def train_command(
    config: Annotated[Path, typer.Argument(help="The run in YAML: model, task, data, adapter, dpzero, training.")],
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the run in output_dir.")] = False,
) -> None:
    """Tunes a model privately as a YAML file says, saves it, and shows what it cost."""
    settings = read_settings(config)
    results = TrainingRun(settings, resume).train()
    if PartialState().is_main_process:
        console = Console()
        console.print(results)
        console.print(f"Saved in {settings.training.output_dir}", soft_wrap=True, highlight=False)
