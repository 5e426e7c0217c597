"""The start-up probe: each way in which batch-mates can reach an example's loss is refused by name."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft_dpzero import DPZeroConfig, DPZeroError, DPZeroTrainer, Perturbation, Task, TokenTask, Verbalizer, infer_task
from peft_dpzero.estimation.losses import FunctionTask
from peft_dpzero.probe import Probe
from peft_dpzero.probe_causes import check_batch_norm
from tokenizers import Tokenizer, models
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast

from tiny import arguments, tiny_dataset, tiny_model

CPU = torch.device("cpu")
PLACE = "bert.encoder.layer.0.output.dropout"


def with_module(module: nn.Module) -> Any:
    """A tiny classifier, in eval mode, through whose first layer `module` was put."""
    model = tiny_model("classifier")
    model.bert.encoder.layer[0].output.dropout = module
    return model.eval()


def check(model: Any, task: Task | None = None, side: str = "right") -> None:
    Probe(model, CPU, side, task or infer_task(model)).check_independence(Perturbation(model))


class TokenBatchNorm(nn.BatchNorm1d):
    """Batch norm over tokens, by the batch's own statistics."""

    def __init__(self) -> None:
        super().__init__(16, track_running_stats=False)

    def forward(self, hidden: Tensor) -> Tensor:
        return super().forward(hidden.flatten(0, -2)).view_as(hidden)


class SwitchLayer(nn.Module):
    """Two experts, each of which serves the first tokens of a batch up to a capacity."""

    def __init__(self, capacity: int) -> None:
        super().__init__()
        self.router = nn.Linear(16, 2)
        self.experts = nn.ModuleList([nn.Linear(16, 16), nn.Linear(16, 16)])
        self.capacity = capacity

    def forward(self, hidden: Tensor) -> Tensor:
        tokens = hidden.flatten(0, -2)
        chosen = self.router(tokens).argmax(-1)
        served = torch.zeros_like(tokens)
        for index, expert in enumerate(self.experts):
            own = (chosen == index).nonzero().flatten()[: self.capacity]
            served[own] = expert(tokens[own])
        return served.view_as(hidden)


class PackedAttention(nn.Module):
    def forward(self, hidden: Tensor) -> Tensor:
        return hidden + hidden[:, :1].mean(0, keepdim=True)


class RunningPositions(nn.Embedding):
    def __init__(self) -> None:
        super().__init__(500, 16)

    def forward(self, hidden: Tensor) -> Tensor:
        rows, columns = hidden.shape[:2]
        return hidden + super().forward(torch.arange(rows * columns).view(rows, columns))


class Blind(nn.Module):
    """Averages over all positions, padded ones too."""

    def forward(self, hidden: Tensor) -> Tensor:
        return hidden + hidden.mean(1, keepdim=True)


class Stretched(nn.Module):
    def forward(self, hidden: Tensor) -> Tensor:
        return hidden * hidden.shape[1]


class Ranked(nn.Module):
    def forward(self, hidden: Tensor) -> Tensor:
        return hidden * (1 + torch.arange(len(hidden)))[:, None, None]


class Centred(nn.Module):
    def forward(self, hidden: Tensor) -> Tensor:
        return hidden - hidden[:, :1].mean(0, keepdim=True)


class StubbornDropout(nn.Dropout):
    def train(self, mode: bool = True) -> StubbornDropout:
        return super().train(True)


