"""What is asked of an encoder: a class for a sequence or for each token, a span, a vector."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastattn import ops
from fastattn.losses import contrastive_loss
from fastattn.losses.accumulation import over_items

from . import _checks
from .encoder import Encoder, EncoderConfig
from .outputs import ModelOutput
from .pretrained import Pretrained

POOLINGS = ("cls", "mean", "max")


@dataclass
class HeadConfig:
    """An encoder and the head on it.

    Attributes:
        encoder: the encoder's configuration.
        labels: how many classes (SequenceClassifier, TokenTagger).
        pooling: what stands for a sequence (SequenceClassifier, Embedder): "cls", its first token; "mean" or "max" over its
            tokens.
        pooler: whether what stands for a sequence goes through a linear layer and tanh first, as BERT's does
            (SequenceClassifier).
        dropout: of what the head's linear layer gets, in training.
        normalise: whether an Embedder's vectors have length 1.

    Raises:
        ValueError: sizes or names that do not fit.
    """

    encoder: EncoderConfig
    labels: int = 2
    pooling: str = "cls"
    pooler: bool = False
    dropout: float = 0.0
    normalise: bool = True

    def __post_init__(self) -> None:
        if isinstance(self.encoder, dict):  # from a config.json
            self.encoder = EncoderConfig(**self.encoder)
        _checks.sizes(self, "labels")
        _checks.one_of(self, "pooling", POOLINGS)
        _checks.probabilities(self, "dropout")

    @property
    def layers(self) -> int:
        """The encoder's."""
        return self.encoder.layers


class HeadOutput(ModelOutput):
    """Scores of classes, (batch, labels) or (batch, seq, labels), and, where labels were given, the loss, a scalar."""

    logits: Tensor
    loss: Tensor | None


class SpanOutput(ModelOutput):
    """Scores of each token to be an answer's first and last, (batch, seq) each, -inf at the padding; and the loss."""

    start_logits: Tensor
    end_logits: Tensor
    loss: Tensor | None

    def best_spans(self, longest: int) -> Tensor:
        """(batch, 2), int64: first and last token of the best span of at most `longest` tokens."""
        seq = self.start_logits.shape[1]
        first = torch.arange(seq, device=self.start_logits.device)
        length = first - first[:, None] + 1
        scores = self.start_logits[:, :, None] + self.end_logits[:, None, :]
        best = scores.masked_fill((length < 1) | (length > longest), -torch.inf).flatten(1).argmax(dim=1)
        return torch.stack((best // seq, best % seq), dim=1)


Head = TypeVar("Head", bound="_Head")


class _Head(Pretrained):
    config_class = HeadConfig
    config: HeadConfig

    def __init__(self, config: HeadConfig, encoder: Encoder | None = None, scores: int = 0) -> None:
        super().__init__()
        self.config = config
        self.encoder = Encoder(config.encoder) if encoder is None else encoder
        self.dropout = nn.Dropout(config.dropout)
        if scores:
            self.head = self._linear(scores)

    def _linear(self, out: int) -> nn.Linear:
        like = self.encoder.embedding.weight
        linear = nn.Linear(self.config.encoder.d_model, out, device=like.device, dtype=like.dtype)
        nn.init.normal_(linear.weight, std=self.config.encoder.initial_std)
        nn.init.zeros_(linear.bias)
        return linear

    @classmethod
    def from_encoder(cls: type[Head], encoder: Encoder, **fields: Any) -> Head:
        """A new head on an encoder, such as `Encoder.from_pretrained(folder)`; fields are those of `HeadConfig`."""
        return cls(HeadConfig(encoder.config, **fields), encoder)

    def _scores(self, hidden: Tensor) -> Tensor:
        return ops.linear(self.dropout(hidden), self.head.weight, self.head.bias)


class SequenceClassifier(_Head):
    """A class, or any number of classes, for each sequence: a linear layer on the pooled hidden states. `from_pretrained`
    reads BertForSequenceClassification.

    Args:
        config: see `HeadConfig`.
        encoder: to build on; None makes one.
    """

    def __init__(self, config: HeadConfig, encoder: Encoder | None = None) -> None:
        super().__init__(config, encoder, config.labels)
        self.pooler = self._linear(config.encoder.d_model) if config.pooler else None

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        labels: Tensor | None = None,
        num_items_in_batch: float | Tensor | None = None,
    ) -> HeadOutput:
        """Scores (batch, labels), and the loss given labels.

        Args:
            input_ids, attention_mask, token_type_ids: as `Encoder.forward`'s.
            labels: (batch,), int64: the mean cross entropy, without those that are -100; or (batch, labels), floating,
                0 to 1: the mean binary cross entropy of each class by itself.
            num_items_in_batch: what the sum of the losses is divided by in the place of the number of labels that count: for
                gradients accumulated over parts of a batch, how many count in all of them.
        """
        hidden = self.encoder(input_ids, attention_mask, token_type_ids)
        pooled = pool(hidden, attention_mask, self.config.pooling)
        if self.pooler is not None:
            pooled = ops.linear(pooled, self.pooler.weight, self.pooler.bias).tanh()
        logits = self._scores(pooled)
        if labels is None:
            return HeadOutput(logits=logits)
        if not labels.is_floating_point():
            return HeadOutput(logits=logits, loss=_mean(F.cross_entropy, logits, labels, num_items_in_batch))
        _checks.same_shape("labels", labels, "logits", logits)
        labels = labels.to(_wide(logits).dtype)
        loss = _mean(F.binary_cross_entropy_with_logits, logits, labels, num_items_in_batch)
        return HeadOutput(logits=logits, loss=loss)


class TokenTagger(_Head):
    """A class for each token: a linear layer on its hidden state. `from_pretrained` reads BertForTokenClassification.

    Args:
        config: see `HeadConfig`.
        encoder: to build on; None makes one.
    """

    def __init__(self, config: HeadConfig, encoder: Encoder | None = None) -> None:
        super().__init__(config, encoder, config.labels)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        labels: Tensor | None = None,
        num_items_in_batch: float | Tensor | None = None,
    ) -> HeadOutput:
        """Scores (batch, seq, labels), and the mean cross entropy given labels.

        Args:
            input_ids, attention_mask, token_type_ids: as `Encoder.forward`'s.
            labels: (batch, seq), int64; -100 is ignored, and so is the padding.
            num_items_in_batch: as `SequenceClassifier.forward`'s.
        """
        logits = self._scores(self.encoder(input_ids, attention_mask, token_type_ids))
        if labels is None:
            return HeadOutput(logits=logits)
        _checks.same_shape("labels", labels, "input_ids", input_ids)
        if attention_mask is not None:
            labels = labels.masked_fill(~attention_mask.bool(), -100)
        loss = _mean(F.cross_entropy, logits.flatten(0, 1), labels.flatten(), num_items_in_batch)
        return HeadOutput(logits=logits, loss=loss)


