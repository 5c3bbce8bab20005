"""What only a GPU can show: tensors of more than 2^31 elements, and that calls go where they should.

The rule for huge tensors: the last rows of an output are, to the bit, what they are when they are computed alone.
"""

import warnings
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import fastattn
from fastattn.backends import BACKENDS

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

HUGE = 2**31 + 2**20


def random(*shape: int) -> Tensor:
    """In bfloat16, made a part at a time: a normal tensor of this size in float32 would take 8 GiB for itself."""
    out = torch.empty(shape, dtype=torch.bfloat16, device="cuda")
    for part in out.flatten().split(2**28):
        part.normal_()
    return out


def needs_memory(tensors: int) -> None:
    free = torch.cuda.mem_get_info()[0]
    if free < tensors * HUGE * 2 * 1.1:
        pytest.skip(f"needs {tensors} tensors of {HUGE * 2 >> 30} GiB, and {free >> 30} GiB are free")


def check_last(
    backend: str, function: Callable[..., Tensor], huge: tuple[Tensor, ...], last: tuple[Tensor, ...], take: int
) -> None:
    """`take` rows at the end of function(*huge), and of the gradient of its first argument, against function(*last)."""
    results = []
    for tensors in (huge, last):
        tensors = tuple(x.requires_grad_(i == 0) for i, x in enumerate(tensors))
        with fastattn.use_backend(backend):
            out = function(*tensors)
            (grad,) = torch.autograd.grad(
                out, tensors[:1], torch.ones((), dtype=out.dtype, device="cuda").expand_as(out)
            )
        results.append((out.detach()[-take:].clone(), grad[-take:].clone()))
        del out, grad
    for found, expected in zip(*results, strict=True):
        assert torch.equal(found, expected)


@pytest.mark.parametrize("norm", [fastattn.layer_norm, fastattn.rms_norm])
@pytest.mark.parametrize("backend", [name for name in ("cuda", "triton") if "layer_norm" in BACKENDS[name]])
def test_norms_of_huge_tensors(norm: Callable, backend: str) -> None:
    needs_memory(5)
    x, weight = random(HUGE // 4096, 4096), torch.ones(4096, device="cuda")
    check_last(backend, lambda x: norm(x, weight), (x,), (x.detach()[-64:].clone(),), 64)


@pytest.mark.skipif("linear" not in BACKENDS["triton"], reason="Triton has no linear")
def test_linear_of_huge_tensors() -> None:
    needs_memory(5)
    x, weight = random(HUGE // 1024, 1024), random(1024, 1024) / 32
    last = (x.detach()[-256:].clone(),)
    check_last("triton", lambda x: fastattn.linear(x, weight, activation="gelu"), (x,), last, 256)


@pytest.mark.skipif("attention" not in BACKENDS["triton"], reason="Triton has no attention")
def test_attention_of_huge_tensors() -> None:
    """Many short sequences: their number times their size is what passes 2^31."""
    needs_memory(9)
    query, key, value = (random(HUGE // (64 * 8 * 64), 8, 64, 64) for _ in range(3))
    last = tuple(x.detach()[-2:].clone() for x in (query, key, value))
    check_last("triton", fastattn.attention, (query, key, value), last, 2)


@pytest.mark.skipif("rotary_embedding" not in BACKENDS["triton"], reason="Triton has no rotary embedding")
def test_rotary_embedding_of_huge_tensors() -> None:
    needs_memory(5)
    query, key = random(HUGE // (32 * 128 * 128), 32, 128, 128), random(2, 2, 128, 128)
    angles = torch.randn(128, 128, device="cuda")

    def turned(query: Tensor) -> Tensor:
        keys = key[:1].expand(query.shape[0], -1, -1, -1)
        return fastattn.rotary_embedding(query, keys, angles.cos(), angles.sin())[0]

    check_last("triton", turned, (query,), (query.detach()[-2:].clone(),), 2)


def test_a_gpu_call_runs_on_a_kernel_and_one_that_cannot_warns_once() -> None:
    x = torch.randn(4, 64, device="cuda")
    assert fastattn.explain("layer_norm", x).backend in ("cuda", "triton")
    with pytest.warns(UserWarning, match="in plain torch on this GPU"):
        fastattn.layer_norm(x.double())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fastattn.layer_norm(x.double())


def test_the_current_device_and_stream_are_kept() -> None:
    """A kernel runs on the stream that is current, after what was put there before it."""
    x = torch.zeros(1 << 20, 64, device="cuda")
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream), fastattn.use_backend("triton"):
        for _ in range(20):
            x.add_(1.0)
        total = fastattn.rms_norm(x, residual=x)[1]
    stream.synchronize()
    assert torch.equal(total, torch.full_like(x, 40.0))
