"""Argument checks shared by the ops: each error says what was given, what was expected and what to do.

TypeError for something that is not a tensor or has the wrong dtype, ValueError for shapes, devices and values.
"""

import itertools
import math
import numbers
import operator
import sys
from collections.abc import Sequence
from typing import NoReturn

import torch
from torch import Tensor

_FLOATING = frozenset((torch.float32, torch.bfloat16, torch.float16, torch.float64))
_STRIDED = torch.strided
_LARGEST = sys.float_info.max
_FAR = 2**62  # a window beyond is no limit, and distances may be added to it in 64 bits


def tensor(name: str, x: object) -> None:
    """A dense tensor."""
    if not isinstance(x, Tensor) or x.layout is not _STRIDED or x.is_nested:
        _not_dense(name, x)


def _not_dense(name: str, x: object) -> NoReturn:
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} is a {type(x).__name__}; expected a torch.Tensor")
    if x.is_nested:
        raise TypeError(f"{name} is a nested tensor; expected a dense one: use {name}.to_padded_tensor(0.0)")
    raise TypeError(f"{name} has layout {x.layout}; expected a dense tensor: use {name}.to_dense()")


def floating(name: str, x: Tensor) -> None:
    """A dense tensor of a dtype that the ops compute in."""
    if not isinstance(x, Tensor) or x.layout is not _STRIDED or x.is_nested:  # `tensor`, without the call
        _not_dense(name, x)
    if x.dtype not in _FLOATING:
        raise TypeError(
            f"{name} has dtype {x.dtype}; expected float32, bfloat16, float16 or float64: convert it with {name}.to(...)"
        )


def like(name: str, x: Tensor, other_name: str, other: Tensor) -> None:
    """A dense tensor of the same dtype and device as another."""
    if not isinstance(x, Tensor) or x.layout is not _STRIDED or x.is_nested:  # `tensor`, without the call
        _not_dense(name, x)
    if x.dtype != other.dtype:
        raise TypeError(
            f"{name} has dtype {x.dtype} but {other_name} has {other.dtype}; convert one, or run under torch.autocast"
        )
    if x.device != other.device:
        raise ValueError(f"{name} is on {x.device} but {other_name} is on {other.device}; move one with .to(device)")


def affine(name: str, x: Tensor | None, of: Tensor, dim: int) -> None:
    """A norm's weight or bias: (dim,), in x's dtype or float32."""
    if x is None:
        return
    tensor(name, x)
    if x.shape != (dim,):
        raise ValueError(f"{name} has shape {tuple(x.shape)}; expected ({dim},), the last dimension of x")
    if x.dtype != of.dtype and x.dtype != torch.float32:
        raise TypeError(f"{name} has dtype {x.dtype}; expected x's {of.dtype}, or float32")
    if x.device != of.device:
        raise ValueError(f"{name} is on {x.device} but x is on {of.device}; move one with .to(device)")


def rank(name: str, x: Tensor, layout: str, ndim: int) -> None:
    if x.ndim != ndim:
        raise ValueError(f"{name} has shape {tuple(x.shape)}; expected {ndim} dimensions, {layout}")


def number(name: str, x: object) -> float:
    """A finite number, as a float. (torch's are symbolic while it traces.)"""
    if type(x) is float and -_LARGEST <= x <= _LARGEST:
        return x
    if not isinstance(x, (float, numbers.Real, torch.SymFloat, torch.SymInt)):
        raise TypeError(f"{name} is a {type(x).__name__}; expected a number")
    try:
        value = float(x)
    except OverflowError:
        value = math.inf
    if not -_LARGEST <= value <= _LARGEST:
        raise ValueError(f"{name} is {value}; expected a finite number")
    return value


def not_negative(name: str, x: float) -> float:
    if type(x) is float and 0.0 <= x <= _LARGEST:
        return x
    value = number(name, x)
    if value < 0.0:
        raise ValueError(f"{name} is {value}; expected zero or more")
    return value


def integer(name: str, x: object) -> int:
    """An int, or what stands for one: numpy's, a tensor's."""
    if isinstance(x, (int, torch.SymInt)):
        return x  # type: ignore[return-value]
    try:
        return operator.index(x)  # type: ignore[arg-type]
    except TypeError:
        raise TypeError(f"{name} is a {type(x).__name__}; expected an int") from None


def length(name: str, x: object) -> int:
    value = integer(name, x)
    if value < 0:
        raise ValueError(f"{name} is {value}; expected zero or more")
    return value


def flag(name: str, x: object) -> bool:
    """Anything that is either true or false; a tensor of several elements is neither."""
    if x is True or x is False:
        return x
    try:
        return bool(x)
    except (RuntimeError, TypeError, ValueError):
        raise TypeError(f"{name} is a {type(x).__name__}; expected True or False") from None


