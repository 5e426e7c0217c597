"""The start-up probe: where batch-mates can reach an example's loss, rows go one at a time, and the cause is named."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from datasets import Dataset
from peft_dpzero import DPZeroError, DPZeroTrainer, Task, TokenTask, Verbalizer, infer_task
from peft_dpzero.checks.architectures import reason_to_separate
from peft_dpzero.checks.causes import check_batch_norm
from peft_dpzero.checks.passes import try_model
from peft_dpzero.checks.probe import Probe
from peft_dpzero.checks.row_bits import digest, row_bits
from peft_dpzero.checks.synthetic import ProbeBatch
from peft_dpzero.estimation import tasks
from peft_dpzero.estimation.shapes import Shapes
from peft_dpzero.estimation.tasks import FunctionTask
from peft_dpzero.modules import with_precision
from peft_dpzero.perturbation.perturbation import Perturbation
from tokenizers import Tokenizer, models
from torch import Tensor, nn
from transformers import BertForSequenceClassification, PreTrainedTokenizerFast
from transformers.modeling_outputs import SequenceClassifierOutput

from tiny import SwitchLayer, arguments, config, explicit, tiny_dataset, tiny_model

CPU = torch.device("cpu")
PLACE = "bert.encoder.layer.0.output.dropout"


def with_module(module: nn.Module) -> Any:
    """A tiny classifier, in eval mode, through whose first layer `module` was put."""
    model = tiny_model("classifier")
    model.bert.encoder.layer[0].output.dropout = module
    return model.eval()


def reason(model: Any, task: Task | None = None, asserted: bool = False) -> str | None:
    """Why rows go one at a time."""
    probe = Probe(model, CPU, task or infer_task(model), asserted)
    shapes = probe.fit_shapes(Perturbation(model), Shapes(64, 16))
    assert shapes.alone == (probe.reason is not None)
    assert all(shapes.counts(length) == (1,) for length in range(1, 65))
    return probe.reason


def shared(model: Any) -> Mapping[int, Sequence[int]]:
    """How many rows share passes, by padded length."""
    perturbation, probe = Perturbation(model), Probe(model, CPU, infer_task(model), asserted=True)
    shapes = probe.fit_shapes(perturbation, Shapes(64, 16))
    config = explicit(noise_multiplier=1.0, target_delta=1e-5, num_directions=1)
    return probe.tried_shapes(perturbation, probe.losses(perturbation, dict), shapes, config).together


class TokenBatchNorm(nn.BatchNorm1d):
    """Batch norm over tokens, by the batch's own statistics."""

    def __init__(self) -> None:
        super().__init__(16, track_running_stats=False)

    def forward(self, hidden: Tensor) -> Tensor:
        return super().forward(hidden.flatten(0, -2)).view_as(hidden)


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
        (PackedAttention(), "packing: tokens attend to other examples"),
        (RunningPositions(), "packing: positions run on"),
        (Blind(), "ignores attention_mask"),
        (Stretched(), "pad length"),
        (Ranked(), "order"),
        (Centred(), "mixes the examples"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else "",
)
def test_rows_are_separated_whatever_the_user_asserts_and_the_cause_is_named(module: nn.Module, cause: str) -> None:
    found = reason(with_module(module), asserted=True)
    assert found is not None
    assert cause in found
    assert f"{PLACE} ({type(module).__name__})" in found


@pytest.mark.parametrize("module", [SwitchLayer(capacity=10_000), Centred()])
def test_modules_that_are_not_known_separate_rows_untried(module: nn.Module) -> None:
    assert "not known to keep rows apart" in str(reason(with_module(module)))


def test_float16_and_other_attention_separate_rows_untried() -> None:
    half, flash = tiny_model("classifier").half(), tiny_model("classifier")
    flash.config._attn_implementation = "flash_attention_2"
    assert "is in float16" in str(reason_to_separate(half, infer_task(half)))
    assert "attention by flash_attention_2" in str(reason_to_separate(flash, infer_task(flash)))