class SpanAnswerer(_Head):
    """Where the answer stands in a sequence: a linear layer scores each token as its first and as its last. `from_pretrained`
    reads BertForQuestionAnswering.

    Args:
        config: see `HeadConfig`.
        encoder: to build on; None makes one.

    Source: Devlin et al., 2019.
    """

    def __init__(self, config: HeadConfig, encoder: Encoder | None = None) -> None:
        super().__init__(config, encoder, 2)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        labels: Tensor | None = None,
        num_items_in_batch: float | Tensor | None = None,
    ) -> SpanOutput:
        """Scores, and given labels the mean of the cross entropies of first and last.

        Args:
            input_ids, attention_mask, token_type_ids: as `Encoder.forward`'s.
            labels: (batch, 2), int64: places of the answer's first and last token; -100 for none, which is ignored.
            num_items_in_batch: as `SequenceClassifier.forward`'s; first and last tokens count each by itself.
        """
        logits = self._scores(self.encoder(input_ids, attention_mask, token_type_ids))
        if attention_mask is not None:
            logits = logits.masked_fill(~attention_mask.bool()[..., None], -torch.inf)
        start, end = logits.unbind(-1)
        if labels is None:
            return SpanOutput(start_logits=start, end_logits=end)
        _checks.shape("labels", labels, "(batch, 2)", (input_ids.shape[0], 2))
        first, last = (
            _mean(F.cross_entropy, scores, place, num_items_in_batch)
            for scores, place in zip((start, end), labels.unbind(1), strict=True)
        )
        # Each has a mean of its own, unless both are divided by the number of both.
        loss = (first + last) / 2 if num_items_in_batch is None else first + last
        return SpanOutput(start_logits=start, end_logits=end, loss=loss)


class Embedder(_Head):
    """A vector for each sequence: its pooled hidden states, of length 1 where config.normalise.

    Args:
        config: see `HeadConfig`.
        encoder: to build on; None makes one.

    Source: Reimers and Gurevych, "Sentence-BERT", 2019.
    """

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, token_type_ids: Tensor | None = None
    ) -> Tensor:
        """(batch, d_model). Arguments as `Encoder.forward`'s."""
        pooled = pool(self.encoder(input_ids, attention_mask, token_type_ids), attention_mask, self.config.pooling)
        return F.normalize(pooled, dim=-1) if self.config.normalise else pooled

    def contrastive_loss(
        self,
        query: Mapping[str, Tensor],
        positive: Mapping[str, Tensor],
        temperature: float | Tensor = 0.05,
        symmetric: bool = False,
    ) -> Tensor:
        """`fastattn.losses.contrastive_loss` of pairs: each query should be nearest to its own positive, of all in the batch.

        Args:
            query, positive: the arguments of `forward` by name, as tokenizers give them, for equally many sequences.
            temperature, symmetric: as `fastattn.losses.contrastive_loss`'s.
        """
        return contrastive_loss(self(**query), self(**positive), temperature=temperature, symmetric=symmetric)


def pool(hidden: Tensor, attention_mask: Tensor | None, pooling: str) -> Tensor:
    """One row for each sequence of hidden (batch, seq, dim), over the tokens that the mask keeps; zeros where there is none.

    Args:
        hidden: zeros at the padding.
        attention_mask: (batch, seq), true at the tokens; None for all.
        pooling: "cls" (the first token), "mean" or "max".
    """
    if attention_mask is None:
        return {"cls": lambda: hidden[:, 0], "mean": lambda: hidden.mean(1), "max": lambda: hidden.amax(1)}[pooling]()
    kept = attention_mask.bool()
    if pooling == "cls":
        first = kept.int().argmax(dim=1)
        return hidden[torch.arange(hidden.shape[0], device=hidden.device), first]
    if pooling == "mean":
        return hidden.sum(1) / kept.sum(1, keepdim=True).clamp(min=1)
    nothing = ~kept.any(dim=1, keepdim=True)
    return hidden.masked_fill(~kept[..., None], -torch.inf).amax(1).masked_fill(nothing, 0.0)


def _mean(
    loss: Callable[..., Tensor], scores: Tensor, labels: Tensor, num_items_in_batch: float | Tensor | None
) -> Tensor:
    """The loss, one of torch's, over the labels that count here, or over as many as the whole batch has."""
    scores = _wide(scores)
    if num_items_in_batch is None:
        return loss(scores, labels)
    return over_items(loss(scores, labels, reduction="sum"), num_items_in_batch)


def _wide(x: Tensor) -> Tensor:
    """Losses are computed in float32 or wider."""
    return x if x.dtype == torch.float64 else x.float()
