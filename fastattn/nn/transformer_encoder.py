"""The encoder of the Transformer: its layer, and a stack of layers."""

from collections.abc import Callable
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._C._functorch import is_functorch_wrapped_tensor

from . import _checks, _encoder_layer, _modules, masks
from ._transformer import Activation, adopt_children, length
from .attention import MultiheadAttention
from .feed_forward import feed_forward
from .norm import add_norm


class TransformerEncoderLayer(nn.TransformerEncoderLayer):
    """`torch.nn.TransformerEncoderLayer`: self-attention and feed-forward network, each with residual, dropout and
    norm.

    The constructor, the initialisation, the state_dict, the arguments and the results are torch's. Differences are
    those of `MultiheadAttention`: a row whose every key is masked attends to nothing rather than giving NaN, in every
    mode.

    Args:
        d_model: width of the model.
        nhead: number of heads; divides d_model.
        dim_feedforward: hidden width of the feed-forward network.
        dropout: probability of dropout in training: of attention weights, of the hidden layer, of each sublayer's
            output.
        activation: "relu", "gelu", or a callable; `relu`, `gelu` and `silu` (functions or modules) are fused.
        layer_norm_eps: eps of the norms.
        batch_first: (N, S, E) instead of (S, N, E).
        norm_first: norm before each sublayer rather than after the residual add.
        bias: whether projections and norms have a bias.
        device, dtype: of the parameters.

    Source: Vaswani et al., 2017; norm_first: Xiong et al., "On Layer Normalization in the Transformer Architecture",
        2020.
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
        src: Tensor,
        src_mask: Tensor | None = None,
        src_key_padding_mask: Tensor | None = None,
        is_causal: bool = False,
    ) -> Tensor:
        """Applies the layer.

        Args:
            src: (S, E) unbatched, (S, N, E), or (N, S, E) where batch_first. A nested tensor of (S_i, E) is packed.
            src_mask: (S, S) or (N · nhead, S, S): bool, True where attention is forbidden, or floating, added.
            src_key_padding_mask: (N, S), or (S) unbatched: bool, True where the token is padding, or floating, added.
            is_causal: a promise that src_mask is the causal mask. Needs src_mask.

        Returns:
            src's shape.

        Raises:
            AssertionError, RuntimeError: as `MultiheadAttention.forward`.
        """
        if isinstance(src, Tensor) and src.is_nested:
            return self._forward_nested(src, src_mask, src_key_padding_mask)
        masked = src_mask is not None or src_key_padding_mask is not None or is_causal
        if not masked and self.self_attn.batch_first:
            whole = _encoder_layer.run(self, src)
            if whole is not None:
                return whole

        def attend(x: Tensor) -> Tensor:
            return self.self_attn(
                x,
                x,
                x,
                attn_mask=src_mask,
                key_padding_mask=src_key_padding_mask,
                need_weights=False,
                is_causal=is_causal,
            )[0]

        return self._forward_with(src, attend)

    def forward_packed(self, src: Tensor, cu_seqlens: Tensor, max_seqlen: int) -> Tensor:
        """Applies the layer to sequences laid end to end: (total, E) to (total, E), no padding computed.

        Args:
            src: (total, E), the tokens of all sequences.
            cu_seqlens: (sequences + 1,), int32, where each begins, ending at total.
            max_seqlen: the longest sequence.
        """
        whole = _encoder_layer.run(self, src, cu_seqlens, max_seqlen)
        if whole is not None:
            return whole

        def attend(x: Tensor) -> Tensor:
            return cast(MultiheadAttention, self.self_attn).forward_packed(x, cu_seqlens, max_seqlen)

        return self._forward_with(src, attend)

    def _forward_with(self, x: Tensor, attend: Callable[[Tensor], Tensor]) -> Tensor:
        if self.norm_first:
            normed, x = add_norm(self.norm2, attend(self.norm1(x)), x, self.dropout1)
            return x + self.dropout2(self._feed_forward(normed))
        x, _ = add_norm(self.norm1, attend(x), x, self.dropout1)
        return add_norm(self.norm2, self._feed_forward(x), x, self.dropout2)[0]

    def _feed_forward(self, x: Tensor) -> Tensor:
        return feed_forward(x, self.linear1, self.activation, self.dropout, self.linear2)

    def _forward_nested(self, src: Tensor, src_mask: Tensor | None, src_key_padding_mask: Tensor | None) -> Tensor:
        """For torch.nn.TransformerEncoder, which hands nested tensors to its layers at inference."""
        if src_mask is not None or src_key_padding_mask is not None:
            raise AssertionError("neither src_key_padding_mask nor src_mask are supported with NestedTensor input")
        sequences = src.unbind()
        lengths = [sequence.shape[0] for sequence in sequences]
        cu_seqlens = F.pad(torch.tensor(lengths, device=src.device).cumsum(0, dtype=torch.int32), (1, 0))
        out = self.forward_packed(torch.cat(sequences), cu_seqlens, max(lengths, default=0))
        return torch.nested.as_nested_tensor(list(out.split(lengths)), layout=src.layout)


def _packs(layer: nn.Module) -> bool:
    """Whether forward_packed computes what the layer's forward does: neither it nor its attention has one of its own."""
    attention = getattr(layer, "self_attn", None)
    return (
        type(layer).forward is TransformerEncoderLayer.forward
        and isinstance(attention, MultiheadAttention)
        and type(attention).forward is MultiheadAttention.forward
    )


