"""The decoder of the Transformer: its layer, and a stack of layers."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import masks
from ._transformer import Activation, adopt_children, length
from .feed_forward import feed_forward
from .norm import add_norm


class TransformerDecoderLayer(nn.TransformerDecoderLayer):
    """`torch.nn.TransformerDecoderLayer`: self-attention, attention to the encoder's output, feed-forward network.

    The constructor, the initialisation, the state_dict, the arguments and the results are torch's; the differences and
    the arguments are those of `TransformerEncoderLayer`.

    Source: Vaswani et al., 2017.
    """

    def __init__(
        self,
        d_model: int,
        nhead: int,
        dim_feedforward: int = 2048,
        dropout: float = 0.1,
        activation: Activation = F.relu,
        layer_norm_eps: float = 1e-5,
        batch_first: bool = False,
        norm_first: bool = False,
        bias: bool = True,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            d_model,
            nhead,
            dim_feedforward,
            dropout,
            activation,
            layer_norm_eps,
            batch_first,
            norm_first,
            bias,
            device,
            dtype,
        )
        adopt_children(self)

    def forward(
        self,
        tgt: Tensor,
        memory: Tensor,
        tgt_mask: Tensor | None = None,
        memory_mask: Tensor | None = None,
        tgt_key_padding_mask: Tensor | None = None,
        memory_key_padding_mask: Tensor | None = None,
        tgt_is_causal: bool = False,
        memory_is_causal: bool = False,
    ) -> Tensor:
        """Applies the layer.

        Args:
            tgt: (T, E) unbatched, (T, N, E), or (N, T, E) where batch_first.
            memory: (S, E), (S, N, E) or (N, S, E), the encoder's output.
            tgt_mask: (T, T) or (N · nhead, T, T): bool, True where attention is forbidden, or floating, added.
            memory_mask: (T, S) or (N · nhead, T, S), likewise.
            tgt_key_padding_mask: (N, T), or (T) unbatched: bool, True where the token is padding, or floating, added.
            memory_key_padding_mask: (N, S), or (S) unbatched, likewise.
            tgt_is_causal, memory_is_causal: a promise that tgt_mask, memory_mask is the causal mask. Needs that mask.

        Returns:
            tgt's shape.

        Raises:
            AssertionError, RuntimeError: as `MultiheadAttention.forward`.
        """

        def attend_self(x: Tensor) -> Tensor:
            return self.self_attn(
                x,
                x,
                x,
                attn_mask=tgt_mask,
                key_padding_mask=tgt_key_padding_mask,
                need_weights=False,
                is_causal=tgt_is_causal,
            )[0]

        def attend_memory(x: Tensor) -> Tensor:
            return self.multihead_attn(
                x,
                memory,
                memory,
                attn_mask=memory_mask,
                key_padding_mask=memory_key_padding_mask,
                need_weights=False,
                is_causal=memory_is_causal,
            )[0]

        x = tgt
        if self.norm_first:
            normed, x = add_norm(self.norm2, attend_self(self.norm1(x)), x, self.dropout1)
            normed, x = add_norm(self.norm3, attend_memory(normed), x, self.dropout2)
            return x + self.dropout3(self._feed_forward(normed))
        x, _ = add_norm(self.norm1, attend_self(x), x, self.dropout1)
        x, _ = add_norm(self.norm2, attend_memory(x), x, self.dropout2)
        return add_norm(self.norm3, self._feed_forward(x), x, self.dropout3)[0]

    def _feed_forward(self, x: Tensor) -> Tensor:
        return feed_forward(x, self.linear1, self.activation, self.dropout, self.linear2)


class TransformerDecoder(nn.TransformerDecoder):
    """`torch.nn.TransformerDecoder`: a stack of copies of a decoder layer, then an optional norm.

    Args:
        decoder_layer: the layer to copy; fastattn.nn's or any other with the same interface.
        num_layers: how many copies.
        norm: applied at the end; None for none.

    Source: Vaswani et al., 2017.
    """

    def __init__(self, decoder_layer: nn.Module, num_layers: int, norm: nn.Module | None = None) -> None:
        super().__init__(decoder_layer, num_layers, norm)  # type: ignore[arg-type]

    def forward(
        self,
        tgt: Tensor,
        memory: Tensor,
        tgt_mask: Tensor | None = None,
        memory_mask: Tensor | None = None,
        tgt_key_padding_mask: Tensor | None = None,
        memory_key_padding_mask: Tensor | None = None,
        tgt_is_causal: bool | None = None,
        memory_is_causal: bool = False,
    ) -> Tensor:
        """Applies the layers in turn, then the norm.

        Arguments, results and errors are those of `TransformerDecoderLayer.forward`; tgt_is_causal=None looks at
        tgt_mask.
        """
        batch_first = bool(self.layers) and self.layers[0].self_attn.batch_first
        tgt_is_causal = masks.detect_causal(tgt_mask, tgt_is_causal, length("tgt", tgt, batch_first))
        output = tgt
        for layer in self.layers:
            output = layer(
                output,
                memory,
                tgt_mask=tgt_mask,
                memory_mask=memory_mask,
                tgt_key_padding_mask=tgt_key_padding_mask,
                memory_key_padding_mask=memory_key_padding_mask,
                tgt_is_causal=tgt_is_causal,
                memory_is_causal=memory_is_causal,
            )
        return output if self.norm is None else self.norm(output)
