"""A T5-like encoder and decoder."""

from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fastattn import ops
from fastattn.losses import language_modelling_loss
from fastattn.nn import FeedForward, RelativePositionBias, RMSNorm
from fastattn.nn.packed_sequences import PackedSequences

from . import _checks
from .cache import EncoderDecoderCache, KeyValueCache
from .decoder import LanguageModelOutput
from .layers import PreNormLayer
from .pretrained import Pretrained
from .self_attention import Continued, CrossAttention, Memory, Packed, Remembered, SelfAttention, Tokens, Whole


@dataclass
class EncoderDecoderConfig:
    """What an `EncoderDecoder` is made of. The defaults are T5's; 1.1 and mT5 have "gelu_tanh", gated, and a head of its own,
    which is not scaled.

    Attributes:
        vocab_size, d_model, layers, heads: sizes; layers is the encoder's.
        decoder_layers: None for layers.
        head_dim: None for d_model / heads.
        dim_feedforward: hidden width of the feed-forward network; None for 4 · d_model.
        buckets, max_distance: of the relative position bias.
        norm_eps: eps of the RMS norms.
        activation: "relu", "gelu_tanh", "gelu" or "silu". gated: whether the feed-forward network is gated.
        tied_head: whether the head's weight is the embedding's.
        scaled_head: whether hidden states are multiplied by 1 / sqrt(d_model) before the head.
        dropout: of embeddings, attention weights, hidden layers and each branch before it is added, in training.
        start_token: what the decoder begins with.
        checkpoint: in training, keep each layer's inputs alone and compute the rest again in the backward.

    Raises:
        ValueError: sizes or names that do not fit.
    """

    vocab_size: int
    d_model: int
    layers: int
    heads: int
    decoder_layers: int | None = None
    head_dim: int | None = None
    dim_feedforward: int | None = None
    buckets: int = 32
    max_distance: int = 128
    norm_eps: float = 1e-6
    activation: str = "relu"
    gated: bool = False
    tied_head: bool = True
    scaled_head: bool = True
    dropout: float = 0.0
    start_token: int = 0
    checkpoint: bool = False

    def __post_init__(self) -> None:
        self.decoder_layers = self.layers if self.decoder_layers is None else self.decoder_layers
        self.dim_feedforward = 4 * self.d_model if self.dim_feedforward is None else self.dim_feedforward
        _checks.sizes(self, "vocab_size", "d_model", "layers", "heads", "decoder_layers", "dim_feedforward")
        if self.head_dim is None:
            _checks.divides("heads", self.heads, "d_model", self.d_model)
            self.head_dim = self.d_model // self.heads
        _checks.sizes(self, "head_dim")
        _checks.probabilities(self, "dropout")


class Stack(nn.Module):
    """Pre-norm layers, which share one relative position bias, and a norm: T5's encoder or its decoder."""

    def __init__(self, config: EncoderDecoderConfig, decoder: bool) -> None:
        super().__init__()
        self.config, self.decoder = config, decoder
        count = cast(int, config.decoder_layers) if decoder else config.layers
        self.bias = RelativePositionBias(config.heads, config.buckets, config.max_distance, bidirectional=not decoder)
        self.layers = nn.ModuleList(self._layer(number) for number in range(count))
        self.norm = RMSNorm(config.d_model, config.norm_eps)
        self.dropout = nn.Dropout(config.dropout)

    def _layer(self, number: int) -> PreNormLayer:
        config, p = self.config, self.config.dropout
        width, heads, head_dim = config.d_model, config.heads, cast(int, config.head_dim)
        return PreNormLayer(
            SelfAttention(number, width, heads, heads, head_dim, False, p, scale=1.0),
            FeedForward(width, config.dim_feedforward, config.activation, config.gated, dropout=p, bias=False),
            [RMSNorm(width, config.norm_eps) for _ in range(3 if self.decoder else 2)],
            p,
            CrossAttention(number, width, heads, head_dim, False, p, scale=1.0) if self.decoder else None,
        )

    def forward(self, x: Tensor, sequences: PackedSequences | None, memory: Memory | None = None) -> Tensor:
        """x (batch, seq, d_model), or (1, tokens, d_model) of sequences laid end to end, to the same."""
        longest = x.shape[1] if sequences is None else sequences.max_seqlen
        bias = self.bias(longest)
        tokens = Whole(self.decoder, bias) if sequences is None else Packed(self.decoder, sequences, bias)
        return self.run(x, tokens, memory)

    def run(self, x: Tensor, tokens: Tokens, memory: Memory | Remembered | None) -> Tensor:
        """The same for any kind of tokens, which has the bias."""
        x, branch = self.dropout(x), cast(Any, None)
        recompute = self.config.checkpoint and self.training and torch.is_grad_enabled()
        for layer in self.layers:
            if recompute:
                branch, x = checkpoint(layer, branch, x, tokens, None, memory, use_reentrant=False)
            else:
                branch, x = layer(branch, x, tokens, None, memory)
        return self.dropout(self.norm(branch, x, dropout_p=self.config.dropout if self.training else 0.0)[0])


