"""The rules for all ops, whatever backends each has: registration, gradients, transforms. See also test_ops_compiled.py."""

from typing import Any

import pytest
import torch
from samples import (
    EVERY,
    FUSED,
    SAMPLES,
    SIMPLEST,
    TAKEN,
    Sample,
    direction,
    gradients,
    leaves,
    run,
    substitute,
    tensors,
)
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

import fastattn

pytestmark = pytest.mark.usefixtures("same_random_numbers")


# Eager runs through the registration where autograd has nothing to look through it for.
REGISTERED = [row for row in TAKEN if row in FUSED or row.values[0].inference]


def detached(tree: Any) -> Any:
    """Copies without a graph, with the same strides."""
    return tree_map(
        lambda x: (
            torch.empty_strided(x.shape, x.stride(), dtype=x.dtype).copy_(x.detach()) if isinstance(x, Tensor) else x
        ),
        tree,
    )


# ---- Registration ----------------------------------------------------------------------------------------------------


class Recorder(TorchDispatchMode):
    """Notes the calls of registered ops that pass torch's dispatcher, with copies of their arguments."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, tuple, dict]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "fastattn":
            self.calls.append((func, *detached((args, kwargs or {}))))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(("sample", "backend"), REGISTERED)
def test_opcheck(sample: Sample, backend: str) -> None:
    with Recorder() as recorder:
        run(sample, backend, sample.arguments())
    expected = 1 if backend == "eager" or sample.inference else 2  # forward and backward
    assert len(recorder.calls) == expected
    for overload, args, kwargs in recorder.calls:
        torch.library.opcheck(overload, args, kwargs)


@pytest.mark.parametrize(("sample", "backend"), TAKEN)
def test_fake_tensors_look_like_the_real_results(sample: Sample, backend: str) -> None:
    arguments = sample.arguments()
    with torch._subclasses.FakeTensorMode() as mode:
        fake = tree_map(lambda x: mode.from_tensor(x) if isinstance(x, Tensor) else x, arguments)
        found = run(sample, backend, fake)
    for results, expected in zip(found, run(sample, backend, arguments), strict=True):
        assert [describe(x) for x in results] == [describe(x) for x in expected]


def describe(x: Tensor) -> tuple:
    # The stride of a dimension of one element says nothing.
    strides = [stride for size, stride in zip(x.shape, x.stride(), strict=True) if size > 1]
    return tuple(x.shape), strides, x.dtype, x.device


@pytest.mark.parametrize("sample", EVERY)
def test_meta_tensors_give_shapes_and_dtypes(sample: Sample) -> None:
    found = run(sample, "eager", sample.arguments(device="meta"))
    for results, expected in zip(found, run(sample, "eager", sample.arguments()), strict=True):
        assert [(x.shape, x.dtype) for x in results] == [(x.shape, x.dtype) for x in expected]
        assert all(x.is_meta for x in results)


# ---- Gradients -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sample", [sample for sample in SAMPLES if not sample.inference], ids=str)
def test_gradcheck(sample: Sample) -> None:
    arguments = sample.arguments(torch.float64)
    inputs = leaves(arguments)

    def function(*values: Tensor) -> list[Tensor]:
        torch.manual_seed(0)
        args, kwargs = substitute(arguments, inputs, values)
        outputs = tensors(sample.function(*args, **kwargs))
        return [out.masked_fill(out == -torch.inf, 0.0) for out in outputs]

    with fastattn.use_backend("eager"):
        assert torch.autograd.gradcheck(function, inputs, fast_mode=True)


@pytest.mark.parametrize(("sample", "backend"), [row for row in FUSED if not row.values[0].inference])
def test_a_second_derivative_of_a_fused_backward_is_an_error_that_says_so(sample: Sample, backend: str) -> None:
    args, kwargs = arguments = sample.arguments()
    inputs = leaves(arguments)
    with fastattn.use_backend(backend):
        # Squares, so that the gradient that comes in depends on the inputs, too: a rotation's depends on nothing else.
        outputs = [out.square() for out in tensors(sample.function(*args, **kwargs))]
        once = gradients(outputs, inputs, create_graph=True)
        with pytest.raises(
            RuntimeError, match=rf"fastattn\.{sample.op} has no second derivative.*use_backend\('eager'\)"
        ):
            torch.autograd.grad([grad.square().sum() for grad in once if grad.requires_grad], inputs)


@pytest.mark.parametrize("sample", [sample for sample in SIMPLEST if not sample.inference], ids=str)
def test_eager_has_second_derivatives(sample: Sample) -> None:
    arguments = sample.arguments(torch.float64)
    inputs = leaves(arguments)

    def function(*values: Tensor) -> list[Tensor]:
        args, kwargs = substitute(arguments, inputs, values)
        return tensors(sample.function(*args, **kwargs))

    with fastattn.use_backend("eager"):
        assert torch.autograd.gradgradcheck(function, inputs, fast_mode=True)


@pytest.mark.parametrize("sample", [sample for sample in SAMPLES if not sample.inference], ids=str)
def test_forward_mode_differentiation_is_eagers(sample: Sample) -> None:
    """Kernels have reverse mode alone; where forward mode is on, dispatch has to leave them out."""
    arguments = sample.arguments()
    inputs = [x.detach() for x in leaves(arguments)]
    plain = substitute(arguments, leaves(arguments), inputs)

    def function(*values: Tensor) -> list[Tensor]:
        torch.manual_seed(0)
        args, kwargs = substitute(plain, inputs, values)
        return tensors(sample.function(*args, **kwargs))

    tangents = [direction(x) for x in inputs]
    with fastattn.use_backend("eager"):
        _, expected = torch.func.jvp(function, tuple(inputs), tuple(tangents))
    _, found = torch.func.jvp(function, tuple(inputs), tuple(tangents))
    torch.testing.assert_close(found, expected, equal_nan=True)
    with torch.autograd.forward_ad.dual_level():
        args, kwargs = arguments
        for backend, reason in fastattn.explain(sample.op, *args, **kwargs).reasons.items():
            assert backend == "eager" or "forward-mode" in reason or "has no" in reason


@pytest.mark.parametrize(("sample", "backend"), [row for row in FUSED if not row.values[0].inference])
def test_a_kept_graph_gives_the_same_gradients_again(sample: Sample, backend: str) -> None:
    """Whatever the caller does with the first ones."""
    args, kwargs = arguments = sample.arguments()
    with fastattn.use_backend(backend):
        outputs = tensors(sample.function(*args, **kwargs))
        first = gradients(outputs, leaves(arguments), retain_graph=True)
        expected = [grad.clone() for grad in first]
        for grad in first:
            grad.zero_()
        torch.testing.assert_close(gradients(outputs, leaves(arguments)), expected, rtol=0.0, atol=0.0, equal_nan=True)


class Stop(torch.autograd.Function):
    """Lets no gradient through."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx, grad: Tensor) -> None:
        return None


