"""The contrastive loss InfoNCE with in-batch negatives."""

import torch
from torch import Tensor

from .. import dispatch
from . import _autocast, _checks, _library


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
        A scalar, float32 (float64 for float64).

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
    if isinstance(temperature, Tensor):
        _checks.tensor("temperature", temperature)
        if temperature.numel() != 1 or not temperature.is_floating_point():
            raise ValueError(
                f"temperature has shape {tuple(temperature.shape)} and dtype {temperature.dtype}; expected one floating element"
            )
        if temperature.device != query.device and temperature.device.type != "cpu":
            raise ValueError(f"temperature is on {temperature.device} but query is on {query.device}; move one")
        divisor = temperature
    else:
        _checks.number("temperature", temperature)
        if not temperature > 0.0:
            raise ValueError(f"temperature is {temperature}; expected a positive number")
        divisor = torch.tensor(float(temperature), dtype=torch.float64, device=query.device)
    args = (query, positive, negatives, divisor, bool(symmetric))
    dispatch.choose("info_nce", args)
    return _forward(*args)


_forward = _library.define_composite(
    "info_nce",
    "(Tensor query, Tensor positive, Tensor? negatives, Tensor temperature, bool symmetric) -> Tensor",
)
