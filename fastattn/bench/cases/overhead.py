"""What a call costs beside its kernel: tensors so small that the kernel takes next to nothing.

"call - backend" is a call of fastattn less the same work of its backend alone ("backend": the backend's `forward` on
arguments already checked, allocations included): the arguments' checks and the choice of a backend. Where "recorded",
autograd keeps what a backward needs, and "backend" is the same forward in the smallest `torch.autograd.Function` there is,
which torch asks of everyone. (No backward follows; in training it does.) torch's functions on the same tensors stand beside
it. One thread measures it best: `--threads 1`.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

import fastattn

from ...backends import BACKENDS
from .. import peers
from ..harness import BACKEND, EAGER, FORWARD, OURS, TRAINING, Case, Peer, Problem
from ._inputs import random

TOKENS, DIM = 2, 16


@dataclass(frozen=True)
class _Call:
    """One op on small tensors.

    Attributes:
        ours: fastattn's call, of the inputs.
        inputs: what gets a gradient, where it is recorded.
        backend: the arguments that the backend's `forward` takes for these inputs.
        others: the same by torch; its "eager" is the definition.
        baseline: which of the others.
    """

    ours: Callable
    inputs: tuple[Tensor, ...]
    backend: Callable[..., tuple]
    others: dict[str, Callable]
    baseline: str = EAGER


def cases(quick: bool = False) -> list[Case]:
    """Two tokens through each op: without a graph, with one, and with its backward."""
    ops = ("attention", "layer_norm") if quick else tuple(_CALLS)
    return [
        Case("overhead", {"tokens": TOKENS, "dim": DIM}, torch.float32, direction, _build, 0, 0, f"{op}{recorded}")
        for op in ops
        for direction, recorded in ((FORWARD, ""), (FORWARD, " recorded"), (TRAINING, ""))
        if op != "attention_with_kvcache" or (direction, recorded) == (FORWARD, "")
    ]


def _build(case: Case) -> Problem:
    op, *recorded = case.options.split()
    call = _CALLS[op]()
    calls = {OURS: call.ours, **call.others}
    if recorded:
        calls = {name: _recording(own) for name, own in calls.items()}
        inputs = tuple(x.requires_grad_() for x in call.inputs)
    else:
        inputs = call.inputs
    rivals = {name: Peer(own, inputs) for name, own in calls.items()}
    if case.direction == FORWARD:
        plain = tuple(x.detach() for x in call.inputs)
        backend = _backend(op, call, plain)
        if recorded:
            rivals[BACKEND] = Peer(_recording(functools.partial(_Smallest.apply, backend)), inputs)
        else:
            rivals[BACKEND] = Peer(backend, plain)
    return Problem(rivals, call.baseline, Peer(call.others[EAGER], tuple(x.detach() for x in call.inputs)))


def _recording(call: Callable) -> Callable:
    def recorded(*inputs):
        with torch.enable_grad():
            return call(*inputs)

    return recorded


class _Smallest(torch.autograd.Function):
    @staticmethod
    def forward(ctx, backend, *inputs):
        ctx.save_for_backward(*inputs)
        return backend()

    @staticmethod
    def backward(ctx, *grads):
        raise RuntimeError("this Function is timed forward only")


def _backend(op: str, call: _Call, inputs: tuple[Tensor, ...]) -> Callable:
    """The backend's forward with its arguments made ready; it gives the first result."""
    arguments = call.backend(*inputs)
    takes = [
        name for name, grid in BACKENDS.items() if name == "eager" or (op in grid and not _refuses(grid[op], arguments))
    ]
    forward = BACKENDS[takes[0]][op].forward
    return lambda *_: forward(*arguments)[0]


def _refuses(module, arguments: tuple) -> bool:
    return module.unsupported(*arguments) is not None


def _attention() -> _Call:
    inputs = random(*[(1, 1, TOKENS, DIM)] * 3, dtype=torch.float32)
    return _Call(
        fastattn.attention,
        tuple(inputs),
        lambda *qkv: (*qkv, None, None, None, DIM**-0.5, -1, -1, 0, 0.0, 0.0),
        {"sdpa": peers.sdpa, EAGER: peers.eager_attention},
        "sdpa",
    )


