"""The models, as they are before a private row is read."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from peft_dpzero import Task as Loss
from peft_dpzero import TokenTask, Verbalizer, infer_task
from peft_dpzero.estimation.shortcuts.label_logits import OutputHead
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorForTokenClassification,
    DataCollatorWithPadding,
    set_seed,
)

from workloads import IGNORE, REVIEWS, ROOT, gemma_folder

from .cells import FULL, Size
from .results import atomically
from .tasks import TASKS, Data, Rows, Task, load

# The demo's own modules, found through `tasks`.
from public_start import LONGEST, TEMPLATES, learn_softly, likeness, of_two_classes  # isort: skip
from sentiment import BASE  # isort: skip

# How far apart the classes of an ordinal scale are, in its own steps: the deviation of a soft label.
BLUR = 0.7
READ_TOGETHER = 64
# Logits of a vocabulary are made for so many tokens at a time.
WRITTEN_TOGETHER = 16
Row = dict[str, Any]
Batch = dict[str, Tensor]


@dataclass
class Start:
    """A model and a task's rows, the same for all methods.

    Attributes:
        model: with a LoRA adapter, in eval mode: no method uses dropout.
        tokenizer: the model's.
        loss: how rows' losses and predictions are read.
        train: private rows: `input_ids`, `attention_mask`, `labels`: a class, or a list of tokens and −100.
        held_out: what accuracy is measured on.
        public: rows with their own labels.
        public_text: strings, as the demo takes them, or rows where text is written.
        size: of the study.
        words: label words' tokens of a prompted causal LM, or ().
    """

    model: Any
    tokenizer: Any
    loss: Loss
    train: list[Row]
    held_out: list[Row]
    public: list[Row]
    public_text: list[str] | list[Row]
    size: Size = FULL
    words: tuple[int, ...] = ()

    @property
    def parameters(self) -> dict[str, nn.Parameter]:
        """What is trained."""
        return {name: p for name, p in self.model.named_parameters() if p.requires_grad}

    def weights(self) -> dict[str, Tensor]:
        """A copy of them."""
        return {name: p.detach().clone() for name, p in self.parameters.items()}

    @torch.no_grad()
    def restore(self, weights: Mapping[str, Tensor]) -> None:
        """Puts the parameters to `weights`."""
        for name, parameter in self.parameters.items():
            parameter.copy_(weights[name])

    @property
    def collate(self) -> Callable[[list[Row]], Batch]:
        if isinstance(self.loss, TokenTask):
            return DataCollatorForTokenClassification(self.tokenizer)
        return DataCollatorWithPadding(self.tokenizer)

    def losses(self, batch: Batch, model: Any = None) -> Tensor:
        """One loss a row: (b,)."""
        outputs = (model or self.model)(**self.loss.inputs(batch))
        return self.loss.losses(outputs, batch)

    def batches(self, rows: Sequence[Row], most: int = READ_TOGETHER) -> list[Batch]:
        """Micro-batches of rows of like length, in no particular order."""
        ordered = sorted(rows, key=lambda row: len(row["input_ids"]))
        return [self.collate([dict(row) for row in ordered[i : i + most]]) for i in range(0, len(ordered), most)]

    def some_rows(self, number: int) -> list[Row]:
        """Private rows of evenly many lengths in no order, at most `number`: what the steps of other methods than ours
        are timed on, which is kind to them."""
        ordered = sorted(self.train, key=lambda row: len(row["input_ids"]))
        number = min(number, len(ordered))
        some = [ordered[(2 * i + 1) * len(ordered) // (2 * number)] for i in range(number)]
        return random.Random(0).sample(some, number)

    def dataset(self, rows: Sequence[Row]) -> Dataset:
        return Dataset.from_list(list(rows))

    @torch.no_grad()
    def accuracy(self) -> float:
        """On the held-out rows: of their classes, or of the tokens to write, each after the true ones before it."""
        self.model.eval()
        right = torch.cat([part for batch in self.batches(self.held_out) for part in self._right(batch)])
        return float(right.double().mean())

    def _right(self, batch: Batch) -> Iterator[Tensor]:
        """Whether the likeliest is what is labelled: (n,) in parts."""
        if not isinstance(self.loss, TokenTask):
            yield self.predictions(batch).argmax(dim=1) == batch["labels"]
            return
        logits = self._head.logits(self.model, self.loss.inputs(batch))
        row, position = self.loss.positions(batch, logits.length)
        targets = batch["labels"][row, position + self.loss.shift]
        parts = (tensor.split(WRITTEN_TOGETHER) for tensor in (row, position, targets))
        for some, at, wanted in zip(*parts, strict=True):
            yield logits.at(some, at).argmax(dim=1) == wanted

    def predictions(self, batch: Batch) -> Tensor:
        """Scores of the classes: (b, c). Of a language model no logits are made but the label words'."""
        inputs = self.loss.inputs(batch)
        if not isinstance(self.loss, Verbalizer):
            return self.loss.predictions(self.model(**inputs), batch)
        return self.loss.scores_from(self._head.logits(self.model, inputs), batch)

    @property
    def _head(self) -> OutputHead:
        head = OutputHead.of(self.model)
        assert head is not None
        return head


