"""Scaled dot-product attention on Hopper GPUs: csrc/cuda/attention_hopper.cu. The gradients are the Triton backend's."""

import os

import torch
from torch import Tensor

from .. import triton
from ..attention_outputs import attention_outputs
from ..tensors import DTYPES
from . import _native
from ._native import address

HEAD_DIMS = (64, 128)
SECTION_BYTES = 32 << 20  # of keys and values: what an H100's second-level cache holds beside all else
# Off until it has run on a GPU: what an emulation cannot show, a race or a barrier that is never reached, would hang the process.
ASKED: bool = _native.emulated or os.environ.get("FASTATTN_HOPPER_ATTENTION", "0") not in ("", "0")


def unsupported(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    alibi_slopes: Tensor | None,
    seed: Tensor | None,
    scale: float,
    window_left: int,
    window_right: int,
    diagonal: int,
    softcap: float,
    dropout_p: float,
) -> str | None:
    """Why the kernel cannot take this call; None if it can."""
    if not ASKED:  # first: every call on a GPU comes by here
        return "its kernel for Hopper has not run on a GPU yet; FASTATTN_HOPPER_ATTENTION=1 asks for it, to try it out"
    reason = _native.unsupported(query, key, value)
    if reason is not None:
        return reason
    if not _native.emulated and torch.cuda.get_device_capability(query.device) != (9, 0):
        return "its kernel is for Hopper GPUs (compute capability 9.0)"
    if triton.reason is not None:
        return f"its gradients are the triton backend's: {triton.reason}"
    if query.dtype == torch.float32:
        return "it multiplies bfloat16 and float16, not float32"
    dims = query.shape[3], value.shape[3]
    if dims not in ((dim, dim) for dim in HEAD_DIMS):
        return f"it takes head_dim and value_dim of 64 or 128, both the same, and they are {dims[0]} and {dims[1]}"
    given = {"a mask": attn_mask, "ALiBi": alibi_slopes, "dropout": seed}
    name = next((name for name, x in given.items() if x is not None), "softcap" if softcap > 0.0 else None)
    if name is not None:
        return f"it has no {name.removeprefix('a ')}"
    if not scale > 0.0:
        return f"it takes scales above 0, and this is {scale}"
    if query.shape[2] == 0 or key.shape[2] == 0:
        return "there are no queries or no keys"
    if max(query.shape[:2].numel() * -(-query.shape[2] // 128), query.shape[2] + key.shape[2]) >= 2**30:
        return "it counts tiles and tokens in 32 bits, and these are more"
    return None


def _loadable(tensor: Tensor) -> Tensor:
    """The tensor, or a copy of it where the copy engine could not read it: rows with gaps, or off multiples of 16 bytes."""
    strides = [stride for stride, size in zip(tensor.stride()[:3], tensor.shape) if size > 1]
    good = tensor.stride(3) == 1 and all(stride > 0 and stride % 8 == 0 for stride in strides)
    # A tensor with room in front that is no multiple of 16 bytes is aligned once copied.
    return tensor if good and tensor.data_ptr() % 16 == 0 else tensor.clone(memory_format=torch.contiguous_format)


def forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    alibi_slopes: Tensor | None,
    seed: Tensor | None,
    scale: float,
    window_left: int,
    window_right: int,
    diagonal: int,
    softcap: float,
    dropout_p: float,
) -> tuple[Tensor, Tensor]:
    """Arguments and results as in docs/architecture.md, "Normalised arguments"."""
    query, key, value = (_loadable(x) for x in (query, key, value))
    out, lse = attention_outputs(query, value)
    batch, heads, q_len, dim = query.shape
    kv_heads, k_len = key.shape[1:3]
    most = q_len + k_len  # a window wider than all there is is as wide as that

    def place(tensor: Tensor, name: str, heads: int, seq: int) -> int:
        return address(tensor, name, query, (batch, heads, seq, dim), query.dtype, strided=True)

    with torch.cuda.device_of(query):
        _native.C.attention_forward(
            DTYPES.index(query.dtype),
            batch,
            dim,
            place(query, "query", heads, q_len),
            (heads, q_len),
            query.stride()[:3],
            place(key, "key", kv_heads, k_len),
            place(value, "value", kv_heads, k_len),
            (kv_heads, k_len),
            key.stride()[:3],
            value.stride()[:3],
            scale,
            min(window_left, most),
            min(window_right, most),
            diagonal,
            SECTION_BYTES,
            address(out.transpose(1, 2), "out", query, (batch, q_len, heads, dim), query.dtype),
            address(lse, "lse", query, (batch, heads, q_len), torch.float32),
            _native.stream(query),
        )
    return out, lse


def backward(*args: object) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Arguments and results as in docs/architecture.md, "Normalised arguments"."""
    from ..triton import attention

    return attention.backward(*args)  # type: ignore[arg-type]