def _attention_varlen() -> _Call:
    inputs = random(*[(TOKENS, 1, DIM)] * 3, dtype=torch.float32)
    ends = torch.tensor([0, TOKENS], dtype=torch.int32)

    def ours(query, key, value):
        return fastattn.attention_varlen(query, key, value, ends, ends, TOKENS, TOKENS)

    def dense(attention: Callable) -> Callable:
        return lambda *qkv: attention(*(x.transpose(0, 1).unsqueeze(0) for x in qkv))[0].transpose(0, 1)

    return _Call(
        ours,
        tuple(inputs),
        lambda *qkv: (*qkv, ends, ends, None, None, None, TOKENS, TOKENS, DIM**-0.5, -1, -1, 0.0, 0.0),
        {"sdpa": dense(peers.sdpa), EAGER: dense(peers.eager_attention)},
        "sdpa",
    )


def _attention_with_kvcache() -> _Call:
    inputs = random((1, 1, 1, DIM), *[(1, 1, TOKENS, DIM)] * 2, *[(1, 1, 1, DIM)] * 2, dtype=torch.float32)
    lengths = torch.tensor([TOKENS - 1], dtype=torch.int32)

    def ours(query, k_cache, v_cache, k, v):
        return fastattn.attention_with_kvcache(query, k_cache, v_cache, k, v, cache_seqlens=lengths)

    def appending(attention: Callable) -> Callable:
        def step(query, k_cache, v_cache, k, v):
            k_cache[:, :, TOKENS - 1 :] = k
            v_cache[:, :, TOKENS - 1 :] = v
            return attention(query, k_cache, v_cache)

        return step

    return _Call(
        ours,
        tuple(inputs),
        lambda *tensors: (*tensors, lengths, None, None, DIM**-0.5, -1, 0, 0.0),
        {"sdpa": appending(peers.sdpa), EAGER: appending(peers.eager_attention)},
        "sdpa",
    )


def _layer_norm() -> _Call:
    inputs = random((TOKENS, DIM), (DIM,), (DIM,), dtype=torch.float32)
    return _Call(
        fastattn.layer_norm,
        tuple(inputs),
        lambda *tensors: (*tensors, None, None, 1e-5, 0.0),
        {EAGER: lambda x, weight, bias: F.layer_norm(x, (DIM,), weight, bias)},
    )


def _rms_norm() -> _Call:
    inputs = random((TOKENS, DIM), (DIM,), dtype=torch.float32)
    return _Call(
        functools.partial(fastattn.rms_norm, eps=1e-6),
        tuple(inputs),
        lambda *tensors: (*tensors, None, None, 1e-6, 0.0),
        {EAGER: lambda x, weight: F.rms_norm(x, (DIM,), weight, 1e-6)},
    )


def _linear() -> _Call:
    inputs = random((TOKENS, DIM), (DIM, DIM), (DIM,), dtype=torch.float32)
    return _Call(fastattn.linear, tuple(inputs), lambda *tensors: (*tensors, None, "none", False), {EAGER: F.linear})


def _feed_forward() -> _Call:
    inputs = random((TOKENS, DIM), (DIM, DIM), (DIM,), (DIM, DIM), (DIM,), dtype=torch.float32)
    return _Call(
        fastattn.feed_forward,
        tuple(inputs),
        lambda *tensors: (*tensors, None, None, "gelu", 0.0, False),
        {EAGER: lambda x, w1, b1, w2, b2: F.linear(F.gelu(F.linear(x, w1, b1)), w2, b2)},
    )


_CALLS: dict[str, Callable[[], _Call]] = {
    "attention": _attention,
    "attention_varlen": _attention_varlen,
    "attention_with_kvcache": _attention_with_kvcache,
    "layer_norm": _layer_norm,
    "rms_norm": _rms_norm,
    "linear": _linear,
    "feed_forward": _feed_forward,
}
