"""A few small calls of every op: plain, and with each option that changes the graph. The tests of all ops run on them."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

import fastattn
from fastattn.backends import OPS
from fastattn.backends.triton import interpreted

Call = tuple[tuple, dict[str, Any]]


class Draw:
    """Makes the tensors of one sample, the same ones each time."""

    def __init__(self, dtype: torch.dtype, requires_grad: bool, device: str = "cpu") -> None:
        self.dtype, self.requires_grad, self.device = dtype, requires_grad, device
        self._generator = torch.Generator().manual_seed(1)

    def __call__(self, *shape: int) -> Tensor:
        """A normal tensor, of which the op has a gradient."""
        return self.fixed(*shape).requires_grad_(self.requires_grad)

    def fixed(self, *shape: int) -> Tensor:
        """A normal tensor without a gradient."""
        return torch.randn(shape, generator=self._generator).to(self.dtype).to(self.device)

    def positive(self, *shape: int) -> Tensor:
        """As a call, but uniform between 0.5 and 1.5."""
        values = torch.rand(shape, generator=self._generator) + 0.5
        return values.to(self.dtype).to(self.device).requires_grad_(self.requires_grad)

    def slopes(self, *shape: int) -> Tensor:
        """ALiBi's slopes: float32 whatever the dtype."""
        return torch.rand(shape, generator=self._generator).to(self.device)

    def mask(self, *shape: int) -> Tensor:
        """A boolean mask, whose last row is off."""
        mask = torch.rand(shape, generator=self._generator) > 0.3
        mask[..., 0] = True
        mask[..., -1, :] = False
        return mask.to(self.device)

    def ints(self, *values: Any, dtype: torch.dtype = torch.int32) -> Tensor:
        return torch.tensor(values, dtype=dtype, device=self.device)


@dataclass(frozen=True)
class Sample:
    """One call of `fastattn.<op>`.

    Attributes:
        build: makes the arguments.
        random: whether it draws random numbers.
        inference: whether the op has no gradients.
    """

    op: str
    name: str
    build: Callable[[Draw], Call]
    random: bool = False
    inference: bool = False

    @property
    def function(self) -> Callable:
        return getattr(fastattn, self.op)

    def arguments(
        self, dtype: torch.dtype = torch.float32, requires_grad: bool = True, device: str = "cpu"
    ) -> tuple[tuple, dict[str, Any]]:
        """Fresh arguments with the same values each time; those with a gradient require it."""
        return self.build(Draw(dtype, requires_grad and not self.inference, device))

    def backends(self, dtype: torch.dtype = torch.float32) -> list[str]:
        """The backends that take the call."""
        args, kwargs = self.arguments(dtype)
        return [name for name, reason in fastattn.explain(self.op, *args, **kwargs).reasons.items() if reason is None]

    def __str__(self) -> str:
        return f"{self.op}-{self.name}"


def leaves(arguments: Any) -> list[Tensor]:
    """The tensors that require a gradient, in order."""
    return [leaf for leaf in tree_leaves(arguments) if isinstance(leaf, Tensor) and leaf.requires_grad]


def tensors(outputs: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(outputs) if isinstance(leaf, Tensor)]


def substitute(arguments: Any, old: list[Tensor], new: Any) -> Any:
    """The arguments with other tensors in the place of some."""
    by_id = {id(x): y for x, y in zip(old, new, strict=True)}
    return tree_map(lambda x: by_id.get(id(x), x), arguments)


def run(sample: Sample, backend: str, arguments: tuple[tuple, dict]) -> tuple[list[Tensor], list[Tensor]]:
    """Outputs, and the gradients of the leaves for a fixed projection of the outputs, from a fixed seed."""
    torch.manual_seed(0)
    args, kwargs = arguments
    with fastattn.use_backend(backend):
        outputs = tensors(sample.function(*args, **kwargs))
        return outputs, gradients(outputs, leaves(arguments))


def gradients(outputs: list[Tensor], inputs: list[Tensor], **options: Any) -> list[Tensor]:
    recorded = [out for out in outputs if out.requires_grad]
    if not recorded:
        return []
    return list(torch.autograd.grad(recorded, inputs, [direction(out) for out in recorded], **options))


def direction(out: Tensor) -> Tensor:
    """A gradient for an output: eighths, exact in every dtype; zero where the output is -inf (lse without a key)."""
    wave = (torch.arange(out.numel(), device=out.device) * 7 % 17 - 8).reshape(out.shape) / 8
    return wave.to(out.dtype).masked_fill(out.detach() == -torch.inf, 0.0)


