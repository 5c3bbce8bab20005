"""Losses of language models: the next token, or what stood at corrupted places; and how many tokens are right."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fastattn import ops
from fastattn.ops import _checks

from .accumulation import over_items

LOGITS_AT_A_TIME = 2**23  # of `token_statistics`


def next_token_targets(labels: Tensor, cu_seqlens: Tensor | None = None, ignore_index: int = -100) -> Tensor:
    """Labels that lie as the tokens do, moved so that each place holds the label of the next token.

    Args:
        labels: (…, seq), int64.
        cu_seqlens: (sequences + 1,), int32, from 0 to seq, where sequences laid end to end begin; None where each row is one.
        ignore_index: stands at the last token of each sequence, which has no next one.

    Returns:
        (…, seq), int64.

    Raises:
        TypeError: wrong dtypes.
        ValueError: labels without a dimension, cu_seqlens that do not fit.
    """
    _check_labels(labels)
    if labels.ndim == 0:
        raise ValueError("labels has no dimension; expected (…, seq)")
    seq = labels.shape[-1]
    if cu_seqlens is not None:
        _checks.cu_seqlens("cu_seqlens", cu_seqlens, "the sequence of labels", seq, "its length", seq, labels)
    target = torch.full_like(labels, _checks.integer("ignore_index", ignore_index))
    target[..., :-1] = labels[..., 1:]
    if cu_seqlens is not None and seq:
        # An empty sequence ends where another does, or, if it is the first, at -1, which is the end of the last.
        target[..., cu_seqlens[1:].long() - 1] = ignore_index
    return target


def count_targets(
    labels: Tensor, *, shift: bool = True, cu_seqlens: Tensor | None = None, ignore_index: int = -100
) -> Tensor:
    """How many labels `language_modelling_loss` counts, or, without the shift, `masked_language_modelling_loss`.

    Summed over the parts of a batch it is their `num_items_in_batch`.

    Args:
        labels, shift, cu_seqlens, ignore_index: as `language_modelling_loss`'s.

    Returns:
        A scalar, int64.
    """
    return (_targets(labels, shift, cu_seqlens, ignore_index) != ignore_index).sum()


def language_modelling_loss(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None = None,
    *,
    shift: bool = True,
    cu_seqlens: Tensor | None = None,
    num_items_in_batch: float | Tensor | None = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float | None = None,
    ignore_index: int = -100,
    class_weight: Tensor | None = None,
) -> Tensor:
    """Cross entropy of each token's label, or of the next one's, under `hidden · weightᵀ + bias`; the logits never exist.

    Args:
        hidden: (…, seq, dim), floating, what the model gives behind its last norm.
        weight: (vocabulary, dim), a head's own or, tied, the embedding's. bias: (vocabulary,).
        labels: (…, seq), int64, lying as the tokens do (often they are the tokens); ignore_index is not counted.
        shift: ask place i for the label at i + 1 (`next_token_targets`); False for labels that are targets already.
        cu_seqlens: (sequences + 1,), int32, where sequences laid end to end in seq begin: none is asked for the next one's
            first token.
        num_items_in_batch: for "mean", what the sum is divided by in the place of the number of labels that count: their
            number in all parts of a batch whose gradients are accumulated (`count_targets`), a number or a tensor of one
            element. The parts' losses, and their gradients, then add up to those of the batch as a whole. With class_weight
            it is the sum of the weights of the labels; z_loss, whose own mean is over labels, is divided by that, too.
        reduction: "mean", "sum", or "none" for each label's own.
        label_smoothing, z_loss, softcap, class_weight: as `fastattn.linear_cross_entropy`'s.

    Returns:
        float32 (float64 for float64): a scalar, or (…, seq) where reduction is "none", zeros where nothing is counted. The
        mean over no label at all is NaN, as in torch, unless num_items_in_batch is given.

    Raises:
        TypeError: wrong or mixed dtypes.
        ValueError: shapes, devices or values that do not fit, among them a label outside the vocabulary (on a CPU).

    Source: Radford et al., 2018 (GPT); num_items_in_batch is Hugging Face Trainer's.
    """
    _check_hidden(hidden, weight, labels)
    target = _targets(labels, shift, cu_seqlens, ignore_index)
    settings: dict[str, Any] = {"label_smoothing": label_smoothing, "z_loss": z_loss, "softcap": softcap}
    settings |= {"ignore_index": ignore_index, "class_weight": class_weight}
    return _normalised(hidden, weight, target, bias, num_items_in_batch, reduction, settings)


def masked_language_modelling_loss(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None = None,
    transform: Callable[[Tensor], Tensor] | None = None,
    *,
    num_items_in_batch: float | Tensor | None = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float | None = None,
    ignore_index: int = -100,
    class_weight: Tensor | None = None,
) -> Tensor:
    """Cross entropy of what stood at the corrupted places: their rows are gathered, and only they meet head and vocabulary.

    Args:
        hidden: (…, width), floating, what the encoder gives.
        weight: (vocabulary, dim), a head's own or, tied, the embedding's. bias: (vocabulary,).
        labels: (…), int64: the token that stood there at a corrupted place, ignore_index at all others.
        transform: what lies between encoder and head, applied to the gathered rows (places, width) and giving
            (places, dim), such as BERT's `nn.Sequential(fastattn.nn.Linear(width, dim, activation="gelu"),
            fastattn.nn.LayerNorm(dim))`; None for nothing.
        num_items_in_batch, reduction, label_smoothing, z_loss, softcap, class_weight: as `language_modelling_loss`'s.

    Returns:
        As `language_modelling_loss`; (…) where reduction is "none".

    Raises:
        TypeError, ValueError: as `language_modelling_loss`; a transform that does not give a row for a row.

    Source: Devlin et al., 2019 (BERT).
    """
    places, target = _gathered_targets(hidden, labels, ignore_index)
    rows = _transformed(hidden, places, transform)
    _check_hidden(rows, weight, target)
    settings: dict[str, Any] = {"label_smoothing": label_smoothing, "z_loss": z_loss, "softcap": softcap}
    settings |= {"ignore_index": ignore_index, "class_weight": class_weight}
    loss = _normalised(rows, weight, target, bias, num_items_in_batch, reduction, settings)
    if reduction != "none":
        return loss
    return loss.new_zeros(labels.numel()).index_copy(0, places, loss).view(labels.shape)


@dataclass(frozen=True)
class TokenStatistics:
    """What `token_statistics` counts; add those of several batches up with `+`.

    Attributes:
        correct: how many labels have the largest logit, a scalar, int64. Of equal logits the first is the largest.
        total: how many labels count, a scalar, int64.
    """

    correct: Tensor
    total: Tensor

    @property
    def accuracy(self) -> Tensor:
        """correct / total, a scalar, float32; NaN of nothing."""
        return self.correct / self.total

    def __add__(self, other: "TokenStatistics") -> "TokenStatistics":
        return TokenStatistics(self.correct + other.correct, self.total + other.total)


@torch.no_grad()
def token_statistics(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None = None,
    transform: Callable[[Tensor], Tensor] | None = None,
    *,
    shift: bool = True,
    cu_seqlens: Tensor | None = None,
    ignore_index: int = -100,
) -> TokenStatistics:
    """How many labels the model would say itself. Logits exist for a few rows at a time; no gradient is recorded.

    Args:
        hidden, weight, labels, bias, shift, cu_seqlens, ignore_index: as `language_modelling_loss`'s. A softcap changes no
            order of logits, and is not asked for.
        transform: as `masked_language_modelling_loss`'s, for which shift is False.

    Raises:
        TypeError, ValueError: as these.
    """
    places, target = _gathered_targets(hidden, _targets(labels, shift, cu_seqlens, ignore_index), ignore_index)
    at_a_time = max(1, LOGITS_AT_A_TIME // max(1, weight.shape[0]))
    correct = torch.zeros((), dtype=torch.int64, device=hidden.device)
    for some, wanted in zip(places.split(at_a_time), target.split(at_a_time), strict=True):
        rows = _transformed(hidden, some, transform)
        _check_hidden(rows, weight, wanted)
        correct += (ops.linear(rows, weight, bias).argmax(dim=-1) == wanted).sum()
    return TokenStatistics(correct, torch.full_like(correct, target.numel()))


class _LanguageModellingLoss(nn.Module):
    """The settings that both modules hold."""

    class_weight: Tensor | None

    def __init__(
        self,
        reduction: str = "mean",
        label_smoothing: float = 0.0,
        z_loss: float = 0.0,
        softcap: float | None = None,
        ignore_index: int = -100,
        class_weight: Tensor | None = None,
    ) -> None:
        super().__init__()
        self.reduction, self.label_smoothing, self.z_loss = reduction, label_smoothing, z_loss
        self.softcap, self.ignore_index = softcap, ignore_index
        self.register_buffer("class_weight", class_weight)

    def _options(self) -> dict[str, Any]:
        return {
            "reduction": self.reduction,
            "label_smoothing": self.label_smoothing,
            "z_loss": self.z_loss,
            "softcap": self.softcap,
            "ignore_index": self.ignore_index,
            "class_weight": self.class_weight,
        }

    def extra_repr(self) -> str:
        given = {name: value for name, value in self._options().items() if name != "class_weight"}
        return ", ".join(f"{name}={value!r}" for name, value in given.items())


class LanguageModellingLoss(_LanguageModellingLoss):
    """`language_modelling_loss` with its settings. The head is given with each call, so that a tied one is never copied.

    Args:
        shift, reduction, label_smoothing, z_loss, softcap, ignore_index: as the function's.
        class_weight: (vocabulary,), kept as a buffer.
    """

    def __init__(self, *, shift: bool = True, **settings: Any) -> None:
        super().__init__(**settings)
        self.shift = shift

    def forward(
        self,
        hidden: Tensor,
        weight: Tensor,
        labels: Tensor,
        bias: Tensor | None = None,
        *,
        cu_seqlens: Tensor | None = None,
        num_items_in_batch: float | Tensor | None = None,
    ) -> Tensor:
        """The loss; arguments as the function's."""
        return language_modelling_loss(
            hidden,
            weight,
            labels,
            bias,
            shift=self.shift,
            cu_seqlens=cu_seqlens,
            num_items_in_batch=num_items_in_batch,
            **self._options(),
        )

    def statistics(
        self,
        hidden: Tensor,
        weight: Tensor,
        labels: Tensor,
        bias: Tensor | None = None,
        *,
        cu_seqlens: Tensor | None = None,
    ) -> TokenStatistics:
        """`token_statistics` of the same call."""
        return token_statistics(
            hidden,
            weight,
            labels,
            bias,
            shift=self.shift,
            cu_seqlens=cu_seqlens,
            ignore_index=self.ignore_index,
        )


class MaskedLanguageModellingLoss(_LanguageModellingLoss):
    """`masked_language_modelling_loss` with its settings, and the transform before the head, which is trained along.

    Args:
        transform: a module between encoder and head, or None.
        reduction, label_smoothing, z_loss, softcap, ignore_index: as the function's.
        class_weight: (vocabulary,), kept as a buffer.
    """

    def __init__(self, transform: nn.Module | None = None, **settings: Any) -> None:
        super().__init__(**settings)
        self.transform = transform

    def forward(
        self,
        hidden: Tensor,
        weight: Tensor,
        labels: Tensor,
        bias: Tensor | None = None,
        *,
        num_items_in_batch: float | Tensor | None = None,
    ) -> Tensor:
        """The loss; arguments as the function's."""
        return masked_language_modelling_loss(
            hidden,
            weight,
            labels,
            bias,
            self.transform,
            num_items_in_batch=num_items_in_batch,
            **self._options(),
        )

    def statistics(self, hidden: Tensor, weight: Tensor, labels: Tensor, bias: Tensor | None = None) -> TokenStatistics:
        """`token_statistics` of the same call."""
        return token_statistics(
            hidden, weight, labels, bias, self.transform, shift=False, ignore_index=self.ignore_index
        )


def _normalised(
    rows: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None,
    num_items_in_batch: float | Tensor | None,
    reduction: str,
    settings: dict[str, Any],
) -> Tensor:
    """`linear_cross_entropy`, or its sum over num_items_in_batch."""
    if num_items_in_batch is None:
        return ops.linear_cross_entropy(rows, weight, target, bias, reduction=reduction, **settings)
    if reduction != "mean":
        raise ValueError(
            f"num_items_in_batch is given and reduction is {reduction!r}; expected 'mean', the only one that divides"
        )
    total = ops.linear_cross_entropy(rows, weight, target, bias, reduction="sum", **settings)
    return over_items(total, num_items_in_batch)


def _targets(labels: Tensor, shift: bool, cu_seqlens: Tensor | None, ignore_index: int) -> Tensor:
    if _checks.flag("shift", shift):
        return next_token_targets(labels, cu_seqlens, ignore_index)
    _check_labels(labels)
    if cu_seqlens is not None:
        raise ValueError("cu_seqlens is given and shift is False; it says where labels are not moved: leave it out")
    return labels


def _gathered_targets(hidden: Tensor, labels: Tensor, ignore_index: int) -> tuple[Tensor, Tensor]:
    """Where in the flattened labels there is one that counts, and these."""
    _check_rows(hidden, labels)
    flat = labels.flatten()
    places = (flat != ignore_index).nonzero().flatten()
    return places, flat.index_select(0, places)


def _transformed(hidden: Tensor, places: Tensor, transform: Callable[[Tensor], Tensor] | None) -> Tensor:
    rows = hidden.flatten(0, -2).index_select(0, places)
    if transform is None:
        return rows
    out = transform(rows)
    _checks.tensor("what transform gives", out)
    if out.ndim != 2 or out.shape[0] != rows.shape[0]:
        raise ValueError(
            f"transform gives {tuple(out.shape)} for rows of shape {tuple(rows.shape)}; expected a row for each"
        )
    return out


def _check_labels(labels: Tensor) -> None:
    _checks.tensor("labels", labels)
    if labels.dtype != torch.int64:
        raise TypeError(f"labels has dtype {labels.dtype}; expected int64 token numbers: convert it with labels.long()")


def _check_rows(hidden: Tensor, labels: Tensor) -> None:
    """A row of hidden for each label."""
    _checks.floating("hidden", hidden)
    _check_labels(labels)
    if hidden.ndim < 2 or labels.shape != hidden.shape[:-1]:
        raise ValueError(
            f"labels has shape {tuple(labels.shape)} and hidden {tuple(hidden.shape)}; expected (…, seq) and (…, seq, dim)"
        )
    if labels.device != hidden.device:
        raise ValueError(f"labels is on {labels.device} but hidden is on {hidden.device}; move one with .to(device)")


def _check_hidden(hidden: Tensor, weight: Tensor, labels: Tensor) -> None:
    """What the op would say of arguments that have other names there."""
    _check_rows(hidden, labels)
    _checks.floating("weight", weight)
    if weight.ndim != 2 or weight.shape[1] != hidden.shape[-1]:
        raise ValueError(
            f"weight has shape {tuple(weight.shape)}; expected (vocabulary, dim) with hidden's dim {hidden.shape[-1]}"
        )
