"""Attention and masks for transformers' registries, under the name "fastattn".

A model that dispatches its attention calls `attention_forward` with heads apart, and `padding_aware_mask` decides in
what form the mask arrives there:

    None                            nothing is masked, or `is_causal` says it all
    bool (batch, 1, q, k)           True takes part; carries the 2-D padding mask it came from where it is nothing else
    floating (batch, 1 or heads, q, k)   a user's own, added to the scores
    PackedSequences                 the encoder left the padding out (packing.py): attention over packed sequences
"""

import sys
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import bidirectional_mask_function, sdpa_mask

from fastattn._watch import ops_of, watched
from fastattn.nn.packed_sequences import PackedSequences

from ..warn import warn_once
from .packing import PADDING, wanted_outputs

NAME = "fastattn"


def register() -> None:
    """Makes `attn_implementation="fastattn"` known to transformers."""
    AttentionInterface.register(NAME, attention_forward)
    AttentionMaskInterface.register(NAME, padding_aware_mask)


def attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | PackedSequences | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    position_bias: Tensor | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """Attention as transformers' models call it.

    Args:
        module: the attention module; its `is_causal` holds where the argument is None.
        query: (batch, heads, q, head_dim).
        key, value: (batch, kv_heads, k, head_dim); heads is a multiple of kv_heads, and they are not repeated.
        attention_mask: see the module's docstring. Where one is given it is the whole truth: causality and windows are
        in it. dropout: probability of dropping an attention weight. scaling: factor of the scores; 1 / sqrt(head_dim)
        by default. is_causal: applies where there is no mask and more than one query, aligned to the top left.
        position_bias: (1 or batch, heads, q, k), added to the scores; gets a gradient (T5's relative bias).
        sliding_window: how many keys a query sees, itself among them; applies with `is_causal`. softcap: scores become
        softcap · tanh(score / softcap) (Gemma 2). s_aux: (heads,), a logit that takes part in each softmax and has no
        value: an attention sink (gpt-oss).

    Returns:
        (batch, q, heads, head_dim), and None, or the weights (batch, heads, q, k) where `output_attentions` asks for
        them: then the model's own eager attention runs, and a warning says so once.
    """
    if isinstance(attention_mask, PackedSequences):
        return _packed(module, query, key, value, attention_mask, dropout, scaling, softcap), None
    if kwargs.get("output_attentions") or wanted_outputs() & {"attentions", "cross_attentions"}:
        if watched(module):
            raise RuntimeError(
                "output_attentions=True and fastattn.inspect.record both ask for the attention weights; ask one of them"
            )
        extra = {"position_bias": position_bias, "sliding_window": sliding_window, "softcap": softcap, "s_aux": s_aux}
        kwargs |= {name: given for name, given in extra.items() if given is not None}
        return _with_weights(module, query, key, value, attention_mask, dropout, scaling, is_causal, kwargs)

    if s_aux is not None and watched(module):
        raise RuntimeError(
            f"{type(module).__name__} has an attention sink, a logit in each softmax that fastattn.inspect does not know"
        )
    q_len, k_len = query.shape[2], key.shape[2]
    if is_causal is None:
        is_causal = getattr(module, "is_causal", True)
    is_causal = bool(is_causal) and attention_mask is None and q_len > 1
    if is_causal and k_len > q_len:
        # The first tokens in a cache of fixed size: what lies behind them is not filled yet.
        key, value, k_len = key[:, :, :q_len], value[:, :, :q_len], q_len
        position_bias = None if position_bias is None else position_bias[..., :q_len]
    window = None
    if is_causal and sliding_window is not None and sliding_window < k_len:
        window = (sliding_window - 1, 0)
    out, lse = ops_of(module).attention(
        query,
        key,
        value,
        _additive(attention_mask, position_bias, query.dtype),
        dropout,
        is_causal,
        scaling,
        enable_gqa=query.shape[1] != key.shape[1],
        window=window,
        softcap=softcap,
        return_lse=True,
    )
    if s_aux is not None:
        # One more logit in the denominator: out · Σexp(s) / (Σexp(s) + exp(sink)).
        out = out * torch.sigmoid(lse - s_aux.to(lse.dtype)[:, None]).to(out.dtype).unsqueeze(-1)
    return out.transpose(1, 2), None