class TransformerEncoder(nn.TransformerEncoder):
    """`torch.nn.TransformerEncoder`: a stack of copies of an encoder layer, then an optional norm.

    Where torch's would compute on nested tensors (enable_nested_tensor, inference without gradients, a padding mask and
    no other), this one packs the tokens and computes no padding; as in torch the output is then zero at the padding,
    before `norm`.

    Args:
        encoder_layer: the layer to copy; fastattn.nn's or any other with the same interface.
        num_layers: how many copies.
        norm: applied at the end; None for none.
        enable_nested_tensor: whether padding may be left out at inference.
        mask_check: make sure first that the padding stands at the end of each sequence.

    Source: Vaswani et al., 2017.
    """

    def __init__(
        self,
        encoder_layer: nn.Module,
        num_layers: int,
        norm: nn.Module | None = None,
        enable_nested_tensor: bool = True,
        mask_check: bool = True,
    ) -> None:
        super().__init__(encoder_layer, num_layers, norm, enable_nested_tensor, mask_check)  # type: ignore[arg-type]

    def forward(
        self,
        src: Tensor,
        mask: Tensor | None = None,
        src_key_padding_mask: Tensor | None = None,
        is_causal: bool | None = None,
    ) -> Tensor:
        """Applies the layers in turn, then the norm.

        Args:
            src: (S, E) unbatched, (S, N, E), or (N, S, E) where batch_first.
            mask: (S, S) or (N · nhead, S, S): bool, True where attention is forbidden, or floating, added.
            src_key_padding_mask: (N, S), or (S) unbatched: bool, True where the token is padding, or floating, added.
            is_causal: a promise that mask is the causal mask; None looks at the mask.

        Returns:
            src's shape.

        Raises:
            AssertionError, RuntimeError: as `MultiheadAttention.forward`.
        """
        if not all(isinstance(layer, TransformerEncoderLayer) for layer in self.layers):
            return super().forward(src, mask, src_key_padding_mask, is_causal)
        _checks.tensor("src", src)
        padding = self._padding_to_leave_out(src, mask, src_key_padding_mask)
        if padding is not None:
            output = self._forward_packed(src, ~padding)
        else:
            is_causal = masks.detect_causal(mask, is_causal, length("src", src, self._batch_first()))
            output = src
            for layer in self.layers:
                output = layer(output, mask, src_key_padding_mask, is_causal)
        return output if self.norm is None else self.norm(output)

    def _batch_first(self) -> bool:
        return all(layer.self_attn.batch_first for layer in self.layers)

    def _padding_to_leave_out(self, src: Tensor, mask: Tensor | None, padding: Tensor | None) -> Tensor | None:
        """The padding mask, True at padding, where padding is not to be computed; None where it is.

        The conditions are those under which torch.nn computes on nested tensors, because they decide whether the output
        at the padding is zero.
        """
        if padding is None or mask is not None or self.training or not self.use_nested_tensor:
            return None
        _checks.tensor("src_key_padding_mask", padding)
        if src.dim() != 3 or padding.is_meta or padding.device != src.device:
            return None
        if padding.dtype != torch.bool and not padding.is_floating_point():
            return None  # an error, which the attention module raises
        if not torch.backends.mha.get_fastpath_enabled() or torch.compiler.is_compiling():
            return None
        if is_functorch_wrapped_tensor(padding):  # vmap: the number of tokens differs from call to call
            return None
        if torch.is_autocast_enabled(src.device.type) or not self._batch_first() or padding.shape != src.shape[:2]:
            return None
        if torch.is_grad_enabled() and (src.requires_grad or any(p.requires_grad for p in self.parameters())):
            return None
        if not all(map(_packs, self.layers)) or any(_modules.hooked(module) for module in self.layers.modules()):
            return None
        if padding.dtype != torch.bool:
            out = padding == -torch.inf
            if not torch.equal(out, padding != 0):
                return None
            padding = out
        if self.mask_check and bool((padding[:, :-1] & ~padding[:, 1:]).any()):
            return None
        return padding

    def _forward_packed(self, src: Tensor, kept: Tensor) -> Tensor:
        """src (N, S, E) through the layers, without the tokens that kept (N, S) is False for; zeros in their place."""
        lengths = kept.sum(dim=1)
        cu_seqlens = F.pad(lengths.cumsum(0, dtype=torch.int32), (1, 0))
        max_seqlen = int(lengths.max()) if lengths.numel() else 0
        packed = src[kept]
        for layer in self.layers:
            packed = layer.forward_packed(packed, cu_seqlens, max_seqlen)
        output = packed.new_zeros(src.shape)
        output[kept] = packed
        return output
