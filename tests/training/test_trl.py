"""TRL's trainers behind the mixin: each trains its own loss, row by row, or is refused by name."""

from __future__ import annotations

import importlib
import pkgutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from peft_dpzero import DPZeroError, DPZeroTrainer, DPZeroTrainerMixin
from peft_dpzero.estimation.batching import LogicalBatch
from peft_dpzero.estimation.losses import Losses
from peft_dpzero.estimation.preferences import REFERENCE
from peft_dpzero.training.preferences import adapter_off
from peft_dpzero.training.settling import Given
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import LlamaForCausalLM, LlamaForSequenceClassification, PreTrainedTokenizerFast, Trainer

from tiny import RELEASE, VOCABULARY, arguments, config, llama_config, tiny_dataset, tiny_lora, tiny_model

trl = pytest.importorskip("trl")
ROWS = 12


class PrivateDPOTrainer(DPZeroTrainerMixin, trl.DPOTrainer):
    """DPOTrainer whose training step is DPZero's."""


class PrivateRewardTrainer(DPZeroTrainerMixin, trl.RewardTrainer):
    """RewardTrainer whose training step is DPZero's."""


class PrivateSFTTrainer(DPZeroTrainerMixin, trl.SFTTrainer):
    """SFTTrainer whose training step is DPZero's."""


def tokenizer() -> PreTrainedTokenizerFast:
    words = {f"w{i}": i for i in range(VOCABULARY - 2)} | {"<eos>": VOCABULARY - 2, "<unk>": VOCABULARY - 1}
    made = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=made, pad_token="w0", eos_token="<eos>", unk_token="<unk>")


def words(count: int, offset: int) -> str:
    return " ".join(f"w{(offset * 7 + 3 * i) % 50 + 3}" for i in range(count))


def preferences(count: int = ROWS) -> Dataset:
    """Pairs of which the chosen is now the longer, now the shorter."""
    rows = [
        {
            "prompt": words(2 + i % 3, i),
            "chosen": " " + words(1 + i % 4, i + 20),
            "rejected": " " + words(1 + i * 5 % 3, i + 40),
        }
        for i in range(count)
    ]
    return Dataset.from_list(rows)


def settings(kind: type, folder: Path, **changes: Any) -> Any:
    given = {
        "output_dir": str(folder),
        "max_steps": 3,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-2,
        "report_to": [],
        "save_strategy": "no",
        "disable_tqdm": True,
        "use_cpu": True,
        "bf16": False,
        "logging_steps": 1,
    }
    return kind(**(given | changes))


def dpo(folder: Path, model: Any = None, *, args: Any = None, **changes: Any) -> PrivateDPOTrainer:
    torch.manual_seed(0)
    lora = LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    given = {
        "train_dataset": preferences(),
        "processing_class": tokenizer(),
        "peft_config": lora,
        "dpzero_config": config(),
    }
    model = LlamaForCausalLM(llama_config()) if model is None else model
    return PrivateDPOTrainer(model, args or settings(trl.DPOConfig, folder, beta=0.5), **(given | changes))


def reward(folder: Path, data: Dataset | None = None, **args: Any) -> PrivateRewardTrainer:
    torch.manual_seed(0)
    lora = LoraConfig(
        task_type="SEQ_CLS", r=2, target_modules=["q_proj"], modules_to_save=["score"], init_lora_weights=False
    )
    return PrivateRewardTrainer(
        LlamaForSequenceClassification(llama_config(num_labels=1)),
        settings(trl.RewardConfig, folder, **args),
        train_dataset=preferences() if data is None else data,
        processing_class=tokenizer(),
        peft_config=lora,
        dpzero_config=config(),
    )


def rows_of(trainer: Any, indices: list[int]) -> list[dict[str, Any]]:
    """The private rows as they go through the model."""
    collate = trainer.private_collator()
    return [collate([trainer.train_dataset[i]]) for i in indices]


def our_losses(trainer: Any, indices: list[int]) -> Tensor:
    losses = Losses(trainer.model, trainer.task, dict)
    return torch.cat([losses(row) for row in rows_of(trainer, indices)])


def their_losses(trainer: Any, indices: list[int]) -> Tensor:
    """TRL's loss of each row in a batch of its own."""
    loss = super(DPZeroTrainerMixin, trainer).compute_loss
    found = []
    for i in indices:
        example = trainer.train_dataset[i]
        with torch.no_grad():
            found.append(loss(trainer.model, trainer.data_collator([example])))
    return torch.stack(found)


