"""Attention on (batch, heads, seq, head_dim), against eager and `F.scaled_dot_product_attention`."""

import functools

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
        _case(1, 32, 1024, 128, kv_heads=8, options="causal"),
        _case(1, 32, 1024, 128, kv_heads=8, options="causal", dtype=HALF),
        _case(4, 12, 512, 64, direction=TRAINING),
        _case(4, 12, 512, 64, direction=TRAINING, dtype=HALF),
        _case(1, 12, 2048, 64, options="causal", direction=TRAINING),
    ]


def _case(batch, heads, seq, head_dim, *, kv_heads=None, options="", dtype=FLOAT, direction=FORWARD) -> Case:
    kv_heads = kv_heads or heads
    shape = {"batch": batch, "heads": heads, "kv_heads": kv_heads, "seq": seq, "head_dim": head_dim}
    pairs = batch * heads * seq * seq
    if options == "causal":
        pairs /= 2
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
