"""The weights of attention written out in float64, and what is to be known of them: what fastattn.inspect is judged by."""

import torch
from torch import Tensor


def weights(
    query: Tensor,
    key: Tensor,
    attn_mask: Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    window: tuple[int | None, int | None] | None = None,
    softcap: float | None = None,
    alibi_slopes: Tensor | None = None,
    **_: object,
) -> Tensor:
    """(batch, heads, q, k), float64; zeros where a query sees no key."""
    query, key = query.detach().double(), key.detach().double()
    key = key.repeat_interleave(query.shape[1] // key.shape[1], dim=1)
    q_len, k_len = query.shape[2], key.shape[2]
    score = torch.einsum("bhqd,bhkd->bhqk", query, key) * (query.shape[3] ** -0.5 if scale is None else scale)
    if softcap is not None:
        score = softcap * torch.tanh(score / softcap)
    behind = (
        torch.arange(q_len)[:, None] + (k_len - q_len) - torch.arange(k_len)
    )  # how far the key lies before the query
    if alibi_slopes is not None:
        score = score - alibi_slopes.double()[..., None, None] * behind.abs()
    seen = torch.ones(q_len, k_len, dtype=torch.bool)
    if is_causal:
        seen = seen.tril()
    if window is not None:
        left, right = window
        if left is not None:
            seen &= behind <= left
        if right is not None:
            seen &= behind >= -right
    if attn_mask is not None:
        if attn_mask.dtype == torch.bool:
            seen = seen & attn_mask
        else:
            score = score + attn_mask.detach().double()
    score = score.masked_fill(~seen, -torch.inf)
    nothing = (score == -torch.inf).all(dim=-1, keepdim=True)
    return torch.softmax(score.masked_fill(nothing, 0.0), dim=-1).masked_fill(nothing, 0.0)


def summary(weight: Tensor, is_causal: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    """Entropy, largest weight and distance of weights (…, q, k)."""
    q_len, k_len = weight.shape[-2:]
    position = torch.arange(q_len)[:, None] + (0 if is_causal else k_len - q_len)
    entropy = -torch.xlogy(weight, weight).sum(dim=-1)
    largest = weight.amax(dim=-1) if k_len else torch.zeros_like(entropy)
    return entropy, largest, (weight * (position - torch.arange(k_len)).abs()).sum(dim=-1)


def check_argmax(argmax: Tensor, weight: Tensor, tolerance: float = 1e-5) -> None:
    """The key named has the largest weight, up to rounding; -1 stands where there is no weight."""
    there = weight.sum(dim=-1) > 0
    assert torch.equal(argmax >= 0, there)
    if weight.shape[-1]:
        named = weight.gather(-1, argmax.clamp(min=0).unsqueeze(-1)).squeeze(-1)
        largest = weight.amax(dim=-1)
        assert bool((named >= largest * (1 - tolerance)).all())
