"""A classifier over a frozen sentence encoder: pooled hidden states, a projection and a head.

Everything that it starts from is public: the encoder, unlabelled text and a few label phrases.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoTokenizer, BertConfig, BertModel, PreTrainedModel
from transformers.modeling_outputs import SequenceClassifierOutput


class SentenceConfig(BertConfig):
    """A BERT encoder's config, with the layers that are pooled and the size that they are projected to."""

    model_type = "sentence_bert"

    def __init__(self, pooled_layers: Sequence[int] = (3, 4, 5, 6), projection: int = 1024, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.pooled_layers = list(pooled_layers)
        self.projection = projection


class Pooling(nn.Module):
    """Three weighted means over tokens, standardised with public statistics: (b, 3 × layers × hidden).

    The weights are softmax(0), softmax(query · token) and softmax(−query · token): all tokens alike, then those most
    like each of two opposite meanings. A token is its hidden states in some layers, one after another.
    """

    def __init__(self, layers: Sequence[int], hidden: int) -> None:
        super().__init__()
        self.layers = list(layers)
        self.register_buffer("query", torch.zeros(len(self.layers) * hidden))
        self.register_buffer("mean", torch.zeros(3 * len(self.layers) * hidden))
        self.register_buffer("scale", torch.ones(3 * len(self.layers) * hidden))

    def forward(self, hidden_states: Sequence[Tensor], attention_mask: Tensor) -> Tensor:
        tokens = torch.cat([hidden_states[i] for i in self.layers], dim=2)  # [b, l, layers × hidden]
        likeness = tokens @ self.query
        scores = torch.stack([torch.zeros_like(likeness), likeness, -likeness], dim=1)  # [b, 3, l]
        weights = scores.masked_fill(attention_mask[:, None] == 0, -torch.inf).softmax(dim=2)
        return ((weights @ tokens).flatten(1) - self.mean) / self.scale


class SentenceForSequenceClassification(PreTrainedModel):
    """encoder → pooling → proj → classifier.

    `forward` takes tokens, or the `features` that `encode` made of them: nothing below `proj` is tuned, so they can be
    computed once.
    """

    config_class = SentenceConfig

    def __init__(self, config: SentenceConfig) -> None:
        super().__init__(config)
        self.encoder = BertModel(config, add_pooling_layer=False)
        self.pooling = Pooling(config.pooled_layers, config.hidden_size)
        features = 3 * len(config.pooled_layers) * config.hidden_size
        self.proj = nn.Linear(features, config.projection, bias=False)
        self.classifier = nn.Linear(config.projection, config.num_labels)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        features: Tensor | None = None,
        labels: Tensor | None = None,
        **kwargs: Any,
    ) -> SequenceClassifierOutput:
        if features is None:
            features = self.encode(input_ids, attention_mask)
        logits = self.classifier(self.proj(features))
        loss = None if labels is None else nn.functional.cross_entropy(logits, labels)
        return SequenceClassifierOutput(loss=loss, logits=logits)

    def encode(self, input_ids: Tensor | None, attention_mask: Tensor | None) -> Tensor:
        """Features of tokenised sentences: (b, 3 × layers × hidden)."""
        assert attention_mask is not None
        encoded = self.encoder(input_ids=input_ids, attention_mask=attention_mask, output_hidden_states=True)
        return self.pooling(encoded.hidden_states, attention_mask)


@torch.no_grad()
def embed(model: SentenceForSequenceClassification, tokenizer: Any, texts: Sequence[str]) -> Tensor:
    """Features of `texts`, in their order: (n, features)."""
    order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
    features = torch.empty(len(texts), model.proj.in_features)
    for start in range(0, len(order), 64):
        chunk = order[start : start + 64]
        batch = tokenizer([texts[i] for i in chunk], truncation=True, max_length=64, padding=True, return_tensors="pt")
        features[chunk] = model.encode(batch["input_ids"], batch["attention_mask"])
    return features


@torch.no_grad()
def start_from_public(
    encoder_path: str, text: Sequence[str], negative: Sequence[str], positive: Sequence[str]
) -> tuple[SentenceForSequenceClassification, Any]:
    """A model that separates two sets of label phrases before it has seen any private example.

    The pooling's query points from the mean of the `negative` phrases to the mean of the `positive` ones, and so does
    the head; the projection between them is a PCA of unlabelled public `text`.

    Returns: the model, and the encoder's tokenizer.
    """
    tokenizer = AutoTokenizer.from_pretrained(encoder_path)
    published = BertConfig.from_pretrained(encoder_path).to_dict()
    del published["model_type"]
    config = SentenceConfig(**published, num_labels=2)
    model = SentenceForSequenceClassification(config).eval()
    model.encoder = BertModel.from_pretrained(encoder_path, add_pooling_layer=False).eval()

    plain = slice(model.pooling.query.numel())  # the means that the query plays no part in
    some = embed(model, tokenizer, text[::8])[:, plain]
    low, high = (embed(model, tokenizer, phrases)[:, plain].mean(0) for phrases in (negative, positive))
    query = (high - low) / some.var(0).clamp_min(1e-6)
    model.pooling.query.copy_(query / (some @ query).std())

    features = embed(model, tokenizer, text)
    model.pooling.mean.copy_(features.mean(0))
    model.pooling.scale.copy_(features.std(0).clamp_min(1e-3))
    features = (features - model.pooling.mean) / model.pooling.scale
    principal = torch.linalg.eigh(features.T @ features).eigenvectors.flip(1)[:, : config.projection].T
    size = math.sqrt(config.projection) / (features @ principal.T).norm(dim=1).mean()
    model.proj.weight.copy_(principal * size)

    low, high = (model.proj(embed(model, tokenizer, phrases)).mean(0) for phrases in (negative, positive))
    projected = model.proj(features)
    direction = (high - low) / (projected @ (high - low)).std()
    middle = (low + high) @ direction / 2
    model.classifier.weight.copy_(torch.stack([-direction, direction]) / 4)
    model.classifier.bias.copy_(torch.stack([middle, -middle]) / 4)
    return model, tokenizer