def test_rows_of_compiled_models_go_alone_and_padded_unless_the_user_vouches_for_them() -> None:
    model = tiny_model("classifier")
    made = Perturbation(model), infer_task(model)
    with pytest.warns(UserWarning, match="of compiled kernels it is not known that they keep rows apart"):
        shapes = try_model(*made, config(), dict, device=CPU, compiles=True).passes.shapes
    assert (shapes.alone, shapes.exact) == (True, False)
    asserted = config(rows_asserted_independent=True)
    assert not try_model(*made, asserted, dict, device=CPU, compiles=True).passes.shapes.alone


def test_what_draws_at_random_in_eval_mode_is_refused() -> None:
    with pytest.raises(DPZeroError, match="draws at random in eval mode") as refusal:
        reason(with_module(StubbornDropout(0.5)))
    assert f"{PLACE} (StubbornDropout)" in str(refusal.value)


def test_a_difference_in_rounding_separates_rows() -> None:
    class Breath(nn.Module):
        def forward(self, hidden: Tensor) -> Tensor:
            return hidden + 1e-6 * hidden.mean(0)

    assert not shared(with_module(Breath()))
    assert {8, 12, 16, 32, 64} <= shared(with_module(nn.Sequential())).keys()


def test_rows_whose_own_points_fill_a_pass_go_alone() -> None:
    model = with_module(nn.Sequential())
    perturbation, probe = Perturbation(model), Probe(model, CPU, infer_task(model))
    for rows, directions, alone in ((64, 1, False), (64, 16, True), (1024, 16, False)):
        shapes = probe.fit_shapes(perturbation, Shapes(rows, 4, max_length=10))
        config = explicit(noise_multiplier=1.0, target_delta=1e-5, num_directions=directions)
        tried = probe.tried_shapes(perturbation, probe.losses(perturbation, dict), shapes, config)
        assert (not tried.together) == alone


def test_lengths_that_public_rows_have_are_tried_first_and_until_time_is_over(monkeypatch: pytest.MonkeyPatch) -> None:
    model = with_module(nn.Sequential())
    perturbation, probe = Perturbation(model), Probe(model, CPU, infer_task(model))
    shapes = probe.fit_shapes(perturbation, Shapes(1024, 4))
    config = explicit(noise_multiplier=1.0, target_delta=1e-5, num_directions=1)
    losses = probe.losses(perturbation, dict)
    tried: list[int] = []

    def try_one(perturbation: Any, losses: Any, length: int, counts: Any, points: Any) -> list[int]:
        tried.append(length)
        return [1, 2]

    monkeypatch.setattr(probe, "_alike_counts", try_one)
    found = probe.tried_shapes(perturbation, losses, shapes, config, likely=[30, 17, 30, 18, 19])
    # 28 to 31 tokens are padded to 32, and 16 to 19 to 20.
    assert tried[:3] == [20, 32, 4]
    assert sorted(tried) == sorted(found.together) == shapes.lengths(64)
    tried.clear()
    soon = time.monotonic() + 60
    found = probe.tried_shapes(perturbation, losses, shapes, config, likely=[30, 30, 18] * 400 + [100], until=soon)
    assert tried == [32, 20], "of 104 a step has less than two"
    tried.clear()
    over = probe.tried_shapes(perturbation, losses, shapes, config, until=time.monotonic() - 1)
    assert not tried
    assert not over.together