@pytest.mark.parametrize(("sample", "backend"), [row for row in FUSED if not row.values[0].inference])
def test_no_gradient_comes_from_none(sample: Sample, backend: str) -> None:
    args, kwargs = arguments = sample.arguments()
    with fastattn.use_backend(backend):
        stopped = sum(Stop.apply(out).sum() for out in tensors(sample.function(*args, **kwargs)) if out.requires_grad)
        grads = torch.autograd.grad(stopped, leaves(arguments), allow_unused=True)
    assert all(grad is None or not grad.any() for grad in grads)


# ---- Views, and what outlives a transform ----------------------------------------------------------------------------


@pytest.mark.parametrize(("sample", "backend"), FUSED)
def test_views_that_negate_their_memory(sample: Sample, backend: str) -> None:
    """The imaginary part of a conjugate is one, and so may be the gradient that a complex function sends."""
    with fastattn.use_backend(backend):
        args, kwargs = sample.arguments(requires_grad=False)
        expected = tensors(sample.function(*args, **kwargs))
    for index, x in enumerate(tensors(sample.arguments(requires_grad=False))):
        if not x.is_floating_point():
            continue
        arguments = sample.arguments(requires_grad=False)
        x = tensors(arguments)[index]
        view = torch.complex(torch.zeros_like(x), -x).conj().imag
        assert view.is_neg()
        args, kwargs = substitute(arguments, [x], [view])
        torch.manual_seed(0)
        with fastattn.use_backend(backend):
            if sample.op in ("attention_with_kvcache", "decoder_layer") and index in (1, 2):
                refusal = "_cache is changed in place, and is a negated view|the rows of the cache have gaps"
                with pytest.raises((ValueError, RuntimeError), match=refusal):
                    sample.function(*args, **kwargs)
            else:
                torch.testing.assert_close(tensors(sample.function(*args, **kwargs)), expected)
    if not sample.inference:
        outputs, expected = run(sample, backend, sample.arguments())
        args, kwargs = arguments = sample.arguments()
        torch.manual_seed(0)
        with fastattn.use_backend(backend):
            outputs = tensors(sample.function(*args, **kwargs))
        sent = [torch.complex(torch.zeros_like(out), -direction(out)).conj().imag for out in outputs]
        torch.testing.assert_close(torch.autograd.grad(outputs, leaves(arguments), sent), tuple(expected))


@pytest.mark.parametrize("recorded", [False, True])
@pytest.mark.parametrize(("sample", "backend"), FUSED)
def test_tensors_that_outlive_a_transform(sample: Sample, backend: str, recorded: bool) -> None:
    """What a function under torch.func keeps of its argument stands for the tensor that was given."""
    expected, grads = run(sample, backend, sample.arguments())
    for index in range(len(leaves(sample.arguments()))):
        arguments = sample.arguments()
        given = leaves(arguments)
        kept: list[Tensor] = []
        torch.func.grad(lambda x, kept=kept: (kept.append(x), x.sum())[1])(given[index].detach())
        args, kwargs = substitute(arguments, [given[index]], kept)
        torch.manual_seed(0)
        with fastattn.use_backend(backend), torch.set_grad_enabled(recorded):
            outputs = tensors(sample.function(*args, **kwargs))
            torch.testing.assert_close(outputs, expected)
            if recorded and len(given) > 1:
                found = gradients(outputs, given[:index] + given[index + 1 :])
                torch.testing.assert_close(found, grads[:index] + grads[index + 1 :])