def call(*args: Any, **kwargs: Any) -> Call:
    return args, kwargs


def _attention(t: Draw, heads: int = 2, kv_heads: int = 2, q: int = 3, k: int = 4) -> tuple[Tensor, Tensor, Tensor]:
    return t(2, heads, q, 4), t(2, kv_heads, k, 4), t(2, kv_heads, k, 5)


def _varlen(t: Draw, heads: int = 2, kv_heads: int = 2) -> tuple:
    ends_q, ends_k = t.ints(0, 2, 2, 5), t.ints(0, 3, 4, 8)
    return t(5, heads, 4), t(8, kv_heads, 4), t(8, kv_heads, 3), ends_q, ends_k, 3, 4


def _cache(t: Draw, heads: int = 2) -> tuple:
    return t(2, heads, 2, 4), t(2, 2, 6, 4), t(2, 2, 6, 3), t(2, 2, 2, 4), t(2, 2, 2, 3)


def _pages(t: Draw) -> Call:
    query, _, _, k, v = _cache(t)
    table = t.ints([3, 0], [2, 1])
    return call(query, t(4, 2, 3, 4), t(4, 2, 3, 3), k, v, cache_seqlens=t.ints(3, 0), block_table=table)


def _additive(t: Draw) -> tuple:
    return t(2, 3, 6), t(2, 4, 5), t(2, 4, 3), t(8, 6), t(8, 5), t(8)


def _gated(t: Draw) -> tuple:
    return t(2, 3, 4), t(6, 4), t(6), t(5, 6), t(5)


def _layer(t: Draw) -> tuple:
    """Two heads of 3 on a width of 4, 5 hidden."""
    attention = (t(6, 4), t(6), t(6, 4), None, t(6, 4), t(6), t(4, 6), t(4))
    return (*attention, t(4), t(4), t(5, 4), t(5), t(4, 5), t(4), t(4), None)


def _decoder(t: Draw, gated: bool) -> tuple:
    """(positional, by keyword): four heads of 2 over two of keys, on a width of 4, 5 hidden; caches of four tokens."""
    norm = (t(4), None if gated else t(4))
    weights = (t(16, 4), t(16), t(4, 8), None, *norm, t(5, 4), t(5), t(4, 5), t(4), *norm)
    options = {"w_gate": t(5, 4), "cos": t(2, 3, 2), "sin": t(2, 3, 2), "norm": "rms"} if gated else {}
    return (t(2, 3, 4), t(2, 2, 4, 2), t(2, 2, 4, 2), *weights), {"cache_seqlens": t.ints(1, 0), **options}


def _rotary(t: Draw) -> tuple:
    return t(2, 2, 3, 6), t(2, 1, 3, 6)


def _loss(t: Draw, *target: int) -> tuple:
    return t(2, 2, 4), t(5, 4), t.ints([0, 4], list(target), dtype=torch.int64)


