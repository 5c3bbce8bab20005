"""Checks of configurations and of token ids; messages say what was given, what was expected and what to do."""

from typing import Any

import torch
from torch import Tensor

from fastattn.ops import _checks


def sizes(config: Any, *names: str) -> None:
    for name in names:
        if _checks.length(name, getattr(config, name)) == 0:
            raise ValueError(f"{name} is 0; expected at least 1")


def divides(name: str, divisor: int, of_name: str, of: int) -> None:
    if of % divisor:
        raise ValueError(f"{of_name} is {of} and {name} {divisor}; expected {name} to divide {of_name}")


def one_of(config: Any, name: str, known: tuple[str, ...]) -> None:
    _checks.one_of(name, getattr(config, name), known)


def probabilities(config: Any, *names: str) -> None:
    for name in names:
        _checks.probability(name, getattr(config, name))


def token_ids(name: str, x: Tensor, layout: str = "(batch, seq)", ndim: int = 2) -> None:
    _checks.tensor(name, x)
    if x.dtype not in (torch.int64, torch.int32):
        raise TypeError(
            f"{name} has dtype {x.dtype}; expected int64 or int32 token numbers: convert it with {name}.long()"
        )
    _checks.rank(name, x, layout, ndim)


def same_shape(name: str, x: Tensor, other_name: str, other: Tensor) -> None:
    _checks.tensor(name, x)
    if x.shape != other.shape:
        raise ValueError(
            f"{name} has shape {tuple(x.shape)} but {other_name} has {tuple(other.shape)}; they must be equal"
        )


def shape(name: str, x: Tensor, layout: str, expected: tuple[int, ...]) -> None:
    _checks.tensor(name, x)
    if x.shape != expected:
        raise ValueError(f"{name} has shape {tuple(x.shape)}; expected {layout} = {expected}")


def within_positions(longest: int, most: int) -> None:
    if longest > most:
        raise ValueError(
            f"a sequence has {longest} tokens but max_positions is {most}; cut it, or make the model with more positions"
        )


def kept_tokens(attention_mask: Tensor | None, input_ids: Tensor, prefix: str = "") -> Tensor | None:
    """attention_mask as bool; None where it keeps every token."""
    if attention_mask is None:
        return None
    same_shape(f"{prefix}attention_mask", attention_mask, f"{prefix}input_ids", input_ids)
    kept = attention_mask.bool()
    return None if bool(kept.all()) else kept


def prompts(input_ids: Tensor, cu_seqlens: Tensor, max_seqlen: int, batch: int) -> None:
    token_ids("input_ids", input_ids, "(tokens,)", 1)
    max_seqlen = _checks.integer("max_seqlen", max_seqlen)
    _checks.cu_seqlens("cu_seqlens", cu_seqlens, "input_ids", input_ids.shape[0], "max_seqlen", max_seqlen, input_ids)
    if cu_seqlens.shape[0] != batch + 1:
        raise ValueError(
            f"cu_seqlens holds {cu_seqlens.shape[0] - 1} prompts but the cache {batch}; they must be equal"
        )
    if batch and int(cu_seqlens.diff().min()) == 0:
        raise ValueError(
            "a prompt is empty; every prompt needs a token to continue from, such as the one for the beginning"
        )


def continued(input_ids: Tensor, batch: int) -> None:
    token_ids("input_ids", input_ids)
    if input_ids.shape[0] != batch:
        raise ValueError(
            f"input_ids has batch {input_ids.shape[0]} but the cache holds {batch} sequences; they must be equal"
        )
