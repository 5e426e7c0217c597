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

POSITIVE = [
    "a great, moving film",
    "a wonderful, funny and touching movie",
    "brilliant, superb and enjoyable",
    "excellent performances and a charming story",
    "smart, fresh and original",
    "a warm, honest and beautifully acted drama",
    "one of the best films of the year",
    "well worth seeing",
]
NEGATIVE = [
    "a dull, terrible movie",
    "a boring, awful and tedious film",
    "stupid, bad and disappointing",
    "poor performances and a lifeless story",
    "stale, lazy and predictable",
    "a cold, fake and badly acted drama",
    "one of the worst films of the year",
    "a waste of time and money",
]


class SentenceConfig(BertConfig):
    """A BERT encoder's config, with the layers that are pooled and the size that they are projected to."""

    model_type = "sentence_bert"

    def __init__(self, pooled_layers: Sequence[int] = (3, 4, 5, 6), projection: int = 256, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.pooled_layers = list(pooled_layers)
        self.projection = projection


class Pooling(nn.Module):
    """Mean over tokens of some layers' hidden states, standardized with public statistics: (b, layers × hidden)."""

    def __init__(self, layers: Sequence[int], hidden: int) -> None:
        super().__init__()
        self.layers = list(layers)
        self.register_buffer("mean", torch.zeros(len(self.layers) * hidden))
        self.register_buffer("scale", torch.ones(len(self.layers) * hidden))

    def forward(self, hidden_states: Sequence[Tensor], attention_mask: Tensor) -> Tensor:
        weights = attention_mask[..., None].to(hidden_states[0].dtype)  # [b, l, 1]
        pooled = [(hidden_states[i] * weights).sum(1) / weights.sum(1) for i in self.layers]
        return (torch.cat(pooled, dim=1) - self.mean) / self.scale


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
        features = len(config.pooled_layers) * config.hidden_size
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
        """Features of tokenized sentences: (b, layers × hidden)."""
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

    The projection is a mildly whitened PCA of unlabelled public `text`; the head points from the mean of the
    `negative` phrases to the mean of the `positive` ones.

    Returns: the model, and the encoder's tokenizer.
    """
    tokenizer = AutoTokenizer.from_pretrained(encoder_path)
    published = BertConfig.from_pretrained(encoder_path).to_dict()
    del published["model_type"]
    config = SentenceConfig(**published, num_labels=2)
    model = SentenceForSequenceClassification(config).eval()
    model.encoder = BertModel.from_pretrained(encoder_path, add_pooling_layer=False).eval()

    features = embed(model, tokenizer, text)
    model.pooling.mean.copy_(features.mean(0))
    layers = (features - model.pooling.mean).view(len(text), -1, config.hidden_size)
    scale = layers.square().mean(dim=(0, 2)).sqrt()
    model.pooling.scale.copy_(scale.repeat_interleave(config.hidden_size))

    features = (features - model.pooling.mean) / model.pooling.scale
    directions, singular, _ = torch.linalg.svd((features / math.sqrt(len(text))).T, full_matrices=False)
    variance = singular.square()
    size = config.projection
    whitening = (variance[:size] + 0.1 * variance.mean()) ** -0.25
    projection = (directions[:, :size] * whitening).T
    projection *= math.sqrt(size) / (features @ projection.T).norm(dim=1).mean()
    model.proj.weight.copy_(projection)

    low, high = (embed(model, tokenizer, phrases).mean(0) for phrases in (negative, positive))
    direction = (directions[:, :size].T @ (high - low)) / whitening
    direction /= (features @ projection.T @ direction).std()
    middle = (low + high) @ projection.T @ direction / 2
    model.classifier.weight.copy_(torch.stack([-direction, direction]) / 4)
    model.classifier.bias.copy_(torch.stack([middle, -middle]) / 4)
    return model, tokenizer
