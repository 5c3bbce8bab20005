"""NaN and infinity in the inputs of every op and module: they propagate as in eager."""

import math
from typing import Any

import pytest
import torch
from bad_arguments import INF, MODULES, NAN
from samples import SAMPLES, Sample, run, substitute, tensors
from torch import Tensor
from torch.utils._pytree import tree_map

import fastattn
from fastattn import verify
from fastattn.backends.triton import interpreted

pytestmark = pytest.mark.kernel

# Samples of attention in which a query does not see every key.
PARTIAL = ("causal", "bool-mask", "window", "one-projection", "transposed", "append", "paged")
# Samples of linear + cross entropy in which a row is ignored.
IGNORING = ("mean", "every-option")

SPECIALS = (NAN, INF, -INF)


def specials(number: int, sample: Sample, backend: str) -> tuple[float, ...]:
    """Those that a sample meets: where Triton interprets its kernels, slowly, one, if its op has samples for all."""
    if backend != "triton" or not interpreted or sum(other.op == sample.op for other in SAMPLES) < len(SPECIALS):
        return SPECIALS
    return (SPECIALS[number % len(SPECIALS)],)


KERNELS = [
    pytest.param(sample, backend, special, id=f"{sample}-{backend}-{special}")
    for number, sample in enumerate(SAMPLES)
    for backend in sample.backends()
    for special in specials(number, sample, backend)
    if backend != "eager"
]


def widened(x: Any) -> Any:
    return x.detach().double().requires_grad_(x.requires_grad) if isinstance(x, Tensor) and x.is_floating_point() else x


@pytest.mark.parametrize(("sample", "backend", "special"), KERNELS)
def test_nan_and_infinity_propagate_as_in_eager(sample: Sample, backend: str, special: float) -> None:
    """One in each tensor in turn: outputs and gradients hold them where the numerics rule wants them.

    Whether a sum with an infinity ends as NaN or infinite depends on its order, and is not compared. Left out are keys and
    values where not every query sees every key, and the weights that ignored rows would meet: zero times NaN is NaN in eager,
    and a kernel does not look at what it skips.
    """

    def comparable(x: Tensor) -> Tensor:
        return x.masked_fill(~x.isfinite(), NAN) if math.isinf(special) else x

    unseen: tuple[int, ...] = ()
    if "attention" in sample.op and any(word in sample.name for word in PARTIAL):
        unseen = (1, 2, 3, 4)
    elif sample.op == "linear_cross_entropy" and sample.name in IGNORING:
        unseen = (1, 3, 4)
    for index, x in enumerate(tensors(sample.arguments())):
        if not x.is_floating_point() or index in unseen:
            continue

        def arguments(index: int = index) -> tuple[tuple, dict]:
            plain = sample.arguments()
            x = tensors(plain)[index]
            wrong = torch.empty_strided(x.shape, x.stride(), dtype=x.dtype).copy_(x.detach())
            wrong[(0,) * x.ndim] = special
            return substitute(plain, [x], [wrong.requires_grad_(x.requires_grad)])

        fast, eager = (run(sample, name, arguments()) for name in (backend, "eager"))
        reference = run(sample, "eager", tree_map(widened, arguments()))
        for kind, *results in zip(("output", "gradient"), fast, eager, reference, strict=True):
            for number, same in enumerate(zip(*results, strict=True)):
                if not same[0].is_floating_point():
                    continue  # which key has the largest weight, where one is NaN, is no number to compare
                comparison = verify.compare(*map(comparable, same), name=f"{kind} {number}")
                assert comparison.passed, f"{special} in tensor {index}: {comparison}"


@pytest.mark.parametrize("special", SPECIALS)
@pytest.mark.parametrize("name", MODULES)
def test_modules_propagate_nan_and_infinity_as_in_eager(name: str, special: float) -> None:
    make, good = MODULES[name]
    module = make().eval()
    for argument, x in good().items():
        if not isinstance(x, Tensor) or not x.is_floating_point():
            continue
        arguments = good()
        arguments[argument][(0,) * x.ndim] = special
        found = tensors(module(**arguments))
        with fastattn.use_backend("eager"):
            expected = tensors(module(**arguments))
        for fast, eager in zip(found, expected, strict=True):
            assert torch.equal(fast.isfinite(), eager.isfinite()), argument
            assert torch.equal(fast.isnan(), eager.isnan()) or math.isinf(special), argument
        assert not (math.isnan(special) and all(out.isfinite().all() for out in found)), f"{argument} is not read"
