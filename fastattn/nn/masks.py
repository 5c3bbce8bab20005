"""The masks of torch.nn, where True is masked out, as those of the ops, where True takes part. Floats are added."""

from typing import NamedTuple

import torch
from torch import Tensor
from torch._C._functorch import is_functorch_wrapped_tensor

from . import _checks


class Sizes(NamedTuple):
    """What the masks of one call have to fit."""

    batched: bool
    batch: int
    query_len: int
    key_len: int
    num_heads: int


def check(sizes: Sizes, query: Tensor, key_padding_mask: Tensor | None, attn_mask: Tensor | None) -> None:
    """Ranks, shapes, dtypes and devices of the masks of `MultiheadAttention`, with torch.nn's exceptions."""
    for name, mask in (("key_padding_mask", key_padding_mask), ("attn_mask", attn_mask)):
        if mask is None:
            continue
        _checks.tensor(name, mask)
        _checks.same_device(name, mask, "query", query)
        if mask.dtype != torch.bool and not mask.is_floating_point():
            raise AssertionError(
                f"only bool and floating types of {name} are supported, got {mask.dtype}; pass {name}.bool()"
            )
    kind = "batched (3-D)" if sizes.batched else "unbatched (2-D)"
    if key_padding_mask is not None:
        expected: tuple[int, ...] = (sizes.batch, sizes.key_len) if sizes.batched else (sizes.key_len,)
        if key_padding_mask.dim() != len(expected):
            raise AssertionError(
                f"For {kind} `query`, expected `key_padding_mask` to be `None` or {len(expected)}-D"
                f" but found {key_padding_mask.dim()}-D tensor instead"
            )
        if tuple(key_padding_mask.shape) != expected:
            raise AssertionError(
                f"Expected `key_padding_mask` shape to be {expected} but got {tuple(key_padding_mask.shape)}"
            )
    if attn_mask is not None:
        if attn_mask.dim() not in (2, 3):
            raise AssertionError(
                f"For {kind} `query`, expected `attn_mask` to be `None`, 2-D or 3-D"
                f" but found {attn_mask.dim()}-D tensor instead"
            )
        lead = (sizes.batch * sizes.num_heads,) if attn_mask.dim() == 3 else ()
        expected = (*lead, sizes.query_len, sizes.key_len)
        if tuple(attn_mask.shape) != expected:
            error = AssertionError if attn_mask.dim() == 3 and not sizes.batched else RuntimeError
            raise error(
                f"The shape of the {attn_mask.dim()}D attn_mask is {tuple(attn_mask.shape)}, but should be {expected}."
            )


def merge(attn_mask: Tensor | None, key_padding_mask: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """Two masks of torch.nn, broadcasting to the scores, as one mask of the ops.

    Boolean masks stay boolean; where one of the two is floating, the other is turned into 0 and -inf of this dtype, the
    queries'. A floating mask of another dtype becomes what the ops take.
    """
    masks = [mask for mask in (attn_mask, key_padding_mask) if mask is not None]
    if not masks:
        return None
    if all(mask.dtype == torch.bool for mask in masks):
        return ~(masks[0] if len(masks) == 1 else masks[0] | masks[1])
    added = [_added(mask, dtype) for mask in masks]
    return added[0] if len(added) == 1 else added[0] + added[1]


def _added(mask: Tensor, dtype: torch.dtype) -> Tensor:
    if mask.dtype == torch.bool:
        return torch.zeros_like(mask, dtype=dtype).masked_fill(mask, -torch.inf)
    return mask if mask.dtype in (dtype, torch.float32) else mask.to(torch.promote_types(dtype, torch.float32))


def detect_causal(mask: Tensor | None, is_causal: bool | None, length: int) -> bool:
    """is_causal where it was said; else whether mask is the causal mask over this length, so that it need not be read.

    Not looked into where that would cost more than it saves: while a graph is being traced (the answer depends on
        values) and
    where the mask wants a gradient.
    """
    if is_causal is not None:
        return is_causal
    if mask is None or torch.compiler.is_compiling():
        return False
    _checks.tensor("mask", mask)
    if tuple(mask.shape) != (length, length) or mask.requires_grad:
        return False
    if mask.is_meta or is_functorch_wrapped_tensor(mask):
        return False  # it has no values, or one for each call that vmap makes
    if mask.dtype != torch.bool and not mask.is_floating_point():
        return False  # an error, which the attention module raises
    later = torch.ones(length, length, dtype=torch.bool, device=mask.device).triu(1)
    if mask.dtype == torch.bool:
        return torch.equal(mask, later)
    return torch.equal(mask, torch.zeros_like(mask).masked_fill(later, -torch.inf))
