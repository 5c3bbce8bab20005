"""What the tests of decoder_layer share, whatever the backend."""

import copy
from typing import Any

import hypothesis.strategies as st
import torch
from torch import Tensor

import fastattn

NAMES = ("w_qkv", "b_qkv", "w_out", "b_out", "norm1_weight", "norm1_bias", "w1", "b1", "w2", "b2", "w_gate")
NAMES += ("norm2_weight", "norm2_bias")


def weights(
    width: int, heads: int, kv_heads: int, head_dim: int, hidden: int, dtype: torch.dtype, seed: int = 0
) -> dict[str, Any]:
    """The weights of a layer by the names of decoder_layer's arguments."""
    generator = torch.Generator().manual_seed(seed)
    columns = (heads + 2 * kv_heads) * head_dim
    shapes = {"w_qkv": (columns, width), "w_out": (width, heads * head_dim), "w2": (width, hidden)}
    shapes |= dict.fromkeys(("w1", "w_gate"), (hidden, width)) | {"b_qkv": (columns,), "b1": (hidden,)}  # type: ignore[dict-item]
    made = {}
    for name in NAMES:
        shape: tuple[int, ...] = shapes.get(name, (width,))
        scale = 1.0 if len(shape) == 1 else shape[1] ** -0.5
        made[name] = (torch.randn(shape, generator=generator) * scale).to(dtype)
    return made


def run(x: Tensor, k_cache: Tensor, v_cache: Tensor, **options) -> tuple[Tensor, Tensor, Tensor]:
    """The output and what became of the caches; each of verify's runs appends to its own."""
    k_cache, v_cache = copy.deepcopy((k_cache, v_cache))
    return fastattn.decoder_layer(x, k_cache, v_cache, **options), k_cache, v_cache


def cases(draw, dtype: torch.dtype) -> tuple[tuple[Tensor, ...], dict[str, Any]]:
    """Arguments of `run`; the caches hold NaN beyond their keys."""
    seed, batch, new = draw(st.integers(0, 99)), draw(st.integers(0, 4)), draw(st.sampled_from([1, 1, 2, 9]))
    kv_heads, head_dim = draw(st.integers(1, 3)), draw(st.sampled_from([8, 18, 32]))
    heads = kv_heads * draw(st.integers(1, 3))
    width, hidden = draw(st.sampled_from([16, 33, 96])), draw(st.sampled_from([1, 40, 130]))
    options = weights(width, heads, kv_heads, head_dim, hidden, dtype, seed)
    norm = draw(st.sampled_from(["layer", "rms"]))
    for name in options:
        if (norm == "rms" and name.startswith("norm") and name.endswith("bias")) or (
            (name[0] != "w" or name == "w_gate") and draw(st.integers(0, 2)) == 0
        ):
            options[name] = None
        elif name[0] == "w" and draw(st.booleans()):
            options[name] = options[name].T.contiguous().T
        elif name.startswith("norm") and draw(st.booleans()):
            options[name] = options[name].float()
    torch.manual_seed(seed)
    lengths = torch.tensor(
        draw(st.lists(st.sampled_from([0, 1, 7, 60]), min_size=batch, max_size=batch)), dtype=torch.int32
    )
    capacity = int(lengths.max().item() if batch else 0) + new + draw(st.integers(0, 3))
    caches = [torch.randn(batch, kv_heads, capacity, head_dim).to(dtype) for _ in range(2)]
    for cache in caches:
        for sequence, length in zip(cache, lengths.tolist(), strict=True):
            sequence[:, length:] = torch.nan
    if draw(st.booleans()):
        rotary_dim = draw(st.sampled_from([2, head_dim // 2 // 2 * 2, head_dim]))
        shape = draw(st.sampled_from([(new,), (1, new), (batch, new)]))
        angles = torch.randn(*shape, rotary_dim // 2).repeat(*[1] * len(shape), 2)
        kind = draw(st.sampled_from([dtype, torch.float32]))
        options |= {"cos": angles.cos().to(kind), "sin": angles.sin().to(kind)}
    options |= {"cache_seqlens": lengths, "norm": norm, "eps1": 1e-3}
    options["activation"] = draw(st.sampled_from([None, "relu", "gelu", "gelu_tanh", "silu"]))
    options["scale"] = draw(st.sampled_from([None, 0.3]))
    return (torch.randn(batch, new, width).to(dtype), *caches), options
