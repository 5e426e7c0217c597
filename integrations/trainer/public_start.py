"""A classifier's start from words of each class and unlabelled public text: no private row is read.

A sentence encoder's embeddings already lie nearer to "wonderful" or to "awful". What they say of public text, softly,
is what the classifier learns first, by ordinary gradients.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

STEPS, BATCH, RATE, LONGEST = 150, 64, 1e-3, 96
# Softness of the labels: this many times the distance from the median, in standard deviations, is the log-odds' half.
SHARPNESS = 2.0
TEMPLATES = ("{}", "it was {}", "this is {}", "very {}", "i find it {}")


def learn_from_words(
    model: nn.Module,
    encoder: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    words: tuple[Sequence[str], Sequence[str]],
    texts: Sequence[str],
    steps: int = STEPS,
) -> None:
    """Trains the trainable parameters of `model` on `texts`, labelled by their likeness to each class's words.

    Args:
        model: two classes; changed in place.
        encoder: makes sentence embeddings, as the mean of its last hidden states.
        tokenizer: of both.
        words: of class 0, and of class 1.
        texts: public; half are taken to be of each class.
        steps: of the optimizer.
    """
    learn_softly(model, tokenizer, texts, of_two_classes(likeness(encoder, tokenizer, words, texts)), steps)


def likeness(
    encoder: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    words: tuple[Sequence[str], Sequence[str]],
    texts: Sequence[str],
) -> Tensor:
    """How much nearer each text is to the second words than to the first: (n,), with median 0 and deviation 1."""
    negative, positive = (
        embed(encoder, tokenizer, [template.format(word) for word in some for template in TEMPLATES]).mean(dim=0)
        for some in words
    )
    along = embed(encoder, tokenizer, texts) @ (positive - negative)
    return (along - along.median()) / along.std()


def of_two_classes(likeness: Tensor) -> Tensor:
    """Soft labels: (n, 2)."""
    odds = SHARPNESS * likeness
    return torch.stack([torch.sigmoid(-odds), torch.sigmoid(odds)], dim=1)


def learn_softly(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    labels: Tensor,
    steps: int = STEPS,
) -> None:
    """Trains the trainable parameters of `model` on `texts` with soft `labels` (n, classes)."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=RATE, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, steps)
    generator = torch.Generator().manual_seed(0)
    model.eval()
    # Texts of like length share a batch, so that little of it is padding.
    groups = torch.tensor(sorted(range(len(texts)), key=lambda i: len(texts[i]))).split(BATCH)
    for number in torch.randint(len(groups), (steps,), generator=generator).tolist():
        chosen = groups[number]
        logits = model(**tokens(tokenizer, [texts[i] for i in chosen.tolist()])).logits
        nn.functional.cross_entropy(logits, labels[chosen]).backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()


@torch.no_grad()
def embed(encoder: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> Tensor:
    """Unit vectors of texts: (n, h)."""
    order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
    made: list[Tensor] = []
    for start in range(0, len(order), BATCH):
        inputs = tokens(tokenizer, [texts[i] for i in order[start : start + BATCH]])
        mask = inputs["attention_mask"][:, :, None]
        states = encoder(**inputs).last_hidden_state
        made.append(nn.functional.normalize((states * mask).sum(dim=1) / mask.sum(dim=1), dim=1))
    return torch.cat(made)[torch.tensor(order).argsort()]


def tokens(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> Any:
    """A padded batch."""
    return tokenizer(list(texts), truncation=True, max_length=LONGEST, padding=True, return_tensors="pt")