@torch.no_grad()
def written_out(trainer: Any, beta: float) -> Tensor:
    """DPO's losses by their formula, each sequence in a pass of its own."""

    def log_prob(model: Any, prompt: list[int], completion: list[int]) -> Tensor:
        log_probs = torch.log_softmax(model(torch.tensor([prompt + completion])).logits[0].double(), dim=-1)
        return sum((log_probs[len(prompt) - 1 + i, token] for i, token in enumerate(completion)), torch.tensor(0.0))

    losses = []
    for row in trainer.train_dataset:
        ratios = []
        for key in ("chosen_ids", "rejected_ids"):
            policy = log_prob(trainer.model, row["prompt_ids"], row[key])
            with adapter_off(trainer.model if trainer.ref_model is None else None):
                base = log_prob(trainer.ref_model or trainer.model, row["prompt_ids"], row[key])
            ratios.append(policy - base)
        losses.append(torch.log1p(torch.exp(-beta * (ratios[0] - ratios[1]))))
    return torch.stack(losses)


@pytest.mark.parametrize("reference", ["adapter off", "model"])
def test_dpo_trains_each_rows_own_loss_as_trl_has_it(tmp_path: Path, reference: str) -> None:
    others = {} if reference == "adapter off" else {"ref_model": LlamaForCausalLM(llama_config()).double()}
    trainer = dpo(tmp_path, **others)
    trainer.model.double().eval()
    every = list(range(ROWS))
    ours = our_losses(trainer, every)
    torch.testing.assert_close(ours, written_out(trainer, 0.5), rtol=1e-10, atol=1e-10)
    # TRL sums log-probabilities in float32 whatever the model's dtype.
    torch.testing.assert_close(ours, their_losses(trainer, every).double(), rtol=3e-6, atol=3e-6)
    assert len(set(ours.tolist())) > ROWS // 2


@pytest.mark.parametrize("extra", ["plain", "margin", "centered"])
def test_reward_trains_each_rows_own_loss_as_trl_has_it(tmp_path: Path, extra: str) -> None:
    data = preferences().add_column("margin", [0.1 * i for i in range(ROWS)]) if extra == "margin" else None
    trainer = reward(tmp_path, data, **({"center_rewards_coefficient": 0.3} if extra == "centered" else {}))
    trainer.model.double().eval()
    every = list(range(ROWS))
    ours, theirs = our_losses(trainer, every), their_losses(trainer, every)
    torch.testing.assert_close(ours, theirs.double(), rtol=1e-9, atol=1e-9)
    assert len(set(ours.tolist())) > ROWS // 2


def trained_batch(trainer: Any) -> LogicalBatch:
    """Trains, and returns the last step's batch."""
    drawn: list[LogicalBatch] = []
    begin = trainer.begin_steps

    def watched(model: Any) -> None:
        begin(model)
        batches = trainer.run.step.batches
        draw = batches.draw
        batches.draw = lambda step: drawn.append(draw(step)) or drawn[-1]

    trainer.begin_steps = watched
    trainer.train()
    return max(drawn, key=lambda batch: len(batch.micro_batches))


@pytest.mark.parametrize("make", [dpo, reward])
def test_a_pair_goes_through_the_model_by_itself(tmp_path: Path, make: Any) -> None:
    trainer = make(tmp_path)
    batch = trained_batch(trainer)
    assert batch.micro_batches
    assert all(row["input_ids"].shape[:2] == (1, 2) for row in batch.micro_batches)
    assert set(batch.counts) == {1}


@pytest.mark.parametrize("make", [dpo, reward])
def test_preference_trainers_release_and_log_nothing_raw(tmp_path: Path, make: Any) -> None:
    trainer = make(tmp_path)
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters() if p.requires_grad}
    trainer.train()
    now = dict(trainer.model.named_parameters())
    assert all(now[name].requires_grad and not torch.equal(now[name], old) for name, old in before.items())
    logged = {name for entry in trainer.state.log_history for name in entry}
    assert logged <= {"epoch", "epsilon", "grad_norm", "learning_rate", "step"} | {
        "train_runtime",
        "train_samples_per_second",
        "train_steps_per_second",
    }
    trainer.save_model(tmp_path / "saved")
    saved = RELEASE | {"tokenizer.json", "tokenizer_config.json"}
    assert {path.name for path in (tmp_path / "saved").iterdir()} - {"generation_config.json"} == saved


def test_training_lowers_the_loss_that_trl_evaluates(tmp_path: Path) -> None:
    data = preferences(40)
    args = settings(
        trl.DPOConfig, tmp_path, max_steps=8, per_device_train_batch_size=20, learning_rate=10.0, optim="sgd", beta=0.5
    )
    private = config(noise_multiplier=1e-3, num_directions=4, clipping_threshold=10.0, deterministic=True)
    trainer = dpo(tmp_path, args=args, train_dataset=data, eval_dataset=data, dpzero_config=private)
    before = trainer.evaluate()
    trainer.train()
    after = trainer.evaluate()
    assert after["eval_loss"] < before["eval_loss"]


def test_the_reference_stays_what_it_was(tmp_path: Path) -> None:
    trainer = dpo(tmp_path)
    before = rows_of(trainer, [0])[0][REFERENCE]
    trainer.train()
    torch.testing.assert_close(rows_of(trainer, [0])[0][REFERENCE], before, rtol=0, atol=0)


