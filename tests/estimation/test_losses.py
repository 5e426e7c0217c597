"""Each task's per-example losses against float64 references, one example at a time."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft_dpzero import (
    ClassificationTask,
    DPZeroError,
    FunctionTask,
    Seq2SeqTask,
    Task,
    TokenTask,
    Verbalizer,
    infer_task,
)
from peft_dpzero.estimation import differences, tasks
from peft_dpzero.estimation.batching import LogicalBatch
from peft_dpzero.estimation.differences import estimate_differences
from peft_dpzero.estimation.losses import Losses
from peft_dpzero.estimation.shapes import may_have_company
from peft_dpzero.estimation.shortcuts.label_logits import FullLogits
from peft_dpzero.mechanism.private_sum import PrivateSum
from peft_dpzero.perturbation.perturbation import Perturbation
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from tiny import explicit, tiny_model, token_rows

WORDS = ["[PAD]", "[UNK]", "[MASK]", "good", "bad", "very", "a", "film", "it", "was", "dull"]


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    inner = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="[PAD]", unk_token="[UNK]", mask_token="[MASK]")


def outputs(*shape: int, dtype: torch.dtype = torch.float32) -> Any:
    return SimpleNamespace(logits=torch.randn(*shape).to(dtype))


def log_p(logits: Tensor) -> Tensor:
    return logits.double().log_softmax(-1)


class LeftOver(FullLogits):
    """Logits as of kernels that take four rows at a time and treat what is left over in another way."""

    def at(self, rows: Tensor, positions: Tensor, words: Tensor | None = None) -> Tensor:
        made = super().at(rows, positions, words).clone()
        made[len(made) // 4 * 4 :] += torch.linspace(0, 1, made.shape[1])
        return made


@pytest.mark.parametrize("pieces", [7, 27, 83])
def test_no_label_is_left_over_by_how_many_other_rows_have(pieces: int, monkeypatch: pytest.MonkeyPatch) -> None:
    vocabulary = 9
    monkeypatch.setattr(tasks, "CHUNK_ENTRIES", pieces * vocabulary)
    torch.manual_seed(0)
    logits = LeftOver(torch.randn(3, 40, vocabulary))
    labels = torch.randint(0, vocabulary, (3, 40))
    found = []
    for own in (1, 2, 3, 20, 39):
        of_others = labels.clone()
        of_others[0, own:] = of_others[2, own:] = -100
        found.append(float(TokenTask().losses_from(logits, {"labels": of_others})[1]))
    assert len(set(found)) == 1


def test_a_loss_of_each_token_does_not_tell_how_many_there_are() -> None:
    with pytest.raises(DPZeroError, match="one for each token") as caught:
        FunctionTask(lambda outputs, labels: torch.zeros(37)).losses(outputs(1, 2), {"labels": torch.zeros(1)})
    assert "37" not in str(caught.value)


def test_a_rows_mean_loss_does_not_depend_on_its_place(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    values = torch.randn(8, 1, dtype=torch.float64)

    def level(columns: int) -> Tensor:
        monkeypatch.setattr(differences, "losses_at", lambda *args: [values.expand(8, columns).contiguous()])
        batch = LogicalBatch([{}], [columns], torch.arange(columns), columns)
        losses: Any = SimpleNamespace(prepare=lambda batches: None)
        settings: Any = {"num_directions": 4, "smoothing_parameter": 1e-3, "difference": "central"}
        return estimate_differences(losses, batch, None, step=0, **settings)._losses  # type: ignore[arg-type]

    assert len({float(one) for columns in (1, 17, 33) for one in level(columns)}) == 1


def test_single_label_multi_label_and_regression() -> None:
    out = outputs(4, 3)
    labels = torch.tensor([0, 2, 1, 2])
    wanted = [-log_p(out.logits[i])[labels[i]] for i in range(4)]
    assert ClassificationTask().losses(out, {"labels": labels}).tolist() == pytest.approx([float(w) for w in wanted])

    many = torch.tensor([[1.0, 0.0, 1.0]] * 4)
    p = out.logits.double().sigmoid()
    wanted_many = -(many * p.log() + (1 - many) * (1 - p).log()).mean(1)
    torch.testing.assert_close(ClassificationTask().losses(out, {"labels": many}).double(), wanted_many.double())

    one = outputs(4, 1)
    targets = torch.tensor([0.5, -1.0, 2.0, 0.0])
    wanted_one = (one.logits[:, 0].double() - targets).square()
    torch.testing.assert_close(ClassificationTask().losses(one, {"labels": targets}).double(), wanted_one)

    pair = outputs(4, 2)
    goals = torch.randn(4, 2)
    wanted_pair = [float((pair.logits[i].double() - goals[i].double()).square().mean()) for i in range(4)]
    assert ClassificationTask("regression").losses(pair, {"labels": goals}).tolist() == pytest.approx(wanted_pair)


@pytest.mark.parametrize("shift", [0, 1])
@pytest.mark.parametrize("virtual", [0, 3])
def test_token_losses_average_an_examples_own_labels(shift: int, virtual: int) -> None:
    out = outputs(3, virtual + 6, 11)
    labels = torch.randint(0, 11, (3, 6))
    labels[0, :4] = -100
    labels[2] = -100
    got = TokenTask(shift).losses(out, {"labels": labels})
    for i in range(3):
        terms = [
            -float(log_p(out.logits[i, virtual + t - shift])[labels[i, t]])
            for t in range(shift, 6)
            if labels[i, t] != -100
        ]
        assert float(got[i]) == pytest.approx(sum(terms) / max(len(terms), 1), abs=1e-5)


def single_words(tokenizer: Any) -> Task:
    return Verbalizer(tokenizer, ["good", "bad"], causal=True)


HALF: dict[str, tuple[Callable[[Any], Task], tuple[int, ...], dict[str, Tensor]]] = {
    "single label": (lambda _: ClassificationTask(), (2, 3), {"labels": torch.tensor([0, 2])}),
    "multi label": (lambda _: ClassificationTask(), (2, 3), {"labels": torch.tensor([[1.0, 0, 1], [0, 0, 1]])}),
    "regression": (lambda _: ClassificationTask(), (2, 1), {"labels": torch.tensor([0.5, -1])}),
    "masked LM": (lambda _: TokenTask(), (2, 5, 11), {"labels": torch.tensor([[1, 2, 3, 4, 5]] * 2)}),
    "causal LM": (lambda _: TokenTask(1), (2, 5, 11), {"labels": torch.tensor([[1, 2, 3, 4, 5]] * 2)}),
    "verbalizer": (
        single_words,
        (2, 5, 11),
        {"labels": torch.tensor([0, 1]), "input_ids": torch.tensor([[5, 6, 7, 8, 9]] * 2)},
    ),
    "function": (
        lambda _: FunctionTask(lambda o, y: o.logits.logsumexp(-1) - o.logits[range(len(y)), y]),
        (2, 3),
        {"labels": torch.tensor([0, 2])},
    ),
}


@pytest.mark.parametrize("name", HALF)
def test_half_precision_logits_give_float32_losses(name: str, tokenizer: Any) -> None:
    make, shape, batch = HALF[name]
    task = make(tokenizer)
    half = outputs(*shape, dtype=torch.bfloat16)
    losses = task.losses(half, batch)
    assert losses.dtype == torch.float32
    if name != "function":
        exact = task.losses(SimpleNamespace(logits=half.logits.double()), batch)
        assert exact.dtype == torch.float64
        torch.testing.assert_close(losses.double(), exact, rtol=1e-5, atol=1e-6)


def masked(tokenizer: Any, texts: list[str], side: str = "right") -> Any:
    return tokenizer(texts, padding=True, padding_side=side, return_tensors="pt")


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("words", [["good", "bad"], ["very good", "dull"]])
def test_masked_verbalizer_scores_the_words_at_the_mask(words: list[str], side: str, tokenizer: Any) -> None:
    task = Verbalizer(tokenizer, words, causal=False)
    masks = " ".join(["[MASK]"] * max(len(word.split()) for word in words))
    batch = masked(tokenizer, [f"a film it was {masks}", f"film {masks}"], side)
    batch["labels"] = torch.tensor([1, 0])
    out = outputs(*batch["input_ids"].shape, len(WORDS))
    for i, label in enumerate([1, 0]):
        first = batch["input_ids"][i].tolist().index(2)
        scores = []
        for word in words:
            ids = [WORDS.index(w) for w in word.split()]
            scores.append(sum(float(log_p(out.logits[i, first + j])[t]) for j, t in enumerate(ids)) / len(ids))
        wanted = -float(torch.tensor(scores, dtype=torch.float64).log_softmax(0)[label])
        assert float(task.losses(out, batch)[i]) == pytest.approx(wanted, abs=1e-5)


def test_a_prompt_that_lost_its_mask_has_no_loss(tokenizer: Any) -> None:
    batch = masked(tokenizer, ["a film it was [MASK]", "a film"])
    batch["labels"] = torch.tensor([0, 0])
    losses = Verbalizer(tokenizer, ["good", "bad"], causal=False).losses(outputs(2, 5, len(WORDS)), batch)
    assert torch.isfinite(losses).tolist() == [True, False]


def test_an_example_without_loss_contributes_zero(tokenizer: Any) -> None:
    model = tiny_model("masked_lm")
    losses = Losses(model, Verbalizer(tokenizer, ["good", "bad"], causal=False), lambda batch: batch)
    perturbation = Perturbation(model)
    config = explicit(noise_multiplier=0.0, target_delta=1e-5, num_directions=2)

    def values(texts: list[str]) -> tuple[float, ...]:
        batch = masked(tokenizer, texts)
        batch["labels"] = torch.zeros(len(texts), dtype=torch.long)
        differences = estimate_differences(
            losses,
            LogicalBatch([batch], [len(texts)], torch.arange(len(texts)), len(texts)),
            perturbation,
            step=0,
            num_directions=2,
            smoothing_parameter=1e-2,
            difference="central",
        )
        return PrivateSum(config, 1).release(0, differences).values

    assert values(["a film"]) == (0, 0)
    alone = values(["it was [MASK]"])
    assert alone != (0, 0)
    # A second row may change how float32 rounds the first one.
    assert values(["it was [MASK]", "a bad film"]) == pytest.approx(alone, abs=10)


@pytest.mark.parametrize("dimensions", [0, 2])
def test_a_loss_that_is_not_one_number_an_example_is_refused(dimensions: int) -> None:
    model = tiny_model("classifier")
    ids = torch.tensor(token_rows(3))
    shaped = FunctionTask(lambda o, y: o.logits.mean() if dimensions == 0 else o.logits)
    with pytest.raises(DPZeroError, match="neither averaged over the batch"):
        Losses(model, shaped, lambda batch: batch)({"input_ids": ids, "labels": torch.zeros(3)})


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("words", [["good", "bad"], ["very good", "dull"]])
def test_causal_verbalizer_reads_what_follows_the_prompt(words: list[str], side: str, tokenizer: Any) -> None:
    model = tiny_model("causal_lm")
    task = Verbalizer(tokenizer, words, causal=True)
    texts = ["a film it was", "it was"]
    batch = tokenizer(texts, padding=True, padding_side=side, return_tensors="pt")
    batch.pop("token_type_ids", None)
    batch["labels"] = torch.tensor([1, 0])
    with torch.no_grad():
        inputs = task.inputs(batch)
        if side == "left" and "position_ids" not in inputs:
            inputs["position_ids"] = (inputs["attention_mask"].cumsum(1) - 1).clamp(min=0)
        got = task.losses(model(**inputs), batch)
        for i, (text, label) in enumerate(zip(texts, [1, 0], strict=True)):
            prompt = [WORDS.index(w) for w in text.split()]
            scores = []
            for word in words:
                ids = [WORDS.index(w) for w in word.split()]
                p = log_p(model(input_ids=torch.tensor([prompt + ids])).logits[0])
                scores.append(sum(float(p[len(prompt) - 1 + j, t]) for j, t in enumerate(ids)) / len(ids))
            wanted = -float(torch.tensor(scores, dtype=torch.float64).log_softmax(0)[label])
            assert float(got[i]) == pytest.approx(wanted, abs=1e-4)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["good"], "two classes"),
        (["good", ""], "no tokens"),
        (["good", "good"], "same tokens"),
        (["good", "awful"], "vocabulary"),
    ],
)
def test_label_words_must_differ(words: list[str], message: str, tokenizer: Any) -> None:
    with pytest.raises(DPZeroError, match=message):
        Verbalizer(tokenizer, words, causal=False)


def test_a_users_function_needs_no_gradient() -> None:
    out = outputs(4, 3)
    labels = out.logits.argmax(1)
    labels[0] = (labels[0] + 1) % 3
    task = FunctionTask(lambda o, y: (o.logits.argmax(1) != y).float())
    assert task.losses(out, {"labels": labels}).tolist() == [1.0, 0.0, 0.0, 0.0]


def test_tasks_follow_the_models_class() -> None:
    kinds = {
        "classifier": ClassificationTask,
        "causal_lm": TokenTask,
        "masked_lm": TokenTask,
        "tagger": TokenTask,
        "seq2seq": Seq2SeqTask,
    }
    for kind, task in kinds.items():
        assert type(infer_task(tiny_model(kind))) is task
    assert infer_task(tiny_model("causal_lm")).shift == 1
    assert infer_task(tiny_model("masked_lm")).shift == 0
    tuned = get_peft_model(tiny_model("causal_lm"), LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj"]))
    assert infer_task(tuned).shift == 1
    with pytest.raises(DPZeroError, match="Linear"):
        infer_task(torch.nn.Linear(2, 2))


def test_a_models_problem_type_decides_how_labels_are_read() -> None:
    model = tiny_model("classifier")
    model.config.problem_type = "multi_label_classification"
    out, labels = outputs(2, 2), torch.tensor([[1, 0], [1, 1]])
    p = out.logits.double().sigmoid()
    wanted = -(labels * p.log() + (1 - labels) * (1 - p).log()).mean(1)
    torch.testing.assert_close(infer_task(model).losses(out, {"labels": labels}).double(), wanted)


def test_seq2seq_losses_are_teacher_forced() -> None:
    model = tiny_model("seq2seq")
    ids = torch.tensor(token_rows(2))
    labels = torch.tensor(token_rows(2, 4, seed=3))
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
    task = Seq2SeqTask()
    with torch.no_grad():
        got = task.losses(model(**task.inputs(batch)), batch)
        for i in range(2):
            shifted = torch.cat([torch.zeros(1, dtype=torch.long), labels[i, :-1]])
            p = log_p(model(input_ids=ids[i : i + 1], decoder_input_ids=shifted[None]).logits[0])
            assert float(got[i]) == pytest.approx(-float(p[range(4), labels[i]].mean()), abs=1e-4)


def test_padding_on_the_left_adds_no_label() -> None:
    model = tiny_model("causal_lm")
    ids = torch.tensor(token_rows(1, 6))
    alone = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
    wide = {
        "input_ids": torch.nn.functional.pad(ids, (4, 0), value=0),
        "attention_mask": torch.nn.functional.pad(torch.ones_like(ids), (4, 0)),
        "labels": torch.nn.functional.pad(ids, (4, 0), value=-100),
    }
    losses = Losses(model, TokenTask(shift=1), dict)
    torch.testing.assert_close(losses(wide), losses(alone), rtol=1e-5, atol=0)


class Reads(FullLogits):
    """Logits that note how many positions are read at a time."""

    def __init__(self, logits: Tensor) -> None:
        super().__init__(logits)
        self.sizes: list[int] = []

    def at(self, rows: Tensor, positions: Tensor, words: Tensor | None = None) -> Tensor:
        self.sizes.append(len(rows))
        return super().at(rows, positions, words)


@pytest.mark.parametrize("count", [1, 2, 5])
def test_how_many_labels_are_read_at_a_time_is_no_matter_of_their_number(count: int) -> None:
    """Only a row that never meets another, since it does not end in padding, is read as it is."""
    logits = torch.randn(count, 8, 11)
    mask = torch.ones(count, 8, dtype=torch.long)
    mask[:, -1] = 0
    sizes = set()
    for labelled in range(1, 7):
        labels = torch.full((count, 8), -100)
        labels[:, 1 : 1 + labelled] = 3
        reads = Reads(logits)
        padded = {"labels": labels, "attention_mask": mask}
        TokenTask(1).losses_from(reads, padded)
        sizes |= set(reads.sizes)
        assert may_have_company(padded)
    assert len(sizes) == 1
    lone = Reads(logits[:1])
    TokenTask(1).losses_from(lone, {"labels": labels[:1], "attention_mask": torch.ones_like(mask[:1])})
    assert lone.sizes == [6]
