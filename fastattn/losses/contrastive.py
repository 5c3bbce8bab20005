"""The contrastive loss InfoNCE with all that is built around it: several positives, hard negatives, a learnt temperature."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastattn import ops
from fastattn.ops import _autocast, _checks
from fastattn.ops.info_nce import divisor_of_scores

from . import gathering


def contrastive_loss(
    query: Tensor,
    positive: Tensor,
    negatives: Tensor | None = None,
    temperature: float | Tensor = 0.07,
    symmetric: bool = False,
    *,
    labels: Tensor | None = None,
    normalise: bool = False,
    gather: bool = False,
    group: Any = None,
) -> Tensor:
    """Each query should pick its positives among everybody's positives and the negatives.

        s_ij = query_i · candidate_j / temperature          candidates: all positives, then the negatives
        loss = mean over i of  logsumexp_j s_ij  -  mean over p in P(i) of s_ip

    which is the mean over a row's positives P(i) of -log softmax(s_i)[p]; its other positives stand in the denominator, as
    in SupCon's L_out. The scores never exist as a whole, nor is anything of their size kept for the backward. With several
    positives a row they are computed in float32, whatever the inputs' dtype.

    Args:
        query: (n, dim), floating.
        positive: (n, dim), or (n, k, dim) for k positives a row: P(i) is positive[i].
        negatives: (m, dim), or (n, h, dim), hard negatives found for each query; all are candidates of all queries.
        temperature: the scores' divisor, a positive number or a tensor of one element, with a gradient if it requires one.
        symmetric: average with the loss of each positive that picks its query among all queries (CLIP).
        labels: (n,), int64: rows of equal labels are one another's positives, P(i) all positives of such rows. None where
            each row stands for itself.
        normalise: give all rows length 1 first, so that scores are cosines.
        gather: take the queries, positives and negatives of all processes of `group` as candidates for this process's rows.
            Each process gets the loss of its own rows; the mean of the losses, and of the gradients that each process finds
            (as DistributedDataParallel takes it), is that of one process on the whole batch. The backward runs in all.
        group: a `torch.distributed` process group; None for all processes.

    Returns:
        A scalar, float32 (float64 for float64).

    Raises:
        TypeError: wrong or mixed dtypes.
        ValueError: shapes, devices or values that do not fit; with gather, shapes that differ between processes.
        RuntimeError: gather without an initialised torch.distributed.

    Source: van den Oord et al., 2018; symmetric Radford et al., 2021 (CLIP); several positives Khosla et al., "Supervised
        Contrastive Learning", 2020, equation 2, with queries and candidates from two sets, so that no row meets itself.
    """
    _check(query, positive, negatives, labels)
    if normalise:
        query, positive = _normalised(query), _normalised(positive)
        negatives = None if negatives is None else _normalised(negatives)
    if _autocast.active(query):
        query, positive, negatives = _autocast.cast(query, positive, negatives)
    if gather:
        shapes = {"query": query, "positive": positive, "negatives": negatives, "labels": labels}
        gathering.check_alike(shapes, group)
    elif group is not None:
        raise ValueError("group is given and gather is False; pass gather=True to gather from it")
    divisor = divisor_of_scores(temperature, query)
    positives = positive.unsqueeze(1) if positive.ndim == 2 else positive
    n, several, _ = positives.shape
    negatives = None if negatives is None else negatives.flatten(0, -2)
    if labels is None and several == 1 and not gather:
        return ops.info_nce(query, positives[:, 0], negatives, divisor, symmetric)  # both sides in one sweep
    far = _bring(query if symmetric else None, positives, negatives, labels, group) if gather else _Far()
    if labels is None and several == 1:
        others = [x for x in (far.positive, negatives, far.negatives) if x is not None]
        loss = ops.info_nce(query, positives[:, 0], torch.cat(others) if others else None, divisor)
    else:
        candidates = _joined(positives.flatten(0, 1), far.positive, negatives, far.negatives)
        wanted = positives.mean(1, dtype=_wide(query))
        if labels is not None:
            wanted = _of_equal_labels(wanted, labels, far.mean_positive, far.labels)
        loss = _pick_several(query, candidates, wanted, divisor)
    if not symmetric:
        return loss
    if labels is None:
        back = torch.stack([ops.info_nce(own, query, far.query, divisor) for own in positives.unbind(1)]).mean()
    else:
        wanted = _of_equal_labels(query, labels, far.query, far.labels).repeat_interleave(
            several, 0, output_size=n * several
        )
        back = _pick_several(positives.flatten(0, 1), _joined(query, far.query), wanted, divisor)
    return (loss + back) / 2


class ContrastiveLoss(nn.Module):
    """`contrastive_loss` with its settings, and the temperature where it is learnt.

    Args:
        temperature: the scores' divisor (at the start, where it is learnt), a positive number.
        learned: whether the temperature is learnt: `logit_scale`, a parameter without a dimension, is log(1 / temperature),
            as in CLIP. Its gradient is right only if all processes share it (wrap this module along with the model in
            DistributedDataParallel); leave it out of weight decay, and in float32.
        max_scale: the most that 1 / temperature may become. In training `logit_scale` is cut to log(max_scale) in place when
            it is read, as CLIP does after each step; a gradient that leads back is not lost.
        symmetric, normalise, gather, group: as the function's.

    Raises:
        ValueError: a temperature that is not positive, or, learnt, below 1 / max_scale.

    Source: Radford et al., 2021 (CLIP): a temperature of 0.07 at the start, a scale of at most 100.
    """

    def __init__(
        self,
        temperature: float = 0.07,
        *,
        learned: bool = False,
        max_scale: float = 100.0,
        symmetric: bool = False,
        normalise: bool = False,
        gather: bool = False,
        group: Any = None,
    ) -> None:
        super().__init__()
        self.initial = _checks.number("temperature", temperature)
        if self.initial <= 0.0:
            raise ValueError(f"temperature is {temperature}; expected a positive number")
        self.max_scale = _checks.number("max_scale", max_scale)
        if learned and self.initial * self.max_scale < 1.0:
            raise ValueError(
                f"temperature is {temperature} and max_scale {max_scale}; expected at least 1 / max_scale = {1 / max_scale}"
            )
        self.symmetric, self.normalise, self.gather, self.group = symmetric, normalise, gather, group
        self.logit_scale = nn.Parameter(torch.tensor(-math.log(self.initial))) if learned else None

    @property
    def temperature(self) -> float | Tensor:
        """The scores' divisor; a tensor with a gradient where it is learnt."""
        if self.logit_scale is None:
            return self.initial
        most = math.log(self.max_scale)
        if not self.training:
            return torch.exp(-self.logit_scale.clamp(max=most))
        with torch.no_grad():
            self.logit_scale.clamp_(max=most)
        return torch.exp(-self.logit_scale)

    def forward(
        self,
        query: Tensor,
        positive: Tensor,
        negatives: Tensor | None = None,
        *,
        labels: Tensor | None = None,
    ) -> Tensor:
        """The loss; arguments as the function's."""
        return contrastive_loss(
            query,
            positive,
            negatives,
            self.temperature,
            self.symmetric,
            labels=labels,
            normalise=self.normalise,
            gather=self.gather,
            group=self.group,
        )

    def extra_repr(self) -> str:
        learned = self.logit_scale is not None
        return (
            f"temperature={self.initial}, learned={learned}, symmetric={self.symmetric}, normalise={self.normalise}, "
            f"gather={self.gather}"
        )