def test_few_rows_share_passes_where_each_pass_perturbs_large_parameters(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("peft_dpzero.perturbation.perturbation.STREAMED_ENTRIES", 0)
    monkeypatch.setattr("peft_dpzero.perturbation.perturbation.KEPT_ENTRIES", 0)
    model = with_module(nn.Sequential())
    perturbation, probe = Perturbation(model), Probe(model, CPU, infer_task(model))
    shapes = probe.fit_shapes(perturbation, Shapes(16, 16))
    config = explicit(noise_multiplier=1.0, target_delta=1e-5, num_directions=1)
    tried = probe.tried_shapes(perturbation, probe.losses(perturbation, dict), shapes, config)
    assert set(tried.together) == {32, 64}
    assert all(set(counts) <= {1, 2, 4, 8, 16} and max(counts) > 1 for counts in tried.together.values())
    assert [tried.length(tokens) for tokens in (5, 9, 20, 33)] == [32, 32, 32, 64]


def test_the_trial_of_shapes_keeps_digests_of_what_modules_put_out() -> None:
    model = with_module(nn.Sequential())
    perturbation, probe = Perturbation(model), Probe(model, CPU, infer_task(model))
    losses, rows = probe.losses(perturbation, dict), probe.data.rows_of([7] * 8)
    batch = probe.data.batch(ProbeBatch(rows, 0, 12))
    ((values, outputs),) = row_bits(perturbation, losses, [batch], [range(0, 8, 2)], [(0, 1e-3), (0, -1e-3)])
    assert values.shape[1] == 4
    assert len(outputs) > 10
    assert all(made.untyped_storage().nbytes() == 8 for made, _ in outputs.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64, torch.complex64, torch.bool])
def test_digests_tell_any_entrys_last_bit(dtype: torch.dtype) -> None:
    values = torch.arange(200_000).remainder(7).to(dtype).reshape(2, -1)
    number = digest(values)
    assert torch.equal(number, digest(values.clone()))
    generator = torch.Generator().manual_seed(1)
    for place in torch.randint(values.numel(), (20,), generator=generator).tolist():
        other = values.clone()
        other.view(torch.uint8).view(-1)[place * values.element_size()] ^= 1
        assert not torch.equal(number, digest(other))
    assert not torch.equal(number, digest(values.flip(1)))
    assert torch.equal(digest(torch.zeros(3)), digest(-torch.zeros(3)))


def test_numbers_of_rows_that_round_in_another_way_are_not_used() -> None:
    class Crowd(nn.Module):
        def forward(self, hidden: Tensor) -> Tensor:
            return hidden * (1 + 1e-6 * (len(hidden) in (1, 6)))

    counts = shared(with_module(Crowd()))[8]
    assert {4, 8, 16} <= set(counts)
    assert not {1, 6} & set(counts)


def test_rows_whose_logits_are_made_in_pieces_share_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    """How many pieces there are depends on how many rows."""
    monkeypatch.setattr(tasks, "CHUNK_ENTRIES", 1 << 10)
    together = shared(tiny_model("causal_lm").eval())
    assert together[16] == [1, 2, 3, 4, 6, 8, 12, 16]


def test_only_lengths_at_which_rows_reach_each_other_are_run_one_row_at_a_time() -> None:
    class Far(nn.Module):
        def forward(self, hidden: Tensor) -> Tensor:
            return hidden + hidden.mean(0) if hidden.shape[1] > 30 else hidden

    found = shared(with_module(Far()))
    assert {8, 12, 28} <= found.keys()
    assert max(found) == 28


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
        dpzero_config=explicit(noise_multiplier=1.0, target_delta=1e-5),
        per_example_loss=lambda outputs, labels: outputs[:, 0],
    )
    with pytest.raises(DPZeroError, match=r"batch norm.* norm \("):
        run.train()


def test_batch_norm_with_running_statistics_is_accepted() -> None:
    check_batch_norm(nn.Sequential(nn.BatchNorm1d(4)).eval())


class TokensOrFeatures(BertForSequenceClassification):
    """Classifies tokens, or the pooled features that somebody computed before."""

    rows: ClassVar[set[int]] = set()

    def forward(
        self, input_ids: Tensor | None = None, features: Tensor | None = None, labels: Any = None, **kwargs: Any
    ) -> Any:
        if features is None:
            return super().forward(input_ids, **kwargs)
        self.rows.add(len(features))
        return SequenceClassifierOutput(logits=self.classifier(features))


