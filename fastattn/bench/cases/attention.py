"""Attention on (batch, heads, seq, head_dim), against eager and `F.scaled_dot_product_attention`."""

import functools
from dataclasses import replace

import torch

import fastattn

from .. import peers
from ..harness import FORWARD, OURS, TRAINING, Case, Peer, Problem
from ._inputs import lengths, random

FLOAT, HALF = torch.float32, torch.bfloat16


def cases(quick: bool = False) -> list[Case]:
    """Encoder and decoder shapes: long and short sequences, head_dim 32 to 128, causal, padded, grouped."""
    if quick:
        return [_case(1, 2, 64, 32, direction=direction) for direction in (FORWARD, TRAINING)]
    return [
        _case(1, 12, 2048, 64),
        _case(1, 12, 2048, 64, dtype=HALF),
        _case(1, 12, 2048, 64, options="causal"),
        _case(1, 12, 2048, 64, options="causal", dtype=HALF),
        _case(8, 12, 512, 64),
        _case(8, 12, 512, 64, options="padded"),
        _case(8, 12, 512, 64, dtype=HALF),
        _case(32, 12, 64, 32),
        _case(32, 12, 64, 32, dtype=HALF),
        _case(32, 12, 128, 32),
        _case(32, 12, 128, 32, dtype=HALF),
        _case(1, 32, 1024, 128, kv_heads=8, options="causal"),
        _case(1, 32, 1024, 128, kv_heads=8, options="causal", dtype=HALF),
        _case(4, 12, 512, 64, direction=TRAINING),
        _case(4, 12, 512, 64, direction=TRAINING, dtype=HALF),
        _case(1, 12, 2048, 64, options="causal", direction=TRAINING),
    ]


def gpu_cases() -> list[Case]:
    """16,384 tokens 2048 wide, in sequences of 512 to 16,384; and what torch's function has no fast path for."""
    found = [
        _case(16384 // seq, 2048 // head_dim, seq, head_dim, options=options, dtype=HALF, direction=direction)
        for direction in (FORWARD, TRAINING)
        for options in ("", "causal")
        for head_dim in (64, 128)
        for seq in (512, 2048, 8192, 16384)
    ]
    found += [
        _case(2, 32, 4096, 64, options=options, dtype=HALF, direction=direction)
        for options in ("bias", "window", "softcap")
        for direction in (FORWARD, TRAINING)
    ]
    return [replace(case, compiled=False) for case in found]


WINDOW, SOFTCAP = 1024, 30.0


def _case(batch, heads, seq, head_dim, *, kv_heads=None, options="", dtype=FLOAT, direction=FORWARD) -> Case:
    kv_heads = kv_heads or heads
    shape = {"batch": batch, "heads": heads, "kv_heads": kv_heads, "seq": seq, "head_dim": head_dim}
    pairs = batch * heads * seq * seq
    if options in ("causal", "softcap"):
        pairs /= 2
    if options == "window":
        pairs = batch * heads * seq * WINDOW
    if options == "padded":
        pairs = heads * seq * sum(lengths(batch, seq))
    # Two products forward; five backward, the scores being computed again.
    flops = pairs * head_dim * (4 if direction == FORWARD else 14)
    tensors = batch * seq * head_dim * (2 * heads + 2 * kv_heads)  # query, out, key, value
    moved = tensors * dtype.itemsize * (1 if direction == FORWARD else 3)
    return Case("attention", shape, dtype, direction, _build, flops, moved, options)


def _build(case: Case) -> Problem:
    batch, heads, kv_heads, seq, head_dim = case.shape.values()
    query, key, value = random(
        (batch, seq, heads, head_dim),
        (batch, seq, kv_heads, head_dim),
        (batch, seq, kv_heads, head_dim),
        dtype=case.dtype,
    )
    inputs = tuple(x.transpose(1, 2) for x in (query, key, value))  # the layout a projection gives
    if case.device == "cuda":
        return _on_gpu(case, inputs)
    causal, mask = case.options == "causal", None
    if case.options == "padded":
        mask = (torch.arange(seq) < torch.tensor(lengths(batch, seq)).unsqueeze(1))[:, None, None, :]
    grouped = heads != kv_heads
    eager = Peer(functools.partial(peers.eager_attention, mask=mask, causal=causal), inputs)
    ours = functools.partial(fastattn.attention, attn_mask=mask, is_causal=causal, enable_gqa=grouped)
    others = {
        OURS: Peer(ours, inputs),
        "sdpa": Peer(functools.partial(peers.sdpa, mask=mask, causal=causal), inputs),
        "eager": eager,
    }
    return Problem(others, "sdpa", eager)


def _on_gpu(case: Case, inputs: tuple[torch.Tensor, ...]) -> Problem:
    """Against every backend of SDPA, and against FlexAttention where that is written for it."""
    seq = case.shape["seq"]
    if case.options in ("", "causal"):
        causal = case.options == "causal"
        short = seq <= 2048  # beyond, the scores of all heads fill a GPU's memory
        eager = Peer(
            functools.partial(peers.eager_attention if short else peers.attention_by_head, causal=causal), inputs
        )
        others = {
            OURS: Peer(functools.partial(fastattn.attention, is_causal=causal), inputs),
            "sdpa": Peer(functools.partial(peers.sdpa, causal=causal), inputs),
            **{
                name: Peer(functools.partial(peers.sdpa_of(backend), causal=causal), inputs)
                for name, backend in peers.SDPA_BACKENDS.items()
            },
            "flash-attn": Peer(functools.partial(peers.flash_attn, causal=causal), inputs),
        }
        return Problem({**others, "eager": eager} if short else others, "sdpa", eager)
    if case.options == "bias":  # as T5 has it: additive, the same for all sequences, and trained
        bias = random((1, case.shape["heads"], seq, seq), dtype=case.dtype)[0]
        eager = Peer(peers.eager_attention, (*inputs, bias))
        others = {OURS: Peer(fastattn.attention, eager.inputs), "sdpa": Peer(peers.sdpa, eager.inputs), "eager": eager}
        return Problem(others, "sdpa", eager)
    window, softcap = (WINDOW, 0.0) if case.options == "window" else (0, SOFTCAP)
    place = torch.arange(seq)
    band = place[:, None] >= place
    if window:
        band &= place[:, None] - place <= window
    eager = Peer(functools.partial(peers.eager_attention, mask=band, softcap=softcap), inputs)
    ours = functools.partial(fastattn.attention, window=(window or None, 0), softcap=softcap or None)
    others = {OURS: Peer(ours, inputs), "eager": eager}
    others["flex"] = Peer(functools.partial(peers.flex, window=window, softcap=softcap), inputs)
    if not softcap:  # which torch's function does not have
        others["sdpa"] = Peer(functools.partial(peers.sdpa, mask=band), inputs)
    return Problem(others, "flex", eager)
