"""The functions below the modules, on their own: a decoder block by hand, packed sequences, and which kernel runs.

Run it: python examples/functional_ops.py
"""

import torch

import fastattn

BATCH, HEADS, KV_HEADS, SEQ, HEAD_DIM = 2, 8, 2, 128, 64
WIDTH = HEADS * HEAD_DIM


def decoder_block() -> None:
    """RMS norm, grouped causal attention with a sliding window, add + norm in one pass, SwiGLU; and its gradients."""
    x = torch.randn(BATCH, SEQ, WIDTH, requires_grad=True)
    scale = torch.ones(WIDTH)
    sizes = {"query": WIDTH, "key": KV_HEADS * HEAD_DIM, "value": KV_HEADS * HEAD_DIM}
    normed = fastattn.rms_norm(x, scale)
    query, key, value = (
        fastattn.linear(normed, torch.randn(size, WIDTH) / WIDTH**0.5).unflatten(-1, (-1, HEAD_DIM)).transpose(1, 2)
        for size in sizes.values()
    )
    mixed = fastattn.attention(query, key, value, enable_gqa=True, window=(63, 0))
    normed, residual = fastattn.rms_norm(mixed.transpose(1, 2).flatten(2), scale, residual=x)
    w1, w_gate, w2 = (torch.randn(shape) / 32 for shape in ((1024, WIDTH), (1024, WIDTH), (WIDTH, 1024)))
    out = residual + fastattn.feed_forward(normed, w1, None, w2, None, activation="silu", w_gate=w_gate)
    out.square().mean().backward()
    print(f"decoder block: out {tuple(out.shape)}, gradient of x {tuple(x.grad.shape)}")


def packed() -> None:
    """Three sequences end to end: no padding is computed, and each gets what it would get alone."""
    lengths = [5, 90, 33]
    query, key, value = torch.randn(3, sum(lengths), HEADS, HEAD_DIM)
    ends = torch.tensor([0, 5, 95, 128], dtype=torch.int32)
    out = fastattn.attention_varlen(query, key, value, ends, ends, max(lengths), max(lengths))
    alone = fastattn.attention(*(x[5:95].transpose(0, 1).unsqueeze(0) for x in (query, key, value)))
    print(f"packed and alone differ by {(out[5:95] - alone[0].transpose(0, 1)).abs().max():.1e}")


def which_kernel() -> None:
    """What would run, why the others would not, and how to choose."""
    query = torch.randn(1, HEADS, SEQ, HEAD_DIM)
    print(fastattn.explain("attention", query, query, query))
    with fastattn.use_backend("eager"):
        plain = fastattn.attention(query, query, query)
    print(f"the kernel and plain torch differ by {(fastattn.attention(query, query, query) - plain).abs().max():.1e}")


if __name__ == "__main__":
    torch.manual_seed(0)
    decoder_block()
    packed()
    which_kernel()
