"""A BERT-like encoder."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fastattn.nn import FeedForward, LayerNorm
from fastattn.nn.packed_sequences import PackedSequences

from . import _checks
from .layers import PostNormLayer, initialise
from .pretrained import Pretrained
from .self_attention import Packed, SelfAttention, Tokens, Whole


@dataclass
class EncoderConfig:
    """What an `Encoder` is made of.

    Attributes:
        vocab_size, d_model, layers, heads: sizes; heads divides d_model.
        dim_feedforward: hidden width of the feed-forward network; None for 4 · d_model.
        max_positions: the longest sequence.
        token_types: how many kinds of tokens there are (first and second sentence).
        norm_eps: eps of the layer norms.
        activation: "gelu", "gelu_tanh", "relu" or "silu".
        dropout: of embeddings and of each branch before it is added, in training.
        attention_dropout: of attention weights, in training.
        initial_std: standard deviation of weights at the start.
        checkpoint: in training, keep each layer's inputs alone and compute the rest again in the backward.

    Raises:
        ValueError: sizes or names that do not fit.
    """

    vocab_size: int
    d_model: int
    layers: int
    heads: int
    dim_feedforward: int | None = None
    max_positions: int = 512
    token_types: int = 2
    norm_eps: float = 1e-12
    activation: str = "gelu"
    dropout: float = 0.0
    attention_dropout: float = 0.0
    initial_std: float = 0.02
    checkpoint: bool = False

    def __post_init__(self) -> None:
        self.dim_feedforward = 4 * self.d_model if self.dim_feedforward is None else self.dim_feedforward
        _checks.sizes(
            self, "vocab_size", "d_model", "layers", "heads", "dim_feedforward", "max_positions", "token_types"
        )
        _checks.divides("heads", self.heads, "d_model", self.d_model)
        _checks.probabilities(self, "dropout", "attention_dropout")


class Encoder(Pretrained):
    """A bidirectional Transformer: the sum of three embeddings and its norm, then post-norm layers. There is no pooler.

    Args:
        config: see `EncoderConfig`.

    Source: Devlin et al., "BERT: Pre-training of Deep Bidirectional Transformers for Language Understanding", 2019.
    """

    config_class = EncoderConfig
    config: EncoderConfig

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, config.d_model)
        self.positions = nn.Embedding(config.max_positions, config.d_model)
        self.token_types = nn.Embedding(config.token_types, config.d_model)
        self.norm = LayerNorm(config.d_model, config.norm_eps)
        self.dropout = nn.Dropout(config.dropout)
        self.layers = nn.ModuleList(self._layer(number) for number in range(config.layers))
        initialise(self, config.initial_std)

    def _layer(self, number: int) -> PostNormLayer:
        config = self.config
        sizes = (config.d_model, config.heads, config.heads, config.d_model // config.heads)
        return PostNormLayer(
            SelfAttention(number, *sizes, True, config.attention_dropout),
            FeedForward(config.d_model, config.dim_feedforward, config.activation),
            [LayerNorm(config.d_model, config.norm_eps) for _ in range(2)],
            config.dropout,
        )

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, token_type_ids: Tensor | None = None
    ) -> Tensor:
        """Hidden states (batch, seq, d_model) of all tokens; zeros at the padding, which is not computed.

        Args:
            input_ids: (batch, seq), int64 or int32.
            attention_mask: (batch, seq), bool or numbers, true at the tokens. A token's position is the number of tokens
                before it, so padding may stand anywhere.
            token_type_ids: (batch, seq), integers; None for 0.

        Raises:
            TypeError: wrong dtypes.
            ValueError: shapes that do not fit, or a sequence longer than max_positions.
        """
        _checks.token_ids("input_ids", input_ids)
        if token_type_ids is None:
            token_type_ids = torch.zeros_like(input_ids)
        _checks.token_ids("token_type_ids", token_type_ids)
        _checks.same_shape("token_type_ids", token_type_ids, "input_ids", input_ids)
        kept = _checks.kept_tokens(attention_mask, input_ids)
        if kept is None:
            return self._run(input_ids, token_type_ids, Whole(causal=False), input_ids.shape[1])
        sequences = PackedSequences.from_padding(kept)
        tokens = Packed(False, sequences)
        hidden = self._run(sequences.pack(input_ids), sequences.pack(token_type_ids), tokens, sequences.max_seqlen)
        return sequences.unpack(hidden, *input_ids.shape)

    def _run(self, input_ids: Tensor, token_type_ids: Tensor, tokens: Tokens, longest: int) -> Tensor:
        _checks.within_positions(longest, self.config.max_positions)
        x = self.embedding(input_ids) + self.positions(tokens.positions(input_ids)) + self.token_types(token_type_ids)
        x = self.dropout(self.norm(x))
        recompute = self.config.checkpoint and self.training and torch.is_grad_enabled()
        for layer in self.layers:
            x = checkpoint(layer, x, tokens, use_reentrant=False) if recompute else layer(x, tokens)
        return x