def probability(name: str, p: float) -> None:
    number(name, p)
    if not 0.0 <= p <= 1.0:
        raise ValueError(f"{name} is {p}; expected a probability between 0 and 1")


def one_of(name: str, given: object, known: Sequence[str]) -> None:
    if not isinstance(given, str) or given not in known:
        *first, last = map(repr, known)
        raise ValueError(f"{name} is {given!r}; expected {', '.join(first)} or {last}")


def attention_shapes(query: Tensor, key: Tensor, value: Tensor, q_layout: str, k_layout: str, ndim: int) -> None:
    """What the three forms of attention share: rank, dtype, device, head_dim, and heads a multiple of kv_heads.

    Dense tensors are (batch, heads, seq, head_dim), packed ones (total, heads, head_dim): heads stand before the last two
    or the last one.
    """
    floating("query", query)
    like("key", key, "query", query)
    like("value", value, "query", query)
    if not query.ndim == key.ndim == value.ndim == ndim:
        rank("query", query, q_layout, ndim)
        rank("key", key, k_layout, ndim)
        rank("value", value, k_layout, ndim)
    q_shape, k_shape, v_shape = query.shape, key.shape, value.shape  # each look-up makes a torch.Size
    head_dim = q_shape[-1]
    if k_shape[-1] != head_dim:
        raise ValueError(
            f"key has head_dim {k_shape[-1]} but query has {head_dim}; their last dimensions must be equal"
        )
    if k_shape[:-1] != v_shape[:-1]:
        raise ValueError(
            f"key has shape {tuple(k_shape)} and value {tuple(v_shape)}; all but the last dimension must be equal"
        )
    heads, kv_heads = q_shape[1], k_shape[1]
    if heads != kv_heads and (kv_heads == 0 or heads % kv_heads != 0):
        raise ValueError(f"query has {heads} heads and key {kv_heads}; query's must be a multiple of key's")
    if head_dim == 0:
        raise ValueError("query and key have head_dim 0; expected at least 1")


def attention_mask(mask: Tensor, query: Tensor, shape: tuple[int, int, int, int]) -> Tensor:
    """The mask as (batch or 1, heads or 1, q or 1, k or 1)."""
    tensor("attn_mask", mask)
    if mask.dtype not in (torch.bool, torch.float32, query.dtype):
        raise TypeError(
            f"attn_mask has dtype {mask.dtype}; expected bool (True takes part), or float32 or query's "
            f"{query.dtype} (added to the scores)"
        )
    if mask.device != query.device:
        raise ValueError(f"attn_mask is on {mask.device} but query is on {query.device}; move one with .to(device)")
    given = mask.shape
    if mask.ndim < 4:
        mask = mask.reshape((1,) * (4 - mask.ndim) + tuple(given))
    if mask.ndim > 4 or any(m != 1 and m != n for m, n in zip(mask.shape, shape, strict=True)):
        raise ValueError(
            f"attn_mask has shape {tuple(given)}, which does not broadcast to (batch, heads, q, k) = {tuple(shape)}"
        )
    return mask


def slopes(alibi_slopes: Tensor, query: Tensor, batch: int, heads: int) -> Tensor:
    tensor("alibi_slopes", alibi_slopes)
    if alibi_slopes.dtype not in (torch.float32, query.dtype):
        raise TypeError(f"alibi_slopes has dtype {alibi_slopes.dtype}; expected float32")
    if tuple(alibi_slopes.shape) not in ((heads,), (batch, heads)):
        raise ValueError(
            f"alibi_slopes has shape {tuple(alibi_slopes.shape)}; expected (heads,) = ({heads},) or "
            f"(batch, heads) = ({batch}, {heads})"
        )
    if alibi_slopes.device != query.device:
        raise ValueError(f"alibi_slopes is on {alibi_slopes.device} but query is on {query.device}; move one")
    without_gradient("alibi_slopes", alibi_slopes, ", or add the bias by attn_mask, which has one")
    return alibi_slopes if alibi_slopes.dtype in (torch.float32, torch.float64) else alibi_slopes.float()


def without_gradient(name: str, x: Tensor, otherwise: str = "") -> None:
    """Of a tensor that is a constant in what it goes into: silence would leave its gradient None."""
    if x.requires_grad and torch.is_grad_enabled():
        raise ValueError(f"{name} requires a gradient, and has none: pass {name}.detach(){otherwise}")


