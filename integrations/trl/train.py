"""Private supervised fine-tuning: TRL's SFTTrainer with DPZeroTrainerMixin before it.

    pip install trl
    python integrations/trl/train.py [--output-dir DIR] [--steps T]

Model, tokenizer and data are made up, so that it runs offline in seconds.
"""

from __future__ import annotations

import argparse
import random
from pathlib import Path

from datasets import Dataset
from peft import LoraConfig
from peft_dpzero import DPZeroConfig, DPZeroTrainerMixin
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, set_seed
from trl import SFTConfig, SFTTrainer

GOOD, BAD = ("bright", "moving", "clever"), ("slow", "stale", "hollow")
WORDS = ["<pad>", "<eos>", "<unk>", "the", "film", "plot", "actor", "was", ":", "great", "dull", *GOOD, *BAD]


class PrivateSFTTrainer(DPZeroTrainerMixin, SFTTrainer):
    """SFTTrainer whose training step is DPZero's."""


def make_data(count: int, seed: int) -> Dataset:
    """Prompts such as "the plot was clever :" and their verdict."""
    choose = random.Random(seed)
    rows = []
    for _ in range(count):
        kind, verdict = choose.choice([(GOOD, "great"), (BAD, "dull")])
        subject = choose.choice(["film", "plot", "actor"])
        rows.append({"prompt": f"the {subject} was {choose.choice(kind)} :", "completion": f" {verdict}"})
    return Dataset.from_list(rows)


def make_tokenizer() -> PreTrainedTokenizerFast:
    """One token a word."""
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>", padding_side="right"
    )


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--output-dir", type=Path, default=Path("runs/trl"))
    parser.add_argument("--steps", type=int, default=100)
    options = parser.parse_args()

    set_seed(0)
    tokenizer = make_tokenizer()
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(WORDS), initializer_range=0.2, pad_token_id=0, **sizes))

    trainer = PrivateSFTTrainer(
        model=model,
        args=SFTConfig(
            str(options.output_dir),
            max_steps=options.steps,
            per_device_train_batch_size=64,
            gradient_accumulation_steps=2,
            learning_rate=1.0,
            optim="sgd",
            logging_steps=25,
            save_strategy="no",
            report_to=[],
            bf16=False,
            disable_tqdm=True,
        ),
        train_dataset=make_data(4096, seed=1),
        eval_dataset=make_data(256, seed=2),
        processing_class=tokenizer,
        peft_config=LoraConfig(task_type="CAUSAL_LM", r=4, target_modules="all-linear"),
        dpzero_config=DPZeroConfig(target_epsilon=2.0, target_delta=1e-5, num_directions=8, clipping_threshold=2.0),
    )
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    after = trainer.evaluate()["eval_loss"]
    trainer.save_model()
    record = trainer.privacy_record()
    print(f"loss on public data {before:.3f} → {after:.3f}")
    print(f"epsilon {record['epsilon']:.3f} at delta {record['delta']:g}   saved in {options.output_dir}")


if __name__ == "__main__":
    main()