@pytest.mark.parametrize(
    ("module", "cause"),
    [
        (TokenBatchNorm(), "batch norm that uses the batch's statistics"),
        (SwitchLayer(capacity=8), "a mixture of experts that drops tokens"),
        (SwitchLayer(capacity=60), "a mixture of experts that drops tokens"),
        (PackedAttention(), "packing: tokens attend to other examples"),
        (RunningPositions(), "packing: positions run on"),
        (Blind(), "ignores attention_mask"),
        (Stretched(), "pad length"),
        (Ranked(), "order"),
        (Centred(), "mixes the examples"),
        (StubbornDropout(0.5), "draws at random in eval mode"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else "",
)
def test_a_model_is_refused_by_the_cause_and_its_module(module: nn.Module, cause: str) -> None:
    with pytest.raises(DPZeroError, match="batch-mates") as refusal:
        check(with_module(module))
    assert cause in str(refusal.value)
    assert f"{PLACE} ({type(module).__name__})" in str(refusal.value)


def test_experts_that_drop_nothing_are_accepted() -> None:
    check(with_module(SwitchLayer(capacity=10_000)))


class StubbornNorm(nn.BatchNorm1d):
    """Stays in train mode."""

    def train(self, mode: bool = True) -> StubbornNorm:
        return super().train(True)


@pytest.mark.parametrize("norm", [StubbornNorm(4), nn.BatchNorm1d(4, track_running_stats=False)])
def test_batch_norm_is_refused_also_where_there_are_no_tokens(norm: nn.Module, tmp_path: Path) -> None:
    class Features(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = norm
            self.head = nn.Linear(4, 2)

        def forward(self, features: Tensor) -> Any:
            return self.head(self.norm(features))

    run = DPZeroTrainer(
        Features(),
        arguments(tmp_path),
        train_dataset=tiny_dataset("classifier"),
        dpzero_config=DPZeroConfig(noise_multiplier=1.0, target_delta=1e-5),
        per_example_loss=lambda outputs, labels: outputs[:, 0],
    )
    with pytest.raises(DPZeroError, match=r"batch norm.* norm \("):
        run.train()


def test_batch_norm_with_running_statistics_is_accepted() -> None:
    check_batch_norm(nn.Sequential(nn.BatchNorm1d(4)).eval())


LOSSES: dict[str, tuple[Callable[[Any, Tensor], Tensor], str]] = {
    "neighbours": (lambda outputs, labels: outputs.logits[:, 0] - outputs.logits[:, 0].mean(), "other examples"),
    "place": (lambda outputs, labels: outputs.logits[:, 0] / len(labels), "place in the batch, or its size"),
}


@pytest.mark.parametrize("case", LOSSES)
def test_a_loss_that_looks_across_examples_is_refused(case: str) -> None:
    function, cause = LOSSES[case]
    with pytest.raises(DPZeroError, match=f"loss itself looks at .*{cause}"):
        check(tiny_model("classifier"), FunctionTask(function))


def test_a_loss_that_counts_padding_is_refused() -> None:
    class PerColumn(TokenTask):
        def losses(self, outputs: Any, batch: Any) -> Tensor:
            return super().losses(outputs, batch) / batch["labels"].shape[1]

    check(tiny_model("tagger"), TokenTask())
    with pytest.raises(DPZeroError, match="loss itself looks at the pad length"):
        check(tiny_model("tagger"), PerColumn())


def test_a_loss_that_fails_on_made_up_labels_is_left_to_the_user() -> None:
    check(tiny_model("classifier"), FunctionTask(lambda outputs, labels: labels.starts))
    check(tiny_model("classifier"), FunctionTask(lambda outputs, labels: outputs.logits.mean()))


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("kind", ["classifier", "causal_lm", "masked_lm", "tagger", "seq2seq"])
def test_sound_models_are_accepted(kind: str, side: str) -> None:
    if side == "right" or kind in ("causal_lm", "seq2seq"):
        check(tiny_model(kind), side=side)


@pytest.mark.parametrize("problem_type", ["regression", "multi_label_classification"])
def test_classifiers_of_other_problem_types_are_accepted(problem_type: str) -> None:
    model = tiny_model("classifier")
    model.config.problem_type = problem_type
    check(model)


def test_verbalizers_are_accepted() -> None:
    vocabulary = {"[PAD]": 0, "[UNK]": 1, "[MASK]": 2, "good": 7, "bad": 8}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="[PAD]", mask_token="[MASK]")
    check(tiny_model("masked_lm"), Verbalizer(tokenizer, ["good", "bad"], causal=False))
    for side in ("left", "right"):
        check(tiny_model("causal_lm"), Verbalizer(tokenizer, ["good", "bad"], causal=True), side)


def test_half_precision_is_not_taken_for_dependence() -> None:
    model = tiny_model("causal_lm").to(torch.bfloat16)
    check(model, FunctionTask(lambda outputs, labels: (outputs.logits.argmax(-1) != labels).float().mean(1)))