@pytest.mark.parametrize("asserted", [True, False])
@pytest.mark.filterwarnings("ignore:Rows go through the model one at a time")
def test_rows_without_tokens_share_passes_on_the_users_word(asserted: bool, tmp_path: Path) -> None:
    model = TokensOrFeatures(tiny_model("classifier").config).eval()
    model.requires_grad_(False).classifier.requires_grad_(True)
    features = torch.randn(64, model.config.hidden_size, generator=torch.Generator().manual_seed(0))
    config = explicit(
        noise_multiplier=1.0,
        target_delta=1e-5,
        rows_asserted_independent=asserted,
        clipping_threshold=10.0,
        smoothing_parameter=1e-3,
    )
    run = DPZeroTrainer(
        model,
        arguments(tmp_path, per_device_train_batch_size=16),
        train_dataset=Dataset.from_dict({"features": features.numpy(), "labels": [0, 1] * 32}).with_format("torch"),
        dpzero_config=config,
    )
    model.rows.clear()
    run.train()
    assert (max(model.rows) > 4) == asserted


def test_a_loss_function_never_sees_two_rows() -> None:
    def function(outputs: Any, labels: Tensor) -> Tensor:
        assert len(outputs.logits) == len(labels) == 1
        return outputs.logits[:, 0] - outputs.logits[:, 0].mean()

    model = tiny_model("classifier")
    assert reason(model, FunctionTask(function)) is None
    outputs = model(torch.randint(5, 50, (3, 4)), output_hidden_states=True)
    assert FunctionTask(function).losses(outputs, {"labels": torch.zeros(3)}).tolist() == [0.0] * 3


def test_a_loss_that_counts_padding_separates_rows() -> None:
    class PerColumn(TokenTask):
        def losses(self, outputs: Any, batch: Any) -> Tensor:
            return super().losses(outputs, batch) / batch["labels"].shape[1]

    assert reason(tiny_model("tagger"), TokenTask()) is None
    assert "task of your own" in str(reason(tiny_model("tagger"), PerColumn()))
    assert "loss itself looks at the pad length" in str(reason(tiny_model("tagger"), PerColumn(), asserted=True))


def test_a_loss_that_fails_on_made_up_labels_is_left_to_the_user() -> None:
    assert reason(tiny_model("classifier"), FunctionTask(lambda outputs, labels: labels.starts)) is None


@pytest.mark.parametrize("kind", ["classifier", "causal_lm", "masked_lm", "tagger"])
def test_rows_of_sound_models_share_passes(kind: str) -> None:
    assert reason(tiny_model(kind)) is None


def test_rows_of_encoder_decoders_go_one_at_a_time() -> None:
    assert "two lengths" in str(reason(tiny_model("seq2seq")))


@pytest.mark.parametrize("problem_type", ["regression", "multi_label_classification"])
def test_rows_of_classifiers_of_other_problem_types_share_passes(problem_type: str) -> None:
    model = tiny_model("classifier")
    model.config.problem_type = problem_type
    assert reason(model) is None


def test_verbalizers_are_accepted() -> None:
    vocabulary = {"[PAD]": 0, "[UNK]": 1, "[MASK]": 2, "good": 7, "bad": 8}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="[PAD]", mask_token="[MASK]")
    assert reason(tiny_model("masked_lm"), Verbalizer(tokenizer, ["good", "bad"], causal=False)) is None
    assert reason(tiny_model("causal_lm"), Verbalizer(tokenizer, ["good", "bad"], causal=True)) is None


def test_half_precision_is_not_taken_for_dependence() -> None:
    model = tiny_model("causal_lm").to(torch.bfloat16)
    errors = FunctionTask(lambda outputs, labels: (outputs.logits.argmax(-1) != labels).float().mean(1))
    assert reason(model, errors) is None


def test_autocast_is_half_precision_of_weights_in_float32() -> None:
    model = tiny_model("classifier").eval()
    run = Probe(model, CPU).run
    assert with_precision(model, run)[1]
    with torch.autocast("cpu", torch.bfloat16):
        assert not with_precision(model, run)[1]
    assert not with_precision(model.bfloat16(), run)[1]
