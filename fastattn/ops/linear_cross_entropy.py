"""A language model's last linear layer and its cross entropy."""

import torch
from torch import Tensor

from .. import dispatch
from . import _autocast, _checks, _library
from .linear import matrix_product, vector


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
            (vocabulary,).
        z_loss: factor of the squared logsumexp of each row that is not ignored.
        softcap: logits become softcap · tanh(logit / softcap).

    Returns:
        float32 (float64 for float64): a scalar, or (…) where reduction is "none". The mean over no row at all is NaN, as
        in torch.

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
    if not isinstance(reduction, str) or reduction not in ("mean", "sum", "none"):
        raise ValueError(f"reduction is {reduction!r}; expected 'mean', 'sum' or 'none'")
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
    args = (x, weight, target, bias, class_weight, ignore_index, float(label_smoothing), z_loss, cap, reduction)
    dispatch.choose("linear_cross_entropy", args)
    return _forward(*args)


_forward = _library.define_composite(
    "linear_cross_entropy",
    "(Tensor x, Tensor weight, Tensor target, Tensor? bias, Tensor? class_weight, int ignore_index, float label_smoothing, "
    "float z_loss, float softcap, str reduction) -> Tensor",
)
