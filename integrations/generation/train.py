"""Privately teaches a small language model how to word a verdict, by ROUGE-L of what it writes.

    python integrations/generation/train.py --reviews vaderSentiment-3.3.2.tar.gz [--output-dir DIR] [--steps T]

A Llama of one layer first learns, in public, from rated tweets and product reviews to write verdicts in many words
("fine picture", "poor film"). Those of the private movie reviews are "great movie" and "awful movie".
"""

from __future__ import annotations

import argparse
import random
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import torch
from datasets import Dataset
from overlap import GreedyRouge
from peft import LoraConfig, get_peft_model
from peft_dpzero import DPZeroConfig, DPZeroTrainer
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from torch.nn.utils.rnn import pad_sequence
from transformers import (
    DataCollatorWithPadding,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    TrainingArguments,
    set_seed,
)

sys.path.append(str(Path(__file__).parents[1] / "trainer"))
from reviews import rated_as_labels, rated_texts

ADJECTIVES = {True: ("good", "fine", "great"), False: ("bad", "poor", "awful")}
NOUNS = ("film", "picture", "movie")
# How often public verdicts have each of them.
SHARES = (40, 35, 25)
WORDS = 1000
LONGEST = 16
VERDICT = 2


def make_tokenizer(texts: Sequence[str]) -> PreTrainedTokenizerFast:
    """One token a word: the most frequent of public texts."""
    splitter = pre_tokenizers.BertPreTokenizer()
    counts = Counter(word for text in texts for word, _ in splitter.pre_tokenize_str(text.lower()))
    own = ["<pad>", "<unk>", "=>", *ADJECTIVES[True], *ADJECTIVES[False], *NOUNS]
    words = dict.fromkeys([*own, *(word for word, _ in counts.most_common(WORDS))])
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = splitter
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", unk_token="<unk>")


def rows(tokenizer: PreTrainedTokenizerFast, texts: Sequence[str], verdicts: Sequence[str]) -> Dataset:
    """Prompts such as "a charming story =>" and the tokens of their verdicts."""
    arrow = tokenizer.convert_tokens_to_ids("=>")
    prompts = [[*tokenizer(text)["input_ids"][:LONGEST], arrow] for text in texts]
    return Dataset.from_dict(
        {
            "input_ids": prompts,
            "attention_mask": [[1] * len(prompt) for prompt in prompts],
            "labels": [tokenizer(verdict)["input_ids"] for verdict in verdicts],
        }
    )


def taught_in_public(data: Dataset, vocabulary: int, passes: int = 2) -> LlamaForCausalLM:
    """A model that learned by backpropagation to write each row's verdict."""
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1, "num_attention_heads": 4}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=vocabulary, pad_token_id=0, **sizes))
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    written = [torch.tensor(row["input_ids"] + row["labels"]) for row in data]
    for _ in range(passes):
        for chosen in torch.randperm(len(written)).split(64):
            texts = [written[i] for i in chosen]
            ids = pad_sequence(texts, batch_first=True)
            ends = torch.tensor([len(text) for text in texts])[:, None]
            places = torch.arange(ids.shape[1])
            labels = ids.masked_fill((places < ends - VERDICT) | (places >= ends), -100)
            model(input_ids=ids, attention_mask=(places < ends).long(), labels=labels).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    return model


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--reviews", type=Path, required=True, help="vaderSentiment-3.3.2.tar.gz")
    parser.add_argument("--output-dir", type=Path, default=Path("runs/generation"))
    parser.add_argument("--steps", type=int, default=30)
    options = parser.parse_args()

    set_seed(0)  # of what is public: the first model, and how the adapter starts
    choose = random.Random(0)
    public = [
        (text, " ".join(choose.choices(words, SHARES)[0] for words in (ADJECTIVES[rating > 0], NOUNS)))
        for name in ("tweets", "amazon")
        for rating, text in rated_texts(options.reviews, name)
        if abs(rating) >= 0.3
    ]
    texts, verdicts = [text for text, _ in public], [verdict for _, verdict in public]
    tokenizer = make_tokenizer(texts)
    base = taught_in_public(rows(tokenizer, texts, verdicts), len(tokenizer))

    def private(data: Dataset) -> Dataset:
        return rows(tokenizer, data["text"][:], ["great movie" if label else "awful movie" for label in data["labels"]])

    train, held_out = map(private, rated_as_labels(options.reviews))
    model = get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", r=2, target_modules="all-linear"))
    trainer = DPZeroTrainer(
        model=model,
        args=TrainingArguments(
            str(options.output_dir),
            max_steps=options.steps,
            per_device_train_batch_size=256,
            per_device_eval_batch_size=1000,
            learning_rate=0.5,
            optim="sgd",
            logging_steps=10,
            save_strategy="no",
            report_to=[],
            use_cpu=True,
            disable_tqdm=True,
        ),
        train_dataset=train,
        eval_dataset=held_out,
        data_collator=DataCollatorWithPadding(tokenizer),
        per_example_loss=GreedyRouge(model, VERDICT),
        dpzero_config=DPZeroConfig(
            target_epsilon=2.0,
            target_delta=1e-5,
            num_directions=8,
            clipping_threshold=3.0,
            # What is written is a step function: points must lie far apart to differ.
            smoothing_parameter=0.1,
            max_length=LONGEST + 1,
            rows_asserted_independent=True,  # GreedyRouge's docstring says why
        ),
    )
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    after = trainer.evaluate()["eval_loss"]
    trainer.save_model()
    record = trainer.privacy_record()
    print(f"ROUGE-L on 1,000 held-out reviews {1 - before:.3f} → {1 - after:.3f}")
    print(f"epsilon {record['epsilon']:.3f} at delta {record['delta']:g}   saved in {options.output_dir}")


if __name__ == "__main__":
    main()
