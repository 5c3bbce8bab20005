"""A language model's last linear layer and its cross entropy."""

import torch
from torch import Tensor

from .. import dispatch
from ..backends import BACKENDS
from ..backends.found_gradients import found_with_the_loss
from . import _autocast, _checks, _library
from .linear import matrix_product, vector

_eager = BACKENDS["eager"]["linear_cross_entropy"].forward


def linear_cross_entropy(
    x: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float | None = None,
    class_weight: Tensor | None = None,
    reduction: str = "mean",
) -> Tensor:
    """`F.cross_entropy(softcap(x · weightᵀ + bias), target)`, plus z_loss · logsumexp².

    Args:
        x: (…, dim), floating.
        weight: (vocabulary, dim). bias: (vocabulary,).
        target: (…), int64, class numbers or ignore_index.
        ignore_index, label_smoothing, reduction: as in `torch.nn.functional.cross_entropy`; class_weight is its `weight`,
            (vocabulary,), and has no gradient, as there.
        z_loss: factor of the squared logsumexp of each row that is not ignored.
        softcap: logits become softcap · tanh(logit / softcap).

    Returns:
        float32 (float64 for float64): a scalar, or (…) where reduction is "none". The mean over no row at all is NaN, as
        in torch. Where gradients are recorded, a kernel finds them along with a reduced loss: the logits never exist as a
        whole, and are computed once.

    Raises:
        TypeError: wrong or mixed dtypes.
        ValueError: shapes, devices or values that do not fit, among them a target outside the vocabulary (on a CPU).

    Source: torch.nn.functional.cross_entropy; z-loss Chowdhery et al., 2022 (PaLM).
    """
    if _autocast.active(x):
        x, weight, bias = _autocast.cast(x, weight, bias)
    matrix_product("weight", weight, "x", x)
    vocabulary = weight.shape[0]
    if bias is not None:
        vector("bias", bias, vocabulary, "vocabulary", x)
    _checks.tensor("target", target)
    if target.dtype != torch.int64:
        raise TypeError(f"target has dtype {target.dtype}; expected int64 class numbers: convert it with target.long()")
    if target.shape != x.shape[:-1]:
        raise ValueError(
            f"target has shape {tuple(target.shape)}; expected {tuple(x.shape[:-1])}, x's without its last"
        )
    if target.device != x.device:
        raise ValueError(f"target is on {target.device} but x is on {x.device}; move one with .to(device)")
    if class_weight is not None:
        _checks.floating("class_weight", class_weight)
        if class_weight.shape != (vocabulary,):
            raise ValueError(
                f"class_weight has shape {tuple(class_weight.shape)}; expected (vocabulary,) = ({vocabulary},)"
            )
        if class_weight.device != x.device:
            raise ValueError(f"class_weight is on {class_weight.device} but x is on {x.device}; move one")
        _checks.without_gradient("class_weight", class_weight)
    _checks.one_of("reduction", reduction, ("mean", "sum", "none"))
    _checks.probability("label_smoothing", label_smoothing)
    z_loss = _checks.not_negative("z_loss", z_loss)
    ignore_index = _checks.integer("ignore_index", ignore_index)
    if not -(2**63) <= ignore_index < 2**63:
        raise ValueError(f"ignore_index is {ignore_index}; expected an int64, as target holds them")
    if _checks.readable(target) and target.numel():
        wrong = (target != ignore_index) & ((target < 0) | (target >= vocabulary))
        if wrong.any():
            raise ValueError(
                f"target holds {target[wrong][0].item()}; expected classes 0 to {vocabulary - 1}, or ignore_index {ignore_index}"
            )
    cap = _checks.softcap_value(softcap)
    recorded = _library.needs_grad(x, weight, bias)
    needs = [recorded and tensor is not None and tensor.requires_grad for tensor in (x, weight, bias)]
    settings = (ignore_index, float(label_smoothing), z_loss, cap, reduction, needs)
    args = (x, weight, target, bias, class_weight, *settings)
    backend = dispatch.choose("linear_cross_entropy", args)
    if backend == "eager":
        return _eager(*args)[0]
    if recorded:
        return _library.record(_LinearCrossEntropy, *args, backend)[0]
    return _forward(*args, backend)[0]


def _fake_forward(x, weight, target, bias, class_weight, *settings):
    *_, reduction, needs, _ = settings
    loss = x.new_empty(target.shape if reduction == "none" else (), dtype=torch.float32)
    return loss, *_fake_gradients(x, weight, bias, found_with_the_loss(x, needs, reduction))


def _fake_gradients(x, weight, bias, needs):
    return [torch.empty_like(t) if need else x.new_empty(0) for t, need in zip((x, weight, bias), needs, strict=True)]


def _fake_backward(grad_loss, x, weight, target, bias, class_weight, found_x, found_weight, found_bias, *settings):
    return tuple(_fake_gradients(x, weight, bias, settings[-2]))


_SETTINGS = "int ignore_index, float label_smoothing, float z_loss, float softcap, str reduction, bool[] needs"
_forward = _library.define(
    "linear_cross_entropy",
    f"(Tensor x, Tensor weight, Tensor target, Tensor? bias, Tensor? class_weight, {_SETTINGS}) "
    "-> (Tensor loss, Tensor found_x, Tensor found_weight, Tensor found_bias)",
    _fake_forward,
)
_backward = _library.define(
    "linear_cross_entropy",
    "(Tensor grad_loss, Tensor x, Tensor weight, Tensor target, Tensor? bias, Tensor? class_weight, Tensor found_x, "
    f"Tensor found_weight, Tensor found_bias, {_SETTINGS}) -> (Tensor grad_x, Tensor grad_weight, Tensor grad_bias)",
    _fake_backward,
    "backward",
)


@_library.differentiable(_forward)
class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(*args):
        return _forward(*args)

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, weight, target, bias, class_weight, *settings, backend = inputs
        _, *grads = output
        ctx.mark_non_differentiable(*grads)
        ctx.save_for_backward(x, weight, target, bias, class_weight, *grads)
        ctx.settings = settings, backend

    @staticmethod
    def backward(ctx, grad_loss, *_):
        settings, backend = ctx.settings
        saved = ctx.saved_tensors
        grads = _library.scale_found(grad_loss, saved[5:])
        if grads is None:
            grads = _library.run_backward(_backward, grad_loss, *saved, *settings, backend)
        grad_x, grad_weight, grad_bias = (
            grad if need else None for grad, need in zip(grads, settings[-1], strict=True)
        )
        return (grad_x, grad_weight, None, grad_bias, *[None] * 8)