def minilm(task: Task, data: Data, seed: int, size: Size, weights: Path) -> Start:
    """A stock BERT classifier of 22M parameters, LoRA in its last layer, that has learned public text from label words.

    It writes no text.
    """
    set_seed(seed)
    tokenizer, base = _stock(task)
    start = _started(_last_layer(base), tokenizer, infer_task(base), data, size, "{}")
    _learn_once(weights, start, base, start.public_text)
    return start


def minilm_words(task: Task, data: Data, seed: int, size: Size, weights: Path) -> Start:
    """The same where no public text is at hand: its head has learned the label words, and its LoRA is new."""
    set_seed(seed)
    tokenizer, base = _stock(task)
    head = _started(base.requires_grad_(False), tokenizer, infer_task(base), data, size, "{}")
    base.classifier.requires_grad_(True)
    sentences = [template.format(word) for words in label_words() for word in words for template in TEMPLATES]
    _learn_once(weights, head, base, sentences)
    return replace(head, model=_last_layer(base).eval())


def _last_layer(base: Any) -> Any:
    """`base` with LoRA in its last layer."""
    lora = LoraConfig(task_type="SEQ_CLS", target_modules=["query", "value", "dense"], layers_to_transform=[5])
    return get_peft_model(base, lora)


def _stock(task: Task) -> tuple[Any, Any]:
    """The tokenizer and the classifier."""
    base = AutoModelForSequenceClassification.from_pretrained(BASE, num_labels=task.classes)
    return AutoTokenizer.from_pretrained(BASE), base


def label_words() -> tuple[list[str], list[str]]:
    """Negative ones and positive ones."""
    words = json.loads((ROOT / "integrations" / "trainer" / "words.json").read_text())
    return words["negative"], words["positive"]


def _learn_once(weights: Path, start: Start, base: Any, texts: Sequence[str]) -> None:
    """Teaches what is trained of `start` the texts' likeness to label words, unless `weights` has it from before."""
    if not weights.exists():
        along = likeness(base.bert, start.tokenizer, label_words(), texts)
        classes = base.config.num_labels
        labels = of_two_classes(along) if classes == 2 else of_ordered_classes(along, classes)
        learn_softly(start.model, start.tokenizer, texts, labels, start.size.start_steps)
        atomically(weights, lambda path: save_file(start.weights(), path))
    start.restore(load_file(weights))


def of_ordered_classes(likeness: Tensor, classes: int) -> Tensor:
    """Soft labels of a scale of which a like share of texts has each class: (n, classes)."""
    ranks = likeness.argsort().argsort().double() + 0.5
    places = ranks / len(likeness) * classes - 0.5  # [n], from −½ to classes − ½
    apart = (places[:, None] - torch.arange(classes)) / BLUR
    return torch.softmax(-apart.square() / 2, dim=1).float()


def gemma(task: Task, data: Data, seed: int, size: Size, weights: Path) -> Start:
    """Gemma 3 of 270M parameters, prompted "… It was" for label words or left to write on, LoRA in its upper third. It
    learns nothing before: the prompt is its start."""
    set_seed(seed)
    folder = gemma_folder()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    layers = base.config.num_hidden_layers
    upper = list(range(layers - layers // 3, layers))
    model = get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", r=8, layers_to_transform=upper))
    if not task.classes:
        start = _started(model, tokenizer, infer_task(base), data, size, "{}")
        start.public_text = start.public
        return start
    words = WORDS[task.classes]
    loss = Verbalizer(tokenizer, words, causal=True)
    start = _started(model, tokenizer, loss, data, size, "{} It was")
    start.words = tuple(tokenizer(word, add_special_tokens=False)["input_ids"][0] for word in words)
    return start


WORDS = {2: (" terrible", " great"), 5: (" terrible", " bad", " okay", " good", " great")}


def _started(model: Any, tokenizer: Any, loss: Loss, data: Data, size: Size, prompt: str) -> Start:
    def encoded(rows: Rows) -> list[Row]:
        made = tokenizer([prompt.format(text) for text, _ in rows], truncation=True, max_length=LONGEST)
        return [
            {"input_ids": ids, "attention_mask": mask, "labels": second_half(ids) if label is None else label}
            for ids, mask, (_, label) in zip(made["input_ids"], made["attention_mask"], rows, strict=True)
        ]

    parts = (encoded(part) for part in (data.train, data.held_out, data.public))
    texts = [prompt.format(text) for text in data.public_text]
    return Start(model.eval(), tokenizer, loss, *parts, texts, size)


def second_half(ids: Sequence[int]) -> list[int]:
    """Labels of a text whose first half is given."""
    given = len(ids) // 2
    return [IGNORE] * given + list(ids[given:])


MODELS: dict[str, Callable[[Task, Data, int, Size, Path], Start]] = {
    "minilm": minilm,
    "minilm-words": minilm_words,
    "gemma": gemma,
}
WRITERS = {"gemma"}


def suits(model: str, task: str) -> bool:
    """Whether the model can do the task."""
    return model in WRITERS or TASKS[task].classes > 0


def started(model: str, task: str, seed: int, size: Size, folder: Path) -> Start:
    """The start of a run. What was learned from public text is kept in `folder`."""
    chosen = TASKS[task]
    weights = folder / "starts" / f"{model}_{task}_seed{seed}.safetensors"
    return MODELS[model](chosen, load(chosen, REVIEWS, size), seed, size, weights)