def angles(cos: Tensor, sin: Tensor, other_name: str, other: Tensor, shape: Sequence[int]) -> None:
    """Cosines and sines for tokens of this shape, (batch, heads, seq, head_dim), on the other's device."""
    for name, x in (("cos", cos), ("sin", sin)):
        floating(name, x)
        if x.device != other.device:
            raise ValueError(
                f"{name} is on {x.device} but {other_name} is on {other.device}; move one with .to(device)"
            )
    if cos.shape != sin.shape:
        raise ValueError(f"cos has shape {tuple(cos.shape)} but sin has {tuple(sin.shape)}; they must be equal")
    batch, _, seq, head_dim = shape
    rotary_dim = cos.shape[-1] if cos.ndim else 0
    leading = ((seq,), (batch, seq), (1, seq), (batch, 1, seq), (1, 1, seq))
    if rotary_dim % 2 or rotary_dim > head_dim or tuple(cos.shape[:-1]) not in leading:
        raise ValueError(
            f"cos has shape {tuple(cos.shape)}; expected (seq, rotary_dim), (batch or 1, seq, rotary_dim) or (batch or 1, 1, "
            f"seq, rotary_dim) with seq {seq}, batch {batch} and rotary_dim even and at most head_dim {head_dim}"
        )


def angles_with_heads(cos: Tensor | None, sin: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """Checked cosines and sines as a backend receives them: (batch or 1, seq, rotary_dim) gets a dimension for the heads."""
    return (cos.unsqueeze(1), sin.unsqueeze(1)) if cos is not None and sin is not None and cos.ndim == 3 else (cos, sin)


def window_sides(window: tuple[int | None, int | None] | None) -> tuple[int, int]:
    """(left, right) with -1 for no limit."""
    if window is None:
        return -1, -1
    if not isinstance(window, (tuple, list)) or len(window) != 2:
        raise ValueError(
            f"window is {window!r}; expected (left, right): how many keys before and after, None for no limit"
        )
    for side in window:
        if side is not None and (not isinstance(side, numbers.Integral) or side < 0):
            raise ValueError(f"window is {window!r}; each side is a number of keys, zero or more, or None for no limit")
    left, right = (-1 if side is None else int(min(side, _FAR)) for side in window)
    return left, right


def one_alignment(
    q_len: int, k_len: int, window: tuple[int | None, int | None] | None, alibi_slopes: Tensor | None
) -> None:
    """That nothing which aligns to the bottom right stands beside is_causal, where the lengths differ."""
    if window is not None or alibi_slopes is not None:
        raise ValueError(
            f"is_causal aligns to the top left, but window and alibi_slopes to the bottom right, and the lengths "
            f"differ (q {q_len}, k {k_len}); say what you mean with window=(left, 0)"
        )


def softmax_scale(scale: float | None, head_dim: int) -> float:
    if scale is None:
        return 1.0 / math.sqrt(head_dim)
    return number("scale", scale)


def softcap_value(softcap: float | None) -> float:
    if softcap is None:
        return 0.0
    cap = number("softcap", softcap)
    if cap <= 0.0:
        raise ValueError(f"softcap is {softcap}; expected a positive number, or None for none")
    return cap


def readable(x: Tensor) -> bool:
    """Whether checks may read values: a CPU tensor, neither traced, fake nor batched by vmap (a GPU's would wait for it)."""
    return (
        x.is_cpu
        and type(x) is Tensor
        and not torch.compiler.is_compiling()
        and not torch._C._functorch.is_functorch_wrapped_tensor(x)
    )


def cu_seqlens(name: str, x: Tensor, total_name: str, total: int, max_name: str, max_seqlen: int, like: Tensor) -> None:
    """Cumulative lengths: int32 (batch + 1,), from 0, never decreasing, ending at the total."""
    tensor(name, x)
    if x.dtype != torch.int32:
        raise TypeError(f"{name} has dtype {x.dtype}; expected torch.int32: convert it with {name}.to(torch.int32)")
    if x.ndim != 1 or x.shape[0] < 1:
        raise ValueError(
            f"{name} has shape {tuple(x.shape)}; expected (batch + 1,): 0, then the running sum of lengths"
        )
    if x.device != like.device:
        raise ValueError(
            f"{name} is on {x.device} but {total_name} is on {like.device}; move it there with .to(device)"
        )
    if not readable(x):
        return
    values = x.tolist()
    if values[0] != 0 or values[-1] != total:
        raise ValueError(
            f"{name} runs from {values[0]} to {values[-1]}; expected 0 to {total}, the first dimension of {total_name}"
        )
    longest = 0
    for before, after in itertools.pairwise(values):
        if after < before:
            raise ValueError(f"{name} decreases from {before} to {after}; expected the running sum of lengths")
        longest = max(longest, after - before)
    if longest > max_seqlen:
        raise ValueError(
            f"{name} holds a sequence of {longest} tokens but {max_name} is {max_seqlen}; raise {max_name}"
        )