def _packed(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    sequences: PackedSequences,
    dropout: float,
    scaling: float | None,
    softcap: float | None,
) -> Tensor:
    query, key, value = (x[0].transpose(0, 1) for x in (query, key, value))
    cu_seqlens, longest = sequences.cu_seqlens, sequences.max_seqlen
    out: Any = ops_of(module).attention_varlen(
        query, key, value, cu_seqlens, cu_seqlens, longest, longest, dropout, False, scaling, softcap=softcap
    )
    return out.unsqueeze(0)


def _additive(mask: Tensor | None, bias: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """The mask and the bias as one mask for `ops.attention`, bool where that says it all."""
    if mask is not None and mask.is_floating_point() and mask.dtype not in (dtype, torch.float32):
        mask = mask.to(dtype)
    if bias is None or mask is None:
        return mask if bias is None else bias
    return torch.where(mask, bias, -torch.inf) if mask.dtype == torch.bool else bias + mask


def _with_weights(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    dropout: float,
    scaling: float | None,
    is_causal: bool | None,
    kwargs: dict[str, Any],
) -> tuple[Tensor, Tensor]:
    """The model's own eager attention, which forms the weights."""
    warn_once(
        f"{type(module).__name__}: output_attentions asks for the attention weights, which fused attention never "
        "forms; the model's eager attention runs instead, slower and with the (q, k) matrix in memory"
    )
    q_len, k_len = query.shape[2], key.shape[2]
    if is_causal is None:
        is_causal = getattr(module, "is_causal", True)
    if mask is None and is_causal and q_len > 1:
        mask = torch.ones(1, 1, q_len, k_len, dtype=torch.bool, device=query.device).tril()
    if mask is not None and mask.dtype == torch.bool:
        mask = torch.zeros_like(mask, dtype=query.dtype).masked_fill(~mask, torch.finfo(query.dtype).min)
    for ancestor in type(module).__mro__:
        eager = getattr(sys.modules.get(ancestor.__module__), "eager_attention_forward", None)
        if eager is not None:
            return eager(module, query, key, value, mask, scaling=scaling, dropout=dropout, **kwargs)
    raise RuntimeError(
        f"{type(module).__name__} has no eager_attention_forward beside it in {type(module).__module__}, so fastattn "
        "cannot return its attention weights; call model.set_attn_implementation('eager') for output_attentions=True"
    )


def padding_aware_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int = 0,
    kv_offset: int = 0,
    mask_function: Any = None,
    attention_mask: Tensor | None = None,
    allow_is_bidirectional_skip: bool = False,
    **kwargs: Any,
) -> Tensor | None:
    """The mask that a model hands to its layers: `sdpa_mask`'s, True where a key takes part, None where nothing is
    masked.

    A mask that says no more than which tokens are padding carries that 2-D mask, (batch, k) and bool, as the attribute
    `fastattn_padding`, for encoders to leave the padding out. (A copy of it, cut or combined, no longer does.)
    """
    if (
        mask_function is not bidirectional_mask_function
        or attention_mask is None
        or tuple(attention_mask.shape) != (batch_size, kv_length)
        or kv_offset != 0
        or torch.compiler.is_compiling()
    ):
        return sdpa_mask(
            batch_size=batch_size,
            q_length=q_length,
            kv_length=kv_length,
            q_offset=q_offset,
            kv_offset=kv_offset,
            attention_mask=attention_mask,
            allow_is_bidirectional_skip=allow_is_bidirectional_skip,
            **({} if mask_function is None else {"mask_function": mask_function}),
            **kwargs,
        )
    if allow_is_bidirectional_skip and attention_mask.all():
        return None
    mask = attention_mask[:, None, None, :].expand(batch_size, 1, q_length, kv_length)
    setattr(mask, PADDING, attention_mask)
    return mask