def encode_twice(encoder: Callable[..., Tensor], *args: Tensor, **kwargs: Tensor) -> tuple[Tensor, Tensor]:
    """SimCSE's pair: the same batch encoded twice, by one pass over both copies, each with dropout of its own.

    Args:
        encoder: called with every tensor doubled along its first dimension, gives (2 · n, dim): an `Embedder`, say.
        args, kwargs: tensors of n rows, such as a tokenizer gives; other arguments of the encoder bind before
            (`functools.partial`).

    Returns:
        (n, dim) and (n, dim): query and positive for `contrastive_loss`.

    Raises:
        TypeError: an argument that is no tensor.
        ValueError: tensors of different first dimensions, a module in eval mode, whose two passes would be one, or an
            encoder that gives no row for each.

    Source: Gao et al., "SimCSE", 2021.
    """
    if isinstance(encoder, nn.Module) and not encoder.training:
        raise ValueError("encoder is in eval mode, where both passes give the same; call encoder.train()")
    named = {**{f"argument {i}": x for i, x in enumerate(args)}, **kwargs}
    if not named:
        raise ValueError("encoder gets no tensor; pass the batch behind it")
    rows = {}
    for name, x in named.items():
        _checks.tensor(name, x)
        rows[name] = x.shape[0] if x.ndim else None
    n = next(iter(rows.values()))
    if n is None or len(set(rows.values())) > 1:
        given = ", ".join(f"{name} {tuple(x.shape)}" for name, x in named.items())
        raise ValueError(
            f"the encoder's arguments have shapes {given}; expected one first dimension, the batch, for all"
        )
    out = encoder(*(torch.cat((x, x)) for x in args), **{name: torch.cat((x, x)) for name, x in kwargs.items()})
    _checks.tensor("what encoder gives", out)
    if out.ndim != 2 or out.shape[0] != 2 * n:
        raise ValueError(f"encoder gives {tuple(out.shape)} for {2 * n} rows; expected ({2 * n}, dim)")
    return out[:n], out[n:]


@dataclass
class _Far:
    """What the other processes bring, each (rows, dim), labels (rows,); None for nothing."""

    positive: Tensor | None = None
    negatives: Tensor | None = None
    query: Tensor | None = None
    mean_positive: Tensor | None = None
    labels: Tensor | None = None


