"""The contrastive loss InfoNCE with in-batch negatives."""

import torch
from torch import Tensor

from .. import dispatch
from ..backends import BACKENDS
from ..backends.found_gradients import found_with_the_loss
from . import _autocast, _checks, _library

_eager = BACKENDS["eager"]["info_nce"].forward


def info_nce(
    query: Tensor,
    positive: Tensor,
    negatives: Tensor | None = None,
    temperature: float | Tensor = 0.07,
    symmetric: bool = False,
) -> Tensor:
    """Mean cross entropy of each query picking its own positive among all positives and negatives.

    Args:
        query: (n, dim), floating; normalise first for cosine similarity.
        positive: (n, dim); row i belongs to query i.
        negatives: (m, dim), further candidates shared by all queries.
        temperature: the scores' divisor, a positive number or a tensor of one element, with a gradient if it requires one.
        symmetric: average with the loss of each positive picking its query (CLIP).

    Returns:
        A scalar, float32 (float64 for float64). Where gradients are recorded, a kernel finds them along with the loss: the
        scores never exist as a whole.

    Raises:
        TypeError: wrong or mixed dtypes.
        ValueError: shapes, devices or values that do not fit.

    Source: van den Oord et al., 2018; symmetric Radford et al., 2021.
    """
    if _autocast.active(query):
        query, positive, negatives = _autocast.cast(query, positive, negatives)
    _checks.floating("query", query)
    _checks.like("positive", positive, "query", query)
    _checks.rank("query", query, "(n, dim)", 2)
    if positive.shape != query.shape:
        raise ValueError(
            f"positive has shape {tuple(positive.shape)} but query has {tuple(query.shape)}; they must be equal"
        )
    if negatives is not None:
        _checks.like("negatives", negatives, "query", query)
        if negatives.ndim != 2 or negatives.shape[1] != query.shape[1]:
            raise ValueError(
                f"negatives has shape {tuple(negatives.shape)}; expected (m, dim) with dim {query.shape[1]}"
            )
    divisor = divisor_of_scores(temperature, query)
    recorded = _library.needs_grad(query, positive, negatives, divisor)
    needs = [recorded and x is not None and x.requires_grad for x in (query, positive, negatives, divisor)]
    args = (query, positive, negatives, divisor, _checks.flag("symmetric", symmetric), needs)
    backend = dispatch.choose("info_nce", args)
    if backend == "eager":
        return _eager(*args)[0]
    if recorded:
        return _library.record(_InfoNce, *args, backend)[0]
    return _forward(*args, backend)[0]


def divisor_of_scores(temperature: float | Tensor, query: Tensor) -> Tensor:
    """A temperature, checked, as a tensor on query's device."""
    if isinstance(temperature, Tensor):
        _checks.tensor("temperature", temperature)
        if temperature.numel() != 1 or not temperature.is_floating_point():
            raise ValueError(
                f"temperature has shape {tuple(temperature.shape)} and dtype {temperature.dtype}; expected one floating element"
            )
        if temperature.device != query.device and temperature.device.type != "cpu":
            raise ValueError(f"temperature is on {temperature.device} but query is on {query.device}; move one")
        return temperature.to(query.device)  # and its gradient back, by autograd
    _checks.number("temperature", temperature)
    if not temperature > 0.0:
        raise ValueError(f"temperature is {temperature}; expected a positive number")
    return torch.full((), float(temperature), dtype=torch.float64, device=query.device)


def _fake_forward(query, positive, negatives, temperature, symmetric, needs, backend):
    found = found_with_the_loss(query, needs)
    grads = _fake_gradients(query, positive, negatives, temperature, found, torch.float32)
    return query.new_empty((), dtype=torch.float32), *grads


def _fake_gradients(query, positive, negatives, temperature, needs, temperature_dtype):
    *of_rows, of_temperature = needs
    rows = zip((query, positive, negatives), of_rows, strict=True)
    grads = [torch.empty_like(x) if need else query.new_empty(0) for x, need in rows]
    return *grads, torch.empty_like(temperature, dtype=temperature_dtype) if of_temperature else query.new_empty(0)


def _fake_backward(grad_loss, query, positive, negatives, temperature, *found_and_settings):
    *_, needs, _ = found_and_settings
    return _fake_gradients(query, positive, negatives, temperature, needs, temperature.dtype)


_TENSORS = "Tensor query, Tensor positive, Tensor? negatives, Tensor temperature"
_FOUND = "Tensor found_query, Tensor found_positive, Tensor found_negatives, Tensor found_temperature"
_forward = _library.define(
    "info_nce", f"({_TENSORS}, bool symmetric, bool[] needs) -> (Tensor loss, {_FOUND})", _fake_forward
)
_backward = _library.define(
    "info_nce",
    f"(Tensor grad_loss, {_TENSORS}, {_FOUND}, bool symmetric, bool[] needs) "
    "-> (Tensor grad_query, Tensor grad_positive, Tensor grad_negatives, Tensor grad_temperature)",
    _fake_backward,
    "backward",
)


@_library.differentiable(_forward)
class _InfoNce(torch.autograd.Function):
    @staticmethod
    def forward(*args):
        return _forward(*args)

    @staticmethod
    def setup_context(ctx, inputs, output):
        *tensors, symmetric, needs, backend = inputs
        _, *grads = output
        ctx.mark_non_differentiable(*grads)
        ctx.save_for_backward(*tensors, *grads)
        ctx.settings = symmetric, needs, backend

    @staticmethod
    def backward(ctx, grad_loss, *_):
        saved = ctx.saved_tensors
        grads = _library.scale_found(grad_loss, saved[4:])
        if grads is None:
            grads = _library.run_backward(_backward, grad_loss, *saved, *ctx.settings)
        _, needs, _ = ctx.settings
        return *(grad if need else None for grad, need in zip(grads, needs, strict=True)), None, None, None