SAMPLES = [
    Sample("attention", "plain", lambda t: call(*_attention(t))),
    Sample("attention", "causal-lse", lambda t: call(*_attention(t, q=4), is_causal=True, return_lse=True)),
    Sample("attention", "bool-mask-gqa", lambda t: call(*_attention(t, 4), t.mask(2, 1, 3, 4), enable_gqa=True)),
    Sample("attention", "float-mask-softcap", lambda t: call(*_attention(t), t(2, 1, 4), softcap=2.0, return_lse=True)),
    Sample(
        "attention",
        "window-alibi",
        lambda t: call(*_attention(t), window=(1, None), alibi_slopes=t.slopes(2), scale=0.7),
    ),
    Sample("attention", "dropout", lambda t: call(*_attention(t), t(1, 2, 3, 1), 0.3), random=True),
    Sample(
        "attention",
        "transposed",
        lambda t: call(*(t(2, 3, 2, 4).transpose(1, 2) for _ in range(3)), is_causal=True),
    ),
    Sample(
        "attention", "one-projection", lambda t: call(*t(2, 3, 3, 2, 4).permute(2, 0, 3, 1, 4).unbind(), is_causal=True)
    ),
    Sample("attention_varlen", "plain", lambda t: call(*_varlen(t))),
    Sample("attention_varlen", "causal-gqa-lse", lambda t: call(*_varlen(t, 4), is_causal=True, return_lse=True)),
    Sample(
        "attention_varlen",
        "one-projection",
        lambda t: call(*t(5, 3, 2, 4).unbind(1), t.ints(0, 2, 5), t.ints(0, 2, 5), 3, 3, is_causal=True),
    ),
    Sample("attention_varlen", "bool-mask", lambda t: call(*_varlen(t), attn_mask=t.mask(3, 1, 3, 4))),
    Sample(
        "attention_varlen",
        "float-mask-window-alibi",
        lambda t: call(*_varlen(t), attn_mask=t(1, 2, 3, 4), window=(2, 1), alibi_slopes=t.slopes(3, 2), softcap=3.0),
    ),
    Sample("attention_varlen", "dropout", lambda t: call(*_varlen(t), dropout_p=0.3), random=True),
    Sample("attention_with_kvcache", "append", lambda t: call(*_cache(t), cache_seqlens=t.ints(3, 0)), inference=True),
    Sample(
        "attention_with_kvcache",
        "gqa-lse",
        lambda t: call(*_cache(t, 4)[:3], cache_seqlens=t.ints(5, 2), return_lse=True, is_causal=False),
        inference=True,
    ),
    Sample(
        "attention_with_kvcache",
        "window-alibi",
        lambda t: call(*_cache(t), cache_seqlens=t.ints(3, 0), window=(2, 0), alibi_slopes=t.slopes(2), softcap=2.0),
        inference=True,
    ),
    Sample("attention_with_kvcache", "paged", _pages, inference=True),
    Sample(
        "attention_with_kvcache",
        "turned",
        lambda t: call(*_cache(t), cache_seqlens=t.ints(3, 0), cos=t(2, 2, 4), sin=t(2, 2, 4), interleaved=True),
        inference=True,
    ),
    Sample("attention_summary", "plain", lambda t: call(*_attention(t)[:2]), inference=True),
    Sample("attention_summary", "causal", lambda t: call(*_attention(t, q=4)[:2], is_causal=True), inference=True),
    Sample(
        "attention_summary",
        "bool-mask-gqa",
        lambda t: call(*_attention(t, 4)[:2], t.mask(2, 1, 3, 4), enable_gqa=True),
        inference=True,
    ),
    Sample(
        "attention_summary",
        "float-mask-window-alibi",
        lambda t: call(
            *_attention(t)[:2], t.fixed(2, 1, 4), window=(1, None), alibi_slopes=t.slopes(2), softcap=2.0, scale=0.7
        ),
        inference=True,
    ),
    Sample("additive_attention", "plain", lambda t: call(*_additive(t))),
    Sample("additive_attention", "bool-mask", lambda t: call(*_additive(t), t.mask(3, 4))),
    Sample("additive_attention", "float-mask", lambda t: call(*_additive(t), t(2, 1, 4))),
    Sample("additive_attention", "dropout", lambda t: call(*_additive(t), dropout_p=0.3), random=True),
    Sample("layer_norm", "plain", lambda t: call(t(2, 3, 5), t(5), t(5))),
    Sample("layer_norm", "no-affine", lambda t: call(t(2, 3, 5))),
    Sample("layer_norm", "residual", lambda t: call(t(2, 3, 5), t(5), None, 1e-3, t(2, 3, 5))),
    Sample("layer_norm", "dropout", lambda t: call(t(2, 3, 5), t(5), t(5), dropout_p=0.3), random=True),
    Sample(
        "layer_norm",
        "dropout-residual",
        lambda t: call(t(2, 3, 5), t(5), t(5), residual=t(2, 3, 5), dropout_p=0.3),
        random=True,
    ),
    Sample("rms_norm", "plain", lambda t: call(t(2, 3, 5), t(5))),
    Sample("rms_norm", "no-weight", lambda t: call(t(2, 3, 5), eps=1e-3)),
    Sample("rms_norm", "residual", lambda t: call(t(2, 3, 5), t(5), residual=t(2, 3, 5))),
    Sample("rms_norm", "dropout", lambda t: call(t(2, 3, 5), t(5), dropout_p=0.3), random=True),
    Sample(
        "rms_norm", "dropout-residual", lambda t: call(t(2, 3, 5), None, 1e-3, t(2, 3, 5), dropout_p=0.3), random=True
    ),
    Sample("linear", "plain", lambda t: call(t(2, 3, 4), t(5, 4))),
    Sample("linear", "bias-gelu", lambda t: call(t(2, 3, 4), t(5, 4), t(5), "gelu")),
    Sample("linear", "gelu-tanh", lambda t: call(t(4), t(5, 4), None, "gelu_tanh")),
    Sample("linear", "relu-residual", lambda t: call(t(3, 4), t(5, 4), t(5), "relu", t(3, 5))),
    Sample("linear", "silu-transposed", lambda t: call(t(3, 4), t(4, 5).T, t(5), activation="silu", residual=t(3, 5))),
    Sample("feed_forward", "gelu", lambda t: call(*_gated(t))),
    Sample("feed_forward", "relu-no-bias", lambda t: call(t(3, 4), t(6, 4), None, t(4, 6), None, "relu")),
    Sample("feed_forward", "gated-silu", lambda t: call(*_gated(t), "silu", t(6, 4))),
    Sample("feed_forward", "gelu-tanh-dropout", lambda t: call(*_gated(t), "gelu_tanh", dropout_p=0.3), random=True),
    Sample("feed_forward", "gated-dropout", lambda t: call(*_gated(t), "gelu", t(6, 4), 0.3), random=True),
    Sample("rotary_embedding", "halves", lambda t: call(*_rotary(t), t(3, 6), t(3, 6))),
    Sample("rotary_embedding", "fixed-angles", lambda t: call(*_rotary(t), t.fixed(3, 6), t.fixed(3, 6))),
    Sample(
        "rotary_embedding",
        "fixed-angles-interleaved-part",
        lambda t: call(*_rotary(t), t.fixed(2, 3, 4), t.fixed(2, 3, 4), True),
    ),
    Sample("rotary_embedding", "interleaved-part", lambda t: call(*_rotary(t), t(2, 3, 4), t(2, 3, 4), True)),
    Sample("linear_cross_entropy", "mean", lambda t: call(*_loss(t, 2, -100))),
    Sample("linear_cross_entropy", "sum", lambda t: call(*_loss(t, 1, 3), t(5), label_smoothing=0.1, reduction="sum")),
    Sample(
        "linear_cross_entropy",
        "every-option",
        lambda t: call(*_loss(t, 2, -1), t(5), -1, 0.1, 0.01, 3.0, t.slopes(5) + 0.5, "none"),
    ),
    Sample("encoder_layer", "post-norm", lambda t: call(t(2, 3, 4), *_layer(t), 2), inference=True),
    Sample(
        "encoder_layer",
        "norm-first-packed",
        lambda t: call(
            t(1, 5, 4), *_layer(t), 2, "silu", 1e-3, 1e-4, True, scale=0.7, cu_seqlens=t.ints(0, 2, 5), max_seqlen=3
        ),
        inference=True,
    ),
    Sample("decoder_layer", "gpt", lambda t: _decoder(t, False), inference=True),
    Sample("decoder_layer", "llama", lambda t: _decoder(t, True), inference=True),
    Sample("info_nce", "plain", lambda t: call(t(3, 4), t(3, 4))),
    Sample("info_nce", "every-option", lambda t: call(t(3, 4), t(3, 4), t(2, 4), 0.7, True)),
    Sample(
        "info_nce",
        "learnt-temperature",
        lambda t: call(t(3, 4), t(3, 4), temperature=t.positive(1)),
    ),
]

assert {sample.op for sample in SAMPLES} == set(OPS), "every op has samples"

# A row a sample and backend that takes it: a backend that learns an op comes under the rules by itself.
EVERY = [pytest.param(sample, id=str(sample)) for sample in SAMPLES]
SIMPLEST = [next(sample for sample in SAMPLES if sample.op == op) for op in OPS]
RICHEST = [max((s for s in SAMPLES if s.op == op), key=lambda s: len(tensors(s.arguments()))) for op in OPS]


def asked(sample: Sample) -> list[str]:
    """The backends on which the rules for all ops are held to a sample.

    They look at what is around the kernels. Where Triton interprets these, which takes its time, two samples an op will do.
    """
    slow = {"triton"} if interpreted and sample not in (*SIMPLEST, *RICHEST) else set()
    return [backend for backend in sample.backends() if backend not in slow]


TAKEN = [pytest.param(sample, backend, id=f"{sample}-{backend}") for sample in SAMPLES for backend in asked(sample)]
FUSED = [row for row in TAKEN if row.values[1] != "eager"]
