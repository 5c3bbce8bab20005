"""The Transformer of torch.nn: encoder and decoder."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ._transformer import Activation, length
from .norm import LayerNorm
from .transformer_decoder import TransformerDecoder, TransformerDecoderLayer
from .transformer_encoder import TransformerEncoder, TransformerEncoderLayer


class Transformer(nn.Transformer):
    """`torch.nn.Transformer`: encoder and decoder.

    The constructor, the initialisation, the state_dict, the arguments and the results are torch's; see
    `TransformerEncoderLayer` for the arguments that it shares.

    Args:
        num_encoder_layers, num_decoder_layers: how many layers.
        custom_encoder, custom_decoder: modules to use instead of ours.

    Source: Vaswani et al., 2017.
    """

    def __init__(
        self,
        d_model: int = 512,
        nhead: int = 8,
        num_encoder_layers: int = 6,
        num_decoder_layers: int = 6,
        dim_feedforward: int = 2048,
        dropout: float = 0.1,
        activation: Activation = F.relu,
        custom_encoder: nn.Module | None = None,
        custom_decoder: nn.Module | None = None,
        layer_norm_eps: float = 1e-5,
        batch_first: bool = False,
        norm_first: bool = False,
        bias: bool = True,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        sizes = (d_model, nhead, dim_feedforward, dropout, activation, layer_norm_eps, batch_first, norm_first, bias)

        def norm() -> LayerNorm:
            return LayerNorm(d_model, layer_norm_eps, bias=bias, device=device, dtype=dtype)

        # In torch's order, so that the random numbers of the initialisation fall in the same places.
        if custom_encoder is None:
            encoder_layer = TransformerEncoderLayer(*sizes, device=device, dtype=dtype)
            custom_encoder = TransformerEncoder(encoder_layer, num_encoder_layers, norm())
        if custom_decoder is None:
            decoder_layer = TransformerDecoderLayer(*sizes, device=device, dtype=dtype)
            custom_decoder = TransformerDecoder(decoder_layer, num_decoder_layers, norm())
        super().__init__(
            d_model,
            nhead,
            num_encoder_layers,
            num_decoder_layers,
            dim_feedforward,
            dropout,
            activation,
            custom_encoder,
            custom_decoder,
            layer_norm_eps,
            batch_first,
            norm_first,
            bias,
            device,
            dtype,
        )

    def forward(self, src: Tensor, tgt: Tensor, *masks: Any, **named: Any) -> Tensor:
        """Arguments, results and errors as `torch.nn.Transformer.forward`'s. What is no tensor is a TypeError."""
        for name, x in (("src", src), ("tgt", tgt)):
            length(name, x, self.batch_first)
        return super().forward(src, tgt, *masks, **named)
