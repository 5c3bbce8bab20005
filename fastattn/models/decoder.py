"""A decoder-only language model: GPT-like and Llama-like, by its configuration."""

from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fastattn import ops
from fastattn.losses import language_modelling_loss
from fastattn.nn import FeedForward, RotaryEmbedding
from fastattn.nn.packed_sequences import PackedSequences

from . import _checks
from .cache import KeyValueCache
from .layers import PreNormLayer, initialise, last_norm, make_norm
from .outputs import ModelOutput
from .pretrained import Pretrained
from .self_attention import Angles, Continued, Packed, Prompts, SelfAttention, Tokens, Whole


@dataclass
class DecoderLMConfig:
    """What a `DecoderLM` is made of. The defaults are GPT-2's; `llama_like` has Llama's.

    Attributes:
        vocab_size, d_model, layers, heads: sizes.
        kv_heads: heads of keys and values, a divisor of heads; None for heads.
        head_dim: None for d_model / heads.
        dim_feedforward: hidden width of the feed-forward network; None for 4 · d_model.
        max_positions: the longest sequence with learnt positions; of rotary ones there are any number.
        positions: "learned" or "rotary".
        rope_theta: base of the rotary angles.
        norm: "layer" or "rms". norm_eps: its eps.
        activation: "gelu_tanh", "gelu", "relu" or "silu".
        gated: whether the feed-forward network is gated ("silu" and gated is SwiGLU).
        bias: whether linear layers have a bias.
        tied_head: whether the head's weight is the embedding's.
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
    kv_heads: int | None = None
    head_dim: int | None = None
    dim_feedforward: int | None = None
    max_positions: int = 1024
    positions: str = "learned"
    rope_theta: float = 10000.0
    norm: str = "layer"
    norm_eps: float = 1e-5
    activation: str = "gelu_tanh"
    gated: bool = False
    bias: bool = True
    tied_head: bool = True
    dropout: float = 0.0
    attention_dropout: float = 0.0
    initial_std: float = 0.02
    checkpoint: bool = False

    def __post_init__(self) -> None:
        self.kv_heads = self.heads if self.kv_heads is None else self.kv_heads
        self.dim_feedforward = 4 * self.d_model if self.dim_feedforward is None else self.dim_feedforward
        _checks.sizes(self, "vocab_size", "d_model", "layers", "heads", "kv_heads", "dim_feedforward", "max_positions")
        if self.head_dim is None:
            _checks.divides("heads", self.heads, "d_model", self.d_model)
            self.head_dim = self.d_model // self.heads
        _checks.sizes(self, "head_dim")
        _checks.divides("kv_heads", self.kv_heads, "heads", self.heads)
        _checks.one_of(self, "positions", ("learned", "rotary"))
        _checks.one_of(self, "norm", ("layer", "rms"))
        _checks.probabilities(self, "dropout", "attention_dropout")

    @property
    def head_sizes(self) -> tuple[int, int, int]:
        """(heads, kv_heads, head_dim)."""
        return self.heads, cast(int, self.kv_heads), cast(int, self.head_dim)

    @classmethod
    def llama_like(cls, vocab_size: int, d_model: int, layers: int, heads: int, **changes: Any) -> "DecoderLMConfig":
        """Rotary positions, RMS norm, SwiGLU, no biases, a head of its own; changes are any other fields."""
        fields: dict[str, Any] = {
            "positions": "rotary",
            "norm": "rms",
            "norm_eps": 1e-6,
            "activation": "silu",
            "gated": True,
            "bias": False,
            "tied_head": False,
        }
        return cls(vocab_size, d_model, layers, heads, **(fields | changes))


class LanguageModelOutput(ModelOutput):
    """What a language model gives. There are no logits in it, which would be larger than all else that the model computes.

    So what Hugging Face's Trainer collects as predictions of a language model are hidden states, unless
    `prediction_loss_only=True` or its evaluation has nothing to compute but the loss. A `preprocess_logits_for_metrics` of
    `lambda hidden, labels: model.logits(hidden).argmax(-1)` makes tokens of them, batch by batch.

    Attributes:
        hidden: (batch, seq, d_model), behind the last norm; zeros at the padding. `model.logits` makes logits of it.
        loss: a scalar, float32 (float64 for float64), where labels were given.
    """

    hidden: Tensor
    loss: Tensor | None


class DecoderLM(Pretrained):
    """A causal language model: embeddings, pre-norm layers, a norm, and a head.

    Args:
        config: see `DecoderLMConfig`.

    Source: Radford et al., 2019 (GPT-2); Touvron et al., 2023 (Llama).
    """

    config_class = DecoderLMConfig
    config: DecoderLMConfig
    # Tells Hugging Face's Trainer that no label stands for a target at a sequence's first place, where it counts them.
    loss_type = "ForCausalLM"

    def __init__(self, config: DecoderLMConfig) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, config.d_model)
        learned = config.positions == "learned"
        self.positions = nn.Embedding(config.max_positions, config.d_model) if learned else None
        self.rotary = None if learned else RotaryEmbedding(config.head_sizes[2], base=config.rope_theta)
        self.dropout = nn.Dropout(config.dropout)
        self.layers = nn.ModuleList(self._layer(number) for number in range(config.layers))
        self.norm = make_norm(config.norm, config.d_model, config.norm_eps)
        self.head = None if config.tied_head else nn.Linear(config.d_model, config.vocab_size, bias=False)
        initialise(self, config.initial_std, 2 * config.layers)

    def _layer(self, number: int) -> PreNormLayer:
        config = self.config
        sizes = (config.d_model, *config.head_sizes)
        return PreNormLayer(
            SelfAttention(number, *sizes, config.bias, config.attention_dropout),
            FeedForward(config.d_model, config.dim_feedforward, config.activation, config.gated, bias=config.bias),
            [make_norm(config.norm, config.d_model, config.norm_eps) for _ in range(2)],
            config.dropout,
        )

    @property
    def head_weight(self) -> Tensor:
        """(vocab_size, d_model), the embedding's where tied."""
        return self.embedding.weight if self.head is None else self.head.weight

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        num_items_in_batch: float | Tensor | None = None,
    ) -> LanguageModelOutput:
        """Hidden states of all tokens and, given labels, the mean cross entropy; the logits never exist.

        Args:
            input_ids: (batch, seq), int64 or int32.
            attention_mask: (batch, seq), bool or numbers, true at the tokens; padding may stand anywhere and is not
                computed. A token's position is the number of tokens before it, whatever the padding.
            labels: (batch, seq), int64, lying as input_ids does (often input_ids itself): the token at i is asked for
                the label of the next token. -100 is ignored, and so are labels at the padding.
            num_items_in_batch: what the sum of the losses is divided by in the place of the number of labels that count: for
                gradients accumulated over parts of a batch, how many count in all of them.

        Raises:
            TypeError: wrong dtypes.
            ValueError: shapes that do not fit, or a sequence longer than the learnt positions.
        """
        _checks.token_ids("input_ids", input_ids)
        if labels is not None:
            _checks.same_shape("labels", labels, "input_ids", input_ids)
        shape = input_ids.shape
        kept = _checks.kept_tokens(attention_mask, input_ids)
        if kept is None:
            hidden = self._run(input_ids, Whole(causal=True), shape[1])
            cu_seqlens = None
        else:
            sequences = PackedSequences.from_padding(kept)
            hidden = self._run(sequences.pack(input_ids), Packed(True, sequences), sequences.max_seqlen)
            labels = None if labels is None else sequences.pack(labels)
            cu_seqlens = sequences.cu_seqlens
        loss = None
        if labels is not None:
            loss = language_modelling_loss(
                hidden, self.head_weight, labels, cu_seqlens=cu_seqlens, num_items_in_batch=num_items_in_batch
            )
        return LanguageModelOutput(hidden=hidden if kept is None else sequences.unpack(hidden, *shape), loss=loss)

    def logits(self, hidden: Tensor) -> Tensor:
        """hidden (…, d_model) to (…, vocab_size)."""
        return ops.linear(hidden, self.head_weight)

    def new_cache(self, batch: int, longest: int, new: int) -> KeyValueCache:
        """An empty cache for `batch` prompts of at most `longest` tokens with at most `new` behind each, in the model's dtype
        and on its device."""
        config, like = self.config, self.embedding.weight
        _, kv_heads, head_dim = config.head_sizes
        return KeyValueCache(
            config.layers, batch, kv_heads, longest + new, head_dim, dtype=like.dtype, device=like.device
        )

    @torch.no_grad()
    def prefill(self, input_ids: Tensor, cu_seqlens: Tensor, max_seqlen: int, cache: KeyValueCache) -> Tensor:
        """Reads prompts of any lengths, laid end to end, into an empty cache.

        Args:
            input_ids: (tokens,), the prompts one after the other.
            cu_seqlens: (batch + 1,), int32, where each begins, ending at tokens; no prompt is empty.
            max_seqlen: the longest prompt.
            cache: of `new_cache(batch, …)`, empty.

        Returns:
            (batch, d_model), the hidden state of each prompt's last token; `logits` of it say what comes next.

        Raises:
            TypeError, ValueError: dtypes or shapes that do not fit, an empty prompt, a cache that is full or too short.
        """
        tokens = Prompts(True, cache.places(input_ids, cu_seqlens, max_seqlen), cache=cache)
        ends = cu_seqlens[1:].long() - 1
        hidden = self._run(input_ids.unsqueeze(0), tokens, max_seqlen, ends)
        cache.advance(cu_seqlens.diff(), max_seqlen)
        return hidden.squeeze(0)

    @torch.no_grad()
    def decode(self, input_ids: Tensor, cache: KeyValueCache) -> Tensor:
        """Reads the next tokens of each sequence in the cache, and puts them there.

        Args:
            input_ids: (batch, new), int64 or int32, `new` tokens that follow those in the cache.
            cache: as `prefill` left it.

        Returns:
            (batch, new, d_model), their hidden states.

        Raises:
            TypeError, ValueError: dtypes or shapes that do not fit, a cache without room.
        """
        _checks.continued(input_ids, cache.batch)
        new = input_ids.shape[1]
        cache.check_room(new)
        hidden = self._run(input_ids, Continued(cache), cache.longest + new)
        cache.advance(new, new)
        return hidden

    def _run(self, input_ids: Tensor, tokens: Tokens, longest: int, rows: Tensor | None = None) -> Tensor:
        """Hidden states behind the last norm, of all tokens or of those of the given rows of (1, tokens)."""
        x = self.embedding(input_ids)
        positions = tokens.positions(input_ids)
        angles: Angles = None
        if self.positions is not None:
            _checks.within_positions(longest, self.config.max_positions)
            x = x + self.positions(positions)
        elif self.rotary is not None:
            angles = self.rotary.cos_sin(positions)
        x = self.dropout(x)
        branch: Tensor | None = None
        recompute = self.config.checkpoint and self.training and torch.is_grad_enabled()
        for layer in self.layers:
            if recompute:
                branch, x = checkpoint(layer, branch, x, tokens, angles, use_reentrant=False)
            else:
                branch, x = layer(branch, x, tokens, angles)
        if rows is not None:
            branch, x = (None if y is None else y.index_select(1, rows) for y in (branch, x))
        return last_norm(self.norm, branch, x, self.config.dropout if self.training else 0.0)
