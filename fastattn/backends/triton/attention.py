"""Scaled dot-product attention: the kernels are in attention_forward.py and attention_backward.py."""

from torch import Tensor

from ..attention_outputs import attention_outputs
from . import attention_forward, attention_problem
from .attention_problem import Problem


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
    """Why the kernels cannot take this call; None if they can."""
    return attention_problem.unsupported(query, key, value)


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
    out, lse = attention_outputs(query, value)
    problem = Problem(
        query,
        key,
        value,
        None,
        None,
        attn_mask,
        alibi_slopes,
        seed,
        query.shape[2],
        key.shape[2],
        scale,
        window_left,
        window_right,
        diagonal,
        softcap,
        dropout_p,
    )
    attention_forward.forward(problem, out, lse)
    return out, lse