def _bring(
    query: Tensor | None, positives: Tensor, negatives: Tensor | None, labels: Tensor | None, group: Any
) -> _Far:
    """All rows in a single collective, and one for labels."""
    parts = {"positive": positives.flatten(0, 1), "negatives": negatives, "query": query}
    given = {name: x for name, x in parts.items() if x is not None}
    together = gathering.others_rows(torch.cat(tuple(given.values())), group)
    if not len(together):  # a group of one
        return _Far()
    split = together.split([len(x) for x in given.values()], dim=1)
    far = _Far(**{name: x.flatten(0, 1) for name, x in zip(given, split, strict=True)})
    if labels is not None:
        far.labels = gathering.others_rows(labels, group).flatten()
        far.mean_positive = split[0].unflatten(1, positives.shape[:2]).mean(2, dtype=_wide(positives)).flatten(0, 1)
    return far


def _pick_several(rows: Tensor, candidates: Tensor, wanted: Tensor, divisor: Tensor) -> Tensor:
    """Mean over rows (n, dim) of logsumexp_j s_j - row · wanted / divisor, for the mean (n, dim) of each row's positives.

    Scores are linear in the candidates: the mean of the positives' scores is the score of their mean. The logsumexp comes
    from a cross entropy that is smoothed to the utmost, logsumexp_j s_j - mean_j s_j, in which no candidate stands out: with
    one positive as its target, sums of small terms would be rounded as large as that one, only for it to be taken off again.
    In float32, since the temperature gets its gradient from that of the rows, which must not be rounded to 16 bits before.
    """
    wide = _wide(rows)
    candidates, scaled = candidates.to(wide), rows.to(wide) / divisor.to(wide).reshape(())
    any_target = torch.zeros(len(rows), dtype=torch.int64, device=rows.device)
    with torch.autocast(rows.device.type, enabled=False):
        loss = ops.linear_cross_entropy(scaled, candidates, any_target, label_smoothing=1.0)
    return loss + (scaled * (candidates.mean(0) - wanted)).sum(-1).mean()


def _of_equal_labels(
    rows: Tensor, labels: Tensor, far: Tensor | None = None, far_labels: Tensor | None = None
) -> Tensor:
    """For each of rows (n, dim) the mean of all rows, far ones too, that have its label; (n, dim), float32 or wider."""
    everyone, their_labels = _joined(rows, far), _joined(labels, far_labels)
    sorted_labels = their_labels.sort().values
    group = torch.searchsorted(sorted_labels, their_labels)  # the place of the first of these labels numbers the group
    sums = everyone.new_zeros(everyone.shape, dtype=_wide(rows)).index_add(0, group, everyone.to(_wide(rows)))
    count = torch.zeros_like(group).index_add(0, group, torch.ones_like(group))
    own = group[: len(rows)]
    return sums.index_select(0, own) / count.index_select(0, own).unsqueeze(1)


def _joined(first: Tensor, *rest: Tensor | None) -> Tensor:
    """All that is there, one below the other."""
    given = [x for x in rest if x is not None]
    return torch.cat([first, *given]) if given else first


def _normalised(x: Tensor) -> Tensor:
    """Rows of length 1, zeros where a row is zero."""
    return F.normalize(x.to(_wide(x)), dim=-1).to(x.dtype)


def _wide(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _check(query: Tensor, positive: Tensor, negatives: Tensor | None, labels: Tensor | None) -> None:
    """What `info_nce` does not see, since it gets other shapes; dtypes are compared there, under autocast."""
    _checks.floating("query", query)
    _checks.rank("query", query, "(n, dim)", 2)
    n, dim = query.shape
    _checks.floating("positive", positive)
    if positive.ndim not in (2, 3) or (positive.shape[0], positive.shape[-1]) != (n, dim) or 0 in positive.shape[1:-1]:
        raise ValueError(
            f"positive has shape {tuple(positive.shape)}; expected query's (n, dim) = ({n}, {dim}), or (n, k, dim) for k "
            "positives a row, one at least"
        )
    if negatives is not None:
        _checks.floating("negatives", negatives)
        if negatives.shape[-1:] != (dim,) or not (negatives.ndim == 2 or (negatives.ndim == 3 and len(negatives) == n)):
            raise ValueError(
                f"negatives has shape {tuple(negatives.shape)}; expected (m, dim) or (n, h, dim) with n {n} and dim {dim}"
            )
    if labels is not None:
        _checks.tensor("labels", labels)
        if labels.dtype != torch.int64:
            raise TypeError(f"labels has dtype {labels.dtype}; expected int64: convert it with labels.long()")
        if labels.shape != (n,):
            raise ValueError(f"labels has shape {tuple(labels.shape)}; expected (n,) = ({n},), a label a row of query")
        if labels.device != query.device:
            raise ValueError(f"labels is on {labels.device} but query is on {query.device}; move one with .to(device)")