# ---- Autocast, transforms --------------------------------------------------------------------------------------------

KEEP_DTYPE = {"layer_norm", "rms_norm", "rotary_embedding"}
LOSSES = {"linear_cross_entropy", "info_nce"}


@pytest.mark.parametrize(("sample", "backend"), [row for row in TAKEN if not row.values[0].inference])
def test_autocast(sample: Sample, backend: str) -> None:
    arguments = sample.arguments()
    dtype = torch.float16 if backend == "triton" else torch.bfloat16  # which Triton's interpreter does not know
    with torch.autocast("cpu", dtype):
        outputs, grads = run(sample, backend, arguments)
    assert outputs[0].dtype == (torch.float32 if sample.op in KEEP_DTYPE | LOSSES else dtype)
    assert [grad.dtype for grad in grads] == [leaf.dtype for leaf in leaves(arguments)]


@pytest.mark.parametrize("cache", [torch.float32, torch.bfloat16])
def test_autocast_keeps_the_dtype_of_a_cache(cache: torch.dtype) -> None:
    """Queries come out of autocast's linear layers in its dtype, whatever the cache was made in."""
    query, keys, values = (
        torch.randn(2, 4, 1, 8),
        torch.zeros(2, 2, 6, 8, dtype=cache),
        torch.zeros(2, 2, 6, 8, dtype=cache),
    )
    new, lengths = torch.randn(2, 2, 1, 8), torch.zeros(2, dtype=torch.int32)
    with torch.autocast("cpu", torch.bfloat16):
        out = fastattn.attention_with_kvcache(query.bfloat16(), keys, values, new, new, cache_seqlens=lengths)
    assert out.dtype == cache
    torch.testing.assert_close(keys[:, :, :1], new.to(cache))
    with pytest.raises(TypeError, match="k_cache has dtype"):
        fastattn.attention_with_kvcache(query.half(), keys, values, cache_seqlens=lengths)


# The transforms are the ops layer's matter; interpreted kernels, run one by one under vmap, take too long.
TRANSFORMED = [row for row in TAKEN if not row.values[0].inference and row.values[1] != "triton"]


@pytest.mark.filterwarnings("ignore:There is a performance drop")  # vmap runs kernels one by one
@pytest.mark.parametrize(("sample", "backend"), TRANSFORMED)
def test_functional_gradients(sample: Sample, backend: str) -> None:
    """torch.func.grad, and its vmap over three different calls."""
    arguments = sample.arguments()
    inputs = leaves(arguments)
    stacked = [torch.stack([x.detach() * factor for factor in (1.0, 0.5, 2.0)]) for x in inputs]

    def projection(*values: Tensor) -> Tensor:
        args, kwargs = substitute(detached_leaves, detached_inputs, values)
        return sum(
            (out * direction(out)).masked_fill(out == -torch.inf, 0.0).sum()
            for out in tensors(sample.function(*args, **kwargs))
        )

    detached_inputs = [x.detach() for x in inputs]
    detached_leaves = substitute(arguments, inputs, detached_inputs)
    function = torch.func.grad(projection, argnums=tuple(range(len(inputs))))
    with fastattn.use_backend(backend):
        torch.manual_seed(0)
        batched = torch.func.vmap(function, randomness="same")(*stacked)
        for index in range(3):
            one = [x[index].clone().requires_grad_() for x in stacked]
            _, expected = run(sample, backend, substitute(arguments, inputs, one))
            torch.manual_seed(0)
            for found in (function(*(x[index] for x in stacked)), [x[index] for x in batched]):
                torch.testing.assert_close(list(found), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_lengths_and_classes_may_be_batched() -> None:
    """The checks that read values leave out what vmap hides."""
    weight = torch.randn(5, 4)
    x, target = torch.randn(3, 2, 4), torch.tensor([[0, 4], [1, 2], [3, 3]])
    per_sample = torch.func.vmap(torch.func.grad(lambda x, t: fastattn.linear_cross_entropy(x, weight, t)))(x, target)
    packed, ends = torch.randn(2, 5, 2, 4), torch.tensor([[0, 2, 5], [0, 3, 5]], dtype=torch.int32)
    batched = torch.func.vmap(lambda x, ends: fastattn.attention_varlen(x, x, x, ends, ends, 3, 3))(packed, ends)
    for i in range(3):
        one = torch.func.grad(fastattn.linear_cross_entropy)(x[i], weight, target[i])
        torch.testing.assert_close(per_sample[i], one)
    for i in range(2):
        one = fastattn.attention_varlen(packed[i], packed[i], packed[i], ends[i], ends[i], 3, 3)
        torch.testing.assert_close(batched[i], one)
