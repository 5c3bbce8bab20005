"""How attention spreads its weights: csrc/cpu/attention_summary.cpp."""

from torch import Tensor

from ..attention_outputs import summary_outputs
from . import _native


def unsupported(
    query: Tensor,
    key: Tensor,
    attn_mask: Tensor | None,
    alibi_slopes: Tensor | None,
    scale: float,
    window_left: int,
    window_right: int,
    diagonal: int,
    softcap: float,
) -> str | None:
    """Why the kernel cannot take this call; None if it can."""
    return _native.unsupported(query, key)


def forward(
    query: Tensor,
    key: Tensor,
    attn_mask: Tensor | None,
    alibi_slopes: Tensor | None,
    scale: float,
    window_left: int,
    window_right: int,
    diagonal: int,
    softcap: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Arguments and results as in docs/architecture.md, "Normalised arguments"."""
    outputs = summary_outputs(query)
    _native.C.attention_summary_forward(
        query, key, attn_mask, alibi_slopes, *outputs, scale, window_left, window_right, diagonal, softcap
    )
    return outputs