def test_switching_the_adapter_off_leaves_frozen_parts_frozen() -> None:
    model = tiny_lora("causal_lm")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_B" in name)
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    with adapter_off(model):
        pass
    assert [name for name, p in model.named_parameters() if p.requires_grad] == trained


def test_rows_longer_than_max_length_count_as_none(tmp_path: Path) -> None:
    trainer = dpo(tmp_path, dpzero_config=config(max_length=1))
    assert not trained_batch(trainer).micro_batches


def trainers_of_trl() -> list[str]:
    """Full names of all trainers that the installed TRL has."""
    found = set()
    for info in pkgutil.walk_packages(trl.__path__, "trl."):
        if not info.name.rpartition(".")[2].endswith("_trainer"):
            continue
        try:
            module = importlib.import_module(info.name)
        except ImportError:  # Needs what is not installed.
            continue
        found |= {
            f"{value.__module__}:{name}"
            for name, value in vars(module).items()
            if isinstance(value, type) and issubclass(value, Trainer) and value.__module__.startswith("trl.")
        }
    return sorted(name for name in found if not name.partition(":")[2].startswith("_"))


PRIVATE = {f"trl.trainer.{name.lower()}_trainer:{name}Trainer" for name in ("SFT", "DPO", "Reward")}


def test_the_trainers_that_can_be_private_are_there() -> None:
    assert set(trainers_of_trl()) > PRIVATE


@pytest.mark.parametrize("name", [name for name in trainers_of_trl() if name not in PRIVATE])
def test_every_other_trainer_of_trl_is_refused_by_name(tmp_path: Path, name: str) -> None:
    module, _, kind = name.partition(":")
    private = type("Private", (DPZeroTrainerMixin, getattr(importlib.import_module(module), kind)), {})
    with pytest.raises(DPZeroError, match=kind):
        private(tiny_model("causal_lm"), arguments(tmp_path), train_dataset=preferences(), dpzero_config=config())


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("loss_type", "aot"),
        ("loss_type", ["sigmoid", "sft"]),
        ("loss_weights", [2.0]),
        ("ld_alpha", 0.5),
        ("f_divergence_type", "forward_kl"),
        ("use_weighting", True),
        ("precompute_ref_log_probs", True),
        ("sync_ref_model", True),
    ],
)
def test_dpo_refuses_what_is_not_its_plain_loss(tmp_path: Path, name: str, value: Any) -> None:
    with pytest.raises(DPZeroError, match=f"DPOTrainer with {name}"):
        dpo(tmp_path, args=settings(trl.DPOConfig, tmp_path, **{name: value}))


def test_sft_refuses_a_loss_that_it_would_not_train(tmp_path: Path) -> None:
    args = settings(trl.SFTConfig, tmp_path, loss_type="dft")
    with pytest.raises(DPZeroError, match="loss_type"):
        PrivateSFTTrainer(tiny_lora("causal_lm"), args, train_dataset=preferences(), dpzero_config=config())


def test_what_trl_has_for_a_default_nobody_gave(tmp_path: Path) -> None:
    @dataclass
    class Own(trl.SFTConfig):  # type: ignore[misc]
        learning_rate: float = 3e-3

    given = [Given.of(kind(str(tmp_path), use_cpu=True, bf16=False)) for kind in (trl.SFTConfig, Own)]
    assert [one.learning_rate for one in given] == [None, 3e-3]


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"per_example_loss": lambda outputs, labels: outputs}, "a loss of its own"),
        ({"public_text": ["w3 w4"]}, "public_text"),
        ({"model": tiny_lora("causal_lm"), "peft_config": None}, "peft_config"),
        ({"args": arguments(Path("unused"))}, "DPOConfig"),
    ],
)
def test_dpo_says_what_it_needs(tmp_path: Path, changes: dict[str, Any], told: str) -> None:
    with pytest.raises(DPZeroError, match=told):
        dpo(tmp_path, **changes)


def test_a_compute_loss_of_ones_own_is_not_left_out_in_silence(tmp_path: Path) -> None:
    class Mine(Trainer):
        def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
            raise AssertionError

    class Private(DPZeroTrainerMixin, Mine):
        pass

    given = {"train_dataset": tiny_dataset("causal_lm"), "dpzero_config": config()}
    with pytest.raises(DPZeroError, match=r"Mine\.compute_loss"):
        Private(tiny_lora("causal_lm"), arguments(tmp_path), **given)


def test_positional_arguments_are_the_trainers(tmp_path: Path) -> None:
    data = tiny_dataset("causal_lm")
    trainer = DPZeroTrainer(tiny_lora("causal_lm"), arguments(tmp_path), None, data, dpzero_config=config())
    assert trainer.train_dataset is data