class EncoderDecoder(Pretrained):
    """A Transformer from sequences to sequences: relative position biases, RMS norms, no biases, one embedding for both sides.

    Args:
        config: see `EncoderDecoderConfig`.

    Source: Raffel et al., "Exploring the Limits of Transfer Learning with a Unified Text-to-Text Transformer", 2020;
        gated: Shazeer, 2020.
    """

    config_class = EncoderDecoderConfig
    config: EncoderDecoderConfig

    def __init__(self, config: EncoderDecoderConfig) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, config.d_model)
        self.encoder = Stack(config, decoder=False)
        self.decoder = Stack(config, decoder=True)
        self.head = None if config.tied_head else nn.Linear(config.d_model, config.vocab_size, bias=False)
        self._initialise()

    def _initialise(self) -> None:
        """As T5: attention is not scaled, so that queries start smaller by what the scale would be."""
        width, head_dim = self.config.d_model, cast(int, self.config.head_dim)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=module.in_features**-0.5)
            elif isinstance(module, RelativePositionBias):
                nn.init.normal_(module.relative_attention_bias.weight, std=width**-0.5)
        for module in self.modules():
            if isinstance(module, SelfAttention):
                nn.init.normal_(module.qkv.weight[: module.heads[0] * head_dim], std=(width * head_dim) ** -0.5)
            elif isinstance(module, CrossAttention):
                nn.init.normal_(module.query.weight, std=(width * head_dim) ** -0.5)
        nn.init.normal_(self.embedding.weight, std=1.0)

    @property
    def head_weight(self) -> Tensor:
        """(vocab_size, d_model), the embedding's where tied."""
        return self.embedding.weight if self.head is None else self.head.weight

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        decoder_input_ids: Tensor | None = None,
        decoder_attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        num_items_in_batch: float | Tensor | None = None,
    ) -> LanguageModelOutput:
        """The decoder's hidden states and, given labels, the mean cross entropy; the logits never exist.

        Args:
            input_ids: (batch, seq), int64 or int32, what is read.
            attention_mask: (batch, seq), true at its tokens; padding is not computed, wherever it stands.
            decoder_input_ids: (batch, target), what has been written; None for labels, moved by one behind start_token.
            decoder_attention_mask: (batch, target), true at the tokens of decoder_input_ids.
            labels: (batch, target), int64: what the decoder should say at each place; -100 is ignored.
            num_items_in_batch: what the sum of the losses is divided by in the place of the number of labels that count: for
                gradients accumulated over parts of a batch, how many count in all of them.

        Raises:
            TypeError: wrong dtypes.
            ValueError: shapes that do not fit; neither decoder_input_ids nor labels.
        """
        _checks.token_ids("input_ids", input_ids)
        if decoder_input_ids is None:
            if labels is None:
                raise ValueError(
                    "decoder_input_ids and labels are both None; pass what the decoder has written, or should"
                )
            _checks.token_ids("labels", labels)
            decoder_input_ids = F.pad(labels[:, :-1], (1, 0), value=self.config.start_token)
            decoder_input_ids = decoder_input_ids.masked_fill(decoder_input_ids == -100, 0)
        _checks.token_ids("decoder_input_ids", decoder_input_ids)
        if labels is not None:
            _checks.same_shape("labels", labels, "decoder_input_ids", decoder_input_ids)
        if decoder_input_ids.shape[0] != input_ids.shape[0]:
            raise ValueError(
                f"decoder_input_ids has batch {decoder_input_ids.shape[0]} but input_ids has {input_ids.shape[0]}; they "
                f"must be equal"
            )
        kept = _checks.kept_tokens(attention_mask, input_ids)
        decoder_kept = _checks.kept_tokens(decoder_attention_mask, decoder_input_ids, "decoder_")
        if kept is None and decoder_kept is None:
            memory = Memory(self.encoder(self.embedding(input_ids), None))
            hidden = self.decoder(self.embedding(decoder_input_ids), None, memory)
            return LanguageModelOutput(hidden=hidden, loss=self._loss(hidden, labels, num_items_in_batch))
        read, written = (
            PackedSequences.from_padding(torch.ones_like(ids, dtype=torch.bool) if mask is None else mask)
            for ids, mask in ((input_ids, kept), (decoder_input_ids, decoder_kept))
        )
        memory = Memory(self.encoder(self.embedding(read.pack(input_ids)), read), written, read)
        packed = self.decoder(self.embedding(written.pack(decoder_input_ids)), written, memory)
        loss = self._loss(packed, None if labels is None else written.pack(labels), num_items_in_batch)
        return LanguageModelOutput(hidden=written.unpack(packed, *decoder_input_ids.shape), loss=loss)

    def new_cache(self, batch: int, longest: int, new: int) -> EncoderDecoderCache:
        """An empty cache to read `batch` sequences of at most `longest` tokens and to write at most `new` for each, in the
        model's dtype and on its device."""
        config, like = self.config, self.embedding.weight
        layers, heads, head_dim = cast(int, config.decoder_layers), config.heads, cast(int, config.head_dim)
        read, written = (
            KeyValueCache(layers, batch, heads, room, head_dim, dtype=like.dtype, device=like.device)
            for room in (longest, new)
        )
        return EncoderDecoderCache(read, written)

    @torch.no_grad()
    def prefill(self, input_ids: Tensor, cu_seqlens: Tensor, max_seqlen: int, cache: EncoderDecoderCache) -> Tensor:
        """Reads sequences of any lengths, laid end to end, and begins to write with config.start_token.

        Args:
            input_ids: (tokens,), what is read, one sequence after the other.
            cu_seqlens: (batch + 1,), int32, where each begins, ending at tokens; none is empty.
            max_seqlen: the longest.
            cache: of `new_cache(batch, …)`, empty.

        Returns:
            (batch, d_model), the hidden state of each start token; `logits` of it say what comes first.

        Raises:
            TypeError, ValueError: dtypes or shapes that do not fit, an empty sequence, a cache that is full or too short.
        """
        read, written = cache.read, cache.written
        places = read.places(input_ids, cu_seqlens, max_seqlen)
        hidden = self.encoder(self.embedding(input_ids.unsqueeze(0)), places)
        for layer in self.decoder.layers:
            cast(PreNormLayer, layer).cross.remember(hidden, read, places)  # type: ignore[union-attr]
        read.advance(cu_seqlens.diff(), max_seqlen)
        cache.bias = self.decoder.bias(1, written.capacity, offset=written.capacity - 1)
        start = torch.full((cache.batch, 1), self.config.start_token, device=input_ids.device)
        return self.decode(start, cache).squeeze(1)

    @torch.no_grad()
    def decode(self, input_ids: Tensor, cache: EncoderDecoderCache) -> Tensor:
        """Reads the next token that was written for each sequence in the cache, and puts it there.

        Args:
            input_ids: (batch, 1), int64 or int32, the tokens that follow those in the cache.
            cache: as `prefill` left it.

        Returns:
            (batch, 1, d_model), their hidden states.

        Raises:
            TypeError, ValueError: dtypes or shapes that do not fit, a cache without room or not filled.
        """
        _checks.continued(input_ids, cache.batch)
        if input_ids.shape[1] != 1:
            raise ValueError(
                f"input_ids has {input_ids.shape[1]} tokens a sequence; expected (batch, 1), one at a time"
            )
        if cache.bias is None:
            raise ValueError("the cache is empty; call prefill first, which reads what the decoder attends to")
        written = cache.written
        written.check_room(1)
        tokens = Continued(written, cache.bias[..., written.capacity - written.longest - 1 :])
        hidden = self.decoder.run(self.embedding(input_ids), tokens, Remembered(cache.read))
        written.advance(1, 1)
        return hidden

    def logits(self, hidden: Tensor) -> Tensor:
        """hidden (…, d_model) to (…, vocab_size)."""
        return ops.linear(self._scaled(hidden), self.head_weight)

    def _scaled(self, hidden: Tensor) -> Tensor:
        return hidden * self.config.d_model**-0.5 if self.config.scaled_head else hidden

    def _loss(self, hidden: Tensor, labels: Tensor | None, items: float | Tensor | None) -> Tensor | None:
        if labels is None:
            return None
        scaled = self._scaled(hidden)
        return language_modelling_loss(scaled, self.head_weight, labels, shift=False, num_items_in_batch=items)
